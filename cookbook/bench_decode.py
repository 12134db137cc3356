"""Decode many branches of one prompt: our tree cache against `generate(num_return_sequences=...)`.

Both use the same random-weight Llama, the same prompt, temperature 1 and exactly the same number of tokens; both times
include reading the prompt. Prints a table, then one JSON line, and appends that line to `results/bench_decode.jsonl`.

    python cookbook/bench_decode.py                      # 188M parameters, bf16, 64 branches x 64 tokens; minutes
    python cookbook/bench_decode.py --dtype float32
    python cookbook/bench_decode.py --small              # toy size; seconds

On a CPU without bf16 instructions part of the gain in bf16 comes from how our linear layers multiply, not from sharing;
`--dtype float32` shows sharing alone.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from transformers import LlamaConfig, LlamaForCausalLM

from ets_engine.config import EngineConfig
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


SMALL = Workload(
    prompt_tokens=48,
    branches=8,
    new_tokens=8,
    hidden=64,
    intermediate=128,
    layers=2,
    heads=4,
    kv_heads=2,
    vocabulary=256,
)


@dataclass(frozen=True, slots=True)
class Measurement:
    """One side's runs: seconds each, and the most KV bytes it held."""

    seconds: tuple[float, ...]
    peak_kv_bytes: int

    def tokens_per_s(self, tokens: int) -> float:
        """Tokens over the median time."""
        return tokens / statistics.median(self.seconds)


class NoTokenizer:
    """Ids stay ids: nothing is decoded here."""

    def __len__(self) -> int:
        """No token has text."""
        return 0

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


def run_ours(runner: Runner, prompt: list[int], work: Workload, seed: int) -> tuple[float, int]:
    """Seconds and peak bytes of KV pages of one run."""
    decoder = StepDecoder(runner, NoTokenizer())
    runner.tree.reset_peak()
    started_s = time.perf_counter()
    root = decoder.start(prompt, "bench")
    rules = StopRules(strings=(), max_step_tokens=work.new_tokens)
    decoder.submit(
        [Branch(root, node, seed, SamplingParams(), rules, work.new_tokens) for node in range(1, work.branches + 1)]
    )
    steps = decoder.run()
    seconds = time.perf_counter() - started_s
    assert all(len(step.token_ids) == work.new_tokens for step in steps)
    for leaf in (root, *(step.leaf for step in steps)):
        decoder.release(leaf)
    return seconds, runner.tree.peak_pages * runner.tree.pool.page_tokens * runner.bytes_per_token


def run_generate(model: LlamaForCausalLM, prompt: list[int], work: Workload) -> tuple[float, int]:
    """Seconds and bytes of the cache's tensors at the end of one run, when they are largest."""
    ids = torch.tensor([prompt], device=model.device)
    started_s = time.perf_counter()
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
    seconds = time.perf_counter() - started_s
    assert output.sequences.shape == (work.branches, work.prompt_tokens + work.new_tokens)
    cached = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
    return seconds, sum(tensor.numel() * tensor.element_size() for tensor in cached)


def bench(work: Workload, dtype: torch.dtype, device: str, repeats: int, seed: int) -> tuple[Measurement, Measurement]:
    """Interleaved runs of both sides after a short warm-up, so that a busy machine hurts both alike."""
    runner = Runner(build_model(work, dtype, device, seed), EngineConfig())
    plain = build_model(work, dtype, device, seed)
    prompt = torch.randint(1, work.vocabulary, (work.prompt_tokens,)).tolist()
    short = Workload(**asdict(work) | {"prompt_tokens": 8, "new_tokens": 2})
    run_ours(runner, prompt[:8], short, seed)
    run_generate(plain, prompt[:8], short)
    ours, theirs = [], []
    for repeat in range(repeats):
        ours.append(run_ours(runner, prompt, work, seed + repeat))
        theirs.append(run_generate(plain, prompt, work))
    return tuple(Measurement(tuple(run[0] for run in runs), max(run[1] for run in runs)) for runs in (ours, theirs))


def commit() -> str:
    """Short hash of the checkout, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--small", action="store_true", help="toy size, for tests; writes no row")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    work = SMALL if options.small else Workload()
    dtype = getattr(torch, options.dtype)
    ours, theirs = bench(work, dtype, options.device, options.repeats, options.seed)
    tokens = work.branches * work.new_tokens
    speed = ours.tokens_per_s(tokens), theirs.tokens_per_s(tokens)
    row: dict[str, object] = {
        "bench": "decode",
        "workload": asdict(work),
        "dtype": options.dtype,
        "ours_tokens_per_s": round(speed[0], 1),
        "generate_tokens_per_s": round(speed[1], 1),
        "speedup": round(speed[0] / speed[1], 2),
        "ours_peak_kv_bytes": ours.peak_kv_bytes,
        "generate_peak_kv_bytes": theirs.peak_kv_bytes,
        "kv_ratio": round(theirs.peak_kv_bytes / ours.peak_kv_bytes, 2),
        "ours_seconds": [round(second, 2) for second in ours.seconds],
        "generate_seconds": [round(second, 2) for second in theirs.seconds],
        "machine": torch.cuda.get_device_name() if options.device != "cpu" else platform.processor() or "cpu",
        "threads": options.threads,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": commit(),
        "seed": options.seed,
    }
    print(f"{'':12}{'tokens/s':>12}{'median s':>12}{'spread s':>18}{'peak KV MB':>14}")
    for name, one in (("tree cache", ours), ("generate", theirs)):
        spread = f"{min(one.seconds):.2f}..{max(one.seconds):.2f}"
        median = statistics.median(one.seconds)
        print(f"{name:12}{tokens / median:12.1f}{median:12.2f}{spread:>18}{one.peak_kv_bytes / 1e6:14.1f}")
    print(f"{'ratio':12}{row['speedup']:11.2f}x{'':30}{row['kv_ratio']:13.2f}x")
    print(json.dumps(row))
    if not options.small:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
