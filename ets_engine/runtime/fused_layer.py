"""A decoder layer of the usual kind in nine launches, without a compiler; inference only.

Usual is: norm, attention with rotated queries and keys, addition; norm, gated MLP, addition (Llama, Mistral, Qwen2, and
Qwen3, which norms queries and keys as well). torch.compile makes fourteen launches of it, attention's included. Here
the rotation stores K and V, and additions ride on a norm or on a product. A decode pass in the shape of Llama-3.1-8B is
as fast as compiled or a little faster, and nobody waits for a compiler first (`cookbook/roofline.md`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch

from ets_engine.runtime.gated_linear import GatedMLP, multiply_gated
from ets_engine.runtime.hook import HeadNorms, Projected, ShapeProbe
from ets_engine.runtime.joint_linear import LinearPart, is_hooked, is_plain
from ets_engine.runtime.layer_kernel import add_norm, rotate_and_store

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}  # that transformers names so
ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj"}
HEAD_NORMS = ("q_norm", "k_norm")
TRIED_TOKENS = 8
TOLERANCES = {torch.bfloat16: 2e-2, torch.float16: 5e-3}  # of the norm, on random rows
ANSWERS = 0.1  # standard deviation of what attention answers them, so that the MLP counts as well


class Asked(NamedTuple):
    """What a layer asks of attention, once."""

    query: torch.Tensor  # [1, H, T, D]
    key: torch.Tensor  # [1, K, T, D]
    value: torch.Tensor  # [1, K, T, D]
    scale: float
    is_plain: bool  # neither a soft cap nor sinks


class FusedLayer(torch.nn.Module):
    """In place of a layer: in passes through the tree cache by launches of its own, in all others by the layer's.

    In the former nothing is called that the layer consists of, so nobody can look on there.
    """

    def __init__(self, layer: torch.nn.Module, scale: float) -> None:
        """`scale` is that of attention scores."""
        super().__init__()
        self.layer, self.scale = layer, scale

    def __getattr__(self, name: str) -> Any:
        """What a model looks up in its layers."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(
        self,
        hidden_states: torch.Tensor,
        *others: Any,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        ets_tree: Any = None,
        **named: Any,
    ) -> Any:
        """[1, T, hidden] -> [1, T, hidden], as the layer's own."""
        attention, mlp = self.layer.self_attn, self.layer.mlp
        is_ours = ets_tree is not None and not isinstance(ets_tree, ShapeProbe) and position_embeddings is not None
        if not is_ours or position_embeddings[0].shape[-1] != attention.head_dim:  # only a part of a head is rotated
            named |= {"position_embeddings": position_embeddings}
            named |= {} if ets_tree is None else {"ets_tree": ets_tree}
            return self.layer(hidden_states, *others, **named)
        joint, out, linear = attention.q_proj.joint, attention.o_proj.weight, torch.nn.functional.linear
        cos, sin = position_embeddings
        states, normed = _norm(self.layer.input_layernorm, hidden_states.squeeze(0).contiguous(), None)
        products = linear(normed, joint.weight, joint.bias)
        projected = Projected(products, cos[0], sin[0], _head_norms(attention))
        attended = ets_tree.rotate_and_attend(attention.layer_idx, projected, self.scale)
        states, normed = _norm(self.layer.post_attention_layernorm, states, linear(attended.flatten(1), out))
        gated = multiply_gated(normed, mlp.gate_proj.weight, mlp.up_proj.weight)
        return states.addmm_(gated, mlp.down_proj.weight.t())[None]


class _Recorder:
    """In place of a forward pass: keeps what a layer asks, and answers with numbers that depend on nothing."""

    def __init__(self) -> None:
        self.asked: list[Asked] = []

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        self.asked.append(Asked(query, key, value, scale, softcap is None and sinks is None))
        return ANSWERS * _random(query.transpose(1, 2))

    def rotate_and_attend(self, layer: int, projected: Projected, scale: float) -> torch.Tensor:
        products = projected.products
        kv_heads, dim = self.asked[-1].key.shape[1::2]
        cache = products.new_zeros((len(products), 2, kv_heads, dim))
        slots = torch.arange(len(products), dtype=torch.int32, device=products.device)
        query = rotate_and_store(cache, slots, projected).transpose(0, 1)[None]
        key, value = cache.permute(1, 2, 0, 3)[:, None]
        return self.attend(layer, query, key, value, scale, None, None)[0]


