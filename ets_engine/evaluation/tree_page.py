"""Search trees as files: JSONL to keep and to compare, and one self-contained HTML page to look at."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ets_engine.errors import ConfigError
from ets_engine.types import SearchResult, TraceNode

_PAGE = Path(__file__).with_name("tree_page.html")
_ABOUT = ("problem", "answer", "strategy", "width", "seed", "best")


def write_trace(result: SearchResult, path: Path) -> None:
    """One line about the search, then one line per node, parents first.

    Raises:
        ConfigError: The search kept no tree.
    """
    if result.trace is None:
        raise ConfigError("the result holds no tree: search with SearchConfig(trace=True)")
    head = {
        "kind": "tree",
        "problem": result.problem,
        "answer": result.answer,
        "strategy": result.strategy,
        "width": result.width,
        "seed": result.seed,
        "best": _path_of(result),
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [head, *(node.model_dump(mode="json") for node in result.trace)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="ascii")


def read_trace(path: Path) -> tuple[dict[str, Any], list[TraceNode]]:
    """What `write_trace` wrote, or the line that `ets solve --json --tree` prints.

    Returns:
        What is known of the search, and its nodes.

    Raises:
        ConfigError: The file is neither.
    """
    try:
        first, *rest = [line for line in path.read_text(encoding="utf-8").split("\n") if line.strip()]
        head = json.loads(first)
        if head.get("kind") == "tree":
            return {name: head[name] for name in _ABOUT}, [TraceNode.model_validate_json(line) for line in rest]
        result = SearchResult.model_validate_json(first)
    except (OSError, ValueError, AttributeError, KeyError) as error:
        raise ConfigError(
            f"{path} holds no search tree: {type(error).__name__}: {str(error).splitlines()[0]}"
        ) from None
    if result.trace is None:
        raise ConfigError(f"{path} holds a result without its tree: use `ets solve --json --tree`")
    return {name: getattr(result, name) for name in _ABOUT[:-1]} | {"best": _path_of(result)}, list(result.trace)


def tree_page(about: dict[str, Any], nodes: Sequence[TraceNode]) -> str:
    """The tree as one HTML page that needs no network.

    Args:
        about: From `read_trace`.
        nodes: From `read_trace`, at least the root.

    Raises:
        ConfigError: There is no root.
    """
    if not nodes:
        raise ConfigError("the tree holds no node")
    facts = f"{about['strategy']}, width {about['width']}, seed {about['seed']}: {len(nodes) - 1} steps, "
    facts += f"{sum(node.num_tokens for node in nodes)} tokens in the whole tree, answer {about['answer'] or 'none'}"
    data = {
        "problem": about["problem"],
        "facts": facts,
        "best": about["best"],
        "nodes": [node.model_dump(mode="json") for node in nodes],
    }
    inside = json.dumps(data).replace("<", "\\u003c")  # nothing in it ends the script element
    return _PAGE.read_text(encoding="utf-8").replace("__DATA__", inside)


def _path_of(result: SearchResult) -> list[int]:
    """Ids of the winning trajectory, the root first; of the best path so far where nothing finished."""
    nodes = {node.id: node for node in result.trace or ()}
    wanted = [(step.text, step.score) for step in result.steps]
    for leaf in nodes.values():
        if leaf.depth != len(wanted):
            continue
        path = [leaf]
        while path[-1].parent in nodes:
            path.append(nodes[path[-1].parent])
        path.reverse()
        if [(node.text, node.step_score) for node in path[1:]] == wanted:
            return [node.id for node in path]
    return []
