"""Decode many branches of one prompt: our tree cache against `generate(num_return_sequences=...)` and a union mask.

The union mask is the simple way to share a prefix: all branches are one sequence over one cache that holds every token
once, and a mask lets each see its own. All use the same random-weight Llama, the same prompt, temperature 1 and exactly
the same number of tokens; all times include reading the prompt. Prints a table, then one JSON line, and appends that
line to `results/bench_decode.jsonl`.

    python cookbook/bench_decode.py                      # 188M parameters, bf16, 64 branches x 64 tokens; minutes
    python cookbook/bench_decode.py --dtype float32
    python cookbook/bench_decode.py --shape reference --branches 16     # the shape of the shipped policy, fp32
    python cookbook/bench_decode.py --shape toy          # seconds; writes no row

On a CPU part of the gain comes from how our linear layers multiply (`ets_engine/runtime/linear.py`), not from sharing:
in fp32 on AMD's AVX-512 about half of their time, in bf16 without bf16 instructions most of it, in bf16 with them a
tenth. CPU seconds stand beside the wall times: where they differ by much, the machine was busy with something else.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from ets_engine.config import EngineConfig
from ets_engine.evaluation.machine import provenance
from ets_engine.runtime import Branch, Runner, SamplingParams, StepDecoder, StopRules

RESULTS = Path(__file__).parent / "results" / "bench_decode.jsonl"


@dataclass(frozen=True, slots=True)
class Workload:
    """What both sides do; sizes are counts."""

    prompt_tokens: int = 360
    branches: int = 64
    new_tokens: int = 64
    hidden: int = 768
    intermediate: int = 3072
    layers: int = 16
    heads: int = 12
    kv_heads: int = 4
    vocabulary: int = 32_000


SHAPES = {
    "large": Workload(),
    "reference": Workload(
        prompt_tokens=30,
        new_tokens=40,
        hidden=192,
        intermediate=512,
        layers=6,
        heads=6,
        kv_heads=3,
        vocabulary=133,
    ),
    "toy": Workload(
        prompt_tokens=48,
        branches=8,
        new_tokens=8,
        hidden=64,
        intermediate=128,
        layers=2,
        heads=4,
        kv_heads=2,
        vocabulary=256,
    ),
}


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side's runs: wall and CPU seconds of each, and the most KV bytes it held."""

    seconds: tuple[float, ...]
    cpu_seconds: tuple[float, ...]
    peak_kv_bytes: int

    def tokens_per_s(self, tokens: int) -> float:
        """Tokens over the median time."""
        return tokens / statistics.median(self.seconds)


class NoTokenizer:
    """Ids stay ids: nothing is decoded here."""

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = False) -> str:
        """No text."""
        return ""


def build_model(work: Workload, dtype: torch.dtype, device: str, seed: int) -> LlamaForCausalLM:
    """The same random weights for both sides."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=work.vocabulary,
        hidden_size=work.hidden,
        intermediate_size=work.intermediate,
        num_hidden_layers=work.layers,
        num_attention_heads=work.heads,
        num_key_value_heads=work.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).to(device=device, dtype=dtype).eval()


def run_ours(runner: Runner, prompt: list[int], work: Workload, seed: int) -> int:
    """Peak bytes of KV pages of one run."""
    decoder = StepDecoder(runner, NoTokenizer())
    runner.tree.reset_peak()
    root = decoder.leaves.start(prompt, "bench")
    rules = StopRules(strings=(), max_step_tokens=work.new_tokens)
    decoder.submit(
        [Branch(root, node, seed, SamplingParams(), rules, work.new_tokens) for node in range(1, work.branches + 1)]
    )
    steps = decoder.run()
    assert all(len(step.token_ids) == work.new_tokens for step in steps)
    for leaf in (root, *(step.leaf for step in steps)):
        decoder.leaves.release(leaf)
    return runner.tree.peak_pages * runner.tree.pool.page_tokens * runner.bytes_per_token


def run_generate(model: LlamaForCausalLM, prompt: list[int], work: Workload) -> int:
    """Bytes of the cache's tensors at the end of one run, when they are largest."""
    ids = torch.tensor([prompt], device=model.device)
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        do_sample=True,
        top_k=0,
        num_return_sequences=work.branches,
        min_new_tokens=work.new_tokens,
        max_new_tokens=work.new_tokens,
        return_dict_in_generate=True,
    )
    assert output.sequences.shape == (work.branches, work.prompt_tokens + work.new_tokens)
    cached = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in cached)


@torch.inference_mode()
def run_union(model: LlamaForCausalLM, prompt: list[int], work: Workload) -> int:
    """Bytes of the cache's tensors at the end of one run with a union mask."""
    device, branches = model.device, work.branches
    cache = transformers.DynamicCache(config=model.config)
    hidden = model.model(torch.tensor([prompt], device=device), past_key_values=cache).last_hidden_state[0, -1:]
    hidden = hidden.expand(branches, -1)
    lowest = torch.finfo(model.dtype).min
    own = torch.full((branches, branches), lowest, dtype=model.dtype, device=device).fill_diagonal_(0.0)
    mask = torch.zeros((branches, len(prompt)), dtype=model.dtype, device=device)
    for step in range(work.new_tokens):
        tokens = torch.multinomial(model.lm_head(hidden).float().softmax(-1), 1)[:, 0]  # [B]
        if step + 1 == work.new_tokens:
            break  # the last token is not read, as in `generate` and in ours
        mask = torch.cat([mask, own], dim=1)  # [B, U]
        positions = torch.full((1, branches), len(prompt) + step, device=device)
        hidden = model.model(
            tokens[None], attention_mask=mask[None, None], position_ids=positions, past_key_values=cache
        ).last_hidden_state[0]
    cached = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    return sum(tensor.numel() * tensor.element_size() for tensor in cached)


