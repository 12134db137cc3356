"""The attention function that transformers calls in our name: K/V into the pool, then tree attention.

It is registered once as `ets_tree`; everything it needs travels in the forward's keyword arguments, so there is no
global state and any number of models and threads may use it. No mask function is registered under that name:
transformers then builds no mask at all. Under `ets_probe`, used at load, the masks that transformers would build are
tried instead: what a layer gets in place of its mask is the number of tokens that the mask lets a token see.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from transformers import AttentionInterface, AttentionMaskInterface

from ets_engine.attention import tree_attention
from ets_engine.attention.api import Implementation
from ets_engine.errors import UnsupportedModelError
from ets_engine.kv import KVPool, LayerShape, TreeLayout

ATTENTION_NAME = "ets_tree"
PROBE_NAME = "ets_probe"
FAR = 1 << 20  # tokens; farther than any context
# What models hand to their attention function when what they do is no attention of ours.
_REFUSED_ARGUMENTS = {
    "sinks": "attention sinks of its own kind",
    "position_bias": "a bias on the attention scores",
    "alibi": "a bias on the attention scores (ALiBi)",
}


class HeadNorms(NamedTuple):
    """Root mean square norms over each head of queries and of keys.

    Attributes:
        query_scales: Shape [D].
        key_scales: Shape [D].
        eps: Added to the mean square, in both.
    """

    query_scales: torch.Tensor
    key_scales: torch.Tensor
    eps: float


class Projected(NamedTuple):
    """What a layer hands to attention where norms and rotation of its heads are left to it.

    Attributes:
        products: Queries, keys and values of every token, side by side. Shape [T, (H + 2K) x D], any stride of tokens.
        cos: Of each token's angles. Shape [T, D].
        sin: The same.
        norms: Before the rotation, None = none.
    """

    products: torch.Tensor
    cos: torch.Tensor
    sin: torch.Tensor
    norms: HeadNorms | None = None


@dataclass(slots=True)
class TreeForward:
    """Keyword argument of one forward pass through the tree cache; counts its calls, so that none goes missing.

    Attributes:
        pool: Where K/V goes.
        layout: Of this pass, with all windows.
        windows: Of each layer (tokens), None = it sees whole paths.
        implementation: Of attention, see `tree_attention`.
        works: What the kernel derives from the layout in one layer, for the others.
        calls: Of the attention function (count).
    """

    pool: KVPool
    layout: TreeLayout
    windows: Sequence[int | None]
    implementation: Implementation = "eager"
    works: dict[Hashable, Any] = field(default_factory=dict)
    calls: int = 0
    _slots: torch.Tensor | None = None  # the layout's, one by one

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
        """Store one layer's new K/V and attend; query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
        self.calls += 1
        self.pool.write(layer, self.layout.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        packed = query[0].transpose(0, 1).contiguous()  # [T, H, D]
        layout = self.layout.within(self.windows[layer])
        cache = self.pool.layers[layer]
        return tree_attention(
            packed,
            cache,
            layout,
            scale=scale,
            softcap=softcap,
            sinks=sinks,
            implementation=self.implementation,
            works=self.works,
        )[None]

    def rotate_and_attend(self, layer: int, projected: Projected, scale: float) -> torch.Tensor:
        """As `attend`, by the kernel, of what is not rotated yet. Shape [T, H, D]."""
        from ets_engine.runtime.layer_kernel import rotate_and_store  # Triton, which a CPU goes without

        self.calls += 1
        cache = self.pool.layers[layer]
        if self._slots is None:
            slots = self.layout.write_slots
            is_run = isinstance(slots, slice)
            self._slots = torch.arange(slots.start, slots.stop, device=cache.device) if is_run else slots
        query = rotate_and_store(cache, self._slots, projected)
        layout = self.layout.within(self.windows[layer])
        return tree_attention(query, cache, layout, scale=scale, implementation=self.implementation, works=self.works)


@dataclass(slots=True)
class ShapeProbe:
    """Keyword argument of a forward pass that records what each layer asks of attention instead of doing it.

    Attributes:
        shapes: K/V of each layer.
        windows: How many tokens up to itself each layer's mask lets a token see, at most `FAR`; `FAR` without a mask.
        told: The windows that layers told their attention function; masks are what they do, these must agree.
        softcaps: The soft caps on scores that layers told, None = none.
        calls: Of the attention function (count).
    """

    shapes: dict[int, LayerShape] = field(default_factory=dict)
    windows: dict[int, int] = field(default_factory=dict)
    told: dict[int, int] = field(default_factory=dict)
    softcaps: dict[int, float | None] = field(default_factory=dict)
    calls: int = 0

    def note_window(self, layer: int, mask: torch.Tensor | None, sliding_window: int | None) -> bool:
        """Record how far a layer sees, from what stands in place of its mask; False if that is not a window."""
        seen = [FAR] if mask is None else mask.unique().tolist()
        self.windows[layer] = int(min(seen))
        if sliding_window is not None:
            self.told[layer] = sliding_window
        return len(seen) == 1 and self.windows[layer] >= 1

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
        """Record the shapes; the result is only there to let the forward pass go on."""
        if key.shape != value.shape or query.shape[-1] != key.shape[-1] or query.shape[0] != 1:
            raise UnsupportedModelError(
                f"layer {layer} has queries {list(query.shape)}, keys {list(key.shape)} and values "
                f"{list(value.shape)}: tree attention needs one head dim for all (no latent attention)"
            )
        self.calls += 1
        self.shapes[layer] = LayerShape(key.shape[1], key.shape[3])
        self.softcaps[layer] = softcap
        return query.new_zeros((1, query.shape[2], query.shape[1], query.shape[3]))


def attend_in_tree(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    ets_tree: TreeForward | ShapeProbe | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers calls in every layer: checks what it is asked for, then the forward's own `attend`."""
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
    return ets_tree.attend(layer, query, key, value, scale, softcap, s_aux), None


def check_calls(calls: int, layers: int, model: torch.nn.Module) -> None:
    """Refuse a pass in which not every layer called the attention function.

    Raises:
        UnsupportedModelError: Some did not.
    """
    if calls != layers:
        raise UnsupportedModelError(
            f"{calls} of {layers} layers used tree attention: the attention of {type(model).__name__} was changed "
            "after Runner took it, perhaps through a config object that another model shares; give each model its own "
            "config"
        )


def _ets_probe_mask(
    q_length: int, kv_length: int, mask_function: Callable[..., torch.Tensor], device: torch.device, **others: Any
) -> torch.Tensor:
    """In place of a mask: the window that the mask is, 0 if it is none; all alike so that slicing keeps it."""
    return torch.full((1, 1, q_length, kv_length), float(window_of(mask_function, device)), device=device)


def window_of(mask_function: Callable[..., torch.Tensor], device: torch.device) -> int:
    """How many tokens up to itself every token sees, at most `FAR`; 0 if what a token sees is not always that."""

    def seen(position: int) -> torch.Tensor:  # [position + 2], by the token at `position`
        keys = torch.arange(position + 2, device=device)
        return mask_function(0, 0, torch.tensor(position, device=device), keys).expand(len(keys))

    far = seen(FAR - 1)
    window = int(far.sum())
    tried = {FAR - 1: far} | {near: seen(near) for near in {0, 1, 2, 7, window - 1, window} - {-1, FAR - 1, FAR}}
    for position, keys_seen in tried.items():
        ages = position - torch.arange(position + 2, device=device)
        if not torch.equal(keys_seen, (ages >= 0) & (ages < window)):
            return 0
    return window


AttentionInterface.register(ATTENTION_NAME, attend_in_tree)
AttentionInterface.register(PROBE_NAME, attend_in_tree)
AttentionMaskInterface.register(PROBE_NAME, _ets_probe_mask)
