"""Sample solutions from a policy with the package's own decoder and label every step exactly; JSONL.

python cookbook/training/make_rollouts.py --policy runs/policy/step-2400 --problems 6000 --out runs/rollouts.jsonl
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

from ets_engine.config import EngineConfig
from ets_engine.models.formats import begin_ids
from ets_engine.reference.problems import FAMILIES, ReferenceProblem, draw, is_solved, label_steps, split_lines
from ets_engine.runtime import Branch, Runner, SamplingParams, StepDecoder, StopRules, load_causal_lm

TOGETHER = 32  # problems decoded at a time
MAX_TOKENS = 400  # of a solution; the longest right one takes 330


def sample_solutions(
    decoder: StepDecoder, problems: list[ReferenceProblem], samples: int, temperature: float, seed: int
) -> Iterator[tuple[ReferenceProblem, str]]:
    """Some whole solutions of each problem."""
    tokenizer = decoder.tokenizer
    rules = StopRules(strings=(), eos_ids=frozenset({tokenizer.eos_token_id}), max_step_tokens=MAX_TOKENS)
    leaves = [decoder.leaves.start(begin_ids(tokenizer, one.problem), place) for place, one in enumerate(problems)]
    decoder.submit(
        [
            Branch(leaf, place * samples + i, seed, SamplingParams(temperature), rules, MAX_TOKENS)
            for place, leaf in enumerate(leaves)
            for i in range(samples)
        ]
    )
    for done in decoder.run():
        decoder.leaves.release(done.leaf)
        yield problems[done.branch.parent.search], done.text
    for place, leaf in enumerate(leaves):
        decoder.leaves.release(leaf)
        decoder.usages.forget(place)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--family", nargs="*", choices=sorted(FAMILIES), default=sorted(FAMILIES))
    parser.add_argument("--problems", type=int, default=6000, help="per family")
    parser.add_argument("--samples", type=int, default=4, help="per problem")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--held-out", action="store_true", help="from the held-out part, to measure; never to train")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    model, tokenizer = load_causal_lm(str(args.policy))
    decoder = StepDecoder(Runner(model, EngineConfig(), verify=False), tokenizer)
    began = time.time()
    with args.out.open("w") as out:
        for family in args.family:
            rng = Random(f"rollouts/{args.seed}/{family}/{args.held_out}")
            levels = FAMILIES[family].LEVELS
            solved = total = 0
            for start in range(0, args.problems, TOGETHER):
                count = min(TOGETHER, args.problems - start)
                problems = [draw(rng, family, rng.choice(levels), held_out=args.held_out)[0] for _ in range(count)]
                for problem, text in sample_solutions(
                    decoder, problems, args.samples, args.temperature, args.seed + start
                ):
                    lines = split_lines(text)
                    right = is_solved(problem.problem, text)
                    solved, total = solved + right, total + 1
                    row = problem.to_dict() | {"lines": lines, "labels": label_steps(problem.problem, lines)}
                    out.write(json.dumps(row | {"solved": right}) + "\n")
            print(f"{family}: {solved} of {total} solved, {time.time() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
