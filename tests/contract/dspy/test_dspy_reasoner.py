"""ETSReasoner: candidates parsed leaf by leaf, rewards after and inside the search, saving, other LMs."""

from __future__ import annotations

import asyncio
import logging
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

import cloudpickle
import dspy
import pytest
from dspy.streaming import StatusMessage, StreamListener, StreamResponse
from dspy.utils import DummyLM
from dspy.utils.exceptions import AdapterParseError

from ets_engine.errors import ConfigError
from ets_engine.hosted import ProposalRequest
from ets_engine.registry import register_service
from ets_integrations.dspy import ETSLM, ETSPredict, ETSReasoner, PlainAdapter, as_verifier
from ets_integrations.dspy.samples import _say_once

QUESTION = {"question": "What is 20+22?"}
SMALL = {"width": 4, "strategy": "best_of_n"}


def solve(engine: Any, signature: str = "question -> answer: int", lm: dict[str, Any] | None = None, **settings: Any):
    """A reasoner's answer with an LM over this engine."""
    reasoner = ETSReasoner(signature, **{**SMALL, **settings})
    with dspy.context(lm=ETSLM(service=engine, **(lm or {}))):
        return reasoner(**QUESTION)


def largest(args: dict[str, Any], pred: dspy.Prediction) -> float:
    return pred.answer / 100


# ---------------------------------------------------------------------- candidates


def test_leaves_are_parsed_one_by_one_and_bad_ones_dropped(chat: Any) -> None:
    engine = chat.answering(5, "five", 4, 5)
    pred = solve(engine)
    assert (pred.answer, pred.completions.answer) == (5, [5, 4])
    assert pred.reasoning == "Think about reasoning of 5." and len(pred.completions.reasoning) == 2
    report = pred._ets
    assert [(one.answer, one.votes) for one in report.candidates] == [("5", 2), ("4", 1)]
    assert report.width == 4 and report.strategy == "best_of_n" and report.timing.wall_s > 0
    assert report.generated_tokens > report.path_tokens > 0 and len(report.step_scores) == 2
    assert len(engine.script.requests) == 1, "no JSON fallback"


def test_where_no_leaf_parses_the_parse_error_is_raised(chat: Any) -> None:
    engine = chat.answering("five")
    with pytest.raises(AdapterParseError, match="five"):
        solve(engine)
    assert len(engine.script.requests) == 1


def test_typed_answers_are_one_vote_where_they_parse_alike(chat: Any) -> None:
    pred = solve(chat.answering("[1,2]", "[1, 2]", "[2]", "[3]"), "question -> answer: list[int]")
    assert pred.answer == [1, 2] and pred._ets.candidates[0].votes == 2


@pytest.mark.parametrize("adapter", [dspy.JSONAdapter(), dspy.XMLAdapter()], ids=["json", "xml"])
def test_other_adapters(chat: Any, adapter: dspy.Adapter) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        if isinstance(adapter, dspy.JSONAdapter):
            return '{"reasoning": "r", "answer": %s}' % ("7" if place else "x")
        return f"<reasoning>\nr\n</reasoning>\n\n<answer>\n{7 if place else 'x'}\n</answer>"

    with dspy.context(adapter=adapter):
        pred = solve(chat.scripted(write))
    assert pred.answer == 7 and pred._ets.candidates[0].votes == 3


def test_an_adapter_that_asks_a_model_to_parse_is_not_asked_within_the_search(chat: Any) -> None:
    extractor = DummyLM([{"reasoning": "r", "answer": "9"}] * 3, adapter=dspy.ChatAdapter())
    engine = chat.scripted(lambda request, place: "Nine, of course. The answer is 9")
    with dspy.context(adapter=dspy.TwoStepAdapter(extractor)):
        pred = solve(engine, "question -> answer: int")
    assert pred.answer == 9


