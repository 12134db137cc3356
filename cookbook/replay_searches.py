"""Our searches over the tree cache: replays in lockstep, alone or several at once in one KV pool."""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from replay import Replay
from replay_players import Ids, Played, Player

from ets_engine.kv import PrefixTree
from ets_engine.runtime import Runner, SamplingParams, uniforms
from ets_engine.runtime.transfer import Readback, upload


class Wanted(NamedTuple):
    """What a search wants of the next forward pass.

    Attributes:
        rows: KV node and the tokens at its end that are not read yet; none = only that what was drawn last is read.
            Shape [B].
        states: The row that each token is drawn from. Shape [D].
        nodes, positions: Of each token to be drawn, in its search and on its path. Shape [D].
    """

    rows: Sequence[tuple[int, Sequence[int]]] = ()
    states: Sequence[int] = ()
    nodes: Sequence[int] = ()
    positions: Sequence[int] = ()


Search = Generator[Wanted, float, Played]  # takes the seconds of each pass


@dataclass(frozen=True, slots=True)
class Together:
    """Several replays by ours.

    Attributes:
        seconds, cpu_seconds: From the first prompt to the last token.
        played: Of each replay, from its start to its end; the memory behind its peak is not told apart. Shape [N].
        at_once: Most searches in one pass (count).
        passes, rows: Forward passes, and the branches and prompts in them (counts).
        peak_pages: Of the KV pool, held for all of them (count).
    """

    seconds: float
    cpu_seconds: float
    played: tuple[Played, ...]
    at_once: int
    passes: int
    rows: int
    peak_pages: int


def our_player(runner: Runner, seed: int = 0) -> Player:
    """Over the tree cache: forks, one token per live branch and forward pass, releases as the replay says.

    The steps of a round decode until their own length: rows shrink as short steps end, and the round ends with its
    longest one.
    """

    def play(replay: Replay, ids: Ids) -> Played:
        together = play_together(runner, [(replay, ids)], seed)
        peak_bytes = together.peak_pages * runner.tree.pool.page_tokens * runner.bytes_per_token
        return replace(together.played[0], peak_kv_bytes=peak_bytes)

    return play


@torch.inference_mode()
def play_together(runner: Runner, work: Sequence[tuple[Replay, Ids]], seed: int = 0) -> Together:
    """Play replays in order, as many at once as the KV pool surely holds; the next one starts when one has ended.

    Args:
        runner: Its tree holds nothing.
        work: Replays and the ids of their tokens. Shape [N].
        seed: Of the tokens that are drawn and thrown away.

    Raises:
        PoolExhaustedError: A replay does not even fit alone (`peak_pages`).
    """
    tree, passes = runner.tree, _Passes(runner, seed)
    most_pages = tree.pool.max_pages
    needed = [peak_pages(replay, tree.pool.page_tokens) for replay, _ in work]
    tree.reset_peak()
    searches: dict[int, Search] = {}  # that run, by their places in `work`
    wanted: dict[int, Wanted] = {}
    played: dict[int, Played] = {}
    started = at_once = 0
    began_s, cpu_s = time.perf_counter(), time.process_time()
    pass_s = began_s
    while len(played) < len(work):
        while started < len(work):
            taken = sum(needed[number] for number in searches)
            if searches and most_pages is not None and taken + needed[started] > most_pages:
                break
            searches[started] = _search(tree, *work[started], owner=started)
            wanted[started] = next(searches[started])
            started += 1
        at_once = max(at_once, len(searches))
        passes.run(wanted)
        last_s, pass_s = pass_s, time.perf_counter()
        for number, search in list(searches.items()):
            try:
                wanted[number] = search.send(pass_s - last_s)
            except StopIteration as end:
                played[number] = end.value
                del searches[number], wanted[number]
    return Together(
        time.perf_counter() - began_s,
        time.process_time() - cpu_s,
        tuple(played[number] for number in range(len(work))),
        at_once,
        passes.count,
        passes.rows,
        tree.peak_pages,
    )


