"""Decoded steps are what plain transformers would generate, one branch at a time, whoever else shares the batch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from ets_engine.config import EngineConfig
from ets_engine.errors import ContextLengthError, PoolExhaustedError
from ets_engine.runtime import Branch, Leaf, Runner, SamplingParams, StepDecoder, StopRules
from ets_engine.types import StopReason

from .conftest import plain_logits, tiny_model

PLAIN = SamplingParams()
GREEDY = SamplingParams(temperature=0.0)
PROMPT = [5, 9, 33, 12, 7, 50, 3]


class Letters:
    """A tokenizer of one letter per id; ids 0 to 2 are special and 10 is a line end."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return "".join("\n" if i == 10 else chr(60 + i) for i in token_ids if i > 2 or not skip_special_tokens)


def decoder_for(name: str, **settings: int) -> StepDecoder:
    config = EngineConfig(page_tokens=4, prefix_cache_tokens=0, **settings)
    return StepDecoder(Runner(tiny_model(name), config), Letters())


def branch(parent: Leaf, node: int, sampling: SamplingParams = PLAIN, **changes: int) -> Branch:
    rules = StopRules(strings=(), max_step_tokens=changes.get("max_step_tokens", 10))
    return Branch(parent, node, changes.get("seed", 7), sampling, rules, changes.get("max_tokens", 100))


def test_greedy_width_one_equals_generate_token_for_token(model_name: str) -> None:
    """Steps of 5 tokens, so that every boundary token takes the pending path."""
    model = tiny_model(model_name)
    model.generation_config.eos_token_id = None
    prompt = torch.tensor([PROMPT])
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=40)
    decoder = decoder_for(model_name)
    leaf, ids = decoder.leaves.start(PROMPT, "search"), []
    while len(ids) < 40:
        decoder.submit([branch(leaf, 1, GREEDY, max_step_tokens=5, max_tokens=40 - len(ids))])
        (step,) = decoder.run()
        ids += step.token_ids
        leaf = step.leaf
    assert [*PROMPT, *ids] == expected[0].tolist()


def test_log_probabilities_and_mean_states_are_those_of_the_unshared_sequence() -> None:
    decoder, model = decoder_for("qwen2"), tiny_model("qwen2")
    prompt = decoder.leaves.start(PROMPT, "search")
    decoder.submit([branch(prompt, node) for node in range(1, 6)])
    for step in decoder.run():
        ids = [*PROMPT, *step.token_ids]
        logprobs = plain_logits(model, ids).log_softmax(-1)
        expected = sum(float(logprobs[len(PROMPT) - 1 + i, token]) for i, token in enumerate(step.token_ids))
        assert step.logprob == pytest.approx(expected, abs=1e-3)
        states = model.model(torch.tensor([ids]), use_cache=False).last_hidden_state[0, len(PROMPT) : -1]
        assert np.abs(step.hidden_mean - states.mean(0).detach().numpy()).max() < 1e-4


def test_tokens_do_not_depend_on_batch_neighbours() -> None:
    """Same seed and node alone, among others of its search, and among another search's.

    A false alarm needs a draw within about 1e-6 of a boundary: below 1e-3 for these 60 tokens, and the seed is fixed.
    """
    alone = []
    for node in (1, 2, 3):
        decoder = decoder_for("llama")
        decoder.submit([branch(decoder.leaves.start(PROMPT, "a"), node, max_step_tokens=20)])
        alone.append(decoder.run()[0].token_ids)
    decoder = decoder_for("llama")
    first, second = decoder.leaves.start(PROMPT, "a"), decoder.leaves.start([4, 4, 8, 20, 6, 17, 41, 11, 3], "b")
    decoder.submit([branch(second, node, seed=3) for node in range(1, 9)])
    decoder.step()
    decoder.submit([branch(first, node, max_step_tokens=20) for node in (3, 1, 2)])
    together = {step.branch.node: step.token_ids for step in decoder.run() if step.branch.parent is first}
    assert [together[node] for node in (1, 2, 3)] == alone
    assert len({*alone}) == 3


