"""Where a policy goes wrong in stories, told the right solution so far: facts, numbers looked up, results.

    python cookbook/training/evaluate_policy.py --policy ets_engine/reference/policy

A part counts as right when the likeliest token is right at each of its places. Several facts may come next, and only
the one told counts.
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

LINE = re.compile(
    r"(?P<fact>.+?): (?:(?P<lookup>\w+ has \d+(?:, \w+ has \d+)?), )?"
    r"(?P<operation>\d+(?P<sign>[-+*/])\d+)=(?P<result>\d+)"
)


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
        for (_, lines), (ids, start), guess in zip(solved, rows, guesses, strict=True):
            right = [False, *(told == real for told, real in zip(guess, ids[1:], strict=False))]
            place = start  # of the line's first token
            for line in lines:
                match, pieces = LINE.match(line), encode.tokenizer(line, add_special_tokens=False)
                assert match is not None, line
                for part in ("fact", "lookup", "operation", "result"):
                    if match[part]:
                        first, last = (pieces.char_to_token(i) for i in (match.start(part), match.end(part) - 1))
                        name = f"result of {match['sign']}" if part == "result" else part
                        hits[name].append(all(right[place + first : place + last + 1]))
                place += len(pieces.input_ids) + 1  # and its newline
    for name, found in sorted(hits.items()):
        print(f"{name:14} {100 * sum(found) / len(found):5.1f} % of {len(found)}")


if __name__ == "__main__":
    main()
