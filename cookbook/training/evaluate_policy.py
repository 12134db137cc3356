"""Where a policy goes wrong in stories, told the right solution so far: claims, operands, results.

    python cookbook/training/evaluate_policy.py --policy ets_engine/reference/policy

A part counts as right when the likeliest token is right at each of its places. "given" operands stand in the story,
"computed" ones in an earlier step: to get them, the policy must look up the number of the person named.
"""

from __future__ import annotations

import argparse
import re
from collections import defaultdict
from pathlib import Path
from random import Random

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from data import Encoder, pad
from ets_engine.reference.problems import draw

LINE = re.compile(r"- \w+ has (?P<claim>.+?): (?P<left>\d+)[-+*/](?P<right>\d+)=(?P<result>\d+)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--level", type=int, nargs="*", default=[3, 6, 9])
    parser.add_argument("--count", type=int, default=64, help="held-out problems per level")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).eval()
    encode = Encoder(AutoTokenizer.from_pretrained(args.policy))
    hits: dict[str, list[bool]] = defaultdict(list)
    for level in args.level:
        rng = Random(f"evaluate/{args.seed}/{level}")
        solved = [draw(rng, "story", level, held_out=True) for _ in range(args.count)]
        rows = [encode.solution(problem, lines) for problem, lines in solved]
        with torch.inference_mode():
            guesses = model(input_ids=pad([ids for ids, _ in rows], encode.pad)).logits.argmax(-1).tolist()
        for (problem, lines), (ids, start), guess in zip(solved, rows, guesses, strict=True):
            given = set(re.findall(r"(\w+) has \d+ \w+\.", problem.problem))
            place = start  # of the line's first token
            for line in lines:
                if match := LINE.match(line):
                    claim = match["claim"]
                    kind = "given" if claim.split()[-1] in given else "computed"
                    kind = "boxes" if "boxes" in claim else "two people" if " and " in claim else kind
                    for part in ("claim", "left", "result"):
                        first = place + len(encode(line[: match.start(part)]))
                        last = place + len(encode(line[: match.end(part)]))
                        name = f"left operand, {kind}" if part == "left" else part
                        hits[name].append(all(guess[i - 1] == ids[i] for i in range(first, last)))
                place += len(encode(line)) + 1  # and its newline
    for name, right in sorted(hits.items()):
        print(f"{name:26} {100 * sum(right) / len(right):5.1f} % of {len(right)}")


if __name__ == "__main__":
    main()