def test_demos_and_settings_reach_the_request(chat: Any) -> None:
    engine = chat.answering(42)
    reasoner = ETSReasoner("question -> answer: int", width=3, strategy="rebase", temperature=0.4, effort="high")
    reasoner.predict.demos = [dspy.Example(question="1+1?", reasoning="Both.", answer=2)]
    lm = ETSLM(service=engine, search={"lambda_d": 3.0})
    with dspy.context(lm=lm):
        reasoner(**QUESTION)
        reasoner.predict(**QUESTION, config=lm.search(width=2))
    first, second = engine.script.requests
    assert [turn["role"] for turn in first.messages] == ["system", "user", "assistant", "user"]
    assert (first.config.width, first.config.lambda_d, first.config.temperature) == (3, 3.0, 0.4)
    assert (second.config.width, second.config.strategy) == (2, "ets"), "a call's settings are complete"
    assert ETSPredict("q -> a", effort="low").settings == {"width": 4}


def test_n_is_how_many_completions_one_search_gives(chat: Any) -> None:
    engine = chat.answering(1, 2, 3, 4)
    assert len(solve(engine, n=2).completions.answer) == 2 and len(engine.script.requests) == 1


def test_bad_settings_are_refused_at_once() -> None:
    for settings, named in (
        ({"width": 0}, "width=0"),
        ({"reward": "both"}, "reward='both'"),
        ({"threshold": 1.0}, "reward_fn"),
        ({"effort": "huge"}, "effort='huge'"),
    ):
        with pytest.raises(ConfigError, match=named):
            ETSReasoner("question -> answer", **settings)
    with pytest.raises(ValueError, match="Positional"):
        ETSReasoner("question -> answer")("What is 1+1?")


def test_optimizers_see_one_predictor_and_no_reward() -> None:
    class Judge(dspy.Module):
        def __init__(self) -> None:
            self.judge = dspy.Predict("answer -> score: float")

        def forward(self, args: dict[str, Any], pred: dspy.Prediction) -> float:
            return 1.0

    reasoner = ETSReasoner("question -> answer", reward_fn=Judge())
    assert [name for name, _ in reasoner.named_predictors()] == ["predict"]
    assert [name for name, _ in ETSPredict("q -> a", reward_fn=Judge()).named_predictors()] == ["self"]
    assert list(reasoner.predict.signature.output_fields) == ["reasoning", "answer"]
    assert isinstance(reasoner.predict, dspy.Predict)
    assert list(ETSReasoner("q -> reasoning, a").predict.signature.output_fields) == ["reasoning", "a"]


def test_figures_stay_out_of_demos_and_traces_are_kept(chat: Any) -> None:
    with dspy.context(trace=[]):
        pred = solve(chat.answering(42))
        (predictor, inputs, traced), *rest = dspy.settings.trace
    assert isinstance(predictor, ETSPredict) and inputs == QUESTION and traced is pred and not rest
    assert set(pred.keys()) == {"reasoning", "answer"} and "_ets" not in pred.toDict()


async def test_acall_and_cancelling(chat: Any) -> None:
    reasoner = ETSReasoner("question -> answer: int", **SMALL)
    with dspy.context(lm=ETSLM(service=chat.answering(42))):
        assert (await reasoner.acall(**QUESTION)).answer == 42
    stopped, gate = threading.Event(), threading.Event()

    def judge(problem: str, steps: Sequence[str]) -> float:
        gate.wait(5)
        return 0.5

    engine = chat.answering(42, verifier=judge)
    submit = engine.submit

    def watched(*args: Any, **options: Any) -> Any:
        future = submit(*args, **options)
        future.add_done_callback(lambda done: stopped.set() if done.result().finish_reason == "cancelled" else None)
        return future

    engine.submit = watched
    with dspy.context(lm=ETSLM(service=engine, search={"strategy": "rebase"})), pytest.raises(TimeoutError):
        await asyncio.wait_for(ETSReasoner("question -> answer: int").acall(**QUESTION), timeout=0.1)
    gate.set()
    assert stopped.wait(5)


