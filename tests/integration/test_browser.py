"""The report and the tree page in a real browser: they work, and need nothing from outside.

Needs chromium (Debian: `apt-get install chromium`). Pictures are kept where ETS_SCREENSHOTS names a folder.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from ets_engine.config import SearchConfig
from ets_engine.evaluation import read_summary
from ets_engine.evaluation.report import report_page
from ets_engine.evaluation.tree_page import tree_page
from ets_engine.search import run, search
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import LeafVerdict, StopReason, TraceNode

from .chromium import Page, find_chromium, open_page

SUMMARY = Path(__file__).parents[2] / "cookbook" / "results" / "bench-countdown.json"
ABOUT = {"problem": "2 + 2 = <b>?</b>", "answer": "4", "strategy": "ets", "width": 16, "seed": 0, "best": [0, 1]}

Opener = Callable[[str], Page]


@pytest.fixture
def view(tmp_path: Path) -> Iterator[Opener]:
    """Opens a page's text in a browser; skipped without one, failing instead where ETS_REQUIRE_BROWSER=1."""
    chromium = find_chromium()
    if chromium is None:
        if os.environ.get("ETS_REQUIRE_BROWSER") == "1":
            pytest.fail("ETS_REQUIRE_BROWSER=1, but there is no chromium: apt-get install chromium")
        pytest.skip("no chromium: apt-get install chromium")
    with ExitStack() as stack:

        def opened(text: str) -> Page:
            path = tmp_path / "page.html"
            path.write_text(text, encoding="utf-8")
            return stack.enter_context(open_page(chromium, path, tmp_path / "profile"))

        yield opened


