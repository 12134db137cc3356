"""Conversations, tools and stop texts through whole engines: equal prompt ids, equal trees, nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from ets_engine.config import EngineConfig, SearchConfig, Strategy
from ets_engine.errors import ConfigError
from ets_engine.models import PolicyFormat, Preset, StepBoundary, TreePolicy, TrlFormat
from ets_engine.runtime import Runner, StepDecoder
from ets_engine.search import Rebase
from ets_engine.service import ETSEngine
from ets_engine.types import SearchResult, Step, StopReason, TraceNode

from .conftest import tiny_model
from .engines import save_policy, save_prm, tiny_tokenizer
from .test_serving import settle

PAGES = EngineConfig(device="cpu", page_tokens=4)
PROBLEM = "what is 1+1?"
TURNS = [{"role": "system", "content": "be brief."}, {"role": "user", "content": PROBLEM}]
PLAIN = "{{ bos_token }}{% for m in messages %}{{ m.role }}. {{ m.content }}\n{% endfor %}"
WITH_TOOLS = (
    "{{ bos_token }}{% if tools %}{% for t in tools %}{{ t.function.name }}\n{% endfor %}{% endif %}"
    "{% for m in messages %}{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}so {% endif %}"
)
STRICT = "{% if 'brief' in messages[0].content %}{{ raise_exception('no haste, please') }}{% endif %}" + PLAIN
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]


def half(problem: str, steps: Sequence[str]) -> float:
    return 0.5


def settings(strategy: Strategy = "best_of_n", **changes: Any) -> SearchConfig:
    small = {"width": 6, "max_steps": 6, "max_step_tokens": 8, "max_tokens": 40, "seed": 3, "trace": True}
    return SearchConfig(strategy=strategy, **{**small, **changes})


def chat_format(template: str) -> PolicyFormat:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    return PolicyFormat.of(tokenizer, frozenset({2}))


def make(template: str | None = None, boundaries: tuple[str, ...] = ("\n\n",)) -> ETSEngine:
    """A random policy with this chat template and these step boundaries, without a PRM."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    preset = Preset("own", "", prompt="line" if template is None else "chat", boundary=StepBoundary(boundaries))
    runner = Runner(tiny_model("llama_gqa_rope_scaled"), PAGES)  # pyright: ignore[reportArgumentType]
    return ETSEngine(runner, PolicyFormat.of(tokenizer, frozenset({2}), preset))


@pytest.fixture(scope="module")
def shared() -> ETSEngine:
    return make()


@pytest.fixture
def engine(shared: ETSEngine) -> Iterator[ETSEngine]:
    """A plain engine; every test leaves nothing behind."""
    yield shared
    settle(shared)


def path(trace: Sequence[TraceNode], node: int) -> list[TraceNode]:
    return [] if node == 0 else [*path(trace, trace[node].parent), trace[node]]


def finished(result: SearchResult) -> list[list[TraceNode]]:
    """The trajectories of a result, in the order of its leaves."""
    assert result.trace is not None
    return [path(result.trace, node.id) for node in result.trace if node.stop is StopReason.FINISHED]


def text(steps: Sequence[TraceNode]) -> str:
    return "".join(step.text for step in steps)


# ---------------------------------------------------------------------- prompt ids


@pytest.mark.parametrize("tools", [(), TOOLS])
def test_a_conversation_is_what_the_tokenizers_own_template_makes_of_it(tools: Any) -> None:
    format = chat_format(WITH_TOOLS)
    expected: Any = format.tokenizer.apply_chat_template(
        TURNS, tools=tools or None, add_generation_prompt=True, return_dict=False
    )
    assert format.prompt_ids(TURNS, tools) == expected
    rendered = f"<bos>{'add' + chr(10) if tools else ''}be brief.\n{PROBLEM}\nso "
    assert format.tokenizer.decode(expected) == rendered, "the template's begin token is the only one"


def test_a_conversation_is_rendered_once_where_there_are_no_tools(monkeypatch: pytest.MonkeyPatch) -> None:
    format, calls = chat_format(WITH_TOOLS), list[Any]()
    render = format.tokenizer.apply_chat_template
    monkeypatch.setattr(format.tokenizer, "apply_chat_template", lambda *a, **k: calls.append(k) or render(*a, **k))
    format.prompt_ids(TURNS)
    assert len(calls) == 1


