"""Every branch of a random tree has the logits that plain transformers computes on its unshared sequence."""

from __future__ import annotations

import random

import pytest
import torch

from ets_engine.attention.eager import attend_by_matmul
from ets_engine.config import EngineConfig
from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.kv import LayoutBuilder
from ets_engine.runtime import Runner

from .conftest import CONFIGS, FAMILIES, VOCABULARY, plain_logits, tiny_model

MAX_ERROR = 1e-4


def grow_and_compare(runner: Runner, model: torch.nn.Module, seed: int, rounds: int = 6) -> float:
    """Grow a tree by ragged batches, prune at random, and return the largest error of any logit on the way."""
    rng = random.Random(seed)
    tree = runner.tree
    root = tree.root()
    sequences = {root: [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(5, 40))]}
    batch = [(root, sequences[root])]
    worst = 0.0
    for round_number in range(rounds):
        logits = runner.logits(runner.extend(batch))
        first = 0
        for handle, new in batch:
            expected = plain_logits(model, sequences[handle])[-len(new) :]
            worst = max(worst, float((logits[first : first + len(new)] - expected).abs().max()))
            first += len(new)
        assert first == len(logits)
        tree.check_integrity()
        leaves = [handle for handle, _ in batch]
        if round_number % 3 == 2:  # go on decoding the same leaves, a token each
            batch = [(leaf, [rng.randrange(3, VOCABULARY)]) for leaf in leaves]
        else:
            survivors = rng.sample(leaves, max(1, len(leaves) // 2))
            children = [tree.fork(leaf) for leaf in survivors for _ in range(rng.randrange(1, 4))]
            for child in children:
                sequences[child] = list(sequences[tree.parent(child)])
            for leaf in leaves:
                tree.release(leaf)
            batch = [(child, [rng.randrange(3, VOCABULARY) for _ in range(rng.randrange(1, 12))]) for child in children]
        for handle, new in batch:
            sequences[handle] = sequences[handle] + new
    for handle, _ in batch:
        tree.release(handle)
    assert tree.resident_pages == 0
    return worst


@pytest.mark.parametrize("min_saved_tokens", [0, 256], ids=["segments", "tails"])
def test_random_trees_match_unshared_sequences(model_name: str, min_saved_tokens: int) -> None:
    runner = Runner(tiny_model(model_name), EngineConfig(page_tokens=4, prefill_chunk_tokens=16))
    runner._passes.layouts = LayoutBuilder(runner.tree, min_saved_tokens=min_saved_tokens)
    model = tiny_model(model_name)
    for seed in range(2):
        assert grow_and_compare(runner, model, seed) < MAX_ERROR


def test_random_trees_match_by_the_attention_of_other_devices(model_name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where torch has no kernel that returns the log-sum-exp, a GPU above all."""
    monkeypatch.setattr("ets_engine.attention.eager.attend", attend_by_matmul)
    runner = Runner(tiny_model(model_name), EngineConfig(page_tokens=4, prefill_chunk_tokens=16))
    runner._passes.layouts = LayoutBuilder(runner.tree, min_saved_tokens=8)
    assert grow_and_compare(runner, tiny_model(model_name), seed=3) < MAX_ERROR


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_random_trees_of_more_families_match(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, soft caps, sinks, experts, layers without rope: by segments, by tails, and by matmuls."""
    runner, model = Runner(tiny_model(family), EngineConfig(page_tokens=4, prefill_chunk_tokens=16)), tiny_model(family)
    assert any(runner._passes.windows) == (getattr(model.config, "sliding_window", None) is not None)
    for seed, min_saved_tokens in enumerate((0, 256)):
        runner._use_windows(runner._passes.windows, min_saved_tokens)
        assert grow_and_compare(runner, model, seed, rounds=5) < MAX_ERROR
    monkeypatch.setattr("ets_engine.attention.eager.attend", attend_by_matmul)
    runner._use_windows(runner._passes.windows, min_saved_tokens=8)
    assert grow_and_compare(runner, model, seed=2, rounds=5) < MAX_ERROR


def test_a_row_has_the_same_logits_whatever_shares_its_batch() -> None:
    """Each token finds its experts alone: no capacity that neighbours could use up."""
    logits = []
    for neighbours in (0, 5):
        runner = Runner(tiny_model("qwen3_moe"))
        tree, root = runner.tree, runner.tree.root()
        runner.extend([(root, list(range(3, 20)))])
        rows = [(tree.fork(root), [30 + i, 31 + i]) for i in range(neighbours + 1)]
        logits.append(runner.logits(runner.extend(rows))[:2])
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_a_remembered_prompt_serves_windows_too() -> None:
    """Its first tokens are outside every window of the one search, and inside those of another that leaves it early."""
    runner, model = Runner(tiny_model("gemma2"), EngineConfig(page_tokens=4)), tiny_model("gemma2")
    prompt = list(range(3, 33))
    leaf, _ = runner.prefixes.begin(prompt, owner=None)
    runner.extend([(leaf, prompt)])
    assert runner.prefixes.remember(prompt, leaf) == 28
    other = [*prompt[:6], *range(40, 43)]
    for ids, remembered in ((prompt, 28), (other, 4)):
        leaf, known = runner.prefixes.begin(ids, owner=None)
        assert known == remembered
        logits = runner.logits(runner.extend_last([(leaf, ids[known:])]))[0]
        assert (logits - plain_logits(model, ids)[-1]).abs().max() < MAX_ERROR


def test_fp64_leaves_only_rounding() -> None:
    """In fp64 (norms still run in fp32) a small systematic error cannot hide in the tolerance for fp32."""
    runner = Runner(tiny_model("llama_gqa_rope_scaled", torch.float64), EngineConfig(page_tokens=4))
    runner._passes.layouts = LayoutBuilder(runner.tree, min_saved_tokens=0, bias_dtype=torch.float64)
    plain = tiny_model("llama_gqa_rope_scaled", torch.float64, attention="sdpa")  # eager has its softmax in fp32
    assert grow_and_compare(runner, plain, seed=5) < 1e-6


def test_bfloat16_errs_little_more_than_plain_transformers_in_bfloat16() -> None:
    """Against the same weights in fp32; the two round in other places, so neither is the better one everywhere."""
    runner, plain = Runner(tiny_model("qwen2", torch.bfloat16)), tiny_model("qwen2", torch.bfloat16)
    runner._passes.layouts = LayoutBuilder(runner.tree, min_saved_tokens=8)
    exact = tiny_model("qwen2", torch.bfloat16).float()
    tree, root, prompt = runner.tree, runner.tree.root(), [3 + i * 7 % 50 for i in range(40)]
    runner.extend([(root, prompt)])
    leaves = [tree.fork(root) for _ in range(8)]
    rows = [[token, token + 1, token + 2] for token in range(20, 28)]
    for step in range(3):
        hidden = runner.extend([(leaf, [row[step]]) for leaf, row in zip(leaves, rows, strict=True)])
    ours, theirs = [], []
    for logits, row in zip(runner.logits(hidden).float(), rows, strict=True):
        expected = plain_logits(exact, [*prompt, *row])[-1]
        ours.append((logits - expected).abs().mean())
        theirs.append((plain_logits(plain, [*prompt, *row])[-1].float() - expected).abs().mean())
    assert sum(ours) <= 1.5 * sum(theirs)


def test_a_prompt_in_chunks_equals_the_prompt_at_once() -> None:
    model = tiny_model("qwen2")
    ids = [3 + i * 7 % 50 for i in range(100)]
    for chunk_tokens in (1, 7, 64, 100):
        runner = Runner(tiny_model("qwen2"), EngineConfig(prefill_chunk_tokens=chunk_tokens))
        hidden = runner.extend([(runner.tree.root(), ids)])
        assert (runner.logits(hidden) - plain_logits(model, ids)).abs().max() < MAX_ERROR


def test_extend_last_picks_each_rows_last_state() -> None:
    first, second = Runner(tiny_model("llama")), Runner(tiny_model("llama"))
    ids = [[5, 6, 7], [8], list(range(10, 50)), [9, 9]]
    rows = [(first.tree.root(), row) for row in ids]
    hidden = first.extend(rows)
    ends = torch.tensor([len(row) for row in ids]).cumsum(0) - 1
    last = second.extend_last([(second.tree.root(), row) for row in ids])
    assert torch.allclose(hidden[ends], last, atol=1e-5)


def test_a_full_pool_changes_nothing() -> None:
    runner = Runner(tiny_model("llama"), EngineConfig(page_tokens=4, kv_pool_tokens=32))
    model, tree = tiny_model("llama"), runner.tree
    prompt = list(range(3, 19))
    root = tree.root()
    runner.extend([(root, prompt)])
    leaves = [tree.fork(root) for _ in range(3)]
    runner.extend([(leaf, [4]) for leaf in leaves])
    with pytest.raises(PoolExhaustedError, match="kv_pool_tokens"):
        runner.extend([(leaf, [5, 6, 7, 8]) for leaf in leaves])
    tree.check_integrity()
    assert [tree.num_tokens(leaf) for leaf in leaves] == [1, 1, 1]
    tree.release(leaves.pop())
    logits = runner.logits(runner.extend_last([(leaf, [5, 6, 7, 8]) for leaf in leaves]))
    assert (logits - plain_logits(model, [*prompt, 4, 5, 6, 7, 8])[-1]).abs().max() < MAX_ERROR


def test_a_leaf_that_was_cut_goes_on_from_there() -> None:
    """While others of its batch stay, and with the slots it gave back handed to another leaf."""
    runner, model = Runner(tiny_model("qwen2"), EngineConfig(page_tokens=4)), tiny_model("qwen2")
    tree, root = runner.tree, runner.tree.root()
    runner.extend([(root, list(range(3, 12)))])
    left, right = tree.fork(root), tree.fork(root)
    for token in range(20, 30):
        runner.extend([(left, [token]), (right, [token + 5])])
    tree.truncate(left, 2)
    other = tree.fork(root)
    runner.extend([(other, [40] * 7)])
    for token in (50, 51, 52):
        hidden = runner.extend([(left, [token]), (right, [token])])
    logits = runner.logits(hidden)
    for row, ids in enumerate(([20, 21, 50, 51, 52], [*range(25, 35), 50, 51, 52])):
        assert (logits[row] - plain_logits(model, [*range(3, 12), *ids])[-1]).abs().max() < MAX_ERROR


def test_a_path_beyond_the_context_is_refused_whole() -> None:
    runner = Runner(tiny_model("llama"))
    root = runner.tree.root()
    limit = CONFIGS["llama"].max_position_embeddings
    with pytest.raises(ContextLengthError, match=str(limit)):
        runner.extend([(root, [5] * (limit + 1))])
    assert runner.tree.resident_tokens == 0
    runner.extend_last([(root, [5] * limit)])


def test_bytes_moved_is_weights_and_distinct_kv() -> None:
    runner = Runner(tiny_model("llama"))
    tree, root = runner.tree, runner.tree.root()
    runner.extend([(root, [5] * 40)])
    leaves = [tree.fork(root) for _ in range(8)]
    before = runner.stats.bytes_moved
    runner.extend([(leaf, [6]) for leaf in leaves])
    assert runner.stats.bytes_moved - before == runner.weight_bytes + (40 + 8) * runner.bytes_per_token


def test_bytes_moved_leaves_out_what_a_window_hides() -> None:
    runner = Runner(tiny_model("gemma2"))  # two layers, the first with a window of 8
    tree, root = runner.tree, runner.tree.root()
    runner.extend([(root, [5] * 40)])
    leaves = [tree.fork(root) for _ in range(8)]
    before = runner.stats.bytes_moved
    runner.extend([(leaf, [6]) for leaf in leaves])
    tokens = ((7 + 8) + (40 + 8)) / 2  # of both layers
    assert runner.stats.bytes_moved - before == runner.weight_bytes + tokens * runner.bytes_per_token


@pytest.mark.gpu
@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_windows_soft_caps_and_sinks_on_a_gpu(cuda: torch.device, family: str) -> None:
    runner = Runner(tiny_model(family).to(cuda), EngineConfig(page_tokens=4))
    runner._use_windows(runner._passes.windows, min_saved_tokens=0)
    assert grow_and_compare(runner, tiny_model(family).to(cuda), seed=1) < 10 * MAX_ERROR


@pytest.mark.gpu
def test_tree_logits_on_a_gpu(cuda: torch.device) -> None:
    runner = Runner(tiny_model("qwen2").to(cuda), EngineConfig(page_tokens=4))
    runner._passes.layouts = LayoutBuilder(runner.tree, device=cuda, min_saved_tokens=0)
    assert grow_and_compare(runner, tiny_model("qwen2").to(cuda), seed=1) < 10 * MAX_ERROR
