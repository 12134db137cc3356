"""What the host does for a decode pass that is a CUDA graph, measured without a GPU: tokens, layout, work list.

Trees of REBASE and ETS as in `bench_search.py`, and no model: tokens are appended, the pass is laid out and its work
list made for a GPU of 132 multiprocessors; what a GPU would be asked to do is left out. Work lists that go on from pass
to pass stand beside those that are made anew in each. Prints milliseconds a pass and a JSON line, which it appends to
`results/bench_passes.jsonl`.

    python cookbook/bench_passes.py                           # half a minute on one core
    python cookbook/bench_passes.py --width 4 --rounds 1      # seconds; writes no row
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from replay import Replay, grow
from replay_floors import STRATEGIES
from replay_players import token_ids
from replay_searches import walk

from ets_engine.attention import kernel
from ets_engine.evaluation.machine import provenance
from ets_engine.kv import DecodeLayoutBuilder, KVPool, LayerShape, LayoutBuilder, PrefixTree, decode
from ets_engine.runtime.graphs import Graphs, PassGraphs, round_rows
from ets_engine.runtime.passes import KERNEL_MIN_SAVED_TOKENS

RESULTS = Path(__file__).parent / "results" / "bench_passes.jsonl"
PROCESSORS = 132  # of an H100
HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128  # of Llama-3.1-8B; fewer layers or smaller heads change nothing here
PARTS = ("append", "layout", "work list")


def play(replay: Replay, seed: int) -> dict[str, float]:
    """Milliseconds a decode pass by part, and how many passes and layouts there were."""
    pool = KVPool(
        [LayerShape(KV_HEADS, HEAD_DIM)], dtype=torch.bfloat16, initial_tokens=1 << 17
    )  # which hold both trees
    tree = PrefixTree(pool)
    layouts = DecodeLayoutBuilder(LayoutBuilder(tree, min_saved_tokens=KERNEL_MIN_SAVED_TOKENS))
    passes = PassGraphs(Graphs(), None, pool, [None], HEADS)
    seconds, counts = Counter[str](), Counter[str]()
    for wanted in walk(tree, replay, token_ids(replay, 1000, seed), owner=0):
        rows = [(handle, len(ids)) for handle, ids in wanted.rows]
        if any(count > 1 for _, count in rows):
            tree.append_each(rows)
        elif rows:
            times = [time.perf_counter()]
            tree.append_each(rows)
            times.append(time.perf_counter())
            layout = layouts.build([handle for handle, _ in rows])
            times.append(time.perf_counter())
            passes._plan(layout, round_rows(len(rows)))  # all of `run` that is done before a graph is filled
            times.append(time.perf_counter())
            for part, began_s, ended_s in zip(PARTS, times, times[1:], strict=False):
                seconds[part] += ended_s - began_s
            counts["passes"] += 1
            counts["laid_out"] += layout.pieces is not None
    return {part: 1e3 * seconds[part] / counts["passes"] for part in PARTS} | counts


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5, help="times that each side plays each tree, in turns")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    trees = {strategy: grow(strategy, options.width, seed=options.seed) for strategy in STRATEGIES}
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    with patch.object(kernel, "processors_of", lambda _: PROCESSORS):
        for _ in range(options.rounds):
            for strategy, replay in trees.items():
                for side, spare in (("anew", 0), ("goes on", decode.SPARE_TOKENS)):
                    with patch.object(decode, "SPARE_TOKENS", spare):
                        found.setdefault((strategy, side), []).append(play(replay, options.seed))
    sides: dict[str, dict[str, Any]] = {}
    print(f"{'tree':8} {'work lists':10} {'append':>8} {'layout':>8} {'list':>8} {'ms a pass':>10}   made anew")
    for (strategy, side), runs in found.items():
        row: dict[str, Any] = {part: round(statistics.median(run[part] for run in runs), 3) for part in PARTS}
        totals = [sum(run[part] for part in PARTS) for run in runs]
        row |= {"ms": round(statistics.median(totals), 3), "spread": [round(min(totals), 3), round(max(totals), 3)]}
        row |= {name: runs[0][name] for name in ("passes", "laid_out")}
        sides.setdefault(strategy, {})[side] = row
        columns = " ".join(f"{row[part]:8.3f}" for part in PARTS)
        print(f"{strategy:8} {side:10} {columns} {row['ms']:10.3f}   {row['laid_out']} of {row['passes']}")
    ratios = {strategy: round(both["anew"]["ms"] / both["goes on"]["ms"], 2) for strategy, both in sides.items()}
    print("times less: " + ", ".join(f"{strategy} {ratio}" for strategy, ratio in ratios.items()))
    report = {
        "bench": "passes",
        "width": options.width,
        "rounds": options.rounds,
        "trees": sides,
        "ratio": ratios,
        **provenance(),
        "seed": options.seed,
    }
    print(json.dumps(report))
    if options.width >= 64:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(report) + "\n")
    return report


if __name__ == "__main__":
    main()
