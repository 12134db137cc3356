"""What lies at a name or path before any weights are loaded: config, tokenizer, and single tensors by name."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils.hub import cached_file

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.runtime.support import check_config

# Arguments of `from_pretrained` that a setting decides, and where to decide it.
_DECIDED = {
    "trust_remote_code": "set EngineConfig.trust_remote_code",
    "dtype": "set EngineConfig.dtype",
    "torch_dtype": "set EngineConfig.dtype",
    "device_map": "set EngineConfig.device",
    "use_safetensors": "weights are always *.safetensors",
    "output_loading_info": "missing weights are always an error",
    "ignore_mismatched_sizes": "weights that do not fit are always an error",
    "attn_implementation": "models always run on tree attention",
    "config": "name the fields to change instead, e.g. sliding_window=null",
    "state_dict": "save the weights in a folder and name that",
    "token": "set the environment variable HF_TOKEN, so that no name or message holds it",
    "use_auth_token": "set the environment variable HF_TOKEN, so that no name or message holds it",
    "proxies": "set the environment variable HTTPS_PROXY, so that no name or message holds its password",
}
# Those that say where files are, which config and tokenizer must hear of too.
_PLACES = ("cache_dir", "force_download", "local_files_only", "revision", "subfolder")


@dataclass(frozen=True, slots=True, eq=False)
class Checkpoint:
    """A model before its weights are loaded.

    Attributes:
        name: Folder or hub name.
        settings: Device and dtype to come.
        options: More arguments of `from_pretrained`.
        config: Of the model.
        tokenizer: Of the model.
        trust_remote_code: Whether code of the checkpoint may run.
    """

    name: str
    settings: EngineConfig
    options: dict[str, Any]
    config: PretrainedConfig
    tokenizer: PreTrainedTokenizerBase
    trust_remote_code: bool

    def tensor_files(self) -> dict[str, str]:
        """Names of all tensors, and the file of each.

        Raises:
            ModelLoadError: There are no safetensors weights, or they cannot be read.
        """
        try:
            if index := self._find("model.safetensors.index.json"):
                shards = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
                files = {shard: self._find(shard) for shard in set(shards.values())}
                if missing := sorted(shard for shard, file in files.items() if file is None):
                    raise ModelLoadError(
                        f"{self.name!r} lacks {missing[0]}, which its index of shards names; copy it there, or save "
                        "the model again"
                    )
                return {tensor: str(files[shard]) for tensor, shard in shards.items()}
            if single := self._find("model.safetensors"):
                with safe_open(single, framework="pt") as file:
                    return dict.fromkeys(file.keys(), single)
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise ModelLoadError(
                f"the weights of {self.name!r} cannot be read: {first_line(error)}; they must be whole *.safetensors"
            ) from error
        raise ModelLoadError(f"{self.name!r} holds no model.safetensors and no index of shards; save it as safetensors")

    def read_tensor(self, tensor: str) -> torch.Tensor:
        """One tensor, on the CPU and in its stored dtype.

        Raises:
            ModelLoadError: There is none of that name, or it cannot be read.
        """
        files = self.tensor_files()
        if tensor not in files:
            raise ModelLoadError(f"{self.name!r} has no weights for {tensor}")
        try:
            with safe_open(files[tensor], framework="pt") as file:
                return file.get_tensor(tensor)
        except (OSError, ValueError, SafetensorError) as error:
            raise ModelLoadError(f"{tensor} of {self.name!r} cannot be read: {first_line(error)}") from error

    def _find(self, file: str) -> str | None:
        return cached_file(self.name, file, _raise_exceptions_for_missing_entries=False, **_places(self.options))


def open_checkpoint(name_or_path: str, settings: EngineConfig, *, is_verifier: bool = False) -> Checkpoint:
    """Config and tokenizer of a model; no weights are read.

    Args:
        name_or_path: A local folder, or a hub name that is in the local cache or reachable.
        settings: Whether code from the checkpoint may run, and the load options.
        is_verifier: A verifier reads `verifier_load_options`, and runs no code of its own where transformers knows its
            model type: PRMs bring code for their heads, which this package has.

    Raises:
        ConfigError: An option is decided by a setting, or the name is that of a file.
        ModelLoadError: Unknown path, an option that transformers does not take, or no tokenizer.
        UnsupportedModelError: An architecture that tree attention cannot honour.
    """
    if Path(name_or_path).is_file():  # transformers takes a config.json and then misses a tokenizer
        role = "verifier" if is_verifier else "model"
        folder = str(Path(name_or_path).parent)
        raise ConfigError(f"{role}={name_or_path!r} is a file; give the folder that holds it, {folder!r}")
    label = "verifier_load_options" if is_verifier else "load_options"
    options = copy.deepcopy(settings.verifier_load_options if is_verifier else settings.load_options)
    for option in options:
        if option in _DECIDED:
            raise ConfigError(f"{label}[{option!r}] is not an option of its own: {_DECIDED[option]}")
    places = _places(options)
    trusts = settings.trust_remote_code
    try:
        if trusts and is_verifier:
            found, _ = PretrainedConfig.get_config_dict(name_or_path, **places)
            trusts = found.get("model_type") not in CONFIG_MAPPING
        config = AutoConfig.from_pretrained(name_or_path, trust_remote_code=trusts, **places)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelLoadError(
            f"no model at {name_or_path!r}: {first_line(error)}; give a folder with config.json and *.safetensors, "
            "or a hub name that is cached here or reachable"
        ) from error
    check_config(config)
    try:
        tokenizer = AutoTokenizer.from_pretrained(name_or_path, trust_remote_code=trusts, **places)
    except (OSError, ValueError, KeyError, ImportError, TypeError) as error:
        raise ModelLoadError(
            f"{name_or_path!r} has no usable tokenizer: {first_line(error)}; save one there with "
            "tokenizer.save_pretrained(path)"
        ) from error
    return Checkpoint(name_or_path, settings, options, config, tokenizer, trusts)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type."""
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _places(options: dict[str, Any]) -> dict[str, Any]:
    return {name: options[name] for name in _PLACES if name in options}
