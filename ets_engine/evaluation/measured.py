"""What is known of each method: its searches, those that ran alone, and how many ran per second."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from statistics import fmean

from ets_engine.config import Vote
from ets_engine.evaluation.problems import EvalProblem
from ets_engine.evaluation.records import Line, Pass, Record, Settings, searches


@dataclass(slots=True)
class Measured:
    """What is known of one method.

    Attributes:
        records: Every search, whatever ran beside it.
        alone: Searches that ran alone on the last machine, by problem and seed.
        passes: On the last machine.
    """

    records: list[Record] = field(default_factory=list)
    alone: dict[tuple[str, int], Record] = field(default_factory=dict)
    passes: list[Pass] = field(default_factory=list)

    @property
    def votes(self) -> list[Vote]:
        """The votes that its searches report; the usual one where none worked."""
        found: dict[Vote, None] = {}
        for record in self.records:
            found.update(dict.fromkeys(record.outcomes))  # type: ignore[arg-type]
        return list(found) or ["weighted"]

    def chosen(self) -> list[Record]:
        """One record per search: of one measured both together and alone that which worked; its tree is the same."""
        chosen: dict[tuple[str, int], Record] = {}
        for record in self.records:
            key = record.problem, record.seed
            if key not in chosen or _rank(chosen[key]) > _rank(record):
                chosen[key] = record
        return list(chosen.values())

    def throughput(self) -> tuple[float | None, int | None, int | None]:
        """Searches per second in the passes with most in flight, of these in most processes, and how many both are."""
        concurrency, processes = max(((one.concurrency, one.processes) for one in self.passes), default=(None, None))
        passes = [one for one in self.passes if (one.concurrency, one.processes) == (concurrency, processes)]
        wall_s = sum(one.wall_s for one in passes)
        return (sum(one.searches for one in passes) / wall_s if wall_s > 0 else None), concurrency, processes


def group_by_method(lines: Sequence[Line], problems: Collection[EvalProblem] | None) -> dict[str, Measured]:
    """What is known of each method, in the order in which they were measured.

    Args:
        lines: Of a `results.jsonl`.
        problems: Only searches of these count; None = of all.
    """
    wanted = None if problems is None else {(one.id, one.digest) for one in problems}
    found: dict[str, Measured] = defaultdict(Measured)
    for record in searches(lines):
        if wanted is None or record.key[0] in wanted:
            found[record.method].records.append(record)
    for line in _last_machine(lines):
        if isinstance(line, Settings) or line.method not in found:
            continue
        if isinstance(line, Pass):
            found[line.method].passes.append(line)
        elif line.concurrency == 1 and not line.error and (wanted is None or line.key[0] in wanted):
            found[line.method].alone[(line.problem, line.seed)] = line
    return dict(found)


def is_right(record: Record, vote: str, grade: str) -> float:
    """1.0 where the vote's answer is right by that grade, else 0.0."""
    outcome = record.outcomes.get(vote)
    return float(outcome is not None and getattr(outcome, grade))


def per_problem(records: Iterable[Record], vote: str, grade: str) -> dict[str, float]:
    """Share of right searches per problem, over seeds."""
    found: dict[str, list[float]] = defaultdict(list)
    for record in records:
        found[record.problem].append(is_right(record, vote, grade))
    return {problem: fmean(right) for problem, right in found.items()}


def mean_known(values: Iterable[float | None]) -> float | None:
    """Mean of the values that are known, None without any."""
    known = [value for value in values if value is not None]
    return fmean(known) if known else None


def _rank(record: Record) -> tuple[bool, bool]:
    return bool(record.error), record.concurrency == 1


def _last_machine(lines: Sequence[Line]) -> Sequence[Line]:
    """The lines since the machine last changed."""
    start, current = 0, None
    for place, line in enumerate(lines):
        if isinstance(line, Settings):
            if current is not None and not line.same_speed(current):
                start = place
            current = line
    return lines[start:]
