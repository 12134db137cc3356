"""The Triton kernel against the specification: cases for any device, and what the interpreter needs to run them.

Not collected by itself: `test_kernel.py` runs the small cases in one process of its own, since Triton must find
TRITON_INTERPRET=1 when it is first imported, and runs the large ones on a GPU.
"""

from __future__ import annotations

import copy
import os
import random
from collections import Counter
from collections.abc import Hashable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from ets_engine.attention import tree_attention
from ets_engine.attention.work import WorkList, plan_pieces, plan_work
from ets_engine.kv import KVPool, LayerShape, LayoutBuilder, PrefixTree, Row, TreeLayout

from .emulated_gpu import Again, emulate_gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True, slots=True)
class Case:
    """A tree, the rows that read it, and the numbers of the attention.

    Attributes:
        prompt: Tokens of the root.
        fanouts: Children of each node, depth by depth.
        step: Tokens of each node between root and leaves, 0 to this many.
        stored: Tokens that each leaf holds before, at most.
        new: New tokens of each leaf, at most.
        kv_heads, group, dim, dtype: Of the attention.
        softcap, sinks, window: Of the attention.
        scale: On the scores, None = the usual one.
        chunk: Shortest chunk, so that small cases are split as well.
        heights: Of the tiles.
    """

    prompt: int = 40
    fanouts: tuple[int, ...] = (3,)
    step: int = 6
    stored: int = 5
    new: int = 1
    kv_heads: int = 1
    group: int = 1
    dim: int = 16
    dtype: torch.dtype = FP32
    softcap: float | None = None
    sinks: bool = False
    window: int | None = None
    scale: float | None = None
    chunk: int = 128
    heights: tuple[int, ...] = (16, 32)


SMALL = {
    "one-token": Case(prompt=1, fanouts=(), stored=0),
    "one-path-split": Case(prompt=400, fanouts=(1,), dim=64, chunk=16, group=2),
    "prompt-at-once": Case(prompt=0, fanouts=(), stored=0, new=70, group=4),
    "prompt-in-chunks": Case(prompt=0, fanouts=(), stored=33, new=40, dtype=BF16),
    "star": Case(fanouts=(5,), kv_heads=2, group=2, dtype=FP16, dim=64),
    "wide-star": Case(prompt=20, fanouts=(40,), stored=3, dtype=BF16),
    "comb": Case(fanouts=(2, 1, 2, 1, 2), step=4, group=4),
    "single-token-prompt": Case(prompt=1, fanouts=(3, 2), step=1),
    "ragged": Case(fanouts=(2, 2), new=9, group=7, dtype=BF16, dim=80),
    "ragged-split": Case(prompt=90, fanouts=(3,), new=12, group=2, chunk=16, dim=32),
    "large-heads": Case(fanouts=(2,), group=4, dtype=FP16, dim=128),
    "odd-heads": Case(fanouts=(3,), kv_heads=2, group=7, dtype=BF16, dim=96, heights=(16, 64)),
    "softcap": Case(fanouts=(2, 2), group=2, softcap=2.0),
    "softcap-bf16": Case(fanouts=(2, 2), group=2, softcap=30.0, dtype=BF16),
    "sinks-merged": Case(fanouts=(3,), kv_heads=2, group=3, sinks=True),
    "sinks-alone": Case(prompt=0, fanouts=(), stored=0, new=10, kv_heads=2, group=3, sinks=True, dtype=FP16),
    "window": Case(prompt=50, fanouts=(2, 2), window=20, group=2, chunk=16),
    "window-in-a-prompt": Case(prompt=200, fanouts=(4,), stored=9, window=150, group=2),
    "scale-below-0": Case(new=3, scale=-0.5),
    "scale-0": Case(prompt=150, new=70, scale=0.0, chunk=16, sinks=True),
    "window-ragged": Case(prompt=50, fanouts=(2, 2), new=9, window=7, dtype=BF16, softcap=20.0, sinks=True),
}
LARGE = {
    f"width-{width}-{str(dtype).removeprefix('torch.')}-{dim}": Case(
        prompt=600, fanouts=fanouts, step=60, stored=40, kv_heads=2, group=group, dim=dim, dtype=dtype
    )
    for width, fanouts in ((1, (1,)), (16, (4, 4)), (64, (4, 4, 4)), (256, (4, 4, 16)), (1024, (8, 8, 16)))
    for dtype, dim, group in ((BF16, 128, 7), (FP16, 64, 4), (BF16, 256, 2), (FP32, 128, 4))
} | {
    "long-prompt": Case(prompt=12_000, fanouts=(4,), step=60, kv_heads=4, group=7, dim=128, dtype=BF16),
    "ragged": Case(prompt=700, fanouts=(4, 4), step=60, new=60, kv_heads=2, group=7, dim=128, dtype=BF16),
    "prompt": Case(prompt=0, fanouts=(), stored=0, new=700, kv_heads=2, group=7, dim=128, dtype=BF16),
    "window": Case(prompt=3000, fanouts=(4, 4), step=60, window=700, kv_heads=2, group=4, dim=80, dtype=FP16),
    "softcap-sinks": Case(prompt=700, fanouts=(8,), softcap=30.0, sinks=True, kv_heads=4, group=8, dim=96, dtype=BF16),
    "fp32-large-heads": Case(prompt=700, fanouts=(8,), kv_heads=2, group=4, dim=256),
}


