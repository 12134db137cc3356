"""FlashInfer's attention over the paths of a tree, for one decode step: as a cascade, and path by path.

    cascade   what queries share is read once for all of them, one level of the tree after the other, and the results
              of the levels are merged (https://flashinfer.ai/2024/02/02/cascade-inference.html)
    paged     pages are shared in memory, and read once for every query: how serving engines decode

Both read the K/V where it lies: pages of 16 tokens where the paths are whole pages of the cache, else of one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any, Literal, NamedTuple

import torch

PAGE_TOKENS = 16
WORKSPACE_BYTES = 1 << 28  # twice what its manual advises: split keys of 28 heads need 121 MB on 132 multiprocessors


class Table(NamedTuple):
    """Every path as pages of so many tokens; shape [B, P]."""

    pages: torch.Tensor
    tokens: int


@dataclass(frozen=True, slots=True)
class Level:
    """A stretch of all paths; in it, neighbouring queries that read the same are a group. All int32.

    Attributes:
        query_starts: Where the queries of each group begin, and the last ones end. Shape [G + 1].
        page_starts: Where the pages of each group begin in `pages`, and the last ones end. Shape [G + 1].
        pages: Of one group after the other. Shape [P].
        last_page_tokens: Tokens in the last page of each group. Shape [G].
    """

    query_starts: torch.Tensor
    page_starts: torch.Tensor
    pages: torch.Tensor
    last_page_tokens: torch.Tensor


Side = Callable[[], torch.Tensor]  # [B, H, D]


class Planned(NamedTuple):
    """A decode step ready to run, what planning it again took (milliseconds), its levels (count), whose kernels."""

    run: Side
    plan_ms: float
    levels: int
    kernels: str


def flashinfer_sides(
    query: torch.Tensor, cache: torch.Tensor, paths: torch.Tensor, scale: float, time_ms: Callable[[Side], float]
) -> dict[str, Planned | None]:
    """Both, the cascade with the levels and the kernels that are fastest; None and a warning where one does not run.

    Args:
        query: Shape [B, H, D]; bf16 or fp16, on a CUDA device.
        cache: Shape [S, 2, K, D].
        paths: Slots that each query sees, root first; queries that share some are neighbours. On the CPU. Shape [B, N].
        scale: Of scores.
        time_ms: Times a side (milliseconds).
    """
    table = page_table(paths)
    depth = len(cascade_levels(table))
    backends = ("fa2", "fa3") if torch.cuda.get_device_capability(query.device)[0] == 9 else ("fa2",)
    cascades = [
        partial(cascade_side, query, cache, table, scale, levels, backend)
        for levels, backend in product(range(min(2, depth), depth + 1), backends)
    ]
    builds = {"cascade": cascades, "paged": [partial(paged_side, query, cache, table, scale)]}
    return {name: _fastest(some, time_ms) for name, some in builds.items()}


def page_table(paths: torch.Tensor) -> Table:
    """Pages of 16 tokens where every path is whole ones, else of one; paths are slots, [B, N]."""
    if paths.shape[1] % PAGE_TOKENS == 0:
        slots = paths.unflatten(1, (-1, PAGE_TOKENS))  # [B, P, 16]
        pages = slots[..., 0] // PAGE_TOKENS
        if torch.equal(slots, pages[..., None] * PAGE_TOKENS + torch.arange(PAGE_TOKENS)):
            return Table(pages, PAGE_TOKENS)
    return Table(paths, 1)


def cascade_levels(table: Table, most: int | None = None) -> list[Level]:
    """Cut the paths wherever their groups change.

    Args:
        table: Root first; paths that share pages are neighbours.
        most: Levels (count, >= 1), the last of which keeps all that is left, every query for itself; None = as many as
            the tree has.
    """
    paths = table.pages
    fresh = torch.ones_like(paths, dtype=torch.bool)  # [B, P], whether it differs from what the query before reads
    fresh[1:] = paths[1:] != paths[:-1]
    changes = (fresh[:, 1:] != fresh[:, :-1]).any(0).nonzero()[:, 0] + 1
    cuts = [0, *changes.tolist()][:most]
    levels: list[Level] = []
    for start, stop in zip(cuts, [*cuts[1:], paths.shape[1]], strict=True):
        firsts = fresh[:, stop - 1].nonzero()[:, 0]
        pages = paths[firsts, start:stop]  # [G, P / G]
        ends = torch.tensor([len(paths)])
        tensors = (
            torch.cat([firsts, ends]),
            torch.arange(len(firsts) + 1) * pages.shape[1],
            pages.flatten(),
            torch.full_like(firsts, table.tokens),
        )
        levels.append(Level(*(one.int() for one in tensors)))
    return levels


def cascade_side(
    query: torch.Tensor,
    cache: torch.Tensor,
    table: Table,
    scale: float,
    most: int | None = None,
    backend: Literal["fa2", "fa3"] = "fa2",
) -> Planned:
    """Cascade attention of at most so many levels (`cascade_levels`).

    Left alone, FlashInfer takes FA3 on Hopper, which is made for long queries: it neither splits keys nor stacks the
    heads of a group.

    Args:
        query: See `flashinfer_sides`.
        cache: See there.
        table: See `cascade_levels`.
        scale: Of scores.
        most: Levels (count).
        backend: Whose kernels.
    """
    import flashinfer  # pyright: ignore[reportMissingImports]

    levels = cascade_levels(table, most)
    wrapper = flashinfer.MultiLevelCascadeAttentionWrapper(len(levels), _workspace(query), "NHD")
    for one in wrapper._batch_prefill_wrappers:
        one._backend = backend
    plan = partial(
        wrapper.plan,
        [one.query_starts for one in levels],
        [one.page_starts for one in levels],
        [one.pages.to(query.device) for one in levels],
        [one.last_page_tokens for one in levels],
        *(query.shape[1], cache.shape[2], query.shape[2], table.tokens),
        sm_scale=scale,
        q_data_type=query.dtype,
    )
    return Planned(partial(wrapper.run, query, _pages(cache, table.tokens)), _plan_ms(plan), len(levels), backend)


def paged_side(query: torch.Tensor, cache: torch.Tensor, table: Table, scale: float) -> Planned:
    """Every path by itself, over pages that paths share; arguments as for `cascade_side`."""
    import flashinfer  # pyright: ignore[reportMissingImports]

    (whole,) = cascade_levels(table, 1)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(_workspace(query), "NHD", use_tensor_cores=True)
    plan = partial(
        wrapper.plan,
        whole.page_starts,
        whole.pages.to(query.device),
        whole.last_page_tokens,
        *(query.shape[1], cache.shape[2], query.shape[2], table.tokens),
        sm_scale=scale,
        q_data_type=query.dtype,
    )
    return Planned(partial(wrapper.run, query, _pages(cache, table.tokens)), _plan_ms(plan), 1, "fa2")


def _fastest(builds: Iterable[Callable[[], Planned]], time_ms: Callable[[Side], float]) -> Planned | None:
    timed: list[tuple[float, Planned]] = []
    for build in builds:
        try:
            one = build()
            timed.append((time_ms(one.run), one))
        except Exception as error:  # whatever trips a peer; the others still run
            warnings.warn(f"FlashInfer does not run here: {error!r:.300}", stacklevel=2)
    return min(timed, key=lambda pair: pair[0])[1] if timed else None


def _pages(cache: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
    """Keys and values of [S, 2, K, D] as pages, in place; each [S / tokens, tokens, K, D]."""
    return cache.unflatten(0, (-1, tokens)).unbind(2)


def _workspace(query: torch.Tensor) -> torch.Tensor:
    return torch.empty(WORKSPACE_BYTES, dtype=torch.uint8, device=query.device)


def _plan_ms(plan: Callable[[], Any]) -> float:
    """Milliseconds of planning once it has compiled or loaded its kernels."""
    plan()
    torch.cuda.synchronize()
    began_s = time.perf_counter()
    plan()
    torch.cuda.synchronize()
    return 1e3 * (time.perf_counter() - began_s)
