"""Print fresh held-out problems as JSONL, or grade solutions of them exactly.

    python -m ets_engine.reference --family countdown --level 4 --seed 7 --count 50
    python -m ets_engine.reference --check < solutions.jsonl

A line to be graded has `problem` and `solution` (or `text`, as `ets solve --json` prints it), every step of which is
checked; or only `answer`. It is printed again with `correct`; the count goes to the error stream.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

from ets_engine.errors import ETSError
from ets_engine.reference.problems import FAMILIES, generate_problems, is_right_answer, is_solved


def grade(row: Any) -> bool:
    """Whether the solution, or without one the answer, is right; a null answer is wrong.

    Raises:
        ValueError: The row has neither, or no problem of a known family.
    """
    if not isinstance(row, dict) or not isinstance(row.get("problem"), str):
        raise ValueError("needs an object with a string `problem`")
    given = {key: row[key] for key in ("solution", "text", "answer") if key in row}
    if not given or not all(isinstance(value, str | None) for value in given.values()):
        raise ValueError("needs a string `solution`, `text` or `answer`")
    for key in ("solution", "text"):
        if given.get(key) is not None:
            return is_solved(row["problem"], given[key])
    return is_right_answer(row["problem"], given.get("answer") or "")


def check(lines: list[str]) -> int:
    """Grade JSONL lines; 0, or 2 at a line that cannot be graded."""
    correct = 0
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            verdict = grade(row)
        except (ValueError, RecursionError) as error:
            print(f"line {number}: {error}", file=sys.stderr)
            return 2
        correct += verdict
        print(json.dumps(row | {"correct": verdict}))
    print(f"correct {correct} of {len(lines)}", file=sys.stderr)
    return 0


def main() -> int:
    """Run one of the two commands."""
    parser = argparse.ArgumentParser(
        prog="python -m ets_engine.reference", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", choices=sorted(FAMILIES), default="countdown")
    parser.add_argument("--level", type=int, help="numbers to use, or steps to take; default: all levels in turn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=10)
    parser.add_argument("--check", action="store_true", help="grade JSONL solutions from standard input")
    args = parser.parse_args()
    if args.check:
        return check([line for line in sys.stdin.read().splitlines() if line.strip()])
    try:
        for problem in generate_problems(args.family, args.level, args.seed, args.count):
            print(json.dumps(problem.to_dict()))
        sys.stdout.flush()
    except ETSError as error:
        parser.error(str(error))
    except BrokenPipeError:  # whoever reads has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
