"""What reads the whole vocabulary in a draw, in Triton: one pass over the logits, and nothing of their size written.

Sums of weights by blocks of the vocabulary are all that the inverse CDF needs besides one block of each row.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

BLOCKS_AT_ONCE = 8


def block_sums(
    logits: torch.Tensor, temperatures: torch.Tensor | None, block: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Largest logit of each block of the vocabulary, and sums of `exp(logit - largest)`. Can be captured in a graph.

    Args:
        logits: Any float dtype, contiguous along V. Shape [B, V].
        temperatures: None = all are 1; 0 counts as 1. Shape [B], float32.
        block: Tokens of a block (count), a power of two.

    Returns:
        The largest, the sums at temperature 1, and the sums of `exp((logit - largest) / temperature)`; NaN where a
        logit is. Shape [B, N] each, float32, N blocks.
    """
    rows, vocabulary = logits.shape
    count = -(-vocabulary // block)
    tops = torch.empty((rows, count), dtype=torch.float32, device=logits.device)
    sums = torch.empty_like(tops)
    tempered = sums if temperatures is None else torch.empty_like(tops)
    with torch.cuda.device(logits.device) if logits.device.type == "cuda" else nullcontext():
        _block_sums[(rows, -(-count // BLOCKS_AT_ONCE))](
            logits,
            temperatures,
            tops,
            sums,
            tempered,
            logits.stride(0),
            vocabulary,
            count,
            BLOCK=block,
            BLOCKS=BLOCKS_AT_ONCE,
        )
    return tops, sums, tempered


@triton.jit
def _block_sums(
    logits,  # [B, V], strided
    temperatures,  # [B] or None
    tops,  # [B, N]
    sums,  # [B, N]
    tempered,  # [B, N]
    row_stride,
    vocabulary,
    count,
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
