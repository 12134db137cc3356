"""Fast tree attention in plain torch: shared segments once for all queries, private tails batched, then merged.

Merging is by log-sum-exp (Hydragen, arXiv 2402.05099): `l = log(e^l1 + e^l2)`, `o = o1 e^(l1-l) + o2 e^(l2-l)`.
On a CPU both parts use torch's own flash kernel, which returns the log-sum-exp. Against matmul + softmax + matmul on
two AVX2 cores (64 queries, 4 KV heads x 64, 360 keys) it takes 0.6 of the time over a shared segment in fp32, and in
bf16 0.65 ms instead of 25 to 35 ms, because matmul has no fast bf16 path there. Its bf16 path costs more per call than
its fp32 one; over many small private tails that is most of the time, so those are widened first: 64 rows, 32 tokens
each, 4 KV heads x 64, on one AVX-512 core with bf16 instructions 0.42 instead of 0.61 ms. That kernel has no soft cap:
capped scores take the matmuls.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from ets_engine.attention.api import AttentionLayout

Partial = tuple[torch.Tensor, torch.Tensor]  # output and log-sum-exp of one part of the keys


def tree_attention_eager(
    query: torch.Tensor,
    cache: torch.Tensor,
    layout: AttentionLayout,
    *,
    scale: float,
    softcap: float | None,
    sinks: torch.Tensor | None,
) -> torch.Tensor:
    """See `tree_attention`."""
    num_tokens, heads, dim = query.shape
    kv_heads = cache.shape[2]
    grouped = query.view(num_tokens, kv_heads, heads // kv_heads, dim)  # [T, K, G, D]
    output, lse = _tail(grouped, cache, layout, scale, softcap)
    output = output.to(lse.dtype)  # rounded once, at the end
    for segment in layout.segments:
        keys, values = _read(cache, segment.slots)
        if segment.queries is None:
            output, lse = merge(_shared(grouped, keys, values, segment.hidden, scale, softcap), (output, lse))
        else:
            index = segment.queries
            part = _shared(grouped[index], keys, values, segment.hidden, scale, softcap)
            part = merge(part, (output[index], lse[index]))
            output = output.index_copy(0, index, part[0])
            lse = lse.index_copy(0, index, part[1])
    if sinks is not None:  # one more term of the sum that the log-sum-exp stands for, without a value
        output = output * torch.sigmoid(lse - sinks.view(kv_heads, -1)).unsqueeze(-1)
    return output.reshape(num_tokens, heads, dim).to(query.dtype).contiguous()


def merge(left: Partial, right: Partial) -> Partial:
    """Attention over the union of two disjoint sets of keys, from the partial results over each.

    Args:
        left: Output [..., D] and log-sum-exp [...].
        right: The same over the other keys.

    Returns:
        Output and log-sum-exp over both, in the dtype of the log-sum-exp.
    """
    weight = torch.sigmoid(left[1] - right[1]).unsqueeze(-1)  # = e^l1 / (e^l1 + e^l2), without overflow
    output = torch.lerp(right[0].to(weight.dtype), left[0].to(weight.dtype), weight)
    return output, torch.logaddexp(left[1], right[1])


def _shared(
    grouped: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    hidden: torch.Tensor | None,
    scale: float,
    softcap: float | None,
) -> Partial:
    """All queries over the same keys: queries and head groups stacked, so K/V is read once.

    Args:
        grouped: Queries by KV head and group. Shape [R, K, G, D].
        keys: Shape [U, K, D].
        values: Shape [U, K, D].
        hidden: See `SegmentLayout.hidden`. Shape [R].
        scale: Factor on the scores.
        softcap: See `tree_attention`.

    Returns:
        [R, K, G, D] and [R, K, G].
    """
    count, kv_heads, group, dim = grouped.shape
    stacked = grouped.permute(1, 0, 2, 3).reshape(1, kv_heads, count * group, dim)
    bias = None
    if hidden is not None:
        unseen = torch.arange(len(keys), device=keys.device) < hidden.repeat_interleave(group).unsqueeze(-1)
        dtype = torch.promote_types(grouped.dtype, torch.float32)
        bias = torch.zeros(unseen.shape, dtype=dtype, device=keys.device).masked_fill_(unseen, float("-inf"))
        bias = bias[None, None]  # [1, 1, R * G, U]
    keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
    output, lse = attend(stacked, keys, values, scale, bias, softcap=softcap)
    output = output.view(kv_heads, count, group, dim).permute(1, 0, 2, 3)
    return output, lse.view(kv_heads, count, group).permute(1, 0, 2)


def _tail(
    grouped: torch.Tensor, cache: torch.Tensor, layout: AttentionLayout, scale: float, softcap: float | None
) -> Partial:
    """Each row's queries over its own tail, block by block: [T, K, G, D] and [T, K, G]."""
    padded = grouped if layout.query_index is None else grouped[layout.query_index.view(-1)]
    padded = padded.view(layout.num_rows, layout.num_queries, *grouped.shape[1:])
    blocks: list[Partial] = []
    for start, stop, length in layout.tail_blocks:
        bias = None if layout.tail_bias is None else layout.tail_bias[start:stop, ..., :length]
        slots = layout.tail_slots[start:stop, :length]
        blocks.append(_block(padded[start:stop], cache, slots, bias, scale, layout.tail_causal, softcap))
    output, lse = blocks[0] if len(blocks) == 1 else map(torch.cat, zip(*blocks, strict=True))
    return (output, lse) if layout.packed_index is None else (output[layout.packed_index], lse[layout.packed_index])


