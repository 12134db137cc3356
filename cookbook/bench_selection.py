"""How long one selection takes: every selector on synthetic trees grown by REBASE; no model is involved.

    python cookbook/bench_selection.py [--widths 16 64 256] [--depth 10] [--trees 15] [--repeats 3] [--seed 0]

Scores are Beta(2, 2), steps have 50 to 256 tokens, embeddings are noisy copies of width / 4 random directions. A
selection is all that the loop does between two model calls: build the frontier from the tree, then select (clustering
included). Medians and spreads are over every repeat on every tree, after one warm-up each; where the wall time is far
above the CPU time, the machine was busy with something else. Prints a table, then one JSON line, and appends that line
to `results/bench_selection.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ets_engine.evaluation.machine import provenance
from ets_engine.protocols import Frontier, Selector
from ets_engine.search import Beam, BeamSqrt, Dora, Dvts, Ets, EtsKv, Rebase, SearchTree, build_frontier
from ets_engine.types import Step

RESULTS = Path(__file__).parent / "results" / "bench_selection.jsonl"
EMBEDDING_DIM = 768
NOISE = 0.25  # length of the noise beside a direction of length 1

SELECTORS: dict[str, Selector] = {
    "beam": Beam(),
    "beam_sqrt": BeamSqrt(),
    "dvts": Dvts(),
    "rebase": Rebase(),
    "dora": Dora(),
    "ets_kv": EtsKv(),
    "ets": Ets(),
    "ets_published": Ets(published=True, cluster_cut=0.05),
    "ets_kv_budget": EtsKv(kv_budget_tokens=1),  # 1 stands in for a budget made per tree, below
    "ets_budget": Ets(kv_budget_tokens=1),
}


def grow_tree(width: int, depth: int, rng: np.random.Generator) -> tuple[SearchTree, Frontier]:
    """A tree whose last round has `width` open leaves, and the frontier with embeddings."""
    tree = SearchTree(prompt_tokens=200)
    for _ in range(depth):
        leaves = tree.frontier
        shares = Rebase().select(build_frontier(tree, leaves), width).shares
        parents = [leaf for leaf, share in zip(leaves, shares, strict=True) for _ in range(share)]
        steps = [Step("step", int(tokens)) for tokens in rng.integers(50, 257, len(parents))]
        children = range(len(tree), len(tree) + len(parents))
        tree.grow(children, parents, steps, rng.beta(2, 2, len(parents)).tolist())
    directions = rng.standard_normal((max(1, width // 4), EMBEDDING_DIM)) / EMBEDDING_DIM**0.5
    noise = NOISE * rng.standard_normal((width, EMBEDDING_DIM)) / EMBEDDING_DIM**0.5
    embeddings = directions[rng.integers(0, len(directions), width)] + noise  # [L, D]
    return tree, build_frontier(tree, tree.frontier, max_step_tokens=256, embeddings=embeddings.astype(np.float32))


def measure(name: str, width: int, grown: list[tuple[SearchTree, Frontier]], repeats: int) -> dict[str, Any]:
    """Milliseconds from tree to shares: median, p20 and p80 over all trees and repeats; the frontier's part apart."""
    times_ms: list[float] = []
    frontier_ms: list[float] = []
    cpu_ms: list[float] = []
    kept: list[int] = []
    for tree, seen in grown:
        selector = SELECTORS[name]
        if isinstance(selector, Ets) and selector.kv_budget_tokens:  # room for the whole width and a third of the tree
            selector = replace(selector, kv_budget_tokens=width * 256 + sum(seen.num_tokens) // 3)
        for repeat in range(1 + repeats):
            started_cpu_s, started_s = time.process_time(), time.perf_counter()
            frontier = build_frontier(tree, tree.frontier, max_step_tokens=256, embeddings=seen.embeddings)
            built_s = time.perf_counter()
            shares = selector.select(frontier, width).shares
            ended_s, ended_cpu_s = time.perf_counter(), time.process_time()
            if repeat == 0:  # warm-up
                kept.append(sum(share > 0 for share in shares))
                continue
            times_ms.append(1e3 * (ended_s - started_s))
            cpu_ms.append(1e3 * (ended_cpu_s - started_cpu_s))
            frontier_ms.append(1e3 * (built_s - started_s))
    p20_ms, p80_ms = np.percentile(times_ms, [20, 80]).tolist()
    return {
        "selector": name,
        "width": width,
        "median_ms": round(statistics.median(times_ms), 3),
        "p20_ms": round(p20_ms, 3),
        "p80_ms": round(p80_ms, 3),
        "median_cpu_ms": round(statistics.median(cpu_ms), 3),
        "build_frontier_ms": round(statistics.median(frontier_ms), 3),
        "mean_kept": round(statistics.mean(kept), 1),
    }


def main() -> None:
    """Measure, print, record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64, 256])
    parser.add_argument("--depth", type=int, default=10)
    parser.add_argument("--trees", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = np.random.default_rng(options.seed)
    rows: list[dict[str, Any]] = []
    print(f"{'selector':<16}{'width':>6}{'median ms':>11}{'p20':>9}{'p80':>9}{'cpu':>9}{'frontier':>10}{'kept':>7}")
    for width in options.widths:
        grown = [grow_tree(width, options.depth, rng) for _ in range(options.trees)]
        for name in SELECTORS:
            row = measure(name, width, grown, options.repeats)
            rows.append(row)
            print(
                f"{name:<16}{width:>6}{row['median_ms']:>11.3f}{row['p20_ms']:>9.3f}{row['p80_ms']:>9.3f}"
                f"{row['median_cpu_ms']:>9.3f}{row['build_frontier_ms']:>10.3f}{row['mean_kept']:>7.1f}"
            )
    line = json.dumps(
        {
            **provenance(),
            "seed": options.seed,
            "depth": options.depth,
            "trees": options.trees,
            "repeats": options.repeats,
            "rows": rows,
        }
    )
    print(line)
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a") as results:
        results.write(line + "\n")


if __name__ == "__main__":
    main()
