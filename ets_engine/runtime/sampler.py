"""Logits -> token ids, one reproducible draw per branch, whoever else shares the batch.

A token's random number depends on nothing but (seed, node, position). The logits themselves may differ in their last
bits with the batch, because matrix products of other sizes add in another order (about 1e-6 relative in fp32, 1e-2 in
bf16). A draw changes only when it falls into that gap: in fp32 about once in 10^5 to 10^6 tokens, in bf16 often enough
to notice.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.errors import ConfigError, ETSError
from ets_engine.runtime.transfer import upload

BLOCK = 256  # vocabulary entries per block of the two-level inverse CDF
_BELOW_ONE = 1 - 2.0**-53
_LIKELIEST = 128  # tokens that are put in order at first for top-p; more only where they do not reach p

NO_NUMBERS = (
    "the model's logits are not numbers: its activations outgrow its dtype, or its weights are broken; try "
    "dtype='float32'"
)


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one branch draws its tokens.

    Attributes:
        temperature: 0 takes the likeliest token.
        top_p, top_k, min_p: Cuts, applied in the order k, p, min; 1.0, 0 and 0.0 switch them off. Tokens exactly as
            likely as the last one kept are kept too.

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
        for part in _mix(np.array([seeds, nodes, positions], dtype=np.uint64) + np.uint64(0x9E3779B97F4A7C15)):
            state = _mix(state ^ part)
    return ((state >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52  # exact, so never 0 or 1


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

    Raises:
        ETSError: A row holds NaN or infinity, or gives no token any weight.
    """
    tokens, logprobs = draw(logits, params, draws)
    if bool(logprobs.isnan().any()):
        raise ETSError(NO_NUMBERS)
    return tokens, logprobs