def _block(
    padded: torch.Tensor,
    cache: torch.Tensor,
    slots: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    causal: bool,
    softcap: float | None,
) -> Partial:
    """Some rows' queries over their tails; decoding in fp32 where that is faster.

    Args:
        padded: Queries by row, KV head and group. Shape [b, Q, K, G, D].
        cache: Shape [S, 2, K, D].
        slots: The rows' tails. Shape [b, L].
        bias: See `TreeLayout.tail_bias`. Shape [b, 1, Q, L].
        scale: Factor on the scores.
        causal: See `TreeLayout.tail_causal`.
        softcap: See `tree_attention`.

    Returns:
        [b * Q, K, G, D] and [b * Q, K, G].
    """
    rows, num_queries, kv_heads, group, dim = padded.shape
    part = cache.index_select(0, slots.flatten()).view(rows, -1, 2, kv_heads, dim)
    if num_queries == 1 and part.device.type == "cpu" and part.dtype.itemsize == 2:
        padded, part = padded.float(), part.float()
    keys, values = part.permute(2, 0, 3, 1, 4).unbind()  # each [b, K, L, D]
    if num_queries == 1:  # decoding: the head group takes the place of the queries
        bias = None if bias is None else bias.expand(-1, -1, group, -1)
        return attend(padded[:, 0], keys, values, scale, bias, softcap=softcap)
    heads = padded.permute(3, 0, 2, 1, 4)  # [G, b, K, Q, D]
    parts = [attend(one, keys, values, scale, bias, causal, softcap) for one in heads]
    output = torch.stack([part[0] for part in parts], -2)  # [b, K, Q, G, D]
    lse = torch.stack([part[1] for part in parts], -1)  # [b, K, Q, G]
    output = output.transpose(1, 2).reshape(rows * num_queries, kv_heads, group, dim)
    return output, lse.transpose(1, 2).reshape(rows * num_queries, kv_heads, group)


def _read(cache: torch.Tensor, slots: torch.Tensor | slice) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V at some slots, each [N, K, D]; a slice reads in place, an index gathers both at once."""
    part = cache[slots] if isinstance(slots, slice) else cache.index_select(0, slots)
    keys, values = part.unbind(1)
    return keys, values


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Partial:
    """Plain attention that also returns the log-sum-exp of the scores.

    Args:
        query: Shape [B, H, Q, D].
        keys: Shape [B, H, L, D].
        values: Shape [B, H, L, D].
        scale: Factor on the scores.
        bias: Additive, broadcastable to [B, 1, Q, L]; every query sees at least one key.
        causal: Query i sees keys 0..i.
        softcap: See `tree_attention`.

    Returns:
        [B, H, Q, D] in the dtype of `query` or a wider one, and [B, H, Q] in fp32 (fp64 for fp64).
    """
    if query.device.type == "cpu":
        if softcap is None:
            return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query, keys, values, is_causal=causal, attn_mask=bias, scale=scale
            )
        if query.dtype.itemsize == 2:
            query, keys, values = query.float(), keys.float(), values.float()
    return attend_by_matmul(query, keys, values, scale, bias, causal, softcap)


def attend_by_matmul(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    bias: torch.Tensor | None = None,
    causal: bool = False,
    softcap: float | None = None,
) -> Partial:
    """`attend` where torch has no kernel for it that returns the log-sum-exp: two matmuls, softmax in fp32."""
    scores = (query @ keys.transpose(-1, -2)).to(torch.promote_types(query.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    if causal:
        ahead = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
        scores = scores.masked_fill(ahead, float("-inf"))
    if bias is not None:
        scores = scores + bias
    lse = scores.logsumexp(-1)
    weights = (scores - lse.unsqueeze(-1)).exp().to(values.dtype)
    return weights @ values, lse
