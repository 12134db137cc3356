"""Verifiers without a second model: equal to a computation from scratch, whoever shares the batch or the memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, ModelLoadError, ProtocolError
from ets_engine.models import LogProb, Probe, SelfCertainty, find_intrinsic
from ets_engine.models.policy import TreePolicy
from ets_engine.runtime.branches import FinishedBranch
from ets_engine.runtime.sampler import certainties
from ets_engine.scorers import EvidenceScorer, StepEvidence
from ets_engine.service import ETSEngine
from ets_engine.types import SearchResult, StopReason

from .conftest import tiny_model
from .engines import save_policy

PROBLEMS = [f"what is {i}+{i * i}?" for i in range(6)]
POLICY = "llama_gqa_rope_scaled"
HIDDEN = 32


def random_probe(*sizes: int) -> Probe:
    rng = np.random.default_rng(5)
    shapes = list(zip(sizes[1:], sizes, strict=False))
    layers = [(rng.normal(size=shape) / 2, rng.normal(size=shape[0])) for shape in shapes]
    return Probe(tuple((w.astype(np.float32), b.astype(np.float32)) for w, b in layers), policy="tiny")


SCORERS = {"logprob": LogProb(), "self_certainty": SelfCertainty(), "probe": random_probe(HIDDEN, 8, 1)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("models") / "policy")


def make(folder: str, verifier: str | None = None, **changes: Any) -> ETSEngine:
    return ETSEngine.from_pretrained(folder, verifier, EngineConfig(device="cpu", page_tokens=4, **changes))


@pytest.fixture(scope="module")
def engine(folder: str) -> ETSEngine:
    return make(folder)


def settings(**changes: Any) -> SearchConfig:
    small = {"strategy": "ets", "width": 6, "max_steps": 4, "max_step_tokens": 8, "max_tokens": 32, "trace": True}
    return SearchConfig(**{**small, **changes})


class Written:
    """Prompt and token ids of every step that a search decoded, an end-of-text token included."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prompt: list[int] = []
        self.ids: dict[int, list[int]] = {}
        take = TreePolicy.take

        def note(policy: TreePolicy, finished: FinishedBranch) -> None:
            self.prompt = list(policy._prompt_ids)
            end = [2] * (finished.num_sampled - len(finished.token_ids))
            self.ids[finished.branch.node] = [*finished.token_ids, *end]
            take(policy, finished)

        monkeypatch.setattr(TreePolicy, "take", note)


@torch.inference_mode()
def from_scratch(above: list[int], path: list[int], step: list[int]) -> dict[str, float]:
    """Every score of a step by plain transformers on the whole text: prompt, path with the step, the step alone."""
    model = tiny_model(POLICY)
    states = model.model(torch.tensor([[*above, *path]]), use_cache=False).last_hidden_state[0]  # [T, hidden]
    logprobs = model.lm_head(states[len(above) - 1 : -1]).log_softmax(-1)  # [path, V]
    uniform = torch.full_like(logprobs, 1 / logprobs.shape[1])
    certainty = torch.nn.functional.kl_div(logprobs, uniform, reduction="sum") / len(path)
    begin = len(above) + len(path) - len(step)
    mean = states[begin:-1].mean(0) if len(step) > 1 else states[begin - 1]
    (first, first_bias), (second, second_bias) = SCORERS["probe"].layers
    inner = (torch.from_numpy(first) @ mean + torch.from_numpy(first_bias)).relu()
    return {
        "logprob": float(logprobs[range(len(path)), path].mean().exp()),
        "self_certainty": float(certainty / (certainty + math.log(logprobs.shape[1]))),
        "probe": float((torch.from_numpy(second) @ inner + torch.from_numpy(second_bias)).sigmoid()),
    }


