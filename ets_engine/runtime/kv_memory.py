"""Divides the memory that a device has free among the KV pools of the models that lie there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from ets_engine.config import EngineConfig

if TYPE_CHECKING:
    from ets_engine.runtime.runner import Runner

_MEMORY = Path("/proc/meminfo")  # of Linux; files that the system can drop count as free there
MAX_FRACTION = 0.9  # of what is free, for several models together: forward passes need memory too


def reserve_kv(needs: Mapping[Runner, float], config: EngineConfig) -> None:
    """Give models that search together their KV pools, once the weights of all of them are loaded.

    Args:
        needs: Of each model, how much KV a search holds there (tokens, relative to the others').
        config: `kv_pool_tokens`, `kv_memory_fraction` and `page_tokens`.

    Raises:
        ConfigError: `kv_pool_tokens` is less than a page.
    """
    limits: dict[Runner, int | None] = dict.fromkeys(needs, config.kv_pool_tokens)
    if config.kv_pool_tokens is None:
        for device in {runner.device for runner in needs}:
            here = [runner for runner in needs if runner.device == device]
            free = free_bytes(device)
            if free is not None:
                token_bytes, shares = [one.bytes_per_token for one in here], [needs[one] for one in here]
                found = divide_kv(free, config.kv_memory_fraction, token_bytes, shares)
                limits |= {one: max(config.page_tokens, tokens) for one, tokens in zip(here, found, strict=True)}
    for runner, max_tokens in limits.items():
        runner.reserve(max_tokens)


def divide_kv(free: int, fraction: float, token_bytes: Sequence[int], needs: Sequence[float]) -> list[int]:
    """KV tokens that each model of a device may hold, so that their pools run out at the same time.

    Args:
        free: Memory of the device (bytes).
        fraction: Of it, for each model on average, in (0, 1]; several have at most `MAX_FRACTION` together.
        token_bytes: KV of one token of each model (bytes).
        needs: How much KV a search holds in each (tokens, relative to the others').

    Example:
        >>> divide_kv(10_000, 0.4, token_bytes=[10], needs=[1.0])
        [400]
        >>> divide_kv(10_000, 0.4, token_bytes=[10, 20], needs=[1.0, 1.5])
        [200, 300]
    """
    if len(needs) > 1:
        fraction = min(len(needs) * fraction, MAX_FRACTION)
    unit_bytes = sum(size * need for size, need in zip(token_bytes, needs, strict=True))
    return [int(free * fraction * need / unit_bytes) for need in needs]


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device (bytes); None where nobody knows."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = re.search(r"^MemAvailable: *(\d+) kB", _MEMORY.read_text(), re.M) if _MEMORY.exists() else None
    return None if available is None else 1024 * int(available[1])
