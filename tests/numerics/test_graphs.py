"""Decoding ahead of the host, and decode passes as CUDA graphs: nothing but time may change."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch

from ets_engine import ETSEngine, SearchConfig
from ets_engine.config import EngineConfig, Strategy
from ets_engine.errors import PoolExhaustedError, UnsupportedModelError
from ets_engine.reference.problems import generate_problems
from ets_engine.runtime import Branch, Runner, SamplingParams, StepDecoder, StopRules
from ets_engine.runtime.sampler import NO_NUMBERS, draw
from ets_engine.types import EngineStats, StopReason

from .conftest import VOCABULARY, plain_logits, tiny_model
from .emulated_gpu import emulate_gpu, use_plain_kernels
from .test_decoding import PROMPT, Letters
from .test_tree_logits import MAX_ERROR, grow_and_compare

Found = list[tuple[tuple[int, ...], str, float]]


def search_steps(decoder: StepDecoder, width: int = 12, rounds: int = 3) -> Found:
    """What a small search finds: steps that end at a line end (id 10), at 9 tokens or at the limit."""
    rules = StopRules(strings=("\n",), max_step_tokens=9)
    tree = decoder.runner.tree
    leaves, found = [decoder.leaves.start(PROMPT, "search")], []
    for depth in range(rounds):
        nodes = range(100 * depth + 1, 100 * depth + 1 + width)
        sampling = SamplingParams(temperature=0.8)
        decoder.submit([Branch(leaves[i % len(leaves)], node, 7, sampling, rules, 25) for i, node in enumerate(nodes)])
        steps = decoder.run()
        tree.check_integrity()
        for step in steps:
            assert tree.path_tokens(step.leaf.handle) == step.leaf.path_tokens - len(step.leaf.pending)
            found.append((step.token_ids, step.stop.name, round(step.logprob, 2)))
        for leaf in leaves:
            decoder.leaves.release(leaf)
        leaves = [step.leaf for step in steps[::3]]
        for step in steps:
            if step.leaf not in leaves:
                decoder.leaves.release(step.leaf)
    for leaf in leaves:
        decoder.leaves.release(leaf)
    assert tree.resident_tokens == 0
    return found


def test_decoding_ahead_finds_the_same_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineConfig(page_tokens=4, prefix_cache_tokens=0)
    plain = search_steps(StepDecoder(Runner(tiny_model("llama"), config), Letters()))
    monkeypatch.setattr(Runner, "runs_ahead", True)
    runner = Runner(tiny_model("llama"), config)
    assert search_steps(StepDecoder(runner, Letters())) == plain
    assert len({len(ids) for ids, *_ in plain}) > 2


def test_where_not_all_fit_only_those_that_go_on_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two rows, each about to need a page; one stops, and the pool has one."""
    monkeypatch.setattr(Runner, "runs_ahead", True)
    runner = Runner(tiny_model("llama"), EngineConfig(page_tokens=4, prefix_cache_tokens=0, kv_pool_tokens=20))
    decoder = StepDecoder(runner, Letters())
    prompt = decoder.leaves.start(PROMPT, "search")
    rules = [StopRules(strings=(), max_step_tokens=count) for count in (5, 8)]
    decoder.submit([Branch(prompt, 1 + i, 7, SamplingParams(), one, 9) for i, one in enumerate(rules)])
    steps = decoder.run()
    assert [len(step.token_ids) for step in steps] == [5, 8]
    runner.tree.check_integrity()


@pytest.mark.parametrize("ahead", [True, False])
def test_logits_that_are_no_numbers_end_their_own_branch(monkeypatch: pytest.MonkeyPatch, ahead: bool) -> None:
    def start() -> StepDecoder:
        decoder = StepDecoder(Runner(tiny_model("llama"), EngineConfig(page_tokens=4)), Letters())
        rules = [StopRules(strings=(), max_step_tokens=5) for _ in range(2)]  # of its own, so that none is merged
        prompt = decoder.leaves.start(PROMPT, "search")
        decoder.submit([Branch(prompt, 1 + i, 7, SamplingParams(), one, 9) for i, one in enumerate(rules)])
        return decoder

    expected = start().run()[1].token_ids
    monkeypatch.setattr(Runner, "runs_ahead", ahead)
    decoder = start()
    decoder.step()
    runner = decoder.runner
    factors, usual = torch.tensor([[float("nan")], [1.0]]), runner.logits
    with monkeypatch.context() as patch:
        patch.setattr(runner, "logits", lambda hidden: usual(hidden) * factors)
        (lost,) = decoder.step()
    assert (lost.branch.node, lost.stop, lost.error) == (1, StopReason.ERROR, NO_NUMBERS)
    assert (len(lost.token_ids), lost.num_sampled) == (1, 1) and math.isfinite(lost.logprob)
    runner.tree.check_integrity()
    (other,) = decoder.run()
    assert other.token_ids == expected
    for one in (lost, other):
        decoder.leaves.release(one.leaf)
    runner.tree.check_integrity()


