"""The pages of a comparison and of a search tree: complete, self-contained, and safe with any text."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.evaluation import Outcome, Record, Settings, summarise
from ets_engine.evaluation.plot import draw, panel_of, pareto
from ets_engine.evaluation.report import report_page
from ets_engine.evaluation.tree_page import read_trace, tree_page, write_trace
from ets_engine.search import run, search
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import ScoredStep, SearchResult, Timing, TraceNode

NASTY = "</script><script>alert(1)</script> & <b>\N{LINE SEPARATOR}\N{NEXT LINE}\N{SNOWMAN}"


class Outline(HTMLParser):
    """Tags and what they point to."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "action") and tag != "use"]


def result(problem: str = "2+2?") -> SearchResult:
    tree = run(search(SearchConfig(width=4)), FakePolicy(seed=3), TableVerifier(), HashEmbedder())
    return SearchResult(
        problem=problem,
        text="",
        answer="4",
        score=0.5,
        steps=(),
        candidates=(),
        finish_reason="stop",
        prompt_tokens=1,
        generated_tokens=1,
        verifier_tokens=0,
        path_tokens=1,
        trajectories=1,
        num_errors=0,
        kv=None,
        verifier_kv=None,
        timing=Timing(wall_s=1, policy_s=1, verifier_s=0, select_s=0, bytes_moved=0, decode_steps=1),
        strategy="ets",
        width=4,
        seed=0,
        trace=tree.trace(),
    )


def embedded(page: str) -> dict:
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    wanted = result()
    write_trace(wanted, tmp_path / "deep" / "t.jsonl")
    about, nodes = read_trace(tmp_path / "deep" / "t.jsonl")
    assert tuple(nodes) == wanted.trace and about["problem"] == "2+2?"
    (tmp_path / "r.json").write_text(wanted.model_dump_json() + "\n")
    assert read_trace(tmp_path / "r.json") == (about, nodes)


def test_the_tree_page_holds_every_node_and_nothing_from_outside(tmp_path: Path) -> None:
    write_trace(result(NASTY), tmp_path / "t.jsonl")
    about, nodes = read_trace(tmp_path / "t.jsonl")
    nodes[1] = nodes[1].model_copy(update={"text": NASTY})
    page = tree_page(about, nodes)
    data = embedded(page)
    assert data["problem"] == NASTY and [node["id"] for node in data["nodes"]] == [node.id for node in nodes]
    assert data["nodes"][1]["text"] == NASTY
    outline = Outline(page)
    assert outline.tags.count("script") == 2 and outline.links == [], "a text must not become markup"


def test_the_winning_trajectory_is_the_one_that_is_outlined(tmp_path: Path) -> None:
    """Not the leaf of the highest score: votes decide."""
    whole = result()
    nodes = {node.id: node for node in whole.trace or ()}
    for leaf in [node for node in nodes.values() if node.stop == "finished"]:
        path = [leaf]
        while path[-1].parent >= 0:
            path.append(nodes[path[-1].parent])
        path.reverse()
        steps = tuple(ScoredStep(text=one.text, score=one.step_score, num_tokens=one.num_tokens) for one in path[1:])
        write_trace(whole.model_copy(update={"steps": steps}), tmp_path / "t.jsonl")
        assert embedded(tree_page(*read_trace(tmp_path / "t.jsonl")))["best"] == [one.id for one in path]


@pytest.mark.parametrize("text", ["", "{}", "[1]", "no json", '{"kind": "tree"}\n{"id": 1}', '{"kind": "tree"}'])
def test_what_is_no_tree_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "t.jsonl").write_text(text)
    with pytest.raises(ConfigError, match="holds no search tree"):
        read_trace(tmp_path / "t.jsonl")


def test_a_result_without_its_tree_is_refused(tmp_path: Path) -> None:
    bare = result().model_copy(update={"trace": None})
    with pytest.raises(ConfigError, match="holds no tree"):
        write_trace(bare, tmp_path / "t.jsonl")
    (tmp_path / "r.json").write_text(bare.model_dump_json())
    with pytest.raises(ConfigError, match="without its tree"):
        read_trace(tmp_path / "r.json")
    with pytest.raises(ConfigError, match="no node"):
        tree_page({}, list[TraceNode]())


