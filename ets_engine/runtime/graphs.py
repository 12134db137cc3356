"""CUDA graphs of decode passes, one new token per row: captured when first needed, replayed on new contents.

A pass through a transformers model is over a thousand small launches, each of which costs the host about as long as
its work takes the GPU. A graph launches them all at once. What a launch depends on is rounded up (rows here, the rest
in the work list), so that a few graphs serve whole searches; rows that are not there write and attend to nothing.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from ets_engine.attention.kernel import plan_pass, run_work, store
from ets_engine.attention.work import WorkList
from ets_engine.errors import UnsupportedModelError
from ets_engine.kv import KVPool, TreeLayout

MAX_ROWS = 512  # of a graph; larger passes keep a GPU busy without one


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
        work = self.works[kind(self.windows[layer], cache)]
        return run_work(query[0].transpose(0, 1), cache, work, scale=scale, softcap=softcap, sinks=sinks)[None]


@dataclass(slots=True)
class _Graph:
    """One captured pass and the tensors that it reads and writes."""

    graph: torch.cuda.CUDAGraph
    ids: torch.Tensor  # [R]
    numbers: torch.Tensor  # [N], int32: positions, write slots, work lists
    hidden: torch.Tensor  # [R, hidden]


@dataclass(slots=True, eq=False)
class DecodeGraphs:
    """The graphs of one model, and its only user of them.

    Attributes:
        base: The model without its head, under tree attention.
        pool: Its K/V; when it grows, all graphs are captured anew.
        windows: Of each layer (tokens), None = it sees whole paths.
        heads: Query heads (count).
        captured: Graphs captured so far (count).
    """

    base: Any
    pool: KVPool
    windows: Sequence[int | None]
    heads: int
    captured: int = 0
    _graphs: dict[Hashable, _Graph] = field(default_factory=dict)
    _num_pages: int = 0
    _memory: Any = None  # shared by all graphs: no two run at once, and what one leaves is copied out before the next
    _staged: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    _sent: torch.cuda.Event | None = None

    def fits(self, layout: TreeLayout) -> bool:
        """Whether a pass over one new token per row is small enough for a graph."""
        return layout.num_rows <= MAX_ROWS

    def run(self, ids: torch.Tensor, layout: TreeLayout) -> torch.Tensor:
        """One pass; the layout lies on the CPU, the token ids ([B], int64) on the model's device. [B, hidden]."""
        rows = len(ids)
        if self._num_pages != self.pool.num_pages:
            self._graphs, self._num_pages = {}, self.pool.num_pages
        works = self._plan(layout)
        room = round_rows(rows)
        key = (room, *((name, work.shape) for name, work in works.items()))
        numbers = self._stage(room, layout, works)
        graph = self._graphs.get(key)
        if graph is not None:
            self._fill(graph, ids, numbers)
            graph.graph.replay()
            return graph.hidden[:rows].clone()
        static_ids = ids.new_zeros(room)
        static_numbers = torch.empty(len(numbers), dtype=torch.int32, device=self.pool.device)
        forward = self._forward(room, static_numbers, works)
        graph = _Graph(torch.cuda.CUDAGraph(), static_ids, static_numbers, static_ids)
        self._fill(graph, ids, numbers)
        hidden = self._pass(static_ids, static_numbers, forward)  # compiles what is not yet, and is this pass's result
        if forward.calls != len(self.pool.shapes):
            raise UnsupportedModelError(
                f"{forward.calls} of {len(self.pool.shapes)} layers used tree attention: the attention of "
                f"{type(self.base).__name__} was changed after Runner took it, perhaps through a config object that "
                "another model shares; give each model its own config"
            )
        if self._memory is None:
            self._memory = torch.cuda.graph_pool_handle()
        with torch.cuda.graph(graph.graph, pool=self._memory, capture_error_mode="thread_local"):
            graph.hidden = self._pass(static_ids, static_numbers, forward)
        self._graphs[key] = graph
        self.captured += 1
        return hidden[:rows]

    def _plan(self, layout: TreeLayout) -> dict[Hashable, WorkList]:
        works: dict[Hashable, WorkList] = {}
        same: dict[Hashable, WorkList] = {}  # of one layout: a window that hides nothing has that of no window
        for window, cache in zip(self.windows, self.pool.layers, strict=True):
            name, seen = kind(window, cache), layout.within(window)
            if name not in works:
                shared = (id(seen), cache.shape[2:])
                if shared not in same:
                    same[shared] = plan_pass(seen, cache, group=self.heads // cache.shape[2])
                works[name] = same[shared]
        return works

    def _stage(self, room: int, layout: TreeLayout, works: dict[Hashable, WorkList]) -> torch.Tensor:
        """All that changes from pass to pass, in one pinned buffer that the last pass no longer reads."""
        total = 2 * room + sum(len(work.numbers) for work in works.values())
        if self._sent is not None:
            self._sent.synchronize()
        if len(self._staged) < total:
            self._staged = torch.empty(2 * total, dtype=torch.int32, pin_memory=True)
        staged = self._staged[:total]
        slots = layout.write_slots
        if isinstance(slots, slice):
            slots = torch.arange(slots.start, slots.stop)
        staged[:room] = 0
        staged[: layout.num_rows] = layout.position_ids
        staged[room : 2 * room] = -1
        staged[room : room + layout.num_rows] = (
            torch.arange(slots.start, slots.stop) if isinstance(slots, slice) else slots
        )
        start = 2 * room
        for work in works.values():
            staged[start : start + len(work.numbers)] = work.numbers
            start += len(work.numbers)
        return staged

    def _fill(self, graph: _Graph, ids: torch.Tensor, numbers: torch.Tensor) -> None:
        graph.numbers.copy_(numbers, non_blocking=True)
        graph.ids[: len(ids)] = ids
        self._sent = torch.cuda.Event()
        self._sent.record()

    def _forward(self, room: int, numbers: torch.Tensor, works: dict[Hashable, WorkList]) -> GraphForward:
        start, moved = 2 * room, {}
        for name, work in works.items():
            moved[name] = work.over(numbers[start : start + len(work.numbers)])
            start += len(work.numbers)
        return GraphForward(self.pool, self.windows, numbers[room : 2 * room], moved)

    def _pass(self, ids: torch.Tensor, numbers: torch.Tensor, forward: GraphForward) -> torch.Tensor:
        positions = numbers[: len(ids)].long()
        output = self.base(input_ids=ids[None], position_ids=positions[None], use_cache=False, ets_tree=forward)
        return output.last_hidden_state[0]


def kind(window: int | None, cache: torch.Tensor) -> Hashable:
    """Layers of one kind attend by the same work list."""
    return window, cache.shape[2:]


def round_rows(rows: int) -> int:
    """Rows of the graph that serves so many: at most a quarter more from 8 on."""
    step = max(1, 1 << max(0, (rows - 1).bit_length() - 3))
    return -(-rows // step) * step
