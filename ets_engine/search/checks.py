"""Whether policy, verifier, embedder and selector kept their contracts; a failed branch is data, else it is refused."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np

from ets_engine.errors import ProtocolError
from ets_engine.protocols import Selection
from ets_engine.types import Step

if TYPE_CHECKING:
    from numpy.typing import NDArray


def check_prompt_tokens(sent: object) -> int:
    """Tokens of the prompt.

    Raises:
        ProtocolError: It is not a count.

    Example:
        >>> check_prompt_tokens(12)
        12
    """
    if not isinstance(sent, numbers.Integral) or sent < 0:
        raise ProtocolError(f"policy.start() returned {sent!r}; return the prompt's tokens, an int >= 0")
    return int(sent)


def check_steps(sent: object, children: Sequence[int]) -> list[Step]:
    """One step per child.

    Raises:
        ProtocolError: The number differs, or something is not a step with a token count.

    Example:
        >>> check_steps([Step("so 5", 3)], [7])[0].num_tokens
        3
    """
    steps = _sequence(sent, "policy.expand()")
    if len(steps) != len(children):
        raise ProtocolError(
            f"policy.expand() returned {len(steps)} steps for {len(children)} children; return one each"
        )
    for child, step in zip(children, steps, strict=True):
        if not isinstance(step, Step):
            raise ProtocolError(f"policy.expand() returned {step!r} for node {child}; return a Step")
        num_tokens: object = step.num_tokens
        if not isinstance(num_tokens, numbers.Integral) or num_tokens < 0:
            raise ProtocolError(f"policy.expand() returned num_tokens={num_tokens} for node {child}; need an int >= 0")
    return cast("list[Step]", steps)


def check_scores(sent: object, nodes: Sequence[int]) -> list[float | None]:
    """One score in [0, 1] per node; None where the verifier said NaN or None: that branch failed.

    Raises:
        ProtocolError: The number differs, or a score is outside [0, 1] or no number.

    Example:
        >>> check_scores([0.5, float("nan")], [1, 2])
        [0.5, None]
    """
    scores = _sequence(sent, "verifier.score()")
    if len(scores) != len(nodes):
        raise ProtocolError(f"verifier.score() returned {len(scores)} scores for {len(nodes)} nodes; return one each")
    checked: list[float | None] = []
    for node, score in zip(nodes, scores, strict=True):
        if score is None:
            checked.append(None)
            continue
        try:
            number = float(cast("float", score))
        except (TypeError, ValueError):
            raise ProtocolError(f"verifier.score() returned {score!r} for node {node}; return a number") from None
        if not math.isnan(number) and not 0.0 <= number <= 1.0:
            raise ProtocolError(
                f"verifier.score() returned {number!r} for node {node}; scores lie in [0, 1], NaN if unscorable"
            )
        checked.append(None if math.isnan(number) else number)
    return checked


def check_embeddings(sent: object, nodes: Sequence[int]) -> NDArray[np.floating]:
    """One finite vector per node. Shape [len(nodes), D].

    Raises:
        ProtocolError: The shape differs, or a value is not finite.

    Example:
        >>> check_embeddings([[1.0, 0.0]], [3]).shape
        (1, 2)
    """
    try:
        vectors = np.asarray(sent, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProtocolError(f"embedder.embed() returned {type(sent).__name__}; return an array of numbers") from None
    if vectors.ndim != 2 or len(vectors) != len(nodes) or vectors.shape[1] == 0:
        raise ProtocolError(f"embedder.embed() returned shape {vectors.shape}; return [{len(nodes)}, D]")
    finite = np.isfinite(vectors).all(axis=1)  # [L]
    if not finite.all():
        raise ProtocolError(
            f"embedder.embed() returned a vector with NaN or inf for node {nodes[int(finite.argmin())]}"
        )
    return vectors


def check_selection(selection: Selection, num_leaves: int, open_width: int) -> tuple[int, ...]:
    """The shares: counts that stay within the open width.

    Raises:
        ProtocolError: naming what is wrong with the shares or the verdicts.

    Example:
        >>> check_selection(Selection((2, 0)), num_leaves=2, open_width=2)
        (2, 0)
    """
    shares = selection.shares
    if len(shares) != num_leaves:
        raise ProtocolError(f"selector returned {len(shares)} shares for {num_leaves} leaves; return one each")
    if any(not isinstance(share, numbers.Integral) or share < 0 for share in cast("tuple[object, ...]", shares)):
        raise ProtocolError(f"selector returned shares {shares!r}; shares are ints >= 0")
    if sum(shares) > open_width:
        raise ProtocolError(f"selector handed out {sum(shares)} children, open width is {open_width}; shares sum to it")
    if len(selection.verdicts) not in (0, num_leaves):
        raise ProtocolError(
            f"selector returned {len(selection.verdicts)} verdicts for {num_leaves} leaves; all or none"
        )
    return tuple(int(share) for share in shares)


def _sequence(sent: object, who: str) -> list[object]:
    try:
        return list(cast("Sequence[object]", sent))
    except TypeError:
        raise ProtocolError(f"{who} returned {type(sent).__name__}; return a sequence") from None
