"""What people see of a search: every view drawn at fixed widths, from trees that the real loop has grown."""

import doctest
import io
import json
from dataclasses import dataclass
from functools import cache
from operator import eq

import pytest
from rich.cells import cell_len
from rich.console import Console

from ets_engine.config import SearchConfig
from ets_engine.protocols import Selection
from ets_engine.search import rank_answers, run, search, trajectories
from ets_engine.terminal import LiveProgress, progress_view, result_view, tree_view, words
from ets_engine.testing import FakePolicy, HashEmbedder, TableVerifier
from ets_engine.types import KVStats, LeafVerdict, SearchEvent, SearchResult, Step, StopReason, Timing, TraceNode

END, LENGTH, ERROR = StopReason.FINISHED, StopReason.LENGTH, StopReason.ERROR
TIMES = "\N{MULTIPLICATION SIGN}"
FINE_SPLIT = {"wall_s": 2.345, "policy_s": 1.61, "verifier_s": 0.42, "select_s": 0.0312}


def result_of(tree, config, problem="Use 4, 6, 10 and 19 to make 16.", **changes):
    """What an engine would say about a tree; the last word of a trajectory is its answer."""
    paths = trajectories(tree, config.reduce)
    candidates = rank_answers(paths, [path.text.split()[-1] for path in paths], eq, config.vote)
    steps = candidates[0].steps if candidates else ()
    kv = {
        "peak_tokens": 1234,
        "mean_tokens": 1000.4,
        "unique_tokens": tree.unique_tokens,
        "path_tokens": tree.path_tokens,
    }
    fields = {
        "problem": problem,
        "text": "".join(step.text for step in steps),
        "answer": candidates[0].answer if candidates else None,
        "score": candidates[0].score if candidates else 0.0,
        "steps": steps,
        "candidates": candidates,
        "finish_reason": "cancelled" if tree.stopped else "stop" if candidates else "length",
        "prompt_tokens": tree.prompt_tokens,
        "generated_tokens": tree.generated_tokens,
        "verifier_tokens": 4321,
        "path_tokens": sum(step.num_tokens for step in steps),
        "trajectories": len(paths),
        "num_errors": len(tree.stopped_by(ERROR)),
        "kv": KVStats(bytes_per_token=10_000, published_tokens=tree.published_tokens, **kv),
        "verifier_kv": KVStats(bytes_per_token=5000, published_tokens=None, **kv),
        "timing": Timing(bytes_moved=25_375_000_000, decode_steps=61, **FINE_SPLIT),
        "strategy": config.strategy,
        "width": config.width,
        "seed": config.seed,
        "trace": tree.trace(),
    }
    return SearchResult.model_validate({**fields, **changes})


@cache
def grown(strategy="ets", width=16):
    """A made-up search of some size."""
    config = SearchConfig(strategy=strategy, width=width, trace=True, max_steps=6)
    return result_of(run(search(config), FakePolicy(seed=3), TableVerifier(), HashEmbedder()), config)


@dataclass(frozen=True)
class Say:
    """A selector that says what it is told: (share, reward, node_cost, cluster) for every leaf at depth 1."""

    verdicts: tuple
    needs_embeddings: bool = False

    def select(self, frontier, open_width):
        if frontier.depth == 0:
            return Selection((open_width,))
        names = ("share", "reward", "node_cost", "cluster")
        verdicts = tuple(LeafVerdict(node=0, **dict(zip(names, said, strict=True))) for said in self.verdicts)
        return Selection(tuple(verdict.share for verdict in verdicts), verdicts)


def scripted(*rounds, table=None, strategy="rebase", problem="What is x?", selector=None, **changes):
    """A search whose steps and scores are given."""
    config = SearchConfig(strategy=strategy, width=len(rounds[0]), trace=True)
    policy = FakePolicy(script=[[Step(*step) for step in steps] for steps in rounds])
    tree = run(search(config, selector), policy, TableVerifier(table, default=0.5), HashEmbedder())
    return result_of(tree, config, problem, **changes)