def test_rows_of_graphs_are_few_and_not_much_larger() -> None:
    pytest.importorskip("triton")
    from ets_engine.runtime.graphs import round_rows

    sizes = {round_rows(rows) for rows in range(1, 513)}
    assert len(sizes) <= 36
    assert all(rows <= round_rows(rows) <= max(rows, 1.25 * rows) for rows in range(1, 513))


def test_an_engine_as_on_a_gpu_finds_what_it_finds_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped policy and PRM, searches of all kinds at once, with room for all and for few."""
    pytest.importorskip("triton")
    strategies: tuple[Strategy, ...] = ("ets", "rebase", "dvts")
    problems = [*generate_problems("countdown", None, 1, 3), *generate_problems("story", None, 1, 2)]
    sampling = [{}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}, {"temperature": 0.0}, {"min_p": 0.05}]
    jobs = [
        (
            problem.problem,
            SearchConfig(
                width=(8, 4, 12)[i % 3],
                strategy=strategies[i % 3],
                seed=i,
                max_step_tokens=(7, 30)[i % 2],
                max_tokens=60,
                trace=True,
                **sampling[i],
            ),
        )
        for i, problem in enumerate(problems)
    ]

    def play(**room: int) -> tuple[list[object], EngineStats]:
        with ETSEngine.from_pretrained("reference", config=EngineConfig(device="cpu", **room)) as engine:
            results = [future.result() for future in [engine.submit(*job) for job in jobs]]
            found = []
            for result in results:
                assert result.trace is not None
                steps = [(one.text, one.num_tokens, round(one.step_score, 3)) for one in result.trace]
                found.append((result.answer, result.finish_reason, result.generated_tokens, steps))
            return found, engine.stats()

    expected, _ = play()
    captured = emulate_gpu(monkeypatch)
    use_plain_kernels(monkeypatch)
    assert play()[0] == expected
    assert len(captured) > 10 and sum(graph.replays for graph in captured) > 100
    found, stats = play(kv_pool_tokens=600, page_tokens=4)
    assert found == expected and stats.preemptions > 0


@pytest.mark.parametrize(
    "name", ["llama", "qwen2", "gemma2", "gemma3_text", "gpt_oss", "mistral_window", "qwen2_window", "phi3_window"]
)
def test_passes_as_on_a_gpu_equal_plain_sequences(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows, soft caps and sinks; loading compares too, whole paths and each window alone."""
    pytest.importorskip("triton")
    captured = emulate_gpu(monkeypatch)
    use_plain_kernels(monkeypatch)
    runner = Runner(tiny_model(name), EngineConfig(page_tokens=4, prefix_cache_tokens=0))
    model = tiny_model(name)
    assert grow_and_compare(runner, model, seed=1) < MAX_ERROR
    assert decode_and_compare(runner, model) < MAX_ERROR
    assert sum(graph.replays for graph in captured) >= 10


def wide_model(name: str) -> torch.nn.Module:
    """A tiny model whose heads are wide enough for the kernel."""
    return tiny_model(name, head_dim=16)


def gpu_runner(name: str, **settings: object) -> Runner:
    return Runner(wide_model(name).to("cuda"), EngineConfig(page_tokens=4, prefix_cache_tokens=0, **settings))


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma2"])
def test_graphs_equal_plain_sequences(name: str, cuda: torch.device) -> None:
    runner = gpu_runner(name, cuda_graphs=True)
    model = wide_model(name).to(cuda)
    assert runner.uses_graphs
    assert grow_and_compare(runner, model, seed=1) < 10 * MAX_ERROR
    assert decode_and_compare(runner, model) < 10 * MAX_ERROR
    captured = runner._passes.graphs.graphs.captured
    assert 0 < captured < 40
    assert decode_and_compare(runner, model) < 10 * MAX_ERROR
    assert runner._passes.graphs.graphs.captured == captured, "the same search again needs no new graph"


