"""A GPU's way through the engine, on a CPU: passes ahead of the host, decode passes and draws as graphs.

What a graph holds is done again where it would be replayed. Kernels are either Triton's interpreter's or, for whole
searches, a few lines of torch that read the same lists (`use_plain_kernels`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

from ets_engine.attention.api import tree_attention
from ets_engine.attention.work import WorkList
from ets_engine.runtime import SamplingParams
from ets_engine.runtime.sampler import draw


class Again:
    """In place of a CUDA graph: work that is done again on the same tensors."""

    def __init__(self, work: Callable[[], Any]) -> None:
        """Do it a first time, into `result`."""
        self._work, self.result = work, work()
        self.replays = 0

    def replay(self) -> None:
        """Do it again."""
        self.replays += 1
        again = self._work()
        both = zip(self.result, again, strict=True) if isinstance(again, tuple) else [(self.result, again)]
        for old, new in both:
            old.copy_(new)


def emulate_gpu(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
    """Runners made from now on do as on a GPU; the list that their graphs will be in."""
    from ets_engine.runtime import graphs, runner

    empty = torch.empty
    captured: list[Again] = []

    def capture(self: Any, work: Callable[[], Any]) -> tuple[Again, Any]:
        self.captured += 1
        captured.append(Again(work))
        return captured[-1], captured[-1].result

    monkeypatch.setattr(runner, "choose_implementation", lambda *_, **__: "triton")
    monkeypatch.setattr(runner.Runner, "_can_use_graphs", lambda _: True)
    monkeypatch.setattr(runner.Runner, "runs_ahead", True)
    monkeypatch.setattr(graphs.Graphs, "capture", capture)
    monkeypatch.setattr(torch.cuda, "Event", MagicMock)
    monkeypatch.setattr(torch, "empty", lambda *sizes, pin_memory=False, **options: empty(*sizes, **options))
    return captured


def use_plain_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch in place of all that Triton would launch."""
    from ets_engine.attention import kernel
    from ets_engine.runtime import graphs

    monkeypatch.setattr(kernel, "processors_of", lambda _: 8)  # so that pieces are cut
    monkeypatch.setattr(kernel, "tree_attention_triton", _attend)
    monkeypatch.setattr(graphs, "store", _store)
    monkeypatch.setattr(graphs, "run_work", _run_work)
    monkeypatch.setattr(graphs, "draw_by_blocks", _draw)


def _attend(*arguments: Any, works: Any = None, **options: Any) -> torch.Tensor:
    return tree_attention(*arguments, **options, implementation="eager")


def _store(cache: torch.Tensor, slots: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
    real = slots >= 0
    cache[slots[real].long()] = torch.stack([keys[real], values[real]], dim=1)


def _run_work(
    query: torch.Tensor,
    cache: torch.Tensor,
    work: WorkList,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Each query over all slots that tiles let it see; no slot is seen twice."""
    output = torch.zeros_like(query)
    slots, entries = work.slots.numpy(), work.entries.tolist()
    seen: dict[int, list[np.ndarray[Any, Any]]] = {}
    for part in work.parts:
        for begin, end, first_entry, count in work.tiles(part).tolist():
            for number, first, stop, _ in entries[first_entry : first_entry + count]:
                seen.setdefault(number, []).append(slots[max(begin, first) : min(end, stop)])
    for number, parts in seen.items():
        together = np.concatenate(parts)
        assert len(np.unique(together)) == len(together)
        keys, values = cache[torch.from_numpy(together).long()].repeat_interleave(work.group, 2).unbind(1)  # [U, H, D]
        scores = torch.einsum("hd,uhd->hu", scale * query[number], keys)
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        if sinks is not None:
            scores = torch.cat([scores, sinks.to(scores.dtype)[:, None]], dim=1)
        output[number] = torch.einsum("hu,uhd->hd", scores.softmax(-1)[:, : len(values)], values)
    return output


def _draw(
    logits: torch.Tensor, temperatures: torch.Tensor | None, draws: torch.Tensor, cuts: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    heats = torch.ones(len(logits)) if temperatures is None else temperatures
    rules = torch.tensor([[1.0], [0.0], [0.0]]).expand(3, len(logits)) if cuts is None else cuts
    params = [
        SamplingParams(heat, top_p, int(top_k), min_p)
        for heat, (top_p, top_k, min_p) in zip(heats.tolist(), rules.T.tolist(), strict=True)
    ]
    return draw(logits, params, draws.numpy())