def grow(case: Case, seed: int) -> tuple[PrefixTree, list[int], list[Row]]:
    """The tree, its leaves and one row for each."""
    rng = random.Random(seed)
    tree = PrefixTree(KVPool([LayerShape(1, 16)], page_tokens=4))  # only its slots count
    leaves = [tree.root()]
    for depth, tokens in enumerate((case.prompt, *(case.step for _ in case.fanouts[1:]))):
        for node in leaves:
            if tokens:
                tree.append(node, tokens if depth == 0 else rng.randrange(tokens + 1))
        if depth < len(case.fanouts):
            leaves = [tree.fork(node) for node in leaves for _ in range(case.fanouts[depth])]
    rows = []
    for leaf in leaves:
        if case.fanouts and case.stored:
            tree.append(leaf, rng.randrange(case.stored + 1))
        elif case.stored:
            tree.append(leaf, case.stored)
        new = 1 + rng.randrange(case.new) if case.fanouts else case.new
        rows.append(Row(leaf, tree.num_tokens(leaf), new))
        tree.append(leaf, new)
    return tree, leaves, rows


def scatter(layout: TreeLayout, num_slots: int, seed: int) -> TreeLayout:
    """The same over slots in any order."""
    order = torch.randperm(num_slots, generator=torch.Generator().manual_seed(seed))
    segments = tuple(replace(segment, slots=order[segment.slots]) for segment in layout.segments)
    return replace(layout, segments=segments, tail_slots=order[layout.tail_slots])