def draw(
    logits: torch.Tensor,
    params: Sequence[SamplingParams],
    draws: NDArray[np.float64],
    rows: Sequence[int] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`sample` that a GPU has not done yet when it returns; the log-probability of a bad row is NaN.

    Args:
        logits: Of each distribution. Shape [R, V].
        params: How tokens are drawn from each. Shape [R].
        draws: As many as tokens are wanted. Shape [B].
        rows: Which distribution each is from, None = one each.
    """
    device = logits.device
    if device.type == "cuda" and find_spec("triton") is not None:
        from ets_engine.runtime.draw_kernel import draw_by_blocks

        if rows is not None:
            logits, params = logits[upload(rows, device, torch.int64)], [params[row] for row in rows]
        table = upload(tabulate(params, draws), device, torch.float64)
        return draw_by_blocks(logits, table[1].float(), table[0], table[2:] if any(map(is_cut, params)) else None)
    plain = all(one.temperature == 1 for one in params)
    temperatures = None if plain else upload([one.temperature for one in params], device, torch.float32)
    index = torch.arange(len(logits), device=device) if rows is None else upload(rows, device, torch.int64)
    logprobs = logits.float().log_softmax(-1)  # one number that is none makes its whole row NaN
    if not any(one.temperature for one in params):
        tokens = logits.argmax(-1)[index]
    else:
        numbers = upload(draws, device, torch.float64)
        tokens = _invert(_cut(_weights(logprobs, temperatures), params), numbers[:, None], index)
        if temperatures is not None:
            tokens = torch.where(temperatures[index] == 0, logits.argmax(-1)[index], tokens)
    return tokens, logprobs[index, tokens]


def tabulate(params: Sequence[SamplingParams], draws: NDArray[np.float64]) -> NDArray[np.float64]:
    """What decides draws besides logits: the numbers drawn, temperatures, top-p, top-k and min-p. [B] x 2 -> [5, B].

    Example:
        >>> tabulate([SamplingParams(top_k=20)] * 2, np.array([0.25, 0.75])).tolist()
        [[0.25, 0.75], [1.0, 1.0], [1.0, 1.0], [20.0, 20.0], [0.0, 0.0]]
    """
    table = np.empty((5, len(params)))
    table[0] = draws
    alike = len({id(one) for one in params}) == 1
    rules = [_rules(one) for one in (params[:1] if alike else params)]
    table[1:] = np.array(rules, dtype=np.float64).T
    return table


def _rules(params: SamplingParams) -> tuple[float, float, float, float]:
    """Temperature, top-p, top-k and min-p; the likeliest token outlasts all cuts."""
    if not params.temperature:
        return 0.0, 1.0, 0.0, 0.0
    return params.temperature, params.top_p, min(params.top_k, 1 << 30), params.min_p


def is_cut(params: SamplingParams) -> bool:
    """Whether fewer tokens than all may be drawn."""
    return bool(params.temperature and (params.top_k or params.top_p < 1 or params.min_p))


def certainties(logits: torch.Tensor) -> torch.Tensor:
    """How far each next-token distribution is from uniform: KL(uniform || p) / ln V. [B, V] -> [B] (fp32).

    Self-certainty (Kang et al., arXiv 2502.18581) in units of ln V, so that vocabularies compare: 0 for the uniform
    distribution, no upper bound, infinite where a token is ruled out.

    Example:
        >>> certainties(torch.tensor([[1.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0]])).round().tolist()
        [0.0, 3.0]
    """
    logits = logits.float()
    return (logits.logsumexp(-1) - logits.mean(-1)) / math.log(logits.shape[-1]) - 1.0


def _weights(logprobs: torch.Tensor, temperatures: torch.Tensor | None) -> torch.Tensor:
    """What each token weighs at its row's temperature; None = 1 everywhere, 0 counts as 1. [B, V] -> [B, V]."""
    if temperatures is None:
        return logprobs.exp()
    below = logprobs - logprobs.amax(-1, keepdim=True)  # so that no temperature makes the likeliest one infinite
    return (below / temperatures.masked_fill(temperatures == 0, 1.0)[:, None]).softmax(-1)


def _cut(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """Weights with the cuts made, in place. [B, V]."""
    cut = [row for row, one in enumerate(params) if is_cut(one)]
    if cut:
        rows = upload(cut, weights.device, torch.int64)
        part = weights if len(cut) == len(params) else weights[rows]
        weights[rows] = part.masked_fill(part < _least(part, [params[row] for row in cut]), 0.0)
    return weights


def _least(weights: torch.Tensor, params: Sequence[SamplingParams]) -> torch.Tensor:
    """The smallest weight that top-k, then top-p, then min-p leave, of rows that sum to 1. [R, V] -> [R, 1].

    It is a value and not a list of tokens, so neither how sorting breaks ties nor the other rows matter.
    """
    vocabulary, device = weights.shape[1], weights.device
    most = min(vocabulary, max(_LIKELIEST, *(one.top_k for one in params)))
    k = upload([min(one.top_k or vocabulary, vocabulary) for one in params], device, torch.int64)[:, None]
    p = upload([one.top_p if one.top_p < 1 else math.inf for one in params], device, torch.float64)[:, None]
    floor = upload([one.min_p for one in params], device, torch.float32)[:, None]
    reaches = any(one.top_p < 1 for one in params)
    while True:
        ordered = weights.topk(most).values
        upto = ordered.double().cumsum(-1)
        total = torch.where(k < vocabulary, upto.gather(1, k.clamp_max(most) - 1), 1.0)
        inside = (torch.arange(most, device=device) < k) & (upto - ordered < p * total)  # likelier ones do not reach p
        if most == vocabulary or not reaches or not bool((inside[:, -1:] & (p < 1) & (k > most)).any()):
            break
        most = min(vocabulary, 8 * most)
    last = ordered.gather(1, (inside.sum(-1, keepdim=True) - 1).clamp_min(0))  # of NaN, nothing is inside
    return torch.maximum(torch.where((k < vocabulary) | (p < 1), last, 0.0), floor * ordered[:, :1])


def _invert(weights: torch.Tensor, draws: torch.Tensor, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The token that `draw * total` falls into along the running sum of weights. [R, V], [B, 1] -> [B].

    Sums are in fp64, and by blocks where the vocabulary is large, so that not all of it is accumulated.

    Args:
        weights: Of each distribution. Shape [R, V].
        draws: One per token. Shape [B, 1].
        rows: Which distribution each is from, None = one each. Shape [B].
    """
    count, vocabulary = weights.shape
    if vocabulary <= BLOCK:
        return _pick(weights if rows is None else weights[rows], draws)[0][:, 0]
    blocks = torch.nn.functional.pad(weights, (0, -vocabulary % BLOCK)).view(count, -1, BLOCK)
    sums = blocks.sum(-1)
    block, draws = _pick(sums if rows is None else sums[rows], draws)
    if rows is None:
        rows = torch.arange(count, device=weights.device)
    inside, _ = _pick(blocks[rows, block[:, 0]], draws)
    return (block * BLOCK + inside)[:, 0].clamp_max(vocabulary - 1)


def _pick(weights: torch.Tensor, draws: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The entry, of positive weight, that `draw * total` falls into, and how far into it. [B, N], [B, 1] -> [B, 1] x 2.

    Draws are in [0, 1 - 2**-53], the second result too.
    """
    upto = weights.double().cumsum(-1)
    target = draws * upto[:, -1:]  # below the total, whatever the rounding
    entry = torch.searchsorted(upto, target, right=True).clamp_max(weights.shape[1] - 1)  # beyond it where a sum is NaN
    weight = weights.gather(1, entry)
    before = upto.gather(1, entry) - weight
    return entry, ((target - before) / weight).clamp_(0.0, _BELOW_ONE)
