"""Forward passes of one model over its KV tree: laid out for its windows, launched plainly or as CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ets_engine.kv import DecodeLayoutBuilder, LayoutBuilder, PrefixTree, Row, TreeLayout
from ets_engine.runtime.hook import TreeForward, check_calls
from ets_engine.runtime.sampler import SamplingParams, draw

if TYPE_CHECKING:
    from ets_engine.runtime.graphs import DrawGraphs, PassGraphs

# A segment costs the kernel a partial result per query, written and read: of 32 bits, about four tokens for each query
# head of a KV head. That many tokens saved pay for it.
KERNEL_MIN_SAVED_TOKENS = 64
MAX_GRAPH_ROWS = 512  # larger passes keep a GPU busy without a graph


class Read(NamedTuple):
    """What a pass gave.

    Attributes:
        states: Last hidden states of its tokens, row after row. Shape [T, hidden].
        last_index: Where each row's last one is, None = each row has one token. Shape [B].
        kv_bytes: Distinct K/V that its layers read (bytes); what lies outside a layer's window is not read.
    """

    states: torch.Tensor
    last_index: torch.Tensor | None
    kv_bytes: int


class Passes:
    """Lays out and launches; the only user of a model's forward, and of its draws where those are graphs.

    Args:
        base: The model without its head, under tree attention.
        logits: Its head.
        tree: Of its K/V.
        windows: Of each layer (tokens), None = it sees whole paths.
        implementation: Of attention, in all layers.
        heads: Query heads of a layer (count).
        captures: Whether passes of one token a row, and draws, are CUDA graphs.
        min_saved_tokens: See `LayoutBuilder`, None = what suits the implementation.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        logits: Callable[[torch.Tensor], torch.Tensor],
        tree: PrefixTree,
        windows: Sequence[int | None],
        *,
        implementation: Literal["eager", "triton"],
        heads: int,
        captures: bool,
        min_saved_tokens: int | None = None,
    ) -> None:
        """See the class."""
        self.windows = windows
        self._base = base
        self._logits = logits
        self._tree = tree
        self._implementation: Literal["eager", "triton"] = implementation
        pool = tree.pool
        uses_kernel = implementation == "triton"
        if uses_kernel and min_saved_tokens is None:
            min_saved_tokens = KERNEL_MIN_SAVED_TOKENS
        self.layouts = LayoutBuilder(
            tree,
            device="cpu" if uses_kernel else pool.device,  # the kernel's work list is made there
            bias_dtype=torch.promote_types(pool.dtype, torch.float32),
            min_saved_tokens=min_saved_tokens,
            windows=[window for window in windows if window is not None],
        )
        self._decodes = DecodeLayoutBuilder(self.layouts)
        self._token_bytes: dict[int | None, int] = {}  # KV of one token over the layers with that window
        for shape, window in zip(pool.shapes, windows, strict=True):
            token_bytes = 2 * shape.kv_heads * shape.head_dim * pool.dtype.itemsize
            self._token_bytes[window] = self._token_bytes.get(window, 0) + token_bytes
        self.graphs: PassGraphs | None = None
        self._draws: DrawGraphs | None = None
        if captures:
            from ets_engine.runtime.graphs import DrawGraphs, Graphs, PassGraphs

            graphs = Graphs()
            self.graphs = PassGraphs(graphs, base, pool, windows, heads)
            self._draws = DrawGraphs(graphs, logits)

    def decode(self, ids: torch.Tensor, handles: Sequence[int]) -> Read:
        """A pass over the last token of each of some leaves, for which the tree has made room.

        Args:
            ids: Of those tokens, on the model's device. Shape [B].
            handles: Distinct KV nodes. Shape [B].
        """
        if self.graphs is None or len(handles) > MAX_GRAPH_ROWS:
            return self.read(ids, [Row(handle, self._tree.num_tokens(handle) - 1, 1) for handle in handles])
        layout = self._decodes.build(handles)
        kv_bytes = sum(layout.distinct_tokens[window] * size for window, size in self._token_bytes.items())
        return Read(self.graphs.run(ids, layout), None, kv_bytes)

    def read(self, ids: torch.Tensor, rows: Sequence[Row]) -> Read:
        """A pass over any number of tokens of each row, for which the tree has made room.

        Args:
            ids: Row after row, on the model's device. Shape [T].
            rows: Distinct nodes, and which of their tokens.
        """
        layout = self.layouts.build(rows)
        kv_bytes = sum(layout.within(window).distinct_tokens * size for window, size in self._token_bytes.items())
        layout = self._move(layout)
        forward = TreeForward(self._tree.pool, layout, self.windows, self._implementation)
        output = self._base(
            input_ids=ids[None], position_ids=layout.position_ids[None], use_cache=False, ets_tree=forward
        )
        check_calls(forward.calls, len(self.windows), self._base)
        return Read(output.last_hidden_state[0], layout.last_index if len(ids) > len(rows) else None, kv_bytes)

    def forget(self) -> None:
        """The last pass counts for nothing: it failed, or its tokens were taken back."""
        self._decodes.forget()

    def draw(
        self, states: torch.Tensor, params: Sequence[SamplingParams], draws: NDArray[np.float64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each hidden state, as `sampler.draw` from its logits. [B, hidden] -> [B], [B]."""
        if self._draws is not None and len(states) <= MAX_GRAPH_ROWS:
            return self._draws.run(states, params, draws)
        return draw(self._logits(states), params, draws)

    def _move(self, layout: TreeLayout) -> TreeLayout:
        """What the model and the pool index with, on their device; the rest stays where it was made."""
        device, slots = self._tree.pool.device, layout.write_slots
        return replace(
            layout,
            position_ids=layout.position_ids.to(device),
            write_slots=slots if isinstance(slots, slice) else slots.to(device),
            last_index=layout.last_index.to(device),
        )