# ---------------------------------------------------------------------- rewards


def test_a_reward_ranks_the_answers_of_a_cached_search(chat: Any) -> None:
    engine = chat.answering(5, 5, 9, 7)
    assert solve(engine).completions.answer == [5, 9, 7]
    pred = solve(engine, reward_fn=largest)
    assert pred.completions.answer == [9, 7, 5] and pred._ets.rewards == (0.09, 0.07, 0.05)
    assert len(engine.script.requests) == 1, "other rewards, the same search"
    assert solve(engine, reward_fn=lambda args, pred: -pred.answer).answer == 5
    assert len(engine.script.requests) == 1


def test_every_answer_is_there_to_be_ranked(chat: Any) -> None:
    """The LM keeps eight answers; the best by reward may be the last of sixteen."""
    engine = chat.answering(*range(1, 17))
    assert solve(engine, width=16, reward_fn=largest).answer == 16
    assert len(solve(engine, width=16).completions.answer) == 8


def test_nobody_is_judged_after_one_that_is_good_enough(chat: Any) -> None:
    judged: list[int] = []

    def reward(args: dict[str, Any], pred: dspy.Prediction) -> float:
        judged.append(pred.answer)
        return float(pred.answer == 9)

    pred = solve(chat.answering(5, 5, 9, 7), reward_fn=reward, threshold=1.0)
    assert judged == [5, 9] and pred.completions.answer == [9, 5, 7] and pred._ets.rewards == (1.0, 0.0)


def test_a_reward_that_raises_puts_its_answer_last(chat: Any, caplog: pytest.LogCaptureFixture) -> None:
    pred = solve(chat.answering(0, 0, 4), reward_fn=lambda args, pred: 1 / pred.answer)
    assert pred.completions.answer == [4, 0] and "division by zero" in caplog.text
    with pytest.raises(ZeroDivisionError):
        solve(chat.answering(0, name="zero"), reward_fn=lambda args, pred: 1 / pred.answer)


@pytest.mark.parametrize("mode", ["rerank", "search"])
def test_what_a_reward_asks_is_its_own_affair(chat: Any, mode: Any) -> None:
    """It is not in the program's trace, and the LM that it asks has its own verifier and reads its own fields."""
    judged: list[str] = []

    def own(problem: str, steps: Sequence[str]) -> float:
        judged.append(problem)
        return 0.5

    inner = dspy.Predict("solution -> verdict: float")
    judge_lm = ETSLM(service=chat.answering("0.5", verifier=own, name="judge"), search=SMALL)

    def reward(args: dict[str, Any], pred: dspy.Prediction) -> float:
        return inner(solution=str(pred.answer), lm=judge_lm).verdict

    with dspy.context(trace=[]):
        assert solve(chat.answering(42), reward_fn=reward, reward=mode).answer == 42
        assert len(dspy.settings.trace) == 1
    assert judged, "its own verifier was asked"
    (candidate,) = judge_lm.history[0]["response"].provider_data["ets"]["candidates"]
    assert candidate["answer"] == "0.5"


def stepping(chat: Any) -> Any:
    """Four lines of thought of three steps; the verifier of the engine likes 0, and 2 is right."""

    def write(request: ProposalRequest, place: int) -> str:
        return chat.marked(reasoning=f"Line {place}.\n\nMore of {place}.\n\nStill {place}.", answer=place)

    return chat.scripted(write, verifier=lambda problem, steps: 0.9 if "Line 0" in "".join(steps) else 0.1)


def is_two(args: dict[str, Any], pred: dspy.Prediction) -> float:
    return 1.0 if pred.answer == 2 else 0.0


