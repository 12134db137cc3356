"""KV memory divided among the models of a device, by numbers; no model and no device is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ets_engine.config import EngineConfig
from ets_engine.runtime import kv_memory
from ets_engine.runtime.kv_memory import divide_kv, free_bytes, reserve_kv

GIB = 1 << 30


class Pool:
    """What `reserve_kv` knows of a runner."""

    def __init__(self, token_bytes: int, device: str = "cuda:0") -> None:
        self.bytes_per_token = token_bytes
        self.device = torch.device(device)
        self.max_tokens: int | None = -1

    def reserve(self, max_tokens: int | None) -> None:
        self.max_tokens = max_tokens


def reserved(needs: dict[Any, float], **settings: Any) -> list[int | None]:
    reserve_kv(needs, EngineConfig(**settings))
    return [pool.max_tokens for pool in needs]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Free bytes of each GPU."""
    free = {0: 10_000, 1: 40_000}
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free[device.index], 1 << 40))
    return free


def test_one_model_has_its_fraction() -> None:
    assert divide_kv(10 * GIB, 0.4, [4608], [1.0]) == [4 * GIB // 4608]
    assert divide_kv(1000, 1.0, [10], [7.0]) == [100], "a need means something beside another's only"


@pytest.mark.parametrize(("fraction", "together"), [(0.1, 0.2), (0.4, 0.8), (0.45, 0.9), (0.5, 0.9), (1.0, 0.9)])
def test_two_models_share_twice_the_fraction_but_leave_room_for_passes(fraction: float, together: float) -> None:
    policy, prm = divide_kv(10 * GIB, fraction, [131_072, 57_344], [1.0, 1.3])
    taken = policy * 131_072 + prm * 57_344
    assert together * 10 * GIB - 131_072 - 57_344 < taken <= together * 10 * GIB


@pytest.mark.parametrize("token_bytes", [(4608, 4608), (131_072, 28_672), (1024, 327_680)], ids=str)
@pytest.mark.parametrize("need", [0.5, 1.0, 1.3])
def test_a_search_runs_out_of_both_pools_at_once(token_bytes: tuple[int, int], need: float) -> None:
    policy, prm = divide_kv(20 * GIB, 0.4, token_bytes, [1.0, need])
    assert abs(prm - need * policy) <= 1 + need


def test_models_on_one_device_share_it(memory: dict[int, int]) -> None:
    assert reserved({Pool(10): 1.0, Pool(20): 1.5}) == [200, 300]
    assert reserved({Pool(10): 1.0}) == [400]


def test_free_memory_is_read_before_any_of_it_is_taken(memory: dict[int, int]) -> None:
    class Taking(Pool):
        def reserve(self, max_tokens: int | None) -> None:
            assert max_tokens is not None
            super().reserve(max_tokens)
            memory[0] -= max_tokens * self.bytes_per_token

    assert reserved({Taking(10): 1.0, Taking(20): 1.5}) == [200, 300]
    assert memory[0] == 2000


def test_models_on_two_devices_have_each_their_own(memory: dict[int, int]) -> None:
    assert reserved({Pool(10): 1.0, Pool(20, "cuda:1"): 1.5}) == [400, 800]


def test_a_limit_in_tokens_is_each_models(memory: dict[int, int]) -> None:
    assert reserved({Pool(10): 1.0, Pool(20): 1.5}, kv_pool_tokens=64) == [64, 64]


def test_a_pool_has_a_page_at_least(memory: dict[int, int]) -> None:
    assert reserved({Pool(10): 1.0, Pool(9_000): 1.5}, page_tokens=32) == [32, 32]


def test_free_memory_of_a_cpu_is_what_linux_calls_available(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told = tmp_path / "meminfo"
    told.write_text("MemTotal:       9000 kB\nMemFree:         100 kB\nMemAvailable:    2500 kB\n")
    monkeypatch.setattr(kv_memory, "_MEMORY", told)
    assert free_bytes(torch.device("cpu")) == 2500 * 1024


def test_where_nobody_knows_what_is_free_there_is_no_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "_MEMORY", tmp_path / "absent")
    assert reserved({Pool(10, "cpu"): 1.0, Pool(20, "cpu"): 1.3}) == [None, None]