def drawn(view, width=80, *, encoding="utf-8", color=False):
    """A view as text, line by line, trailing space cut."""
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, force_terminal=color, highlight=False, legacy_windows=False)
    console.print(view, crop=False)  # what is too wide must show
    file.flush()
    return [line.rstrip() for line in file.buffer.getvalue().decode(encoding).splitlines()]


def line_with(lines, text):
    found = [line for line in lines if text in line]
    assert len(found) == 1, (text, found)
    return found[0]


# ---- the result


def test_result_says_answer_steps_runners_up_and_every_figure():
    result = scripted(
        [("half of 8\n", 3), ("twice 8\n", 3), ("8 again\n", 3)],
        [("so 4", 2, END), ("so 16", 2, END), ("so 4", 2, END)],
        table={"half of 8\n": 0.93, "twice 8\n": 0.25, "8 again\n": 0.9, "so 4": 0.97, "so 16": 0.4},
    )
    assert (result.answer, result.candidates[0].votes) == ("4", 2)  # the fixture says what the view must show
    lines = drawn(result_view(result), 100)
    assert line_with(lines, "Problem").split()[1:] == ["What", "is", "x?"]
    at = lines.index(line_with(lines, "Answer"))
    assert lines[at].split() == ["Answer", "4"]
    assert lines[at + 1].strip() == "score 0.97 · 2 of 3 trajectories · weight 1.94"
    assert line_with(lines, "half of 8").split()[:5] == ["Steps", "1", "half", "of", "8"]
    assert line_with(lines, "half of 8").endswith("━━━━━━━━━╌  0.93")
    assert line_with(lines, "so 4").endswith("━━━━━━━━━━  0.97")
    head = lines.index(line_with(lines, "Runner-up "))
    assert lines[head].split() == ["Runner-up", "answer", "votes", "weight", "score"]
    assert lines[head + 1].split() == ["16", "1", "0.40", "0.40"]
    expected = [
        f"KV sharing {result.kv.sharing_ratio:.2f}x {result.kv.path_tokens} tokens on all paths,"
        f" {result.kv.unique_tokens} distinct",
        "KV policy 12.3 MB peak, 1,234 tokens · mean 1,000 tokens (10.0 MB)",
        "KV verifier 6.17 MB peak, 1,234 tokens · mean 1,000 tokens (5.00 MB)",
        "Bandwidth 12.5 GB/s 25.4 GB moved through memory",
        "Time 2.35 s policy 1.61 s · verifier 420 ms · selection 31 ms",
        f"Tokens {result.generated_tokens} generated · {result.generated_tokens / 2.345:.0f} per second"
        " · verifier read 4,321",
        "Search rebase width 3 · seed 0 · 3 finished",
    ]
    assert [" ".join(line.split()) for line in lines[head + 3 :]] == expected


def test_result_without_models_kv_leaves_those_lines_out():
    lines = drawn(result_view(scripted([("so 4", 2, END)], kv=None, verifier_kv=None)))
    assert not any("KV" in line for line in lines)
    assert line_with(lines, "Bandwidth")


def test_result_of_a_server_has_no_figures_in_bytes():
    known = scripted([("so 4", 2, END)])
    kv = known.kv.model_copy(update={"bytes_per_token": 0})
    timing = known.timing.model_copy(update={"bytes_moved": 0})
    lines = drawn(result_view(known.model_copy(update={"kv": kv, "verifier_kv": None, "timing": timing})))
    assert line_with(lines, "KV policy").split("  ")[-2:] == ["1,234 tokens", "peak · mean 1,000 tokens"]
    assert not any(" B" in line or "Bandwidth" in line for line in lines[-7:])


