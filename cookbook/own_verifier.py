"""Recipe: any function of the problem and the steps so far can judge them; here, the exact checker, as an upper bound.

A search that consults a checker shows what a perfect verifier would find among the policy's proposals. The function is
called once per step; one that raises fails that branch, never the search.
"""

from __future__ import annotations

from collections.abc import Sequence

from ets_engine import ETSEngine, SearchConfig
from ets_engine.reference import generate_problems, is_solved, label_steps


def exact(problem: str, steps: Sequence[str]) -> float:
    """1.0 while everything is right and the problem can still be solved."""
    return 1.0 if label_steps(problem, [step.strip() for step in steps])[-1] else 0.0


def main() -> None:
    """Solve ten problems with the shipped PRM and with the checker."""
    problems = [row.problem for row in generate_problems("countdown", 5, seed=3, count=10)]
    config = SearchConfig(width=16, seed=0)
    with ETSEngine.from_pretrained("reference") as engine:
        by_prm = [engine.search(problem, config) for problem in problems]
        by_checker = [engine.search(problem, config, verifier=exact) for problem in problems]
    for name, results in (("shipped PRM", by_prm), ("exact checker", by_checker)):
        print(f"{name:14} solved {sum(is_solved(r.problem, r.text) for r in results)} of {len(results)}")


if __name__ == "__main__":
    main()
