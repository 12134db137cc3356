"""The one primitive: `extend` tree nodes of a transformers model by tokens, giving hidden states; it knows no text.

Policy and verifier are the same thing here: a decoder-only base model over a KV tree, and a head on its hidden states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from ets_engine.attention.api import choose_implementation
from ets_engine.config import EngineConfig
from ets_engine.errors import ContextLengthError, PoolExhaustedError, UnsupportedModelError
from ets_engine.kv import KVPool, LayerShape, PrefixCache, PrefixTree, Row
from ets_engine.kv.pool import INITIAL_TOKENS
from ets_engine.runtime.batching import plan_forwards
from ets_engine.runtime.compile import compile_layers
from ets_engine.runtime.joint_linear import join_linears
from ets_engine.runtime.kv_memory import reserve_kv
from ets_engine.runtime.linear import speed_up_linears
from ets_engine.runtime.passes import Passes, Read
from ets_engine.runtime.sampler import SamplingParams
from ets_engine.runtime.support import (
    check_config,
    check_outputs,
    context_tokens,
    probe_layers,
    text_config,
    use_tree_attention,
)
from ets_engine.runtime.transfer import upload

LOAD_TOKENS = 64  # of the pool that a model is tried with, before the memory for its own is known
CUDA_INITIAL_TOKENS = 1 << 20  # of the pool, or all it may have: captured passes are lost when it grows

Rows = Sequence[tuple[int, Sequence[int]]]


@dataclass(slots=True)
class RunnerStats:
    """What a runner has done so far.

    Attributes:
        forwards: Forward passes (count).
        tokens: Tokens fed (count).
        busy_s: Seconds in forward passes, heads and sampling, added by those who wait for their results.
        bytes_moved: Weights plus distinct KV read, summed over forward passes (bytes); KV outside the window of a layer
            is not read.
    """

    forwards: int = 0
    tokens: int = 0
    busy_s: float = 0.0
    bytes_moved: int = 0


class Runner:
    """A transformers decoder over a KV tree.

    Layers may see through sliding windows. The tree keeps every token of every path all the same: windows bound what a
    layer reads, not what is stored nor how long a path may get, and forks, chunks and remembered prompts are as ever.

    Args:
        model: As `AutoModelForCausalLM` or `AutoModelForTokenClassification` loads it; switched to tree attention and
            to evaluation for good. Some of its modules are replaced, by which names of weights change on a GPU.
        config: Pages, pool limit and prefill chunk; device and dtype are the model's own.
        verify: Compare tree attention with the model's own on a few tokens at load. Only skip it for a checkpoint
            that passed before.
        reserve: Take the KV pool at once, as for the only model of its device. Without, the pool is tiny and has no
            limit until `reserve_kv` gives several models theirs.

    Raises:
        UnsupportedModelError: the architecture cannot be honoured, with the reason.
        ConfigError: `kv_pool_tokens` is less than a page.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> tiny = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        ...                    num_attention_heads=2, num_key_value_heads=1)
        >>> runner = Runner(LlamaForCausalLM(tiny))
        >>> prompt = runner.tree.root()
        >>> runner.extend([(prompt, [3, 1, 4])]).shape
        torch.Size([3, 16])
        >>> left, right = runner.tree.fork(prompt), runner.tree.fork(prompt)
        >>> runner.logits(runner.extend_last([(left, [1]), (right, [5, 9])])).shape
        torch.Size([2, 32])
    """

    def __init__(
        self,
        model: PreTrainedModel,
        config: EngineConfig | None = None,
        *,
        verify: bool = True,
        reserve: bool = True,
    ) -> None:
        self.config = config or EngineConfig()
        check_config(model.config)
        use_tree_attention(model)
        self.model = model.eval()
        self._base: PreTrainedModel = model.base_model
        self._head = _head(model)
        # It does not know this runner, which it would keep alive: passes hold it.
        self._logits = partial(_apply_head, self._head, text_config(model), type(model).__name__)
        first = next(model.parameters())
        self.device, self.dtype = first.device, first.dtype
        self.hidden_size = text_config(model).hidden_size
        self.context_tokens = context_tokens(model.config)
        if self.device.type == "cuda":
            join_linears(model)
        speed_up_linears(model)
        shapes, windows = probe_layers(model)
        self._implementation: Literal["eager", "triton"] = self._choose_attention(shapes)
        fused: list[torch.nn.Module] = []
        if self._implementation == "triton" and self.device.type == "cuda":
            from ets_engine.runtime.fused_layer import fuse_layers
            from ets_engine.runtime.gated_linear import join_gates

            join_gates(model)
            fused = fuse_layers(model)
        if self.config.compile_layers:
            compile_layers(model, skipped=fused)
        self.fused_layers = len(fused)
        self.weight_bytes, self.head_bytes = _weight_bytes(self._base, self._head)
        self.stats = RunnerStats()
        self._use_pool(shapes, None, LOAD_TOKENS)
        self._captures = False
        self._use_windows(windows)
        self._captures = self._can_use_graphs()
        self._use_windows(windows)
        if verify:
            check_outputs(model, windows, self._probe)
            self.tree.reset_peak()
            self.stats = RunnerStats()
        if reserve:
            reserve_kv({self: 1.0}, self.config)

    @property
    def num_parameters(self) -> int:
        """Of the model with its head, shared ones once (count)."""
        return self.model.num_parameters()

    @property
    def bytes_per_token(self) -> int:
        """KV of one token over all layers (bytes)."""
        return self.tree.pool.bytes_per_token

    def reserve(self, max_tokens: int | None) -> None:
        """Take a new, empty pool in place of the old one, of whose tree nothing may be held any more.

        Args:
            max_tokens: Most KV tokens of it, None = no limit but memory. On a CPU the pool begins small and doubles; on
                a GPU it is taken now, up to `CUDA_INITIAL_TOKENS`.

        Raises:
            ConfigError: `max_tokens` is less than a page.
        """
        initial_tokens = INITIAL_TOKENS if self.device.type == "cpu" else CUDA_INITIAL_TOKENS
        self._use_pool(self.tree.pool.shapes, max_tokens, initial_tokens)
        self._use_windows(self._passes.windows)

    def _use_pool(self, shapes: Sequence[LayerShape], max_tokens: int | None, initial_tokens: int) -> None:
        """Start an empty tree over a new pool; passes through the old one are `_use_windows`'s to renew."""
        pool = KVPool(
            shapes,
            page_tokens=self.config.page_tokens,
            max_tokens=max_tokens,
            dtype=self.dtype,
            device=self.device,
            initial_tokens=initial_tokens,
        )
        self.tree = PrefixTree(pool)
        self.prefixes = PrefixCache(self.tree, self.config.prefix_cache_tokens)

    def _choose_attention(self, shapes: Sequence[LayerShape]) -> Literal["eager", "triton"]:
        """The kernel if it fits every layer: a layout lies on the CPU for all layers or for none."""
        heads = text_config(self.model).num_attention_heads
        chosen = {
            choose_implementation(self.device, self.dtype, head_dim=one.head_dim, group=heads // one.kv_heads)
            for one in shapes
        }
        return "triton" if chosen == {"triton"} else "eager"

    @property
    def runs_ahead(self) -> bool:
        """Whether passes are only launched when `extend` returns: read what the host needs before the next one."""
        return self.device.type == "cuda"

    @property
    def uses_graphs(self) -> bool:
        """Whether decode passes are CUDA graphs."""
        return self._passes.graphs is not None

    def _can_use_graphs(self) -> bool:
        """Whether a decode pass of this model can be captured: not if it waits for the GPU on its way.

        Raises:
            UnsupportedModelError: it cannot, and `cuda_graphs=True` was asked for.
        """
        wanted = self.config.cuda_graphs
        if wanted is False or self._implementation != "triton" or self.device.type != "cuda":
            if wanted is True:
                raise UnsupportedModelError(
                    f"cuda_graphs=True needs the attention kernel, which {self.device} and {self.dtype} do not have; "
                    "use cuda_graphs='auto'"
                )
            return False
        self._captures = True
        self._use_windows(self._passes.windows)
        root = self.tree.root()
        try:
            self.extend_last([(root, [0])])
        except RuntimeError as error:
            if wanted is True:
                raise UnsupportedModelError(
                    f"no CUDA graph can be made of {type(self.model).__name__} ({error}); use cuda_graphs='auto'"
                ) from error
            return False
        finally:
            self.tree.release(root)
            self._captures = False
        return True

    def _use_windows(self, windows: Sequence[int | None], min_saved_tokens: int | None = None) -> None:
        """Make passes through the tree for the sliding window of each layer (tokens, None = it sees whole paths)."""
        self._passes = Passes(
            self._base,
            self._logits,
            self.tree,
            windows,
            implementation=self._implementation,
            heads=text_config(self.model).num_attention_heads,
            captures=self._captures,
            min_saved_tokens=min_saved_tokens,
        )

    # ------------------------------------------------------------------ the primitive

    @torch.inference_mode()
    def extend(self, rows: Rows) -> torch.Tensor:
        """Append tokens to distinct held leaves and read them.

        Args:
            rows: (KV node, its new token ids), at least one token each.

        Returns:
            Last hidden states (after the final norm), rows packed in order. Shape [T, hidden].

        Raises:
            ValueError: no rows, a row without tokens, or a node named twice.
            ContextLengthError: a path would outgrow the model's context; nothing has changed.
            PoolExhaustedError: the KV pool is full, or the device has no memory left; nothing has changed.
        """
        return self._extend(rows, last_only=False)

    @torch.inference_mode()
    def extend_last(self, rows: Rows) -> torch.Tensor:
        """`extend`, but only each row's last hidden state. Shape [B, hidden]."""
        return self._extend(rows, last_only=True)

    @torch.inference_mode()
    def extend_drawn(self, handles: Sequence[int], ids: torch.Tensor) -> torch.Tensor:
        """`extend_last` by one token each, whose ids ([B], int64) lie on the device and need not be known here yet."""
        return self._extend([(handle, (0,)) for handle in handles], last_only=True, drawn=ids)

    def _extend(self, rows: Rows, *, last_only: bool, drawn: torch.Tensor | None = None) -> torch.Tensor:
        stored = self._append(rows)
        try:
            if all(len(tokens) == 1 for _, tokens in rows):
                ids = self._upload([tokens[0] for _, tokens in rows]) if drawn is None else drawn
                return self._note(self._passes.decode(ids, [handle for handle, _ in rows])).states
            return self._read(rows, stored, last_only=last_only)
        except BaseException as error:
            self._rollback(rows, stored)
            if is_out_of_memory(error):
                raise self._no_memory(f"in a pass over {len(rows)} rows") from error
            raise

    def _read(self, rows: Rows, stored: Sequence[int], *, last_only: bool) -> torch.Tensor:
        """Several tokens of some rows, in as many passes as their lengths ask for."""
        lengths = [len(tokens) for _, tokens in rows]
        sizes = [1] * len(rows) if last_only else lengths
        ends = list(accumulate(sizes))
        forwards = plan_forwards(lengths, self.config.prefill_chunk_tokens)
        hidden: torch.Tensor | None = None
        for chunks in forwards:
            ids = self._upload([token for c in chunks for token in rows[c.row][1][c.start : c.stop]])
            told = [Row(rows[c.row][0], stored[c.row] + c.start, c.stop - c.start) for c in chunks]
            states, last_index, _ = self._note(self._passes.read(ids, told))
            if len(forwards) == 1:
                return states[last_index] if last_only and last_index is not None else states
            if hidden is None:
                hidden = states.new_empty((ends[-1], states.shape[1]))
            if last_only:
                done = [i for i, chunk in enumerate(chunks) if chunk.stop == lengths[chunk.row]]
                if done:
                    hidden[[chunks[i].row for i in done]] = states[done if last_index is None else last_index[done]]
            else:
                first = 0
                for row, start, stop in chunks:
                    begin = ends[row] - sizes[row]
                    hidden[begin + start : begin + stop] = states[first : first + stop - start]
                    first += stop - start
        assert hidden is not None
        return hidden

    def _upload(self, ids: Sequence[int]) -> torch.Tensor:
        return upload(ids, self.device, torch.int64)

    def _note(self, read: Read) -> Read:
        self.stats.forwards += 1
        self.stats.tokens += len(read.states)
        self.stats.bytes_moved += self.weight_bytes + read.kv_bytes
        return read

    def _append(self, rows: Rows) -> list[int]:
        """Make room for all new tokens or for none; the tokens each node had before (counts)."""
        handles, counts = [handle for handle, _ in rows], [len(tokens) for _, tokens in rows]
        if not rows or len(set(handles)) != len(rows) or not all(counts):
            raise ValueError(f"extend needs rows with distinct nodes and >= 1 token each, got {list(rows)!r:.200}")
        stored, paths = self.tree.lengths(handles)
        for path_tokens, count in zip(paths, counts, strict=True):
            if path_tokens + count > self.context_tokens:
                raise ContextLengthError(
                    f"{path_tokens} + {count} tokens do not fit the model's context of {self.context_tokens}; shorten "
                    "the prompt or lower max_tokens"
                )
        try:
            self._append_all(rows, stored)
        except BaseException:
            self._rollback(rows, stored)
            raise
        return stored

    def _append_all(self, rows: Rows, stored: Sequence[int]) -> None:
        """`PrefixTree.append` to all, at the cost of remembered prompts when the pool is full."""
        rest = [(handle, len(tokens)) for handle, tokens in rows]
        while rest:
            try:
                self.tree.append_each(rest)
                return
            except PoolExhaustedError:
                if not self.prefixes.forget_one():
                    raise
                sizes = zip(rows, stored, strict=True)
                rest = [(one, len(ids)) for (one, ids), count in sizes if self.tree.num_tokens(one) == count]

    def take_back(self, handles: Sequence[int]) -> None:
        """Undo the last token of each of some leaves, all of which were read in the last pass."""
        for handle in handles:
            self.tree.truncate(handle, self.tree.num_tokens(handle) - 1)
        self._passes.forget()

    def _rollback(self, rows: Rows, stored: Sequence[int]) -> None:
        self._passes.forget()
        for (handle, _), count in zip(rows, stored, strict=True):
            if self.tree.num_tokens(handle) > count:
                self.tree.truncate(handle, count)

    @torch.inference_mode()
    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The model's head (language model or classifier) on hidden states. [..., hidden] -> [..., outputs].

        Raises:
            UnsupportedModelError: the model was loaded without a head.
        """
        self.stats.bytes_moved += self.head_bytes
        try:
            return self._logits(hidden)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self._no_memory(f"for logits of {hidden.numel() // self.hidden_size} rows") from error
            raise

    @torch.inference_mode()
    def draw(
        self, states: torch.Tensor, params: Sequence[SamplingParams], draws: NDArray[np.float64]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A token for each hidden state, as `sampler.draw` from its logits. [B, hidden] -> [B], [B]."""
        self.stats.bytes_moved += self.head_bytes
        try:
            return self._passes.draw(states, params, draws)
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise self._no_memory(f"in a draw for {len(states)} rows") from error
            raise

    def _no_memory(self, where: str) -> PoolExhaustedError:
        return PoolExhaustedError(
            f"{self.device} ran out of memory {where}; lower kv_memory_fraction, set kv_pool_tokens, or search with "
            "less width"
        )

    def _probe(self, prompt: list[int], branches: list[list[int]], windows: Sequence[int | None]) -> list[torch.Tensor]:
        """Outputs of whole sequences, prompt shared, branches token by token: every path through the code."""
        tree, usual = self.tree, self._passes.windows
        self._use_windows(windows, min_saved_tokens=0)
        root = tree.root()
        shared = [self.extend([(root, prompt)])]
        leaves = [tree.fork(root) for _ in branches]
        steps = [self.extend([(leaf, [ids[i]]) for leaf, ids in zip(leaves, branches, strict=True)]) for i in range(2)]
        for handle in (root, *leaves):
            tree.release(handle)
        self._use_windows(usual)
        own = [torch.stack([step[i] for step in steps]) for i in range(len(branches))]
        sequences = [torch.cat([*shared, part]) for part in own]
        return [self.logits(sequence) if self._head is not None else sequence for sequence in sequences]


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the allocator of a CPU, had no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _head(model: PreTrainedModel) -> torch.nn.Module | None:
    head = model.get_output_embeddings()
    for name in ("score", "classifier"):
        head = getattr(model, name, None) if head is None else head
    return head


def _apply_head(head: torch.nn.Module | None, config: object, name: str, hidden: torch.Tensor) -> torch.Tensor:
    if head is None:
        raise UnsupportedModelError(f"{name} has no output head; load it as a causal LM or a token classifier")
    return _scale_logits(head(hidden), config)


def _scale_logits(logits: torch.Tensor, config: object) -> torch.Tensor:
    """The scalings that some models apply after their head; the check at load proves them."""
    if (factor := getattr(config, "logit_scale", None)) is not None:
        logits = logits * factor
    if (divisor := getattr(config, "logits_scaling", None)) is not None:
        logits = logits / divisor
    if (cap := getattr(config, "final_logit_softcapping", None)) is not None:
        logits = torch.tanh(logits / cap) * cap
    return logits


def _weight_bytes(base: PreTrainedModel, head: torch.nn.Module | None) -> tuple[int, int]:
    """Bytes read per forward pass (all weights but the embedding table, a lookup) and per head call."""
    table = base.get_input_embeddings()
    skipped = {id(parameter) for parameter in table.parameters()} if table is not None else set()
    body = sum(p.numel() * p.element_size() for p in base.parameters() if id(p) not in skipped)
    return body, sum(p.numel() * p.element_size() for p in head.parameters()) if head is not None else 0
