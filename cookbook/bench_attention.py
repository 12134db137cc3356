"""One decode step of tree attention, alone: the kernel against plain torch, and against attention that shares nothing.

A prompt and a tree of steps below it, one new token for every leaf, one layer. The sides:

    kernel   our Triton kernel; on a CUDA device only
    eager    our plain torch implementation of the same
    sdpa     `scaled_dot_product_attention` over K/V that is laid out once per leaf, prompt and all, where that fits
    flex     FlexAttention over the distinct tokens, with a mask of who sees what; on a CUDA device only
    cascade  FlashInfer's cascade attention, of as many levels and by whichever of its kernels is fastest (the row says
             which); on a CUDA device, where it is installed (`flashinfer_sides.py`)
    paged    FlashInfer's decode over pages that paths share, each read once per leaf; likewise

A step reads each distinct byte of K/V once at best, and multiplies each query with every token it sees. "of copy" is
distinct K/V bytes over seconds, next to what the same device copies (bytes read plus bytes written). "/ floor" is the
time over the larger of two: those bytes at the speed of the copy, and the arithmetic (4 x heads x head dimension x
tokens seen) at the speed of a large product; below one long prompt with many leaves it is the second that binds. Only
attention is timed: what a pass prepares once for all its layers is `plan_ms` in the row. On a GPU its L2 cache is
overwritten before each run.

    python cookbook/bench_attention.py                               # widths 16, 64, 256; prompts of 2k, 16k, 64k
    python cookbook/bench_attention.py --widths 64 --prompts 4096 --dtype float16
    python cookbook/bench_attention.py --shape toy --device cpu      # seconds; writes no row

Prints a table, then one JSON line, and appends that line to `results/bench_attention.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import warnings
from collections.abc import Callable, Hashable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from flashinfer_sides import flashinfer_sides
from torch.nn.functional import scaled_dot_product_attention

from ets_engine.attention import tree_attention
from ets_engine.attention.api import choose_implementation
from ets_engine.attention.reference import visible_slots
from ets_engine.evaluation.machine import copy_gb_s, matmul_flops_per_s, provenance
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row, TreeLayout

RESULTS = Path(__file__).parent / "results" / "bench_attention.jsonl"
L2_BYTES = 1 << 28  # more than any GPU's L2 cache holds
FANOUT = 4


@dataclass(frozen=True, slots=True)
class Shape:
    """Attention of one layer, and the steps of the tree; sizes are counts."""

    heads: int = 28
    kv_heads: int = 4
    head_dim: int = 128
    step_tokens: int = 64
    own_tokens: int = 32


SHAPES = {
    "qwen2.5-7b": Shape(),
    "llama3-8b": Shape(heads=32, kv_heads=8),
    "toy": Shape(heads=4, kv_heads=2, head_dim=32, step_tokens=4, own_tokens=3),
}


@dataclass(frozen=True, slots=True)
class Problem:
    """One decode step: queries, one layer's cache, who sees what, and where each leaf's whole path lies."""

    query: torch.Tensor  # [B, H, D]
    cache: torch.Tensor  # [S, 2, K, D]
    layout: TreeLayout  # on the CPU
    paths: torch.Tensor  # [B, N], slots; all paths are equally long

    @property
    def kv_bytes(self) -> int:
        """Distinct K/V that the step reads (bytes)."""
        return self.layout.distinct_tokens * self.cache[0].numel() * self.cache.element_size()

    @property
    def flops(self) -> int:
        """Of scores and of weighted sums of values, over every token that every query sees."""
        return 4 * self.query[0].numel() * self.paths.numel()


def build_problem(shape: Shape, width: int, prompt: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """A tree whose levels fork by four until there are `width` leaves, siblings side by side, and random numbers."""
    tree = PrefixTree(KVPool([LayerShape(1, 8)]))  # its slots are all that is used
    nodes = [tree.root()]
    tree.append(nodes[0], prompt)
    while len(nodes) < width:
        count = min(width, FANOUT * len(nodes))
        nodes = [tree.fork(nodes[i * len(nodes) // count]) for i in range(count)]
        for node in nodes:
            tree.append(node, shape.step_tokens)
    leaves = [tree.fork(node) for node in nodes]
    for leaf in leaves:
        tree.append(leaf, shape.own_tokens)
    rows = [Row(leaf, shape.own_tokens - 1, 1) for leaf in leaves]
    layout = LayoutBuilder(tree, min_saved_tokens=64).build(rows)
    generator = torch.Generator().manual_seed(width + prompt)
    query = torch.randn(width, shape.heads, shape.head_dim, generator=generator)
    size = (tree.pool.layers[0].shape[0], 2, shape.kv_heads, shape.head_dim)
    cache = torch.randn(size, generator=generator)
    paths = torch.tensor(visible_slots(layout))
    return Problem(query.to(device, dtype), cache.to(device, dtype), layout, paths)


def moved(layout: TreeLayout, device: torch.device) -> TreeLayout:
    """The layout on the device, for implementations that index there."""
    segments = tuple(
        replace(
            one,
            queries=None if one.queries is None else one.queries.to(device),
            slots=one.slots if isinstance(one.slots, slice) else one.slots.to(device),
        )
        for one in layout.segments
    )
    values = {one.name: getattr(layout, one.name) for one in fields(layout)}
    tensors = {name: value.to(device) for name, value in values.items() if isinstance(value, torch.Tensor)}
    return replace(layout, segments=segments, **tensors)


Side = Callable[[], torch.Tensor]  # [B, H, D]


def tree_side(problem: Problem, scale: float, implementation: Literal["eager", "triton"]) -> tuple[Side, float]:
    """Our attention, and the milliseconds that preparing a pass took."""
    device, works = problem.query.device, dict[Hashable, object]()
    layout = problem.layout if implementation == "triton" else moved(problem.layout, device)

    def run() -> torch.Tensor:
        return tree_attention(
            problem.query, problem.cache, layout, scale=scale, implementation=implementation, works=works
        )

    run()
    began_s = time.perf_counter()
    if implementation == "triton":
        works.clear()
        run()  # plans again, compiled by now
    return run, 1e3 * (time.perf_counter() - began_s)


def sdpa_side(problem: Problem, scale: float) -> Side | None:
    """Every leaf's whole path laid out by itself; None where that does not fit in half of what is free."""
    query, paths = problem.query, problem.paths.to(problem.query.device)
    needed = paths.numel() * problem.cache[0].numel() * problem.cache.element_size()
    free = torch.cuda.mem_get_info(query.device)[0] if query.device.type == "cuda" else 1 << 33
    if 2 * needed > free:  # gathered, then made contiguous
        return None
    keys, values = (problem.cache[:, i][paths].transpose(1, 2).contiguous() for i in range(2))  # [B, K, N, D]

    def run() -> torch.Tensor:
        return scaled_dot_product_attention(query[:, :, None], keys, values, scale=scale, enable_gqa=True)[:, :, 0]

    return run


