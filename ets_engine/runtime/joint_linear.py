"""Queries, keys and values of an attention layer as one product instead of three; inference only.

The three read the same input. Keys and values have few weights where heads share them (GQA), too few to keep a GPU at
work: in the shape of Llama-3.1-8B, 32 layers of three products take an H100 1.04 ms for 96 to 160 rows, of one 0.69 to
0.73. Gate and up of an MLP, the other two that share an input, are as fast apart (2.9 ms; `gated_linear.py` joins them
another way), and on a CPU one product is slower, for its three parts do not lie one after the other in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeGuard

import torch

NAMES = ("q_proj", "k_proj", "v_proj")  # that transformers gives them, in the order in which they are called


class JointLinear(torch.nn.Linear):
    """The weights of some linear layers, one below the other, and what the input read last gave."""

    def __init__(self, layers: Sequence[torch.nn.Linear]) -> None:
        """Copy the weights of layers with as many inputs, all with or all without a bias."""
        first, self.sizes = layers[0], [layer.out_features for layer in layers]
        super().__init__(first.in_features, sum(self.sizes), bias=first.bias is not None, device="meta")
        for name, parameter in list(self.named_parameters()):
            together = torch.cat([getattr(layer, name).detach() for layer in layers])
            setattr(self, name, torch.nn.Parameter(together, requires_grad=parameter.requires_grad))
        self._read: torch.Tensor | None = None
        self._products: tuple[torch.Tensor, ...] = ()

    def part(self, number: int, input: torch.Tensor) -> torch.Tensor:
        """What layer `number` makes of an input; the last one forgets it. [..., in] -> [..., out]."""
        if self._read is not input:
            self._read, self._products = input, self(input).split(self.sizes, -1)
        product = self._products[number]
        if number == len(self.sizes) - 1:
            self._read, self._products = None, ()
        return product


class LinearPart(torch.nn.Module):
    """One of the layers of a `JointLinear`, in the place where it was."""

    def __init__(self, joint: JointLinear, number: int) -> None:
        """`number` counts from 0, in the order of the joint layer's outputs."""
        super().__init__()
        self.number, self.in_features, self.out_features = number, joint.in_features, joint.sizes[number]
        self.joint = joint

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        return self.joint.part(self.number, input)


def join_linears(model: torch.nn.Module) -> int:
    """Change the three layers of every attention to parts of one; weights are moved, not kept twice.

    Layers of another class than `torch.nn.Linear` (quantised ones, adapters), with hooks, or that differ in inputs,
    dtype, device or having a bias, stay as they are. Where one of the three reads something else, it is multiplied
    with that.

    Returns:
        Joint layers (count).

    Example:
        >>> attention = torch.nn.Module()
        >>> attention.q_proj, attention.k_proj, attention.v_proj = (torch.nn.Linear(4, size) for size in (8, 2, 2))
        >>> x = torch.ones(3, 4)
        >>> join_linears(attention), [getattr(attention, name)(x).shape[1] for name in NAMES]
        (1, [8, 2, 2])
    """
    joined = 0
    for module in list(model.modules()):
        found = [getattr(module, name, None) for name in NAMES]
        layers = [one for one in found if is_plain(one)]
        if len(layers) == len(NAMES) and len(set(map(_kind, layers))) == 1:
            joint = JointLinear(layers)
            for number, name in enumerate(NAMES):
                setattr(module, name, LinearPart(joint, number))
            joined += 1
    if joined and torch.cuda.is_initialized():
        torch.cuda.empty_cache()  # what the separate weights took
    return joined


def is_plain(layer: object) -> TypeGuard[torch.nn.Linear]:
    """Whether a module is a linear layer and nothing else: not quantised, no adapter, nothing hooked into it."""
    if type(layer) is not torch.nn.Linear or type(layer.weight) is not torch.nn.Parameter:  # a quantised weight's own
        return False
    return not is_hooked(layer)


def is_hooked(module: torch.nn.Module) -> bool:
    """Whether somebody looks at what a module reads or gives, or has replaced how (as accelerate does)."""
    return bool(module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _kind(layer: torch.nn.Linear) -> tuple[object, ...]:
    return layer.in_features, layer.weight.dtype, layer.weight.device, layer.bias is None
