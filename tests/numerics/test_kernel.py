"""The Triton kernel: its logic in the interpreter, its launches as far as a compiler can tell, the rest on a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from ets_engine.attention import tree_attention
from ets_engine.attention.api import choose_implementation
from ets_engine.attention.work import WorkList, plan_work
from ets_engine.kv import LayoutBuilder, Row

from . import kernel_cases
from .kernel_cases import LARGE, Case, check, grow

CASES = Path(kernel_cases.__file__)


def run(code: list[str], **environment: str) -> str:
    """A Python process's output; fails with it."""
    usual = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, *code],
        capture_output=True,
        text=True,
        cwd=CASES.parents[2],
        env={**usual, "OMP_NUM_THREADS": "1", **environment},
        check=False,
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-5000:]
    return done.stdout


def test_the_kernel_equals_the_specification_in_the_interpreter() -> None:
    """In a process of its own: Triton must find the variable when it is first imported, and others import it too."""
    found = pytest.importorskip("triton").__version__
    if not found.startswith("3.6."):
        pytest.skip(f"the interpreter of triton 3.6 is known to run the kernel, {found} has another")
    options = ["-q", "--noconftest", "-p", "no:cacheprovider", "-p", "no:xdist"]
    output = run(["-m", "pytest", *options, str(CASES)], TRITON_INTERPRET="1")
    assert f"{len(kernel_cases.SMALL) + 14} passed" in output


def test_importing_attention_loads_no_compiler() -> None:
    run(["-c", "import ets_engine.attention.api, ets_engine.attention.work, sys; assert 'triton' not in sys.modules"])


COMPILE = """
import re
from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from ets_engine.attention import kernel
from ets_engine.runtime import draw_kernel, gated_linear, layer_kernel

def compiled(function, types, numbers, how, capability):
    constants = {name: numbers.get(name) for name in function.arg_names if name not in types}
    signature = {name: types.get(name, "constexpr") for name in function.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
    source = ASTSource(function, signature, constants, aligned)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=how)

lists = {name: "*i32" for name in ("tiles", "entries", "slots", "merges")}
partials = {"partial": "*fp32", "lse": "*fp32"}
for dtype, size, dim, height, capability, shared_kb, extras in (
    ("bf16", 2, 128, 128, 90, 227, {}),
    ("bf16", 2, 128, 64, 90, 227, {}),
    ("bf16", 2, 128, 16, 90, 227, {}),
    ("fp16", 2, 80, 16, 80, 163, {"sinks": "*fp16", "softcap": "fp32"}),
    ("fp32", 4, 128, 32, 89, 99, {}),
):
    block_d = 1 << (dim - 1).bit_length()
    numbers = {"KV_HEADS": 4, "GROUP": 7, "HEADS": 28, "DIM": dim, "BLOCK_D": block_d}
    how = kernel.launch(height, block_d, size, shared_kb << 10)
    numbers |= {"BLOCK_M": height, "BLOCK_N": how.block_n, "AHEAD": how.ahead}
    numbers |= {"BLOCK_H": 2, "BLOCK_P": kernel.MERGED_AT_ONCE, "EARLY": capability >= 90}
    early = {"EARLY": capability >= 90}
    types = {name: "*" + dtype for name in ("query", "cache", "output")} | partials | lists | extras
    for function in (kernel._attend, kernel._merge):
        plain = {"scale": "fp32", "token_stride": "i32", "head_stride": "i32"}
        mine = {name: kind for name, kind in (types | plain).items() if name in function.arg_names}
        options = {"num_warps": how.num_warps, "num_stages": how.num_stages}
        result = compiled(function, mine, numbers, options, capability)
        assert result.asm["cubin"] and result.metadata.shared <= shared_kb << 10, (function, dtype, result.metadata)
        if function is kernel._attend and capability == 90:
            assert result.metadata.shared * how.at_once <= shared_kb << 10, (how, result.metadata)
            loop = re.search(r"scf[.]for.*scf[.]yield", result.asm["ttgir"], re.DOTALL).group()
            left = [int(groups) for groups in re.findall(r"ttg[.]async_wait.*?num = (\\d+)", loop)]
            assert left and min(left) > 0, f"the loop waits for all that it has asked for: {left}"
    strides = {f"{name}_{kind}_stride": "i32" for name in ("key", "value") for kind in ("token", "head")}
    types = {name: "*" + dtype for name in ("cache", "keys", "values")} | {"slots": "*i32"} | strides
    assert compiled(kernel._store, types, numbers | {"BLOCK_K": 4}, {}, capability).asm["cubin"]
    if size == 2:
        types = {name: "*" + dtype for name in ("rows", "gate", "up", "output")}
        types |= {name: "i32" for name in ("num_rows", "outputs", "inputs")}
        blocks = {name: getattr(gated_linear, name) for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")} | early
        options = {"num_warps": 8, "num_stages": gated_linear.num_stages(shared_kb << 10)}
        result = compiled(gated_linear._multiply_gated, types, blocks, options, capability)
        assert result.asm["cubin"] and result.metadata.shared <= shared_kb << 10, result.metadata
        types = {"gates": "*" + dtype, "ups": "*" + dtype, "count": "i32"}
        assert compiled(gated_linear._gate, types, early | {"BLOCK": 1024}, {}, capability).asm["cubin"]
        types = {name: "*" + dtype for name in ("states", "added", "weight", "summed", "normed")}
        types |= {"width": "i32", "eps": "fp32"}
        for added in ({"added": types["added"]}, {}):
            mine = {name: kind for name, kind in types.items() if name != "added"} | added
            sizes = {"BLOCK": 4096} | early
            options = {"num_warps": layer_kernel.NORM_WARPS}
            assert compiled(layer_kernel._add_norm, mine, sizes, options, capability).asm["cubin"]
        types = {name: "*" + dtype for name in ("cache", "products", "cos", "sin", "query")} | {"slots": "*i32"}
        types |= {f"{name}_stride": "i32" for name in ("product", "cos", "sin")}
        sizes = {"KV_HEADS": 8, "GROUP": 4, "HALF": dim // 2, "BLOCK_G": 8, "BLOCK_H": block_d // 2} | early
        for norms in ({}, {"query_scales": "*" + dtype, "key_scales": "*" + dtype, "eps": "fp32"}):
            result = compiled(layer_kernel._rotate_and_store, types | norms, sizes, {"num_warps": 1}, capability)
            assert result.asm["cubin"] and not re.search(r"[.]local", result.asm["ptx"])
    types = {name: "*fp32" for name in ("temperatures", "tops", "sums", "tempered")} | {"logits": "*" + dtype}
    types |= {name: "i32" for name in ("row_stride", "vocabulary", "count")}
    assert compiled(draw_kernel._sum_blocks, types, {"BLOCK": 256, "BLOCKS_AT_ONCE": 8}, {}, capability).asm["cubin"]
    kept = {"cuts": "*fp64", "least": "*fp32"}
    for blocks in (1, 512):  # of vocabularies of up to 256 and 131,072 tokens
        sizes = {"BLOCK": 256, "BLOCKS": blocks, "BLOCKS_AT_ONCE": 8, "AT_ONCE": draw_kernel.SEARCHED_AT_ONCE}
        result = compiled(draw_kernel._find_least, types | kept, sizes, {"num_warps": 16}, capability)
        assert result.asm["cubin"] and not re.search(r"[.]local", result.asm["ptx"])
        assert compiled(draw_kernel._sum_kept, types | kept, sizes, {}, capability).asm["cubin"]
        chosen = {"draws": "*fp64", "tokens": "*i64", "logprobs": "*fp32"}
        for cuts in ({}, kept):
            assert compiled(draw_kernel._choose, types | chosen | cuts, sizes, {}, capability).asm["cubin"]
"""


