"""What a summary holds: rows, paired comparisons and correlations, and how a summary of earlier is read."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from ets_engine.errors import ConfigError
from ets_engine.evaluation.records import Settings
from ets_engine.types import Value

VERSION = 2
"""Of `summary.json`. 1 had no KV of the verifier apart, no throughput ratios and no correlations over searches; what
a summary does not say is None."""


class Estimate(Value):
    """A mean over problems and its 95 % interval."""

    mean: float
    low: float
    high: float


class Comparison(Value):
    """One row against another on the problems that both have.

    Attributes:
        other: Name of the other row.
        problems: In common (count).
        points: Solved, this minus other (percentage points).
        kv: Mean resident KV tokens on those problems, other over this; None without KV.
        published_kv: The published cumulative metric on those problems, other over this; None without KV.
        latency: Median seconds on the problems that both solved alone, other over this; None without any.
        throughput: Searches per second together, this over other; None where both were not measured equally many at a
            time.
    """

    other: str
    problems: int
    points: Estimate
    kv: float | None
    published_kv: float | None = None
    latency: float | None
    throughput: float | None = None


class Row(Value):
    """One method under one vote, over all problems and seeds.

    Attributes:
        name: As tables call it.
        method: `Method.name`.
        vote: Over the trajectories.
        problems, searches, failed: Counts; a failed search counts as wrong.
        solved, strict, lenient: Accuracy (%), see `Grade`.
        first_error: Of a failed search, empty = none failed.
        any_right: Problems with a right trajectory (%).
        selection: Of those, the ones that the vote gets right (%, leniently).
        by_level: Solved (%) per level.
        mean_kv_tokens, peak_kv_tokens, published_kv_tokens, sharing_ratio: Of the policy, means over searches.
        max_kv_tokens: Of the policy, the largest peak of any search.
        mean_prm_kv_tokens, peak_prm_kv_tokens: Of the verifier, means over searches.
        mean_policy_kv_mb, peak_policy_kv_mb, mean_prm_kv_mb, peak_prm_kv_mb: The same in MB.
        mean_kv_mb, peak_kv_mb: Of policy and verifier together (MB); the peaks need not coincide.
        generated_tokens, verifier_tokens, prompt_tokens, model_calls, flops: Means over searches, as in `Record`.
        p50_s, p95_s: Latency of searches that ran alone (seconds).
        gb_s: Bytes that had to move over seconds in forward passes, of searches that ran alone.
        mb_per_call: Bytes that had to move, both models', per decode step, of searches that ran alone (MB).
        alone_per_s, together_per_s: Searches per second, one at a time and `concurrency` at a time. These and all
            other seconds are from the machine that measured last.
        concurrency: Of `together_per_s`, the largest one.
        processes: That searched for `together_per_s`; None where that is not known.
        versus: Against the rows that it is usually compared with.
    """

    name: str
    method: str
    vote: str
    problems: int
    searches: int
    failed: int
    first_error: str
    solved: Estimate
    strict: Estimate
    lenient: Estimate
    any_right: float
    selection: float | None
    by_level: dict[str, float]
    mean_kv_tokens: float | None
    peak_kv_tokens: float | None
    max_kv_tokens: int | None = None
    published_kv_tokens: float | None
    sharing_ratio: float | None
    mean_prm_kv_tokens: float | None = None
    peak_prm_kv_tokens: float | None = None
    mean_policy_kv_mb: float | None = None
    peak_policy_kv_mb: float | None = None
    mean_prm_kv_mb: float | None = None
    peak_prm_kv_mb: float | None = None
    mean_kv_mb: float | None
    peak_kv_mb: float | None
    generated_tokens: float
    verifier_tokens: float
    prompt_tokens: float | None = None
    model_calls: float
    flops: float | None
    p50_s: float | None
    p95_s: float | None
    gb_s: float | None
    mb_per_call: float | None = None
    alone_per_s: float | None
    together_per_s: float | None
    concurrency: int | None
    processes: int | None = None
    versus: tuple[Comparison, ...] = ()


class Summary(Value):
    """What a report shows.

    Attributes:
        version: Of this format, see `VERSION`.
        settings: Of the run, once per machine or commit that took part.
        rows: One per method and vote, in the order in which they were measured.
        correlations: Spearman's, over methods, of each mean cost with the median latency, of searches that ran alone;
            None where there is too little.
        search_correlations: The same over single searches.
        timed_methods, timed_searches: That these correlations are over (counts).
    """

    version: int = 1
    settings: tuple[Settings, ...]
    rows: tuple[Row, ...]
    correlations: dict[str, float | None]
    search_correlations: dict[str, float | None] = Field(default_factory=dict)
    timed_methods: int = 0
    timed_searches: int = 0


def read_summary(path: Path) -> Summary:
    """A `summary.json`, of this version or an earlier one.

    Raises:
        ConfigError: The file is none, or of a later version.
    """
    try:
        found = Summary.model_validate_json(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeError, ValidationError) as error:
        reason = str(error).splitlines()
        raise ConfigError(f"{path} is no summary that version {VERSION} can read: {' '.join(reason[:3])}") from None
    if found.version > VERSION:
        raise ConfigError(f"{path} is a summary of version {found.version}, this is {VERSION}: update ets_engine")
    return found
