"""Shapes of models and the floors under their decode steps, in bytes and operations; nothing is run.

`bench_search.py --roofline` prints the table of `roofline.md`.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from replay import MATH500, DecodeStep, Workload, decode_steps, grow
from transformers import AutoConfig, AutoModelForCausalLM

from ets_engine.config import Strategy

STRATEGIES: tuple[Strategy, ...] = ("rebase", "ets")
WIDTHS = (16, 64, 256)


@dataclass(frozen=True, slots=True)
class Shape:
    """A model's sizes (counts), and what is searched with it by default."""

    family: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    context_tokens: int = 131_072
    work: Workload = MATH500
    widths: tuple[int, ...] = WIDTHS

    @property
    def kv_numbers(self) -> int:
        """K and V of one token over all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim

    @property
    def read_weights(self) -> int:
        """Weights that a decode step multiplies by: all but an embedding table that is no head."""
        return num_parameters(self) - (0 if self.tied else self.vocabulary * self.hidden)


SHAPES = {
    "llama-3.2-1b": Shape("llama", 16, 2048, 8192, 32, 8, 64, 128_256, tied=True),
    "qwen2.5-7b": Shape("qwen2", 28, 3584, 18_944, 28, 4, 128, 152_064, tied=False),
    "llama-3.1-8b": Shape("llama", 32, 4096, 14_336, 32, 8, 128, 128_256, tied=False),
    "llemma-7b": Shape("llama", 32, 4096, 11_008, 32, 32, 128, 32_016, tied=False, context_tokens=4096),
    "reference": Shape("llama", 6, 192, 512, 6, 3, 32, 133, tied=True, work=Workload(30, 12, 28, 5), widths=(16, 64)),
    "toy": Shape("llama", 2, 64, 128, 4, 2, 16, 256, tied=True, work=Workload(24, 3, 8, 4), widths=(4, 8)),
}
REAL = ("llama-3.2-1b", "qwen2.5-7b", "llama-3.1-8b", "llemma-7b")  # the last one is the policy of the ETS paper


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine: bytes per second through memory, floating-point operations per second in a large matmul."""

    bytes_per_s: float
    flops_per_s: float


H200 = Speed(4.8e12, 989e12)  # as published: HBM3e bandwidth, dense bf16


def model_config(shape: Shape) -> Any:
    """The transformers config of a shape; no end of text, so that nothing ends early."""
    return AutoConfig.for_model(
        shape.family,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=shape.context_tokens,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )


@cache
def num_parameters(shape: Shape) -> int:
    """Of the model with its head, shared ones once; nothing is allocated."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(shape)).num_parameters()


def step_bytes(step: DecodeStep, shape: Shape, itemsize: int) -> int:
    """Weights once and every distinct KV token once."""
    return (shape.read_weights + step.read_tokens * shape.kv_numbers) * itemsize


def step_flops(step: DecodeStep, shape: Shape) -> int:
    """2 x weights x rows; attention, a few percent at these lengths, is left out."""
    return 2 * shape.read_weights * step.rows


def floor_s(step: DecodeStep, shape: Shape, itemsize: int, speed: Speed) -> float:
    """Seconds below which the step cannot go on a machine."""
    return max(step_bytes(step, shape, itemsize) / speed.bytes_per_s, step_flops(step, shape) / speed.flops_per_s)


def roofline(widths: Sequence[int], seed: int, speeds: dict[str, Speed]) -> str:
    """A Markdown table of the grown trees' decode steps in bf16: what one moves and multiplies on average, and floors.

    Args:
        widths: Of the searches.
        seed: Of the trees.
        speeds: Machines by name; each gets three columns.
    """
    heads = ["shape", "width", "tree", "rows", "KV tokens read", "GB", "TFLOP"]
    for name in speeds:
        heads += [f"{name}: memory ms", "matmul ms", "tokens/s <="]
    lines = [_markdown(heads), "|" + "---|" * len(heads)]
    trees = [(width, strategy, grow(strategy, width, MATH500, seed)) for width in widths for strategy in STRATEGIES]
    for shape_name in REAL:
        shape = SHAPES[shape_name]
        for width, strategy, replay in trees:
            steps = decode_steps(replay)
            rows, read = (statistics.mean(column) for column in list(zip(*steps, strict=True))[:2])
            moved = statistics.mean(step_bytes(step, shape, 2) for step in steps)
            flops = statistics.mean(step_flops(step, shape) for step in steps)
            cells = [shape_name, str(width), {"rebase": "REBASE", "ets": "ETS"}[strategy]]
            cells += [_short(number) for number in (rows, read, moved / 1e9, flops / 1e12)]
            for speed in speeds.values():
                total_s = sum(floor_s(step, shape, 2, speed) for step in steps)
                floors = 1e3 * moved / speed.bytes_per_s, 1e3 * flops / speed.flops_per_s
                cells += [_short(number) for number in (*floors, replay.generated_tokens / total_s)]
            lines.append(_markdown(cells))
    return "\n".join(lines)


def _markdown(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _short(number: float) -> str:
    """Three digits."""
    rounded = float(f"{number:.3g}")
    return f"{rounded:.0f}" if rounded >= 100 else f"{rounded:.3g}"