def test_result_stopped_early_says_so():
    result = scripted([("so 4", 2, END)], finish_reason="cancelled")
    assert any("stopped early: the best so far" in line for line in drawn(result_view(result)))
    assert not any("stopped early" in line for line in drawn(result_view(scripted([("so 4", 2, END)]))))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"finish_reason": "cancelled", "trajectories": 0}, "stopped before any trajectory finished"),
        ({"finish_reason": "cancelled"}, "stopped early: 1 trajectory finished, none with a legible answer"),
        ({"finish_reason": "error", "num_errors": 3}, "every branch failed (3 errors)"),
        ({"finish_reason": "no_answer", "trajectories": 1}, "1 trajectory finished, none with a legible answer"),
        ({"finish_reason": "length", "trajectories": 0}, "every branch ran out of tokens"),
    ],
)
def test_result_without_an_answer_says_why_and_shows_the_best_path(changes, reason):
    result = scripted([("so 4", 2, END)], answer=None, candidates=(), **changes)
    lines = drawn(result_view(result))
    assert line_with(lines, "Answer").split() == ["Answer", "none"]
    assert line_with(lines, reason)
    assert line_with(lines, "Best path").split()[2:5] == ["1", "so", "4"]
    assert not any("Runner" in line for line in lines)


def test_a_step_without_text_is_told_as_such():
    steps = [{"text": "\n", "score": 0.5, "num_tokens": 1}]
    assert line_with(drawn(result_view(scripted([("so 4", 2, END)], steps=steps))), "1  (no text)")


def test_many_runners_up_are_cut_short():
    steps = [(f"so {number}", 2, END) for number in range(9)]
    lines = drawn(result_view(scripted(steps)))
    assert line_with(lines, "3 more")
    assert len([line for line in lines if line.strip().endswith("1    0.50   0.50")]) == 5


# ---- the tree


def test_tree_marks_every_fate_and_says_why_without_colour():
    result = scripted(
        [("kept\n", 2), ("poor\n", 2), ("done 1", 2, END), ("long", 2, LENGTH), ("", 0, ERROR), ("kept\n", 2)],
        [("win 2", 2, END), ("lose 3", 2, END), ("also 4", 2, END)],
        table={"kept\n": 0.95, "poor\n": 0.01, "done 1": 0.2, "win 2": 0.99, "lose 3": 0.3, "also 4": 0.4},
        selector=Say(((2, 0.5, 0.1, -1), (0, 0.02, 0.3, -1), (1, 0.25, 0.1, -1))),
    )
    lines = drawn(tree_view(result), 120)
    assert lines[0].split() == ["What", "is", "x?", "score", "share", "reward", "cost", "why"]
    assert lines[1].startswith(f"├ ★ kept {TIMES}2  ")
    assert lines[1].split()[4:] == ["0.95", "3", "≤0.500", "0.100"]
    assert lines[2].startswith("│ ├ ★ win 2") and lines[2].endswith("  0.99")
    assert lines[3].startswith("│ ├ ◆ also 4") and lines[4].startswith("│ └ ◆ lose 3")
    assert lines[5].startswith("├ ◆ done 1") and lines[5].endswith("  0.20")
    assert lines[6].split() == ["├", "~", "long"]
    assert lines[7].split() == ["├", "!", "failed"]
    assert lines[8].split() == ["└", "✗", "poor", "0.01", "0.020", "0.300", "cost", ">", "reward"]
    assert lines[10:] == [
        "★ path to the answer   ● 2 kept   ✗ 1 pruned   ◆ 4 finished   ~ 1 out of tokens   ! 1 failed",
        "share: children granted · reward: part of the width it earned · cost: price of the KV it adds",
    ]


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ((0, 0.1, 0.2, -1), "cost > reward"),
        ((0, 0.1, 0.2, 7), "cost > reward, cluster 7 kept"),
        ((0, 0.1, 0.2, 6), "cost > reward"),
        ((0, 0.3, 0.2, 7), "path not worth its KV, cluster 7 kept"),
        ((0, 0.1, 0.0, -1), "share too small"),
        ((0, 0.0, 0.0, -1), "others scored higher"),
    ],
)
def test_why_a_branch_was_pruned(said, reason):
    steps = [("a\n", 1), ("b\n", 1)]
    result = scripted(steps, [("so 1", 1, END)] * 2, selector=Say(((2, 0.5, 0.1, 7), said)))
    assert line_with(drawn(tree_view(result), 120), "✗ b").endswith(f"  {reason}")
    assert "why" not in drawn(tree_view(result), 80)[0]  # the figures must do


