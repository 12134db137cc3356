"""Linear layers on an x86 CPU, faster than torch's own; inference only, weights and results keep their dtype.

* With instructions for the dtype: oneDNN on weights laid out for it once. Torch lays bf16 weights out anew on every
  call, and leaves fp32 to MKL, which runs at half speed on AMD's AVX-512. On one Zen 5 core, 768 x 3072 weights: fp32
  64 rows 1.3 instead of 3.2 ms, 4 rows 0.11 instead of 0.36 ms; bf16 64 rows 0.61 instead of 0.69 ms, 4 rows 0.08
  instead of 0.15 ms. With AVX2 alone, fp32 gains 1.2 and 1.8 times.
* bf16 or fp16 without such instructions: weights widened to fp32 block by block. Torch falls back to a slow product
  there. Widening a block that stays in cache and multiplying in fp32 costs no memory and is at least as exact. On one
  AVX2 core, 3072 x 768 weights in bf16: 64 rows 4.8 instead of 31 ms, 8 rows 1.7 instead of 4.3 ms, 4 rows 1.5
  instead of 1.9 ms; below that torch's own is faster.
"""

from __future__ import annotations

import torch

_PACKED_BYTES = 1 << 29  # the laid-out weights are a copy; a model with more weights runs oneDNN on them as they are
_MIN_PRODUCTS = 1 << 20  # smaller fp32 products are done before oneDNN has set out (10 us a call)
_BLOCK_WEIGHTS = 1 << 20  # 4 MB in fp32; 256 rows of 768 are slower (more calls), 4096 rows too (out of cache)
_MIN_ROWS = 4


class OneDnnLinear(torch.nn.Linear):
    """`torch.nn.Linear` multiplied by oneDNN; `laid_out` holds the weights in its layout, or as they are."""

    laid_out: torch.Tensor

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        if torch.compiler.is_compiling():  # the compiler lays weights out itself, and knows no product over such ones
            return super().forward(input)
        if input.numel() * self.out_features < _MIN_PRODUCTS and input.dtype == torch.float32:
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.laid_out, self.bias, "none", [], "")


class WideningLinear(torch.nn.Linear):
    """`torch.nn.Linear` whose product runs in fp32; weights, input and output keep their dtype."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., in] -> [..., out]."""
        rows = input.reshape(-1, self.in_features)
        if len(rows) < _MIN_ROWS:
            return super().forward(input)
        wide = rows.float()
        output = torch.empty((len(rows), self.out_features), dtype=input.dtype)
        block = max(1, _BLOCK_WEIGHTS // self.in_features)
        for first in range(0, self.out_features, block):
            part = slice(first, first + block)
            product = wide @ self.weight[part].float().t()
            output[:, part] = product if self.bias is None else product + self.bias[part]
        return output.view(*input.shape[:-1], self.out_features)


def speed_up_linears(model: torch.nn.Module) -> int:
    """Change a model's linear layers on an x86 CPU to the faster ones; its weights must not change any more.

    Returns:
        Layers changed (count); 0 on another device, or where torch comes without oneDNN.
    """
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return 0
    fast = {
        torch.float32: True,
        torch.bfloat16: torch.ops.mkldnn._is_mkldnn_bf16_supported(),
        torch.float16: torch.ops.mkldnn._is_mkldnn_fp16_supported(),
    }
    linears = [
        module
        for module in model.modules()
        if type(module) is torch.nn.Linear
        and type(module.weight) is torch.nn.Parameter  # not a class of its own, as quantised weights are
        and module.weight.device.type == "cpu"
        and module.weight.dtype in fast
    ]
    copied = sum(module.weight.nbytes for module in linears) <= _PACKED_BYTES
    for module in linears:
        if fast[module.weight.dtype]:
            module.__class__ = OneDnnLinear
            weight = module.weight.detach()
            module.laid_out = torch.ops.mkldnn._reorder_linear_weight(weight) if copied else weight
        else:
            module.__class__ = WideningLinear
    return len(linears)
