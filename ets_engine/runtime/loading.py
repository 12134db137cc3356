"""Weights of a model by name or path, with one clear line for everything that can go wrong; no network is assumed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.logging import set_tqdm_hook

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.runtime.checkpoints import Checkpoint, first_line, open_checkpoint

HEADS = ("score", "classifier")
"""What transformers' token classifiers call their heads."""
_REFUSALS = (OSError, ValueError, KeyError, ImportError, RuntimeError, TypeError, AttributeError)  # by transformers


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
        config: Device, dtype, whether code from the checkpoint may run, and `load_options`.

    Raises:
        ConfigError: a load option that a setting decides, or a device that is absent.
        ModelLoadError: unknown path, no safetensors weights, no tokenizer, weights that do not fit or are missing, or
            a load option that transformers does not take.
        UnsupportedModelError: an architecture that tree attention cannot honour.
    """
    checkpoint = open_checkpoint(name_or_path, config or EngineConfig())
    return load_weights(checkpoint, AutoModelForCausalLM), checkpoint.tokenizer


def load_weights(
    checkpoint: Checkpoint, auto: Any, make_head: Callable[[PreTrainedModel], torch.nn.Module] | None = None
) -> PreTrainedModel:
    """The model of a checkpoint, on its device.

    Args:
        checkpoint: What to load, and the settings.
        auto: `AutoModelForCausalLM` or `AutoModelForTokenClassification`.
        make_head: Gives a module [..., hidden] -> [..., outputs] that takes the place of the model's head; the head of
            a token classifier is then never looked at, and need not be there.

    Raises:
        ConfigError: the device is unknown or absent.
        ModelLoadError: as `load_causal_lm`.
    """
    name, settings = checkpoint.name, checkpoint.settings
    device = resolve_device(settings)
    dtype = resolve_dtype(settings, device)
    is_quantized = bool(
        checkpoint.options.get("quantization_config") or getattr(checkpoint.config, "quantization_config", None)
    )  # quantised weights are put on their device as they are made, and cannot be moved
    placed = {"device_map": {"": device}} if is_quantized else {}
    try:
        with quietly():
            model, found = auto.from_pretrained(
                name,
                dtype=dtype,
                use_safetensors=True,
                trust_remote_code=checkpoint.trust_remote_code,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # `_check_weights` says which
                **placed,
                **checkpoint.options,
            )
    except (*_REFUSALS, SafetensorError) as error:
        given = f" with {checkpoint.options}" if checkpoint.options else ""
        raise ModelLoadError(
            f"the weights of {name!r} cannot be loaded as {auto.__name__}{given}: {first_line(error)}; "
            "they must be *.safetensors that fit the config"
        ) from error
    _check_weights(name, model, found, has_own_head=make_head is None)
    try:
        if make_head is not None:
            _put_head(model, make_head(model).to(device))
        return (model if is_quantized else model.to(device)).eval()
    except torch.cuda.OutOfMemoryError as error:
        raise ModelLoadError(f"{name!r} does not fit on {device} in {dtype}: {first_line(error)}") from error


def _check_weights(name: str, model: PreTrainedModel, found: dict[str, Any], *, has_own_head: bool) -> None:
    """Refuse what transformers would load with weights that it made up, or without some that it was given.

    Raises:
        ModelLoadError: Weights are missing, do not fit the config, or are those of another kind of model.
    """
    ignored = () if has_own_head else HEADS
    missing = sorted(key for key in found["missing_keys"] if key.split(".")[0] not in ignored)
    if missing:
        raise ModelLoadError(
            f"{name!r} has no weights for {', '.join(missing[:3])}{' ...' if missing[3:] else ''}: it is no "
            f"{type(model).__name__}; give the checkpoint of one"
        )
    misfits = sorted(sizes for sizes in found["mismatched_keys"] if sizes[0].split(".")[0] not in ignored)
    if misfits:
        key, stored, wanted = misfits[0]
        raise ModelLoadError(
            f"the weights of {name!r} do not fit its config: {key} is {list(stored)} and should be {list(wanted)}; "
            "give config.json and *.safetensors of the same model"
        )
    foreign = sorted(key for key in found["unexpected_keys"] if key.split(".")[0] in HEADS)
    if foreign and has_own_head:  # with tied embeddings nothing is missing
        raise ModelLoadError(
            f"{name!r} is a classifier, a PRM perhaps: a {type(model).__name__} has no {', '.join(foreign[:2])}; "
            "give a language model here, and a PRM as the verifier"
        )


def _put_head(model: PreTrainedModel, head: torch.nn.Module) -> None:
    """Put a module where the model's own forward pass calls its head."""
    own = next((name for name in HEADS if hasattr(model, name)), None)
    if own is not None:
        setattr(model, own, head)
    else:
        model.set_output_embeddings(head)


@contextmanager
def quietly() -> Iterator[None]:
    """No "Loading weights" bar and no "LOAD REPORT" table of transformers; the hub's download bars stay.

    What the report tells is either an error of ours (missing weights) or meant so (a PRM's head under another name).
    """
    log = logging.getLogger("transformers.modeling_utils")
    previous = set_tqdm_hook(lambda factory, args, kwargs: factory(*args, **{**kwargs, "disable": True}))
    log.addFilter(_is_no_report)
    try:
        yield
    finally:
        log.removeFilter(_is_no_report)
        set_tqdm_hook(previous)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in record.getMessage()
