"""Whether a file's own answers are understood: found in its worked solutions, and told from each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from ets_engine.answers import MathView, ReferenceView, normal_answer
from ets_engine.evaluation.grading import Mode, grade
from ets_engine.evaluation.problems import EvalProblem


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """Whether a file's own answers are understood.

    Attributes:
        problems: In the file (count).
        worked: Of those, with a worked solution (count).
        unread: Ids whose worked solution gives no answer.
        wrong: Ids whose worked solution is graded as wrong.
        confused: Ids whose answer also accepts another problem's answer, written differently.
    """

    problems: int
    worked: int
    unread: tuple[str, ...]
    wrong: tuple[str, ...]
    confused: tuple[str, ...]


def check_gold(problems: Sequence[EvalProblem], mode: Mode = "math", seed: int = 0) -> GoldCheck:
    """Extract each worked solution's answer and grade it, then grade an answer drawn from another problem.

    Args:
        problems: A problem without a worked solution is only paired with another one's answer.
        mode: How answers are compared.
        seed: Of the random pairing.
    """
    rng = Random(f"gold/{seed}")
    unread: list[str] = []
    wrong: list[str] = []
    confused: list[str] = []
    for place, one in enumerate(problems):
        view = ReferenceView() if one.family else MathView()
        answer = view.answer(one.problem, one.solution) if one.solution else None
        if one.solution and answer is None:
            unread.append(one.id)
        elif one.solution and not grade(one, answer, mode=mode).lenient:
            wrong.append(one.id)
        if len(problems) > 1:
            other = problems[(place + rng.randrange(1, len(problems))) % len(problems)]
            if grade(one, other.answer, mode=mode).lenient and normal_answer(one.answer) != normal_answer(other.answer):
                confused.append(one.id)
    worked = sum(bool(one.solution) for one in problems)
    return GoldCheck(len(problems), worked, tuple(unread), tuple(wrong), tuple(confused))
