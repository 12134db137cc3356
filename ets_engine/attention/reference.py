"""The specification of tree attention: every prefix written out per query, in fp64; slow on purpose."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ets_engine.attention.api import AttentionLayout


def visible_slots(layout: AttentionLayout) -> list[list[int]]:
    """The slots each query sees, shared ones first; as many lists as there are queries."""
    num_rows, num_queries = layout.num_rows, layout.num_queries
    flat = range(num_rows * num_queries) if layout.packed_index is None else layout.packed_index.tolist()
    seen: list[list[int]] = [[] for _ in flat]
    for segment in layout.segments:
        slots = segment.slots
        values = list(range(slots.start, slots.stop)) if isinstance(slots, slice) else slots.tolist()
        queries = range(len(seen)) if segment.queries is None else segment.queries.tolist()
        hidden = [0] * len(queries) if segment.hidden is None else segment.hidden.tolist()
        for query, count in zip(queries, hidden, strict=True):
            seen[query] += values[count:]
    for query, place in enumerate(flat):
        row, step = divmod(place, num_queries)
        tail = layout.tail_slots[row].tolist()
        if layout.tail_bias is not None:
            tail = [slot for slot, bias in zip(tail, layout.tail_bias[row, 0, step].tolist(), strict=True) if bias == 0]
        elif layout.tail_causal:
            tail = tail[: step + 1]
        seen[query] += tail
    return seen


def tree_attention_reference(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `tree_attention`."""
    group = query.shape[1] // cache.shape[2]
    outputs = []
    for one, slots in zip(query.double(), visible_slots(layout), strict=True):
        keys, values = cache[slots].double().repeat_interleave(group, dim=2).unbind(1)  # each [N, H, D]
        scores = torch.einsum("hd,nhd->hn", one, keys) * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.double()[:, None]], -1)
        weights = scores.softmax(-1)[:, : len(slots)]
        outputs.append(torch.einsum("hn,nhd->hd", weights, values))
    return torch.stack(outputs).to(query.dtype)