def picture(page: Page, name: str, *, whole: bool = False) -> None:
    if folder := os.environ.get("ETS_SCREENSHOTS"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        page.keep_picture(Path(folder) / f"{name}.png", whole=whole)


def assert_quiet(page: Page) -> None:
    assert page.errors == [] and page.requests == []


def searched(strategy: str = "ets") -> list[TraceNode]:
    """A real tree: some leaves kept, some pruned, some finished."""
    tree = run(search(SearchConfig(strategy=strategy, width=16)), FakePolicy(seed=3), TableVerifier(), HashEmbedder())  # type: ignore[arg-type]
    nodes = list(tree.trace())
    assert {node.verdict.share > 0 for node in nodes if node.verdict} == {True, False}
    return nodes


def opacity(page: Page, node: TraceNode) -> float:
    return float(page.read(f"getComputedStyle(document.querySelector('#node-{node.id}')).opacity"))


def visible(page: Page) -> set[int]:
    ids = page.read(
        "[...document.querySelectorAll('circle')].filter(one => getComputedStyle(one).visibility === 'visible')"
        ".map(one => one.id)"
    )
    return {int(one.removeprefix("node-")) for one in ids}


def test_the_driver_sees_errors_and_requests(view: Opener) -> None:
    page = view("<img src='http://127.0.0.1:9/gone.png'><script>console.error('boom'); nothing.here</script>")
    assert page.requests == ["http://127.0.0.1:9/gone.png"]
    assert any("boom" in one for one in page.errors) and any("Uncaught" in one for one in page.errors)


def test_the_tree_page_steps_through_depths_by_arrow_keys(view: Opener) -> None:
    nodes = searched()
    last = max(node.depth for node in nodes)
    page = view(tree_page(ABOUT, nodes))
    picture(page, "tree")
    assert page.read("document.querySelector('h1').textContent") == ABOUT["problem"], "a text is no markup"
    assert visible(page) == {node.id for node in nodes}
    for key, depth in (("ArrowLeft", last - 1), ("Home", 0), ("ArrowLeft", 0), ("ArrowRight", 1), ("End", last)):
        page.press(key)
        assert page.read("document.querySelector('#depth').textContent").startswith(f"Depth {depth} of {last}: ")
        assert visible(page) == {node.id for node in nodes if node.depth <= depth}
    assert_quiet(page)


def test_pruned_branches_are_faded_once_they_are_pruned(view: Opener) -> None:
    nodes = searched()
    page = view(tree_page(ABOUT, nodes))
    pruned = [node for node in nodes if node.verdict and not node.verdict.share]
    finished = [node for node in nodes if node.stop == StopReason.FINISHED]
    assert all(opacity(page, node) < 0.5 for node in pruned) and all(opacity(page, node) == 1 for node in finished)
    page.press("Home")
    page.press("ArrowRight")
    assert all(opacity(page, node) == 1 for node in nodes if node.depth == 1), "not decided yet"
    page.press("ArrowRight")
    shares = {node.id: node.verdict.share for node in nodes if node.depth == 1 and node.verdict}
    assert {node.id for node in nodes if node.depth == 1 and opacity(page, node) < 0.5} == {
        node for node, share in shares.items() if not share
    }


def test_a_branch_that_nothing_alive_is_below_is_faded_too(view: Opener) -> None:
    kept, pruned = LeafVerdict(node=1, share=1), LeafVerdict(node=2, share=0)
    steps = [(0, -1, 0, kept), (1, 0, 1, kept), (2, 1, 2, pruned), (3, 0, 1, kept), (4, 3, 2, kept), (5, 4, 3, None)]
    nodes = [
        TraceNode(id=i, parent=parent, depth=depth, text="", num_tokens=3, step_score=0.5, stop=stop, verdict=verdict)
        for i, parent, depth, verdict in steps
        for stop in [StopReason.BOUNDARY if verdict else StopReason.FINISHED]
    ]
    page = view(tree_page(ABOUT, nodes))
    assert [opacity(page, node) < 0.5 for node in nodes] == [False, True, True, False, False, False]


def test_a_click_on_a_node_tells_its_step_and_its_fate(view: Opener) -> None:
    nodes = searched()
    page = view(tree_page(ABOUT, nodes))
    decided = [node for node in nodes if node.verdict and node.parent >= 0]
    for kept in (True, False):
        node, verdict = next((one, said) for one in decided if (said := one.verdict) and (said.share > 0) == kept)
        page.click(f"#node-{node.id}")
        told = page.read("document.querySelector('#about').innerText")
        assert node.text.strip() in told
        assert told.count("Kept with " if kept else "Pruned: ") == 1
        for name, value in (("reward", verdict.reward), ("coverage", verdict.coverage), ("gain", verdict.gain)):
            assert name in told and f"{abs(value):.4f}" in told, told
        assert f"{verdict.path_cost:.4f}" in told and f"{verdict.share} of " in told
        picture(page, "tree-kept" if kept else "tree-pruned")
    assert_quiet(page)


@pytest.mark.parametrize(
    ("verdict", "why"),
    [
        (LeafVerdict(node=1, share=0, reward=0.5, path_cost=0.7), "Pruned: its KV costs more than it is worth."),
        (LeafVerdict(node=1, share=0, reward=0.5, path_cost=0.2), "no room for it"),
        (LeafVerdict(node=1, share=0, reward=0.5, path_cost=0.2, starved=True), "left it no child"),
        (LeafVerdict(node=1, share=0, reward=0.5), "too small for a child"),
        (LeafVerdict(node=1, share=0), "went to better scores"),
        (LeafVerdict(node=1, share=3, reward=0.5), "Kept with 3 children."),
        (LeafVerdict(node=1, share=1, reward=0.5, path_cost=0.7), "something has to be kept"),
        (LeafVerdict(node=1, share=1, reward=0.5, path_cost=0.2), "Kept with 1 child: it is worth its KV."),
    ],
)
def test_every_fate_has_its_reason(view: Opener, verdict: LeafVerdict, why: str) -> None:
    root = TraceNode(id=0, parent=-1, depth=0, text="", num_tokens=3, step_score=1.0, stop=StopReason.BOUNDARY)
    leaf = root.model_copy(update={"id": 1, "parent": 0, "depth": 1, "text": "a step", "verdict": verdict})
    page = view(tree_page(ABOUT, [root, leaf]))
    page.click("#node-1")
    assert why in page.read("document.querySelector('.why').textContent")


@pytest.mark.parametrize("strategy", ["rebase", "beam", "ets_published", "best_of_n"])
def test_trees_of_other_strategies_are_shown_too(view: Opener, strategy: str) -> None:
    tree = run(search(SearchConfig(strategy=strategy, width=8)), FakePolicy(seed=3), TableVerifier(), HashEmbedder())  # type: ignore[arg-type]
    page = view(tree_page(ABOUT | {"strategy": strategy}, tree.trace()))
    for node in tree.trace():
        page.read(f"document.querySelector('#node-{node.id}').dispatchEvent(new Event('click'))")
        assert page.read("document.querySelector('.why').textContent")
    assert_quiet(page)


def test_the_tree_page_can_be_printed_and_read_in_the_dark(view: Opener) -> None:
    page = view(tree_page(ABOUT, searched()))
    page.show_as(scheme="dark")
    picture(page, "tree-dark")
    assert page.read("getComputedStyle(document.body).backgroundColor") == "rgb(13, 17, 23)"
    page.show_as(media="print")
    picture(page, "tree-print", whole=True)
    edges = "(one => [one.right, one.bottom])(%s.getBoundingClientRect())"
    right, bottom = page.read(edges % "document.querySelector('#tree')")
    nodes = page.read(f"[...document.querySelectorAll('circle')].map(node => {edges % 'node'})")
    width = page.read("document.documentElement.scrollWidth")
    assert width <= 1300 and all(x <= right and y <= bottom for x, y in nodes), "nothing is cut off on paper"


def test_the_report_shows_both_plots_and_all_tables(view: Opener) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    summary = read_summary(SUMMARY)
    page = view(report_page(summary))
    sizes = page.read("[...document.querySelectorAll('svg')].map(one => [one.clientWidth, one.clientHeight])")
    assert len(sizes) == 2 and all(width > 300 and height > 200 for width, height in sizes)
    marks = page.read("[...document.querySelectorAll('svg')].map(one => one.querySelectorAll('use').length)")
    assert all(count >= len(summary.rows) for count in marks), "a mark per row"
    heads = page.read("[...document.querySelectorAll('table')].map(one => one.tBodies[0].rows.length)")
    methods = len({row.method for row in summary.rows})
    assert heads[:4] == [len(summary.rows), methods, methods, methods]
    picture(page, "report", whole=True)
    assert_quiet(page)


@pytest.mark.parametrize("width", [400, 800, 1300])
def test_the_report_fits_its_window(view: Opener, width: int) -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    page = view(report_page(read_summary(SUMMARY)))
    page.resize(width, 900)
    assert page.read("document.documentElement.scrollWidth") <= width
    if width == 800:
        page.show_as(media="print")
        picture(page, "report-print", whole=True)