def test_the_kernel_compiles_for_gpus_that_are_not_here(tmp_path: Path) -> None:
    """Down to machine code, for an H100, an A100 and a small Ada: it fits their shared memory."""
    pytest.importorskip("triton")
    run(["-c", COMPILE], TRITON_CACHE_DIR=str(tmp_path))


def test_auto_is_eager_where_no_gpu_is() -> None:
    for dtype in (torch.bfloat16, torch.float64):
        assert choose_implementation(torch.device("cpu"), dtype, head_dim=64, group=1) == "eager"


def test_the_kernel_says_what_it_cannot_do() -> None:
    pytest.importorskip("triton")
    tree, _, rows = grow(Case(dim=16), 0)
    layout = LayoutBuilder(tree).build(rows)
    cache = tree.pool.layers[0]
    with pytest.raises(ValueError, match="CUDA device, the query is on cpu; use implementation='eager'"):
        tree_attention(torch.zeros(3, 1, 16), cache, layout, scale=1.0, implementation="triton")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LARGE)
def test_the_kernel_equals_the_specification_on_a_gpu(name: str, cuda: torch.device) -> None:
    check(LARGE[name], cuda)


@pytest.mark.gpu
def test_auto_is_the_kernel_on_a_gpu_that_it_fits(cuda: torch.device) -> None:
    fits = torch.cuda.get_device_capability(cuda) >= (8, 0) and torch.version.cuda is not None
    assert choose_implementation(cuda, torch.bfloat16, head_dim=128, group=7) == ("triton" if fits else "eager")
    for dtype, dim, group in ((torch.float64, 128, 7), (torch.bfloat16, 512, 7), (torch.bfloat16, 128, 64)):
        assert choose_implementation(cuda, dtype, head_dim=dim, group=group) == "eager"


@pytest.mark.gpu
def test_the_kernel_refuses_fp64_on_a_gpu(cuda: torch.device) -> None:
    tree, _, rows = grow(Case(dim=16), 0)
    layout, cache = LayoutBuilder(tree).build(rows), tree.pool.layers[0].double().to(cuda)
    with pytest.raises(ValueError, match=r"float64.*'eager'"):
        tree_attention(cache.new_zeros(3, 1, 16), cache, layout, scale=1.0, implementation="triton")


@pytest.mark.gpu
def test_a_captured_pass_is_replayed_on_the_next_token(cuda: torch.device) -> None:
    from ets_engine.attention.kernel import run_work

    case = Case(prompt=500, fanouts=(4, 4), step=20, kv_heads=2, group=4, dim=64, dtype=torch.bfloat16)
    tree, leaves, rows = grow(case, 0)
    builder = LayoutBuilder(tree, min_saved_tokens=1)

    def work_of(rows: list[Row]) -> WorkList:
        return plan_work(builder.build(rows), group=4, tiles_wanted=64).to(cuda)

    works = [work_of(rows)]
    for _ in range(2):
        rows = [row._replace(stored=row.stored + 1) for row in rows]
        for leaf in leaves:
            tree.append(leaf, 1)
        works.append(work_of(rows))
    static, follower = next(pair for pair in pairwise(works) if pair[0].shape == pair[1].shape)
    query = torch.randn(len(leaves), 8, 64, dtype=torch.bfloat16, device=cuda)
    cache = torch.randn((tree.pool.layers[0].shape[0], 2, 2, 64), device=cuda).bfloat16()
    expected = run_work(query, cache, follower, scale=0.1)
    run_work(query, cache, static, scale=0.1)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = run_work(query, cache, static, scale=0.1)
    static.numbers.copy_(follower.numbers)
    graph.replay()
    assert torch.equal(output, expected)
