"""Verifiers behind servers: what they are sent, how replies become scores, and that what is illegible is NaN."""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.hosted import HostedEngine, ProposalRequest
from ets_engine.remote import JudgeVerifier, PoolingVerifier, Replicas, Server
from ets_engine.remote.verifier import PrmLayout, find_layout
from ets_engine.scorers import BatchScorer
from ets_engine.types import Step, StopReason

Reach = Callable[[Callable[[dict[str, Any]], Any]], tuple[Replicas, list[tuple[str, dict[str, Any]]]]]


@pytest.fixture
def reach() -> Iterator[Reach]:
    """Replicas of a server that answers a body as a function says, and the list of what it was asked."""
    made: list[Replicas] = []

    def make(answer: Callable[[dict[str, Any]], Any]) -> tuple[Replicas, list[tuple[str, dict[str, Any]]]]:
        asked: list[tuple[str, dict[str, Any]]] = []

        def handle(request: httpx.Request) -> httpx.Response:
            body = json.loads(request.content)
            asked.append((request.url.path, body))
            found = answer(body)
            return found if isinstance(found, httpx.Response) else httpx.Response(200, json=found)

        made.append(Replicas([Server("http://a/v1", transport=httpx.MockTransport(handle))], retries=0))
        return made[-1], asked

    yield make
    for one in made:
        one.close()


def rows(*found: Any) -> Callable[[dict[str, Any]], Any]:
    return lambda body: {"data": [{"index": place, "data": one} for place, one in enumerate(found)]}


# ---------------------------------------------------------------------- a PRM


def test_a_prm_reads_its_layout_and_is_read_at_the_last_mark(reach: Reach) -> None:
    replicas, asked = reach(rows([[0.9, 0.1], [0.25, 0.75]], [[0.8, 0.2]]))
    verifier = PoolingVerifier(replicas, "Qwen/Qwen2.5-Math-PRM-7B")
    assert isinstance(verifier, BatchScorer)
    assert verifier.score_many("1+1?", [["It is 2.\n\n", "So 2.\n\n"], ["No."]]) == [0.75, 0.2]
    [(path, body)] = asked
    assert path == "/pooling" and body["model"] == "Qwen/Qwen2.5-Math-PRM-7B"
    assert body["input"][0].endswith(
        "<|im_start|>user\n1+1?<|im_end|>\n<|im_start|>assistant\nIt is 2.<extra_0>So 2.<extra_0>"
    )


@pytest.mark.parametrize(
    ("row", "score"),
    [
        pytest.param([0.25, 0.75], 0.75, id="LAST pooling"),
        pytest.param([[0.0, 0.0], [1.0, 3.0]], 1 / (1 + math.exp(-2)), id="logits of two classes"),
        pytest.param([[0.5], [-1.0]], 1 / (1 + math.exp(1)), id="one logit"),
        pytest.param([-1e6], 0.0, id="a very small logit"),
        pytest.param([1e6, -1e6], 0.0, id="very different logits"),
        pytest.param([[0.0, 1.0004]], 1.0, id="rounding"),
        pytest.param([[0.1, 0.2, 0.7]], math.nan, id="three classes"),
        pytest.param([], math.nan, id="nothing"),
        pytest.param("text", math.nan, id="text"),
        pytest.param([["a", "b"]], math.nan, id="no numbers"),
        pytest.param([[True, False]], math.nan, id="truth values"),
        pytest.param(None, math.nan, id="null"),
    ],
)
def test_rows_of_a_prm(reach: Reach, row: Any, score: float) -> None:
    replicas, _ = reach(rows(row))
    [found] = PoolingVerifier(replicas, "m", layout="lines").score_many("p", [["s"]])
    assert found == pytest.approx(score, nan_ok=True)


def test_classifiers_give_shares(reach: Reach) -> None:
    replicas, asked = reach(lambda body: {"data": [{"probs": [0.4]}, {"probs": [0.1, 0.9]}, {"probs": [1.5]}]})
    verifier = PoolingVerifier(replicas, "m", layout=PrmLayout("<{problem}>", "|"), endpoint="classify")
    found = verifier.score_many("p", [["a"], ["b", "c"], ["d"]])
    assert found[:2] == [0.4, 0.9] and math.isnan(found[2])
    assert asked == [("/classify", {"model": "m", "input": ["<p>a|", "<p>b|c|", "<p>d|"]})]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (rows([0.5, 0.5]), "it gave 1 scores, 2 were asked for"),
        (lambda body: {"data": "none"}, "it gave no scores"),
        (lambda body: {}, "it gave no scores"),
        (lambda body: httpx.Response(200, text="hello"), "no JSON object"),
        (lambda body: httpx.Response(404), "answered 404"),
        (lambda body: httpx.Response(500, text="boom"), "answered 500: boom"),
    ],
)
def test_a_prm_that_fails_is_logged_once_and_its_branches_die(
    reach: Reach, caplog: pytest.LogCaptureFixture, answer: Any, message: str
) -> None:
    verifier = PoolingVerifier(reach(answer)[0], "m", layout="lines")
    for _ in range(2):
        assert all(map(math.isnan, verifier.score_many("p", [["a"], ["b"]])))
    [record] = caplog.records
    assert message in record.message and record.message.startswith("the PRM 'm' failed: ")