def test_calls_and_results_reach_the_template() -> None:
    calls = "{% for c in m.tool_calls or [] %}{{ c.function.name }}{% endfor %}"
    template = "{% for m in messages %}{{ m.content }}" + calls + "{% endfor %}"
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
    turns = [*TURNS, {"role": "assistant", "content": "", "tool_calls": [call]}, {"role": "tool", "content": "2"}]
    format = chat_format(template)
    assert format.tokenizer.decode(format.prompt_ids(turns, ())) == f"be brief.{PROBLEM}add2"


def test_a_template_that_leaves_tools_out_is_refused() -> None:
    with pytest.raises(ConfigError, match="chat template leaves them out"):
        chat_format(PLAIN).prompt_ids(TURNS, TOOLS)


def test_a_template_that_raises_is_named() -> None:
    with pytest.raises(ConfigError, match="chat template refuses these messages: no haste, please"):
        chat_format(STRICT).prompt_ids(TURNS)
    assert chat_format(STRICT).prompt_ids(TURNS[1:])


def test_without_a_template_the_last_user_turn_is_a_line() -> None:
    format = PolicyFormat.of(tiny_tokenizer(), frozenset({2}))
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "so."}, TURNS[1]]
    assert format.prompt_ids(turns) == format.prompt_ids(PROBLEM) == format.prompt_ids(TURNS)
    with pytest.raises(ConfigError, match="no chat template, so it cannot be told of tools"):
        format.prompt_ids(PROBLEM, TOOLS)
    with pytest.raises(ConfigError, match="no user message"):
        format.prompt_ids(TURNS[:1])


# ---------------------------------------------------------------------- whole searches


def test_a_conversation_gives_the_tree_of_its_prompt_ids(engine: ETSEngine) -> None:
    """The template makes lines of the turns, so a text of these lines is the same prompt without a template."""
    chat = make(PLAIN)
    asked: set[str] = set()

    def judge(problem: str, steps: Sequence[str]) -> float:
        asked.add(problem)
        return len(steps[-1]) / 100

    lines = f"system. be brief.\nuser. {PROBLEM}"
    assert chat._format.prompt_ids(TURNS) == engine._format.prompt_ids(lines)
    for strategy in ("rebase", "ets", "best_of_n"):
        one = chat.search(TURNS, settings(strategy), verifier=judge)
        other = engine.search(lines, settings(strategy), verifier=judge)
        assert one.trace == other.trace and one.text == other.text
        assert (one.problem, one.prompt_tokens) == (PROBLEM, 1 + len(lines) + 1)
    assert asked == {PROBLEM, lines}
    turns = [{"role": "user", "content": "what?"}, {"role": "assistant", "content": "so."}, *TURNS]
    plain, last = (engine.search(prompt, settings("rebase"), verifier=judge) for prompt in (PROBLEM, turns))
    assert (last.trace, last.problem) == (plain.trace, PROBLEM), "without a template the last question is all"
    assert chat.submit(PROBLEM, settings(), verifier=judge).result(20).prompt_tokens == 1 + len(f"user. {PROBLEM}\n")
    settle(chat)
    chat.close()


def test_what_a_template_cannot_say_ends_its_search_alone() -> None:
    chat = make(STRICT)
    good = chat.submit(PROBLEM, settings(), verifier=half)
    refused = chat.submit(TURNS, settings(), verifier=half)
    unheard = chat.submit(PROBLEM, settings(), verifier=half, tools=TOOLS)
    with pytest.raises(ConfigError, match="no haste"):
        refused.result(20)
    with pytest.raises(ConfigError, match="leaves them out"):
        unheard.result(20)
    assert good.result(20).trace is not None
    with pytest.raises(ConfigError, match="role='human'"):
        chat.submit([{"role": "human", "content": PROBLEM}])
    settle(chat)
    chat.close()


def test_a_search_reads_what_was_submitted_whatever_becomes_of_it() -> None:
    chat = make(WITH_TOOLS)
    turns, tools = [dict(turn) for turn in TURNS], [{"type": "function", "function": {"name": "add"}}]
    expected = chat.search(turns, settings(), verifier=half, tools=tools)
    blocked = [chat.submit(PROBLEM, settings(seed=seed), verifier=half) for seed in range(8)]
    future = chat.submit(turns, settings(), verifier=half, tools=tools)
    turns[1]["content"] = "something else"
    tools[0]["function"] = {"name": "sub"}
    assert future.result(20).trace == expected.trace
    assert all(one.result(20).trace is not None for one in blocked)
    settle(chat)
    chat.close()