def test_pruned_branches_are_free_before_the_next_forward() -> None:
    decoder = decoder_for("llama")
    tree = decoder.runner.tree
    prompt = decoder.leaves.start(PROMPT, "search")
    decoder.submit([branch(prompt, node) for node in range(1, 9)])
    steps = decoder.run()
    before = tree.resident_pages
    for step in steps[2:]:
        decoder.leaves.release(step.leaf)
    decoder.leaves.release(prompt)
    tree.check_integrity()
    assert before - tree.resident_pages == 6 * 3  # 9 of 10 tokens were read: 3 pages of 4
    assert tree.resident_tokens == len(PROMPT) + 2 * 9
    decoder.submit([branch(steps[0].leaf, 10), branch(steps[1].leaf, 11)])
    decoder.run()
    tree.check_integrity()


def test_only_expanded_leaves_pay_for_their_last_token_and_only_once() -> None:
    decoder = decoder_for("llama")
    tree = decoder.runner.tree
    prompt = decoder.leaves.start(PROMPT, "search")
    decoder.submit([branch(prompt, node) for node in (1, 2)])
    left, right = decoder.run()
    assert tree.num_tokens(left.leaf.handle) == 9 and left.leaf.pending == left.token_ids[-1:]
    forwards = decoder.runner.stats.forwards
    decoder.submit([branch(left.leaf, node) for node in (3, 4, 5)])
    decoder.run()
    assert decoder.runner.stats.forwards - forwards == 1 + 9
    assert tree.num_tokens(left.leaf.handle) == 10 and tree.num_tokens(right.leaf.handle) == 9


