"""Logits -> token ids, one reproducible draw per branch, whoever else shares the batch.

A token's random number depends on nothing but (seed, node, position). The logits themselves may differ in their last
bits with the batch, because matrix products of other sizes add in another order (about 1e-6 relative in fp32, 1e-2 in
bf16). A draw changes only when it falls into that gap: in fp32 about once in 10^5 to 10^6 tokens, in bf16 often enough
to notice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.errors import ConfigError

_BLOCK = 256  # vocabulary entries per block of the two-level inverse CDF


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one branch draws its tokens.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p: Cuts, applied in the order k, p, min; 1.0, 0 and 0.0 switch them off.

    Raises:
        ConfigError: a value is out of range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        valid = self.temperature >= 0 and 0 < self.top_p <= 1 and self.top_k >= 0 and 0 <= self.min_p <= 1
        if not valid:
            raise ConfigError(f"{self}: need temperature >= 0, 0 < top_p <= 1, top_k >= 0 and 0 <= min_p <= 1")


def uniforms(
    seeds: Sequence[int] | NDArray[np.uint64],
    nodes: Sequence[int] | NDArray[np.uint64],
    positions: Sequence[int] | NDArray[np.uint64],
) -> NDArray[np.float64]:
    """One number in (0, 1) per (seed, node, position), by splitmix64 finalisers chained as a hash.

    Args:
        seeds: Of the searches. Non-negative, below 2**64, like all three. Shape [B].
        nodes: Ids of the steps in their search trees. Shape [B].
        positions: Of the tokens on their paths. Shape [B].

    Returns:
        Shape [B].

    Example:
        >>> uniforms([7, 7], [1, 2], [0, 0]).round(3).tolist() == uniforms([7, 7], [1, 2], [0, 0]).round(3).tolist()
        True
    """
    state = np.zeros(len(seeds), dtype=np.uint64)
    with np.errstate(over="ignore"):
        for part in (seeds, nodes, positions):
            state = _mix(state ^ _mix(np.asarray(part, dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)))
    return ((state >> np.uint64(11)).astype(np.float64) + 0.5) * 2.0**-53


def _mix(state: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014): every input bit moves every output bit."""
    state = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    state = (state ^ (state >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return state ^ (state >> np.uint64(31))


def sample(
    logits: torch.Tensor, params: Sequence[SamplingParams], draws: NDArray[np.float64]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw one token per row by inverting the CDF at the row's number.

    Args:
        logits: Any float dtype. Shape [B, V].
        params: One per row. Shape [B].
        draws: In (0, 1). Shape [B].

    Returns:
        Token ids [B] (int64), and their log-probabilities [B] (fp32) under the model itself: temperature 1, no cuts.
    """
    logits = logits.float()
    top, best = logits.max(-1, keepdim=True)
    if all(one.temperature == 0 for one in params):
        tokens = best[:, 0]
        return tokens, (top - logits.logsumexp(-1, keepdim=True))[:, 0]
    temperatures = torch.tensor([one.temperature or 1.0 for one in params], device=logits.device)[:, None]
    plain = (logits - top).exp_()
    log_total = plain.sum(-1).log()
    weights = plain if bool((temperatures == 1).all()) else ((logits - top) / temperatures).exp_()
    cut = [i for i, one in enumerate(params) if one.temperature and (one.top_k or one.top_p < 1 or one.min_p)]
    if cut:
        weights = weights.clone()
        weights[cut] = _cut(weights[cut], [params[i] for i in cut])
    tokens = _invert(weights, torch.from_numpy(np.asarray(draws)).to(logits.device))
    greedy = torch.tensor([one.temperature == 0 for one in params], device=logits.device)
    tokens = torch.where(greedy, best[:, 0], tokens)
    return tokens, (logits - top).gather(1, tokens[:, None])[:, 0] - log_total


def _invert(weights: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    """The first token at which the running sum of weights passes `draw * total`. [B, V], [B] -> [B].

    Sums are in fp64 and by blocks, so that the whole vocabulary is never accumulated.
    """
    rows, vocabulary = weights.shape
    padded = torch.nn.functional.pad(weights, (0, -vocabulary % _BLOCK)).view(rows, -1, _BLOCK)
    by_block = padded.sum(-1).double().cumsum(-1)  # [B, V / block]
    target = draws.double() * by_block[:, -1]
    block = torch.searchsorted(by_block, target[:, None], right=True).clamp_max_(by_block.shape[1] - 1)  # [B, 1]
    before = torch.where(block > 0, by_block.gather(1, (block - 1).clamp_min(0)), 0.0)
    inside = padded.gather(1, block[..., None].expand(-1, -1, _BLOCK))[:, 0].double().cumsum(-1)  # [B, block]
    offset = torch.searchsorted(inside, target[:, None] - before, right=True)
    # rounding may push the target past the block's end: take the last token that has any weight
    last = (
        _BLOCK - 1 - (inside.diff(dim=1, prepend=inside.new_zeros(rows, 1)) > 0).flip(1).int().argmax(1, keepdim=True)
    )
    return (block * _BLOCK + torch.minimum(offset, last))[:, 0]


def _cut(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Set the weights that top-k, then top-p, then min-p leave out to zero; ties at an edge go to the lower id."""
    vocabulary = weights.shape[1]
    most = max(one.top_k or vocabulary for one in params) if all(one.top_k for one in params) else vocabulary
    most = min(most, vocabulary)
    ordered, ids = (
        weights.sort(dim=-1, descending=True, stable=True) if most == vocabulary else weights.topk(most, dim=-1)
    )
    rank = torch.arange(most, device=weights.device)[None]
    k = torch.tensor([one.top_k or vocabulary for one in params], device=weights.device)[:, None]
    p = torch.tensor([one.top_p for one in params], dtype=torch.float64, device=weights.device)[:, None]
    floor = torch.tensor([one.min_p for one in params], device=weights.device)[:, None]
    ordered = ordered.masked_fill(rank >= k, 0.0)
    running = ordered.double().cumsum(-1)
    reached_before = (running - ordered.double()) >= p * running[:, -1:]  # the likelier tokens reach p without this one
    drop = (reached_before & (p < 1)) | (ordered < floor * ordered[:, :1])
    drop[:, 0] = False
    return torch.zeros_like(weights).scatter_(1, ids, ordered.masked_fill(drop, 0.0))
