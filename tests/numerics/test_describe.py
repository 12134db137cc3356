"""What an engine says of its models, against figures counted by hand."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.models.description import describe_model
from ets_engine.runtime import Runner
from ets_engine.service import ETSEngine
from ets_engine.types import EngineDescription, ModelDescription

from .conftest import tiny_model

LAYERS, HIDDEN, MLP, VOCABULARY, HEAD_DIM = 3, 32, 48, 61, 8
EMBEDDINGS = VOCABULARY * HIDDEN


def decoder_parameters(kv_heads: int) -> int:
    """Of a Llama without its head: query and output, key and value, three matrices of the MLP, two norms a layer."""
    layer = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * kv_heads * HEAD_DIM + 3 * HIDDEN * MLP + 2 * HIDDEN
    return EMBEDDINGS + LAYERS * layer + HIDDEN


@pytest.fixture(scope="module")
def engine(folders: tuple[str, str]) -> Iterator[ETSEngine]:
    config = EngineConfig(device="cpu", page_tokens=16, kv_pool_tokens=112, prefix_cache_tokens=0)
    with ETSEngine.from_pretrained(*folders, config) as made:
        yield made


def check(found: ModelDescription, name: str, kv_heads: int, parameters: int, bytes_per_number: int = 4) -> None:
    assert (found.name, found.parameters, found.weight_bytes) == (name, parameters, bytes_per_number * parameters)
    assert found.kv_bytes_per_token == LAYERS * 2 * kv_heads * HEAD_DIM * bytes_per_number
    assert (found.context_tokens, found.attention) == (256, f"tree attention over {LAYERS} layers")


def test_figures_by_hand(engine: ETSEngine, folders: tuple[str, str]) -> None:
    found = engine.describe()
    assert found.verifier is not None
    check(found.policy, folders[0], 2, decoder_parameters(kv_heads=2) + EMBEDDINGS)
    check(found.verifier, folders[1], 4, decoder_parameters(kv_heads=4) + 2 * HIDDEN + 2)
    assert (found.policy.parameters, found.verifier.parameters) == engine.num_parameters == (27168, 28354)
    for one, architecture in ((found.policy, "LlamaForCausalLM"), (found.verifier, "LlamaForTokenClassification")):
        assert (one.architecture, one.dtype, one.device) == (architecture, "float32", "cpu")
        assert one.kv_pool_tokens == 112
        assert [one.width_that_fits(tokens) for tokens in (16, 20, 112, 113)] == [7, 5, 1, 0]
    assert EngineDescription.model_validate_json(found.model_dump_json()) == found


def test_bytes_are_those_of_a_search(engine: ETSEngine) -> None:
    found = engine.describe()
    result = engine.search("1+1?", SearchConfig(width=2, max_steps=2, max_step_tokens=4))
    assert result.kv is not None and result.verifier_kv is not None and found.verifier is not None
    assert result.kv.bytes_per_token == found.policy.kv_bytes_per_token
    assert result.verifier_kv.bytes_per_token == found.verifier.kv_bytes_per_token


@pytest.mark.parametrize(
    ("fused", "graphs", "said"),
    [
        (0, None, ""),
        (LAYERS - 1, None, f", {LAYERS - 1} of them fused"),
        (LAYERS, object(), ", all of them fused, passes of one token a branch in CUDA graphs"),
    ],
)
def test_how_a_model_runs_on_a_gpu(fused: int, graphs: object, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = Runner(tiny_model("llama", num_hidden_layers=LAYERS))
    monkeypatch.setattr(runner, "fused_layers", fused)
    monkeypatch.setattr(runner._passes, "graphs", graphs)
    assert describe_model(runner, None, "", {}).attention == f"tree attention over {LAYERS} layers{said}"


def test_what_formats_mean_here(engine: ETSEngine) -> None:
    found = engine.describe()
    assert found.verifier is not None
    assert (found.policy.format, found.policy.details["prompt"]) == ("plain", "the problem on a line of its own")
    assert found.policy.details["steps"] == r"end with '\n\n'"
    assert (found.verifier.format, found.verifier_name) == ("trl", found.verifier.name)
    assert found.verifier.details["score"].startswith(r"at the end of '\n' after each step")
    assert found.embedder == "the policy's own hidden states"


def test_half_the_bytes_in_half_the_precision_and_a_policy_that_judges_itself(folders: tuple[str, str]) -> None:
    config = EngineConfig(device="cpu", dtype="bfloat16", preset="metamath")
    with ETSEngine.from_pretrained(folders[0], "logprob", config) as engine:
        found = engine.describe()
    check(found.policy, folders[0], 2, 27168, bytes_per_number=2)
    assert (found.policy.format, found.policy.dtype) == ("metamath", "bfloat16")
    assert (found.verifier, found.verifier_name) == (None, "logprob")


def test_nothing_judges_where_nothing_was_given(folders: tuple[str, str]) -> None:
    with ETSEngine.from_pretrained(folders[0], config=EngineConfig(device="cpu")) as engine:
        assert (engine.describe().verifier, engine.describe().verifier_name) == (None, None)
