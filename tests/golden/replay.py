"""Replay recorded selections of the published implementations (ETS, ETS-KV, REBASE, beam) against our selectors.

    python tests/golden/replay.py CASES.json

Prints one line per case that disagrees, and how many agree to stderr; exits 0 when all agree, 1 when one does not, 2
when the file cannot be read. What has to agree, per case: the optimum of the pruning objective (another kept set of
equal value is fine), the objective of the published kept set, the shares, and the tokens on the union of
root-to-candidate paths. Two known quirks of the published code are allowed for:

* beam gives ceil(width / keep) children to each kept leaf, even where that exceeds the width; ours sum to it;
* REBASE subtracts masses in float32, so the last leaf may round one child above what is left; ours takes what is left.
  It is allowed only where the same arithmetic done here overshoots too.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
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
            everyone = range(len(frontier.leaves))
            if not _same_shares(ours, case, frontier, everyone):
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
    if not _same_shares(ours, case, frontier, places):
        yield f"shares {ours}, published {tuple(case['shares'])}"


def _same_shares(ours: tuple[int, ...], case: dict[str, Any], frontier: Frontier, kept: Sequence[int]) -> bool:
    """Equal, or one child too many on the last leaf served, where float32 masses explain it."""
    published, width = tuple(case["shares"]), case["width"]
    if ours == published:
        return True
    last = min((leaf for leaf, share in enumerate(ours) if share), key=lambda leaf: frontier.scores[leaf])
    overshot = tuple(share + (leaf == last) for leaf, share in enumerate(ours))
    scores = [frontier.scores[leaf] for leaf in kept]
    rounded = _float32_shares(scores, width, case["softmax_temperature"])
    return published == overshot == scatter(rounded, kept, len(frontier.leaves))


def _float32_shares(scores: list[float], width: int, temperature: float) -> list[int]:
    """The sequential ceiling rule in the arithmetic of the published code: one float32 mass that weights come off."""
    weights = np.exp(np.array(scores) / temperature).astype(np.float32)  # [L]
    mass = np.float32(0.0)
    for weight in weights:
        mass += weight
    shares = [0] * len(scores)
    for leaf in sorted(range(len(scores)), key=lambda leaf: -scores[leaf]):
        shares[leaf] = math.ceil(np.float32(width) * weights[leaf] / mass) if mass > 0 else 0
        width -= shares[leaf]
        mass -= weights[leaf]
    return shares


def main(arguments: list[str]) -> int:
    """Replay a file of cases."""
    if len(arguments) != 1:
        print(__doc__)
        return 2
    try:
        cases = json.loads(Path(arguments[0]).read_text())
    except (OSError, ValueError) as error:
        print(f"cannot read {arguments[0]}: {' '.join(str(error).split())}")
        return 2
    if not isinstance(cases, list):
        print(f"{arguments[0]} holds a {type(cases).__name__}, not a list of cases")
        return 2
    failed = 0
    for number, case in enumerate(cases):
        try:
            problems = list(differences(case))
        except Exception as error:  # whatever is wrong with a case, it is one line, and the next case has its turn
            problems = [f"malformed case: {type(error).__name__}: {' '.join(str(error).split())}"]
        failed += bool(problems)
        if problems:
            about = case if isinstance(case, dict) else {}
            print(f"case {number} (seed {about.get('seed')}, {about.get('method')}): {'; '.join(problems)}")
    print(f"{len(cases) - failed} of {len(cases)} cases agree", file=sys.stderr)
    return 1 if failed or not cases else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
