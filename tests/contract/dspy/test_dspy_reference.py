"""The shipped models in a DSPy program: search beats one sample, and a search of one branch is plain decoding."""

from __future__ import annotations

import asyncio
import copy
import time
from collections.abc import Iterator
from typing import Any

import dspy
import pytest
from dspy import lm15

from ets_engine import get_engine
from ets_engine.config import SearchConfig
from ets_engine.reference import generate_problems, is_right_answer, is_solved, label_steps, policy_path
from ets_engine.service import ETSEngine
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter

COUNT = 50


@pytest.fixture(scope="module")
def engine() -> Iterator[ETSEngine]:
    with get_engine("reference") as engine:
        yield engine


@pytest.fixture
def plain(engine: ETSEngine) -> Iterator[None]:
    with dspy.context(adapter=PlainAdapter()):
        yield


def problems(count: int, seed: int = 11) -> list[dspy.Example]:
    rows = generate_problems("countdown", None, seed=seed, count=count)
    return [dspy.Example(problem=row.problem).with_inputs("problem") for row in rows]


def solved(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
    return is_right_answer(example.problem, pred.answer)


def test_a_search_of_one_branch_is_greedy_generate(engine: ETSEngine) -> None:
    """`dspy.configure(lm=ETSLM(..., strategy="greedy"))` changes nothing but who decodes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    lm = ETSLM("ets/reference", search={"strategy": "greedy"})
    for row in problems(4):
        request = lm15.Request(lm.model, (lm15.Message.user(row.problem),))
        prompt = tokenizer(row.problem + "\n", return_tensors="pt")
        with torch.inference_mode():
            ids = model.generate(**prompt, max_new_tokens=200, do_sample=False)[0, prompt["input_ids"].shape[1] :]
        expected = tokenizer.decode(ids, skip_special_tokens=True)
        assert lm(request).text.strip() == expected.strip()
        assert asyncio.run(lm.acall(request)).text.strip() == expected.strip()


def test_weights_are_shared_by_every_copy(engine: ETSEngine) -> None:
    lm = ETSLM("ets/reference")
    program = dspy.Predict("problem -> answer")
    program.set_lm(lm)
    assert lm.source.find() is engine is copy.deepcopy(lm).source.find() is program.deepcopy().get_lm().source.find()


def test_a_reasoner_solves_clearly_more_than_one_sample(engine: ETSEngine, plain: None) -> None:
    rows = problems(COUNT)
    evaluate = dspy.Evaluate(devset=rows, metric=solved, num_threads=COUNT, display_progress=False)
    with dspy.context(lm=ETSLM("ets/reference", search={"strategy": "best_of_n", "width": 1}, seed=0)):
        sampled = evaluate(dspy.Predict("problem -> answer")).score
    with dspy.context(lm=ETSLM("ets/reference", seed=0)):
        searched = evaluate(ETSReasoner("problem -> answer", width=16)).score
    assert searched >= sampled + 20, f"{sampled} with one sample, {searched} with a search"


def test_figures_of_a_real_search(engine: ETSEngine, plain: None) -> None:
    (row,) = problems(1)
    lm = ETSLM("ets/reference", seed=0)
    with dspy.context(lm=lm, track_usage=True):
        pred = ETSReasoner("problem -> answer", width=16)(**row.inputs())
    report = pred._ets
    expected = engine.search(row.problem, SearchConfig(width=16, seed=0))
    assert pred.reasoning == expected.text and pred.answer == expected.answer and report.score == expected.score
    assert report.kv.sharing_ratio > 1 and report.kv.peak_bytes > 0 and report.verifier_kv is not None
    usage = pred.get_lm_usage()[lm.model]
    assert usage["completion_tokens"] == expected.generated_tokens and usage["prompt_tokens"] == expected.prompt_tokens


def test_a_reward_and_a_step_reward_inside_a_real_search(engine: ETSEngine, plain: None) -> None:
    """With the exact checkers for verifiers, searches end early, and what they find is right."""

    def right(args: dict[str, Any], pred: dspy.Prediction) -> float:
        return float(is_right_answer(args["problem"], pred.answer))

    def possible(args: dict[str, Any], steps: list[str]) -> float:
        return float(label_steps(args["problem"], [step.strip() for step in steps])[-1])

    checked = ETSReasoner(
        "problem -> answer", width=16, reward_fn=right, threshold=1.0, reward="search", step_reward_fn=possible
    )
    rows = problems(8)
    with dspy.context(lm=ETSLM("ets/reference", seed=0)):
        preds = dspy.Parallel(num_threads=8, disable_progress_bar=True)([(checked, row) for row in rows])
    found = [is_solved(row.problem, pred.reasoning) for row, pred in zip(rows, preds, strict=True)]
    assert sum(found) >= 7


def test_a_real_search_ends_at_the_first_answer_that_is_good_enough(engine: ETSEngine, plain: None) -> None:
    """Solutions of a story take different numbers of steps."""
    rows = [{"problem": row.problem} for row in generate_problems("story", 4, seed=5, count=3)]
    settings = {"width": 8, "strategy": "rebase", "reward_fn": lambda args, pred: 1.0, "reward": "search"}
    with dspy.context(lm=ETSLM("ets/reference", seed=0)):
        early, whole = (
            dspy.Parallel(num_threads=3, disable_progress_bar=True)([(reasoner, row) for row in rows])
            for reasoner in (
                ETSReasoner("problem -> answer", threshold=1.0, **settings),
                ETSReasoner("problem -> answer", **settings),
            )
        )
    assert any(pred._ets.finish_reason == "cancelled" for pred in early)
    assert all(pred._ets.finish_reason == "stop" for pred in whole)
    spent = [sum(pred._ets.generated_tokens for pred in preds) for preds in (early, whole)]
    assert spent[0] < spent[1]


def test_what_the_shipped_models_do_not_know_is_an_invalid_request(engine: ETSEngine, plain: None) -> None:
    with dspy.context(lm=ETSLM("ets/reference")), pytest.raises(dspy.LMInvalidRequestError, match="ReferenceDomain"):
        dspy.Predict("problem -> answer")(problem="Who wrote Faust?")


async def test_a_cancelled_task_frees_its_memory(engine: ETSEngine, plain: None) -> None:
    (row,) = problems(1)
    with dspy.context(lm=ETSLM("ets/reference")):
        task = asyncio.create_task(ETSReasoner("problem -> answer", width=512).acall(**row.inputs()))
        until_s = time.monotonic() + 10
        while not engine.stats().live and time.monotonic() < until_s:
            await asyncio.sleep(0.005)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    while engine.stats().live and time.monotonic() < until_s:
        await asyncio.sleep(0.01)
    assert engine.stats().live == 0
