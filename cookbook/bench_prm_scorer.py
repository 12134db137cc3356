"""A PRM as a plain verifier: tokens read and seconds where it keeps what it read, and where every call begins anew.

Searches of the shipped policy, judged by the shipped PRM as a function of problem and paths (`PrmScorer`), as for a
policy that runs elsewhere. Each call is answered twice, by one that goes on from the calls before and by one that
forgets them; both read what paths of one call share once. Prints a line for each family and level, then one JSON line,
which it appends to `results/bench_prm_scorer.jsonl`.

    python cookbook/bench_prm_scorer.py                          # two minutes on one core
    python cookbook/bench_prm_scorer.py --searches 1 --width 4   # seconds; writes no row
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ets_engine import ETSEngine, SearchConfig
from ets_engine.evaluation.machine import provenance
from ets_engine.models import PrmScorer
from ets_engine.reference.problems import generate_problems

RESULTS = Path(__file__).parent / "results" / "bench_prm_scorer.jsonl"
LEVELS = {"countdown": (4, 6), "story": (4, 8, 10)}


class BothSides:
    """Answers every call twice; the scores are those of the scorer that keeps what it read."""

    def __init__(self) -> None:
        self.scorers = {side: PrmScorer.from_pretrained("reference") for side in ("kept", "anew")}
        self.seconds = dict.fromkeys(self.scorers, 0.0)
        self.calls = 0
        self.largest_gap = 0.0

    @property
    def tokens(self) -> dict[str, int]:
        """Read so far by each side (counts)."""
        return {side: scorer._runner.stats.tokens for side, scorer in self.scorers.items()}

    def score_many(self, problem: str, paths: Sequence[Sequence[str]]) -> list[float]:
        """As `PrmScorer.score_many`."""
        self.calls += 1
        found: dict[str, list[float]] = {}
        for side in sorted(self.scorers, reverse=self.calls % 2 == 0):  # who comes second finds warmer caches
            began_s = time.perf_counter()
            found[side] = self.scorers[side].score_many(problem, paths)
            self.seconds[side] += time.perf_counter() - began_s
        forgetful = self.scorers["anew"]
        while forgetful._readings:
            forgetful._readings.pop().verifier.close()
        gaps = (abs(one - other) for one, other in zip(found["kept"], found["anew"], strict=True))
        self.largest_gap = max(self.largest_gap, *gaps)
        return found["kept"]


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=20, help="of each family and level")
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rows: list[dict[str, Any]] = []
    with ETSEngine.from_pretrained("reference") as engine:
        for family, levels in LEVELS.items():
            for level in levels:
                sides = BothSides()
                for number, one in enumerate(generate_problems(family, level, options.seed, options.searches)):
                    config = SearchConfig(width=options.width, seed=options.seed + number)
                    engine.search(one.problem, config, verifier=sides)
                tokens, seconds = sides.tokens, sides.seconds
                rows.append(
                    {
                        "family": family,
                        "level": level,
                        "calls": sides.calls,
                        "tokens": tokens,
                        "seconds": {side: round(spent, 3) for side, spent in seconds.items()},
                        "times_fewer_tokens": round(tokens["anew"] / tokens["kept"], 2),
                        "times_faster": round(seconds["anew"] / seconds["kept"], 2),
                        "largest_gap": sides.largest_gap,
                    }
                )
                print(
                    f"{family} of level {level}: {rows[-1]['times_fewer_tokens']} x fewer tokens, "
                    f"{rows[-1]['times_faster']} x faster over {sides.calls} calls; scores differ by at most "
                    f"{sides.largest_gap:.1e}"
                )
    report = {
        "bench": "prm_scorer",
        "width": options.width,
        "searches": options.searches,
        "rows": rows,
        **provenance(),
        "seed": options.seed,
    }
    print(json.dumps(report))
    if options.searches >= 10:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(report) + "\n")
    return report


if __name__ == "__main__":
    main()
