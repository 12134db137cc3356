"""Recipe: `dspy.BootstrapFewShot` compiles an ETSReasoner; a tree search as the teacher finds more demos than a sample.

    python cookbook/dspy_optimize.py --count 12 --save compiled.json

Bootstrapping keeps the training problems that the teacher solves, with its reasoning, as demos. Two teachers, the same
optimizer: one sample per problem, and one search per problem. The reasoning in the demos is that of the best leaf.

Runs on the shipped models, so the demos are real, and no more than that: these models read one problem and no demos,
and compiling cannot make them better. The program that is saved is for a model that reads them: load it with
`load(path)` and an LM over your own model. `tests/contract/dspy` compiles with MIPROv2 and GEPA too, on a scripted
model that does read its prompt.
"""

from __future__ import annotations

import argparse
from typing import Any

import dspy

from ets_engine.reference import generate_problems, is_right_answer
from ets_integrations.dspy import ETSLM, ETSReasoner, PlainAdapter


def solved(example: dspy.Example, pred: dspy.Prediction, trace: Any = None) -> bool:
    """Whether an answer alone is right."""
    return is_right_answer(example.problem, pred.answer)


def main() -> None:
    """Compile with each teacher, count the demos, show one, save the program."""
    parser = argparse.ArgumentParser(description="Bootstrap demos by tree search.")
    parser.add_argument("--count", type=int, default=12, help="training problems")
    parser.add_argument("--save", help="file for the compiled program, JSON")
    options = parser.parse_args()
    rows = generate_problems("countdown", None, seed=11, count=options.count)
    trainset = [dspy.Example(problem=row.problem).with_inputs("problem") for row in rows]

    student = ETSReasoner("problem -> answer", width=16)
    teachers = {
        "one sample": ETSReasoner("problem -> answer", strategy="best_of_n", width=1),
        "one search": student.deepcopy(),
    }
    optimizer = dspy.BootstrapFewShot(
        metric=solved, max_bootstrapped_demos=options.count, max_labeled_demos=0, max_rounds=1
    )
    compiled: dspy.Module = student
    with dspy.context(lm=ETSLM("ets/reference", seed=0), adapter=PlainAdapter()):
        for name, teacher in teachers.items():
            compiled = optimizer.compile(student, teacher=teacher, trainset=trainset)
            print(f"teacher {name}: {len(compiled.predict.demos)} demos from {len(trainset)} problems")
    if compiled.predict.demos:
        demo = compiled.predict.demos[0]
        print(f"\n{demo.problem}\n{demo.reasoning}\nanswer: {demo.answer}")
    if options.save:
        compiled.save(options.save)
        print(f"\nsaved to {options.save}")


if __name__ == "__main__":
    main()
