"""What a search spends outside its model, at the size of a real one: layouts, sampling, stops, selection, accounts.

One ETS search of width 64 on random weights (170 M, bfloat16) with a verifier that costs nothing. Prints the share of
its seconds that no forward pass and no head took, and one JSON line, which it appends to
`results/bench_bookkeeping.jsonl`.

    python cookbook/bench_bookkeeping.py             # half a minute on one core
    python cookbook/bench_bookkeeping.py --width 4 --hidden 64 --dtype float32   # seconds; writes no row
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random
from typing import Any

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from ets_engine import EngineConfig, ETSEngine, SearchConfig
from ets_engine.evaluation.machine import provenance
from ets_engine.reference.shipped import policy_path

RESULTS = Path(__file__).parent / "results" / "bench_bookkeeping.jsonl"
LAYERS = 15


class Stopwatch:
    """Adds up the seconds inside some functions."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def around(self, work: Callable[..., Any]) -> Callable[..., Any]:
        """The same function, timed."""

        def timed(*arguments: Any, **options: Any) -> Any:
            began_s = time.perf_counter()
            try:
                return work(*arguments, **options)
            finally:
                self.seconds += time.perf_counter() - began_s

        return timed


def build_policy(folder: str, hidden: int, dtype: torch.dtype) -> None:
    """A random Llama with the shipped tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(policy_path())
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=11 * hidden // 4,
        num_hidden_layers=LAYERS,
        num_attention_heads=hidden // 64 or 1,
        num_key_value_heads=hidden // 256 or 1,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForCausalLM(config).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run the benchmark, print it, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="bfloat16")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    watch, rng = Stopwatch(), Random(options.seed)

    def judge(problem: str, steps: Sequence[str]) -> float:
        return rng.random()

    with tempfile.TemporaryDirectory() as folder:
        build_policy(folder, options.hidden, getattr(torch, options.dtype))
        config = EngineConfig(device="cpu", dtype=options.dtype, preset="plain")
        with ETSEngine.from_pretrained(folder, config=config) as engine:
            search = SearchConfig(width=options.width, seed=options.seed, max_step_tokens=40, max_tokens=160)
            engine.search("warm up", search.model_copy(update={"width": 2, "max_tokens": 20}), verifier=judge)
            scheduler = engine._worker._scheduler
            assert scheduler is not None
            runner = scheduler._models.runners[0]  # no public figure tells passes from what is between them
            base, head = runner._base, runner._head
            assert head is not None
            base.forward, head.forward = watch.around(base.forward), watch.around(head.forward)
            watch.seconds = 0.0
            result = engine.search("What comes after one, two and three?", search, verifier=judge)
    row = {
        "bench": "bookkeeping",
        "width": options.width,
        "parameters": sum(one.numel() for one in base.parameters()),
        "dtype": options.dtype,
        "tokens": result.generated_tokens,
        "decode_steps": result.timing.decode_steps,
        "wall_s": round(result.timing.wall_s, 3),
        "model_s": round(watch.seconds, 3),
        "outside_models": round(1 - watch.seconds / result.timing.wall_s, 4),
        **provenance(),
        "seed": options.seed,
    }
    print(f"{row['tokens']} tokens in {row['wall_s']} s, {row['outside_models']:.1%} of it outside passes and heads")
    print(json.dumps(row))
    if options.hidden >= 1024:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
