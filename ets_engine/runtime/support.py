"""Whether tree attention can honour a model: reasons to refuse it by its config, and a numerical probe at load.

The probe is the proof, the reasons are for people: a model that passes neither is refused, never run wrongly.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from ets_engine.errors import UnsupportedModelError
from ets_engine.kv import LayerShape
from ets_engine.runtime.hook import ATTENTION_NAME, FAR, PROBE_NAME, ShapeProbe

# Config fields that name an attention or a state we cannot honour, and what they mean.
_REFUSED_FIELDS = {
    "kv_lora_rank": "multi-head latent attention",
    "alibi": "ALiBi position biases",
    "ssm_state_size": "recurrent state (state-space layers)",
    "state_size": "recurrent state (state-space layers)",
    "mamba_d_state": "recurrent state (state-space layers)",
    "rescale_every": "recurrent state (RWKV)",
    "lru_width": "recurrent state (linear recurrent units)",
    "linear_num_value_heads": "linear-attention layers with recurrent state",
    "conv_L_cache": "short convolutions with state",
    "cross_attention_layers": "cross-attention",
    "attention_chunk_size": "chunked attention",
}
# "alibi" is always in BLOOM and MPT, which say so by their type.
_REFUSED_TYPES = {
    "bloom": "ALiBi position biases",
    "mpt": "ALiBi position biases",
    "mamba": "recurrent state (state-space layers)",
    "mamba2": "recurrent state (state-space layers)",
    "rwkv": "recurrent state (RWKV)",
}
_PROBE_TOKENS = 8
_PROBE_WINDOW = 2  # tokens; the first token after the prompt sees one of the prompt's four, the second sees none
# Relative to the largest output; eager attention takes its softmax in fp32 even in an fp64 model.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 2e-3, torch.float16: 0.05, torch.bfloat16: 0.1}

RunTree = Callable[[list[int], list[list[int]], Sequence[int | None]], list[torch.Tensor]]


def text_config(model: PreTrainedModel) -> PretrainedConfig:
    """The config of the language model, also inside a multimodal one."""
    return model.config.get_text_config(decoder=True)


def check_config(config: PretrainedConfig) -> None:
    """Refuse what the config already gives away.

    Raises:
        UnsupportedModelError: naming the architecture and the reason.
    """
    text = config.get_text_config(decoder=True)
    kind = getattr(config, "model_type", type(config).__name__)
    reason = _REFUSED_TYPES.get(kind)
    if getattr(config, "is_encoder_decoder", False):
        reason = "it is an encoder-decoder with cross-attention"
    elif getattr(text, "add_cross_attention", False):
        reason = "cross-attention"
    for name, meaning in _REFUSED_FIELDS.items():
        value = getattr(text, name, None)
        if reason is None and value not in (None, False, 0, [], ()):
            reason = f"{meaning} (config.{name}={value})"
    if reason is not None:
        raise UnsupportedModelError(
            f"{kind!r} cannot run with a tree KV cache: {reason}; use a decoder with plain softmax attention "
            "(Llama, Qwen, Mistral, Gemma, Phi-3, OLMo, ...), or a server back-end"
        )


def context_tokens(config: PretrainedConfig) -> int:
    """Longest path (tokens) at which the model is what its config says; rope that changes with length stops there."""
    text = config.get_text_config(decoder=True)
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "n_positions", None) or 1 << 20
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    nested = [value for value in rope.values() if isinstance(value, dict)]
    for scaling in nested or [rope]:
        kind = scaling.get("rope_type", scaling.get("type"))
        original = scaling.get("original_max_position_embeddings") or getattr(
            text, "original_max_position_embeddings", None
        )
        if kind == "longrope" and original:
            limit = min(limit, original)  # beyond it every frequency changes, cached keys' too
    return int(limit)


def use_tree_attention(model: PreTrainedModel) -> None:
    """Switch a loaded model to our attention function.

    Raises:
        UnsupportedModelError: the model does not take attention functions from outside.
    """
    kind = type(model).__name__
    if not model._can_set_attn_implementation():
        raise UnsupportedModelError(
            f"{kind} brings attention code of its own instead of transformers' AttentionInterface; it cannot use ours"
        )
    try:
        model.set_attn_implementation(ATTENTION_NAME)
    except (ValueError, KeyError, ImportError) as error:
        raise UnsupportedModelError(f"{kind} refuses an attention function from outside: {error}") from error


def probe_layers(model: PreTrainedModel) -> tuple[list[LayerShape], list[int | None]]:
    """K/V shape and sliding window of every layer, asked from the model itself by a forward pass of two tokens.

    A window (tokens that a token sees, itself included) is None where it is no shorter than the model's context.

    Raises:
        UnsupportedModelError: a layer does something else than causal softmax attention over all earlier tokens or
            over the last ones, or tells its attention function something else than its mask or its config says.
    """
    probe, kind, config = _probe(model), type(model.base_model).__name__, text_config(model)
    limit, softcap = context_tokens(model.config), getattr(config, "attn_logit_softcapping", None)
    for layer, window in probe.windows.items():
        told = probe.told.get(layer, window)
        if min(told, limit) != min(window, limit):
            raise UnsupportedModelError(
                f"{kind} layer {layer} tells its attention function a sliding window of {told} tokens, but its mask "
                f"lets a token see {window if window < FAR else 'all'}: which of them holds is unknown"
            )
        if probe.softcaps[layer] != softcap and softcap is not None:
            raise UnsupportedModelError(
                f"{kind} layer {layer} does not tell its attention function of the soft cap on attention scores "
                f"(config.attn_logit_softcapping={softcap})"
            )
    layers = sorted(probe.shapes)
    windows = [probe.windows[layer] if probe.windows[layer] < limit else None for layer in layers]
    return [probe.shapes[layer] for layer in layers], windows


def _probe(model: PreTrainedModel) -> ShapeProbe:
    """A forward pass of two tokens that records what every layer asks for."""
    probe, base = ShapeProbe(), model.base_model
    kind = type(base).__name__
    device = next(base.parameters()).device
    model.set_attn_implementation(PROBE_NAME)
    try:
        with torch.inference_mode():
            base(
                input_ids=torch.tensor([[1, 2]], device=device),
                position_ids=torch.tensor([[0, 1]], device=device),
                use_cache=False,
                ets_tree=probe,
            )
    except (UnsupportedModelError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever model code raises when it is called as a decoder
        raise UnsupportedModelError(f"{kind} cannot run as a packed decoder without a cache: {error}") from error
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    layers = text_config(model).num_hidden_layers
    if sorted(probe.shapes) != list(range(layers)) or probe.calls != layers:
        raise UnsupportedModelError(
            f"{kind} has {layers} layers, but {probe.calls} attention calls in layers {sorted(probe.shapes)}: some "
            "layers attend more than once, or keep another state than K/V"
        )
    return probe


def check_outputs(
    model: PreTrainedModel, windows: Sequence[int | None], run_tree: RunTree, name: str = "logits"
) -> None:
    """Compare the tree path with the model's own eager path on a few tokens; the model keeps our attention after it.

    A few tokens lie inside any real window. So a model with windows is compared once more with its windows set to
    `_PROBE_WINDOW` tokens in its config, which its masks are made from: the same layers must see less, and as we do.

    Args:
        model: With its head.
        windows: Of each layer, as `probe_layers` found them.
        run_tree: (prompt, branches, windows) -> outputs of all tokens of each whole sequence, through the tree cache.
        name: Output attribute of the model's own forward pass.

    Raises:
        UnsupportedModelError: the two differ, or the windows are not those of `config.sliding_window`.
    """
    _compare(model, windows, run_tree, name)
    if not any(windows):
        return
    config = text_config(model)
    usual = getattr(config, "sliding_window", None)
    config.sliding_window = _PROBE_WINDOW
    try:
        short = [None if window is None else _PROBE_WINDOW for window in windows]
        probe = _probe(model)
        if [window if window < FAR else None for _, window in sorted(probe.windows.items())] != short:
            raise UnsupportedModelError(
                f"{type(model).__name__} has sliding windows that do not follow config.sliding_window, so that they "
                "cannot be tried on a few tokens"
            )
        _compare(model, short, run_tree, name)
    finally:
        config.sliding_window = usual


def _compare(model: PreTrainedModel, windows: Sequence[int | None], run_tree: RunTree, name: str) -> None:
    config = text_config(model)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, config.vocab_size, (_PROBE_TOKENS,), generator=generator).tolist()
    prompt, branches = ids[:4], [ids[4:6], ids[6:8]]
    ours = run_tree(prompt, branches, windows)
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            plain = [_plain(model, prompt + branch, device, name) for branch in branches]
    finally:
        model.set_attn_implementation(ATTENTION_NAME)
    for mine, theirs in zip(ours, plain, strict=True):
        error = float((mine.double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp_min(1e-6))
        allowed = _TOLERANCE[next(model.parameters()).dtype]  # a PRM's head is wider than what feeds it
        if not error <= allowed:
            raise UnsupportedModelError(
                f"{type(model).__name__} differs from its own eager attention by {error:.2g} of the largest output "
                f"(allowed {allowed:.2g}): its attention is not plain softmax attention"
            )


def _plain(model: PreTrainedModel, ids: list[int], device: torch.device, name: str) -> Any:
    output = model(input_ids=torch.tensor([ids], device=device), use_cache=False)
    return getattr(output, name)[0] if hasattr(output, name) else output[0][0]
