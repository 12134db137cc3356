"""Models come from a folder with one call, and everything that can be wrong with the folder gives one clear line."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast, Qwen2ForCausalLM
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils import logging
from transformers.utils.quantization_config import QuantizationConfigMixin

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError, UnsupportedModelError
from ets_engine.runtime import Runner, load_causal_lm

from .conftest import CONFIGS, VOCABULARY, plain_logits, tiny_model


def save_tokenizer(folder: Path) -> None:
    vocabulary = {chr(60 + i): i for i in range(VOCABULARY)}
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, "?"))).save_pretrained(folder)


def save_model(folder: Path, name: str) -> None:
    tiny_model(name).save_pretrained(folder)
    save_tokenizer(folder)


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


def test_load_in_bfloat16(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    model, _ = load_causal_lm(str(tmp_path), EngineConfig(device="cpu", dtype="bfloat16"))
    assert model.dtype == torch.bfloat16
    assert Runner(model).bytes_per_token == 3 * 2 * 4 * 8 * 2


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


@pytest.mark.parametrize(
    ("option", "way_out"),
    [
        ("trust_remote_code", "EngineConfig.trust_remote_code"),
        ("dtype", "EngineConfig.dtype"),
        ("torch_dtype", "EngineConfig.dtype"),
        ("device_map", "EngineConfig.device"),
        ("use_safetensors", "safetensors"),
        ("output_loading_info", "missing weights"),
        ("attn_implementation", "tree attention"),
        ("config", "fields to change"),
        ("state_dict", "in a folder"),
    ],
)
def test_options_that_settings_decide_are_refused_by_name(option: str, way_out: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(ConfigError, match=rf"load_options\['{option}'\].*{way_out}"):
        load_causal_lm(str(tmp_path), EngineConfig(load_options={option: "auto"}))


def test_options_reach_the_model(tmp_path: Path) -> None:
    """The way out that a refused model's message names."""
    save_model(tmp_path, "mistral")
    options = {"max_position_embeddings": 128, "rms_norm_eps": 0.25}
    config = EngineConfig(device="cpu", load_options=options)
    model, _ = load_causal_lm(str(tmp_path), config)
    assert (Runner(model).context_tokens, model.config.rms_norm_eps) == (128, 0.25)
    assert config.load_options == options


def test_files_may_lie_in_a_subfolder(tmp_path: Path) -> None:
    save_model(tmp_path / "final", "llama")
    model, tokenizer = load_causal_lm(str(tmp_path), EngineConfig(device="cpu", load_options={"subfolder": "final"}))
    assert (model.config.model_type, tokenizer.decode([8])) == ("llama", "D")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"atention": "eager"}, "'atention'"),
        ({"quantization_config": {"quant_method": "magic"}}, "Unknown quantization type, got magic"),
        ({"quantization_config": {"bits": 4}}, "quant_method"),
        ({"quantization_config": 4}, "cannot be loaded"),
    ],
)
def test_options_that_transformers_refuses_are_named(options: dict[str, Any], says: str, tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    with pytest.raises(ModelLoadError, match=says) as caught:
        load_causal_lm(str(tmp_path), EngineConfig(device="cpu", load_options=options))
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


@register_quantization_config("scaling")
class ScalingConfig(QuantizationConfigMixin):
    def __init__(self, quant_method: Any = "scaling", factor: int = 8) -> None:
        self.quant_method, self.factor = quant_method, factor


@register_quantizer("scaling")
class ScalingQuantizer(HfQuantizer):
    """Changes a weight after loading, so that a test sees that it ran, and forbids to move the model."""

    requires_calibration = False

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert isinstance(self.quantization_config, ScalingConfig)
        model.model.norm.weight.data.mul_(self.quantization_config.factor)
        model.to = lambda *args, **kwargs: pytest.fail("quantised weights were moved")
        return model

    def is_serializable(self) -> Any:
        return False

    @property
    def is_trainable(self) -> Any:
        return False


def test_a_quantization_config_reaches_its_quantizer(tmp_path: Path) -> None:
    save_model(tmp_path, "llama")
    options: Any = {"quantization_config": {"quant_method": "scaling", "factor": 2}}
    model, _ = load_causal_lm(str(tmp_path), EngineConfig(device="cpu", load_options=options))
    assert isinstance(model.config.quantization_config, ScalingConfig)
    assert model.model.norm.weight.tolist() == [2.0] * 32
    runner = Runner(model)
    assert runner.extend([(runner.tree.root(), [4, 5, 6])]).shape == (3, 32)
