"""Paged K/V memory of one model: tensors and a free list; it knows no tree, no tokens' meaning and no attention.

Layout: one tensor per layer, `[slot, 2, kv_head, head_dim]`, K at 0 and V at 1. A token's K and V of all heads are
one contiguous run, so reading scattered tokens is one gather of long rows instead of two gathers of short ones per
head, and writing new tokens is one copy. A contiguous run of slots is still a plain strided view for the attention
kernel, whose last dimension is contiguous. On two AVX2 cores this gathers 1.4 to 3.6 times as fast as the head-major
layout and attends as fast or faster.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ets_engine.errors import ConfigError, PoolExhaustedError

INITIAL_TOKENS = 4096  # preallocated when no limit is given; the pool doubles from there


@dataclass(frozen=True, slots=True)
class LayerShape:
    """K/V of one token in one layer: `kv_heads` x `head_dim`, for K and for V."""

    kv_heads: int
    head_dim: int


class KVPool:
    """Pages of `page_tokens` slots; slot `page * page_tokens + i` holds the page's i-th token in every layer.

    Args:
        shapes: One per layer; layers may differ.
        page_tokens: Slots per page (count).
        max_tokens: Hard limit in tokens, rounded down to whole pages; None = no limit but memory.
        dtype: Of K and V.
        device: Where the tensors live.
        initial_tokens: Preallocated tokens; the pool doubles up to `max_tokens` when they run out.

    Raises:
        ConfigError: `max_tokens` is smaller than one page, or there is no layer.

    Example:
        >>> pool = KVPool([LayerShape(kv_heads=2, head_dim=4)], page_tokens=4, max_tokens=32)
        >>> pool.allocate(2)
        [0, 1]
        >>> pool.bytes_per_token
        64
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        *,
        page_tokens: int = 16,
        max_tokens: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        initial_tokens: int = INITIAL_TOKENS,
    ) -> None:
        if not shapes:
            raise ConfigError("KVPool needs at least one layer, got shapes=()")
        if max_tokens is not None and max_tokens < page_tokens:
            raise ConfigError(f"max_tokens={max_tokens} is less than one page of {page_tokens} tokens; raise it")
        self.shapes = tuple(shapes)
        self.page_tokens = page_tokens
        self.max_pages = None if max_tokens is None else max_tokens // page_tokens
        self.dtype = dtype
        self.device = torch.device(device)
        wanted_pages = max(1, -(-initial_tokens // page_tokens))
        self.num_pages = wanted_pages if self.max_pages is None else min(wanted_pages, self.max_pages)
        self.layers = [self._zeros(shape, self.num_pages) for shape in self.shapes]  # each [S, 2, K, D]
        self._is_free = np.ones(self.num_pages, dtype=bool)
        self.num_free_pages = self.num_pages

    def _zeros(self, shape: LayerShape, num_pages: int) -> torch.Tensor:
        size = (num_pages * self.page_tokens, 2, shape.kv_heads, shape.head_dim)
        return torch.zeros(size, dtype=self.dtype, device=self.device)

    @property
    def bytes_per_token(self) -> int:
        """K and V of one token over all layers (bytes)."""
        return sum(2 * shape.kv_heads * shape.head_dim for shape in self.shapes) * self.dtype.itemsize

    @property
    def allocated_bytes(self) -> int:
        """Memory the pool holds now, used or free (bytes)."""
        return self.num_pages * self.page_tokens * self.bytes_per_token

    @property
    def free_pages_left(self) -> int | None:
        """Pages that can still be handed out, growth included; None = no limit."""
        return None if self.max_pages is None else self.max_pages - (self.num_pages - self.num_free_pages)

    def allocate(self, count: int, *, after: int = -1) -> list[int]:
        """Take `count` pages, contiguous where possible.

        Args:
            count: Pages wanted, >= 1.
            after: Prefer the pages directly after this one (a node's last page); -1 = no preference.

        Returns:
            Page numbers in the order in which tokens should fill them.

        Raises:
            PoolExhaustedError: fewer pages are left than wanted; nothing was taken.
        """
        if self.num_free_pages < count:
            self._grow(count)
        pages = self._contiguous(count, after)
        if pages is None:
            pages = np.flatnonzero(self._is_free)[:count].tolist()
        self._is_free[pages] = False
        self.num_free_pages -= count
        return pages

    def _contiguous(self, count: int, after: int) -> list[int] | None:
        follow = self._is_free[after + 1 : after + 1 + count]
        if after >= 0 and len(follow) == count and follow.all():
            return list(range(after + 1, after + 1 + count))
        if count == 1:
            return [int(self._is_free.argmax())]
        edges = np.flatnonzero(np.diff(self._is_free, prepend=False, append=False))
        starts, stops = edges[::2], edges[1::2]
        fits = np.flatnonzero(stops - starts >= count)
        if not len(fits):
            return None
        first = int(starts[fits[0]])
        return list(range(first, first + count))

    def free(self, pages: Sequence[int]) -> None:
        """Give pages back; their contents stay until they are handed out and written again.

        Raises:
            ValueError: a page is free already.
        """
        if not pages:
            return
        index = list(pages)
        if self._is_free[index].any() or len(set(index)) != len(index):
            raise ValueError(f"pages {index} are not all owned; a page was freed twice")
        self._is_free[index] = True
        self.num_free_pages += len(index)

    def free_pages(self) -> set[int]:
        """The free pages, for integrity checks."""
        return set(np.flatnonzero(self._is_free).tolist())

    def _grow(self, count: int) -> None:
        used = self.num_pages - self.num_free_pages
        if self.max_pages is not None and used + count > self.max_pages:
            raise PoolExhaustedError(
                f"the KV pool is full: {count} more pages of {self.page_tokens} tokens are wanted, {used} of "
                f"{self.max_pages} are in use; raise kv_pool_tokens (now {self.max_pages * self.page_tokens}), "
                "lower the search's width or set kv_budget_tokens"
            )
        wanted = max(2 * self.num_pages, used + count)
        grown = wanted if self.max_pages is None else min(wanted, self.max_pages)
        try:
            for index, shape in enumerate(self.shapes):
                old = self.layers[index]
                if old.shape[0] < grown * self.page_tokens:  # a failed earlier try may have grown this layer
                    self.layers[index] = self._zeros(shape, grown)
                    self.layers[index][: old.shape[0]] = old
        except (RuntimeError, MemoryError) as error:
            raise PoolExhaustedError(
                f"no memory to grow the KV pool from {self.num_pages} to {grown} pages "
                f"({grown * self.page_tokens * self.bytes_per_token} bytes); set kv_pool_tokens to what fits"
            ) from error
        added = grown - self.num_pages
        self._is_free = np.concatenate([self._is_free, np.ones(added, dtype=bool)])
        self.num_pages = grown
        self.num_free_pages += added

    def write(self, layer: int, slots: torch.Tensor | slice, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Store new tokens' K and V (each `[T, K, D]`) at `slots` (`[T]`) of one layer."""
        cache = self.layers[layer]
        if isinstance(slots, slice):
            cache[slots, 0] = keys
            cache[slots, 1] = values
        else:
            cache.index_copy_(0, slots, torch.stack((keys, values), dim=1))
