"""Joint products against the layers that they replace."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from ets_engine.config import EngineConfig
from ets_engine.runtime import Runner
from ets_engine.runtime.joint_linear import NAMES, JointLinear, LinearPart, join_linears

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class Quantised(torch.Tensor):
    """Weights in a form of their own."""


def attention(bias: bool = False, dtype: torch.dtype = torch.float64) -> torch.nn.Module:
    torch.manual_seed(0)
    module = torch.nn.Module()
    for name, size in zip(NAMES, (8, 2, 4), strict=True):
        setattr(module, name, torch.nn.Linear(6, size, bias=bias, dtype=dtype))
    return module


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_parts_give_what_their_layers_gave(bias):
    apart = attention(bias)
    together = copy.deepcopy(apart)
    assert join_linears(together) == 1 and join_linears(together) == 0
    for _ in range(2):
        x = torch.randn(2, 5, 6, dtype=torch.float64)
        for name in NAMES:
            torch.testing.assert_close(getattr(together, name)(x), getattr(apart, name)(x))


def test_a_part_that_reads_something_else_is_multiplied_with_that():
    apart = attention()
    together = copy.deepcopy(apart)
    join_linears(together)
    x, other = torch.randn(2, 3, 6, dtype=torch.float64).unbind()
    for name, read in zip(NAMES, (x, other, x), strict=True):
        torch.testing.assert_close(getattr(together, name)(read), getattr(apart, name)(read))


def test_one_product_serves_three_parts_and_nothing_is_kept(monkeypatch):
    together = attention()
    join_linears(together)
    calls = []
    forward = JointLinear.forward
    monkeypatch.setattr(JointLinear, "forward", lambda self, x: calls.append(x) or forward(self, x))
    x = torch.randn(3, 6, dtype=torch.float64)
    for name in NAMES:
        getattr(together, name)(x)
    assert len(calls) == 1
    joint = together.q_proj.joint
    assert joint._read is None and joint._products == ()


def test_weights_count_once_and_a_copy_has_its_own():
    together = attention(bias=True)
    before = sum(one.numel() for one in together.parameters())
    join_linears(together)
    assert sum(one.numel() for one in together.parameters()) == before
    other = copy.deepcopy(together)
    assert other.v_proj.joint is other.q_proj.joint is not together.q_proj.joint


def test_layers_that_differ_or_are_watched_stay():
    half = attention()
    half.k_proj.half()
    hooked = attention()
    hooked.v_proj.register_forward_hook(lambda *_: None)
    mixed = attention()
    mixed.q_proj.bias = torch.nn.Parameter(torch.zeros(8, dtype=torch.float64))
    quantised = attention()
    quantised.q_proj.weight = torch.nn.Parameter(quantised.q_proj.weight.detach().as_subclass(Quantised))
    unknown = attention()
    unknown.k_proj = torch.nn.Identity()
    replaced = attention()
    replaced.k_proj.forward = replaced.k_proj.forward
    for module in (half, hooked, mixed, quantised, unknown, replaced):
        assert join_linears(module) == 0 and not isinstance(module.q_proj, LinearPart)


@pytest.mark.parametrize(
    "kind", [(LlamaConfig, LlamaForCausalLM), (Qwen2Config, Qwen2ForCausalLM)], ids=["llama", "qwen2"]
)
def test_a_model_over_the_tree_reads_the_same(kind):
    config, make = kind
    torch.manual_seed(0)
    apart = make(config(**SIZES)).eval()
    together = copy.deepcopy(apart)
    assert join_linears(together) == 3
    states = []
    for model in (apart, together):
        runner = Runner(model)
        prompt = runner.tree.root()
        runner.extend([(prompt, [3, 1, 4, 1, 5])])
        leaves = [runner.tree.fork(prompt) for _ in range(3)]
        states.append(runner.extend([(leaf, [one, 9]) for one, leaf in enumerate(leaves)]))
    torch.testing.assert_close(*states)


@pytest.mark.gpu
def test_a_runner_on_a_gpu_joins_them():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**SIZES)).eval().to("cuda", torch.bfloat16)
    runner = Runner(model, EngineConfig(compile_layers=True))
    assert all(isinstance(layer.self_attn.v_proj, LinearPart) for layer in runner.model.model.layers)
    states = runner.extend([(runner.tree.root(), [3, 1, 4])])
    assert states.isfinite().all()
