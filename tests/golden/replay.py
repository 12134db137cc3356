"""Replay recorded selections of the published implementations (ETS, ETS-KV, REBASE, beam) against our selectors.

    python tests/golden/replay.py CASES.json

Prints one line per case that disagrees; exits 0 when all agree, 1 otherwise. What has to agree, per case: the optimum
of the pruning objective (another kept set of equal value is fine), the objective of the published kept set, the
shares, and the tokens on the union of root-to-candidate paths. Two known quirks of the published code are allowed for:

* beam gives ceil(width / keep) children to each kept leaf, even where that exceeds the width; ours sum to it;
* REBASE subtracts masses in float32, so the last leaf may round one child above what is left; ours takes what is left.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ets_engine.protocols import Frontier
from ets_engine.search import BeamSqrt, Ets, Rebase, SearchTree, build_frontier, solve
from ets_engine.search.allocate import ceil_shares, scatter
from ets_engine.types import Step, StopReason

TOLERANCE = 1e-9


def rebuild(case: dict[str, Any]) -> tuple[SearchTree, Frontier]:
    """The case's tree, grown round by round, and what a selector sees of it."""
    nodes = case["nodes"]
    tree = SearchTree(nodes[0]["num_tokens"])
    parents_in_use = {node["parent"] for node in nodes} | set(case["frontier"])
    done = 1
    while done < len(nodes):
        batch = [node for node in nodes[done:] if node["parent"] < done]
        if [node["id"] for node in batch] != list(range(done, done + len(batch))):
            raise ValueError(f"nodes from {done} on are not numbered round by round")
        steps = [
            Step("", node["num_tokens"], StopReason.BOUNDARY if node["id"] in parents_in_use else StopReason.LENGTH)
            for node in batch
        ]
        tree.grow(
            [node["id"] for node in batch], [node["parent"] for node in batch], steps, [node["score"] for node in batch]
        )
        done += len(batch)
    tree.check_integrity()
    if set(case["frontier"]) != set(tree.frontier):
        raise ValueError(f"the frontier {case['frontier']} is not the tree's {tree.frontier}")
    embeddings = np.array([nodes[leaf]["embedding"] for leaf in case["frontier"]], dtype=np.float64)  # [L, D]
    return tree, build_frontier(tree, case["frontier"], embeddings=embeddings)


def differences(case: dict[str, Any]) -> Iterator[str]:
    """What disagrees, in words; nothing when all agrees."""
    tree, frontier = rebuild(case)
    if tree.union_tokens(case["frontier"]) != case["kv_tokens"]:
        yield f"kv_tokens {tree.union_tokens(case['frontier'])}, published {case['kv_tokens']}"
    match case["method"]:
        case "softmax_costmodel":
            yield from _ets_differences(case, frontier)
        case "softmax":
            ours = Rebase(case["softmax_temperature"]).select(frontier, case["width"]).shares
            if not _same_shares(ours, case["shares"], frontier, case["width"]):
                yield f"shares {ours}, published {tuple(case['shares'])}"
        case "beam_search":
            ours = BeamSqrt().select(frontier, case["width"]).shares
            kept = sum(share > 0 for share in ours)
            published = tuple(math.ceil(case["width"] / kept) if share else 0 for share in ours)
            if published != tuple(case["shares"]) or sum(ours) != case["width"]:
                yield f"shares {ours}, published {tuple(case['shares'])}"
        case method:
            yield f"unknown method {method!r}"


def _ets_differences(case: dict[str, Any], frontier: Frontier) -> Iterator[str]:
    selector = Ets(
        lambda_b=case["lambda_b"],
        lambda_d=case["lambda_d"],
        cluster_cut=case["cluster_cut"],
        softmax_temperature=case["softmax_temperature"],
        published=True,
    )
    problem = selector.problem(frontier, case["width"])
    places = [case["frontier"].index(leaf) for leaf in case["kept"]]
    for name, kept in (("our", solve(problem)), ("the published", places)):
        value = problem.objective(kept)
        if abs(value - case["objective"]) > TOLERANCE:
            yield f"objective {value!r} of {name} kept set, published {case['objective']!r}"
    scores = [frontier.scores[place] for place in places]
    ours = scatter(
        ceil_shares(scores, case["width"], temperature=selector.softmax_temperature), places, len(frontier.leaves)
    )
    if not _same_shares(ours, case["shares"], frontier, case["width"]):
        yield f"shares {ours}, published {tuple(case['shares'])}"


def _same_shares(ours: tuple[int, ...], published: list[int], frontier: Frontier, width: int) -> bool:
    """Equal, or one child too many on the last leaf that the published code served, which overshoots the width."""
    served = [leaf for leaf, share in enumerate(published) if share]
    if sum(published) == width + 1 and served:
        last = min(served, key=lambda leaf: frontier.scores[leaf])
        published = [share - (leaf == last) for leaf, share in enumerate(published)]
    return list(ours) == published


def main(arguments: list[str]) -> int:
    """Replay a file of cases."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    cases = json.loads(Path(arguments[0]).read_text())
    failed = 0
    for number, case in enumerate(cases):
        try:
            problems = list(differences(case))
        except (KeyError, TypeError, ValueError, IndexError) as error:
            problems = [f"malformed case: {type(error).__name__}: {error}"]
        failed += bool(problems)
        if problems:
            print(f"case {number} (seed {case.get('seed')}, {case.get('method')}): {'; '.join(problems)}")
    print(f"{len(cases) - failed} of {len(cases)} cases agree")
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
