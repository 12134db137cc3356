"""A draw from a large vocabulary in two launches of Triton: the logits are read once, nothing of their size written.

Sums of weights by blocks of the vocabulary are all that the inverse CDF needs besides one block of each row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ets_engine.runtime.sampler import BLOCK

BLOCKS_AT_ONCE = 8
BELOW_ONE = tl.constexpr(1 - 2.0**-53)


def draw_by_blocks(
    logits: torch.Tensor, temperatures: torch.Tensor | None, draws: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `sampler.draw_uncut`, on a GPU or in Triton's interpreter. Can be captured in a CUDA graph.

    Args:
        logits: Any float dtype, contiguous along V. Shape [B, V].
        temperatures: 0 = the likeliest token, None = all are 1. Shape [B], float32.
        draws: In (0, 1). Shape [B], float64.

    Returns:
        Token ids [B] (int64), and their log-probabilities [B] (fp32) at temperature 1; NaN where a row's
        logits are no numbers.
    """
    rows, vocabulary = logits.shape
    count = -(-vocabulary // BLOCK)
    tops = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops)
    tempered = sums if temperatures is None else torch.empty_like(tops)
    tokens = torch.empty(rows, dtype=torch.int64, device=logits.device)
    logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
    numbers = logits, temperatures, tops, sums, tempered
    sizes = logits.stride(0), vocabulary, count
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else nullcontext():
        _sum_blocks[(rows, -(-count // BLOCKS_AT_ONCE))](*numbers, *sizes, BLOCK=BLOCK, BLOCKS=BLOCKS_AT_ONCE)
        _choose[(rows,)](*numbers, draws, tokens, logprobs, *sizes, BLOCK=BLOCK, BLOCKS=triton.next_power_of_2(count))
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
    BLOCKS: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
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
def _choose(
    logits,
    temperatures,
    tops,
    sums,
    tempered,
    draws,  # [B]
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
    number -= best
    place, _ = _pick(tl.exp(number / temperature), draw, BLOCK)
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
    return chosen, tl.minimum(tl.maximum((target - before) / weight, 0.0), BELOW_ONE)
