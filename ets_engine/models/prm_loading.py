"""A PRM by name or path: tells which published format it is of, and puts its read-out on its decoder."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, PretrainedConfig, PreTrainedModel

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.models.prm_formats import (
    PrmFormat,
    QwenFormat,
    SkyworkFormat,
    TagFormat,
    TrlFormat,
    TurnFormat,
    verdict_ids,
)
from ets_engine.models.readouts import mean_head, pair_head, stored_head
from ets_engine.reference import REFERENCE, prm_path
from ets_engine.runtime import Checkpoint, Runner, load_weights, open_checkpoint

_SEPARATED = ("trl", "skywork")  # formats whose separator is a setting
_VALUE_LAYERS = ("v_head.summary",)
_QWEN_LAYERS = ("score.0", "score.2")
# Words in the names of PRMs that are plain causal LMs, besides one of _REWARD: nothing inside tells them from a policy.
_REWARD = {"prm", "reward"}
_FAMILIES = (
    ("math_shepherd", {"shepherd"}),
    ("llemma", {"llemma"}),
    ("rlhflow", {"rlhflow"}),
    ("rlhflow", {"llama3", "data"}),  # "Llama3.1-8B-PRM-Deepseek-Data" without its owner
)


def load_prm(
    name_or_path: str, config: EngineConfig | None = None, *, reserve: bool = True
) -> tuple[Runner, PrmFormat]:
    """A process reward model, and what it reads.

    The runner's head gives what `probabilities` reads. Heads of their own (Skywork's, Qwen's) need no code of the
    checkpoint.

    Args:
        name_or_path: "reference" for the shipped one, a local folder, or a hub name.
        config: Device, dtype, `verifier_format`, `step_separator`, `verifier_load_options`.
        reserve: Take its KV pool at once, as in `Runner`.

    Raises:
        ModelLoadError: It cannot be loaded, or is no PRM of the format.
        UnsupportedModelError: An architecture that tree attention cannot honour.
        ConfigError: A setting does not go with the format, or a device is absent.

    Example:
        >>> runner, format = load_prm("reference")
        >>> format.name
        'trl'
    """
    config = config or EngineConfig()
    own = name_or_path == REFERENCE
    checkpoint = open_checkpoint(prm_path() if own else name_or_path, config, is_verifier=True)
    kind: str = config.verifier_format
    try:
        if kind == "auto":
            kind = detect_format(checkpoint.name, checkpoint.config, checkpoint.tensor_files())
        if config.step_separator is not None and kind not in _SEPARATED:
            raise ConfigError(f"step_separator={config.step_separator!r}: the {kind!r} format has a mark of its own")
        format, auto, make_head = _FORMATS[kind](checkpoint)
        model = load_weights(checkpoint, auto, make_head)
    except ModelLoadError as error:
        told = "" if kind == "auto" else f" as {kind!r}"
        raise ModelLoadError(f"verifier={name_or_path!r}{told}: {error}") from error
    return Runner(model, config, verify=not own, reserve=reserve), format


def detect_format(name: str, config: PretrainedConfig, tensors: Collection[str]) -> str:
    """The format of a PRM, as its tensors, its architecture and, for plain causal LMs, its name say.

    Args:
        name: Folder or hub name.
        config: Of the model.
        tensors: Names of all its weights.

    Raises:
        ModelLoadError: It is none that can be told from what is there.
    """
    kinds = list(config.architectures or ())
    if f"{_VALUE_LAYERS[0]}.weight" in tensors:
        return "skywork"
    if all(f"{layer}.weight" in tensors for layer in _QWEN_LAYERS):
        return "qwen"
    if any(kind.endswith("ForTokenClassification") for kind in kinds):
        return "trl"
    words = _words(name)
    heads = sorted(tensor for tensor in tensors if tensor.split(".")[0] in ("score", "classifier", "v_head"))
    if not heads and words & _REWARD:
        for kind, family in _FAMILIES:
            if family <= words:
                return kind
    raise ModelLoadError(
        f"cannot tell which PRM this is: {', '.join(kinds) or config.model_type} with "
        f"{', '.join(heads[:4]) or 'no head of a PRM'}, by the name of {'-'.join(sorted(words))}; if it is a PRM, pass "
        "verifier_format='math_shepherd', 'llemma', 'rlhflow', 'skywork', 'qwen' or 'trl'"
    )


def _words(name: str) -> set[str]:
    """Words of a hub name, or of the last two parts of a path; a snapshot in the hub's cache bears its hub name."""
    parts = name.rstrip("/").split("/")
    cached = [part for part in parts if part.startswith("models--")]
    return set(re.split(r"[^a-z0-9]+", "/".join(cached[-1:] or parts[-2:]).lower())) - {""}


MakeHead = Callable[[PreTrainedModel], torch.nn.Module]
Recipe = tuple[PrmFormat, type, MakeHead]
"""What it reads, how its decoder loads, and what gives its head."""


def _math_shepherd(checkpoint: Checkpoint) -> Recipe:
    right, wrong = verdict_ids(checkpoint.tokenizer)
    format = TagFormat.of(checkpoint.tokenizer, "math_shepherd")
    return format, AutoModelForCausalLM, lambda model: pair_head(model, right, wrong)


def _llemma(checkpoint: Checkpoint) -> Recipe:
    return TagFormat.of(checkpoint.tokenizer, "llemma"), AutoModelForCausalLM, mean_head


def _rlhflow(checkpoint: Checkpoint) -> Recipe:
    right, wrong = verdict_ids(checkpoint.tokenizer)
    return TurnFormat.of(checkpoint.tokenizer), AutoModelForCausalLM, lambda model: pair_head(model, right, wrong)


def _skywork(checkpoint: Checkpoint) -> Recipe:
    head = stored_head(checkpoint, _VALUE_LAYERS, outputs=1)
    format = SkyworkFormat(checkpoint.tokenizer, checkpoint.settings.step_separator or "\n")
    return format, AutoModelForTokenClassification, lambda model: head


def _qwen(checkpoint: Checkpoint) -> Recipe:
    head = stored_head(checkpoint, _QWEN_LAYERS, outputs=2)
    return QwenFormat.of(checkpoint.tokenizer), AutoModelForTokenClassification, lambda model: head


def _trl(checkpoint: Checkpoint) -> Recipe:
    if checkpoint.config.num_labels != 2:
        raise ModelLoadError(f"it has {checkpoint.config.num_labels} labels, a PRM has 2: wrong and right")
    layer = "classifier" if "classifier.weight" in checkpoint.tensor_files() else "score"
    head = stored_head(checkpoint, (layer,), outputs=2)
    format = TrlFormat(checkpoint.tokenizer, checkpoint.settings.step_separator or "\n")
    return format, AutoModelForTokenClassification, lambda model: head


_FORMATS: dict[str, Callable[[Checkpoint], Recipe]] = {
    "math_shepherd": _math_shepherd,
    "llemma": _llemma,
    "rlhflow": _rlhflow,
    "skywork": _skywork,
    "qwen": _qwen,
    "trl": _trl,
}