def test_a_reward_inside_the_search_stops_it_at_the_threshold(chat: Any) -> None:
    """Each path is one step longer than the one before; the search need not wait for the longer ones."""

    def write(request: ProposalRequest, place: int) -> str:
        return chat.marked(reasoning="\n\n".join(["On."] * (1 + 5 * place)), answer=place)

    engine = chat.scripted(write)
    pred = solve(engine, reward_fn=is_two, reward="search", threshold=1.0)
    assert pred.answer == 2 and pred._ets.finish_reason == "cancelled" and pred._ets.rewards[0] == 1.0
    assert pred.completions.answer == [2, 0, 1] or pred.completions.answer == [2, 1, 0]
    without = solve(engine, reward_fn=is_two, reward="search")
    assert without.answer == 2 and without._ets.finish_reason == "stop" and len(without.completions.answer) == 4
    assert without._ets.generated_tokens > pred._ets.generated_tokens


def test_a_reward_inside_the_search_does_not_prune_half_written_answers(chat: Any) -> None:
    """A path whose answer is begun, not ended, is worth what its step is worth."""
    judged: list[Any] = []

    def write(request: ProposalRequest, place: int) -> str:
        return chat.marked(reasoning="r", answer="4\n\n2")  # the answer itself goes on after a blank line

    def reward(args: dict[str, Any], pred: dspy.Prediction) -> float:
        judged.append(pred.answer)
        return float(pred.answer.split() == ["4", "2"])

    pred = solve(chat.scripted(write), "question -> answer", strategy="beam", keep=4, reward_fn=reward, reward="search")
    assert pred.answer.split() == ["4", "2"] and "4" in judged and pred._ets.step_scores == (0.5, 0.5, 1.0)


def test_step_rewards_guide_the_search_and_read_no_markup(chat: Any) -> None:
    seen: list[tuple[str, ...]] = []

    def likes_three(args: dict[str, Any], steps: list[str]) -> float:
        assert args == QUESTION
        seen.append(tuple(steps))
        return 0.9 if "Line 3." in steps[0] else 0.1

    pred = solve(stepping(chat), strategy="beam", keep=1, step_reward_fn=likes_three)
    assert pred.answer == 3 and solve(stepping(chat), strategy="beam", keep=1).answer == 0
    assert not any("##" in step for steps in seen for step in steps) and ("Line 3.\n\n",) in seen


def test_rewards_inside_are_part_of_the_cache_key(chat: Any) -> None:
    engine = chat.answering(1, 2, 3, 4)
    for reward in (is_two, largest, is_two, largest):
        solve(engine, reward_fn=reward, reward="search")
    assert len(engine.script.requests) == 2
    limit = 3
    for _ in range(2):  # a closure has no name
        solve(engine, reward_fn=lambda args, pred: float(pred.answer == limit), reward="search")
    assert len(engine.script.requests) == 4


