"""Sizes of known models are those of their published configs."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, PretrainedConfig, Qwen2Config, Qwen3Config

from ets_engine.catalog import KNOWN_MODELS, KnownModel, find_known
from ets_engine.models.presets import find_preset

QWEN_7B = Qwen2Config(
    vocab_size=152064,
    hidden_size=3584,
    intermediate_size=18944,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    tie_word_embeddings=False,
)
QWEN_1_5B: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 1536,
    "intermediate_size": 8960,
    "num_hidden_layers": 28,
    "num_attention_heads": 12,
    "num_key_value_heads": 2,
}
LLAMA: dict[str, Any] = {"vocab_size": 128256, "num_key_value_heads": 8}
QWEN3: dict[str, Any] = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128}
CONFIGS: dict[str, PretrainedConfig] = {
    "Qwen/Qwen2.5-Math-1.5B-Instruct": Qwen2Config(**QWEN_1_5B, tie_word_embeddings=True),
    "Qwen/Qwen2.5-Math-7B-Instruct": QWEN_7B,
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B": Qwen2Config(**QWEN_1_5B, tie_word_embeddings=False),
    "deepseek-ai/DeepSeek-R1-Distill-Qwen-7B": QWEN_7B,
    "Qwen/Qwen3-1.7B": Qwen3Config(
        **QWEN3,
        hidden_size=2048,
        intermediate_size=6144,
        num_hidden_layers=28,
        num_attention_heads=16,
        tie_word_embeddings=True,
    ),
    "Qwen/Qwen3-8B": Qwen3Config(
        **QWEN3,
        hidden_size=4096,
        intermediate_size=12288,
        num_hidden_layers=36,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "meta-llama/Llama-3.2-1B-Instruct": LlamaConfig(
        **LLAMA,
        hidden_size=2048,
        intermediate_size=8192,
        num_hidden_layers=16,
        num_attention_heads=32,
        head_dim=64,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.2-3B-Instruct": LlamaConfig(
        **LLAMA,
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        head_dim=128,
        tie_word_embeddings=True,
    ),
    "meta-llama/Llama-3.1-8B-Instruct": LlamaConfig(
        **LLAMA,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        tie_word_embeddings=False,
    ),
    "peiyi9979/math-shepherd-mistral-7b-prm": MistralConfig(
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
    ),
    "tkitsers/Llemma-reward-model": LlamaConfig(
        vocab_size=32016,
        hidden_size=4096,
        intermediate_size=11008,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=32,
    ),
}


@pytest.mark.parametrize("name", sorted(CONFIGS))
def test_sizes_are_those_of_the_published_config(name: str) -> None:
    config, known = CONFIGS[name], find_known(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    assert (known.parameters, known.layers) == (model.num_parameters(), config.num_hidden_layers)
    assert (known.kv_heads, known.head_dim) == (config.num_key_value_heads, head_dim)


def test_a_prm_is_its_base_model_and_a_head() -> None:
    with torch.device("meta"):
        body = AutoModelForCausalLM.from_config(QWEN_7B).model.num_parameters()
    heads = {
        "Qwen/Qwen2.5-Math-PRM-7B": 3584 * 3584 + 3584 + 2 * 3584 + 2,
        "HuggingFaceH4/Qwen2.5-Math-7B-Instruct-PRM-0.2": 2 * 3584 + 2,
        "Skywork/Skywork-o1-Open-PRM-Qwen-2.5-7B": 3584 * 152064 + 3584 + 1,
    }
    assert {name: find_known(name).parameters for name in heads} == {name: body + head for name, head in heads.items()}


def test_names_are_listed_once() -> None:
    assert len({model.name for model in KNOWN_MODELS}) == len(KNOWN_MODELS)


def test_kv_by_hand() -> None:
    model = KnownModel("m", "policy", "plain", 10, layers=2, kv_heads=3, head_dim=4, context_tokens=8)
    assert (model.weight_bytes, model.token_bytes) == (20, 96)
    assert model.kv_bytes(width=4, path_tokens=100) == 4 * 100 * 96
    assert model.kv_bytes(width=4, path_tokens=100, sharing_ratio=2.5) == 160 * 96


@pytest.mark.parametrize("name", [model.name for model in KNOWN_MODELS if model.role == "policy"])
def test_a_policy_gets_the_preset_that_is_listed(name: str) -> None:
    tokenizer = SimpleNamespace(chat_template="<|start_header_id|>" if "Llama-3" in name else "<|im_start|>")
    assert find_preset("auto", name, tokenizer).name == find_known(name).format
