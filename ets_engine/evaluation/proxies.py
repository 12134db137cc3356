"""Which cost tells latency: how costs that need no clock go with measured seconds."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from ets_engine.evaluation.measured import mean_known
from ets_engine.evaluation.records import Record
from ets_engine.evaluation.statistics import rank_correlation

PROXIES = {
    "mean_kv_tokens": "KV mean",
    "peak_kv_tokens": "KV peak",
    "published_kv_tokens": "KV, published metric",
    "generated_tokens": "tokens generated",
    "verifier_tokens": "PRM tokens",
    "model_calls": "model calls",
    "flops": "FLOPs",
    "bytes_moved": "bytes moved",
}
"""Fields of a record that might tell latency, and what tables call them."""


def correlate_methods(alone: Iterable[Sequence[Record]]) -> dict[str, float | None]:
    """Spearman's correlation of each mean cost with the median latency, over methods.

    Args:
        alone: Of each method, the searches that ran alone; a method without any is left out.
    """
    timed = [records for records in alone if records]
    latencies = [float(np.median([record.wall_s for record in records])) for records in timed]
    return {
        proxy: _known([mean_known(getattr(record, proxy) for record in records) for records in timed], latencies)
        for proxy in PROXIES
    }


def correlate_searches(alone: Iterable[Record]) -> dict[str, float | None]:
    """The same over single searches."""
    timed = list(alone)
    latencies = [record.wall_s for record in timed]
    return {proxy: _known([getattr(record, proxy) for record in timed], latencies) for proxy in PROXIES}


def _known(costs: Sequence[float | None], latencies: Sequence[float]) -> float | None:
    pairs = [(cost, latency) for cost, latency in zip(costs, latencies, strict=True) if cost is not None]
    return rank_correlation([cost for cost, _ in pairs], [latency for _, latency in pairs])
