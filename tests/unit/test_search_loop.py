"""The loop against fakes: who gets width, what is freed, and what happens when a partner misbehaves."""

import math
from dataclasses import dataclass

import numpy as np
import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError, ContextLengthError, ProtocolError
from ets_engine.protocols import Selection
from ets_engine.search import Expand, Progress, Rebase, Retain, Score, Start, StopSearch, run, search, trajectories
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import LeafVerdict, Step, StopReason

STRATEGIES = ["greedy", "best_of_n", "beam", "beam_sqrt", "dvts", "rebase", "ets_kv", "ets", "ets_published", "dora"]
END = StopReason.FINISHED


def config(**settings) -> SearchConfig:
    return SearchConfig(**{"strategy": "rebase", "width": 4, **settings})


@dataclass(frozen=True)
class Give:
    """A selector that always answers the same."""

    shares: tuple
    verdicts: tuple = ()
    needs_embeddings: bool = False

    def select(self, frontier, open_width):
        return Selection((open_width,) if frontier.depth == 0 else self.shares, self.verdicts if frontier.depth else ())


def scripted(*rounds, table=None, settings=None, selector=None, **run_options):
    """Run a script of steps and scores; gives the tree, the policy and the verifier."""
    policy, verifier = FakePolicy(prompt_tokens=10, script=rounds), TableVerifier(table, default=0.5)
    tree = run(search(config(**(settings or {})), selector), policy, verifier, **run_options)
    tree.check_integrity()
    return tree, policy, verifier


def test_one_search_by_hand():
    tree, policy, verifier = scripted(
        [Step("a", 1), Step("b", 1), Step("c", 1), Step("d", 1)],
        [Step("b1", 2, END), Step("b2", 2), Step("c1", 2, END), Step("c2", 2)],
        [Step("b3", 3, END), Step("b4", 3, END)],
        table={"a": 0.0, "b": 0.9, "c": 0.9, "d": 0.0, "b1": 1.0, "b2": 0.9, "c1": 0.8, "c2": 0.1},
    )
    assert policy.expanded == [(0, 0, 0, 0), (2, 2, 3, 3), (6, 6)]  # two finished: the open width is two
    assert policy.retained == verifier.retained == [(0,), (2, 3), (6,)]  # finished leaves 5 and 7 are not retained
    assert verifier.scored == [(1, 2, 3, 4), (5, 6, 7, 8), (9, 10)]  # each once
    assert tree.finished == (5, 7, 9, 10)
    assert tree.published_tokens == 10 + 14 + 16  # root; all four; a union of two paths, 10 + 1 + 1 + 2 + 2
    assert [tree.verdict(node).share for node in (1, 2, 3, 4, 6, 8)] == [0, 2, 2, 0, 2, 0]


def test_requests_in_order_and_ids_reserved_before_expanding():
    searching = search(config(width=2, max_steps=2), Rebase())
    assert next(searching) == Start()
    assert searching.send(10).event.kind == "start"
    assert searching.send(None) == Retain((0,))
    assert searching.send(None) == Expand((0, 0), (1, 2))
    assert searching.send([Step("a", 3), Step("b", 3, StopReason.ERROR, "boom")]) == Score((1,), (0,), ("a",))
    step = searching.send([0.5])
    assert isinstance(step, Progress) and step.event.kind == "step"
    assert searching.send(None) == Retain((1,))
    assert searching.send(None) == Expand((1,), (3,))  # the failed branch consumed one unit of width


def test_events():
    events = []
    scripted(
        [Step("x=1 ", 1), Step("x=2 ", 1)],
        [Step("so 1", 2, END), Step("so 2", 2, END)],
        settings={"width": 2},
        table={"x=1 ": 0.9, "x=2 ": 0.1},
        on_event=events.append,
    )
    assert [(event.kind, event.depth) for event in events] == [("start", 0), ("step", 1), ("step", 2), ("end", 2)]
    start, step, last, end = events
    assert (start.frontier, start.kept, start.kv_unique_tokens) == (1, 1, 10)
    assert (step.frontier, step.kept, step.pruned, step.best_score) == (2, 1, 1, 0.9)
    assert (step.kv_unique_tokens, step.kv_path_tokens, step.generated_tokens, step.common_text) == (11, 11, 2, "x=1 ")
    assert (last.frontier, last.kept, last.finished, last.common_text) == (0, 0, 2, "x=1 so ")
    assert last.best_score == end.best_score == 0.5  # of the finished ones: no leaf is open
    assert end.common_text == "x=1 so "


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_ends_within_its_width(strategy):
    settings = config(strategy=strategy, width=8, max_steps=6, max_step_tokens=12)
    policy = FakePolicy(seed=3, prompt_tokens=20)
    tree = run(search(settings), policy, TableVerifier(), HashEmbedder())
    tree.check_integrity()
    assert 1 <= len(tree.closed) <= 8
    assert max(node.depth for node in tree.nodes) <= 6
    assert all(len(batch) <= 8 for batch in policy.expanded)
    if strategy == "best_of_n":
        assert len(tree.closed) == 8
    if strategy == "greedy":
        assert all(len(batch) == 1 for batch in policy.expanded)


