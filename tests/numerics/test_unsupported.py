"""What tree attention cannot honour is refused at load, with the reason, and never runs."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    GptOssConfig,
    GraniteConfig,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForTokenClassification,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    NemotronConfig,
    Phi3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3MoeConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    XLNetConfig,
)

from ets_engine.errors import UnsupportedModelError
from ets_engine.runtime import Runner

from .conftest import COMMON, plain_logits, tiny_model

GQA = {**COMMON, "num_key_value_heads": 2}
REFUSED: list[tuple[PretrainedConfig, str]] = [
    (T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4), "encoder-decoder"),
    (MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4), "recurrent state"),
    (GptOssConfig(**GQA, head_dim=8, num_local_experts=2, num_experts_per_tok=1), "attention sinks"),
    (Gemma2Config(**GQA, head_dim=8), "soft-capped"),
    (Gemma3TextConfig(**GQA, head_dim=8, sliding_window=16), "sliding window of 16"),
    (MistralConfig(**GQA, sliding_window=16), "sliding window of 16"),
    (Qwen2Config(**GQA, use_sliding_window=True, sliding_window=16, max_window_layers=1), "sliding window of 16"),
    # this one tells its window to nobody but the mask
    (PhimoeConfig(**GQA, sliding_window=16, num_local_experts=4, num_experts_per_tok=2), "sliding window of 16"),
    (Llama4TextConfig(**GQA, head_dim=8, attention_chunk_size=16, num_local_experts=2), "chunked attention"),
    (DogeConfig(**GQA), "masks its scores in a way of its own"),
    (Qwen3NextConfig(**GQA, num_experts=4), "recurrent state"),
    (RecurrentGemmaConfig(**GQA, lru_width=32), "recurrent state"),
    (RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2), "recurrent state"),
    (MiniMaxConfig(**GQA, layer_types=["linear_attention", "full_attention", "full_attention"]), "another state"),
    (NemotronConfig(**GQA), "does not pass the forward's keyword arguments on"),
    (XLNetConfig(vocab_size=61, d_model=32, n_layer=2, n_head=4, d_inner=48), "attention code of its own"),
    (BertConfig(**COMMON), "not causal"),
    (BloomConfig(vocab_size=61, hidden_size=32, n_layer=2, n_head=4), "ALiBi"),
    (
        DeepseekV3Config(
            **COMMON,
            num_key_value_heads=4,
            q_lora_rank=8,
            kv_lora_rank=8,
            qk_rope_head_dim=4,
            qk_nope_head_dim=4,
            v_head_dim=8,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            num_experts_per_tok=2,
            moe_intermediate_size=16,
        ),
        "latent attention",
    ),
]
# Not on the list of models made for; they pass because nothing here is written for one model.
ACCEPTED: list[PretrainedConfig] = [
    GPT2Config(vocab_size=61, n_embd=32, n_layer=2, n_head=4, n_positions=256, pad_token_id=0),
    CohereConfig(**GQA, logit_scale=0.25),
    GraniteConfig(**GQA, logits_scaling=4.0, attention_multiplier=0.2),
    Phi3Config(**GQA, sliding_window=None),
    MistralConfig(**GQA, sliding_window=256),  # as long as the context
    JetMoeConfig(**GQA, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    Qwen3MoeConfig(**GQA, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
]


@pytest.mark.parametrize(("config", "reason"), REFUSED, ids=[config.model_type for config, _ in REFUSED])
def test_refused_with_the_reason(config: PretrainedConfig, reason: str) -> None:
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with pytest.raises(UnsupportedModelError, match=reason):
        Runner(auto.from_config(config))


@pytest.mark.parametrize("config", ACCEPTED, ids=[config.model_type for config in ACCEPTED])
def test_accepted_without_code_of_its_own(config: PretrainedConfig) -> None:
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    runner = Runner(model)
    prompt, ids = runner.tree.root(), list(range(3, 58))
    runner.extend([(prompt, ids)])
    leaf = runner.tree.fork(prompt)
    logits = runner.logits(runner.extend_last([(leaf, [9, 10])]))[0]
    model.set_attn_implementation("eager")
    assert (logits - plain_logits(model, [*ids, 9, 10])[-1]).abs().max() < 1e-4


def test_the_probe_catches_what_no_list_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that quietly changes its scores: here only its own eager attention knows of a factor 2."""
    model = tiny_model("llama")
    plain = type(model).forward
    monkeypatch.setattr(
        type(model),
        "forward",
        lambda self, *args, **kwargs: plain(self, *args, **kwargs | {"input_ids": kwargs["input_ids"].flip(1)}),
    )
    with pytest.raises(UnsupportedModelError, match="differs from its own eager attention"):
        Runner(model)


def test_a_model_whose_attention_is_switched_later_is_refused() -> None:
    model = tiny_model("llama")
    runner = Runner(model)
    model.set_attn_implementation("eager")
    with pytest.raises(UnsupportedModelError, match="0 of 3 layers"):
        runner.extend([(runner.tree.root(), [4, 5])])
    assert runner.tree.resident_tokens == 0


def test_a_token_classifier_is_the_same_primitive() -> None:
    torch.manual_seed(3)
    model = LlamaForTokenClassification(LlamaConfig(**GQA, num_labels=1)).eval()
    runner = Runner(model)
    prompt = runner.tree.root()
    runner.extend([(prompt, [5, 6, 7])])
    leaves = [runner.tree.fork(prompt) for _ in range(2)]
    scores = runner.logits(runner.extend([(leaves[0], [8, 9]), (leaves[1], [11])]))
    assert scores.shape == (3, 1)
    model.set_attn_implementation("eager")
    expected = torch.cat([plain_logits(model, [5, 6, 7, 8, 9])[-2:], plain_logits(model, [5, 6, 7, 11])[-1:]])
    assert (scores - expected).abs().max() < 1e-5