def flex_side(problem: Problem, scale: float) -> Side:
    """FlexAttention over the distinct tokens; the mask is a table of who sees what."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    device = problem.query.device
    slots, place = problem.paths.unique(return_inverse=True)
    sees = torch.zeros(len(problem.paths), len(slots), dtype=torch.bool).scatter_(1, place, True).to(device)  # [B, U]
    keys, values = (problem.cache[slots.to(device), i].transpose(0, 1)[None].contiguous() for i in range(2))
    mask = create_block_mask(lambda b, h, query, slot: sees[query, slot], None, None, *sees.shape, device=str(device))
    query = problem.query.transpose(0, 1)[None].contiguous()  # [1, H, B, D]
    torch.compiler.reset()  # it gives up after a few shapes otherwise
    attend = torch.compile(flex_attention, dynamic=False) if device.type == "cuda" else flex_attention

    def run() -> torch.Tensor:
        return attend(query, keys, values, block_mask=mask, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return run


def median_ms(run: Side, device: torch.device, repeats: int) -> float:
    """Median milliseconds of some runs after a warm-up, each on a cold cache where the device is a GPU."""
    for _ in range(3):
        run()
    times: list[float] = []
    if device.type == "cuda":
        flush = torch.empty(L2_BYTES, dtype=torch.uint8, device=device)
        for _ in range(repeats):
            flush.zero_()
            began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(5_000_000)  # the host gets ahead, so that launches are not what is timed
            began.record()
            run()
            ended.record()
            ended.synchronize()
            times.append(began.elapsed_time(ended))
    else:
        for _ in range(repeats):
            began_s = time.perf_counter()
            run()
            times.append(1e3 * (time.perf_counter() - began_s))
    return statistics.median(times)


@torch.inference_mode()
def bench(problem: Problem, repeats: int, copy: float, matmul: float) -> dict[str, Any]:
    """Milliseconds of each side, how far it is from eager attention in fp32, and what follows from them.

    Args:
        problem: What every side computes.
        repeats: Timed runs of each side (count).
        copy: Speed of a large copy (bytes per second).
        matmul: Speed of a large product (floating-point operations per second).
    """
    device, query = problem.query.device, problem.query
    scale = query.shape[2] ** -0.5
    group = query.shape[1] // problem.cache.shape[2]
    sides: dict[str, Side | None] = {}
    plan_ms: dict[str, float] = {}
    cascade: dict[str, Any] | None = None
    if choose_implementation(device, query.dtype, head_dim=query.shape[2], group=group) == "triton":
        sides["kernel"], plan_ms["kernel"] = tree_side(problem, scale, "triton")
    sides["eager"], _ = tree_side(problem, scale, "eager")
    sides["sdpa"] = sdpa_side(problem, scale)
    if device.type == "cuda":
        try:
            sides["flex"] = flex_side(problem, scale)
            sides["flex"]()
        except (RuntimeError, NotImplementedError) as error:
            warnings.warn(f"FlexAttention does not run here: {error!r:.300}", stacklevel=1)
            sides["flex"] = None
    if device.type == "cuda" and query.dtype != torch.float32:
        time_ms = partial(median_ms, device=device, repeats=max(1, repeats // 4))
        planned = flashinfer_sides(query, problem.cache, problem.paths, scale, time_ms)
        sides |= {name: one and one.run for name, one in planned.items()}
        plan_ms |= {name: one.plan_ms for name, one in planned.items() if one}
        cascade = (one := planned["cascade"]) and {"levels": one.levels, "kernels": one.kernels}
    exact = tree_attention(
        query.float(), problem.cache.float(), moved(problem.layout, device), scale=scale, implementation="eager"
    )
    errors = {name: (run().float() - exact).abs().max().item() for name, run in sides.items() if run is not None}
    times = {name: median_ms(run, device, repeats) for name, run in sides.items() if run is not None}
    ours = times.get("kernel", times["eager"])
    floor_ms = 1e3 * max(problem.kv_bytes / copy, problem.flops / matmul)
    return {
        "width": len(query),
        "distinct_tokens": problem.layout.distinct_tokens,
        "path_tokens": problem.paths.shape[1],
        "kv_bytes": problem.kv_bytes,
        "ms": {name: round(times[name], 4) if name in times else None for name in sides},
        "max_error": {name: float(f"{error:.2g}") for name, error in errors.items()},
        "plan_ms": {name: round(one, 3) for name, one in plan_ms.items()},
        "cascade": cascade,
        "gb_s": round(problem.kv_bytes / ours / 1e6, 1),
        "of_copy": round(1e3 * problem.kv_bytes / ours / copy, 3),
        "floor_ms": float(f"{floor_ms:.3g}"),
        "over_floor": round(ours / floor_ms, 2),
        "speedup_over": {name: round(one / ours, 2) for name, one in times.items() if one is not ours},
    }


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="qwen2.5-7b", choices=sorted(SHAPES))
    parser.add_argument("--widths", type=int, nargs="+", help="leaves; default: 16 64 256")
    parser.add_argument("--prompts", type=int, nargs="+", help="tokens; default: 2048 16384 65536")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    toy = options.shape == "toy"
    shape, device = SHAPES[options.shape], torch.device(options.device)
    widths = options.widths or ((4, 8) if toy else (16, 64, 256))
    prompts = options.prompts or ((40,) if toy else (2048, 16384, 65536))
    dtype = getattr(torch, options.dtype)
    copy, matmul = 1e9 * copy_gb_s(options.device), matmul_flops_per_s(dtype, options.device)
    results: list[dict[str, Any]] = []
    names = ("kernel", "eager", "sdpa", "flex", "cascade", "paged")
    heads = "".join(f"{name + ' ms':>11}" for name in names)
    print(f"{'prompt':>8}{'width':>7}{heads}{'GB/s':>9}{'of copy':>9}{'/ floor':>9}")
    for prompt in prompts:
        for width in widths:
            problem = build_problem(shape, width, prompt, dtype, device)
            result = {"prompt": prompt, **bench(problem, options.repeats, copy, matmul)}
            results.append(result)
            cells = (result["ms"].get(name) for name in names)
            line = "".join(f"{'-' if cell is None else f'{cell:.3f}':>11}" for cell in cells)
            speeds = f"{result['gb_s']:9.1f}{result['of_copy']:9.1%}{result['over_floor']:9.2f}"
            print(f"{prompt:8}{width:7}{line}{speeds}")
    row: dict[str, object] = {
        "bench": "attention",
        "shape": options.shape,
        "sizes": asdict(shape),
        "dtype": options.dtype,
        "implementation": "kernel" if "kernel" in results[0]["ms"] else "eager",
        "copy_gb_s": round(copy / 1e9, 1),
        "matmul_gflop_s": round(matmul / 1e9),
        "results": results,
        **provenance(options.device),
    }
    print(json.dumps(row))
    if not toy:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
