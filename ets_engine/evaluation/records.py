"""What is written down per search: one JSON line each, so that a second run goes on where the first one stopped."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from ets_engine.errors import ConfigError
from ets_engine.types import Value

Key = tuple[tuple[str, str], str, int, bool]
"""Problem (id and digest), method, seed, alone."""


class Outcome(Value):
    """What one vote over a search's trajectories answers, and whether that is right; see `Grade`."""

    answer: str | None
    strict: bool
    lenient: bool
    solved: bool


class Record(Value):
    """One search: what came out, and what it cost.

    Attributes:
        kind: Tells searches from passes.
        problem, digest: Id of the problem, and of what it asks.
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
    digest: str
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
    def key(self) -> Key:
        """What is not measured twice: problem, method, seed, and whether it ran alone."""
        return (self.problem, self.digest), self.method, self.seed, self.concurrency == 1


class Pass(Value):
    """Searches of one method, `concurrency` in flight from start to end: what throughput is read from.

    Attributes:
        kind: Tells passes from searches.
        method: `Method.name`.
        concurrency: Most in flight (count).
        processes: That searched (count).
        searches: That came to a result (count).
        wall_s: From the first to the last (seconds).
    """

    kind: Literal["pass"] = "pass"
    method: str
    concurrency: int
    processes: int = 1
    searches: int
    wall_s: float


class Settings(Value):
    """What the lines after it were measured with.

    Attributes:
        kind: Tells settings from searches.
        model, verifier: As in `ETSEngine.from_pretrained`.
        weights: Short hash of both, as far as files can be seen.
        data: Family and seed, or file.
        search: Settings of every search, how answers are compared, and the preset and PRM format where they were named.
        device, dtype: Where the models ran.
        machine: From `provenance`.
        copy_gb_s: Bytes that a large copy moves on that machine (GB/s).
    """

    kind: Literal["settings"] = "settings"
    model: str
    verifier: str
    weights: str
    data: str
    search: dict[str, Any]
    device: str
    dtype: str
    machine: dict[str, Any]
    copy_gb_s: float

    def differences(self, other: Settings) -> list[str]:
        """Why results of both must not stand in one table; empty where they may."""
        found = [
            f"{name}={getattr(self, name)!r} instead of {getattr(other, name)!r}"
            for name in ("model", "verifier", "weights", "data", "device", "dtype")
            if getattr(self, name) != getattr(other, name)
        ]
        names = sorted(self.search | other.search)
        return found + [
            f"{name}={self.search.get(name)!r} instead of {other.search.get(name)!r}"
            for name in names
            if self.search.get(name) != other.search.get(name)
        ]

    def same_speed(self, other: Settings) -> bool:
        """Whether seconds of both may be compared: the same machine, threads and versions, whatever the commit."""
        return {**self.machine, "commit": ""} == {**other.machine, "commit": ""}


Line = Settings | Record | Pass
_KINDS: dict[str, type[Settings] | type[Record] | type[Pass]] = {"settings": Settings, "search": Record, "pass": Pass}


class Results:
    """A `results.jsonl` that grows; it is flushed line by line, so a crash loses at most the running searches.

    Args:
        path: The file; made when it is not there. A last line that a crash cut off is removed.
        settings: Of this run.

    Raises:
        ConfigError: The file holds results of other settings, or is no such file.
    """

    def __init__(self, path: Path, settings: Settings) -> None:
        """See the class."""
        self.path = path
        self.lines: list[Line] = read_results(path) if path.exists() else []
        before = [line for line in self.lines if isinstance(line, Settings)]
        for line in before:
            if found := line.differences(settings):
                raise ConfigError(
                    f"{path} holds results of other settings ({', '.join(found)}); give another --out, or remove it"
                )
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            whole = path.read_bytes().rpartition(b"\n")
            if whole[2]:
                path.write_bytes(whole[0] + whole[1])
        self._done = {line.key for line in self.lines if isinstance(line, Record) and not line.error}
        self._file = path.open("a", encoding="ascii")
        if not before or before[-1].machine != settings.machine:
            self.add(settings)

    def add(self, line: Line) -> None:
        """Write one line."""
        self.lines.append(line)
        self._file.write(json.dumps(line.model_dump(mode="json")) + "\n")
        self._file.flush()
        if isinstance(line, Record) and not line.error:
            self._done.add(line.key)

    def has(self, key: Key) -> bool:
        """Whether a search was measured already; one that failed was not."""
        return key in self._done

    def close(self) -> None:
        """Nothing more is written."""
        self._file.close()


def read_results(path: Path) -> list[Line]:
    """Every line of a `results.jsonl`; a last line that a crash cut off is left out.

    Raises:
        ConfigError: The file is none.
    """
    found: list[Line] = []
    *rows, _ = path.read_bytes().split(b"\n")  # what follows the last newline was cut off
    for number, row in enumerate(rows, start=1):
        try:
            data = json.loads(row)
            found.append(_KINDS[data["kind"]].model_validate(data))
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise ConfigError(f"{path}:{number} is no line of results: {reason:.300}") from None
    return found


def searches(lines: Iterable[Line]) -> list[Record]:
    """The searches among some lines, a failed one only where no other try worked."""
    latest: dict[Key, Record] = {}
    for line in lines:
        if isinstance(line, Record) and (line.key not in latest or not line.error):
            latest[line.key] = line
    return list(latest.values())
