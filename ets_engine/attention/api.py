"""The one public attention function: validates, then dispatches explicitly; it knows no tree, only index tensors."""

from __future__ import annotations

from collections.abc import Hashable, MutableMapping, Sequence
from importlib.util import find_spec
from typing import Any, Literal, Protocol

import torch

Implementation = Literal["auto", "eager", "triton", "reference"]


class SegmentLayout(Protocol):
    """K/V that several queries share; see `tree_attention`."""

    @property
    def queries(self) -> torch.Tensor | None:
        """Queries that see it, None = all; shape [R]."""
        ...

    @property
    def slots(self) -> torch.Tensor | slice:
        """Where its K/V lies; shape [U]."""
        ...

    @property
    def hidden(self) -> torch.Tensor | None:
        """How many of its first slots each query does not see, None = no query misses one; shape [R]."""
        ...


class AttentionLayout(Protocol):
    """Which query sees which slot: shared segments, and a padded private tail per row."""

    @property
    def segments(self) -> Sequence[SegmentLayout]:
        """Shared parts, each read once."""
        ...

    @property
    def tail_slots(self) -> torch.Tensor:
        """The rest of each row's path, in order; shape [B, L]."""
        ...

    @property
    def tail_bias(self) -> torch.Tensor | None:
        """Added to the scores of the tail, None = see `tail_causal`; shape [B, 1, Q, L]."""
        ...

    @property
    def tail_blocks(self) -> Sequence[tuple[int, int, int]]:
        """First row, row after the last and longest tail of rows that are read together; all rows in order."""
        ...

    @property
    def tail_causal(self) -> bool:
        """Whether the tail is the queries themselves, each seeing itself and those before it."""
        ...

    @property
    def query_index(self) -> torch.Tensor | None:
        """Packed query of each padded one, None = no padding; shape [B, Q]."""
        ...

    @property
    def packed_index(self) -> torch.Tensor | None:
        """Padded query of each packed one, None with `query_index`; shape [T]."""
        ...

    @property
    def num_rows(self) -> int:
        """B."""
        ...

    @property
    def num_queries(self) -> int:
        """Q, the most queries of one row."""
        ...


