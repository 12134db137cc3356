"""Heads of PRMs are the parts of an output layer that decide, in fp32."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ets_engine.errors import ModelLoadError
from ets_engine.models.readouts import mean_head, pair_head, probabilities

TINY = LlamaConfig(
    vocab_size=48,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
)


def with_head(head: torch.nn.Module) -> LlamaForCausalLM:
    model = LlamaForCausalLM(TINY)
    model.set_output_embeddings(head)
    return model


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_of_an_output_layer(dtype: torch.dtype, bias: bool) -> None:
    torch.manual_seed(0)
    whole = torch.nn.Linear(16, 48, bias=bias, dtype=dtype)
    model, hidden = with_head(whole), torch.randn(5, 16, dtype=dtype)
    logits = hidden.double() @ whole.weight.double().T + (whole.bias.double() if bias else 0.0)
    pair = pair_head(model, right=7, wrong=3)(hidden)
    assert pair.dtype == torch.float32
    torch.testing.assert_close(pair.double(), logits[:, [3, 7]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mean_head(model)(hidden).double(), logits.mean(-1, keepdim=True), rtol=1e-5, atol=1e-5)


def test_a_quantised_output_layer_is_refused() -> None:
    layer = torch.nn.Linear(16, 48, bias=False)
    layer.weight = torch.nn.Parameter(torch.zeros(48, 16, dtype=torch.int8), requires_grad=False)
    for make in (mean_head, lambda model: pair_head(model, 1, 2)):
        with pytest.raises(ModelLoadError, match="leave it out of the quantization"):
            make(with_head(layer))


def test_probabilities_by_hand() -> None:
    third = torch.tensor([[2.0, 2.0 - torch.log(torch.tensor(2.0))]])
    assert probabilities(third).tolist() == pytest.approx([1 / 3])
    assert probabilities(-third[:, 1:] + 2.0).tolist() == pytest.approx([2 / 3])
