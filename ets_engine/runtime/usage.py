"""What each search costs a policy: tokens, KV, its share of the time and the bytes of passes that others were in."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ets_engine.runtime.runner import Runner


@dataclass(slots=True)
class DecodeUsage:
    """What one search cost so far; work shared with other searches is split by rows.

    Attributes:
        decode_steps: Forward passes that extended a branch of it by a token.
        generated_tokens: Tokens sampled, end-of-text tokens included.
        read_tokens: Tokens whose K/V was computed: one that several branches share counts once, one that was computed
            anew counts again.
        prompt_tokens: Tokens of its prompts.
        cached_prompt_tokens: Those of them that earlier prompts had left in the KV tree.
        shared_tokens: Those whose KV it shares with other prompts; they count as resident for each.
        peak_tokens: Most KV tokens resident at any decode step or prefill.
        resident_token_steps: Resident KV tokens summed over decode steps.
        busy_s: Seconds in forward passes and sampling.
        bytes_moved: Weights plus distinct KV read (bytes).
    """

    decode_steps: int = 0
    generated_tokens: int = 0
    read_tokens: int = 0
    prompt_tokens: int = 0
    cached_prompt_tokens: int = 0
    shared_tokens: int = 0
    peak_tokens: int = 0
    resident_token_steps: int = 0
    busy_s: float = 0.0
    bytes_moved: int = 0

    @property
    def mean_tokens(self) -> float:
        """Mean KV tokens resident over decode steps."""
        return self.resident_token_steps / self.decode_steps if self.decode_steps else 0.0


class Meter(NamedTuple):
    """A reading: a time (s), and bytes that the runner's passes have moved so far."""

    time_s: float
    moved_bytes: int


class Usages:
    """The accounts of all searches over one runner.

    Args:
        runner: Whose passes are paid for.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._accounts: dict[Hashable, DecodeUsage] = {}

    def __len__(self) -> int:
        """Accounts that are open (count)."""
        return len(self._accounts)

    def of(self, search: Hashable) -> DecodeUsage:
        """What a search cost so far; the same object until `forget`."""
        return self._accounts.setdefault(search, DecodeUsage())

    def forget(self, search: Hashable) -> None:
        """Drop a search's account once it has been read."""
        self._accounts.pop(search, None)

    def read_meter(self) -> Meter:
        """Where time and bytes stand, for `charge` to tell what was spent since."""
        return Meter(time.perf_counter(), self._runner.stats.bytes_moved)

    def charge(self, searches: Sequence[Hashable], since: Meter) -> None:
        """Split the time and the bytes moved since a reading among searches, by rows.

        Args:
            searches: Whose each row is. Shape [B].
            since: Of `read_meter`.
        """
        now = self.read_meter()
        self._runner.stats.busy_s += now.time_s - since.time_s
        for search, rows in Counter(searches).items():
            usage, share = self.of(search), rows / len(searches)
            usage.busy_s += (now.time_s - since.time_s) * share
            usage.bytes_moved += round((now.moved_bytes - since.moved_bytes) * share)

    def sample_residency(self, search: Hashable) -> int:
        """Count the KV tokens that a search holds now into its peak, and say how many they are."""
        usage = self.of(search)
        resident = self._runner.tree.resident_tokens_of(search) + usage.shared_tokens
        usage.peak_tokens = max(usage.peak_tokens, resident)
        return resident
