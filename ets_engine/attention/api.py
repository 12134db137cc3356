"""The one public attention function: validates, then dispatches explicitly; it knows no tree, only index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import torch

Implementation = Literal["auto", "eager", "reference"]


class SegmentLayout(Protocol):
    """K/V that several queries share; see `tree_attention`."""

    @property
    def queries(self) -> torch.Tensor | None:
        """Queries that see it, None = all; shape [R]."""
        ...

    @property
    def slots(self) -> torch.Tensor | slice:
        """Where its K/V lies; shape [U]."""
        ...


class AttentionLayout(Protocol):
    """Which query sees which slot: shared segments, and a padded private tail per row."""

    @property
    def segments(self) -> Sequence[SegmentLayout]:
        """Shared parts, each read once."""
        ...

    @property
    def tail_slots(self) -> torch.Tensor:
        """The rest of each row's path, in order; shape [B, L]."""
        ...

    @property
    def tail_bias(self) -> torch.Tensor | None:
        """Added to the scores of the tail, None = see `tail_causal`; shape [B, 1, Q, L]."""
        ...

    @property
    def tail_blocks(self) -> Sequence[tuple[int, int, int]]:
        """First row, row after the last and longest tail of rows that are read together; all rows in order."""
        ...

    @property
    def tail_causal(self) -> bool:
        """Whether the tail is the queries themselves, each seeing itself and those before it."""
        ...

    @property
    def query_index(self) -> torch.Tensor | None:
        """Packed query of each padded one, None = no padding; shape [B, Q]."""
        ...

    @property
    def packed_index(self) -> torch.Tensor | None:
        """Padded query of each packed one, None with `query_index`; shape [T]."""
        ...

    @property
    def num_rows(self) -> int:
        """B."""
        ...

    @property
    def num_queries(self) -> int:
        """Q, the most queries of one row."""
        ...


def tree_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    implementation: Implementation = "auto",
) -> torch.Tensor:
    """Softmax attention of packed queries over a shared, paged KV cache.

    Equal to plain attention of every query over its own row's whole path. H query heads, K KV heads (H a multiple of
    K; query head `h` reads KV head `h // (H // K)`), D head dim, T queries of B rows with at most Q each, S slots.

    Args:
        query: Queries, rows packed one after the other. Shape [T, H, D].
        cache: Keys at [:, 0], values at [:, 1], the queries' own already written. Shape [S, 2, K, D].
        layout: Who sees what:
            `segments`: `slots` ([U], or a slice) seen by all of `queries` ([R] in 0..T-1, None = every query);
            `tail_slots` [B, L]: the rest of each row's path, in order, seen according to `tail_bias`
            (additive, [B, 1, Q, L]), or causally when `tail_causal` (then L = Q), or wholly;
            `tail_blocks`: rows whose tails are gathered together, cut to the longest of them;
            `query_index` [B, Q] and `packed_index` [T] map packed to padded queries and back, None = T is B x Q.
        scale: Factor on the scores, usually D**-0.5.
        implementation: "reference" is the slow specification; "auto" is "eager" until a kernel fits the device.

    Returns:
        Shape [T, H, D], dtype of `query`.

    Raises:
        ValueError: shapes that do not fit together, or an unknown implementation.
    """
    if query.dim() != 3 or cache.dim() != 4 or cache.shape[1] != 2:
        raise ValueError(f"need query [T, H, D] and cache [S, 2, K, D], got {list(query.shape)}, {list(cache.shape)}")
    if query.shape[2] != cache.shape[3] or query.shape[1] % cache.shape[2]:
        raise ValueError(
            f"query heads {query.shape[1]} x {query.shape[2]} do not fit KV heads {cache.shape[2]} x {cache.shape[3]}: "
            "head dims must be equal and query heads a multiple of KV heads"
        )
    if layout.query_index is None and layout.num_rows * layout.num_queries != query.shape[0]:
        raise ValueError(f"{layout.num_rows} rows x {layout.num_queries} queries are not {query.shape[0]} queries")
    match implementation:
        case "auto" | "eager":
            from ets_engine.attention.eager import tree_attention_eager

            return tree_attention_eager(query, cache, layout, scale=scale)
        case "reference":
            from ets_engine.attention.reference import tree_attention_reference

            return tree_attention_reference(query, cache, layout, scale=scale)
        case _:
            raise ValueError(f"implementation={implementation!r} is unknown; use 'auto', 'eager' or 'reference'")