def test_many_paths_are_several_requests_and_one_that_fails_kills_its_own(reach: Reach) -> None:
    def answer(body: dict[str, Any]) -> Any:
        if "p\nstep 40\n" in body["input"]:
            return httpx.Response(500)
        return rows(*[[0.5, 0.5]] * len(body["input"]))(body)

    replicas, asked = reach(answer)
    found = PoolingVerifier(replicas, "m", layout="lines").score_many("p", [[f"step {i}"] for i in range(70)])
    assert [len(body["input"]) for _, body in sorted(asked, key=lambda one: one[1]["input"])] == [32, 32, 6]
    assert [math.isnan(one) for one in found] == [32 <= place < 64 for place in range(70)]


def test_a_path_that_is_too_long_fails_alone(reach: Reach, caplog: pytest.LogCaptureFixture) -> None:
    """One such text makes vLLM refuse the whole request."""

    def answer(body: dict[str, Any]) -> Any:
        if max(map(len, body["input"])) > 50:
            return httpx.Response(400, json={"error": {"message": "maximum context length"}})
        return rows(*[[1 - len(text) / 100, len(text) / 100] for text in body["input"]])(body)

    replicas, asked = reach(answer)
    paths = [["s" * place] if place != 5 else ["s" * 99] for place in range(1, 9)]
    found = PoolingVerifier(replicas, "m", layout="lines").score_many("p", paths)
    assert [math.isnan(one) for one in found] == [place == 5 for place in range(1, 9)]
    assert found[0] == pytest.approx(0.04) and found[-1] == pytest.approx(0.11), "each at its place"
    assert [len(body["input"]) for _, body in asked] == [8, 4, 4, 2, 1, 1, 2]
    assert "maximum context length" in caplog.text


def test_a_prm_that_is_down_is_not_asked_again_in_halves(reach: Reach) -> None:
    replicas, asked = reach(lambda body: httpx.Response(404))
    PoolingVerifier(replicas, "m", layout="lines").score_many("p", [["a"], ["b"]])
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        pytest.param({"verifier_format": "trl"}, "p\na\nb\n", id="TRL's"),
        pytest.param({"verifier_format": "trl", "step_separator": "|"}, "p|a|b|", id="with another separator"),
        pytest.param(
            {"verifier_format": "qwen"}, "p<|im_end|>\n<|im_start|>assistant\na<extra_0>b<extra_0>", id="Qwen's"
        ),
    ],
)
def test_settings_name_the_layout_of_a_served_prm(settings: dict[str, Any], text: str) -> None:
    layout = find_layout(EngineConfig(**settings))
    assert layout is not None and layout.text("p", ["a ", "b\n"]).endswith(text)
    assert find_layout(EngineConfig()) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"verifier_format": "skywork"}, "verifier_format='skywork': behind pooling:openai:... a PRM is of 'qwen' or"),
        (
            {"verifier_format": "qwen", "step_separator": "|"},
            "step_separator='|': behind pooling:openai:... it goes with verifier_format='trl'",
        ),
        ({"step_separator": "|"}, "step_separator='|': behind pooling:openai:... it goes with verifier_format='trl'"),
        (
            {"verifier_load_options": {"token": "hunter2"}},
            "verifier_load_options: the PRM behind pooling:openai:... was loaded by its server",
        ),
    ],
    ids=["format", "Qwen's separator", "separator alone", "load options"],
)
def test_settings_that_no_served_prm_has_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        find_layout(EngineConfig(**settings))
    assert "hunter2" not in str(caught.value)


def test_layouts_are_known_by_name_or_refused(reach: Reach) -> None:
    replicas, _ = reach(rows())
    with pytest.raises(ConfigError, match="one of qwen, lines"):
        PoolingVerifier(replicas, "some/prm")
    with pytest.raises(ConfigError, match="one of qwen, lines"):
        PoolingVerifier(replicas, "some/prm", layout="other")
    with pytest.raises(ConfigError, match="one of qwen, lines"):
        PoolingVerifier(replicas, "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-1.5B")