def fuse_layers(model: torch.nn.Module) -> list[torch.nn.Module]:
    """Put a `FusedLayer` in the place of every decoder layer that computes the same; weights are the same tensors.

    A layer is one by the names of its parts, of which `join_linears` and `join_gates` have joined what they could, and
    by what it asks of attention and makes of the answer, on a few random rows. All other layers stay as they are, and
    so do those with hooks.

    Returns:
        All layers that are in a `FusedLayer` now.
    """
    for parent in [module for module in model.modules() if not isinstance(module, FusedLayer)]:
        for name, module in list(parent.named_children()):
            if _has_usual_parts(module) and (scale := _try(module)) is not None:
                setattr(parent, name, FusedLayer(module, scale))
    return [module.layer for module in model.modules() if isinstance(module, FusedLayer)]


def _has_usual_parts(layer: torch.nn.Module) -> bool:
    parts = dict(layer.named_children())
    if set(parts) != PARTS or not isinstance(parts["mlp"], GatedMLP) or any(map(is_hooked, (layer, *parts.values()))):
        return False
    attention = dict(parts["self_attn"].named_children())
    head_norms = [attention.pop(name) for name in HEAD_NORMS if name in attention]
    if set(attention) != ATTENTION_PARTS or len(head_norms) == 1 or len({_eps(norm) for norm in head_norms}) > 1:
        return False
    out = attention.pop("o_proj")
    joints = {id(one.joint) for one in attention.values() if isinstance(one, LinearPart)}
    norms = parts["input_layernorm"], parts["post_attention_layernorm"], *head_norms
    weights = [getattr(norm, "weight", None) for norm in norms]
    return (
        all(isinstance(one, LinearPart) for one in attention.values())
        and len(joints) == 1
        and is_plain(out)
        and out.bias is None
        and out.weight.dtype in TOLERANCES
        and _rotates_all(parts["self_attn"])
        and all(isinstance(one, torch.Tensor) and one.dtype == out.weight.dtype for one in weights)
        and all(_eps(norm) is not None and not is_hooked(norm) for norm in norms)
        and all(norm.weight.shape == (parts["self_attn"].head_dim,) for norm in head_norms)
    )


@torch.inference_mode()
def _try(layer: torch.nn.Module) -> float | None:
    """The scale of its attention scores, None = it computes something else than a `FusedLayer`."""
    attention = layer.self_attn
    joint, out = attention.q_proj.joint, attention.o_proj
    heads_dim = joint.sizes[0]
    dim = getattr(attention, "head_dim", None)
    if not isinstance(dim, int) or dim % 2 or heads_dim % dim or out.in_features != heads_dim:
        return None
    rows = 0.05 * _random(joint.weight.new_empty((1, TRIED_TOKENS, joint.in_features)))
    angles = 3 * _random(joint.weight.new_empty((TRIED_TOKENS, dim // 2))).float().repeat(1, 2)[None]
    turn = angles.cos().to(rows.dtype), angles.sin().to(rows.dtype)
    recorder = _Recorder()
    try:
        expected = layer(rows.clone(), position_embeddings=turn, ets_tree=recorder)
        if len(recorder.asked) != 1 or not recorder.asked[0].is_plain or not isinstance(expected, torch.Tensor):
            return None
        scale = recorder.asked[0].scale
        found = FusedLayer(layer, scale)(rows.clone(), position_embeddings=turn, ets_tree=recorder)
    except torch.OutOfMemoryError:
        raise
    except Exception:  # whatever model code raises when it is not called as it is used to
        return None
    theirs, ours = recorder.asked
    same = [*zip(theirs[:3], ours[:3], strict=True), (expected - rows, found - rows)]
    return scale if all(_is_close(*pair) for pair in same) else None


def _is_close(expected: torch.Tensor, found: torch.Tensor) -> bool:
    if expected.shape != found.shape:
        return False
    error, size = (float(one.double().norm()) for one in (found - expected, expected))
    return math.isfinite(size) and error <= TOLERANCES[expected.dtype] * size


def _norm(norm: torch.nn.Module, states: torch.Tensor, added: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    return add_norm(states, added, norm.weight, _eps(norm))


def _rotates_all(attention: Any) -> bool:
    """Whether a model's config does not say that it rotates only a part of each head."""
    config = getattr(attention, "config", None)
    rope = getattr(config, "rope_parameters", None) or {}
    return rope.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) in (None, 1)


def _head_norms(attention: Any) -> HeadNorms | None:
    query, key = (getattr(attention, name, None) for name in HEAD_NORMS)
    return None if query is None else HeadNorms(query.weight, key.weight, _eps(query))


def _eps(norm: torch.nn.Module) -> float | None:
    """What a norm adds to the mean square, by the names that transformers gives it."""
    eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
    return eps if isinstance(eps, float) else None


def _random(like: torch.Tensor) -> torch.Tensor:
    """The same normal numbers for the same shape."""
    return torch.randn(like.shape, generator=torch.Generator().manual_seed(0)).to(like)