def test_same_seed_same_tree():
    trees = [
        run(search(config(strategy="ets", width=8)), FakePolicy(seed=5), TableVerifier(), HashEmbedder())
        for _ in range(2)
    ]
    assert trees[0].trace() == trees[1].trace()


def test_too_long_and_too_deep_consume_width_and_are_not_scored():
    tree, policy, verifier = scripted(
        [Step("a", 9), Step("b", 5), Step("c", 10, END), Step("d", 12)],
        [Step("b1", 4), Step("b2", 5)],
        [Step("b3", 0)],
        settings={"max_tokens": 10, "max_steps": 3},
        table={"a": 0.0, "b": 1.0},
    )
    assert tree.stopped_by(StopReason.LENGTH) == (4, 6, 7)  # d too long at once, b2 at exactly 10, b3 too deep
    assert tree.finished == (3,)  # c is as long, but it ended
    assert verifier.scored == [(1, 2, 3), (5,)]
    assert policy.expanded[-1] == (5,)
    assert all(tree[node].step_score == 0.0 for node in (4, 6, 7))


def test_nan_and_none_are_failed_branches():
    tree, _, _ = scripted(
        [Step("a", 1), Step("b", 1, END), Step("c", 1)],
        settings={"width": 3},
        table={"a": math.nan, "b": math.nan, "c": None},
    )
    assert tree.stopped_by(StopReason.ERROR) == (1, 2, 3)
    assert tree.finished == ()
    assert tree[2].step.error == "the verifier could not score it"


def test_failed_steps_are_data():
    failed = Step("", 0, StopReason.ERROR, "timeout")
    tree, _, verifier = scripted([failed, failed], settings={"width": 2})
    assert tree.stopped_by(StopReason.ERROR) == (1, 2)
    assert verifier.scored == []


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_search_whose_branches_all_failed_ends_without_an_answer(strategy):
    failed = Step("", 0, StopReason.ERROR, "timeout")
    width = 1 if strategy == "greedy" else 2
    tree, policy, _ = scripted(
        [Step("a", 1)] * width,
        [failed] * width,
        settings={"strategy": strategy, "width": width},
        embedder=HashEmbedder(),
    )
    assert (len(tree.closed), tree.finished, tree.frontier) == (width, (), ())
    assert len(policy.expanded) == 2
    assert trajectories(tree, "last") == ()
    assert not tree.stopped


def test_duplicate_siblings_are_scored_kept_and_expanded_apart():
    tree, policy, _ = scripted(
        [Step("same", 1), Step("same", 1)], [Step("end", 1, END), Step("end", 1, END)], settings={"width": 2}
    )
    assert policy.expanded == [(0, 0), (1, 2)]
    assert tree.finished == (3, 4)


def test_a_selector_may_leave_width_unused_and_end_the_search():
    tree, policy, _ = scripted([Step("a", 1), Step("b", 1)], settings={"width": 2}, selector=Give((0, 0)))
    assert policy.expanded == [(0, 0)]
    assert tree.verdict(1) == LeafVerdict(node=1, share=0)
    assert not tree.stopped
    tree, policy, _ = scripted(
        [Step("a", 1), Step("b", 1)], [Step("c", 1, END)], settings={"width": 2}, selector=Give((0, 1))
    )
    assert policy.expanded == [(0, 0), (2,)]


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (Give((1,)), "1 shares for 2 leaves"),
        (Give((-1, 2)), r"shares \(-1, 2\)"),
        (Give((0.5, 1)), r"shares \(0.5, 1\)"),
        (Give((2, 1)), "3 children, open width is 2"),
        (Give((1, 1), (LeafVerdict(node=1, share=1),)), "1 verdicts for 2 leaves"),
    ],
)
def test_a_selector_that_breaks_its_contract(selector, message):
    with pytest.raises(ProtocolError, match=message):
        scripted([Step("a", 1), Step("b", 1)], settings={"width": 2}, selector=selector)


