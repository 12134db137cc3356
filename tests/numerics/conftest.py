"""Tiny random models of several architectures, also as folders, and the unshared computation to compare them with."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GptOssConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    Phi3Config,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
    SmolLM3Config,
)

VOCABULARY = 61
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**COMMON, num_key_value_heads=4),
    "llama_gqa_rope_scaled": LlamaConfig(
        **COMMON,
        num_key_value_heads=2,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    ),
    "qwen2": Qwen2Config(**COMMON, num_key_value_heads=2, use_sliding_window=False, sliding_window=8),
    "qwen3": Qwen3Config(**COMMON, num_key_value_heads=1, head_dim=16),
    "mistral": MistralConfig(**COMMON, num_key_value_heads=2, sliding_window=None, head_dim=8),
}
# More of what attention can be; only the tests of logits run these. Windows of 8 tokens have the segments of the random
# trees inside, outside and across their edge.
_TWO_LAYERS = {**COMMON, "num_key_value_heads": 2, "num_hidden_layers": 2}
FAMILIES: dict[str, PretrainedConfig] = {
    "gemma2": Gemma2Config(
        **_TWO_LAYERS,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=5.0,
    ),
    "gemma3_text": Gemma3TextConfig(
        **{**_TWO_LAYERS, "num_hidden_layers": 3},
        head_dim=8,
        sliding_window=8,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"],
        rope_parameters={
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
            "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1_000_000.0},
        },
    ),
    "gpt_neox": GPTNeoXConfig(
        **COMMON,
        use_parallel_residual=True,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    ),
    "gpt_oss": GptOssConfig(
        **_TWO_LAYERS,
        head_dim=8,
        sliding_window=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        rope_parameters={
            "rope_type": "yarn",
            "rope_theta": 10_000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "truncate": False,
        },
    ),
    "granite": GraniteConfig(
        **_TWO_LAYERS, attention_multiplier=0.2, logits_scaling=4.0, embedding_multiplier=3.0, residual_multiplier=0.5
    ),
    "mistral_window": MistralConfig(**_TWO_LAYERS, sliding_window=8, head_dim=8),
    "olmo2": Olmo2Config(**_TWO_LAYERS),
    "phi3": Phi3Config(**_TWO_LAYERS, sliding_window=None),
    "phi3_window": Phi3Config(**_TWO_LAYERS, sliding_window=8),
    "qwen2_window": Qwen2Config(**_TWO_LAYERS, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen3_moe": Qwen3MoeConfig(
        **_TWO_LAYERS, head_dim=8, num_experts=8, num_experts_per_tok=2, moe_intermediate_size=16
    ),
    "smollm3": SmolLM3Config(**_TWO_LAYERS, no_rope_layers=[1, 0]),
}


def tiny_model(
    name: str, dtype: torch.dtype = torch.float32, attention: str = "eager", **changes: int
) -> torch.nn.Module:
    """The same random model each time; initialised wide enough that its logits differ from token to token."""
    torch.manual_seed(11)
    config = copy.deepcopy((CONFIGS | FAMILIES)[name])
    config.update(changes)
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.fixture(autouse=True)
def one_thread_one_seed() -> Iterator[None]:
    """The same numbers each time. Threads of tiny models only wait for each other, badly so on a busy machine."""
    torch.manual_seed(0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=sorted(CONFIGS))
def model_name(request: pytest.FixtureRequest) -> str:
    """Every architecture in turn."""
    return request.param


@torch.inference_mode()
def plain_logits(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    """Logits of one unshared sequence by plain transformers. [T, V]."""
    device = next(model.parameters()).device
    return model(input_ids=torch.tensor([ids], device=device), use_cache=False).logits[0]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Policy and PRM of `engines` as folders."""
    from .engines import save_policy, save_prm  # which takes its models from here

    home = tmp_path_factory.mktemp("models")
    return save_policy(home / "policy"), save_prm(home / "prm")
