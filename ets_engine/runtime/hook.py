"""The attention function that transformers calls in our name: K/V into the pool, then tree attention.

It is registered once as `ets_tree`; everything it needs travels in the forward's keyword arguments, so there is no
global state and any number of models and threads may use it. No mask function is registered under that name:
transformers then builds no mask at all. Under `ets_probe`, used once at load, a mask carries how far a layer sees.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ets_engine.attention import tree_attention
from ets_engine.errors import UnsupportedModelError
from ets_engine.kv import KVPool, LayerShape, TreeLayout

ATTENTION_NAME = "ets_tree"
PROBE_NAME = "ets_probe"
FAR = 1 << 20  # tokens; farther than any context
# What models hand to their attention function when plain softmax attention over all earlier tokens is not what they do.
_REFUSED_ARGUMENTS = {
    "softcap": "soft-capped attention scores",
    "s_aux": "attention sinks",
    "sinks": "attention sinks",
    "position_bias": "a bias on the attention scores",
    "alibi": "a bias on the attention scores (ALiBi)",
}


@dataclass(slots=True)
class TreeForward:
    """Keyword argument of one forward pass through the tree cache; counts its calls, so that none goes missing."""

    pool: KVPool
    layout: TreeLayout
    calls: int = 0

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Store one layer's new K/V and attend; query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
        self.calls += 1
        self.pool.write(layer, self.layout.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        packed = query[0].transpose(0, 1).contiguous()  # [T, H, D]
        return tree_attention(packed, self.pool.layers[layer], self.layout, scale=scale)[None]


@dataclass(slots=True)
class ShapeProbe:
    """Keyword argument of the first forward pass: records what each layer asks of attention instead of doing it.

    Attributes:
        shapes: K/V of each layer.
        windows: How many tokens up to itself a token sees in each layer, at most `FAR`.
        calls: Of the attention function (count).
    """

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    calls: int = 0

    def note_window(self, layer: int, mask: torch.Tensor | None, sliding_window: int | None) -> bool:
        """Record how far a layer sees, from what stands in place of its mask; False if that was tampered with."""
        seen = [] if mask is None else mask.unique().tolist()
        told = [] if sliding_window is None else [sliding_window]
        self.windows[layer] = int(min([FAR, *seen, *told]))
        return len(seen) <= 1 and self.windows[layer] >= 1

    def attend(
        self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float
    ) -> torch.Tensor:
        """Record the shapes; the result is only there to let the forward pass go on."""
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[0] != 1:
            raise UnsupportedModelError(
                f"layer {layer} has queries {list(query.shape)}, keys {list(key.shape)} and values "
                f"{list(value.shape)}: tree attention needs one head dim for all (no latent attention)"
            )
        self.calls += 1
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3])
        return query.new_zeros((1, query.shape[2], query.shape[1], query.shape[3]))


def _ets_tree_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ets_tree: TreeForward | ShapeProbe | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    if ets_tree is None:
        raise UnsupportedModelError(
            f"{type(module).__name__} does not pass the forward's keyword arguments on to its attention function, or "
            "the model was called outside ets_engine; tree attention cannot run in it"
        )
    for name, meaning in _REFUSED_ARGUMENTS.items():
        if others.get(name) is not None:
            raise UnsupportedModelError(f"{type(module).__name__} uses {meaning}, which tree attention cannot honour")
    layer = getattr(module, "layer_idx", None)
    if layer is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no layer_idx, so its KV layer is unknown")
    own_mask = attention_mask is not None
    if isinstance(ets_tree, ShapeProbe):
        own_mask = not ets_tree.note_window(layer, attention_mask, sliding_window)
        if not getattr(module, "is_causal", True):
            raise UnsupportedModelError(f"{type(module).__name__} is not causal; tree attention is for decoders")
    if own_mask:
        raise UnsupportedModelError(f"{type(module).__name__} masks its scores in a way of its own")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return ets_tree.attend(layer, query, key, value, scale), None


def _ets_probe_mask(
    q_length: int, kv_length: int, mask_function: Callable[..., torch.Tensor], device: torch.device, **others: Any
) -> torch.Tensor:
    """In place of a mask: how many tokens the mask lets token `FAR - 1` see, all alike so that slicing keeps it."""
    seen = mask_function(0, 0, torch.tensor(FAR - 1, device=device), torch.arange(FAR, device=device))
    return torch.full((1, 1, q_length, kv_length), float(seen.expand(FAR).sum()), device=device)


AttentionInterface.register(ATTENTION_NAME, _ets_tree_attention)
AttentionInterface.register(PROBE_NAME, _ets_tree_attention)
AttentionMaskInterface.register(PROBE_NAME, _ets_probe_mask)