@pytest.mark.parametrize(
    ("rounds", "table", "message"),
    [
        ([[Step("a", 1)]], {}, "1 steps for 2 children"),
        ([[Step("a", 1), "b"]], {}, "'b' for node 2"),
        ([[Step("a", 1), Step("b", -1)]], {}, "num_tokens=-1 for node 2"),
        ([[Step("a", 1), Step("b", 1.5)]], {}, "num_tokens=1.5 for node 2"),
        ([[Step("a", 1), Step("b", math.nan)]], {}, "num_tokens=nan for node 2"),
        ([[Step("a", 1), Step("b", 1)]], {"b": 1.5}, "1.5 for node 2"),
        ([[Step("a", 1), Step("b", 1)]], {"b": -0.1}, "-0.1 for node 2"),
        ([[Step("a", 1), Step("b", 1)]], {"b": math.inf}, "inf for node 2"),
        ([[Step("a", 1), Step("b", 1)]], {"b": "high"}, "'high' for node 2"),
    ],
)
def test_a_policy_or_verifier_that_breaks_its_contract(rounds, table, message):
    class Loose(FakePolicy):
        def expand(self, parents, children):
            return rounds[0]

    with pytest.raises(ProtocolError, match=message):
        run(search(config(width=2)), Loose(), TableVerifier(table, default=0.5))


@pytest.mark.parametrize("sent", [None, -1, 1.5, "ten"])
def test_prompt_tokens_are_a_count(sent):
    searching = search(config())
    next(searching)
    with pytest.raises(ProtocolError, match=r"policy.start\(\) returned"):
        searching.send(sent)


@pytest.mark.parametrize(
    ("method", "message"), [("expand", "returned int; return a sequence"), ("score", "3 scores for 2")]
)
def test_wrong_answers_by_hand(method, message):
    searching = search(config(width=2))
    next(searching)
    searching.send(10)
    searching.send(None)
    request = searching.send(None)
    assert isinstance(request, Expand)
    with pytest.raises(ProtocolError, match=message):
        if method == "score":
            assert isinstance(searching.send([Step("a", 1), Step("b", 1)]), Score)
            searching.send([0.1, 0.2, 0.3])
        else:
            searching.send(7)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.ones((1, 3)), r"shape \(1, 3\); return \[2, D\]"),
        (np.ones(2), r"shape \(2,\)"),
        (np.array([[1.0], [np.nan]]), "for node 2"),
        (np.array([[1.0], [np.inf]]), "for node 2"),
        (np.ones((2, 0)), r"shape \(2, 0\)"),
        (["a", "b"], "returned list"),
    ],
)
def test_an_embedder_that_breaks_its_contract(vectors, message):
    class Broken:
        def embed(self, nodes, texts):
            return vectors

    policy = FakePolicy(script=[[Step("a", 1), Step("b", 1)]])
    with pytest.raises(ProtocolError, match=message):
        run(search(config(strategy="ets", width=2)), policy, TableVerifier(), Broken())


def test_embeddings_without_an_embedder():
    policy = FakePolicy(script=[[Step("a", 1), Step("b", 1)]])
    with pytest.raises(ConfigError, match="embedder=None"):
        run(search(config(strategy="ets", width=2)), policy, TableVerifier())


def test_one_open_leaf_needs_no_embedding():
    policy = FakePolicy(script=[[Step("a", 1)], [Step("b", 1, END)]])
    tree = run(search(config(strategy="ets", width=1)), policy, TableVerifier())
    assert tree.finished == (2,)
    assert tree.verdict(1).cluster == 0


@pytest.mark.parametrize("calls", range(8))
def test_stopping_early_gives_the_tree_so_far(calls):
    asked, events = [], []

    def should_stop():
        asked.append(True)
        return len(asked) > calls

    tree, _, _ = scripted(
        [Step("a", 1), Step("b", 1, END)],
        [Step("c", 1, END)],
        settings={"width": 2},
        should_stop=should_stop,
        on_event=events.append,
    )
    assert tree.stopped
    assert len(tree) == (1 if calls < 5 else 3)
    assert events[-1].kind == "end"
    assert len(asked) == calls + 1  # not asked again


