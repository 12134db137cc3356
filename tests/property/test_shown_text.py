"""What events show of an answer stays: each goes on from the one before, and the result from the last."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, get_args

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ets_engine.config import SearchConfig, Strategy
from ets_engine.protocols import Frontier, Selection
from ets_engine.results import build_result
from ets_engine.search import run, search
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import SearchEvent, Step, StopReason, Timing

TIMING = Timing(wall_s=0.0, policy_s=0.0, verifier_s=0.0, select_s=0.0, bytes_moved=0, decode_steps=0)
many = settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class View:
    """Answers of some finished texts."""

    def __init__(self, legible: bool) -> None:
        self.legible = legible

    def answer(self, problem: str, text: str) -> str | None:
        return text[-1:] if self.legible else None

    def same(self, left: str, right: str) -> bool:
        return left == right


class Alike(FakePolicy):
    """Steps of which many begin alike or are the same, and end in every way, as drawn by hypothesis."""

    def __init__(self, data: st.DataObject, reasons: list[StopReason]) -> None:
        super().__init__()
        self._data = data
        self._reasons = st.sampled_from(reasons)

    def _invent(self, child: int) -> Step:
        text = self._data.draw(st.sampled_from(["", "a", "ab", "abc", "b"]))
        return Step(text, len(text), self._data.draw(self._reasons))


class GivesUp:
    """A selector that keeps what it likes, nothing at all perhaps."""

    needs_embeddings = False

    def __init__(self, data: st.DataObject) -> None:
        self._data = data

    def select(self, frontier: Frontier, open_width: int) -> Selection:
        shares = []
        for _ in frontier.leaves:
            shares.append(self._data.draw(st.integers(0, open_width - sum(shares))))
        return Selection((open_width,) if frontier.depth == 0 else tuple(shares))


def check(config: SearchConfig, policy: FakePolicy, verifier: TableVerifier, **options: Any) -> None:
    """Run a search, stopped at the given request, and hold what it showed against what came of it."""
    events: list[SearchEvent] = []
    stop_at, legible = options.pop("stop_at"), options.pop("legible")
    asked = iter(range(10_000))
    tree = run(
        search(config, options.pop("selector", None)),
        policy,
        verifier,
        HashEmbedder(),
        on_event=events.append,
        should_stop=lambda: next(asked) == stop_at,
    )
    result = build_result(tree, config, View(legible), problem="", timing=TIMING, generated_tokens=0)
    shown = [event.common_text for event in events] + [result.text]
    assert all(later.startswith(earlier) for earlier, later in pairwise(shown)), shown


@many
@given(
    strategy=st.sampled_from(get_args(Strategy)),
    seed=st.integers(0, 10_000),
    width=st.integers(1, 6),
    limits=st.tuples(st.integers(1, 6), st.integers(1, 40)),
    finish_chance=st.sampled_from([0.0, 0.1, 0.4]),
    stop_at=st.none() | st.integers(0, 25),
    legible=st.booleans(),
)
def test_over_searches_of_every_strategy(strategy, seed, width, limits, finish_chance, stop_at, legible) -> None:
    config = SearchConfig(strategy=strategy, width=width, max_steps=limits[0], max_tokens=limits[1])
    policy = FakePolicy(seed=seed, finish_chance=finish_chance)
    check(config, policy, TableVerifier(), stop_at=stop_at, legible=legible)


@many
@given(
    data=st.data(),
    reasons=st.lists(st.sampled_from([*StopReason, StopReason.BOUNDARY]), min_size=1, max_size=3),
    scores=st.lists(st.sampled_from([0.1, 0.5, 0.9, float("nan")]), min_size=5, max_size=5),
    stop_at=st.none() | st.integers(0, 25),
    legible=st.booleans(),
)
def test_over_steps_that_begin_alike_fail_and_run_out(data, reasons, scores, stop_at, legible) -> None:
    config = SearchConfig(strategy="rebase", width=4, max_steps=4, max_tokens=8)
    verifier = TableVerifier(dict(zip(["", "a", "ab", "abc", "b"], scores, strict=True)))
    selector = GivesUp(data) if data.draw(st.booleans()) else None
    check(config, Alike(data, reasons), verifier, stop_at=stop_at, legible=legible, selector=selector)


@many
@given(seed=st.integers(0, 10_000), budget=st.integers(10, 60), stop_at=st.none() | st.integers(0, 25))
def test_over_searches_that_use_up_their_kv_budget(seed, budget, stop_at) -> None:
    config = SearchConfig(strategy="ets_kv", width=4, max_step_tokens=1, kv_budget_tokens=budget, max_steps=8)
    policy = FakePolicy(seed=seed, prompt_tokens=1, max_step_tokens=8, finish_chance=0.02)
    check(config, policy, TableVerifier(), stop_at=stop_at, legible=True)
