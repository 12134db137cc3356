"""Models come from a folder with one call, and everything that can be wrong with the folder gives one clear line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaForTokenClassification, PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.utils import logging

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from ets_engine.runtime import Runner, load_causal_lm, load_token_classifier

from .conftest import CONFIGS, VOCABULARY, plain_logits, tiny_model


def save_tokenizer(folder: Path) -> None:
    vocabulary = {chr(60 + i): i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "?"))).save_pretrained(folder)


def test_load_and_run(tmp_path: Path) -> None:
    tiny_model("qwen2").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, tokenizer = load_causal_lm(str(tmp_path), EngineConfig(device="cpu"))
    assert (model.dtype, tokenizer.decode([8])) == (torch.float32, "D")
    runner = Runner(model)
    logits = runner.logits(runner.extend([(runner.tree.root(), [4, 5, 6])]))
    assert (logits - plain_logits(tiny_model("qwen2"), [4, 5, 6])).abs().max() < 1e-4


def test_loading_draws_no_bars_and_leaves_those_of_others_alone(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    drawn: list[str] = []

    def hook(factory: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        drawn.append(kwargs["desc"])
        return factory(*args, **kwargs)

    tiny_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    capfd.readouterr()
    before = logging.set_tqdm_hook(hook)
    try:
        load_causal_lm(str(tmp_path), EngineConfig(device="cpu"))
        assert (drawn, capfd.readouterr().err) == ([], "")
        (tmp_path / "model.safetensors").write_bytes(b"broken")
        with pytest.raises(ModelLoadError):
            load_causal_lm(str(tmp_path), EngineConfig(device="cpu"))
        assert list(logging.tqdm([1, 2], desc="another's")) == [1, 2]
        assert drawn == ["another's"] and "another's" in capfd.readouterr().err
    finally:
        logging.set_tqdm_hook(before)


def test_load_a_token_classifier_in_bfloat16(tmp_path: Path) -> None:
    LlamaForTokenClassification(CONFIGS["llama"]).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    model, _ = load_token_classifier(str(tmp_path), EngineConfig(device="cpu", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    runner = Runner(model)
    assert runner.bytes_per_token == 3 * 2 * 4 * 8 * 2
    assert runner.logits(runner.extend([(runner.tree.root(), [4, 5, 6])])).shape == (3, 2)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadError, match="no model at '/no/such/folder'"):
        load_causal_lm("/no/such/folder")
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="tokenizer"):
        load_causal_lm(str(tmp_path))
    save_tokenizer(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_causal_lm(str(tmp_path))
    torch.save({}, tmp_path / "pytorch_model.bin")  # pickles are never read
    with pytest.raises(ModelLoadError, match="safetensors"):
        load_causal_lm(str(tmp_path))


def test_weights_are_never_made_up(tmp_path: Path) -> None:
    """A plain language model as a verifier would judge at random."""
    tiny_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ModelLoadError, match="no weights for score"):
        load_token_classifier(str(tmp_path))


def test_tied_weights_are_not_missing(tmp_path: Path) -> None:
    config = copy.deepcopy(CONFIGS["qwen2"])
    config.tie_word_embeddings = True
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    assert load_causal_lm(str(tmp_path))[0].config.tie_word_embeddings


def test_unsupported_models_are_refused_before_their_weights_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "mamba", "state_size": 4}')
    with pytest.raises(UnsupportedModelError, match="recurrent state"):
        load_causal_lm(str(tmp_path))


def test_devices_are_checked(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    save_tokenizer(tmp_path)
    with pytest.raises(ConfigError, match="'quantum'"):
        load_causal_lm(str(tmp_path), EngineConfig(device="quantum"))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA"):
            load_causal_lm(str(tmp_path), EngineConfig(device="cuda"))
