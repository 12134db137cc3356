"""A draw in a few launches of Triton that wait for nothing: of the size of the logits, nothing is written.

Sums of weights by blocks of the vocabulary are all that the inverse CDF needs besides one block of each row. Cuts are a
search for the smallest logit that is kept, without putting any in order: what is counted or summed above a logit falls
as the logit rises, so its bits are found from the highest on, two at a time.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ets_engine.runtime.sampler import BLOCK

BLOCKS_AT_ONCE = 8
SEARCHED_AT_ONCE = 4096  # logits
ORDER_OF_MINUS_INFINITY = tl.constexpr(-2139095041)
BELOW_ONE = tl.constexpr(1 - 2.0**-53)


def draw_by_blocks(
    logits: torch.Tensor, temperatures: torch.Tensor | None, draws: torch.Tensor, cuts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sampler.draw`, on a GPU or in Triton's interpreter. Can be captured in a CUDA graph.

    Weights are added in fp32 where they are few: a token that is within 1e-6 of where top-p ends may fall on its
    other side.

    Args:
        logits: Any float dtype, contiguous along V. Shape [B, V].
        temperatures: 0 = the likeliest token, None = all are 1. Shape [B], float32.
        draws: In (0, 1). Shape [B], float64.
        cuts: top-p, top-k and min-p of each row, as in `SamplingParams`; None = all are off. Shape [3, B], float64,
            contiguous.

    Returns:
        Token ids [B] (int64), and their log-probabilities [B] (fp32) at temperature 1, without cuts; NaN where a
        row's logits are no numbers.
    """
    rows, vocabulary = logits.shape
    count = -(-vocabulary // BLOCK)
    if cuts is not None and temperatures is None:
        temperatures = torch.ones(rows, dtype=torch.float32, device=logits.device)
    tops = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops)
    tempered = sums if temperatures is None else torch.empty_like(tops)
    least = None if cuts is None else torch.empty(rows, dtype=torch.float32, device=logits.device)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    numbers = logits, temperatures, tops, sums, tempered
    sizes = logits.stride(0), vocabulary, count
    some, every = (rows, -(-count // BLOCKS_AT_ONCE)), triton.next_power_of_2(count)
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else nullcontext():
        _sum_blocks[some](*numbers, *sizes, BLOCK=BLOCK, BLOCKS_AT_ONCE=BLOCKS_AT_ONCE)
        if cuts is not None:
            how = {"BLOCK": BLOCK, "BLOCKS": every}
            _find_least[(rows,)](*numbers, cuts, least, *sizes, AT_ONCE=SEARCHED_AT_ONCE, **how, num_warps=16)
            _sum_kept[some](*numbers, cuts, least, *sizes, BLOCKS_AT_ONCE=BLOCKS_AT_ONCE, **how)
        _choose[(rows,)](*numbers, draws, cuts, least, tokens, logprobs, *sizes, BLOCK=BLOCK, BLOCKS=every)
    return tokens, logprobs


@triton.jit
def _sum_blocks(
    logits,  # [B, V], strided
    temperatures,  # [B] or None
    tops,  # [B, N], the largest logit of each block
    sums,  # [B, N], of exp(logit - largest)
    tempered,  # [B, N], of exp((logit - largest) / temperature)
    row_stride,
    vocabulary,
    count,  # N
    BLOCK: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS_AT_ONCE + tl.arange(0, BLOCKS_AT_ONCE)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    numbers = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.max(numbers, 1)
    below = numbers - tl.where(top == float("-inf"), 0.0, top)[:, None]
    place = row * count + block
    tl.store(tops + place, top, mask=block < count)
    tl.store(sums + place, tl.sum(tl.exp(below), 1), mask=block < count)
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        temperature = tl.where(temperature == 0, 1.0, temperature)
        tl.store(tempered + place, tl.sum(tl.exp(below / temperature), 1), mask=block < count)


@triton.jit
def _find_least(
    logits,
    temperatures,  # [B]
    tops,
    sums,
    tempered,
    cuts,  # [3, B]
    least,  # [B], the smallest logit that top-k and top-p leave
    row_stride,
    vocabulary,
    count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    top_p = tl.load(cuts + row)
    top_k = tl.load(cuts + tl.num_programs(0) + row).to(tl.int32)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0, 1.0, temperature)
    block = tl.arange(0, BLOCKS)
    top = tl.load(tops + row * count + block, mask=block < count, other=float("-inf"))
    best = tl.max(top, 0)
    part = tl.load(tempered + row * count + block, mask=block < count, other=0.0) * tl.exp((top - best) / temperature)
    total = tl.sum(part.to(tl.float64), 0)
    mine = logits + row * row_stride
    found = float("-inf")
    if (top_k > 0) & (top_k < vocabulary):
        found = _search(mine, vocabulary, best, temperature, top_k.to(tl.float64), True, AT_ONCE)
        key = tl.full([1], 0, tl.int32) + _order(found)
        above = tl.sum(_above(mine, vocabulary, best, temperature, key, True, AT_ONCE), 0)
        total = tl.sum(_above(mine, vocabulary, best, temperature, key, False, AT_ONCE), 0)
        total += (top_k - above) * tl.exp((found - best) / temperature)
    if top_p < 1:
        # never below the other but by rounding
        found = tl.maximum(found, _search(mine, vocabulary, best, temperature, top_p * total, False, AT_ONCE))
    tl.store(least + row, found)


@triton.jit
def _search(mine, vocabulary, best, temperature, target, COUNTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """The smallest logit above which there are fewer, or which weigh less, than `target`."""
    lowest = tl.full([], -(1 << 31), tl.int64)  # that it can be, in the order of `_order`
    width = tl.full([], 1 << 30, tl.int64)
    for _ in range(16):
        last = lowest + (tl.arange(0, 4).to(tl.int64) + 1) * width - 1  # of each quarter of what it can be
        above = _above(mine, vocabulary, best, temperature, last.to(tl.int32), COUNTS, AT_ONCE)
        lowest += tl.sum((above >= target).to(tl.int64), 0) * width
        width = width >> 2
    # where rounding lets nothing reach the target, all is kept
    bits = tl.maximum(lowest, ORDER_OF_MINUS_INFINITY).to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _above(mine, vocabulary, best, temperature, keys, COUNTS: tl.constexpr, AT_ONCE: tl.constexpr):
    """How many of a row's logits are above each of some ([N], in the order of `_order`), or what they weigh. [N]."""
    result = tl.zeros([keys.shape[0], AT_ONCE], tl.float32)
    for start in range(0, vocabulary, AT_ONCE):
        token = start + tl.arange(0, AT_ONCE)
        number = tl.load(mine + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
        one = tl.where(token < vocabulary, 1.0, 0.0) if COUNTS else tl.exp((number - best) / temperature)
        result += tl.where(_order(number)[None, :] > keys[:, None], one[None, :], 0.0)
    return tl.sum(result.to(tl.float64), 1)


@triton.jit
def _order(number):
    """The bits of fp32 numbers as integers in the same order."""
    bits = number.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _is_kept(number, best, temperature, least, min_p):
    """Whether logits outlast the cuts; their weights are relative to the best one's."""
    return (number >= least) & (tl.exp((number - best) / temperature) >= min_p)


@triton.jit
def _sum_kept(
    logits,
    temperatures,
    tops,
    sums,
    tempered,  # [B, N], now of what is kept alone
    cuts,
    least,
    row_stride,
    vocabulary,
    count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS_AT_ONCE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    every = tl.arange(0, BLOCKS)
    best = tl.max(tl.load(tops + row * count + every, mask=every < count, other=float("-inf")), 0)
    temperature = tl.load(temperatures + row)
    temperature = tl.where(temperature == 0, 1.0, temperature)
    block = tl.program_id(1) * BLOCKS_AT_ONCE + tl.arange(0, BLOCKS_AT_ONCE)
    token = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    number = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    top = tl.load(tops + row * count + block, mask=block < count, other=0.0)
    min_p = tl.load(cuts + 2 * tl.num_programs(0) + row).to(tl.float32)
    kept = _is_kept(number, best, temperature, tl.load(least + row), min_p)
    weights = tl.where(kept, tl.exp((number - tl.where(top == float("-inf"), 0.0, top)[:, None]) / temperature), 0.0)
    tl.store(tempered + row * count + block, tl.sum(weights, 1), mask=block < count)


@triton.jit
def _choose(
    logits,
    temperatures,
    tops,
    sums,
    tempered,
    draws,  # [B]
    cuts,  # or None
    least,  # or None
    tokens,  # [B]
    logprobs,  # [B]
    row_stride,
    vocabulary,
    count,
    BLOCK: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, BLOCKS)
    exists = block < count
    top = tl.load(tops + row * count + block, mask=exists, other=float("-inf"))
    best = tl.max(top, 0)
    part = tl.load(sums + row * count + block, mask=exists, other=0.0) * tl.exp(top - best)
    total = tl.sum(part.to(tl.float64), 0)
    temperature = 1.0
    greedy = False
    if temperatures is not None:
        temperature = tl.load(temperatures + row)
        greedy = temperature == 0
        temperature = tl.where(greedy, 1.0, temperature)
        part = tl.load(tempered + row * count + block, mask=exists, other=0.0) * tl.exp((top - best) / temperature)
    chosen, draw = _pick(part, tl.load(draws + row), BLOCKS)
    if greedy:
        chosen = tl.min(tl.where(top == best, block, BLOCKS - 1), 0)
    token = chosen * BLOCK + tl.arange(0, BLOCK)
    number = tl.load(logits + row * row_stride + token, mask=token < vocabulary, other=float("-inf")).to(tl.float32)
    weights = tl.exp((number - best) / temperature)
    if cuts is not None:
        min_p = tl.load(cuts + 2 * tl.num_programs(0) + row).to(tl.float32)
        weights = tl.where(_is_kept(number, best, temperature, tl.load(least + row), min_p), weights, 0.0)
    number -= best
    place, _ = _pick(weights, draw, BLOCK)
    if greedy:
        place = tl.min(tl.where(number == tl.max(number, 0), tl.arange(0, BLOCK), BLOCK - 1), 0)
    logprob = tl.sum(tl.where(tl.arange(0, BLOCK) == place, number, 0.0), 0) - tl.log(total)
    tl.store(tokens + row, tl.minimum(chosen * BLOCK + place, vocabulary - 1))
    tl.store(logprobs + row, logprob)


@triton.jit
def _pick(weights, draw, SIZE: tl.constexpr):
    """The entry of positive weight that `draw * total` falls into, and how far into it, below 1: `sampler._pick`."""
    entry = tl.arange(0, SIZE)
    weights = weights.to(tl.float64)
    upto = tl.cumsum(weights, 0)
    target = draw * tl.max(tl.where(weights > 0, upto, 0.0), 0)  # sums in parallel need not rise from entry to entry
    chosen = tl.min(tl.where((upto > target) & (weights > 0), entry, SIZE - 1), 0)  # any where a weight is NaN
    weight = tl.sum(tl.where(entry == chosen, weights, 0.0), 0)
    before = tl.sum(tl.where(entry == chosen, upto, 0.0), 0) - weight
    weight = tl.where(weight > 0, weight, 1.0)  # of numbers that are none
    return chosen, tl.minimum(tl.maximum((target - before) / weight, 0.0), BELOW_ONE)