def test_tree_of_a_stopped_search_shows_undecided_branches_and_the_best_path():
    config = SearchConfig(strategy="ets", width=2, trace=True)
    policy = FakePolicy(script=[[Step("left\n", 2), Step("right\n", 2)]])
    asked = iter([False] * 5 + [True])  # stopped where the selector is about to ask for embeddings
    tree = run(search(config), policy, TableVerifier(default=0.5), should_stop=lambda: next(asked))
    assert tree.stopped and len(tree) == 3
    steps = [{"text": "left\n", "score": 0.5, "num_tokens": 2}]
    lines = drawn(tree_view(result_of(tree, config, "x", steps=steps)))
    assert line_with(lines, "right").startswith("└ ○ right")
    assert line_with(lines, "left").startswith("├ ★ left")
    assert lines[-2] == "★ best path   ○ 2 undecided"


B_PATH = [("b\n", 0.6), ("c\n", 0.5), ("so 1", 0.5)]


def test_equal_siblings_of_the_same_fate_share_one_row_and_their_children():
    result = scripted(
        [("a\n", 2), ("a\n", 2), ("b\n", 2), ("a\n", 2)],
        [("c\n", 1), ("c\n", 1), ("c\n", 1), ("d\n", 1)],
        [("so 1", 1, END)] * 4,
        table={"b\n": 0.6},
        strategy="best_of_n",
        steps=[{"text": text, "score": score, "num_tokens": 1} for text, score in B_PATH],
    )
    lines = drawn(tree_view(result))
    rows = [line.split("      ")[0] for line in lines[1:-3]]
    # three a's below the root: two go on with c, one with d; b goes on with c
    assert rows == [
        "├ ★ b",
        "│ └ ★ c",
        "│   └ ★ so 1",
        f"└ ● a {TIMES}3",
        f"  ├ ● c {TIMES}2",
        f"  │ └ ◆ so 1 {TIMES}2",
        "  └ ● d",
        "    └ ◆ so 1",
    ]


def test_equal_text_of_another_fate_stays_apart():
    result = scripted(
        [("a\n", 2), ("a\n", 2), ("b\n", 2)],
        [("so 1", 1, END)] * 3,
        table={"a\n": 0.9, "b\n": 0.8},
        strategy="beam",  # keeps 1 of 3
    )
    lines = drawn(tree_view(result), 120)
    assert [line.split()[:3] for line in lines[1:5]] == [
        ["├", "★", "a"],
        ["│", "└", "★"],
        ["├", "✗", "a"],
        ["└", "✗", "b"],
    ]
    assert line_with(lines, "✗ a").endswith("others scored higher")


def test_long_tails_of_siblings_share_one_row():
    ends = [(f"so {number}", 1, END) for number in range(9)]
    table = {f"so {number}": number / 10 for number in range(9)}
    lines = drawn(tree_view(scripted(ends, table=table)))
    assert [line.split()[1:4] for line in lines[1:6]] == [
        ["★", "so", "8"],
        ["◆", "so", "7"],
        ["◆", "so", "6"],
        ["◆", "so", "5"],
        ["◆", "5", "more"],
    ]
    assert lines[5].startswith("└ ") and "≤0.40" in lines[5]

    roots = [(f"r{number:02}\n", 1) for number in range(20)]
    leaves = [(f"so {number}", 1, END) for number in range(20)]
    lines = drawn(tree_view(scripted(roots, leaves, strategy="best_of_n")))
    assert line_with(lines, "more").split()[:6] == ["└", "●", "12", "more,", "12", "below"]
    assert line_with(lines, "path to the answer").endswith("● 20 kept   ◆ 20 finished")  # nothing is lost in the sums


