"""What a sliding window hides of shared runs and of tails: index arithmetic on path positions; it knows no tree.

Through a window of w tokens a token at path position p sees positions p - w + 1 to p. A window decides what is read,
never what is stored: the KV tree keeps every token of every path for all layers alike, so forks, chunks and remembered
prompts need not know of it.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.int64]
PADDING = 1 << 40  # position of a tail's padding: after any token's


class Run(NamedTuple):
    """Tokens that several rows share, and the new tokens of those rows.

    Attributes:
        queries: All new tokens of its rows. Shape [R].
        slots: Where its K/V lies, in path order. Shape [U].
        start: Path position of its first token.
    """

    queries: IntArray
    slots: IntArray
    start: int


class Tails(NamedTuple):
    """The tails of B rows.

    Attributes:
        slots: In path order, new tokens last, padded. Shape [B, L].
        positions: Path positions, rising; `PADDING` where padded. Shape [B, L].
        lengths: Without padding (tokens). Shape [B].
    """

    slots: IntArray
    positions: IntArray
    lengths: IntArray


def cut_run(run: Run, positions: IntArray, window: int) -> tuple[Run, IntArray | None] | None:
    """The part of a run that some query sees, with the queries that see some of it.

    Args:
        run: The whole run.
        positions: Path position of each new token. Shape [T].
        window: Tokens that each sees, itself included, >= 1.

    Returns:
        The part, and how many of its first tokens each of its queries does not see ([R], less than U), None where all
        see all of it; or None when no query sees any of it.

    Example:
        >>> run = Run(queries=np.array([0, 1, 2]), slots=np.arange(10, 16), start=0)
        >>> part, hidden = cut_run(run, np.array([6, 8, 12]), window=5)
        >>> part.queries.tolist(), part.slots.tolist(), part.start, hidden.tolist()
        ([0, 1], [12, 13, 14, 15], 2, [0, 2])
    """
    hidden = np.maximum(positions[run.queries] - window + 1 - run.start, 0)  # [R]
    if not hidden.any():
        return run, None
    sees = hidden < len(run.slots)
    if not sees.any():
        return None
    hidden = hidden[sees]
    unseen = int(hidden.min())
    part = Run(run.queries[sees], run.slots[unseen:], run.start + unseen)
    return part, hidden - unseen if hidden.max() > unseen else None


def cut_tails(tails: Tails, oldest: IntArray) -> Tails:
    """Tails without what no query of their row sees, padded with their first slot.

    Args:
        tails: Of B rows.
        oldest: The first path position that any query of the row sees, at most that of its last token. Shape [B].

    Example:
        >>> slots, positions = np.array([[5, 6, 7], [9, 9, 9]]), np.array([[3, 4, 5], [3, PADDING, PADDING]])
        >>> tails = Tails(slots, positions, lengths=np.array([3, 1]))
        >>> cut_tails(tails, oldest=np.array([4, 2])).slots.tolist()
        [[6, 7], [9, 9]]
    """
    unseen = (tails.positions < oldest[:, None]).sum(1)  # [B]
    lengths = tails.lengths - unseen
    index = unseen[:, None] + np.arange(int(lengths.max()))  # [B, L]
    inside = np.minimum(index, tails.slots.shape[1] - 1)
    positions = np.where(index == inside, np.take_along_axis(tails.positions, inside, 1), PADDING)
    slots = np.take_along_axis(tails.slots, inside, 1)
    return Tails(np.where(positions == PADDING, slots[:, :1], slots), positions, lengths)
