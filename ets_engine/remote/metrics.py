"""A server's own prefix-cache figures, read from its Prometheus page."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

_SAMPLE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{.*\})?\s+(\S+)")
_QUERIES = ("vllm:prefix_cache_queries", "vllm:gpu_prefix_cache_queries")
_HITS = ("vllm:prefix_cache_hits", "vllm:gpu_prefix_cache_hits")
_RATES = ("sglang:cache_hit_rate", "vllm:gpu_prefix_cache_hit_rate")


@dataclass(frozen=True, slots=True)
class ServerMetrics:
    """Prefix-cache figures of one server, over all its callers since it started.

    Attributes:
        queried_tokens: Prompt tokens looked up in the cache (count), None where the server does not say.
        hit_tokens: Of those, the ones found there (count).
        hit_rate: `hit_tokens / queried_tokens`, or what the server gives as its rate, in [0, 1].
    """

    queried_tokens: int | None
    hit_tokens: int | None
    hit_rate: float


def read_metrics(page: str) -> ServerMetrics | None:
    r"""The figures on a Prometheus page, in the names of vLLM or SGLang; None where there are none.

    Example:
        >>> read_metrics('vllm:prefix_cache_queries_total{engine="0"} 80.0\nvllm:prefix_cache_hits_total 60')
        ServerMetrics(queried_tokens=80, hit_tokens=60, hit_rate=0.75)
    """
    samples: dict[str, list[float]] = {}
    for line in page.splitlines():
        found = _SAMPLE.match(line)
        if found is None:
            continue
        try:
            value = float(found[2])
        except ValueError:
            continue
        if math.isfinite(value):
            samples.setdefault(found[1].removesuffix("_total"), []).append(value)
    queried, hit = _first(samples, _QUERIES), _first(samples, _HITS)
    if queried is not None and hit is not None:
        return ServerMetrics(round(sum(queried)), round(sum(hit)), sum(hit) / sum(queried) if sum(queried) else 0.0)
    rates = _first(samples, _RATES)
    return None if rates is None else ServerMetrics(None, None, sum(rates) / len(rates))


def _first(samples: dict[str, list[float]], names: tuple[str, ...]) -> list[float] | None:
    return next((samples[name] for name in names if name in samples), None)