@pytest.mark.parametrize("cells", [50, 80, 120, 200])
@pytest.mark.parametrize(
    ("strategy", "width"), [("greedy", 1), ("best_of_n", 64), ("beam", 16), ("rebase", 16), ("ets", 16), ("ets", 64)]
)
def test_every_view_fits_its_terminal(strategy, width, cells):
    result = grown(strategy, width)
    for view in (result_view(result), tree_view(result)):
        assert max(map(cell_len, drawn(view, cells))) <= cells


def test_a_narrow_terminal_keeps_the_text_and_drops_figures():
    result = grown("ets", 16)
    assert drawn(tree_view(result), 71)[0].split()[-2:] == ["score", "share"]
    assert drawn(tree_view(result), 72)[0].split()[-1] == "cluster"


def test_every_node_is_told_in_the_sums_of_a_real_search():
    result = grown("ets", 64)
    sums = line_with(drawn(tree_view(result), 200), "path to the answer")
    numbers = [int(word.replace(",", "")) for word in sums.split() if word[0].isdigit()]
    assert sum(numbers) == len(result.trace) - 1
    assert "cluster" in drawn(tree_view(result))[0]


def test_a_thousand_steps_are_drawn_and_leave_room_for_the_text():
    share = LeafVerdict(node=0, share=1)
    trace = [
        TraceNode(
            id=depth,
            parent=depth - 1,
            depth=depth,
            text=f"step {depth}\n",
            num_tokens=1,
            step_score=0.5,
            stop=StopReason.BOUNDARY,
            verdict=share,
        )
        for depth in range(1001)
    ]
    lines = drawn(tree_view(scripted([("so 1", 1, END)], trace=trace)))
    assert lines[1].startswith("└ ● step 1 ")
    assert line_with(lines, "step 998 ").startswith("⋯ ")
    assert max(map(cell_len, lines)) <= 80


def test_tree_needs_a_trace():
    with pytest.raises(ValueError, match="trace=True"):
        tree_view(scripted([("so 1", 1, END)], trace=None))


# ---- text of a model cannot harm a terminal


HOSTILE = "[bold red]no[/] [/nope] \x1b[2J\x1b]0;title\x07 :smile: \u202eevil\x00 [link=x]y"
SHOWN = "[bold red]no[/] [/nope] :smile: evil [link=x]y"


def test_markup_and_escapes_in_texts_are_shown_not_obeyed():
    result = scripted([(f"so {HOSTILE}\n", 3)], [(f"{HOSTILE} [b]4", 3, END)], problem=HOSTILE, answer=HOSTILE)
    event = SearchEvent.model_validate({**EVENT, "common_text": HOSTILE})
    for view in (result_view(result), tree_view(result), progress_view(event, elapsed_s=1.0, width=4)):
        text = "\n".join(drawn(view, 160))
        assert SHOWN in " ".join(text.split())
        assert not set(text) & set("\x1b\x07\x00\u202e")
        assert "\x1b[2J" not in "\n".join(drawn(view, 160, color=True))


def test_long_and_wide_texts_are_cut_in_the_tree_and_whole_in_the_result():
    long = "漢字" * 60
    result = scripted([(f"{long} 4", 3, END)], problem=long)
    assert all(cell_len(line) <= 80 for line in drawn(tree_view(result)))
    assert "…" in drawn(tree_view(result))[1]
    shown = "".join(drawn(result_view(result)))
    assert shown.count("漢") == 120  # problem and step, whole


def test_an_ascii_terminal_gets_ascii():
    result = scripted(
        [("kept\n", 2), ("poor\n", 2), ("kept\n", 2)],
        [("win 2", 2, END), ("lose 3", 2, END), ("also 4", 2, END)],
        table={"win 2": 0.9},
        selector=Say(((2, 0.5, 0.1, 0), (0, 0.02, 0.3, 0), (1, 0.25, 0.1, 0))),
    )
    lines = drawn(tree_view(result), encoding="ascii") + drawn(result_view(result), encoding="ascii")
    lines += drawn(progress_view(SearchEvent(**EVENT), elapsed_s=1.0, width=4, ascii_only=True), encoding="ascii")
    assert line_with(lines, "kept x2").split() == ["+", "*", "kept", "x2", "0.50", "3", "<0.500", "0.100", "0"]
    assert line_with(lines, "x poor").startswith("` x poor")
    assert line_with(lines, "#########.  0.90")