# ---------------------------------------------------------------------- a judge


def says(*words: Any) -> Callable[[dict[str, Any]], Any]:
    """A judge that says something for each step: the word at the place that the step names."""
    return lambda body: {
        "choices": [{"message": {"content": words[int(body["messages"][1]["content"].split("step ")[1][0])]}}]
    }


def test_a_judge_marks_steps(reach: Reach, caplog: pytest.LogCaptureFixture) -> None:
    replicas, asked = reach(says("7", "**9.5**/10", "no idea", None))
    verifier = JudgeVerifier(replicas, "j")
    assert isinstance(verifier, BatchScorer)
    found = verifier.score_many("1+1?", [["so ", "step 0"], ["step 1"], ["step 2"], ["step 3"]])
    assert found[:2] == [0.7, 0.95] and all(map(math.isnan, found[2:]))
    assert {path for path, _ in asked} == {"/v1/chat/completions"}
    [body] = [body for _, body in asked if "step 0" in body["messages"][1]["content"]]
    assert "1+1?" in body["messages"][1]["content"] and "so step 0" in body["messages"][1]["content"]
    assert body["temperature"] == 0.0
    assert len(caplog.records) == 1 and "holds no mark from 0 to 10" in caplog.records[0].message


@pytest.mark.parametrize("reply", [{}, {"choices": []}, {"choices": [{"text": "7"}]}, {"choices": [{"message": None}]}])
def test_a_judge_without_a_message_is_illegible(reach: Reach, reply: Any) -> None:
    [found] = JudgeVerifier(reach(lambda body: reply)[0], "j").score_many("p", [["s"]])
    assert math.isnan(found)


def test_a_reply_that_was_cut_off_is_no_mark(reach: Reach, caplog: pytest.LogCaptureFixture) -> None:
    reply = {"choices": [{"message": {"content": "Step 1 gives 7"}, "finish_reason": "length"}]}
    [found] = JudgeVerifier(reach(lambda body: reply)[0], "j", max_tokens=64).score_many("p", [["s"]])
    assert math.isnan(found)
    assert "cut off after 64 tokens; raise JudgeVerifier(max_tokens=)" in caplog.records[0].message


def test_many_steps_of_one_problem_are_judged_by_all_replicas() -> None:
    together = threading.Barrier(24)  # no judgement comes before all were asked for
    hosts: list[str] = []

    def handle(request: httpx.Request) -> httpx.Response:
        hosts.append(request.url.host)
        together.wait(10)
        return httpx.Response(200, json={"choices": [{"message": {"content": "7"}}]})

    transport = httpx.MockTransport(handle)
    replicas = Replicas([Server(f"http://{host}/v1", transport=transport) for host in "ab"], retries=0)
    found = JudgeVerifier(replicas, "j").score_many("p" * 9999, [[f"step {place}"] for place in range(24)])
    assert found == [0.7] * 24 and set(hosts) == {"a", "b"}
    replicas.close()


@pytest.mark.parametrize("make", [JudgeVerifier, PoolingVerifier], ids=["judge", "PRM"])
def test_replicas_are_not_given_whole_problems_to_remember(reach: Reach, make: Any, monkeypatch: Any) -> None:
    replicas, named = reach(lambda body: {})[0], list[str]()

    def post(path: str, body: Any, *, prefixes: Any = (), **options: Any) -> dict[str, Any]:
        named.extend(prefixes)
        return {}

    monkeypatch.setattr(replicas, "post", post)
    make(replicas, "Qwen2.5-Math-PRM-7B").score_many("p" * 9999, [["s"]])
    assert named and max(map(len, named)) < 100


def test_settings_of_a_judge(reach: Reach) -> None:
    with pytest.raises(ConfigError, match="need scale > 0"):
        JudgeVerifier(reach(says())[0], "j", scale=0)


# ---------------------------------------------------------------------- in a search


def test_branches_without_a_score_are_dead_and_the_search_goes_on(reach: Reach) -> None:
    def propose(request: ProposalRequest) -> list[Step]:
        return [Step(f"step {place}. The answer is 2.", 5, StopReason.FINISHED) for place in range(4)]

    verifier = JudgeVerifier(reach(says("7", "what?", "8", "11"))[0], "j")
    with HostedEngine(propose, verifier, name="judged") as engine:
        result = engine.search("1+1?", SearchConfig(strategy="rebase", width=4))
    assert (result.finish_reason, result.num_errors, result.score) == ("stop", 2, 0.8)
