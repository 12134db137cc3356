"""Recipe: one DSPy program by one sample, by `dspy.BestOfN`, and by an ETSReasoner, on the same problems and models.

    python cookbook/dspy_compare.py --count 24

Prints, per program: problems solved, seconds, tokens generated, and, where one tree was searched, how often a token's
KV was shared and how much KV a search held. All three use the shipped models through `PlainAdapter`; nothing is
downloaded. `dspy.BestOfN` gets the exact checker as its reward and stops at the first right answer, as in DSPy's own
documentation; the reasoner has only the shipped PRM to go by. Whoever has such a checker may give it to both: the last
line is the reasoner with the checker for `reward_fn`.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import dspy

from ets_engine.reference import generate_problems, is_right_answer
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter


def solved(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
    """Whether an answer alone is right: many are."""
    return is_right_answer(example.problem, pred.answer)


def check(args: dict[str, Any], pred: dspy.Prediction) -> float:
    """The same, as a reward."""
    return float(is_right_answer(args["problem"], pred.answer))


def run(program: dspy.Module, lm: ETSLM, devset: list[dspy.Example]) -> tuple[str, list[dspy.Prediction]]:
    """One line about a program, and its predictions."""
    evaluate = dspy.Evaluate(devset=devset, metric=solved, num_threads=len(devset), display_progress=False)
    began_s = time.perf_counter()
    with dspy.context(lm=lm, track_usage=True):
        found = evaluate(program)
    seconds = time.perf_counter() - began_s
    preds = [pred for _, pred, _ in found.results]
    tokens = sum(usage["completion_tokens"] for pred in preds for usage in (pred.get_lm_usage() or {}).values())
    right = sum(bool(score) for _, _, score in found.results)
    return f"{right:3}/{len(devset)} solved  {seconds:6.1f} s  {tokens:7} tokens", preds


def kv(preds: list[dspy.Prediction]) -> str:
    """KV figures of the searches behind these predictions."""
    figures = [pred._ets.kv for pred in preds if hasattr(pred, "_ets")]
    shared = statistics.mean(one.sharing_ratio for one in figures)
    return f"  KV shared {shared:.2f} x, peak {max(one.peak_bytes for one in figures) / 1e6:.2f} MB per search"


def main() -> None:
    """Evaluate the programs one after the other."""
    parser = argparse.ArgumentParser(description="One sample, BestOfN and ETSReasoner side by side.")
    parser.add_argument("--count", type=int, default=24, help="problems")
    parser.add_argument("--width", type=int, default=16, help="samples of BestOfN, branches of a search")
    options = parser.parse_args()
    rows = generate_problems("countdown", None, seed=11, count=options.count)
    devset = [dspy.Example(problem=row.problem).with_inputs("problem") for row in rows]

    one_sample = ETSLM("ets/reference", search={"strategy": "best_of_n", "width": 1}, seed=0, cache=False)
    searching = ETSLM("ets/reference", search={"width": options.width}, seed=0, cache=False)
    predict, reason = dspy.Predict("problem -> answer"), ETSReasoner("problem -> answer")
    best = dspy.BestOfN(predict, N=options.width, reward_fn=check, threshold=1.0)
    best_of_tree = ETSReasoner("problem -> answer", reward_fn=check, threshold=1.0)

    dspy.configure(adapter=PlainAdapter())
    predict(problem="Use 4, 6, 10 and 19 to make 16.", lm=one_sample)  # loads the models
    print(f"{'dspy.Predict':34}{run(predict, one_sample, devset)[0]}")
    print(f"{f'dspy.BestOfN, N={options.width}, checker':34}{run(best, one_sample, devset)[0]}")
    for name, program in ((f"ETSReasoner, width {options.width}", reason), ("  with the checker", best_of_tree)):
        line, preds = run(program, searching, devset)
        print(f"{name:34}{line}{kv(preds)}")


if __name__ == "__main__":
    main()
