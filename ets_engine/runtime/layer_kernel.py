"""Two launches of a decoder layer, in Triton: addition and norm; norm and rotation of heads, and storing of new K/V.

All is computed in fp32. What has been normed is rounded before it is scaled and after, as in models.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ets_engine.attention.kernel import starts_early
from ets_engine.runtime.hook import Projected

NORM_WARPS = 8


def add_norm(
    states: torch.Tensor, added: torch.Tensor | None, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum of two, and its root mean square norm; in one launch.

    Args:
        states: Contiguous. Shape [T, N].
        added: The same, None = nothing is added, and the sum is `states` itself.
        weight: Of the norm. Shape [N].
        eps: Added to the mean square.

    Returns:
        The sum, rounded to its dtype, and the norm of what it was rounded to. Shapes [T, N].
    """
    rows, width = states.shape
    summed, normed = states if added is None else torch.empty_like(states), torch.empty_like(states)
    with torch.cuda.device(states.device) if states.device.type == "cuda" else nullcontext():
        _add_norm[(rows,)](
            states,
            added,
            weight,
            summed,
            normed,
            width,
            eps,
            BLOCK=triton.next_power_of_2(width),
            num_warps=NORM_WARPS,
            **starts_early(states.device),
        )
    return summed, normed


def rotate_and_store(cache: torch.Tensor, slots: torch.Tensor, projected: Projected) -> torch.Tensor:
    """Norm queries and keys if that is asked, rotate them, and write K and V of the new tokens; in one launch.

    Args:
        cache: Of one layer, contiguous. Shape [S, 2, K, D].
        slots: Where each token goes, -1 = nowhere. Shape [T], integers.
        projected: Of those tokens; D is even.

    Returns:
        Queries. Shape [T, H, D].
    """
    products, cos, sin, norms = projected
    tokens, kv_heads, dim = len(products), *cache.shape[2:]
    heads = products.shape[1] // dim - 2 * kv_heads
    group = heads // kv_heads
    query = products.new_empty((tokens, heads, dim))
    with torch.cuda.device(cache.device) if cache.device.type == "cuda" else nullcontext():
        _rotate_and_store[(tokens * kv_heads,)](
            cache,
            slots,
            products,
            cos,
            sin,
            query,
            *(norms or (None, None, 0.0)),
            products.stride(0),
            cos.stride(0),
            sin.stride(0),
            KV_HEADS=kv_heads,
            GROUP=group,
            HALF=dim // 2,
            BLOCK_G=triton.next_power_of_2(group + 1),
            BLOCK_H=triton.next_power_of_2(dim // 2),
            num_warps=1,
            **starts_early(cache.device),
        )
    return query


@triton.jit
def _add_norm(
    states,  # [T, N]
    added,  # [T, N] or None
    weight,  # [N]
    summed,  # [T, N]
    normed,  # [T, N]
    width,
    eps,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    column = tl.arange(0, BLOCK)
    inside = column < width
    scales = tl.load(weight + column, mask=inside, other=0.0)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64) * width + column
    state = tl.load(states + place, mask=inside, other=0.0)
    if added is not None:
        more = tl.load(added + place, mask=inside, other=0.0)
        state = (state.to(tl.float32) + more.to(tl.float32)).to(state.dtype)
        tl.store(summed + place, state, mask=inside)
    wide = state.to(tl.float32)
    wide *= tl.rsqrt(tl.sum(wide * wide, 0) / width + eps)
    product = wide.to(state.dtype).to(tl.float32) * scales.to(tl.float32)
    tl.store(normed + place, product.to(state.dtype), mask=inside)


@triton.jit
def _rotate_and_store(
    cache,  # [S, 2, K, D]
    slots,  # [T]
    products,  # [T, (H + 2K) x D], strided
    cos,  # [T, D], strided
    sin,  # [T, D], strided
    query,  # [T, H, D]
    query_scales,  # [D], of norms over each head, or None
    key_scales,  # [D]
    eps,
    product_stride,
    cos_stride,
    sin_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    token, kv_head = (tl.program_id(0) // KV_HEADS).to(tl.int64), tl.program_id(0) % KV_HEADS
    number, half = tl.arange(0, BLOCK_G)[:, None], tl.arange(0, BLOCK_H)[None, :]  # the last head is the key's
    inside = (number <= GROUP) & (half < HALF)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    slot = tl.load(slots + token).to(tl.int64)
    head = tl.where(number < GROUP, kv_head * GROUP + number, KV_HEADS * GROUP + kv_head)
    read = products + token * product_stride + head * (2 * HALF) + half
    left, right = tl.load(read, mask=inside, other=0.0), tl.load(read + HALF, mask=inside, other=0.0)
    value = products + token * product_stride + (KV_HEADS * (GROUP + 1) + kv_head) * (2 * HALF) + half
    stored = (slot >= 0) & (half < HALF)
    first, second = tl.load(value, mask=stored), tl.load(value + HALF, mask=stored)
    angle, there = token * cos_stride + half, half < HALF
    left_cos, right_cos = tl.load(cos + angle, mask=there), tl.load(cos + angle + HALF, mask=there)
    angle = token * sin_stride + half
    left_sin, right_sin = tl.load(sin + angle, mask=there), tl.load(sin + angle + HALF, mask=there)
    kind = left.dtype
    left, right = left.to(tl.float32), right.to(tl.float32)
    if query_scales is not None:
        squares = tl.sum(left * left + right * right, 1, keep_dims=True)
        normed = tl.rsqrt(squares / (2 * HALF) + eps)
        scales = tl.where(number < GROUP, query_scales + half, key_scales + half)
        left_scale, right_scale = (
            tl.load(scales, mask=inside, other=0.0),
            tl.load(scales + HALF, mask=inside, other=0.0),
        )
        left = ((left * normed).to(kind).to(tl.float32) * left_scale.to(tl.float32)).to(kind).to(tl.float32)
        right = ((right * normed).to(kind).to(tl.float32) * right_scale.to(tl.float32)).to(kind).to(tl.float32)
    turned = (left * left_cos.to(tl.float32) - right * left_sin.to(tl.float32)).to(kind)
    turned_right = (right * right_cos.to(tl.float32) + left * right_sin.to(tl.float32)).to(kind)
    written = query + (token * (KV_HEADS * GROUP) + head) * (2 * HALF) + half
    tl.store(written, turned, mask=inside & (number < GROUP))
    tl.store(written + HALF, turned_right, mask=inside & (number < GROUP))
    kept = cache + (slot * (2 * KV_HEADS) + kv_head) * (2 * HALF) + half
    tl.store(kept + 0 * number, turned, mask=stored & (number == GROUP))
    tl.store(kept + 0 * number + HALF, turned_right, mask=stored & (number == GROUP))
    kept += KV_HEADS * 2 * HALF
    tl.store(kept, first, mask=stored)
    tl.store(kept + HALF, second, mask=stored)