def test_unknown_options_are_refused_as_before(engine: ETSEngine) -> None:
    anything: Any = engine
    for ask in (anything.submit, anything.search):
        with pytest.raises(TypeError, match="unexpected search option 'verfier'"):
            ask(PROBLEM, settings(), verfier=half)
    result = anything.search(PROBLEM, settings(), verifier=half, tools=None, view=None, on_event=None, cancel=None)
    assert result.trace is not None


def test_engines_without_a_name_of_their_own_are_told_apart(engine: ETSEngine) -> None:
    """An address would name the next engine in its place, and one in another process, in somebody's cache."""
    names = set[str]()
    for _ in range(3):
        other = make()
        names.add(other.name)
        other.close()
        del other
    assert len(names | {engine.name}) == 4


def test_the_prm_reads_the_problem_and_the_steps_that_it_is_told_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    step_ids, root_ids = TrlFormat.step_ids, TrlFormat.root_ids

    def seen_step_ids(self: TrlFormat, step: str, *, is_first: bool) -> list[int]:
        read.append(step)
        return step_ids(self, step, is_first=is_first)

    monkeypatch.setattr(TrlFormat, "step_ids", seen_step_ids)
    monkeypatch.setattr(TrlFormat, "root_ids", lambda self, problem: (read.append(problem), root_ids(self, problem))[1])
    config = SearchConfig(width=4, max_steps=2, max_step_tokens=6, max_tokens=12)
    options: Any = {"problem_text": "1+1?", "read_step": lambda text: text.replace("a", "").upper()}
    with ETSEngine.from_pretrained(save_policy(tmp_path / "policy"), save_prm(tmp_path / "prm"), PAGES) as judged:
        result = judged.search("[[ 1+1? ]]", config, **options)
    assert read[0] == "1+1?" == result.problem
    assert len(read) > 4 and all(step == step.upper() and "A" not in step for step in read[1:])


def test_the_reference_engine_reads_a_conversation_as_its_question() -> None:
    question = "Use 4, 6, 10 and 19 to make 16."
    config = SearchConfig(strategy="rebase", width=4, seed=1, trace=True)
    with ETSEngine.from_pretrained("reference", config=EngineConfig(device="cpu", prefix_cache_tokens=0)) as reference:
        plain = reference.search(question, config)
        turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": question}]
        asked = reference.search(turns, config)
        assert asked.trace == plain.trace and asked.answer == plain.answer
        assert (asked.problem, asked.prompt_tokens) == (question, plain.prompt_tokens)
        with pytest.raises(ConfigError, match="cannot be told of tools"):
            reference.search(turns, config, tools=TOOLS)
        settle(reference)


# ---------------------------------------------------------------------- boundaries of every kind


def boundaries(free: str) -> dict[str, StepBoundary]:
    """Boundaries that a text crosses."""
    return {
        "ends": StepBoundary(ends=(free[3:5], free[11:12])),
        "begins": StepBoundary(begins=(free[3:5], free[11:13], free[20:21])),
        "both": StepBoundary(ends=(free[5:6],), begins=(free[9:11], free[17:19])),
        "tokens": StepBoundary(tokens=5),
        "is_over": StepBoundary(is_over=lambda text: len(text) >= 6 and text[-1] in free[5:9]),
    }


def make_divided(boundary: StepBoundary, **changes: Any) -> ETSEngine:
    runner = Runner(tiny_model("llama_gqa_rope_scaled"), PAGES.replace(**changes))  # pyright: ignore
    preset = Preset("own", "", prompt="line", boundary=boundary)
    return ETSEngine(runner, PolicyFormat.of(tiny_tokenizer(), frozenset({2}), preset))


