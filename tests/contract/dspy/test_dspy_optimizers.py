"""DSPy's optimizers compile an ETSReasoner, on a scripted model that does better when it is shown or told how."""

from __future__ import annotations

import json
import re
from typing import Any

import dspy
import pytest

from ets_engine.hosted import ProposalRequest
from ets_integrations.dspy import ETSLM, ETSPredict, ETSReasoner

TOLD = "Carry the tens."


def examples(count: int) -> list[dspy.Example]:
    rows = [dspy.Example(question=f"{7 * n}+{5 * n}?", answer=12 * n) for n in range(1, count + 1)]
    return [row.with_inputs("question") for row in rows]


def adder(chat: Any) -> Any:
    """Loses ten on three branches of four, unless the sum is small or it was told or shown how."""

    def write(request: ProposalRequest, place: int) -> str:
        left, right = map(int, re.findall(r"(\d+)\+(\d+)\?", request.messages[-1]["content"])[-1])
        helped = TOLD in request.messages[0]["content"] or len(request.messages) > 3
        is_wrong = place % 4 != 3 and left + right > 30 and not helped
        answer = left + right - (10 if is_wrong else 0)
        return chat.marked(reasoning=f"{left} and {right}.\n\nAdd them.", answer=answer)

    return chat.scripted(write)


def metric(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
    return example.answer == pred.answer


def score(program: dspy.Module, rows: list[dspy.Example]) -> float:
    return dspy.Evaluate(devset=rows, metric=metric, num_threads=4, display_progress=False)(program).score


@pytest.fixture
def reasoner() -> ETSReasoner:
    return ETSReasoner("question -> answer: int", width=4, strategy="best_of_n", vote="majority")


def test_bootstrap_few_shot_takes_demos_from_the_best_leaf(chat: Any, reasoner: ETSReasoner) -> None:
    reasoner = ETSReasoner(
        "question -> answer: int", width=4, strategy="best_of_n", reward_fn=lambda args, pred: pred.answer
    )
    engine = adder(chat)
    with dspy.context(lm=ETSLM(service=engine, seed=0)):
        compiled = dspy.BootstrapFewShot(metric=metric, max_bootstrapped_demos=2, max_labeled_demos=0).compile(
            reasoner, trainset=examples(4)[2:]
        )
        demos = compiled.predict.demos
        assert [demo.answer for demo in demos] == [36, 48], "one leaf of four has it, and the reward finds it"
        assert all(set(demo.keys()) >= {"question", "reasoning", "answer"} and "_ets" not in demo for demo in demos)
        compiled(question="70+50?")
    assert isinstance(compiled.predict, ETSPredict) and compiled.predict.settings == reasoner.predict.settings
    assert len(engine.script.requests[-1].messages) == 2 + 2 * 2


def test_random_search_over_few_shots_improves_the_program(chat: Any, reasoner: ETSReasoner) -> None:
    rows = examples(6)
    with dspy.context(lm=ETSLM(service=adder(chat), seed=0)):
        before = score(reasoner, rows)
        compiled = dspy.BootstrapFewShotWithRandomSearch(
            metric=metric, max_bootstrapped_demos=1, max_labeled_demos=1, num_candidate_programs=1, num_threads=2
        ).compile(reasoner, trainset=rows)
        assert score(compiled, rows) == 100.0 > before


def test_miprov2_compiles(chat: Any, reasoner: ETSReasoner) -> None:
    """The proposer is a plain LM: its calls need no tree."""

    def propose(request: ProposalRequest, place: int) -> str:
        return chat.marked(**dict.fromkeys(chat.fields_asked(request), TOLD))

    proposer = ETSLM(service=chat.scripted(propose, name="proposer"), search={"strategy": "greedy"})
    rows = examples(6)
    with dspy.context(lm=ETSLM(service=adder(chat), seed=0)):
        optimizer = dspy.MIPROv2(
            metric=metric, prompt_model=proposer, auto=None, num_candidates=2, num_threads=2, seed=1, verbose=False
        )
        compiled = optimizer.compile(
            reasoner, trainset=rows, valset=rows, num_trials=3, minibatch=False, max_bootstrapped_demos=1
        )
        assert score(compiled, rows) == 100.0
    told = TOLD in compiled.predict.signature.instructions
    assert told or compiled.predict.demos


def test_gepa_reads_feedback_from_leaf_scores(chat: Any, reasoner: ETSReasoner) -> None:
    feedback: list[str] = []

    def judge(gold: Any, pred: Any, trace: Any = None, pred_name: Any = None, pred_trace: Any = None) -> Any:
        leaves = ", ".join(f"{one.answer} ({one.votes} votes)" for one in pred._ets.candidates)
        text = f"Expected {gold.answer}; the leaves said {leaves}."
        feedback.append(text)
        return dspy.Prediction(score=float(gold.answer == pred.answer), feedback=text)

    def reflect(request: ProposalRequest, place: int) -> str:
        assert "votes)" in request.messages[-1]["content"], "the feedback reaches the reflection"
        return json.dumps({"new_instruction": f"Answer the question. {TOLD}"})

    reflection = ETSLM(service=chat.scripted(reflect, name="reflection"), search={"strategy": "greedy"})
    rows = examples(4)
    with dspy.context(lm=ETSLM(service=adder(chat), seed=0)):
        before = score(reasoner, rows)
        optimizer = dspy.GEPA(
            metric=judge, reflection_lm=reflection, max_metric_calls=24, reflection_minibatch_size=2, num_threads=2
        )
        compiled = optimizer.compile(reasoner, trainset=rows, valset=rows)
        assert TOLD in compiled.predict.signature.instructions
        assert score(compiled, rows) == 100.0 > before
    assert any("(1 votes)" in text for text in feedback)
