"""CUDA graphs of decode steps, one new token per row: captured when first needed, replayed on new contents.

A pass through a transformers model is over a thousand small launches, each of which costs the host about as long as
its work takes the GPU. A graph launches them all at once. What a launch depends on is rounded up (rows here, the rest
in the work list), so that a few graphs serve whole searches; rows that are not there write and attend to nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from ets_engine.attention.growing import GrowingWork
from ets_engine.attention.kernel import plan_pass, run_work, store
from ets_engine.attention.work import WorkList
from ets_engine.kv import DecodeLayout, KVPool
from ets_engine.runtime.draw_kernel import draw_by_blocks
from ets_engine.runtime.hook import Projected, check_calls
from ets_engine.runtime.layer_kernel import rotate_and_store
from ets_engine.runtime.sampler import SamplingParams, is_cut, tabulate

Result = TypeVar("Result")
Logits = Callable[[torch.Tensor], torch.Tensor]  # [B, hidden] -> [B, V]


@dataclass(slots=True)
class GraphForward:
    """Keyword argument of one forward pass that reads nothing but its own tensors; see `TreeForward`."""

    pool: KVPool
    windows: Sequence[int | None]
    write_slots: torch.Tensor  # [R], int32, -1 = nowhere
    works: dict[Hashable, WorkList]
    calls: int = 0

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        scale: float,
        softcap: float | None,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:
        """Store one layer's new K/V and attend; query [1, H, T, D], key and value [1, K, T, D] -> [1, T, H, D]."""
        self.calls += 1
        cache = self.pool.layers[layer]
        store(cache, self.write_slots, key[0].transpose(0, 1), value[0].transpose(0, 1))
        work = self.works[_kind(self.windows[layer], cache)]
        return run_work(query[0].transpose(0, 1), cache, work, scale=scale, softcap=softcap, sinks=sinks)[None]

    def rotate_and_attend(self, layer: int, projected: Projected, scale: float) -> torch.Tensor:
        """As `attend`, of what is not rotated yet. Shape [T, H, D]."""
        self.calls += 1
        cache = self.pool.layers[layer]
        query = rotate_and_store(cache, self.write_slots, projected)
        work = self.works[_kind(self.windows[layer], cache)]
        return run_work(query, cache, work, scale=scale)