@pytest.mark.parametrize("kind", ["ends", "begins", "both", "tokens", "is_over"])
def test_whatever_divides_a_trajectory_it_reads_the_same(engine: ETSEngine, kind: str) -> None:
    """Every token is sampled once at its place, so a greedy trajectory does not know of its steps."""
    free = engine.search(PROBLEM, settings("greedy", max_steps=40)).text
    boundary = boundaries(free)[kind]
    other = make_divided(boundary)
    seen: list[tuple[str, ...]] = []

    def judge(problem: str, steps: Sequence[str]) -> float:
        seen.append(tuple(steps))
        return 0.5

    config = settings("greedy", max_steps=40, max_step_tokens=40)
    divided = other.search(PROBLEM, config.replace(max_tokens=30), verifier=judge)
    assert divided.trace is not None and len(divided.trace) > 3
    steps = [node.text for node in divided.trace[1:]]
    assert free.startswith("".join(steps)) and "".join(steps), "the last opener may stand behind it"
    assert sum(node.num_tokens for node in divided.trace[1:]) == 30
    assert seen[-1] == tuple(steps[: len(seen[-1])]), "verifiers read the steps as they are divided"
    for above, below in pairwise(steps):
        assert not boundary.ends or above.endswith(boundary.ends) or below.startswith(boundary.begins)
        assert not boundary.begins or below.startswith(boundary.begins) or above.endswith(boundary.ends or "never")
    settle(other)
    other.close()


def test_a_search_divided_by_openers_gives_up_its_memory_and_goes_on() -> None:
    """What a step carries over to the next one is not lost with its KV, nor told twice."""
    boundary = StepBoundary(begins=tuple("aeioubdfg0123"))
    roomy, tight = make_divided(boundary), make_divided(boundary, kv_pool_tokens=160)
    jobs = [(f"what is {i}+{i}?", settings("rebase", width=4, max_step_tokens=4, seed=i)) for i in range(10)]
    expected = [roomy.search(*job, verifier=half) for job in jobs]
    together = [future.result(60) for future in [tight.submit(*job, verifier=half) for job in jobs]]
    assert tight.stats().preemptions > 0
    for one, other in zip(expected, together, strict=True):
        assert one.trace is not None and other.trace is not None
        assert [(node.text, node.stop) for node in one.trace] == [(node.text, node.stop) for node in other.trace]
    opened = [node for result in expected for node in result.trace or () if node.text.startswith(boundary.begins)]
    assert len(opened) > 20
    for used in (roomy, tight):
        settle(used)
        used.close()


def test_a_boundary_function_that_raises_fails_its_branches_alone() -> None:
    def is_over(text: str) -> bool:
        if text > "m":
            raise ValueError("never m")
        return len(text) > 4

    other = make_divided(StepBoundary(is_over=is_over))
    result = other.search(PROBLEM, settings("rebase", width=8), verifier=half)
    assert result.trace is not None
    failed = [node for node in result.trace if node.stop is StopReason.ERROR]
    assert 0 < len(failed) == result.num_errors < len(result.trace) - 1
    assert other.search(PROBLEM, settings("rebase", width=8), verifier=half).trace == result.trace
    settle(other)
    other.close()


def test_a_reply_is_gone_on_with_and_is_no_part_of_the_solution(engine: ETSEngine) -> None:
    free = engine.search(PROBLEM, settings("greedy"))
    begun = {"role": "assistant", "content": free.text[:9]}
    result = engine.search([{"role": "user", "content": PROBLEM}, begun], settings("greedy"))
    assert result.prompt_tokens == free.prompt_tokens + 9
    assert result.text[:20] == free.text[9:29]


# ---------------------------------------------------------------------- stop texts


@pytest.mark.parametrize("seed", range(3))
def test_a_stop_text_that_never_comes_changes_nothing(engine: ETSEngine, seed: int) -> None:
    plain = engine.search(PROBLEM, settings("ets", seed=seed), verifier=half)
    stopped = engine.search(PROBLEM, settings("ets", seed=seed, stop=("never written",)), verifier=half)
    apart = {"timing", "cached_prompt_tokens"}
    assert stopped.model_dump(exclude=apart) == plain.model_dump(exclude=apart)


def alone(**changes: Any) -> SearchConfig:
    """One trajectory, so that a stop text changes nothing before it comes."""
    return settings(width=1, **changes)


