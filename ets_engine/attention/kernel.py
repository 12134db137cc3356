"""Tree attention on a GPU, in Triton: every tile of a work list, then one merge of what several tiles left behind.

A tile stacks its queries with all their heads of one KV head and walks over a stretch of slots with an online softmax,
so K/V is read once for all queries below it, and once for a whole group of heads (GQA). The slots of a stretch are
arbitrary; the heads of one slot lie side by side in the cache, and the programs of a tile's KV heads run side by side.
Sums are fp32, products of fp32 are too (three TF32 products each). No atomics: the same input gives the same bits.

A block of K/V is known only by its slots, which are loaded first. Tall tiles leave both loads to Triton's pipeline,
where two more stages put one more block in flight. Lower tiles load the slots of the next block themselves, into
registers: every stage is a block of K/V, so more tiles share a multiprocessor. Most of them are one block long, and
what they wait for is each other's latency. Timed on an H100 both ways; tall tiles are 7 % slower with the second.
Tall and low tiles are two launches, one after the other. Where tall ones would save little reading, all tiles are low:
without the first launch search trees take 15 % less, but a long prompt would take up to 3 x as long.

Block sizes and pipeline depths of bf16 at head dim 128 were chosen from some 60 that were timed on an H100
(`cookbook/roofline.md`); others follow from registers and shared memory in the same way, and have not been timed. They
compile for NVIDIA GPUs of compute capability 8.0 to 9.0.
"""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping
from contextlib import nullcontext
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton
import triton.language as tl

from ets_engine.attention.work import Pieces, WorkList, flatten, plan_pieces

if TYPE_CHECKING:
    from ets_engine.attention.api import AttentionLayout

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOG2E = tl.constexpr(1.4426950408889634)  # the softmax is in powers of two
MERGED_AT_ONCE = 4  # partial results
TALL_SAVED_BYTES = 72 << 20  # of K/V that tall tiles must save low ones from reading again, from the L2 cache mostly
SHARED_BYTES_OF_H100 = 227 << 10  # that a block may use
MOST_IN_FLIGHT = 3  # blocks of K/V that a program waits for, at most
SPARE_BYTES = 1 << 10  # of shared memory that the driver keeps of each block, and again for slots and reductions


class Launch(NamedTuple):
    """How tiles of one height run.

    Attributes:
        block_n: Slots at a time.
        num_warps: Of a program.
        num_stages: Of its pipeline.
        at_once: Programs that a multiprocessor holds.
        ahead: Whether a program loads the next block's slots itself, before it works on this one.
    """

    block_n: int
    num_warps: int
    num_stages: int
    at_once: int
    ahead: bool