def test_a_stop_after_the_end_is_too_late():
    searching = search(config(width=1, max_steps=1))
    request = next(searching)
    sent = {Start: 10, Expand: [Step("a", 1, END)], Score: [0.5]}
    while not (isinstance(request, Progress) and request.event.kind == "end"):
        request = searching.send(sent.get(type(request)))
    assert searching.throw(StopSearch()) == request  # nobody has seen it yet
    with pytest.raises(StopIteration) as ended:
        searching.send(None)
    assert not ended.value.value.stopped


def test_stopping_before_the_prompt_is_read():
    searching = search(config())
    next(searching)
    assert searching.throw(StopSearch()).event.kind == "end"


def test_a_hard_budget_sets_aside_no_more_than_trajectories_may_still_write():
    settings = {"strategy": "ets_kv", "width": 2, "max_step_tokens": 100, "max_tokens": 10, "kv_budget_tokens": 30}
    tree, policy, _ = scripted(
        [Step("a", 4), Step("b", 4)],
        [Step("a1", 6), Step("a2", 6)],
        table={"a": 0.9, "b": 0.1},
        settings=settings,
    )
    assert policy.expanded == [(0, 0), (1, 1)]  # 10 + 2 * 10, then 10 + 4 + 2 * 6
    assert policy.peak_tokens <= 30 and not tree.stopped


@pytest.mark.parametrize("stops", ["start", "expand", "score"])
def test_policy_and_verifier_may_stop_the_search(stops):
    class Policy(FakePolicy):
        def start(self):
            return leave() if stops == "start" else super().start()

        def expand(self, parents, children):
            return leave() if stops == "expand" and 0 not in parents else super().expand(parents, children)

    class Verifier(TableVerifier):
        def score(self, nodes, parents, texts):
            return leave() if stops == "score" and 0 not in parents else super().score(nodes, parents, texts)

    def leave():
        raise StopSearch

    tree = run(search(config(width=2)), Policy(seed=1), Verifier())
    assert tree.stopped and [node.depth for node in tree.nodes] == ([0] if stops == "start" else [0, 1, 1])


def test_a_crash_in_the_policy_reaches_the_caller():
    class Crash(FakePolicy):
        def expand(self, parents, children):
            raise RuntimeError("device lost")

    with pytest.raises(RuntimeError, match="device lost"):
        run(search(config()), Crash(), TableVerifier())


def test_the_clock_times_the_selector_only():
    ticks = iter(range(1000))
    policy = FakePolicy(script=[[Step("a", 1)], [Step("b", 1, END)]])
    tree = run(search(config(width=1), clock=lambda: float(next(ticks))), policy, TableVerifier())
    assert tree.select_s == 2.0  # two selections, a tick each
    assert next(ticks) == 4


@pytest.mark.parametrize("lambda_d", [0.0, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_hard_budget_holds_at_every_moment(seed, lambda_d):
    policy = FakePolicy(seed=seed, prompt_tokens=30, max_step_tokens=12)
    settings = config(
        strategy="ets",
        width=16,
        max_step_tokens=12,
        kv_budget_tokens=130,
        lambda_d=lambda_d,
        lambda_b=0.1,
        max_steps=12,
    )
    tree = run(search(settings), policy, TableVerifier(), HashEmbedder())
    assert 60 < policy.peak_tokens <= 130
    assert tree.closed


def test_a_budget_too_small_for_the_prompt_is_refused():
    with pytest.raises(ContextLengthError, match="need 42 KV tokens"):
        run(
            search(config(strategy="ets_kv", kv_budget_tokens=41, max_step_tokens=12)),
            FakePolicy(prompt_tokens=30),
            TableVerifier(),
        )


def test_a_budget_used_up_later_ends_the_search_with_what_finished():
    tree, policy, _ = scripted(
        [Step("a", 5, END), Step("b", 5)],
        [Step("c", 5)],
        settings={"strategy": "ets_kv", "width": 2, "max_step_tokens": 5, "kv_budget_tokens": 20},
    )
    assert tree.finished == (1,)
    assert tree.frontier == (3,)  # 20 tokens deep: no room for another step
    assert not tree.stopped
    assert policy.peak_tokens == 20
