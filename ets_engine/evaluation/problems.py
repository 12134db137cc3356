"""Problems to measure on: the reference families from a seed, or any JSONL file with problems and answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from ets_engine.errors import ConfigError
from ets_engine.reference.problems import FAMILIES, generate_problems
from ets_engine.types import Value

DEFAULT_COUNT = 200  # of a generated family
_PROBLEM_FIELDS = ("problem", "question")
_ID_FIELDS = ("unique_id", "id", "idx")
_LEVEL_FIELDS = ("level", "subject")


class EvalProblem(Value):
    """One problem, its answer, and where it comes from.

    Attributes:
        id: Unique within its file or family.
        problem: As it is asked.
        answer: A right answer.
        solution: A worked solution that ends with the answer, where the file has one.
        level: What results are told apart by, empty = nothing.
        family: "countdown" or "story" with their exact checkers, empty = any other.
    """

    id: str
    problem: str
    answer: str
    solution: str = ""
    level: str = ""
    family: str = ""

    @property
    def digest(self) -> str:
        """Short hash of problem and answer: what was measured on an earlier wording does not count for this one."""
        return hashlib.sha256(f"{self.problem}\0{self.answer}".encode()).hexdigest()[:12]


def load_problems(data: str, *, limit: int | None = None, seed: int = 0) -> list[EvalProblem]:
    """Read or generate problems.

    Args:
        data: "countdown" or "story" for fresh held-out problems of the shipped models, or a JSONL file whose lines have
            `problem` or `question`, and `answer`; GSM8K's ("...#### 18") and MATH-500's own files are such files. Lines
            of `python -m ets_engine.reference` say their `family`, and are graded by its checker.
        limit: Most problems, the first ones; None = all of a file, 200 of a family.
        seed: Of a generated family; a file has none.

    Raises:
        ConfigError: No such family or file, a line that is no such problem, or a limit below 1.

    Example:
        >>> [one.id for one in load_problems("countdown", limit=2, seed=7)]
        ['countdown/7/0', 'countdown/7/1']
    """
    if limit is not None and limit < 1:
        raise ConfigError(f"limit={limit}: measure on at least one problem")
    if data in FAMILIES:
        drawn = generate_problems(data, None, seed, limit or DEFAULT_COUNT)
        return [
            EvalProblem(
                id=f"{data}/{seed}/{i}", problem=one.problem, answer=one.answer, level=str(one.level), family=data
            )
            for i, one in enumerate(drawn)
        ]
    path = Path(data)
    if not path.is_file():
        raise ConfigError(f"data={data!r} is neither a file nor one of {sorted(FAMILIES)}")
    try:
        with path.open(encoding="utf-8") as lines:
            found = list(islice(_parse(path, lines), limit))
    except (OSError, UnicodeError) as error:
        raise ConfigError(f"data={data!r} cannot be read: {error}") from None
    if not found:
        raise ConfigError(f"data={data!r} holds no problem")
    seen: set[str] = set()
    for one in found:
        if one.id in seen:
            raise ConfigError(f"data={data!r}: two problems have the id {one.id!r}")
        seen.add(one.id)
    return found


def _parse(path: Path, lines: Iterable[str]) -> Iterable[EvalProblem]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number} is no JSON: {error}") from None
        if not isinstance(row, dict):
            raise ConfigError(f"{path}:{number} is no JSON object: {line.strip()[:80]!r}")
        problem, answer = _field(row, _PROBLEM_FIELDS), _field(row, ("answer",))
        if not problem or not answer:
            raise ConfigError(f"{path}:{number} needs `problem` (or `question`) and `answer`; it has {sorted(row)}")
        solution = _field(row, ("solution",))
        if "####" in answer:  # GSM8K: the worked solution, then the number
            solution, answer = answer, answer.rpartition("####")[2].strip()
            if not answer:
                raise ConfigError(f"{path}:{number} has nothing after its `####`")
        family = _field(row, ("family",))
        yield EvalProblem(
            id=_field(row, _ID_FIELDS) or str(number),
            problem=problem,
            answer=answer,
            solution=solution,
            level=_field(row, _LEVEL_FIELDS),
            family=family if family in FAMILIES and FAMILIES[family].parse(problem) else "",
        )


def _field(row: dict[str, Any], names: Iterable[str]) -> str:
    """The first of some fields that is there, as text."""
    return next((str(row[name]) for name in names if row.get(name) is not None), "")