@dataclass(slots=True, eq=False)
class Graphs:
    """Where the graphs of one model keep what they leave behind: no two of them run at once.

    Attributes:
        captured: Graphs captured so far (count).
    """

    captured: int = 0
    _memory: Any = None

    def capture(self, work: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        """A graph of some work that has run before, and the tensors that it leaves its result in."""
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            result = work()
        self.captured += 1
        return graph, result


class _Pass(NamedTuple):
    """One captured pass and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor  # [R]
    numbers: torch.Tensor  # [N], int32: positions, write slots, work lists
    hidden: torch.Tensor  # [R, hidden]


@dataclass(slots=True, eq=False)
class PassGraphs:
    """Decode passes through one model.

    Attributes:
        graphs: Of the model.
        base: The model without its head, under tree attention.
        pool: Its K/V; when it grows, all passes are captured anew.
        windows: Of each layer (tokens), None = it sees whole paths.
        heads: Query heads (count).
    """

    graphs: Graphs
    base: Any
    pool: KVPool
    windows: Sequence[int | None]
    heads: int
    _passes: dict[Hashable, _Pass] = field(default_factory=dict)
    _growing: dict[Hashable, GrowingWork] = field(default_factory=dict)  # work lists of the last pass, by `_kind`
    _num_pages: int = 0
    _staged: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    _sent: torch.cuda.Event | None = None

    def run(self, ids: torch.Tensor, layout: DecodeLayout) -> torch.Tensor:
        """One pass; its rows' token ids ([B], int64) lie on the model's device. [B, hidden]."""
        rows = len(ids)
        if self._num_pages != self.pool.num_pages:
            self._passes, self._num_pages = {}, self.pool.num_pages
        room = round_rows(rows)
        works = self._plan(layout, room)
        numbers = self._stage(room, layout, works)
        key = (room, *((name, work.shape) for name, work in works.items()))
        known = self._passes.get(key)
        if known is not None:
            self._fill(known.ids, known.numbers, ids, numbers)
            known.graph.replay()
            return known.hidden[:rows].clone()
        static_ids, static_numbers = ids.new_zeros(room), torch.empty_like(numbers, device=self.pool.device)
        self._fill(static_ids, static_numbers, ids, numbers)
        forward = self._forward(room, static_numbers, works)

        def work() -> torch.Tensor:
            positions = static_numbers[:room].long()
            output = self.base(
                input_ids=static_ids[None], position_ids=positions[None], use_cache=False, ets_tree=forward
            )
            return output.last_hidden_state[0]

        hidden = work()  # compiles what is not yet, and is this pass's result
        check_calls(forward.calls, len(self.pool.shapes), self.base)
        graph, result = self.graphs.capture(work)
        self._passes[key] = _Pass(graph, static_ids, static_numbers, result)
        return hidden[:rows]

    def _plan(self, layout: DecodeLayout, room: int) -> dict[Hashable, WorkList]:
        """Work lists of the layers' kinds: the last pass's brought up to date, or new ones."""
        if layout.pieces is None:
            for growing in set(self._growing.values()):
                if layout.rows is not None:
                    growing.keep(layout.rows)
                growing.grow(layout.write_slots)
        else:
            self._growing = {}
            same: dict[Hashable, GrowingWork] = {}  # a window that hides nothing has the work list of no window
            for window, cache in zip(self.windows, self.pool.layers, strict=True):
                name, pieces = _kind(window, cache), layout.pieces[window]
                if name not in self._growing:
                    shared = id(pieces), cache.shape[2:]
                    if shared not in same:
                        work = plan_pass(pieces, cache, group=self.heads // cache.shape[2], room=room)
                        same[shared] = GrowingWork(work, pieces.stop[-len(layout.positions) :])
                    self._growing[name] = same[shared]
        return {name: growing.work for name, growing in self._growing.items()}

    def _stage(self, room: int, layout: DecodeLayout, works: dict[Hashable, WorkList]) -> torch.Tensor:
        """All that changes from pass to pass, in one pinned buffer that the last pass no longer reads."""
        total = 2 * room + sum(len(work.numbers) for work in works.values())
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._staged) < total:
            self._staged = torch.empty(2 * total, dtype=torch.int32, pin_memory=True)
        staged, rows = self._staged[:total].numpy(), len(layout.positions)
        staged[:rows], staged[rows:room] = layout.positions, 0
        staged[room : room + rows], staged[room + rows : 2 * room] = layout.write_slots, -1
        start = 2 * room
        for work in works.values():
            staged[start : start + len(work.numbers)] = work.numbers.numpy()
            start += len(work.numbers)
        return self._staged[:total]

    def _fill(
        self, static_ids: torch.Tensor, static_numbers: torch.Tensor, ids: torch.Tensor, numbers: torch.Tensor
    ) -> None:
        static_numbers.copy_(numbers, non_blocking=True)
        static_ids[: len(ids)] = ids
        self._sent = torch.cuda.Event()
        self._sent.record()

    def _forward(self, room: int, numbers: torch.Tensor, works: dict[Hashable, WorkList]) -> GraphForward:
        start, moved = 2 * room, {}
        for name, work in works.items():
            moved[name] = work.over(numbers[start : start + len(work.numbers)])
            start += len(work.numbers)
        return GraphForward(self.pool, self.windows, numbers[room : 2 * room], moved)


class _Draw(NamedTuple):
    """One captured draw and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    states: torch.Tensor  # [R, hidden]
    numbers: torch.Tensor  # [5, R], float64: `sampler.tabulate`
    tokens: torch.Tensor  # [R]
    logprobs: torch.Tensor  # [R]


@dataclass(slots=True, eq=False)
class DrawGraphs:
    """A model's head and the draw of a token from it.

    Attributes:
        graphs: Of the model.
        logits: Its head.
    """

    graphs: Graphs
    logits: Logits
    _draws: dict[Hashable, _Draw] = field(default_factory=dict)
    _staged: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float64))
    _sent: torch.cuda.Event | None = None

    def run(
        self, states: torch.Tensor, params: Sequence[SamplingParams], draws: NDArray[np.float64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`sampler.draw` from hidden states [B, hidden]; token ids [B] and their log-probabilities [B]."""
        rows = len(states)
        room, table = round_rows(rows), tabulate(params, draws)
        plain, cut = bool((table[1] == 1).all()), any(map(is_cut, {id(one): one for one in params}.values()))
        if self._sent is not None:
            self._sent.synchronize()
        if self._staged.numel() < len(table) * room:
            self._staged = torch.empty(2 * len(table) * room, dtype=torch.float64, pin_memory=True)
        staged = self._staged[: len(table) * room].view(len(table), room)
        staged.numpy()[:, :rows], staged.numpy()[:, rows:] = table, table[:, :1]
        known = self._draws.get((room, plain, cut))
        if known is None:
            known = self._capture(states, staged, plain=plain, cut=cut)
        known.numbers.copy_(staged, non_blocking=True)
        self._sent = torch.cuda.Event()
        self._sent.record()
        known.states[:rows] = states
        known.graph.replay()
        return known.tokens[:rows].clone(), known.logprobs[:rows].clone()

    def _capture(self, states: torch.Tensor, staged: torch.Tensor, *, plain: bool, cut: bool) -> _Draw:
        room = staged.shape[1]
        static = states.new_zeros((room, states.shape[1]))
        numbers = staged.to(states.device)

        def work() -> tuple[torch.Tensor, torch.Tensor]:
            temperatures = None if plain else numbers[1].float()
            return draw_by_blocks(self.logits(static), temperatures, numbers[0], numbers[2:] if cut else None)

        work()
        graph, (tokens, logprobs) = self.graphs.capture(work)
        self._draws[room, plain, cut] = _Draw(graph, static, numbers, tokens, logprobs)
        return self._draws[room, plain, cut]


def _kind(window: int | None, cache: torch.Tensor) -> Hashable:
    """Layers of one kind attend by the same work list."""
    return window, cache.shape[2:]


def round_rows(rows: int) -> int:
    """Rows of the graph that serves so many: at most a quarter more from 8 on."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step
