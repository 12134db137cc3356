"""What tree attention cannot honour is refused at load, with the reason, and never runs."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    BertConfig,
    BloomConfig,
    Cohere2Config,
    CohereConfig,
    DeepseekV3Config,
    DogeConfig,
    Gemma3TextConfig,
    GPT2Config,
    JetMoeConfig,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForTokenClassification,
    MambaConfig,
    MiniMaxConfig,
    MistralConfig,
    NemotronConfig,
    Olmo3Config,
    PhimoeConfig,
    PretrainedConfig,
    Qwen3NextConfig,
    RecurrentGemmaConfig,
    RwkvConfig,
    T5Config,
    XLNetConfig,
    masking_utils,
)
from transformers.models.mistral import modeling_mistral

from ets_engine.errors import UnsupportedModelError
from ets_engine.kv import LayoutBuilder
from ets_engine.runtime import Runner
from ets_engine.runtime.hook import FAR, window_of

from .conftest import COMMON, plain_logits, tiny_model

GQA = {**COMMON, "num_key_value_heads": 2}
REFUSED: list[tuple[PretrainedConfig, str]] = [
    (T5Config(vocab_size=61, d_model=32, d_kv=8, d_ff=32, num_layers=2, num_heads=4), "encoder-decoder"),
    (MambaConfig(vocab_size=61, hidden_size=32, num_hidden_layers=2, state_size=4), "recurrent state"),
    # its config names a soft cap that no layer applies
    (Gemma3TextConfig(**GQA, head_dim=8, attn_logit_softcapping=50.0), "does not tell .* soft cap"),
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
    Cohere2Config(**GQA, sliding_window=16, layer_types=["sliding_attention", "full_attention", "full_attention"]),
    MistralConfig(**GQA, sliding_window=256),  # as long as the context
    JetMoeConfig(**GQA, kv_channels=8, num_local_experts=4, num_experts_per_tok=2),
    Olmo3Config(**GQA, sliding_window=16, layer_types=["sliding_attention", "full_attention", "full_attention"]),
    # this one tells its window to nobody but the mask
    PhimoeConfig(**GQA, sliding_window=16, num_local_experts=4, num_experts_per_tok=2),
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


def window_model(window: int) -> torch.nn.Module:
    """A Mistral whose windows the few tokens of the check at load would never reach."""
    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(MistralConfig(**GQA, sliding_window=window)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0.0, 0.2)
    return model


@pytest.mark.parametrize("error", [1, 1000], ids=["one_too_many", "forgotten"])
def test_a_wrong_window_is_caught_though_the_few_tokens_tried_lie_inside_it(
    error: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For they are tried once more with windows of two tokens."""
    usual = LayoutBuilder._through
    monkeypatch.setattr(LayoutBuilder, "_through", lambda self, window, *rest: usual(self, window + error, *rest))
    with pytest.raises(UnsupportedModelError, match="differs from its own eager attention"):
        Runner(window_model(100))


def test_trying_windows_leaves_the_config_as_it_was() -> None:
    runner = Runner(window_model(100))
    assert runner.model.config.sliding_window == 100 and runner._passes.windows == [100] * 3


def test_a_window_that_the_config_does_not_set_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing would try it on few tokens."""
    usual = modeling_mistral.create_sliding_window_causal_mask

    def of_its_own(config: PretrainedConfig, **others: object) -> object:
        own = copy.copy(config)
        own.sliding_window = 100
        return usual(config=own, **others)

    monkeypatch.setattr(modeling_mistral, "create_sliding_window_causal_mask", of_its_own)
    with pytest.raises(UnsupportedModelError, match=r"do not follow config\.sliding_window"):
        Runner(window_model(100))


def test_a_window_that_the_mask_does_not_have_is_refused() -> None:
    model = tiny_model("qwen2")
    model.model.layers[1].self_attn.sliding_window = 16
    with pytest.raises(UnsupportedModelError, match=r"layer 1 tells .* window of 16 tokens, but .* see all"):
        Runner(model)


@pytest.mark.parametrize(
    ("mask", "window"),
    [
        (masking_utils.causal_mask_function, FAR),
        (masking_utils.sliding_window_causal_mask_function(1), 1),
        (masking_utils.sliding_window_causal_mask_function(4096), 4096),
        (masking_utils.chunked_causal_mask_function(4096, torch.zeros(1, dtype=torch.long)), 0),
        (masking_utils.bidirectional_mask_function, 0),
        (masking_utils.sliding_window_bidirectional_mask_function(8), 0),
        (lambda batch, head, query, key: (key <= query) & (key % 2 == query % 2), 0),
        (lambda batch, head, query, key: (key <= query) & ((key > query - 8) | (key < 4)), 0),
    ],
    ids=["causal", "own_token", "window", "chunks", "all", "both_sides", "strided", "window_and_sink_tokens"],
)
def test_masks_are_tried_whether_they_are_windows(mask: Callable[..., torch.Tensor], window: int) -> None:
    assert window_of(mask, torch.device("cpu")) == window


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
