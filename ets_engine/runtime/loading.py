"""Model and tokenizer by name or path, with one clear line for everything that can go wrong; no network is assumed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils.logging import set_tqdm_hook

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.runtime.support import check_config


def resolve_device(config: EngineConfig) -> torch.device:
    """The device to run on; "auto" takes CUDA when it is there.

    Raises:
        ConfigError: the device is unknown or absent.
    """
    name = ("cuda" if torch.cuda.is_available() else "cpu") if config.device == "auto" else config.device
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device={config.device!r} is unknown; use 'auto', 'cpu', 'cuda' or 'cuda:N'") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device={config.device!r}, but torch sees no CUDA device; use 'auto' or 'cpu'")
    return device


def resolve_dtype(config: EngineConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights and KV; "auto" is float32 on a CPU, bfloat16 on CUDA."""
    if config.dtype == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return getattr(torch, config.dtype)


def load_causal_lm(
    name_or_path: str, config: EngineConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A causal language model and its tokenizer, on their device, ready for `Runner`.

    Args:
        name_or_path: A local folder, or a hub name that is in the local cache or reachable.
        config: Device, dtype, and whether code from the checkpoint may run.

    Raises:
        ModelLoadError: unknown path, no safetensors weights, no tokenizer, weights that do not fit or are missing.
        UnsupportedModelError: an architecture that tree attention cannot honour.
    """
    return _load(AutoModelForCausalLM, name_or_path, config or EngineConfig())


def load_token_classifier(
    name_or_path: str, config: EngineConfig | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A decoder with a token-classification head (a process reward model) and its tokenizer; see `load_causal_lm`.

    Checkpoints that bring a class of their own under `AutoModel` need `trust_remote_code`.
    """
    config = config or EngineConfig()
    remote = getattr(_config(name_or_path, config), "auto_map", None) or {}
    own_class = config.trust_remote_code and "AutoModel" in remote and "AutoModelForTokenClassification" not in remote
    return _load(AutoModel if own_class else AutoModelForTokenClassification, name_or_path, config)


def _config(name_or_path: str, config: EngineConfig) -> Any:
    try:
        return AutoConfig.from_pretrained(name_or_path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ModelLoadError(
            f"no model at {name_or_path!r}: {_first_line(error)}; give a folder with config.json and *.safetensors, "
            "or a hub name that is cached here or reachable"
        ) from error


def _load(auto: Any, name_or_path: str, config: EngineConfig) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    check_config(_config(name_or_path, config))
    device = resolve_device(config)
    dtype = resolve_dtype(config, device)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelLoadError(
            f"{name_or_path!r} has no usable tokenizer: {_first_line(error)}; save one there with "
            "tokenizer.save_pretrained(path)"
        ) from error
    try:
        with _without_bars():
            model, found = auto.from_pretrained(
                name_or_path,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
            )
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelLoadError(
            f"the weights of {name_or_path!r} cannot be loaded as {auto.__name__}: {_first_line(error)}; "
            "they must be *.safetensors that fit the config"
        ) from error
    if missing := sorted(found["missing_keys"]):  # transformers would make up random ones
        raise ModelLoadError(
            f"{name_or_path!r} has no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}: it is no "
            f"{type(model).__name__}; give the checkpoint of one"
        )
    try:
        return model.to(device).eval(), tokenizer
    except torch.cuda.OutOfMemoryError as error:
        raise ModelLoadError(f"{name_or_path!r} does not fit on {device} in {dtype}: {_first_line(error)}") from error


@contextmanager
def _without_bars() -> Iterator[None]:
    """No "Loading weights" bar of transformers on the caller's terminal; the hub's download bars stay."""
    previous = set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    try:
        yield
    finally:
        set_tqdm_hook(previous)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