# ---- progress

EVENT = {
    "kind": "step",
    "depth": 3,
    "frontier": 12,
    "kept": 5,
    "pruned": 7,
    "finished": 2,
    "best_score": 0.934,
    "kv_unique_tokens": 512,
    "kv_path_tokens": 2048,
    "generated_tokens": 1200,
    "common_text": "19-4=15 left\n6 10 15\n",
}


def test_progress_says_where_the_search_is():
    lines = drawn(progress_view(SearchEvent(**EVENT), elapsed_s=25.0, event_s=12.5, width=16))
    assert lines[0].split() == ["⠋", "Searching", "·", "depth", "3", "25.0", "s"]
    assert [line.split(maxsplit=1)[1] for line in lines[1:4]] == [
        "12 open · 5 kept · 7 pruned · best score 0.93",
        "2 of 16",
        "1,200 generated (96 tokens/s)",
    ]
    assert lines[4].strip() == "KV cache  512 tokens, 2,048 without sharing"
    assert lines[5].strip() == "settled   19-4=15 left 6 10 15"
    assert len(lines) == 6


def test_progress_before_anything_happened_and_while_stopping():
    begun = SearchEvent.model_validate({**EVENT, "kind": "start", "depth": 0})
    for event in (None, begun):
        assert [line.split() for line in drawn(progress_view(event, elapsed_s=0.5, width=16))] == [
            ["⠼", "Searching", "500", "ms"]
        ]
    stopping = drawn(progress_view(SearchEvent(**EVENT), elapsed_s=0.0, width=16, stopping=True))
    assert "Stopping" in stopping[0] and "Ctrl-C again aborts" in stopping[0]


def test_live_progress_rates_tokens_over_the_time_in_which_they_came():
    times_s = iter([10.0, 15.0, 99.0])  # made, told, drawn
    progress = LiveProgress(Console(file=io.StringIO()), width=16, clock=lambda: next(times_s))
    progress.update(SearchEvent(**EVENT))
    lines = drawn(progress)
    assert line_with(lines, "240 tokens/s") and lines[0].endswith("1 min 29 s")


def test_live_progress_draws_on_a_terminal_and_leaves_nothing_elsewhere():
    terminal, pipe = io.StringIO(), io.StringIO()
    for file, is_terminal in ((terminal, True), (pipe, False)):
        console = Console(file=file, width=80, force_terminal=is_terminal, legacy_windows=False)
        with LiveProgress(console, width=16) as progress:
            progress.update(SearchEvent(**EVENT))
    assert "depth 3" in terminal.getvalue()
    assert terminal.getvalue().endswith("\x1b[2K")  # the last thing it does is to wipe its lines
    assert pipe.getvalue() == ""


# ---- words


def test_docstring_examples():
    assert doctest.testmod(words).failed == 0


@pytest.mark.parametrize(
    ("read", "value", "shown"),
    [
        (words.size, 0, "0 B"),
        (words.size, 999.4, "999 B"),
        (words.size, 999.6, "1.00 kB"),
        (words.size, 999_950, "1.00 MB"),
        (words.size, 5e15, "5000 TB"),
        (words.seconds, 0.0, "0 ms"),
        (words.seconds, 0.9996, "1.00 s"),
        (words.seconds, 59.96, "1 min 0 s"),
        (words.seconds, 7260.0, "2 h 1 min"),
        (words.count, 999.5, "1,000"),
    ],
)
def test_units_at_their_edges(read, value, shown):
    assert read(value) == shown


def test_results_survive_json_so_a_saved_one_can_be_drawn():
    result = grown("ets", 16)
    again = SearchResult.model_validate(json.loads(result.model_dump_json()))
    assert drawn(tree_view(again)) == drawn(tree_view(result))
