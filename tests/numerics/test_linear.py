"""The faster linear layers of a CPU compute what torch's own do."""

from __future__ import annotations

import copy

import pytest
import torch

from ets_engine.runtime.linear import OneDnnLinear, WideningLinear, speed_up_linears

x86 = pytest.mark.skipif(not torch.backends.cpu.get_cpu_capability().startswith("AVX"), reason="needs an x86 CPU")


@torch.inference_mode()
def errors(layer: torch.nn.Linear, faster: torch.nn.Linear, inputs: torch.Tensor) -> tuple[float, float]:
    """Largest error of torch's own layer and of ours, against fp64."""
    bias = None if layer.bias is None else layer.bias.double()
    exact = torch.nn.functional.linear(inputs.double(), layer.weight.double(), bias)
    plain, ours = layer(inputs), faster(inputs)
    assert ours.shape == plain.shape and ours.dtype == plain.dtype
    return float((plain.double() - exact).abs().max()), float((ours.double() - exact).abs().max())


@pytest.mark.parametrize("rows", [1, 3, 4, 70])
@pytest.mark.parametrize("bias", [False, True])
def test_widened_layers_are_at_least_as_exact(rows: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ets_engine.runtime.linear._BLOCK_WEIGHTS", 96 * 20)  # several blocks, the last one short
    layer = torch.nn.Linear(96, 130, bias=bias, dtype=torch.bfloat16)
    faster = copy.deepcopy(layer)
    faster.__class__ = WideningLinear
    plain_error, error = errors(layer, faster, torch.randn(2, rows, 96, dtype=torch.bfloat16)[:1])
    assert error <= plain_error * 1.01 + 1e-6


@x86
@pytest.mark.parametrize("packed_bytes", [0, 1 << 29], ids=["as they are", "laid out"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_faster_layers_err_no_more(
    dtype: torch.dtype, bias: bool, packed_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ets_engine.runtime.linear._PACKED_BYTES", packed_bytes)
    monkeypatch.setattr("ets_engine.runtime.linear._MIN_PRODUCTS", 96 * 130 * 3)
    layer = torch.nn.Linear(96, 130, bias=bias, dtype=dtype)
    faster = copy.deepcopy(layer)
    assert speed_up_linears(faster) == 1 and speed_up_linears(faster) == 0
    for shape in ((1, 96), (2, 1, 96), (3, 96), (1, 70, 96), (7, 5, 96)):
        inputs = torch.randn(shape, dtype=dtype)
        for one in (inputs, inputs.transpose(0, -2)):  # also when it is not contiguous
            plain_error, error = errors(layer, faster, one)
            assert error <= 1.5 * plain_error + 1e-6


@x86
@torch.inference_mode()
def test_a_compiler_sees_the_plain_layer() -> None:
    """It has no product over weights that are laid out, and fails on one."""
    layer = torch.nn.Linear(512, 512)
    inputs = torch.randn(8, 512)
    plain = layer(inputs)
    assert speed_up_linears(layer) == 1
    seen: list[str] = []

    def look(module: torch.fx.GraphModule, _: list[torch.Tensor]) -> torch.fx.GraphModule:
        seen.append(module.code)
        return module

    compiled = torch.compile(layer, backend=look)
    assert torch.equal(compiled(inputs), plain) and len(seen) == 1 and "mkldnn" not in seen[0]


def test_what_cannot_be_faster_stays_as_it_is() -> None:
    class Own(torch.nn.Linear):
        """Computes something else."""

    class Quantised(torch.Tensor):
        """Weights in a form of their own."""

    quantised = torch.nn.Linear(4, 4)
    quantised.weight = torch.nn.Parameter(quantised.weight.detach().as_subclass(Quantised))
    model = torch.nn.Sequential(
        Own(4, 4), torch.nn.Linear(4, 4, dtype=torch.float64), torch.nn.Conv1d(4, 4, 1), quantised
    )
    assert speed_up_linears(model) == 0
    assert not any(isinstance(module, (OneDnnLinear, WideningLinear)) for module in model)