@pytest.mark.parametrize("start", [0, 3, 7, 8, 14, 15, 23, 27])
@pytest.mark.parametrize("length", [1, 2, 5])
def test_a_stop_text_cuts_a_trajectory_where_it_first_appears(engine: ETSEngine, start: int, length: int) -> None:
    """Taken from what the branch writes anyway; a step has 8 tokens of at most a character, so some straddle two."""
    free = engine.search(PROBLEM, alone(seed=5))
    assert free.trace is not None and len(free.trace) > 4
    whole = text(free.trace[1:])
    stop = whole[start : start + length]
    assert len(stop) == length
    place = whole.find(stop)
    starts = list(accumulate((len(node.text) for node in free.trace[1:]), initial=0))
    last_step = max(one for one in starts if one < place + length)  # what is above it of the stop text stays there
    result = engine.search(PROBLEM, alone(seed=5, stop=("never written", stop + "?!", stop)), view=Whole())
    assert result.text == whole[: max(place, last_step)]
    assert (result.finish_reason, result.trajectories, result.answer) == ("stop", 1, result.text), "it votes"
    assert result.trace is not None and result.trace[-1].stop is StopReason.FINISHED
    assert place + length <= result.generated_tokens <= free.generated_tokens, "what was cut was written all the same"


class Whole:
    """A text is its own answer."""

    def answer(self, problem: str, text: str) -> str | None:
        return text

    def same(self, left: str, right: str) -> bool:
        return left == right


def test_the_earliest_of_several_stop_texts_cuts(engine: ETSEngine) -> None:
    whole = engine.search(PROBLEM, alone(seed=5)).text
    late, early = whole[20:22], whole[10:12]
    assert whole.find(early) == 10 and whole.find(late) == 20
    for stop in ((late, early), (early, late)):
        assert engine.search(PROBLEM, alone(seed=5, stop=stop)).text == whole[:10]


def test_a_stop_text_may_begin_with_the_boundary_of_the_step_before() -> None:
    lines = make(boundaries=("\n",))
    for seed in range(200):
        free = lines.search(PROBLEM, alone(seed=seed))
        assert free.trace is not None
        texts = [node.text for node in free.trace[1:]]
        lasts = [place for place, one in enumerate(texts[:-1]) if len(one) < 8 and one.endswith("\n")]
        ends = [place for place in lasts if len(texts[place + 1]) > 2]
        if ends:
            break
    else:
        pytest.fail("no line ends within a step")
    above = "".join(texts[: ends[0] + 1])
    stop = "\n" + texts[ends[0] + 1][:2]
    result = lines.search(PROBLEM, alone(seed=seed, stop=(stop,)))
    assert (result.text, result.trajectories, result.steps[-1].text) == (above, 1, "")
    settle(lines)
    lines.close()


def test_a_stop_text_does_not_begin_in_the_prompt(engine: ETSEngine) -> None:
    """Which ends with a line end."""
    free = engine.search(PROBLEM, alone(seed=5))
    stopped = engine.search(PROBLEM, alone(seed=5, stop=("\n" + free.text[:2],)))
    assert stopped.trace == free.trace


def test_a_search_that_gave_up_its_memory_knows_what_it_wrote() -> None:
    tokenizer = tiny_tokenizer()
    format = PolicyFormat.of(tokenizer, frozenset({2}))
    decoder = StepDecoder(Runner(tiny_model("llama_gqa_rope_scaled"), PAGES), tokenizer)  # pyright: ignore

    def two_steps(stop: tuple[str, ...], drops: bool) -> tuple[Step, Step]:
        policy = TreePolicy(decoder, format, PROBLEM, settings(stop=stop), "one search")
        policy.start()
        (first,) = policy.expand([0], [1])
        policy.retain([1])
        if drops:
            policy.drop()
            policy.restore()
        (second,) = policy.expand([1], [2])
        policy.close()
        return first, second

    first, second = two_steps((), drops=False)
    stop = first.text[-1] + second.text[0]
    for drops in (False, True):
        assert two_steps((stop,), drops) == (first, Step("", 1, StopReason.FINISHED))