@pytest.mark.parametrize("name", sorted(SCORERS))
def test_scores_are_those_of_plain_transformers(engine: ETSEngine, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    written = Written(monkeypatch)
    result = engine.search(PROBLEMS[1], settings(seed=2), verifier=SCORERS[name])
    assert result.trace is not None
    nodes = {node.id: node for node in result.trace}
    scored = [node for node in result.trace[1:] if node.stop in (StopReason.BOUNDARY, StopReason.FINISHED)]
    assert len(scored) > 8 and max(node.depth for node in scored) > 2
    assert len({node.step_score for node in scored}) > 4
    for node in scored:
        path, above = list(written.ids[node.id]), node.parent
        while above:
            path, above = [*written.ids[above], *path], nodes[above].parent
        expected = from_scratch(written.prompt, path, written.ids[node.id])[name]
        assert node.step_score == pytest.approx(expected, abs=1e-4)
        assert node.step_score == round(node.step_score, 5)


def outline(result: SearchResult) -> tuple[list[Any], list[float]]:
    """The tree to the letter, and its scores."""
    assert result.trace is not None
    tree = [(node.id, node.parent, node.text, node.stop) for node in result.trace]
    return [*tree, result.text, result.generated_tokens], [node.step_score for node in result.trace]


def test_neither_neighbours_nor_a_full_pool_change_a_result(engine: ETSEngine, folder: str) -> None:
    jobs = [(problem, settings(width=4, seed=seed)) for seed, problem in enumerate(PROBLEMS)]
    given = [SCORERS[name] for name in (*sorted(SCORERS), *sorted(SCORERS))]
    alone = [outline(engine.search(*job, verifier=one)) for job, one in zip(jobs, given, strict=True)]
    small = make(folder, kv_pool_tokens=160)
    for shared in (engine, small):
        futures = [shared.submit(*job, verifier=one) for job, one in zip(jobs, given, strict=True)]
        together = [outline(future.result(timeout=60)) for future in futures]
        assert [tree for tree, _ in together] == [tree for tree, _ in alone]
        for (_, scores), (_, expected) in zip(together, alone, strict=True):
            assert scores == pytest.approx(expected, abs=2e-5)  # the last of five digits may round the other way
    assert small.stats().preemptions > 0, "the pool was too small for all"
    small.close()


class Fixed:
    """A scorer of evidence that says the same of everything."""

    needs_certainty = False

    def __init__(self, *scores: Any) -> None:
        self.scores = scores

    def score_evidence(self, paths: Sequence[Sequence[StepEvidence]]) -> Sequence[float]:
        return [*self.scores * len(paths)] if len(self.scores) == 1 else self.scores


def test_they_cost_no_forward_pass(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    def forwards(verifier: Any) -> int:
        before = engine.stats().policy_forwards
        result = engine.search(PROBLEMS[0], settings(), verifier=verifier)
        assert (result.verifier_tokens, result.verifier_kv, result.timing.verifier_s) == (0, None, 0.0)
        return engine.stats().policy_forwards - before

    monkeypatch.setattr("ets_engine.runtime.decoder.certainties", None)  # nobody asks for them
    assert isinstance(Fixed(0.5), EvidenceScorer)
    assert forwards(Fixed(0.5)) == forwards(lambda problem, steps: 0.5)


def test_only_the_searches_that_ask_are_measured(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    rows: list[tuple[int, int]] = []

    def note(logits: torch.Tensor) -> torch.Tensor:
        rows.append((len(logits), sum(one.branch.needs_certainty for row in decoder._rows for one in row.members)))
        return certainties(logits)

    scheduler = engine._worker._scheduler
    assert scheduler is not None
    decoder = scheduler._models.decoder
    monkeypatch.setattr("ets_engine.runtime.decoder.certainties", note)
    given = [SelfCertainty(), LogProb(), SelfCertainty()]
    futures = [engine.submit(problem, settings(), verifier=one) for problem, one in zip(PROBLEMS, given, strict=False)]
    for future in futures:
        future.result(timeout=60)
    assert rows and all(measured == asked for measured, asked in rows)


# ---------------------------------------------------------------------- by name


def test_an_engine_of_that_verifier_judges_as_the_object_does(engine: ETSEngine, folder: str, tmp_path: Path) -> None:
    SCORERS["probe"].save(tmp_path / "probe.safetensors")
    for name, scorer in SCORERS.items():
        full = f"probe:{tmp_path / 'probe.safetensors'}" if name == "probe" else name
        with make(folder, full) as own:
            assert own.name.startswith(f"{folder}+{full}") and own.num_parameters[1] == 0
            found = own.search(PROBLEMS[0], settings())
            assert outline(found) == outline(engine.search(PROBLEMS[0], settings(), verifier=scorer))
            assert own.search(PROBLEMS[0], settings(), verifier=lambda problem, steps: 0.25).score in (0.0, 0.25)


def test_names() -> None:
    assert (find_intrinsic("logprob"), find_intrinsic("self_certainty")) == (LogProb(), SelfCertainty())
    assert find_intrinsic("reference") is find_intrinsic("org/logprob") is find_intrinsic("logprob:x") is None


# ---------------------------------------------------------------------- what goes wrong


def test_a_score_that_is_no_number_fails_its_branch(engine: ETSEngine) -> None:
    assert engine.search(PROBLEMS[0], settings(), verifier=Fixed(math.nan)).num_errors > 0


@pytest.mark.parametrize("scores", [(), (0.5, 0.5), (None,), (1.5,)], ids=str)
def test_a_scorer_that_breaks_its_contract_ends_its_search(engine: ETSEngine, scores: tuple[Any, ...]) -> None:
    with pytest.raises(ProtocolError, match=r"return a number each|scores lie in"):
        engine.search(PROBLEMS[0], settings(), verifier=Fixed(*scores))
    assert engine.search(PROBLEMS[0], settings(), verifier=LogProb()).num_errors == 0


def test_a_probe_of_another_policy_is_refused(engine: ETSEngine) -> None:
    with pytest.raises(ConfigError, match="the probe reads 16 hidden units of policy='tiny', this policy has 32"):
        engine.search(PROBLEMS[0], settings(), verifier=random_probe(16, 1))


def test_a_probe_is_what_was_saved(tmp_path: Path) -> None:
    probe, path = random_probe(7, 5, 3, 1), tmp_path / "probe.safetensors"
    probe.save(path)
    again = Probe.load(path)
    assert (again.policy, again.hidden_size, len(again.layers)) == ("tiny", 7, 3)
    evidence = StepEvidence(2, -1.0, 0.0, np.arange(7, dtype=np.float32))
    assert again.score_evidence([[evidence]]) == probe.score_evidence([[evidence]])


def test_files_that_hold_no_probe_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    with pytest.raises(ModelLoadError, match=r"probe:.*missing' cannot be read"):
        Probe.load(tmp_path / "missing")
    path.write_bytes(b"\x80\x04K\x05.")  # a pickle
    with pytest.raises(ModelLoadError, match="cannot be read"):
        Probe.load(path)
    save_file({"weight": np.ones((1, 3), np.float32)}, path)
    with pytest.raises(ModelLoadError, match=r"holds \['weight'\] .* no probe of format 'ets-probe-1'"):
        Probe.load(path)
    tensors = {"layers.0.weight": np.ones((2, 3), np.float32), "layers.0.bias": np.ones(2, np.float32)}
    save_file(tensors, path, metadata={"ets_probe": '{"format": "ets-probe-1", "policy": "tiny"}'})
    with pytest.raises(ModelLoadError, match="the last out = 1"):
        Probe.load(path)


@pytest.mark.parametrize("shapes", [[], [(1, 3), (1, 2)], [(2, 3)], [(3,)]], ids=str)
def test_layers_that_make_no_chain_are_refused(shapes: list[tuple[int, ...]]) -> None:
    with pytest.raises(ConfigError, match="a probe needs"):
        Probe(tuple((np.ones(shape), np.ones(shape[0])) for shape in shapes), policy="tiny")


def test_certainty_of_extremes() -> None:
    logits = torch.tensor([[0.0] * 4, [50.0, 0.0, 0.0, 0.0], [-math.inf, 0.0, 0.0, 0.0]])
    flat, sharp, ruled_out = (StepEvidence(1, 0.0, float(one), np.zeros(1, np.float32)) for one in certainties(logits))
    low, high, none = SelfCertainty().score_evidence([[flat], [sharp], [ruled_out]])
    assert low == 0.0 and 0.9 < high < 1.0 and math.isnan(none), "infinite certainty tells nothing apart"
    assert math.isnan(LogProb().score_evidence([[StepEvidence(0, 0.0, 0.0, np.zeros(1, np.float32))]])[0])