def peak_pages(replay: Replay, page_tokens: int) -> int:
    """KV pages that a replay takes at most, from its topology alone; every node begins a page of its own.

    Example:
        >>> from replay import Round
        >>> peak_pages(Replay("two", 10, (Round((0, 0), (9, 2)), Round((1,), (2,)))), page_tokens=8)
        5
    """
    parents, tokens = [-1], [replay.prompt_tokens]
    most = 0
    for one in replay.rounds:
        held: set[int] = set()
        for leaf in one.retained:
            node = leaf
            while node >= 0 and node not in held:
                held.add(node)
                node = parents[node]
        new = [count - 1 for count in one.num_tokens]  # a step's last token is read when the step gets children
        most = max(most, sum(-(-count // page_tokens) for count in (*(tokens[node] for node in held), *new)))
        parents += one.parents
        tokens += one.num_tokens
    return most


def _search(tree: PrefixTree, replay: Replay, ids: Ids, owner: int) -> Search:
    """One search: what it wants of each pass, and in the end what it took."""
    began_s, cpu_s = time.perf_counter(), time.process_time()
    step_seconds: list[float] = []
    total_tokens = peak_tokens = 0  # resident, summed over decode steps and at most
    for number, wanted in enumerate(walk(tree, replay, ids, owner)):
        seconds = yield wanted
        resident = tree.resident_tokens_of(owner)
        peak_tokens = max(peak_tokens, resident)
        if number and wanted.rows:  # neither the prompt nor the end
            step_seconds.append(seconds)
            total_tokens += resident
    return Played(
        time.perf_counter() - began_s,
        time.process_time() - cpu_s,
        tuple(step_seconds),
        total_tokens / len(step_seconds) if step_seconds else 0.0,
        peak_tokens,
    )


def walk(tree: PrefixTree, replay: Replay, ids: Ids, owner: int) -> Iterator[Wanted]:
    """The passes of a replay, forks and releases between them; its KV is held until its last tokens are read."""
    leaves = {0: (tree.root(owner), ids[0])}  # KV node, and the tokens at its end that are not read yet
    for one, children in replay.numbered():
        for node in leaves.keys() - set(one.retained):
            tree.release(leaves.pop(node)[0])
        rows = {node: row for row, node in enumerate(one.retained)}
        above = [leaves[parent] for parent in one.parents]
        ends = [tree.path_tokens(handle) + len(unread) for handle, unread in above]
        yield Wanted([leaves[node] for node in one.retained], [rows[parent] for parent in one.parents], children, ends)
        handles = [tree.fork(handle) for handle, _ in above]
        for done in range(1, max(one.num_tokens)):
            live = [row for row, count in enumerate(one.num_tokens) if count > done]
            yield Wanted(
                [(handles[row], [ids[children[row]][done - 1]]) for row in live],
                range(len(live)),
                [children[row] for row in live],
                [ends[row] + done for row in live],
            )
        leaves |= {child: (handle, ids[child][-1:]) for child, handle in zip(children, handles, strict=True)}
    yield Wanted()
    for handle, _ in leaves.values():
        tree.release(handle)


class _Passes:
    """Forward passes with a token drawn for each branch; a GPU is at work on one while the host reads the last's."""

    def __init__(self, runner: Runner, seed: int) -> None:
        self._runner, self._seed = runner, seed
        self._sampling = SamplingParams()
        self._readback = Readback(runner.device)
        self._drawn = torch.empty(0)
        self._readback.mark()
        self.count = self.rows = 0

    def run(self, wanted: dict[int, Wanted]) -> None:
        """Read all searches' rows, then the tokens drawn in the pass before, then draw as a search would."""
        rows = [row for one in wanted.values() for row in one.rows]
        if not rows:
            self._read()
            return
        hidden = self._runner.extend_last(rows)
        self._read()
        states: list[int] = []
        first = 0
        for one in wanted.values():
            states += [first + state for state in one.states]
            first += len(one.rows)
        if states != list(range(len(hidden))):
            hidden = hidden[upload(states, self._runner.device, torch.int64)]
        draws = uniforms(
            [self._seed + number for number, one in wanted.items() for _ in one.nodes],
            [node for one in wanted.values() for node in one.nodes],
            [position for one in wanted.values() for position in one.positions],
        )
        self._drawn = self._runner.draw(hidden, [self._sampling] * len(states), draws)[0]
        self._readback.mark()
        self.count += 1
        self.rows += len(rows)

    def _read(self) -> None:
        with self._readback.reading():
            self._drawn.tolist()