@pytest.mark.parametrize("fails", [False, True])
def test_whose_step_goes_on_is_read_in_the_pass_that_feeds_the_others(
    fails: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = decoder_for("llama")
    before = alone.leaves.start(PROMPT, "b")
    alone.submit([branch(before, 1, max_step_tokens=3)])
    (step,) = alone.run()
    alone.submit([branch(step.leaf, node) for node in (2, 3)])
    expected = [one.token_ids for one in alone.run()]

    decoder = decoder_for("llama")
    runner = decoder.runner
    decoder.submit([branch(decoder.leaves.start(PROMPT, "b"), 1, max_step_tokens=3)])
    (step,) = decoder.run()
    decoder.submit([branch(decoder.leaves.start(PROMPT[:-1], "a"), node) for node in (5, 6)])
    decoder.step()
    decoder.submit([branch(step.leaf, node) for node in (2, 3)])
    if fails:
        with monkeypatch.context() as patch:
            patch.setattr(runner.model.model.layers[1], "forward", None)
            with pytest.raises(TypeError):
                decoder.step()
        runner.tree.check_integrity()
        assert len(step.leaf.pending) == 1 and step.leaf.hidden is None and decoder.num_branches == 4
    forwards, read = runner.stats.forwards, decoder.usages.of("b").read_tokens
    decoder.step()
    assert runner.stats.forwards == forwards + 1
    assert decoder.usages.of("b").read_tokens == read + 1 and step.leaf.pending == ()
    found = [one.token_ids for one in sorted(decoder.run(), key=lambda one: one.branch.node)]
    assert found[:2] == expected
    runner.tree.check_integrity()


def test_a_prompt_without_room_takes_no_finished_step_with_it() -> None:
    decoder = decoder_for("llama", kv_pool_tokens=24)
    short, long = decoder.leaves.start(PROMPT[:1], "a"), decoder.leaves.start(PROMPT[:1] * 22, "b")
    decoder.submit([branch(short, 1, max_step_tokens=2)])
    assert decoder.step() == []
    decoder.submit([branch(long, 2)])
    with pytest.raises(PoolExhaustedError):
        decoder.step()
    decoder.cancel("b")
    decoder.leaves.release(long)
    (found,) = decoder.run()
    assert found.branch.node == 1 and found.num_sampled == 2
    decoder.runner.tree.check_integrity()


def test_stop_reasons() -> None:
    decoder = decoder_for("llama")
    prompt = decoder.leaves.start(PROMPT, "search")
    decoder.submit([branch(prompt, 3, max_tokens=0)])  # before the prompt was ever read
    (nothing,) = decoder.run()
    assert (nothing.stop, nothing.token_ids, nothing.text) == (StopReason.LENGTH, (), "")
    decoder.submit(
        [branch(prompt, 1, max_step_tokens=4), branch(prompt, 2, max_tokens=3), branch(prompt, 3, max_tokens=0)]
    )
    by_node = {step.branch.node: step for step in decoder.run()}
    assert (by_node[1].stop, len(by_node[1].token_ids)) == (StopReason.BOUNDARY, 4)
    assert (by_node[2].stop, len(by_node[2].token_ids)) == (StopReason.LENGTH, 3)
    assert (by_node[3].stop, by_node[3].token_ids, by_node[3].text) == (StopReason.LENGTH, (), "")
    greedy = by_node[1].token_ids[0]
    decoder.submit([Branch(prompt, 1, 7, SamplingParams(), StopRules((), frozenset([greedy])), 50)])
    (ended,) = decoder.run()
    assert (ended.stop, ended.token_ids, ended.leaf.pending) == (StopReason.FINISHED, (), ())
    context = decoder.leaves.start([5] * 250, "search")
    decoder.submit([branch(context, 4, max_step_tokens=50)])
    (full,) = decoder.run()
    assert (full.stop, full.leaf.path_tokens) == (StopReason.LENGTH, 256)
    with pytest.raises(ContextLengthError, match="256"):
        decoder.leaves.start([5] * 256, "search")


class Bytes(Letters):
    """Every eighth id is a line end and the first byte of a character that never ends."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        return b"".join(b"\n\xe4" if i % 8 == 0 else bytes([60 + i]) for i in token_ids).decode(errors="replace")


@pytest.mark.parametrize(
    ("tokenizer", "rules"),
    [
        pytest.param(Letters(), StopRules(("A",), openers=("A",)), id="carried text ends the next step"),
        pytest.param(Bytes(), StopRules(("\n",)), id="half a character withholds a line end"),
        pytest.param(Letters(), StopRules(("AB", "\n"), frozenset([2]), 20, ("K", "BC")), id="all kinds"),
    ],
)
def test_the_look_at_single_tokens_overlooks_no_end(
    tokenizer: Letters, rules: StopRules, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_for("llama")
    decoder = StepDecoder(decoder.runner, tokenizer)

    def decode() -> list[tuple[object, ...]]:
        found, parents = [], [decoder.leaves.start(PROMPT, "search")] * 40
        for depth in range(3):
            decoder.submit([Branch(one, 100 * depth + place, 7, PLAIN, rules, 60) for place, one in enumerate(parents)])
            steps = sorted(decoder.run(), key=lambda step: step.branch.node)
            found += [(step.stop, step.token_ids, step.text, step.leaf.carry) for step in steps]
            parents = [step.leaf for step in steps if step.stop is StopReason.BOUNDARY]
        return found

    quickly = decode()
    monkeypatch.setattr(decoder._stops, "quiet_tokens", lambda rules: None)
    assert quickly == decode() and len({len(tokens) for _, tokens, *_ in quickly}) > 3


def test_a_full_pool_loses_no_branch_and_no_page() -> None:
    decoder = decoder_for("llama", kv_pool_tokens=64)
    tree = decoder.runner.tree
    first, second = decoder.leaves.start(PROMPT, "a"), decoder.leaves.start(PROMPT, "b")
    decoder.submit([branch(first, node, max_step_tokens=12) for node in range(1, 5)])
    decoder.submit([branch(second, node, max_step_tokens=12) for node in range(1, 5)])
    with pytest.raises(PoolExhaustedError, match="kv_pool_tokens"):
        decoder.run()
    tree.check_integrity()
    decoder.cancel("b")
    tree.check_integrity()
    steps = decoder.run()
    roomy = decoder_for("llama")
    roomy.submit([branch(roomy.leaves.start(PROMPT, "a"), node, max_step_tokens=12) for node in range(1, 5)])
    assert [step.token_ids for step in steps] == [step.token_ids for step in roomy.run()]


def test_a_full_pool_loses_no_step_that_has_no_room_either() -> None:
    decoder = decoder_for("llama", kv_pool_tokens=32)
    prompt = decoder.leaves.start(PROMPT, "a")
    decoder.submit([branch(prompt, node) for node in range(1, 9)])
    decoder.submit([branch(prompt, 9, max_tokens=0)])
    for _ in range(2):
        with pytest.raises(PoolExhaustedError):
            decoder.step()
        assert decoder.num_branches == 9
    decoder.cancel("b")
    assert decoder.num_branches == 9
    decoder.cancel("a")
    assert decoder.num_branches == 0
    decoder.leaves.release(prompt)
    assert len(decoder.runner.tree) == 0


@pytest.mark.parametrize("failing", range(5))
def test_a_forward_pass_that_fails_changes_nothing(failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever layer call fails (prompt chunks, decode steps), all is freed and trying again gives the same steps."""

    def steps(decoder: StepDecoder, retry: bool) -> list[tuple[int, ...]]:
        leaf = decoder.leaves.start(PROMPT, "a")
        decoder.submit([branch(leaf, node, max_step_tokens=4) for node in (1, 2, 3)])
        finished = []
        while decoder.num_branches:
            try:
                finished += decoder.step()
            except RuntimeError as error:
                assert retry and str(error) == "a layer failed"
                tree = decoder.runner.tree
                tree.check_integrity()
                assert tree.resident_tokens == sum(tree.num_tokens(handle) for handle in tree._nodes)
                assert tree.num_tokens(leaf.handle) in (0, len(PROMPT))
        return [step.token_ids for step in sorted(finished, key=lambda step: step.branch.node)]

    expected = steps(decoder_for("llama", prefill_chunk_tokens=3), retry=False)
    decoder = decoder_for("llama", prefill_chunk_tokens=3)
    layer = decoder.runner.model.model.layers[1]
    usual, calls = layer.forward, 0

    def forward(*args: object, **kwargs: object) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls == failing + 1:
            raise RuntimeError("a layer failed")
        return usual(*args, **kwargs)

    monkeypatch.setattr(layer, "forward", forward)
    assert steps(decoder, retry=True) == expected


def test_a_very_wide_batch_and_a_prompt_of_one_token() -> None:
    decoder, model = decoder_for("qwen3"), tiny_model("qwen3")
    prompt = decoder.leaves.start([5], "search")
    decoder.submit([branch(prompt, node, max_step_tokens=3) for node in range(1, 401)])
    finished = decoder.run()
    tree = decoder.runner.tree
    assert tree.resident_tokens == 1 + 400 * 2
    assert len({step.token_ids for step in finished}) > 300
    for step in finished[::57]:
        logprobs = plain_logits(model, [5, *step.token_ids]).log_softmax(-1)
        expected = sum(float(logprobs[i, token]) for i, token in enumerate(step.token_ids))
        assert step.logprob == pytest.approx(expected, abs=1e-3)
    for step in finished:
        decoder.leaves.release(step.leaf)
    decoder.leaves.release(prompt)
    tree.check_integrity()
    assert tree.resident_pages == 0


def test_usage_counts_each_search() -> None:
    decoder = decoder_for("llama")
    first, second = decoder.leaves.start(PROMPT, "a"), decoder.leaves.start(PROMPT, "b")
    decoder.submit([branch(first, 1, max_step_tokens=4), branch(first, 2, max_step_tokens=4)])
    decoder.submit([branch(second, 1, max_step_tokens=2)])
    decoder.run()
    usage = decoder.usages.of("a")
    assert (usage.decode_steps, usage.generated_tokens, usage.prompt_tokens) == (3, 8, 7)
    assert usage.peak_tokens == 7 + 2 * 3
    assert usage.mean_tokens == pytest.approx((9 + 11 + 13) / 3)
    other = decoder.usages.of("b")
    assert (other.decode_steps, other.generated_tokens) == (1, 2)
    total = decoder.runner.stats.bytes_moved
    assert usage.bytes_moved + other.bytes_moved == pytest.approx(total, abs=10)


def test_a_shared_beginning_is_read_and_stored_once() -> None:
    decoder, model = decoder_for("qwen3"), tiny_model("qwen3")
    system = decoder.leaves.start(PROMPT, "system")
    leaves = [decoder.leaves.start([20 + i, 30], f"search {i}", below=system) for i in range(3)]
    decoder.leaves.open(leaves)
    assert decoder.runner.tree.resident_tokens == len(PROMPT) + 3 * 2
    assert decoder.runner.tree.resident_tokens_of("search 1") == 2
    for i, leaf in enumerate(leaves):
        logits = decoder.runner.logits(leaf.hidden)
        assert (logits - plain_logits(model, [*PROMPT, 20 + i, 30])[-1]).abs().max() < 1e-4
