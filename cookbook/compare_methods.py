"""Recipe: the same problems by plain sampling and by tree search, with what each costs.

python cookbook/compare_methods.py --count 10
"""

from __future__ import annotations

import argparse

from ets_engine import ETSEngine, SearchConfig
from ets_engine.reference import generate_problems, is_solved

SETTINGS = {
    "greedy": SearchConfig(strategy="greedy"),
    "majority vote of 16": SearchConfig(strategy="best_of_n", width=16, vote="majority"),
    "REBASE, width 16": SearchConfig(strategy="rebase", width=16),
    "ETS, width 16": SearchConfig(strategy="ets", width=16),
}


def main() -> None:
    """Print one line per method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("countdown", "story"), default="countdown")
    parser.add_argument("--count", type=int, default=10)
    args = parser.parse_args()
    problems = [row.problem for row in generate_problems(args.family, None, seed=1, count=args.count)]
    print(f"{'method':22}{'solved':>8}{'mean KV tokens':>16}{'sharing':>9}{'seconds':>9}")
    with ETSEngine.from_pretrained("reference") as engine:
        for name, config in SETTINGS.items():
            results = [engine.search(problem, config) for problem in problems]
            solved = sum(is_solved(result.problem, result.text) for result in results)
            kv = [result.kv for result in results if result.kv is not None]
            mean_tokens = sum(one.mean_tokens for one in kv) / len(kv)
            sharing = sum(one.sharing_ratio for one in kv) / len(kv)
            seconds = sum(result.timing.wall_s for result in results) / len(results)
            print(f"{name:22}{solved:>5}/{len(problems):<2}{mean_tokens:>16.0f}{sharing:>9.2f}{seconds:>9.2f}")


if __name__ == "__main__":
    main()
