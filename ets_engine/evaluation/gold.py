"""Whether a file's own answers are understood: found in its worked solutions, and told from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ets_engine.answers import MathView, ReferenceView
from ets_engine.evaluation.grading import Mode, check_mode, grade, key
from ets_engine.evaluation.problems import EvalProblem


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """Whether a file's own answers are understood.

    Attributes:
        problems: In the file (count).
        worked: Of those, with a worked solution (count).
        unread: Ids whose worked solution gives no answer.
        wrong: Ids whose worked solution is graded as wrong.
        paired: With a different answer of another problem to refuse (count); which answers differ depends on the mode.
        confused: Of those, ids whose answer also accepts the other one.
    """

    problems: int
    worked: int
    unread: tuple[str, ...]
    wrong: tuple[str, ...]
    paired: int
    confused: tuple[str, ...]


def check_gold(problems: Sequence[EvalProblem], mode: Mode = "math", seed: int = 0) -> GoldCheck:
    """Extract each worked solution's answer and grade it, then grade a different answer drawn from another problem.

    Args:
        problems: A problem without a worked solution is only paired with another one's answer.
        mode: How answers are compared.
        seed: Of the random pairing.

    Raises:
        ConfigError: An unknown mode.
    """
    check_mode(mode)
    rng = Random(f"gold/{seed}")
    unread: list[str] = []
    wrong: list[str] = []
    confused: list[str] = []
    paired = 0
    keys = [key(one.answer, "math" if one.family else mode) for one in problems]
    for place, one in enumerate(problems):
        view = ReferenceView() if one.family else MathView()
        answer = view.answer(one.problem, one.solution) if one.solution else None
        if one.solution and answer is None:
            unread.append(one.id)
        elif one.solution and not grade(one, answer, mode=mode).lenient:
            wrong.append(one.id)
        start = place + (rng.randrange(1, len(problems)) if len(problems) > 1 else 0)
        others = (other % len(problems) for other in range(start, start + len(problems)))
        other = next((other for other in others if keys[other] != keys[place]), None)
        if other is not None:
            paired += 1
            if grade(one, problems[other].answer, mode=mode).lenient:
                confused.append(one.id)
    worked = sum(bool(one.solution) for one in problems)
    return GoldCheck(len(problems), worked, tuple(unread), tuple(wrong), paired, tuple(confused))