def decode_and_compare(runner: Runner, model: torch.nn.Module) -> float:
    """A token a time for up to 20 branches; every fifth step one ends, and every fifth some end and others fork."""
    rng, tree = random.Random(3), runner.tree
    root = tree.root()
    paths = {root: [rng.randrange(3, VOCABULARY) for _ in range(70)]}
    runner.extend([(root, paths[root])])
    live = [tree.fork(root) for _ in range(9)]
    paths |= {leaf: list(paths[root]) for leaf in live}
    worst = 0.0
    for step in range(25):
        ids = [rng.randrange(3, VOCABULARY) for _ in live]
        hidden = runner.extend_drawn(live, torch.tensor(ids, device=runner.device))
        for leaf, token in zip(live, ids, strict=True):
            paths[leaf].append(token)
        logits = runner.logits(hidden)
        if step % 4 == 3:
            for row, leaf in enumerate(live):
                worst = max(worst, float((logits[row] - plain_logits(model, paths[leaf])[-1]).abs().max()))
        if step % 5 == 2:  # one ends; the others go on as they were laid out
            tree.release(live.pop(step % len(live)))
        if step % 5 == 4:
            for leaf in live[::3]:
                tree.release(leaf)
            kept = [leaf for i, leaf in enumerate(live) if i % 3]
            live = [tree.fork(leaf) for leaf in kept for _ in range(2)]
            paths |= {leaf: list(paths[kept[i // 2]]) for i, leaf in enumerate(live)}
            for leaf in kept:
                tree.release(leaf)
        tree.check_integrity()
    for leaf in (*live, root):
        tree.release(leaf)
    assert tree.resident_tokens == 0
    return worst


@pytest.mark.gpu
@pytest.mark.parametrize("graphs", [True, False], ids=["graphs", "launches"])
def test_a_gpu_finds_what_a_cpu_finds(graphs: bool, cuda: torch.device) -> None:
    """In fp32, at an unlikely worst with a draw in the last bits: then it is another, and this test says so."""
    config = EngineConfig(page_tokens=4, prefix_cache_tokens=0)
    plain = search_steps(StepDecoder(Runner(wide_model("llama"), config), Letters()))
    assert search_steps(StepDecoder(gpu_runner("llama", cuda_graphs=graphs), Letters())) == plain


MIXED = [
    SamplingParams(temperature=(0.0, 0.5, 1.0, 2.0)[i % 4], top_p=(1.0, 0.9, 0.3)[i % 3], top_k=(0, 9, 0, 1, 0)[i % 5])
    for i in range(60)
]
MIXED += [SamplingParams(min_p=0.1), SamplingParams(min_p=0.4, top_p=0.99, top_k=40, temperature=1.5)]


@pytest.mark.gpu
@pytest.mark.parametrize(
    "params",
    [
        [SamplingParams()],
        [SamplingParams(temperature=0.0)],
        [SamplingParams(temperature=one) for one in (0.0, 0.5, 1.0)],
        [SamplingParams(temperature=0.7, top_p=0.8, top_k=20)],
        MIXED,
    ],
    ids=["plain", "greedy", "temperatures", "cut", "mixed"],
)
def test_a_captured_draw_draws_the_same(params: list[SamplingParams], cuda: torch.device) -> None:
    """As one that waits for nothing on the way, and as the CPU's."""
    runner = gpu_runner("llama", cuda_graphs=True)
    rng = np.random.default_rng(0)
    for rows in (1, 3, 30, 100):
        states = torch.randn(rows, runner.hidden_size, device=cuda)
        numbers, of_rows = rng.random(rows), [params[row % len(params)] for row in range(rows)]
        tokens, logprobs = runner.draw(states, of_rows, numbers)
        logits = runner.logits(states)
        torch.cuda.set_sync_debug_mode("error")
        try:
            others = draw(logits, of_rows, numbers)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for found in (others, draw(logits.cpu(), of_rows, numbers)):
            assert tokens.tolist() == found[0].tolist()
            assert torch.allclose(logprobs.cpu(), found[1].cpu(), atol=1e-5)


@pytest.mark.gpu
def test_a_model_that_waits_for_the_gpu_runs_without_graphs(cuda: torch.device) -> None:
    runner = gpu_runner("gpt_oss")
    assert not runner.uses_graphs
    assert decode_and_compare(runner, wide_model("gpt_oss").to(cuda)) < 10 * MAX_ERROR
    with pytest.raises(UnsupportedModelError, match="no CUDA graph can be made of GptOss"):
        gpu_runner("gpt_oss", cuda_graphs=True)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore")  # of a compiler that others write
def test_compiled_layers_give_the_same(cuda: torch.device) -> None:
    runner = gpu_runner("llama", compile_layers=True, cuda_graphs=True)
    assert decode_and_compare(runner, wide_model("llama").to(cuda)) < 10 * MAX_ERROR


@pytest.mark.gpu
def test_a_full_pool_on_a_gpu_is_an_error_that_changes_nothing(cuda: torch.device) -> None:
    runner = gpu_runner("llama", kv_pool_tokens=16)
    root = runner.tree.root()
    runner.extend([(root, [3] * 15)])
    with pytest.raises(PoolExhaustedError):
        runner.extend_drawn([runner.tree.fork(root), runner.tree.fork(root)], torch.tensor([3, 4], device=cuda))
    runner.tree.check_integrity()


@pytest.mark.gpu
def test_an_engine_on_a_gpu_finds_what_it_finds_on_a_cpu(cuda: torch.device) -> None:
    """The shipped models in fp32, four searches together; a draw in the last bits would make one another."""
    problems = ["Use 1, 3, 7 and 17 to make 22.", "Use 2, 5, 9 and 11 to make 30.", "Use 4, 6, 10 and 19 to make 16."]
    found = []
    for device in ("cpu", "cuda"):
        config = EngineConfig(device=device, dtype="float32", kv_pool_tokens=16_384)
        with ETSEngine.from_pretrained("reference", config=config) as engine:
            results = engine.search_many(problems, SearchConfig(width=8, seed=0))
            assert engine.stats().kv_tokens == 0 or engine.stats().prefix_tokens == engine.stats().kv_tokens
        found.append([(result.answer, result.generated_tokens) for result in results])
    assert found[0] == found[1]
