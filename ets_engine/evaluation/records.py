"""What is written down per search: one JSON line each, so that a second run goes on where the first one stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ets_engine.errors import ConfigError
from ets_engine.types import Value


class Outcome(Value):
    """What one vote over a search's trajectories answers, and whether that is right."""

    answer: str | None
    strict: bool
    lenient: bool


class Record(Value):
    """One search: what came out, and what it cost.

    Attributes:
        kind: Tells searches from passes.
        problem: Id of the problem.
        level: Of the problem.
        method: `Method.name`.
        seed: Of the search.
        concurrency: Searches in flight beside it, itself included; its seconds are a latency only at 1.
        outcomes: By vote.
        any_right: Whether some finished trajectory is right (leniently).
        mean_kv_tokens, peak_kv_tokens: Of the policy, over its decode steps; None where the policy has no KV.
        kv_token_bytes: Of one token of the policy (bytes).
        published_kv_tokens: The published cumulative metric.
        sharing_ratio: Of the policy's tree.
        mean_prm_kv_tokens, peak_prm_kv_tokens, prm_kv_token_bytes: Of the verifier; None without KV.
        generated_tokens, verifier_tokens, prompt_tokens: Tokens (count).
        model_calls: Decode steps of the policy (count).
        flops: 2 x parameters x tokens, of both models; None where parameters are unknown.
        wall_s, model_s, select_s: From the call to the result; in forward passes; in the selector (seconds).
        bytes_moved: Weights plus distinct KV, over all forward passes of this search's own share.
        error: Why there is no result, empty = there is one.
    """

    kind: Literal["search"] = "search"
    problem: str
    level: str
    method: str
    seed: int
    concurrency: int
    outcomes: dict[str, Outcome] = Field(default_factory=dict)
    any_right: bool = False
    mean_kv_tokens: float | None = None
    peak_kv_tokens: int | None = None
    kv_token_bytes: int | None = None
    published_kv_tokens: int | None = None
    sharing_ratio: float | None = None
    mean_prm_kv_tokens: float | None = None
    peak_prm_kv_tokens: int | None = None
    prm_kv_token_bytes: int | None = None
    generated_tokens: int = 0
    verifier_tokens: int = 0
    prompt_tokens: int = 0
    model_calls: int = 0
    flops: float | None = None
    wall_s: float = 0.0
    model_s: float = 0.0
    select_s: float = 0.0
    bytes_moved: int = 0
    error: str = ""

    @property
    def key(self) -> tuple[str, str, int, bool]:
        """What is not measured twice: problem, method, seed, and whether it ran alone."""
        return self.problem, self.method, self.seed, self.concurrency == 1


class Pass(Value):
    """Some searches of one method, run together from start to end: what throughput is read from."""

    kind: Literal["pass"] = "pass"
    method: str
    concurrency: int
    searches: int
    wall_s: float


class Settings(Value):
    """The first line: what every later one belongs to. A run with other settings is refused."""

    kind: Literal["settings"] = "settings"
    model: str
    verifier: str
    data: str
    search: dict[str, Any]
    machine: dict[str, Any]
    copy_gb_s: float

    def same_run(self, other: Settings) -> bool:
        """Whether results of both may stand in one table; the machine may differ, and is told."""
        return (self.model, self.verifier, self.data, self.search) == (
            other.model,
            other.verifier,
            other.data,
            other.search,
        )


Line = Settings | Record | Pass
_KINDS: dict[str, type[Settings] | type[Record] | type[Pass]] = {"settings": Settings, "search": Record, "pass": Pass}


class Results:
    """A `results.jsonl` that grows; it is flushed line by line, so a crash loses at most the running searches.

    Args:
        path: The file; made when it is not there.
        settings: Of this run.

    Raises:
        ConfigError: The file holds results of other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        """See the class."""
        self.path = path
        self.lines: list[Line] = read_results(path) if path.exists() else []
        first = next((line for line in self.lines if isinstance(line, Settings)), None)
        if first is not None and not first.same_run(settings):
            raise ConfigError(
                f"{path} holds results of other settings ({_difference(first, settings)}); give another --out, or "
                "remove it"
            )
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a", encoding="utf-8")
        if path.stat().st_size and not path.read_bytes().endswith(b"\n"):
            self._file.write("\n")  # a line that a crash cut off; it was not read
        if first is None or first.machine != settings.machine:
            self.add(settings)
        self._done = {line.key for line in self.lines if isinstance(line, Record) and not line.error}

    def add(self, line: Line) -> None:
        """Write one line."""
        self.lines.append(line)
        self._file.write(line.model_dump_json() + "\n")
        self._file.flush()
        if isinstance(line, Record) and not line.error:
            self._done.add(line.key)

    def has(self, problem: str, method: str, seed: int, *, alone: bool) -> bool:
        """Whether a search was measured already; one that failed was not."""
        return (problem, method, seed, alone) in self._done

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()


def read_results(path: Path) -> list[Line]:
    """Every line of a `results.jsonl`; a last line that a crash cut off is left out.

    Raises:
        ConfigError: The file is none.
    """
    found: list[Line] = []
    rows = path.read_text(encoding="utf-8").split("\n")
    for number, row in enumerate(rows, start=1):
        if not row.strip():
            continue
        try:
            data = json.loads(row)
            found.append(_KINDS[data["kind"]].model_validate(data))
        except (ValueError, KeyError, TypeError) as error:
            if not row.endswith("}"):
                continue  # cut off
            raise ConfigError(f"{path}:{number} is no line of results: {type(error).__name__}: {error}") from None
    return found


def searches(lines: Iterable[Line]) -> list[Record]:
    """The searches among some lines, a failed one only where no later try worked."""
    latest: dict[tuple[str, str, int, bool], Record] = {}
    for line in lines:
        if isinstance(line, Record) and (line.key not in latest or not line.error):
            latest[line.key] = line
    return list(latest.values())


def _difference(left: Settings, right: Settings) -> str:
    for name in ("model", "verifier", "data"):
        if getattr(left, name) != getattr(right, name):
            return f"{name}={getattr(left, name)!r} instead of {getattr(right, name)!r}"
    names = sorted(name for name in left.search | right.search if left.search.get(name) != right.search.get(name))
    return ", ".join(f"{name}={left.search.get(name)!r} instead of {right.search.get(name)!r}" for name in names)