def test_stop_texts_of_many_searches_in_a_pool_that_is_too_small(tmp_path: Path) -> None:
    """Whoever gives up its memory meanwhile stops where it would have stopped, between two steps too."""
    folders = save_policy(tmp_path / "policy"), save_prm(tmp_path / "prm")
    tight = ETSEngine.from_pretrained(*folders, EngineConfig(device="cpu", page_tokens=4, kv_pool_tokens=160))
    pairs = tuple(a + b for a in "abcdefghijklmnop\n" for b in "abcdefghijklmnop\n")
    jobs = [
        (f"what is {i}+{i}?", settings("rebase", width=4, max_step_tokens=3, seed=i, stop=pairs)) for i in range(10)
    ]
    one_by_one = [tight.search(*job) for job in jobs]
    before = tight.stats().preemptions
    together = [future.result(60) for future in [tight.submit(*job) for job in jobs]]
    assert tight.stats().preemptions > before
    straddling = [steps for result in together for steps in finished(result) if steps[-1].text == ""]
    assert len(straddling) > 3
    for one, other in zip(one_by_one, together, strict=True):
        assert one.trace is not None and other.trace is not None
        assert [(node.text, node.stop) for node in one.trace] == [(node.text, node.stop) for node in other.trace]
        assert not any(stop in text(steps) for steps in finished(other) for stop in pairs)
    settle(tight)
    tight.close()


# ---------------------------------------------------------------------- without a verifier


@pytest.mark.parametrize("problem", [PROBLEM, "what is 7*8?", "so a = 2.", "use 3 and 4."])
def test_a_greedy_search_is_what_transformers_generates(engine: ETSEngine, problem: str) -> None:
    model, tokenizer = tiny_model("llama_gqa_rope_scaled"), tiny_tokenizer()
    ids = torch.tensor([engine._format.prompt_ids(problem)])
    written = model.generate(  # pyright: ignore[reportCallIssue]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=40, do_sample=False, pad_token_id=0
    )[0, ids.shape[1] :]
    result = engine.search(problem, settings("greedy"))
    assert result.text == tokenizer.decode(written, skip_special_tokens=True)
    assert (result.verifier_tokens, result.verifier_kv, result.width) == (0, None, 1)
    assert all(node.verdict is None or node.verdict.share == 1 for node in result.trace or ())


def test_majority_votes_need_no_verifier(engine: ETSEngine) -> None:
    config = settings(vote="majority", width=8, stop=("e", "a"))
    result = engine.search(PROBLEM, config, view=Whole())
    votes = [text(steps) for steps in finished(result)]
    assert result.candidates[0].votes == max(map(votes.count, votes)) and len(votes) == result.trajectories > 3
    assert (result.verifier_tokens, result.verifier_kv, result.timing.verifier_s) == (0, None, 0.0)
    judged = engine.search(PROBLEM, config, view=Whole(), verifier=lambda problem, steps: len(steps[-1]) / 10)
    assert judged.trace is not None and result.trace is not None
    assert [node.text for node in judged.trace] == [node.text for node in result.trace], "no score can matter"
    assert engine.search(PROBLEM, settings("ets", width=1)).trace is not None


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (settings("ets"), {}),
        (settings("best_of_n"), {}),
        (settings("best_of_n", vote="best"), {}),
        (settings("beam", vote="majority"), {}),
        (settings("best_of_n", vote="majority"), {"selector": Rebase(0.2)}),
    ],
)
def test_where_scores_matter_somebody_must_judge(engine: ETSEngine, config: SearchConfig, options: Any) -> None:
    with pytest.raises(ConfigError, match="verifier=None: this engine has no PRM"):
        engine.submit(PROBLEM, config, **options)
    assert engine.search(PROBLEM, config, verifier=half, **options).trace is not None


def test_a_batch_scorer_is_asked_once_per_depth(engine: ETSEngine) -> None:
    class Batch:
        def __init__(self) -> None:
            self.asked: list[list[tuple[str, ...]]] = []

        def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
            assert problem == PROBLEM
            self.asked.append([tuple(path) for path in paths])
            return [0.25 if len(self.asked) > 1 else float("nan") if place == 0 else 0.5 for place in range(len(paths))]

    batch = Batch()
    result = engine.search(PROBLEM, settings("rebase"), verifier=batch)
    assert result.trace is not None and result.num_errors == 1
    scored = [node for node in result.trace[1:] if node.stop is not StopReason.LENGTH]
    assert batch.asked == [
        [tuple(step.text for step in path(result.trace, node.id)) for node in scored if node.depth == depth]
        for depth in range(1, len(batch.asked) + 1)
    ]
