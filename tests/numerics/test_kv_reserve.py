"""The KV pools of an engine's models: taken once all weights are there, and as a search needs them."""

from __future__ import annotations

import gc
import weakref
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, PoolExhaustedError
from ets_engine.kv import KVPool
from ets_engine.loading import PRM_KV_TOKENS
from ets_engine.models import load_prm
from ets_engine.runtime import Runner, kv_memory
from ets_engine.runtime.runner import CUDA_INITIAL_TOKENS
from ets_engine.service import ETSEngine

from .conftest import plain_logits, tiny_model
from .test_graphs import decode_and_compare, wide_model
from .test_tree_logits import MAX_ERROR

FREE = 40_000_000  # bytes
POLICY_BYTES, PRM_BYTES = 3 * 2 * 2 * 8 * 4, 3 * 2 * 4 * 8 * 4  # of one KV token: layers, K and V, heads, numbers, fp32


@pytest.fixture(autouse=True)
def free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_memory, "free_bytes", lambda device: FREE)


def on_cpu(**settings: Any) -> EngineConfig:
    return EngineConfig(device="cpu", page_tokens=4, **settings)


def tiny_runner(**options: Any) -> Runner:
    model = tiny_model("llama_gqa_rope_scaled")
    assert isinstance(model, PreTrainedModel)
    return Runner(model, on_cpu(), **options)


def limits(engine: ETSEngine) -> tuple[int, int | None]:
    """KV tokens of the policy and of the PRM."""
    found = engine.describe()
    assert found.policy.kv_pool_tokens is not None
    return found.policy.kv_pool_tokens, found.verifier and found.verifier.kv_pool_tokens


def test_an_engines_pools_are_in_the_ratio_of_what_a_search_needs(folders: tuple[str, str]) -> None:
    with ETSEngine.from_pretrained(*folders, on_cpu(kv_memory_fraction=0.3)) as engine:
        policy, prm = limits(engine)
        assert prm is not None and abs(prm - PRM_KV_TOKENS * policy) < 10
        assert abs(policy * POLICY_BYTES + prm * PRM_BYTES - 0.6 * FREE) < 10 * (POLICY_BYTES + PRM_BYTES)
        assert engine.search("1+1?", SearchConfig(width=4, max_steps=2, max_step_tokens=4)).num_errors == 0


def test_a_model_alone_has_one_fraction(folders: tuple[str, str]) -> None:
    with ETSEngine.from_pretrained(folders[0], "logprob", on_cpu(kv_memory_fraction=0.3)) as engine:
        policy, prm = limits(engine)
    assert prm is None and abs(policy * POLICY_BYTES - 0.3 * FREE) < 4 * POLICY_BYTES
    for runner, token_bytes in ((tiny_runner(), POLICY_BYTES), (load_prm(folders[1], on_cpu())[0], PRM_BYTES)):
        pages = runner.tree.pool.max_pages
        assert pages is not None and abs(4 * pages * token_bytes - 0.4 * FREE) < 4 * token_bytes


def test_a_limit_in_tokens_is_each_models(folders: tuple[str, str]) -> None:
    with ETSEngine.from_pretrained(*folders, on_cpu(kv_pool_tokens=64)) as engine:
        assert limits(engine) == (64, 64)


def test_memory_is_divided_once_both_models_are_there(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    start = KVPool.__init__

    def note(self: KVPool, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        made.append(self.num_pages * self.page_tokens)

    def read(device: torch.device) -> int:
        assert made == [64, 64], "two small pools, to check the models with"
        return FREE

    monkeypatch.setattr(KVPool, "__init__", note)
    monkeypatch.setattr(kv_memory, "free_bytes", read)
    ETSEngine.from_pretrained(*folders, on_cpu()).close()
    assert made == [64, 64, 4096, 4096]


def test_a_reserved_pool_is_a_limit_and_serves_as_ever() -> None:
    runner, plain = tiny_runner(reserve=False), tiny_model("llama_gqa_rope_scaled")
    assert (runner.tree.pool.max_pages, runner.stats.tokens) == (None, 0)
    runner.reserve(18)
    root = runner.tree.root()
    ours = runner.logits(runner.extend([(root, list(range(3, 15)))]))
    assert float((ours - plain_logits(plain, list(range(3, 15)))).abs().max()) < MAX_ERROR
    leaf = runner.tree.fork(root)
    with pytest.raises(PoolExhaustedError, match="of 4 are in use"):
        runner.extend([(leaf, [3] * 5)])
    runner.extend([(leaf, [3] * 4)])
    runner.tree.check_integrity()
    with pytest.raises(ConfigError, match="less than one page"):
        runner.reserve(3)


@pytest.mark.parametrize(("limit", "taken"), [(8192, 8192), (3 << 20, CUDA_INITIAL_TOKENS)])
def test_off_the_cpu_a_pool_is_taken_at_once(limit: int, taken: int) -> None:
    runner = tiny_runner(reserve=False)
    runner.device = torch.device("meta")  # which has no memory to run out of
    runner.reserve(limit)
    pool = runner.tree.pool
    assert (pool.max_pages, pool.num_pages) == (limit // 4, taken // 4)


@pytest.mark.gpu
def test_graphs_survive_the_pool_that_takes_the_small_ones_place(cuda: torch.device) -> None:
    model = wide_model("llama").to(cuda)
    assert isinstance(model, PreTrainedModel)
    runner = Runner(model, EngineConfig(page_tokens=4, cuda_graphs=True), reserve=False)
    assert decode_and_compare(runner, wide_model("llama").to(cuda)) < 10 * MAX_ERROR
    runner.reserve(8192)
    assert runner.tree.pool.num_pages == 2048, "all of it at once"
    assert decode_and_compare(runner, wide_model("llama").to(cuda)) < 10 * MAX_ERROR


def test_a_model_and_its_pool_go_with_the_last_who_holds_the_runner() -> None:
    """At once, not when garbage is next collected: another model may need the memory."""
    runner = tiny_runner()
    runner.extend([(runner.tree.root(), [3, 1, 4])])
    held = [weakref.ref(one) for one in (runner.model, runner.tree.pool)]
    gc.collect()
    gc.disable()
    try:
        del runner
        assert [one() for one in held] == [None, None]
    finally:
        gc.enable()