def tree_attention(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    implementation: Implementation = "auto",
    works: MutableMapping[Hashable, Any] | None = None,
) -> torch.Tensor:
    """Softmax attention of packed queries over a shared, paged KV cache.

    Equal to plain attention of every query over the slots that the layout lets it see: its own row's whole path, or
    the last tokens of it where the layout was made for a sliding window. The layout is the only word on who sees what;
    no implementation knows of positions or windows. H query heads, K KV heads (H a multiple of K; query head `h` reads
    KV head `h // (H // K)`), D head dim, T queries of B rows with at most Q each, S slots.

    Args:
        query: Queries, rows packed one after the other. Shape [T, H, D].
        cache: Keys at [:, 0], values at [:, 1], the queries' own already written. Shape [S, 2, K, D].
        layout: Who sees what:
            `segments`: `slots` ([U], or a slice) seen by `queries` ([R] in 0..T-1, distinct, None = every query,
            then R = T), by each from its `hidden`-th on ([R] in 0..U-1, None = all of them by all): a query of a
            segment sees at least its last slot, so no row of scores is wholly masked;
            `tail_slots` [B, L]: the rest of each row's path, in order, seen according to `tail_bias` (additive, 0 or
            -inf, [B, 1, Q, L]; a query sees one interval that ends with itself), or causally when `tail_causal` (then
            L = Q), or wholly; entries that no query of the row sees are padding and hold some slot that may be read;
            `tail_blocks`: rows whose tails are gathered together, cut to the longest of them;
            `query_index` [B, Q] and `packed_index` [T] map packed to padded queries and back, None = T is B x Q.
            No slot is seen twice by the same query.
        scale: Factor on the scores, usually D**-0.5.
        softcap: Soft cap on the scaled scores, `softcap * tanh(score / softcap)`, before any masking (Gemma 2,
            arXiv 2408.00118); > 0, None = no cap.
        sinks: A learned score per head that joins the softmax but has no value, so that a query may attend to nothing
            (gpt-oss, arXiv 2508.10925); neither scaled nor capped. Shape [H].
        implementation: "triton" is the kernel, for fp16, bf16 and fp32 on a CUDA device or in Triton's interpreter;
            its layout may lie on the CPU, where it is read. "eager" is plain torch, on any device. "reference" is the
            slow specification. "auto" is what `choose_implementation` says. None falls back to another.
        works: Where the kernel keeps what it derives from a layout, for other layers of the same pass: an empty dict,
            dropped after the pass. None = derived at each call.

    Returns:
        Shape [T, H, D], dtype of `query`.

    Raises:
        ValueError: shapes that do not fit together, a soft cap that is not > 0, an unknown implementation, or one that
            does not know the device, dtype or shape.
    """
    if query.dim() != 3 or cache.dim() != 4 or cache.shape[1] != 2:
        raise ValueError(f"need query [T, H, D] and cache [S, 2, K, D], got {list(query.shape)}, {list(cache.shape)}")
    if query.shape[2] != cache.shape[3] or query.shape[1] % cache.shape[2]:
        raise ValueError(
            f"query heads {query.shape[1]} x {query.shape[2]} do not fit KV heads {cache.shape[2]} x {cache.shape[3]}: "
            "head dims must be equal and query heads a multiple of KV heads"
        )
    if layout.query_index is None and layout.num_rows * layout.num_queries != query.shape[0]:
        raise ValueError(f"{layout.num_rows} rows x {layout.num_queries} queries are not {query.shape[0]} queries")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap={softcap} must be > 0; use None for scores without a cap")
    if sinks is not None and sinks.shape != query.shape[1:2]:
        raise ValueError(f"sinks {list(sinks.shape)} must be one number for each of {query.shape[1]} query heads")
    if implementation == "auto":
        group = query.shape[1] // cache.shape[2]
        implementation = choose_implementation(query.device, query.dtype, head_dim=query.shape[2], group=group)
    match implementation:
        case "eager":
            from ets_engine.attention.eager import tree_attention_eager

            return tree_attention_eager(query, cache, layout, scale=scale, softcap=softcap, sinks=sinks)
        case "triton":
            from ets_engine.attention.kernel import tree_attention_triton

            return tree_attention_triton(query, cache, layout, scale=scale, softcap=softcap, sinks=sinks, works=works)
        case "reference":
            from ets_engine.attention.reference import tree_attention_reference

            return tree_attention_reference(query, cache, layout, scale=scale, softcap=softcap, sinks=sinks)
        case _:
            raise ValueError(
                f"implementation={implementation!r} is unknown; use 'auto', 'eager', 'triton' or 'reference'"
            )


def choose_implementation(
    device: torch.device, dtype: torch.dtype, *, head_dim: int, group: int
) -> Literal["eager", "triton"]:
    """What "auto" means.

    "triton" on an NVIDIA GPU of compute capability 8.0 or higher where Triton is installed, for fp16, bf16 and fp32,
    head dims of 16 to 256 and at most 16 query heads to a KV head; "eager" everywhere else.

    Args:
        device: Of the queries.
        dtype: Of queries and cache.
        head_dim: D.
        group: H / K.

    Example:
        >>> choose_implementation(torch.device("cpu"), torch.bfloat16, head_dim=128, group=4)
        'eager'
    """
    fits = dtype in (torch.float16, torch.bfloat16, torch.float32) and 16 <= head_dim <= 256 and group <= 16
    if not fits or device.type != "cuda" or torch.version.cuda is None or find_spec("triton") is None:
        return "eager"
    return "triton" if torch.cuda.get_device_capability(device) >= (8, 0) else "eager"