def test_as_verifier_makes_a_reward_of_a_metric(chat: Any) -> None:
    def matches(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
        return example.answer == pred.answer

    reward = as_verifier(matches, dspy.Example(question="?", answer=2))
    assert (reward({}, dspy.Prediction(answer=2)), reward({}, dspy.Prediction(answer=3))) == (1.0, 0.0)
    assert reward.id != as_verifier(matches, dspy.Example(question="?", answer=3)).id
    scored = as_verifier(lambda example, pred, trace=None: dspy.Prediction(score=0.25, feedback="so so"))
    assert scored({"question": "?"}, dspy.Prediction(answer=2)) == 0.25
    engine = chat.answering(1, 2, 3, 4)
    for _ in range(2):
        assert solve(engine, reward_fn=reward, reward="search", threshold=1.0).answer == 2
    assert len(engine.script.requests) == 1, "the metric has a name, so DSPy may cache the search"


# ---------------------------------------------------------------------- modules around it


def test_best_of_n_and_refine_around_a_reasoner(chat: Any) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        if "advice" in chat.fields_asked(request):
            return chat.marked(discussion="d", advice='{"predict": "Think again."}')
        return chat.marked(reasoning="r", answer=(request.config.seed + place) % 7)

    engine = chat.scripted(write)
    reasoner = ETSReasoner("question -> answer: int", width=1, strategy="best_of_n")
    with dspy.context(lm=ETSLM(service=engine, seed=3)):
        best = dspy.BestOfN(reasoner, N=3, reward_fn=largest, threshold=1.0)(**QUESTION)
        assert best.answer == 5 and [one.config.seed for one in engine.script.requests] == [3, 4, 5]
        refined = dspy.Refine(reasoner, N=2, reward_fn=largest, threshold=1.0)(**QUESTION)
    assert refined.answer in (3, 4) and engine.script.requests[-1].config.temperature == 1.0


def test_deepcopies_and_pickles(chat: Any) -> None:
    engine = chat.answering(5, 9, name="reasoner-engine")
    register_service("reasoner-engine", engine)
    reasoner = ETSReasoner("question -> answer: int", **SMALL, reward_fn=largest)
    reasoner.set_lm(ETSLM(service="reasoner-engine"))
    for other in (reasoner.deepcopy(), reasoner.reset_copy(), cloudpickle.loads(cloudpickle.dumps(reasoner))):
        if other.get_lm() is None:
            other.set_lm(reasoner.get_lm())
        assert other(**QUESTION).answer == 9 and other.get_lm().source.find() is engine


def test_save_and_load_json(chat: Any, tmp_path: Any) -> None:
    engine = chat.answering(5, 9, name="json-engine")
    register_service("json-engine", engine)
    reasoner = ETSReasoner("question -> answer: int", width=4, strategy="best_of_n", reward_fn=largest, threshold=0.5)
    reasoner.predict.demos = [dspy.Example(question="1+1?", reasoning="Both.", answer=2)]
    reasoner.set_lm(ETSLM(service="json-engine", search={"lambda_d": 2.0}))
    reasoner.save(tmp_path / "reasoner.json")
    fresh = ETSReasoner("question -> answer: int", reward_fn=largest)
    with pytest.raises(ValueError, match="allow_unsafe_lm_state"):
        fresh.load(tmp_path / "reasoner.json")
    fresh.load(tmp_path / "reasoner.json", allow_unsafe_lm_state=True)
    assert fresh.predict.settings == {"width": 4, "strategy": "best_of_n"} and fresh.predict.threshold == 0.5
    assert fresh(**QUESTION).answer == 9 and not hasattr(fresh.predict, "ets")
    config = engine.script.requests[-1].config
    assert (config.width, config.lambda_d, len(engine.script.requests[-1].messages)) == (4, 2.0, 4)


# ---------------------------------------------------------------------- streams


async def test_progress_is_told_and_no_text_shown_while_rewards_are_still_to_choose(chat: Any) -> None:
    def unhurried(problem: str, steps: Sequence[str]) -> float:
        time.sleep(0.02)
        return 0.5

    engine = chat.answering(5, 9, verifier=unhurried)
    program = dspy.streamify(
        ETSReasoner("question -> answer: int", **SMALL, reward_fn=largest),
        stream_listeners=[StreamListener("reasoning")],
    )
    with dspy.context(lm=ETSLM(service=engine)):
        items = [item async for item in program(**QUESTION)]
    assert any(isinstance(item, StatusMessage) for item in items)
    assert not any(isinstance(item, StreamResponse) for item in items) and items[-1].answer == 9


# ---------------------------------------------------------------------- LMs that cannot search


class Counting:
    """An engine of `dspy.LM` that gives one answer after the other."""

    def __init__(self, answers: Sequence[str], chat: Any) -> None:
        self.answers, self.chat, self.num_asked = answers, chat, 0

    def complete(self, request: Any) -> Any:
        from dspy import lm15

        text = self.chat.marked(reasoning="r", answer=self.answers[self.num_asked % len(self.answers)])
        self.num_asked += 1
        return lm15.Response(None, request.model, lm15.Message.assistant(text), "stop", lm15.Usage())


class AsyncCounting(Counting):
    async def complete(self, request: Any) -> Any:
        return super().complete(request)


def test_another_lm_is_sampled_and_that_is_said_once(chat: Any, caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    engine = Counting(["5", "nine", "9", "9"], chat)
    lm = dspy.LM("some/model", engine=engine, async_engine=AsyncCounting(["1", "2", "2", "2"], chat))
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    reasoner = ETSReasoner("question -> answer: int", n_candidates=4)
    with dspy.context(lm=lm, adapter=adapter), caplog.at_level(logging.WARNING):
        pred = reasoner(**QUESTION)
        assert pred.completions.answer == [9, 5] and engine.num_asked == 4
        assert asyncio.run(reasoner.acall(question="And 1?")).completions.answer == [2, 1]
    assert caplog.text.count("is no ETSLM") == 1 and not hasattr(pred, "_ets")


def test_another_lm_is_asked_no_more_once_the_reward_is_enough(chat: Any) -> None:
    engine = Counting(["5", "9", "7"], chat)
    lm = dspy.LM("some/model", engine=engine)
    with dspy.context(lm=lm):
        pred = ETSReasoner("question -> answer: int", reward_fn=largest, threshold=0.09, reward="search")(**QUESTION)
    assert pred.answer == 9 and engine.num_asked == 2
    with dspy.context(lm=DummyLM([{"reasoning": "r", "answer": "8"}] * 8)):
        assert ETSReasoner("question -> answer: int", n_candidates=2)(**QUESTION).answer == 8


def test_another_lm_whose_every_sample_is_illegible(chat: Any) -> None:
    lm = dspy.LM("some/model", engine=Counting(["nine"], chat))
    adapter = dspy.ChatAdapter(use_json_adapter_fallback=False)
    with dspy.context(lm=lm, adapter=adapter), pytest.raises(AdapterParseError, match="nine"):
        ETSReasoner("question -> answer: int", n_candidates=2)(**QUESTION)


# ---------------------------------------------------------------------- the plain adapter


def test_the_plain_adapter_renders_one_field_and_reads_the_answer(chat: Any) -> None:
    def write(request: ProposalRequest, place: int) -> str:
        return "20 and 22.\n\nThe answer is " + ("42." if place else "many.")

    engine = chat.scripted(write)
    with dspy.context(adapter=PlainAdapter()):
        pred = solve(engine)
        assert (pred.answer, pred._ets.candidates[0].votes) == (42, 3)
        assert engine.script.requests[-1].messages == ({"role": "user", "content": QUESTION["question"]},)
        lm = ETSLM(service=engine, search=SMALL)
        assert dspy.Predict("question -> answer: int")(**QUESTION, lm=lm).answer == 42
        with pytest.raises(ValueError, match="'context', 'question'"):
            solve(engine, "context, question -> answer")
    with dspy.context(adapter=PlainAdapter(field="question"), lm=ETSLM(service=engine, search=SMALL)):
        assert dspy.Predict("context, question -> answer: int")(context="c", **QUESTION).answer == 42


def test_types_are_part_of_the_cache_key_where_no_prompt_shows_them(chat: Any) -> None:
    engine = chat.scripted(lambda request, place: f"The answer is {'42' if place else 'many'}.")
    with dspy.context(adapter=PlainAdapter()):
        assert solve(engine, "question -> answer: int").completions.answer == [42]
        assert sorted(solve(engine, "question -> answer").completions.answer) == ["42", "many"]


# ---------------------------------------------------------------------- imports


def test_importing_loads_no_model_library() -> None:
    code = (
        "import sys, ets_integrations.dspy\n"
        "heavy = {'torch', 'transformers', 'litellm', 'fastapi', 'langgraph', 'langchain_core', 'scipy'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
        "ets_integrations.dspy.ETSLM('ets/reference'), ets_integrations.dspy.ETSReasoner('question -> answer')\n"
        "print(sorted((heavy - {'scipy'}) & set(sys.modules)))\n"
    )
    command = [sys.executable, "-W", "error::DeprecationWarning", "-c", code]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.split("\n")[:2] == ["[]", "[]"]