def tree_attention_triton(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
    works: MutableMapping[Hashable, WorkList] | None,
) -> torch.Tensor:
    """See `tree_attention`."""
    if query.device.type != "cuda" and not is_interpreted():
        raise ValueError(
            f"the kernel needs a CUDA device, the query is on {query.device}; use implementation='eager', or set "
            "TRITON_INTERPRET=1 before triton is imported"
        )
    heads, dim = query.shape[1:]
    if query.dtype not in DTYPES or cache.dtype != query.dtype or not 8 <= dim <= 256:
        raise ValueError(
            f"the kernel knows fp16, bf16 and fp32, the same for query and cache, and head dims of 8 to 256; got "
            f"{query.dtype}, {cache.dtype} and {dim}; use implementation='eager'"
        )
    if not cache.is_contiguous() or cache.device != query.device:
        raise ValueError("the kernel reads a contiguous cache on the query's device; use implementation='eager'")
    key = (id(layout), heads, cache.shape[2:], query.dtype)
    work = None if works is None else works.get(key)
    if work is None:
        work = plan_pass(flatten(layout), cache, group=heads // cache.shape[2]).to(query.device)
        if works is not None:
            works[key] = work
    return run_work(query, cache, work, scale=scale, softcap=softcap, sinks=sinks)


def plan_pass(pieces: Pieces, cache: torch.Tensor, *, group: int, room: int = 0) -> WorkList:
    """The work list, on the CPU, of layers with such a cache ([S, 2, K, D]) and `group` query heads to a KV head."""
    kv_heads, dim = cache.shape[2:]
    tallest, processors, shared = heights(dim, cache.dtype), processors_of(cache.device), shared_bytes_of(cache.device)
    hows = [launch(height, _block_d(dim), cache.dtype.itemsize, shared) for height in tallest]
    # five low tiles run at once on a multiprocessor, but chunks cut for three leave fewer partial results
    tiles_wanted = [max(1, processors * min(how.at_once, 3) // kv_heads) for how in hows]
    min_saved = TALL_SAVED_BYTES // (2 * kv_heads * dim * cache.dtype.itemsize)
    return plan_pieces(pieces, group, tiles_wanted=tiles_wanted, heights=tallest, min_saved=min_saved, room=room)


def store(cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Write new tokens' K and V, in one launch that can be captured in a CUDA graph.

    Args:
        cache: Of one layer, contiguous. Shape [S, 2, K, D].
        slots: Where each token goes, -1 = nowhere. Shape [T], int32.
        keys: Of any strides but one along D. Shape [T, K, D].
        values: The same. Shape [T, K, D].
    """
    kv_heads, dim = keys.shape[1:]
    with torch.cuda.device(cache.device) if cache.device.type == "cuda" else nullcontext():
        _store[(len(slots),)](
            cache,
            slots,
            keys,
            values,
            *keys.stride()[:2],
            *values.stride()[:2],
            KV_HEADS=kv_heads,
            DIM=dim,
            BLOCK_K=triton.next_power_of_2(kv_heads),
            BLOCK_D=triton.next_power_of_2(dim),
            **starts_early(cache.device),
        )


def run_work(
    query: torch.Tensor,
    cache: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Launch the kernels on a work list that lies on the query's device; arguments as in `tree_attention`.

    The launches depend on shapes and on `work.shape` alone and wait for nothing, so they can be captured in a CUDA
    graph and replayed on new contents of the same tensors.
    """
    heads, dim = query.shape[1:]
    if scale <= 0:  # the kernel scales the largest score, not each
        query, scale = (-query, -scale) if scale < 0 else (torch.zeros_like(query), 1.0)
    if query.stride(-1) != 1:
        query = query.contiguous()
    output = torch.empty(query.shape, dtype=query.dtype, device=query.device)
    partial = query.new_empty((max(work.partials, 1), heads, dim), dtype=torch.float32)
    lse = query.new_empty((max(work.partials, 1), heads), dtype=torch.float32)
    block_d = _block_d(dim)
    sizes: dict[str, Any] = {
        "KV_HEADS": cache.shape[2],
        "GROUP": heads // cache.shape[2],
        "DIM": dim,
        "BLOCK_D": block_d,
    }
    with torch.cuda.device(query.device) if query.device.type == "cuda" else nullcontext():
        for part in work.parts:
            how = launch(part.height, block_d, query.dtype.itemsize, shared_bytes_of(query.device))
            options: dict[str, Any] = {"BLOCK_M": part.height, "BLOCK_N": how.block_n, "AHEAD": how.ahead}
            options |= {"num_warps": how.num_warps, "num_stages": how.num_stages, **starts_early(query.device)}
            lists = work.tiles(part), work.entries, work.slots
            grid = (len(lists[0]) * cache.shape[2],)
            strides = query.stride()[:2]
            _attend[grid](
                query, cache, output, partial, lse, *lists, sinks, scale, softcap, *strides, **sizes, **options
            )
        if work.merge_count:
            block_h = 1 if heads % 2 else 2
            options = {"HEADS": heads, "DIM": dim, "BLOCK_D": block_d, "BLOCK_H": block_h, "BLOCK_P": MERGED_AT_ONCE}
            options |= {"num_warps": block_d // 128 or 1, **starts_early(query.device)}
            _merge[(work.merge_count * heads // block_h,)](output, partial, lse, work.merges, sinks, **options)
    return output


def heights(dim: int, dtype: torch.dtype) -> tuple[int, ...]:
    """Rows of tiles, ascending, that a head dim leaves registers for; fp32 needs twice as many and more."""
    if dtype.itemsize == 2:
        return (16, 64, 128) if dim <= 128 else (16, 64)
    return (16, 64) if dim <= 64 else (16, 32) if dim <= 128 else (16,)


def launch(height: int, block_d: int, itemsize: int, shared_bytes: int) -> Launch:
    """How tiles of one height run: what compiles with few or no spills and fits a multiprocessor's shared memory.

    Low tiles share a multiprocessor, as many as its registers hold. As many blocks of K/V are in flight as then fit.

    Example:
        >>> launch(128, 128, 2, SHARED_BYTES_OF_H100)
        Launch(block_n=128, num_warps=8, num_stages=5, at_once=1, ahead=False)
        >>> launch(16, 128, 2, SHARED_BYTES_OF_H100)
        Launch(block_n=32, num_warps=2, num_stages=3, at_once=5, ahead=True)
    """
    row_bytes = itemsize * block_d  # of one key
    ahead, low = height < 128, height == 16 and row_bytes <= 256
    block_n = 32 if low else 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if height == 128 and row_bytes == 256 and shared_bytes >= SHARED_BYTES_OF_H100:
        block_n = 128  # half as many rescalings and barriers
    num_warps = 8 if height == 128 or height * block_d >= 64 * 256 or row_bytes > 512 else 4
    num_warps = 2 if low and itemsize == 2 else num_warps
    at_once = 1 if num_warps == 8 else 5 if low and itemsize == 2 else 2
    read = height >= 64  # K/V straight from shared memory: one block more is not free yet
    while True:
        left = (shared_bytes + SPARE_BYTES) // at_once - 2 * SPARE_BYTES - height * row_bytes
        in_flight = left // (2 * block_n * row_bytes) - read
        if in_flight >= 1 or at_once == 1:
            num_stages = 1 + (1 if ahead else 2) * min(max(in_flight, 1), MOST_IN_FLIGHT)
            return Launch(block_n, num_warps, num_stages, at_once, ahead)
        at_once -= 1


def is_interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on any device."""
    return not isinstance(_attend, triton.runtime.JITFunction)


@lru_cache
def starts_early(device: torch.device) -> dict[str, bool]:
    """Options of a kernel that begins while the one before it ends: it reads its work list, then waits for the other.

    Programmatic dependent launch, which GPUs have from Hopper on. Before it waits, a kernel reads nothing but its work
    list, which is copied, or the weights of a norm: a copy, and whatever is launched in the usual way, has ended before
    anything begins.
    """
    is_nvidia = device.type == "cuda" and torch.version.cuda is not None and not is_interpreted()
    early = is_nvidia and torch.cuda.get_device_capability(device) >= (9, 0)
    return {"EARLY": True, "launch_pdl": True} if early else {"EARLY": False}


@lru_cache
def processors_of(device: torch.device) -> int:
    """Multiprocessors of a GPU (count); 1 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


@lru_cache
def shared_bytes_of(device: torch.device) -> int:
    """Shared memory that a block of a GPU may use (bytes); elsewhere an H100's."""
    if device.type != "cuda":
        return SHARED_BYTES_OF_H100
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def _block_d(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


@triton.jit
def _attend(
    query,  # [T, H, D], strided
    cache,  # [S, 2, K, D]
    output,  # [T, H, D]
    partial,  # [P, H, D] fp32, outputs of tiles whose queries have several
    lse,  # [P, H] fp32, their log-sum-exp (base 2)
    tiles,  # [N, 4]
    entries,  # [E, 4]
    slots,  # [U]
    sinks,  # [H] or None
    scale,
    softcap,  # or None
    token_stride,  # of the query
    head_stride,
    KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    AHEAD: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    tile = tiles + tl.program_id(0) // KV_HEADS * 4
    kv_head = tl.program_id(0) % KV_HEADS
    begin, end, first_entry, count = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2), tl.load(tile + 3)
    if count == 0:  # padding of the list
        if EARLY:
            tl.extra.cuda.gdc_wait()
        return
    row = tl.arange(0, BLOCK_M)
    real = row // GROUP < count
    entry = entries + (first_entry + row // GROUP) * 4
    head = kv_head * GROUP + row % GROUP
    which = tl.load(entry, mask=real, other=0).to(tl.int64)
    first = tl.load(entry + 1, mask=real, other=0)
    stop = tl.minimum(tl.load(entry + 2, mask=real, other=end), end)
    seen_from, seen_to = tl.max(first, 0), tl.min(stop, 0)  # the slots that all rows see
    target = tl.load(entry + 3, mask=real, other=0).to(tl.int64)
    ahead = begin + tl.arange(0, BLOCK_N)
    coming = tl.load(slots + ahead, mask=ahead < end, other=0) if AHEAD else ahead
    if EARLY:
        tl.extra.cuda.gdc_wait()
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    place = (which * (KV_HEADS * GROUP) + head)[:, None] * DIM + dim[None, :]
    asked = (which * token_stride + head * head_stride)[:, None] + dim[None, :]
    q = tl.load(query + asked, mask=real[:, None] & inside[None, :], other=0.0)
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    factor = scale * LOG2E if softcap is None else LOG2E
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        exists = column < end
        slot = coming.to(tl.int64) if AHEAD else tl.load(slots + column, mask=exists, other=0).to(tl.int64)
        if AHEAD:
            coming = tl.load(slots + column + BLOCK_N, mask=column + BLOCK_N < end, other=0)
        there = cache + (slot * (2 * KV_HEADS) + kv_head)[:, None] * DIM + dim[None, :]
        readable = exists[:, None]
        if DIM < BLOCK_D:
            readable = readable & inside[None, :]
        keys = tl.load(there, mask=readable, other=0.0)
        scores = tl.dot(q, tl.trans(keys), input_precision="tf32x3")
        if softcap is not None:
            scores = softcap * (
                1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 * LOG2E * scale / softcap)))
            )  # cap * tanh(score / cap)
        if (start < seen_from) | (start + BLOCK_N > seen_to):  # most blocks are seen wholly by all rows
            seen = (column[None, :] >= first[:, None]) & (column[None, :] < stop[:, None])
            scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * factor)
        level = tl.where(new_top == float("-inf"), 0.0, new_top)  # a row may see nothing of its first blocks
        weights = tl.exp2(scores * factor - level[:, None])
        fade = tl.exp2(top - level)
        total = total * fade + tl.sum(weights, 1)
        values = tl.load(there + KV_HEADS * DIM, mask=readable, other=0.0)
        acc = tl.dot(weights.to(values.dtype), values, acc * fade[:, None], input_precision="tf32x3")
        top = new_top
    alone = real & (target < 0)  # nothing to merge: straight to the output
    if sinks is not None:
        sink = tl.load(sinks + head, mask=alone, other=float("-inf")).to(tl.float32) * LOG2E
        total += tl.exp2(sink - tl.where(alone, top, 0.0))
    total = tl.where(real, total, 1.0)
    acc = acc / total[:, None]
    tl.store(output + place, acc.to(output.dtype.element_ty), mask=alone[:, None] & inside[None, :])
    several = real & (target >= 0)
    spot = target * (KV_HEADS * GROUP) + head
    tl.store(partial + spot[:, None] * DIM + dim[None, :], acc, mask=several[:, None] & inside[None, :])
    tl.store(lse + spot, top + tl.log2(total), mask=several)


@triton.jit
def _store(
    cache,  # [S, 2, K, D]
    slots,  # [T]
    keys,  # [T, K, D], strided
    values,  # [T, K, D], strided
    key_token_stride,
    key_head_stride,
    value_token_stride,
    value_head_stride,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    if slot < 0:
        return
    head = tl.arange(0, BLOCK_K)[:, None]
    dim = tl.arange(0, BLOCK_D)[None, :]
    inside = (head < KV_HEADS) & (dim < DIM)
    there = cache + slot * (2 * KV_HEADS * DIM) + head * DIM + dim
    key = tl.load(keys + token * key_token_stride + head * key_head_stride + dim, mask=inside)
    value = tl.load(values + token * value_token_stride + head * value_head_stride + dim, mask=inside)
    tl.store(there, key, mask=inside)
    tl.store(there + KV_HEADS * DIM, value, mask=inside)


@triton.jit
def _merge(
    output,  # [T, H, D]
    partial,  # [P, H, D]
    lse,  # [P, H]
    merges,  # [M, 4]
    sinks,  # [H] or None
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_P: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    merge = merges + tl.program_id(0) // (HEADS // BLOCK_H) * 4
    head = tl.program_id(0) % (HEADS // BLOCK_H) * BLOCK_H + tl.arange(0, BLOCK_H)
    which, begin, end = tl.load(merge).to(tl.int64), tl.load(merge + 1), tl.load(merge + 2)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    dim = tl.arange(0, BLOCK_D)
    inside = dim < DIM
    top = tl.full([BLOCK_H], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_H], tl.float32)
    if sinks is not None:  # one more partial result, without a value
        top = tl.load(sinks + head).to(tl.float32) * LOG2E
        total += 1.0
    acc = tl.zeros([BLOCK_H, BLOCK_D], tl.float32)
    for start in range(begin, end, BLOCK_P):
        part = start + tl.arange(0, BLOCK_P)
        exists = part < end
        spot = part.to(tl.int64)[:, None] * HEADS + head[None, :]
        readable = exists[:, None, None] & inside[None, None, :]
        level = tl.load(lse + spot, mask=exists[:, None], other=float("-inf"))
        one = tl.load(partial + spot[:, :, None] * DIM + dim[None, None, :], mask=readable, other=0.0)
        new_top = tl.maximum(top, tl.max(level, 0))
        weights = tl.exp2(level - new_top[None, :])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 0)
        acc = acc * fade[:, None] + tl.sum(one * weights[:, :, None], 0)
        top = new_top
    place = output + (which * HEADS + head)[:, None] * DIM + dim[None, :]
    acc = acc / tl.where(end > begin, total, 1.0)[:, None]
    tl.store(place, acc.to(output.dtype.element_ty), mask=inside[None, :] & (end > begin))
