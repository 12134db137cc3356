"""Gated MLPs, and layers around them: which are replaced, and on a GPU the same outputs; see also `kernel_cases.py`."""

import copy

import pytest
import torch
from transformers import GemmaConfig, GemmaForCausalLM, LlamaConfig, LlamaForCausalLM

from ets_engine.config import EngineConfig
from ets_engine.runtime import Runner

pytest.importorskip("triton")
from ets_engine.attention.kernel import processors_of
from ets_engine.runtime.fused_layer import FusedLayer
from ets_engine.runtime.gated_linear import BLOCK_M, BLOCK_N, GatedMLP, gated_linear, join_gates

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(dtype: torch.dtype = torch.bfloat16, **others: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SIZES, **others})).to(dtype).eval()


def outputs_that_fill(device: torch.device) -> int:
    """As many as make one whole round of tiles, so that they are one launch."""
    return BLOCK_N * processors_of(device)


def test_every_mlp_is_replaced_once_and_keeps_its_weights():
    model = llama()
    before = {name: one.data_ptr() for name, one in model.named_parameters()}
    assert join_gates(model) == 2 and join_gates(model) == 0
    assert {name: one.data_ptr() for name, one in model.named_parameters()} == before
    assert all(isinstance(layer.mlp, GatedMLP) for layer in model.model.layers)


def test_what_computes_something_else_stays():
    gelu = GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=16)).to(torch.bfloat16)
    assert join_gates(gelu) == 0
    assert join_gates(llama(hidden_act="relu")) == 0 and join_gates(llama(hidden_act="gelu")) == 0
    assert join_gates(llama(mlp_bias=True)) == 0 and join_gates(llama(torch.float32)) == 0
    watched = llama()
    watched.model.layers[0].mlp.up_proj.register_forward_hook(lambda *_: None)
    watched.model.layers[1].mlp.register_forward_hook(lambda *_: None)
    assert join_gates(watched) == 0
    moved = llama()
    for layer in moved.model.layers:
        layer.mlp.forward = layer.mlp.forward  # as accelerate does
    assert join_gates(moved) == 0


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 16, BLOCK_M, BLOCK_M + 1, 700])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_a_gated_product_equals_plain_layers_on_a_gpu(rows, dtype, cuda):
    torch.manual_seed(0)
    for outputs, inputs in ((14336, 4096), (1000, 576), (outputs_that_fill(cuda), 576)):
        x = torch.randn(1, rows, inputs, device=cuda, dtype=dtype)
        gate, up = (torch.randn(outputs, inputs, device=cuda, dtype=dtype) / inputs**0.5 for _ in range(2))
        exact = torch.nn.functional.silu(x.double() @ gate.double().T) * (x.double() @ up.double().T)
        plain = torch.nn.functional.silu(x @ gate.T) * (x @ up.T)
        errors = [(one.double() - exact).abs().max().item() for one in (gated_linear(x, gate, up), plain)]
        assert errors[0] <= 2 * errors[1], errors


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_runner_on_a_gpu_gives_the_models_own_states(compiled, cuda):
    plain = llama(max_position_embeddings=256, intermediate_size=outputs_that_fill(cuda)).to(cuda)
    runner = Runner(copy.deepcopy(plain), EngineConfig(compile_layers=compiled, kv_pool_tokens=1024))
    assert sum(isinstance(one, GatedMLP) for one in runner.model.modules()) == 2
    assert sum(isinstance(one, FusedLayer) for one in runner.model.modules()) == 2
    ids = torch.randint(0, 64, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    root = runner.tree.root()
    found = [runner.extend([(root, ids[:140])]), *(runner.extend_last([(root, [one])]) for one in ids[140:])]
    with torch.inference_mode():
        expected = plain.model(torch.tensor([ids], device=cuda)).last_hidden_state[0]
    torch.testing.assert_close(torch.cat(found).float(), expected.float(), rtol=0, atol=0.1)
    runner.tree.release(root)
