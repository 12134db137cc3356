"""Gate and up of an MLP and the product of both in one launch of Triton, for the few rows of a decode pass.

The two read the same rows, and what they give is only ever multiplied: `silu(x @ gate.T) * (x @ up.T)`. Apart they are
three launches that write and read both. In the shape of Llama-3.1-8B, 96 to 128 rows, an H100 takes 90 us for the one
launch and 96 to 99 for the three (`cookbook/roofline.md`). They stay apart, and only the product is a launch of ours,
where that is as fast or faster: for more rows than one tile holds, and for a last round of tiles that leaves many
multiprocessors idle. Inference only.
"""

from __future__ import annotations

import math
from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from ets_engine.attention.kernel import processors_of, shared_bytes_of, starts_early
from ets_engine.runtime.joint_linear import is_hooked, is_plain

DTYPES = (torch.float16, torch.bfloat16)
BLOCK_M = 128  # rows of the only tile
BLOCK_N = 64  # outputs of a tile
BLOCK_K = 64  # inputs at a time
NUM_WARPS = 8
MOST_STAGES = 5  # of the pipeline, timed on an H100
STAGE_BYTES = 2 * BLOCK_K * (BLOCK_M + 2 * BLOCK_N)  # of shared memory
LEAST_FULL = 0.8  # of all rounds of tiles
MULTIPLIED_AT_ONCE = 1024  # numbers


class GatedMLP(torch.nn.Module):
    """An MLP of which gate and up are multiplied at once; its weights are those of the MLP in whose place it is."""

    def __init__(self, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear) -> None:
        """Take the layers of an MLP, all without a bias."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = gate, up, down

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> [..., hidden]."""
        return self.down_proj(gated_linear(input, self.gate_proj.weight, self.up_proj.weight))


def join_gates(model: torch.nn.Module) -> int:
    """Put a `GatedMLP` in the place of every MLP that computes the same; weights are the same tensors.

    An MLP is one by the names of its layers, and by what it gives for a few random rows. Layers of another class than
    `torch.nn.Linear` (quantised ones, adapters), with hooks or with a bias, and MLPs in fp32 stay as they are.

    Returns:
        MLPs replaced (count).
    """
    joined = 0
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if (layers := _layers(module)) is not None and _is_gated(module, *layers):
                setattr(parent, name, GatedMLP(*layers))
                joined += 1
    return joined


@torch.library.custom_op("ets_engine::gated_linear", mutates_args=())
def gated_linear(input: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As `multiply_gated`, for a compiler."""
    return multiply_gated(input, gate, up)


@gated_linear.register_fake
def _(input: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    return input.new_empty((*input.shape[:-1], gate.shape[0]))


def multiply_gated(input: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`silu(input @ gate.T) * (input @ up.T)` on a GPU or in Triton's interpreter; sums and the product are fp32.

    Args:
        input: fp16 or bf16. Shape [..., K].
        gate: Contiguous, of the same dtype. Shape [N, K].
        up: The same.

    Returns:
        Shape [..., N].
    """
    outputs, inputs = gate.shape
    rows = input.reshape(-1, inputs).contiguous()
    with torch.cuda.device(input.device) if input.device.type == "cuda" else nullcontext():
        if len(rows) <= BLOCK_M and inputs % BLOCK_K == 0 and fills(outputs, processors_of(input.device)):
            output = rows.new_empty((len(rows), outputs))
            _multiply_gated[(outputs // BLOCK_N,)](
                rows,
                gate,
                up,
                output,
                len(rows),
                outputs,
                inputs,
                BLOCK_M=BLOCK_M,
                BLOCK_N=BLOCK_N,
                BLOCK_K=BLOCK_K,
                num_warps=NUM_WARPS,
                num_stages=num_stages(shared_bytes_of(input.device)),
                **starts_early(input.device),
            )
        else:
            output, other = torch.nn.functional.linear(rows, gate), torch.nn.functional.linear(rows, up)
            grid = (-(-output.numel() // MULTIPLIED_AT_ONCE),)
            _gate[grid](output, other, output.numel(), BLOCK=MULTIPLIED_AT_ONCE, **starts_early(input.device))
    return output.view(*input.shape[:-1], outputs)


def fills(outputs: int, processors: int) -> bool:
    """Whether tiles of so many outputs keep a GPU of so many multiprocessors, one tile each, at work to the end.

    Example:
        >>> [fills(outputs, processors=132) for outputs in (14336, 8192, 18944, 11008, 8200)]
        [True, True, False, False, False]
    """
    tiles, rest = divmod(outputs, BLOCK_N)
    return rest == 0 and tiles >= LEAST_FULL * processors * -(-tiles // processors)


def num_stages(shared_bytes: int) -> int:
    """Stages of the pipeline that so much shared memory holds (count)."""
    return min(MOST_STAGES, shared_bytes // STAGE_BYTES)


def _layers(module: torch.nn.Module) -> tuple[torch.nn.Linear, torch.nn.Linear, torch.nn.Linear] | None:
    """Gate, up and down of what may be an MLP, None = it is none that could be replaced."""
    gate, up, down = (getattr(module, name, None) for name in ("gate_proj", "up_proj", "down_proj"))
    if not (is_plain(gate) and is_plain(up) and is_plain(down)) or isinstance(module, GatedMLP):
        return None
    if any(one.bias is not None or one.weight.dtype not in DTYPES for one in (gate, up, down)):
        return None
    if gate.weight.shape != up.weight.shape or is_hooked(module):
        return None
    return gate, up, down


@torch.inference_mode()
def _is_gated(module: torch.nn.Module, gate: torch.nn.Linear, up: torch.nn.Linear, down: torch.nn.Linear) -> bool:
    rows = torch.randn(1, 8, gate.in_features, generator=torch.Generator().manual_seed(0)).to(gate.weight)
    rows *= 3 / gate(rows).float().std()  # where activations differ
    try:
        found = module(rows)
    except TypeError:  # it takes more than rows
        return False
    expected = down(torch.nn.functional.silu(gate(rows)) * up(rows))
    if not isinstance(found, torch.Tensor) or found.shape != expected.shape:
        return False
    largest = float(expected.abs().max())
    return math.isfinite(largest) and torch.allclose(found, expected, rtol=0, atol=1e-2 * largest)


@triton.jit
def _multiply_gated(
    rows,  # [M, K]
    gate,  # [N, K]
    up,  # [N, K]
    output,  # [M, N]
    num_rows,
    outputs,
    inputs,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EARLY: tl.constexpr,
):
    row, step = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_K)
    column = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    exists = (row < num_rows)[:, None]
    read = rows + row[:, None] * inputs + step[None, :]
    weight = column[:, None] * inputs + step[None, :]
    gates = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    ups = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    for start in range(0, inputs, BLOCK_K):
        x = tl.load(read + start, mask=exists, other=0.0)
        gates = tl.dot(x, tl.trans(tl.load(gate + weight + start)), gates)
        ups = tl.dot(x, tl.trans(tl.load(up + weight + start)), ups)
    product = gates / (1.0 + tl.exp(-gates)) * ups
    place = output + row.to(tl.int64)[:, None] * outputs + column[None, :]
    tl.store(place, product.to(output.dtype.element_ty), mask=exists)


@triton.jit
def _gate(
    gates,  # [N], becomes silu(gates) * ups
    ups,  # [N]
    count,
    BLOCK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gates + place, mask=place < count, other=0.0).to(tl.float32)
    up = tl.load(ups + place, mask=place < count, other=0.0).to(tl.float32)
    product = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(gates + place, product.to(gates.dtype.element_ty), mask=place < count)
