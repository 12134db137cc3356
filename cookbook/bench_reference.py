"""How well and how cheaply the shipped models solve fresh held-out problems, method by method, on the same problems.

    python cookbook/bench_reference.py --count 200 --jobs 2

Prints a table per family and level, then appends one JSON row per family to `cookbook/results/bench_reference.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from provenance import provenance
from rich.console import Console
from rich.table import Table

from ets_engine.config import SearchConfig
from ets_engine.reference.problems import FAMILIES, ReferenceProblem, generate_problems, is_solved
from ets_engine.types import Candidate, SearchResult, StopReason

RESULTS = Path(__file__).parent / "results" / "bench_reference.jsonl"


@dataclass(frozen=True, slots=True)
class Method:
    """A search, and the votes over its trajectories that are reported."""

    strategy: str
    width: int
    votes: tuple[str, ...] = ("weighted",)

    @property
    def label(self) -> str:
        """Name without the vote."""
        return self.strategy if self.strategy == "greedy" else f"{self.strategy}@{self.width}"


METHODS = (
    Method("greedy", 1),
    Method("best_of_n", 16, ("majority", "weighted", "best")),
    Method("beam", 16),
    Method("rebase", 16),
    Method("ets_published", 16),
    Method("ets_kv", 16),
    Method("ets", 16),
    Method("best_of_n", 64, ("majority", "weighted")),
    Method("rebase", 64),
    Method("ets_published", 64),
    Method("ets", 64),
)
RANK = {"majority": lambda c: (c.votes, c.weight), "weighted": lambda c: c.weight, "best": lambda c: c.score}


def text_of(candidate: Candidate) -> str:
    """The candidate's best trajectory."""
    return "".join(step.text for step in candidate.steps)


def some_right(problem: str, result: SearchResult) -> bool:
    """Whether any finished trajectory is right."""
    assert result.trace is not None
    texts: dict[int, str] = {}
    for node in result.trace:
        texts[node.id] = texts.get(node.parent, "") + node.text
    return any(is_solved(problem, texts[node.id]) for node in result.trace if node.stop is StopReason.FINISHED)


def measure(problem: ReferenceProblem, method: Method, seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    """One search: who was right, and what it cost."""
    config = SearchConfig(
        strategy=method.strategy, width=method.width, seed=seed, trace=True, n_candidates=method.width, **settings
    )
    result = ENGINE.search(problem.problem, config)
    assert result.kv is not None
    row: dict[str, Any] = {
        "method": method.label,
        "level": problem.level,
        "any": some_right(problem.problem, result),
        "mean_kv": result.kv.mean_tokens,
        "peak_kv": result.kv.peak_tokens,
        "published_kv": result.kv.published_tokens,
        "sharing": result.kv.sharing_ratio,
        "generated": result.generated_tokens,
        "seconds": result.timing.wall_s,
        "gb_s": result.timing.bandwidth_gb_s,
    }
    for vote in method.votes:
        winner = max(result.candidates, key=RANK[vote], default=None)
        row[vote] = winner is not None and is_solved(problem.problem, text_of(winner))
    return row


def start_worker() -> None:
    """Load the models once per process, one thread each."""
    import torch

    from ets_engine.service import ETSEngine

    global ENGINE
    torch.set_num_threads(1)
    ENGINE = ETSEngine.from_pretrained("reference")


def work(job: tuple[ReferenceProblem, Method, int, dict[str, Any]]) -> dict[str, Any]:
    """`measure`, for a pool."""
    return measure(*job)


def summarise(rows: list[dict[str, Any]], method: Method) -> list[dict[str, Any]]:
    """One line per vote: accuracy in %, its standard error, and mean costs."""
    found = []
    for vote in method.votes:
        right = [row[vote] for row in rows]
        share = statistics.mean(right)
        solvable = [row[vote] for row in rows if row["any"]]
        found.append(
            {
                "method": method.label if len(method.votes) == 1 else f"{method.label} {vote}",
                "accuracy": 100 * share,
                "error": 100 * math.sqrt(share * (1 - share) / len(right)),
                "any": 100 * statistics.mean(row["any"] for row in rows),
                "selection": 100 * statistics.mean(solvable) if solvable else 0.0,
                **{
                    name: statistics.mean(row[name] for row in rows)
                    for name in ("mean_kv", "peak_kv", "published_kv", "sharing", "generated", "gb_s")
                },
                "seconds": statistics.median(row["seconds"] for row in rows),
                "right": "".join("01"[solved] for solved in right),  # per problem, for paired comparisons
            }
        )
    return found


def show(console: Console, title: str, lines: list[dict[str, Any]]) -> None:
    """Print one table."""
    table = Table(title=title)
    heads = ("method", "accuracy %", "+-", "any %", "selection %", "mean KV", "peak KV", "published KV", "sharing",
             "generated", "median s", "GB/s")  # fmt: skip
    for head in heads:
        table.add_column(head, justify="left" if head == "method" else "right")
    for line in lines:
        table.add_row(
            line["method"],
            *(f"{line[name]:.1f}" for name in ("accuracy", "error", "any", "selection")),
            *(f"{line[name]:.0f}" for name in ("mean_kv", "peak_kv", "published_kv")),
            f"{line['sharing']:.2f}",
            f"{line['generated']:.0f}",
            f"{line['seconds']:.3f}",
            f"{line['gb_s']:.1f}",
        )
    console.print(table)


def main() -> None:
    """Measure and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=sorted(FAMILIES), nargs="*", default=sorted(FAMILIES))
    parser.add_argument("--level", type=int)
    parser.add_argument("--count", type=int, default=200, help="problems per family")
    parser.add_argument("--seed", type=int, default=2026)
    parser.add_argument("--methods", nargs="*", help="strategy@width, default: all of the table")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="search settings, e.g. lambda_b=0.5")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="append no row")
    args = parser.parse_args()
    settings = {name: json.loads(value) for name, value in (pair.split("=") for pair in args.set)}
    methods = [method for method in METHODS if not args.methods or method.label in args.methods]
    console = Console(width=140)
    with multiprocessing.get_context("spawn").Pool(args.jobs, initializer=start_worker) as pool:
        for family in args.family:
            began = time.time()
            problems = list(generate_problems(family, args.level, args.seed, args.count))
            lines: list[dict[str, Any]] = []
            by_level: dict[str, list[dict[str, Any]]] = {}
            for method in methods:
                jobs = [(problem, method, args.seed + place, settings) for place, problem in enumerate(problems)]
                rows = pool.map(work, jobs, chunksize=4)
                lines += summarise(rows, method)
                for level in sorted({row["level"] for row in rows}):
                    at_level = [row for row in rows if row["level"] == level]
                    by_level.setdefault(str(level), []).extend(summarise(at_level, method))
            title = f"{family}, {len(problems)} problems, {settings or 'default settings'}, {time.time() - began:.0f} s"
            show(console, title, lines)
            for level, part in by_level.items():
                shares = (f"{line['method']} {line['accuracy']:.0f}" for line in part)
                console.print(f"level {level}: {', '.join(shares)}", highlight=False)
            if not args.dry:
                row = {"bench": "reference", "family": family, "level": args.level, "count": len(problems)}
                row |= {"seed": args.seed, "settings": settings, **provenance(), "lines": lines, "by_level": by_level}
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as out:
                    out.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