def timed(run: Callable[[], int]) -> tuple[float, float, int]:
    """Wall seconds, CPU seconds and what the run returns."""
    started_s, cpu_s = time.perf_counter(), time.process_time()
    result = run()
    return time.perf_counter() - started_s, time.process_time() - cpu_s, result


def bench(
    work: Workload, dtype: torch.dtype, device: str, repeats: tuple[int, int], seed: int
) -> tuple[Measurement, Measurement, Measurement]:
    """Interleaved runs of all sides after a short warm-up, so that a busy machine hurts all alike."""
    runner = Runner(build_model(work, dtype, device, seed), EngineConfig())
    plain = build_model(work, dtype, device, seed)
    prompt = torch.randint(1, work.vocabulary, (work.prompt_tokens,)).tolist()
    short = replace(work, prompt_tokens=8, new_tokens=2)
    run_ours(runner, prompt[:8], short, seed)
    run_generate(plain, prompt[:8], short)
    run_union(plain, prompt[:8], short)
    runs: tuple[list[tuple[float, float, int]], ...] = [], [], []
    for repeat in range(max(repeats)):
        if repeat < repeats[0]:
            runs[0].append(timed(lambda seed=seed + repeat: run_ours(runner, prompt, work, seed)))
            runs[2].append(timed(lambda: run_union(plain, prompt, work)))
        if repeat < repeats[1]:
            runs[1].append(timed(lambda: run_generate(plain, prompt, work)))
    ours, theirs, union = (
        Measurement(seconds, cpu, max(peaks)) for seconds, cpu, peaks in (zip(*one, strict=True) for one in runs)
    )
    return ours, theirs, union


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="large", choices=sorted(SHAPES))
    parser.add_argument("--branches", type=int, help="instead of the shape's own")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: bfloat16 for the large shape")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3, help="runs of ours and of the union mask")
    parser.add_argument("--generate-repeats", type=int, default=1, help="runs of generate, which takes minutes")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    work = SHAPES[options.shape]
    work = replace(work, branches=options.branches or work.branches)
    dtype = options.dtype or ("bfloat16" if options.shape == "large" else "float32")
    repeats = options.repeats, options.generate_repeats
    ours, theirs, union = bench(work, getattr(torch, dtype), options.device, repeats, options.seed)
    tokens = work.branches * work.new_tokens
    speed = ours.tokens_per_s(tokens), theirs.tokens_per_s(tokens)
    union_speed = union.tokens_per_s(tokens)
    row: dict[str, object] = {
        "bench": "decode",
        "shape": options.shape,
        "workload": asdict(work),
        "dtype": dtype,
        "ours_tokens_per_s": round(speed[0], 1),
        "generate_tokens_per_s": round(speed[1], 1),
        "speedup": round(speed[0] / speed[1], 2),
        "cpu_speedup": round(statistics.median(theirs.cpu_seconds) / statistics.median(ours.cpu_seconds), 2),
        "union_tokens_per_s": round(union_speed, 1),
        "speedup_over_union": round(speed[0] / union_speed, 2),
        "cpu_speedup_over_union": round(statistics.median(union.cpu_seconds) / statistics.median(ours.cpu_seconds), 2),
        "union_seconds": [round(second, 3) for second in union.seconds],
        "ours_peak_kv_bytes": ours.peak_kv_bytes,
        "generate_peak_kv_bytes": theirs.peak_kv_bytes,
        "kv_ratio": round(theirs.peak_kv_bytes / ours.peak_kv_bytes, 2),
        "ours_seconds": [round(second, 3) for second in ours.seconds],
        "generate_seconds": [round(second, 3) for second in theirs.seconds],
        "ours_cpu_seconds": [round(second, 3) for second in ours.cpu_seconds],
        "generate_cpu_seconds": [round(second, 3) for second in theirs.cpu_seconds],
        **provenance(options.device),
        "seed": options.seed,
    }
    print(f"{'':12}{'tokens/s':>12}{'median s':>12}{'spread s':>18}{'CPU s':>12}{'peak KV MB':>14}")
    for name, one in (("tree cache", ours), ("union mask", union), ("generate", theirs)):
        median, cpu = statistics.median(one.seconds), statistics.median(one.cpu_seconds)
        spread = f"{min(one.seconds):.2f}..{max(one.seconds):.2f}"
        print(f"{name:12}{tokens / median:12.1f}{median:12.2f}{spread:>18}{cpu:12.2f}{one.peak_kv_bytes / 1e6:14.1f}")
    print(f"{'/ generate':12}{row['speedup']:11.2f}x{'':30}{row['cpu_speedup']:11.2f}x{row['kv_ratio']:13.2f}x")
    print(f"{'/ union':12}{row['speedup_over_union']:11.2f}x{'':30}{row['cpu_speedup_over_union']:11.2f}x")
    print(json.dumps(row))
    if options.shape != "toy":
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
