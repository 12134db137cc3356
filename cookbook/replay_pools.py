"""Several searches in one KV pool, as many at once as fit it: ETS's trees beside REBASE's."""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import Any

from replay import Replay, grow
from replay_floors import STRATEGIES, Shape
from replay_players import WARM_UP, Ids, attempt, token_ids
from replay_searches import Together, peak_pages, play_together

from ets_engine.kv import KVPool
from ets_engine.runtime import Runner


def play_pools(options: argparse.Namespace, runner: Runner, shape: Shape) -> dict[str, Any]:
    """Trees of every width and strategy in every KV pool; the runner's own pool is gone."""
    widths, seeds = options.widths or shape.widths, range(options.seed, options.seed + options.together)
    trees = {
        width: {
            strategy: [grow(strategy, width, shape.work, seed).cut(options.rounds) for seed in seeds]
            for strategy in STRATEGIES
        }
        for width in widths
    }
    print(f"{'pool':>10}{'width':>7}  {'trees':8}{'fit':>6}{'at once':>9}{'rows':>8}{'s':>9}", end="")
    print(f"{'tokens/s':>10}{'searches/s':>12}")
    rows: list[dict[str, Any]] = []
    for pool_tokens in options.pools:
        if attempt(f"pool of {pool_tokens} tokens", partial(use_pool, runner, pool_tokens)) is None:
            continue
        for width in widths:
            for strategy, found in play_pool(runner, trees[width], options.seed, options.repeats).items():
                rows.append({"pool_tokens": pool_tokens, "width": width, "strategy": strategy, **found})
                print_pool(rows[-1])
    ratios = compare_pools(rows)
    print(f"{'pool':>10}{'width':>7}  searches/s of ETS / REBASE")
    for one in ratios:
        print(f"{one['pool_tokens']:10}{one['width']:7}  {one['searches_per_s_ratio']:.3f}")
    return {"pools": rows, "pools_ets_over_rebase": ratios}


def play_pool(runner: Runner, trees: dict[str, list[Replay]], seed: int, repeats: int) -> dict[str, dict[str, Any]]:
    """Figures of every strategy's trees in the runner's pool, as many at once as fit; strategies are interleaved."""
    pool, vocabulary = runner.tree.pool, runner.model.config.vocab_size
    work = {
        strategy: [
            (replay, token_ids(replay, vocabulary, seed + number))
            for number, replay in enumerate(replays)
            if peak_pages(replay, pool.page_tokens) <= pool.num_pages
        ]
        for strategy, replays in trees.items()
    }
    playing = [strategy for strategy in trees if work[strategy]]
    warm_up = [(WARM_UP, token_ids(WARM_UP, vocabulary, seed))]
    first: dict[str, Together] = {}
    for strategy in playing:
        prepared = together_at_first(work[strategy], pool) if runner.uses_graphs else warm_up
        first[strategy] = play_together(runner, prepared, seed)
    runs: dict[str, list[Together]] = {strategy: [] for strategy in playing}
    for _ in range(repeats):
        for strategy in playing:
            runs[strategy].append(play_together(runner, work[strategy], seed))
    found: dict[str, dict[str, Any]] = {}
    for strategy, replays in trees.items():
        fitting = [replay for replay, _ in work[strategy]]
        found[strategy] = {"searches": len(fitting), "do_not_fit": len(replays) - len(fitting)}
        if fitting:
            found[strategy]["capturing_s"] = round(first[strategy].seconds, 3) if runner.uses_graphs else None
            found[strategy] |= describe_together(fitting, runs[strategy], pool.page_tokens)
    return found


def together_at_first(work: Sequence[tuple[Replay, Ids]], pool: KVPool) -> Sequence[tuple[Replay, Ids]]:
    """Those that fill a pool before any has ended; most graphs that the others need are captured with them."""
    ends = accumulate(peak_pages(replay, pool.page_tokens) for replay, _ in work)
    return work[: sum(end <= pool.num_pages for end in ends)]


def use_pool(runner: Runner, tokens: int) -> KVPool:
    """Give a runner an empty KV pool of so many tokens, all taken now; there need not be memory for the old one too."""
    runner.reserve(runner.config.page_tokens)
    runner.reserve(tokens)
    pool = runner.tree.pool
    assert pool.max_pages is not None
    pool.free(pool.allocate(pool.max_pages))
    return pool


def describe_together(replays: Sequence[Replay], played: Sequence[Together], page_tokens: int) -> dict[str, Any]:
    """Figures of some searches at once, from all of their runs."""
    median_s = statistics.median(one.seconds for one in played)
    last = played[-1]
    return {
        "at_once": last.at_once,
        "seconds": [round(one.seconds, 4) for one in played],
        "cpu_seconds": [round(one.cpu_seconds, 4) for one in played],
        "searches_per_s": round(len(replays) / median_s, 4),
        "tokens_per_s": round(sum(replay.generated_tokens for replay in replays) / median_s, 1),
        "passes": last.passes,
        "mean_rows": round(last.rows / last.passes, 2),
        "peak_page_slots": last.peak_pages * page_tokens,
    }


def compare_pools(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """ETS's searches per second over REBASE's, by pool and width, where all trees of both fit."""
    found = {(row["pool_tokens"], row["width"], row["strategy"]): row for row in rows if not row["do_not_fit"]}
    return [
        {
            "pool_tokens": pool_tokens,
            "width": width,
            "searches_per_s_ratio": round(row["searches_per_s"] / other["searches_per_s"], 3),
        }
        for (pool_tokens, width, strategy), row in found.items()
        if strategy == "ets" and (other := found.get((pool_tokens, width, "rebase"))) is not None
    ]


def print_pool(row: dict[str, Any]) -> None:
    """One line of the table."""
    fit = f"{row['searches']}/{row['searches'] + row['do_not_fit']}"
    print(f"{row['pool_tokens']:10}{row['width']:7}  {row['strategy']:8}{fit:>6}", end="")
    if row["searches"]:
        print(f"{row['at_once']:9}{row['mean_rows']:8.1f}{statistics.median(row['seconds']):9.2f}", end="")
        print(f"{row['tokens_per_s']:10.1f}{row['searches_per_s']:12.3f}", flush=True)
    else:
        print("  does not fit", flush=True)
