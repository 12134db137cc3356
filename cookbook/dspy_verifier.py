"""Recipe: a DSPy metric as the verifier of a search: after it, inside it, and with a function that judges steps.

    python cookbook/dspy_verifier.py --count 12

A metric that needs no gold answer (here: does the expression use each number once and make the target?) is a verifier.
`as_verifier(metric)` gives it the shape of a reward; `reward="rerank"` lets it choose among the answers of a search
that the PRM guided, and that search may come from DSPy's cache; `reward="search"` asks it inside the search, which
stops at the first answer that is good enough; `step_reward_fn` judges unfinished lines of thought instead of the PRM.
Runs on the shipped models.
"""

from __future__ import annotations

import argparse
from typing import Any

import dspy

from ets_engine.reference import generate_problems, is_right_answer, label_steps
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter, as_verifier


def makes_target(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
    """A metric that compares the answer with the question alone."""
    return is_right_answer(example.problem, pred.answer)


def can_be_solved(args: dict[str, Any], steps: list[str]) -> float:
    """1.0 while everything is right and the target can still be made."""
    return float(label_steps(args["problem"], [step.strip() for step in steps])[-1])


def main() -> None:
    """Solve the same problems with each verifier."""
    parser = argparse.ArgumentParser(description="A metric as verifier.")
    parser.add_argument("--count", type=int, default=12, help="problems")
    options = parser.parse_args()
    rows = generate_problems("countdown", 5, seed=3, count=options.count)
    devset = [dspy.Example(problem=row.problem).with_inputs("problem") for row in rows]

    reward: dict[str, Any] = {"reward_fn": as_verifier(makes_target), "threshold": 1.0}
    programs = {
        "the shipped PRM": ETSReasoner("problem -> answer"),
        "metric after the search": ETSReasoner("problem -> answer", **reward),
        "metric inside the search": ETSReasoner("problem -> answer", **reward, reward="search"),
        "metric and steps inside": ETSReasoner(
            "problem -> answer", **reward, reward="search", step_reward_fn=can_be_solved
        ),
    }
    evaluate = dspy.Evaluate(devset=devset, metric=makes_target, num_threads=options.count, display_progress=False)
    with dspy.context(lm=ETSLM("ets/reference", search={"width": 16}, seed=0), adapter=PlainAdapter()):
        for name, program in programs.items():
            found = evaluate(program)
            tokens = sum(pred._ets.generated_tokens for _, pred, _ in found.results)
            right = sum(bool(score) for _, _, score in found.results)
            print(f"{name:26}solved {right} of {len(devset)}, {tokens} tokens")


if __name__ == "__main__":
    main()
