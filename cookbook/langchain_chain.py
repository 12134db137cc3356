"""Recipe: one changed line in a LangChain chain, and what it buys: solved problems, tokens, KV, seconds.

python cookbook/langchain_chain.py --count 20
"""

from __future__ import annotations

import argparse
import time

from langchain_core.prompts import PromptTemplate

from ets_engine.reference import generate_problems, is_solved
from ets_integrations.langchain import ChatETS

PROMPT = PromptTemplate.from_template("{problem}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", choices=("countdown", "story"), default="countdown")
    parser.add_argument("--count", type=int, default=20)
    args = parser.parse_args()
    problems = [row.problem for row in generate_problems(args.family, None, seed=3, count=args.count)]

    chains = {
        "one plain call": PROMPT | ChatETS(model="reference", strategy="greedy"),
        "tree search": PROMPT | ChatETS(model="reference", width=16, seed=0),  # the line that changed
    }
    chains["one plain call"].invoke({"problem": problems[0]})  # loads the models
    print(f"{'chain':16}{'solved':>9}{'tokens':>9}{'KV sharing':>12}{'s, all':>9}")
    for name, chain in chains.items():
        began_s = time.perf_counter()
        messages = chain.batch([{"problem": problem} for problem in problems])
        seconds = time.perf_counter() - began_s
        solved = sum(is_solved(problem, one.text) for problem, one in zip(problems, messages, strict=True))
        tokens = sum(one.usage_metadata["output_tokens"] for one in messages) / len(messages)
        sharing = sum(one.response_metadata["ets"]["kv"]["sharing_ratio"] for one in messages) / len(messages)
        print(f"{name:16}{solved:>6}/{len(problems):<2}{tokens:>9.0f}{sharing:>12.2f}{seconds:>9.1f}")


if __name__ == "__main__":
    main()
