"""A comparison counts votes as it compares answers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ets_engine.config import SearchConfig
from ets_engine.evaluation import EvalProblem
from ets_engine.evaluation.bench import Bench
from ets_engine.evaluation.methods import Method
from ets_engine.evaluation.records import Record, Results, Settings
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.types import Step, StopReason

SETTINGS = Settings(
    model="m",
    verifier="v",
    weights="w",
    data="d",
    search={"lambda_b": 1.0},
    device="cpu",
    dtype="float32",
    machine={"machine": "cpu", "commit": "abc"},
    copy_gb_s=10.0,
)


def measure(folder: Path, texts: list[str], problem: EvalProblem, mode: Any) -> Record:
    """One search whose solutions are some texts."""

    def propose(request: ProposalRequest) -> list[Step]:
        return [Step(texts[(child - 1) % len(texts)], 5, StopReason.FINISHED) for child in request.children]

    seen: list[Record] = []
    results = Results(folder / "results.jsonl", SETTINGS)
    with HostedEngine(propose, lambda problem, steps: 0.5, name="scripted") as engine:
        bench = Bench(
            engine, [problem], results, SearchConfig(), mode=mode, on_result=lambda result, record: seen.append(record)
        )
        bench.run([Method("best_of_n", len(texts))])
    results.close()
    return seen[0]


CHOICES = [
    "The answer is C) 12.",
    "The answer is (C).",
    "The answer is option C.",
    "The answer is (B).",
    "It is \\boxed{B}.",
]


@pytest.mark.parametrize("vote", ["majority", "weighted"])
def test_choices_are_one_vote_however_they_are_written(tmp_path: Path, vote: Any) -> None:
    found = measure(tmp_path, CHOICES, EvalProblem(id="1", problem="Which?", answer="C"), "choice")
    assert found.outcomes[vote].solved and found.any_right


def test_answers_that_name_no_choice_stay_apart(tmp_path: Path) -> None:
    texts = ["The answer is 12.", "The answer is 13.", "The answer is 14.", "The answer is C.", "The answer is (C)."]
    found = measure(tmp_path, texts, EvalProblem(id="1", problem="Which?", answer="C"), "choice")
    assert found.outcomes["majority"].answer == "C"


def test_a_problem_with_a_checker_keeps_its_own_votes(tmp_path: Path) -> None:
    problem = EvalProblem(id="1", problem="Use 1, 2, 3 and 4 to make 10.", answer="((1+2)+3)+4", family="countdown")
    line = "3+4=7 left 1 2 7\n2+7=9 left 1 9\n1+9=10"
    assert measure(tmp_path, [line, line], problem, "choice").outcomes["majority"].solved