def outcomes(right: bool) -> dict[str, Outcome]:
    return {"weighted": Outcome(answer="1", strict=right, lenient=right, solved=right)}


def measured() -> list[Settings | Record]:
    settings = Settings(
        model=NASTY,
        verifier="v",
        weights="w",
        data="d",
        search={"lambda_b": 1.0},
        device="cpu",
        dtype="float32",
        machine={"machine": "cpu"},
        copy_gb_s=10.0,
    )
    return [
        settings,
        *(
            Record(
                problem=f"p{i}",
                digest="",
                level="1",
                method=method,
                seed=0,
                concurrency=1,
                outcomes=outcomes(i < solved),
                any_right=True,
                mean_kv_tokens=float(kv),
                wall_s=kv / 100,
            )
            for method, solved, kv in (("greedy", 1, 50), ("rebase@4", 3, 200), ("ets@4", 3, 100), ("ets@16", 4, 300))
            for i in range(4)
        ),
    ]


def test_the_report_is_complete_and_self_contained() -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    page = report_page(summarise(measured()))
    outline = Outline(page)
    assert outline.tags.count("svg") == 2 and outline.tags.count("table") == 5 and "script" not in outline.tags
    assert not [link for link in outline.links if not link.startswith("#")]
    for text in ("ets@16", "ets@4 against rebase@4", "<td>KV mean</td><td>+1.00</td>", "lambda_b: 1.0", "machine: cpu"):
        assert text in page, text


def test_the_report_says_where_ets_is_behind() -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    head = "Where ETS solves fewer, by the whole interval</h2>"

    def behind(lines: list[Settings | Record]) -> str:
        return report_page(summarise(lines)).partition(head)[2].partition("<h2>")[0].strip()

    assert behind(measured()) == "<p>None.</p>"

    def with_solved(solved: int) -> list[Settings | Record]:
        """The same, but ets@4 solves so many of four problems; rebase@4 solves three."""
        return [
            one.model_copy(update={"outcomes": outcomes(int(one.problem[1:]) < solved)})
            if isinstance(one, Record) and one.method == "ets@4"
            else one
            for one in measured()
        ]

    assert behind(with_solved(2)) == "<p>None.</p>", "fewer, but the interval reaches zero"
    assert "ets@4 against rebase@4: -75.0 points (-100.0 to -25.0)" in behind(with_solved(0))


def test_a_figure_is_the_same_bytes_for_the_same_rows() -> None:
    pytest.importorskip("matplotlib", reason="the bench extra is not installed")
    rows = summarise(measured()).rows
    panel = panel_of(rows, lambda row: row.mean_kv_tokens, "KV")
    assert draw([panel]) == draw([panel])
    assert Outline(draw([panel, panel])).tags.count("svg") == 1
    with pytest.raises(ConfigError, match="nothing to draw"):
        draw([panel_of(rows, lambda row: None, "KV")])


def test_only_what_has_the_same_problems_is_joined() -> None:
    """A line says "the same, but wider"; on other problems that would be a guess."""
    rows = summarise(measured()).rows
    panel = panel_of(rows, lambda row: row.mean_kv_tokens, "KV", "all")
    ets = next(one for one in panel.series if one.family == "ets")
    assert ([point.tag for point in ets.points], ets.joined, panel.frontier) == (["4", "16"], True, True)
    assert panel.title == "all"
    fewer = [row.model_copy(update={"problems": 2}) if row.name == "ets@16" else row for row in rows]
    panel = panel_of(fewer, lambda row: row.mean_kv_tokens, "KV")
    assert not next(one for one in panel.series if one.family == "ets").joined and not panel.frontier
    narrow = panel_of([row for row in rows if row.name != "ets@16"], lambda row: row.mean_kv_tokens, "KV", "all")
    assert narrow.title == "all, width 4" and {one.points[0].tag for one in narrow.series} == {""}


def test_a_report_of_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match="nothing was measured"):
        report_page(summarise([]))


def test_the_frontier_holds_what_nothing_beats() -> None:
    assert pareto([(3, 50), (1, 30), (2, 20), (3, 40), (4, 50)]) == [(1, 30), (3, 50)]
    assert pareto([]) == []