def check(case: Case, device: torch.device, seed: int = 0) -> None:
    """The kernel errs at most a few times as much as eager attention in the same dtype, or a few last digits.

    The yardstick is the specification in fp64 on the same rounded inputs. A soft cap is computed in fp32, whose last
    digit is that of the cap: the scores, and with them the weights, are off by that much.
    """
    from ets_engine.attention.kernel import run_work

    tree, _, rows = grow(case, seed)
    windows = () if case.window is None else (case.window,)
    layout = LayoutBuilder(tree, min_saved_tokens=1, windows=windows).build(rows).within(case.window)
    num_slots = tree.pool.layers[0].shape[0]
    layout = scatter(layout, num_slots, seed)
    generator = torch.Generator().manual_seed(seed)
    heads, scale = case.kv_heads * case.group, case.dim**-0.5 if case.scale is None else case.scale
    query = 2 * torch.randn(sum(row.new for row in rows), heads, case.dim, generator=generator)
    cache = torch.randn(num_slots, 2, case.kv_heads, case.dim, generator=generator)
    sinks = torch.randn(heads, generator=generator).to(case.dtype) if case.sinks else None
    query, cache = query.to(case.dtype), cache.to(case.dtype)
    exact = tree_attention(
        query.double(),
        cache.double(),
        layout,
        scale=scale,
        softcap=case.softcap,
        sinks=None if sinks is None else sinks.double(),
        implementation="reference",
    )
    plain = tree_attention(query, cache, layout, scale=scale, softcap=case.softcap, sinks=sinks, implementation="eager")
    query, cache = query.to(device), cache.to(device)
    sinks = None if sinks is None else sinks.to(device)
    if INTERPRETED:
        work = plan_work(layout, group=case.group, tiles_wanted=1000, heights=case.heights, min_chunk=case.chunk)
        found = [run_work(query, cache, work, scale=scale, softcap=case.softcap, sinks=sinks)]
    else:
        from ets_engine.attention import kernel

        options: dict[str, Any] = {"scale": scale, "softcap": case.softcap, "sinks": sinks, "implementation": "triton"}
        works: dict[Hashable, WorkList] = {}
        ours, again = (tree_attention(query, cache, layout, **options, works=works) for _ in range(2))
        assert torch.equal(ours, again) and len(works) == 1
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernel, "TALL_SAVED_BYTES", 0)
            found = [ours, tree_attention(query, cache, layout, **options)]
    largest = exact.abs().max().item()
    budget = 3 * (plain.double() - exact).abs().max().item() + 4 * torch.finfo(case.dtype).eps * largest
    budget += (case.softcap or 0.0) * torch.finfo(FP32).eps * largest
    for one in found:
        assert one.shape == exact.shape and one.dtype == case.dtype
        assert (one.cpu().double() - exact).abs().max().item() <= budget


if INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor
    _dot = interpreter.InterpreterBuilder.create_dot

    def _patch_tensor_for_new_numpy(tensor: Any, scope: Any) -> None:
        """NumPy 2.4 no longer makes an int of an array of one number (github.com/triton-lang/triton/issues/9171)."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    def _dot_of_bf16(self: Any, a: Any, b: Any, *others: Any) -> Any:
        """Triton 3.6 holds bf16 as the bits of uint16 and multiplies those; fp32 holds the same numbers."""
        return _dot(self, _widen(a), _widen(b), *others)

    def _widen(handle: Any) -> Any:
        if handle.dtype.name != "bf16":
            return handle
        numbers = (handle.data.astype(np.uint32) << 16).view(np.float32)
        return interpreter.TensorHandle(numbers, interpreter.tl.float32)

    interpreter._patch_lang_tensor = _patch_tensor_for_new_numpy
    interpreter.InterpreterBuilder.create_dot = _dot_of_bf16  # pyright: ignore[reportAttributeAccessIssue]

    @pytest.mark.parametrize("name", SMALL)
    def test_the_kernel_equals_the_specification(name: str) -> None:
        check(SMALL[name], torch.device("cpu"))

    def test_a_draw_by_blocks_draws_what_plain_torch_draws() -> None:
        """Vocabularies that end inside a block; all rules mixed, greedy ones among them; a row that is no number."""
        from ets_engine.runtime.draw_kernel import draw_by_blocks
        from ets_engine.runtime.sampler import SamplingParams, draw, tabulate

        generator = torch.Generator().manual_seed(0)
        plain = [SamplingParams()] * 12
        tempered = [SamplingParams(temperature=one) for one in (0.0, 0.5, 1.0, 2.0)] * 3
        cut = [replace(one, top_p=0.8, top_k=20) for one in tempered[:4]]
        cut += [replace(one, top_p=0.95, min_p=0.01) for one in tempered[:4]]
        cut += [SamplingParams(top_k=10**6, min_p=0.2), SamplingParams(top_p=1e-9), SamplingParams(top_k=1)]
        cut += [SamplingParams(top_k=300, top_p=0.999)]
        for vocabulary, dtype in ((200, FP32), (1000, FP32), (5000, BF16)):
            logits = (3 * torch.randn(12, vocabulary, generator=generator)).to(dtype)
            logits[3, 256:512] = -float("inf")
            draws = torch.rand(12, generator=generator, dtype=torch.float64)
            for params in (plain, tempered, cut):
                table = torch.from_numpy(tabulate(params, draws.numpy()))
                temperatures = None if params is plain else table[1].float()
                found = draw_by_blocks(logits, temperatures, draws, table[2:] if params is cut else None)
                expected = draw(logits, params, draws.numpy())
                assert found[0].tolist() == expected[0].tolist(), (vocabulary, params)
                assert torch.allclose(found[1], expected[1], atol=1e-5)
        logits[5, 700] = float("nan")
        for cuts in (None, table[2:]):
            assert draw_by_blocks(logits, None, draws, cuts)[1].isnan().tolist() == [row == 5 for row in range(12)]

    def test_what_cuts_keep_ends_where_plain_torch_ends_it() -> None:
        """Many equal logits, and zeros of both signs: the smallest logit that is kept, and nothing beyond it."""
        from ets_engine.runtime.draw_kernel import draw_by_blocks
        from ets_engine.runtime.sampler import SamplingParams, _cut, tabulate

        generator = torch.Generator().manual_seed(1)
        logits = torch.randint(-3, 4, (8, 300), generator=generator).float() * -0.5
        logits[0] = -0.0
        logits[0, ::3] = 0.0
        logits = logits.sort(descending=True).values  # so that the last one that is kept has the highest id
        params = [SamplingParams(top_k=k, top_p=p, min_p=m) for k in (0, 70) for p in (1.0, 0.6) for m in (0.0, 0.4)]
        table = torch.from_numpy(tabulate(params, np.full(len(params), 1 - 1e-9)))
        found, _ = draw_by_blocks(logits, None, table[0], table[2:])
        assert found.tolist() == [int(row.nonzero().max()) for row in _cut(logits.softmax(-1), params)]
        logits = (1 + torch.arange(300, 0, -1) * torch.finfo(FP32).eps).expand(3, -1)  # neighbours as fp32 numbers
        table = torch.from_numpy(tabulate([SamplingParams(top_k=k) for k in (1, 70, 299)], np.full(3, 1 - 1e-9)))
        assert draw_by_blocks(logits, None, table[0], table[2:])[0].tolist() == [0, 69, 298]
        logits = torch.randn(40, 150, generator=generator).sort(descending=True).values
        nearly_all = [SamplingParams(top_p=1 - 1e-16)] * 40  # of which rounding may make more than all there is
        table = torch.from_numpy(tabulate(nearly_all, np.full(40, 1e-9)))
        assert draw_by_blocks(logits, None, table[0], table[2:])[0].tolist() == [0] * 40

    def test_a_gated_product_is_that_of_its_layers() -> None:
        """Rows that one tile holds, and more; outputs that tiles divide, and others."""
        from ets_engine.runtime.gated_linear import BLOCK_M, gated_linear

        generator = torch.Generator().manual_seed(0)
        for rows, outputs, inputs, dtype in (
            (1, 64, 64, BF16),
            (5, 192, 128, FP16),
            (BLOCK_M, 64, 64, BF16),
            (BLOCK_M + 1, 64, 64, FP16),
            (7, 40, 64, BF16),
            (7, 64, 40, FP16),
        ):
            x, gate, up = (
                torch.randn(*shape, generator=generator).to(dtype)
                for shape in ((1, rows, inputs), (outputs, inputs), (outputs, inputs))
            )
            found = gated_linear(x, gate, up)
            exact, high = x.double() @ gate.double().T, x.double() @ up.double().T
            exact = torch.nn.functional.silu(exact) * high
            assert found.shape == exact.shape and found.dtype == dtype
            assert (found.double() - exact).abs().max() <= 4 * torch.finfo(dtype).eps * exact.abs().max(), (rows, dtype)

    def test_a_sum_and_its_norm_are_those_of_plain_torch() -> None:
        from ets_engine.runtime.layer_kernel import add_norm

        generator = torch.Generator().manual_seed(0)
        for rows, width, dtype in ((1, 64, BF16), (5, 40, FP16), (3, 200, FP32)):
            states, added = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
            weight = torch.randn(width, generator=generator).to(dtype)
            for more in (None, added):
                summed, normed = add_norm(states, more, weight, 1e-3)
                if more is None:
                    assert summed is states
                else:  # the interpreter cuts where a GPU rounds
                    torch.testing.assert_close(summed, states + added, rtol=torch.finfo(dtype).eps, atol=0)
                wide = summed.double()
                exact = weight.double() * wide * (wide.square().mean(-1, keepdim=True) + 1e-3).rsqrt()
                assert (normed.double() - exact).abs().max() <= 2 * torch.finfo(dtype).eps * exact.abs().max()

    def test_rotated_keys_are_stored_and_rotated_queries_returned() -> None:
        """As transformers rotates; a token without a slot is stored nowhere."""
        from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

        from ets_engine.runtime.hook import Projected
        from ets_engine.runtime.layer_kernel import rotate_and_store

        generator = torch.Generator().manual_seed(0)
        for heads, kv_heads, dim, dtype in ((4, 2, 16, BF16), (3, 3, 12, FP16), (7, 1, 8, FP32)):
            tokens, angles = 5, torch.randn(5, dim, generator=generator)
            wide = torch.randn(tokens, (heads + 2 * kv_heads) * dim + 3, generator=generator).to(dtype)
            products, cos, sin = wide[:, :-3], angles.cos().to(dtype), angles.sin().to(dtype)
            cache = torch.full((9, 2, kv_heads, dim), 7.0, dtype=dtype)
            slots = torch.tensor([4, -1, 8, 0, 2], dtype=torch.int32)
            query = rotate_and_store(cache, slots, Projected(products, cos, sin))
            parts = products.split([heads * dim, kv_heads * dim, kv_heads * dim], -1)
            q, k, v = (part.unflatten(-1, (-1, dim)).transpose(0, 1)[None].double() for part in parts)
            exact = apply_rotary_pos_emb(q, k, cos[None].double(), sin[None].double())
            near = {"rtol": torch.finfo(dtype).eps, "atol": 1e-6}
            torch.testing.assert_close(query.double(), exact[0][0].transpose(0, 1), **near)
            there = slots >= 0
            stored = cache[slots[there].long()]
            torch.testing.assert_close(stored[:, 0].double(), exact[1][0].transpose(0, 1)[there], **near)
            assert torch.equal(stored[:, 1].double(), v[0].transpose(0, 1)[there])
            assert bool((cache[[1, 3, 5, 6, 7]] == 7).all())

    @pytest.mark.parametrize("kind", ["llama", "heads apart", "qwen2", "qwen3"])
    def test_fused_layers_give_what_their_layers_give(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """Prompt, then branches token by token in graphs; loading compares them with plain attention as well."""
        import transformers

        from ets_engine.runtime import Runner
        from ets_engine.runtime.fused_layer import fuse_layers
        from ets_engine.runtime.gated_linear import join_gates
        from ets_engine.runtime.graphs import GraphForward
        from ets_engine.runtime.hook import TreeForward
        from ets_engine.runtime.joint_linear import join_linears
        from ets_engine.runtime.support import use_tree_attention

        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 4 if kind == "heads apart" else 2}
        torch.manual_seed(0)
        family = {"qwen2": "Qwen2", "qwen3": "Qwen3"}.get(kind, "Llama")
        config = getattr(transformers, f"{family}Config")(**sizes, head_dim=16, initializer_range=0.2)
        model = getattr(transformers, f"{family}ForCausalLM")(config).to(FP16).eval()
        for parameter in model.parameters():  # norms that are not one, biases that are not zero
            parameter.data += 0.1 * torch.randn(parameter.shape).to(FP16)
        plain = copy.deepcopy(model)
        assert (join_linears(model), join_gates(model)) == (2, 2)
        use_tree_attention(model)
        assert (len(fuse_layers(model)), len(fuse_layers(model))) == (2, 2)
        emulate_gpu(monkeypatch)
        runner = Runner(model)
        called: Counter[type] = Counter()
        for forward in (TreeForward, GraphForward):
            monkeypatch.setattr(forward, "attend", None)
            usual = forward.rotate_and_attend
            count = lambda one, *rest, usual=usual: called.update([type(one)]) or usual(one, *rest)  # noqa: E731
            monkeypatch.setattr(forward, "rotate_and_attend", count)
        root = runner.tree.root()
        prompt, tails = [3, 1, 4, 1, 5, 9], [[2, 6, 5], [3, 5, 8]]
        shared = runner.extend([(root, prompt)])
        leaves = [runner.tree.fork(root) for _ in tails]
        rows = [[(leaf, [tail[i]]) for leaf, tail in zip(leaves, tails, strict=True)] for i in range(3)]
        steps = [runner.extend(one) for one in rows]
        assert called == {TreeForward: 2, GraphForward: 2 * 2 + 2 * 2}  # the first pass of a graph runs twice
        for number, tail in enumerate(tails):
            found = torch.cat([shared, torch.stack([step[number] for step in steps])]).double()
            with torch.inference_mode():
                expected = plain.model(torch.tensor([prompt + tail])).last_hidden_state[0].double()
            assert (found - expected).abs().max() < 0.01 * expected.abs().max()

    def test_layers_that_are_not_as_usual_stay_as_they_are() -> None:
        from transformers import (
            Glm4MoeConfig,
            Glm4MoeForCausalLM,
            GraniteConfig,
            GraniteForCausalLM,
            LlamaConfig,
            LlamaForCausalLM,
            Olmo2Config,
            Olmo2ForCausalLM,
        )

        from ets_engine.runtime.fused_layer import fuse_layers
        from ets_engine.runtime.gated_linear import join_gates
        from ets_engine.runtime.joint_linear import join_linears
        from ets_engine.runtime.support import use_tree_attention

        sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
        usual, broken = (LlamaForCausalLM(LlamaConfig(**sizes)).to(FP16) for _ in range(2))
        for layer in broken.model.layers:
            layer.mlp.down_proj.weight.data[0] = 6e4  # whose products are too large for fp16: equal to nothing
        for others in (
            broken,
            GraniteForCausalLM(GraniteConfig(**sizes, residual_multiplier=0.98)).to(FP16),  # adds less of a product
            Olmo2ForCausalLM(Olmo2Config(**sizes)).to(BF16),  # norms after, of queries and keys over all heads
            LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True)).to(BF16),  # to the addition
            LlamaForCausalLM(LlamaConfig(**sizes)),  # fp32
            Glm4MoeForCausalLM(Glm4MoeConfig(**sizes, head_dim=16, first_k_dense_replace=2, use_qk_norm=False)).to(
                FP16
            ),  # rotates the half of each head
        ):
            assert join_linears(others) == 2
            join_gates(others)
            use_tree_attention(others)
            assert not fuse_layers(others), type(others)
        join_linears(usual)
        join_gates(usual)
        use_tree_attention(usual)
        usual.model.layers[0].post_attention_layernorm.register_forward_hook(lambda *_: None)
        assert len(fuse_layers(usual)) == 1

    def tiny_llama() -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=32,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            initializer_range=0.2,
        )
        return LlamaForCausalLM(config).eval()

    def test_a_model_runs_on_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
        """As on a GPU: layouts on the CPU, one work list for all layers; loading compares it with plain attention."""
        from ets_engine.attention import kernel
        from ets_engine.runtime import runner

        planned = 0

        def count_plans(*arguments: Any, **options: Any) -> WorkList:
            nonlocal planned
            planned += 1
            return plan_pieces(*arguments, **options)

        monkeypatch.setattr(runner, "choose_implementation", lambda *_, **__: "triton")
        monkeypatch.setattr(kernel, "plan_pieces", count_plans)
        ours = runner.Runner(tiny_llama())
        loading = planned
        prompt = ours.tree.root()
        ours.extend([(prompt, [3, 1, 4])])
        assert loading > 0 and planned == loading + 1

    @pytest.fixture
    def captured(monkeypatch: pytest.MonkeyPatch) -> list[Again]:
        """The graphs of runners made from now on."""
        return emulate_gpu(monkeypatch)

    def make_runner() -> Any:
        from ets_engine.config import EngineConfig
        from ets_engine.runtime import Runner

        return Runner(tiny_llama(), EngineConfig(page_tokens=4, prefix_cache_tokens=0), verify=False)

    @torch.inference_mode()
    def gap(hidden: torch.Tensor, paths: Iterable[list[int]]) -> float:
        """Largest difference from what plain transformers make of whole paths."""
        plain = tiny_llama().model
        whole = [plain(torch.tensor([path]), use_cache=False).last_hidden_state[0, -1] for path in paths]
        return float((hidden - torch.stack(whole)).abs().max())

    def test_passes_go_on_from_one_another_as_they_would_in_graphs(
        captured: list[Again], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Branches grow past their room and end one by one, then fork; each pass equals plain whole sequences."""
        from ets_engine.attention import growing
        from ets_engine.kv import decode

        steps: Counter[str] = Counter()
        grow, keep = growing.GrowingWork.grow, growing.GrowingWork.keep
        monkeypatch.setattr(decode, "SPARE_TOKENS", 3)
        monkeypatch.setattr(growing.GrowingWork, "grow", lambda *args: steps.update(["grow"]) or grow(*args))
        monkeypatch.setattr(growing.GrowingWork, "keep", lambda *args: steps.update(["keep"]) or keep(*args))
        ours = make_runner()
        rng, tree = random.Random(0), ours.tree
        root = tree.root()
        prompt = [rng.randrange(32) for _ in range(70)]
        ours.extend([(root, prompt)])
        paths = {tree.fork(root): list(prompt) for _ in range(9)}
        for step in range(14):
            if step == 9:  # two fork
                ended, paths = paths, {}
                for leaf, path in list(ended.items())[:2]:
                    paths |= {tree.fork(leaf): list(path) for _ in range(3)}
                for leaf in ended:
                    tree.release(leaf)
            elif step in (2, 6, 7, 11):
                leaf = list(paths)[step % len(paths)]
                del paths[leaf]
                tree.release(leaf)
            ids = [rng.randrange(32) for _ in paths]
            hidden = ours.extend_drawn(list(paths), torch.tensor(ids))
            for path, token in zip(paths.values(), ids, strict=True):
                path.append(token)
            assert gap(hidden, paths.values()) < 1e-4, step
            tree.check_integrity()
        assert 0 < len(captured) < 9, "most passes are replayed"
        assert steps["grow"] >= 6 and steps["keep"] >= 2

    def test_a_prompt_of_as_many_tokens_as_there_are_rows_is_no_decode_step(captured: list[Again]) -> None:
        ours = make_runner()
        root = ours.tree.root()
        ours.extend([(root, [3, 1, 4])])
        new = {ours.tree.fork(root): [token] for token in range(11)} | {ours.tree.root(): [*range(12)]}
        hidden = ours.extend_last(list(new.items()))
        assert gap(hidden, [[3, 1, 4, token] for token in range(11)] + [[*range(12)]]) < 1e-4

    def test_a_pass_that_failed_is_not_gone_on_from(captured: list[Again], monkeypatch: pytest.MonkeyPatch) -> None:
        """What it would have written elsewhere now is written by a pass without a graph, then graphs go on."""
        from ets_engine.errors import PoolExhaustedError
        from ets_engine.runtime import graphs, passes

        def fail(*_: object) -> torch.Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory")

        ours = make_runner()
        root = ours.tree.root()
        ours.extend([(root, [3, 1, 4])])
        paths = {ours.tree.fork(root): [3, 1, 4] for _ in range(2)}

        def decode(token: int) -> torch.Tensor:
            for path in paths.values():
                path.append(token)
            return ours.extend_last([(leaf, [token]) for leaf in paths])

        for token in range(4):  # a whole page
            decode(token)
        with monkeypatch.context() as patch, pytest.raises(PoolExhaustedError):
            patch.setattr(graphs.PassGraphs, "run", fail)
            ours.extend_last([(leaf, [4]) for leaf in paths])
        ours.extend([(ours.tree.root(), [5, 6])])  # takes a page that was given back
        with monkeypatch.context() as patch:
            patch.setattr(passes, "MAX_GRAPH_ROWS", 0)
            decode(4)
        assert gap(decode(5), paths.values()) < 1e-4
        ours.tree.check_integrity()
