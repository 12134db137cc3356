"""Searches per second on the shipped models: alone, together, and through `transformers.generate`.

One run measures, interleaved: one search after another; the same searches submitted at once, to an engine of one
process and to one with a process per core; and the same search driven through `generate`, which reads every path anew
for each step, with a PRM that reads every solution from its beginning.
Prints ratios and where the time goes, and appends a row to `results/bench_serving.jsonl`.

    python cookbook/bench_serving.py                          # width 16, 32 searches, and width 64; minutes
    python cookbook/bench_serving.py --searches 8 --widths 16 --repeats 1
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from random import Random

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from ets_engine import EngineConfig, ETSEngine, SearchConfig
from ets_engine.evaluation.machine import provenance
from ets_engine.models import TrlFormat
from ets_engine.models.formats import begin_ids
from ets_engine.reference.problems import draw
from ets_engine.reference.shipped import policy_path, prm_path
from ets_engine.search import search
from ets_engine.search.drivers import run
from ets_engine.types import EngineStats, SearchResult, Step, StopReason

RESULTS = Path(__file__).parent / "results" / "bench_serving.jsonl"
MAX_STEP_TOKENS = 48


class GeneratePolicy:
    """A policy without a KV tree: one `generate` call per depth, on whole paths."""

    def __init__(self, model: torch.nn.Module, tokenizer: transformers.PreTrainedTokenizerBase, problem: str) -> None:
        self._model, self._tokenizer = model, tokenizer
        self._newline = tokenizer("\n", add_special_tokens=False)["input_ids"][-1]
        self._paths: dict[int, list[int]] = {0: begin_ids(tokenizer, problem)}
        self._states: dict[int, NDArray[np.float32]] = {}

    def start(self) -> int:
        """Tokens of the prompt."""
        return len(self._paths[0])

    @torch.inference_mode()
    def expand(self, parents: Sequence[int], children: Sequence[int]) -> list[Step]:
        """One step per child."""
        tokenizer, eos = self._tokenizer, self._tokenizer.eos_token_id
        longest = max(len(self._paths[parent]) for parent in parents)
        padding = [longest - len(self._paths[parent]) for parent in parents]
        ids = torch.tensor(
            [[tokenizer.pad_token_id] * pad + self._paths[one] for pad, one in zip(padding, parents, strict=True)]
        )
        mask = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in padding])
        output = self._model.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            top_k=0,
            max_new_tokens=MAX_STEP_TOKENS,
            eos_token_id=[self._newline, eos],
            pad_token_id=tokenizer.pad_token_id,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
        last = torch.stack([step[-1][:, -1] for step in output.hidden_states], dim=1)  # [B, new, hidden]
        steps = []
        for row, (parent, child) in enumerate(zip(parents, children, strict=True)):
            new = [token for token in output.sequences[row, longest:].tolist() if token != tokenizer.pad_token_id]
            ended = bool(new) and new[-1] == eos
            new = new[:-1] if ended else new
            stop = StopReason.FINISHED if ended else StopReason.BOUNDARY
            stop = stop if ended or (new and new[-1] == self._newline) else StopReason.LENGTH
            self._paths[child] = self._paths[parent] + new
            self._states[child] = last[row, : max(1, len(new))].mean(0).float().numpy()
            steps.append(Step(tokenizer.decode(new), len(new), stop))
        return steps

    def retain(self, leaves: Sequence[int]) -> None:
        """Nothing is kept between calls but token ids."""

    def embed(self, nodes: Sequence[int], texts: Sequence[str]) -> NDArray[np.float32]:
        """Mean hidden state of each step."""
        return np.stack([self._states[node] for node in nodes])


class RereadingVerifier:
    """A PRM without a KV tree: it reads every solution from its beginning."""

    def __init__(self, model: torch.nn.Module, format: TrlFormat, problem: str) -> None:
        self._model, self._format = model, format
        self._paths: dict[int, list[int]] = {0: format.root_ids(problem)}
        self.tokens = 0

    @torch.inference_mode()
    def score(self, nodes: Sequence[int], parents: Sequence[int], texts: Sequence[str]) -> list[float]:
        """Probability that all is right up to each step."""
        for node, parent, text in zip(nodes, parents, texts, strict=True):
            self._paths[node] = self._paths[parent] + self._format.step_ids(text)
        lengths = [len(self._paths[node]) for node in nodes]
        self.tokens += sum(lengths)
        pad = self._format.tokenizer.pad_token_id
        ids = torch.tensor([self._paths[n] + [pad] * (max(lengths) - len(self._paths[n])) for n in nodes])
        mask = torch.tensor([[1] * length + [0] * (max(lengths) - length) for length in lengths])
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        ends = torch.tensor(lengths) - 1
        return logits[torch.arange(len(nodes)), ends].softmax(-1)[:, 1].tolist()

    def retain(self, leaves: Sequence[int]) -> None:
        """Nothing is kept between calls but token ids."""


def peer(dtype: torch.dtype) -> Callable[[str, SearchConfig], int]:
    """Search by `generate`; returns the tokens that the PRM read."""
    policy = AutoModelForCausalLM.from_pretrained(policy_path(), dtype=dtype).eval()
    prm = AutoModelForTokenClassification.from_pretrained(prm_path(), dtype=dtype).eval()
    tokenizer, prm_format = (
        AutoTokenizer.from_pretrained(policy_path()),
        TrlFormat(AutoTokenizer.from_pretrained(prm_path())),
    )

    def search_once(problem: str, config: SearchConfig) -> int:
        torch.manual_seed(config.seed)
        own = GeneratePolicy(policy, tokenizer, problem)
        verifier = RereadingVerifier(prm, prm_format, problem)
        run(search(config), own, verifier, own)
        return verifier.tokens

    return search_once


def timed(work: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds."""
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - wall_s, time.process_time() - cpu_s


def model_seconds(before: EngineStats, after: EngineStats) -> float:
    """Seconds in forward passes and heads between two readings."""
    return after.policy_s + after.verifier_s - before.policy_s - before.verifier_s


def tree_of(result: SearchResult) -> list[tuple[int, int, str]]:
    """Every node that was sampled: its id, its parent and its text."""
    assert result.trace is not None
    return [(node.id, node.parent, node.text) for node in result.trace]


def same_trees(some: Sequence[SearchResult], others: Sequence[SearchResult]) -> float:
    """Share of searches with the same tree, in [0, 1]."""
    return statistics.mean(tree_of(one) == tree_of(other) for one, other in zip(some, others, strict=True))


def bench(
    engine: ETSEngine,
    crew: ETSEngine,
    problems: list[str],
    width: int,
    peer_problems: int,
    repeats: int,
    dtype: torch.dtype,
) -> dict[str, object]:
    """One width: alone, together in one process and in several, by generate; interleaved."""
    by_generate = peer(dtype)
    beside: list[SearchResult] = []
    spread: list[SearchResult] = []
    alone: list[tuple[float, float]] = []
    together: list[tuple[float, float]] = []
    in_processes: list[float] = []
    theirs: list[tuple[float, float]] = []
    outside: list[float] = []
    results: list[SearchResult] = []
    prm_tokens = reread = 0
    for repeat in range(repeats):
        config = SearchConfig(width=width, seed=repeat, max_step_tokens=MAX_STEP_TOKENS, trace=True)
        before = engine.stats()
        wall_s, cpu_s = timed(lambda config=config: results.extend(engine.search(one, config) for one in problems))
        alone.append((wall_s, cpu_s))
        outside.append(1 - model_seconds(before, engine.stats()) / wall_s)
        together.append(timed(lambda config=config: beside.extend(engine.search_many(problems, config))))
        in_processes.append(timed(lambda config=config: spread.extend(crew.search_many(problems, config)))[0])
        theirs.append(timed(lambda config=config: [by_generate(one, config) for one in problems[:peer_problems]]))
    for result in results:
        assert result.trace is not None
        to_node = {-1: 0}
        for node in result.trace:
            to_node[node.id] = to_node[node.parent] + node.num_tokens
        reread += sum(to_node[n.id] for n in result.trace[1:] if n.stop in (StopReason.BOUNDARY, StopReason.FINISHED))
        prm_tokens += result.verifier_tokens
    produced = sum(result.generated_tokens + result.prompt_tokens for result in results)
    per_search = [seconds / len(problems) for seconds, _ in alone]
    peer_per_search = [seconds / peer_problems for seconds, _ in theirs]
    return {
        "width": width,
        "searches": len(problems),
        "alone_s": [round(one, 4) for one in per_search],
        "together_s": [round(one / len(problems), 4) for one, _ in together],
        "in_processes_s": [round(one / len(problems), 4) for one in in_processes],
        "generate_s": [round(one, 4) for one in peer_per_search],
        "speedup_over_generate": round(statistics.median(peer_per_search) / statistics.median(per_search), 2),
        "speedup_together": round(
            statistics.median(one for one, _ in alone) / statistics.median(one for one, _ in together), 2
        ),
        "speedup_in_processes": round(statistics.median(one for one, _ in alone) / statistics.median(in_processes), 2),
        "cpu_speedup_together": round(
            statistics.median(one for _, one in alone) / statistics.median(one for _, one in together), 2
        ),
        "same_tree_together": round(same_trees(results, beside), 3),
        "same_tree_in_processes": round(same_trees(results, spread), 3),
        "outside_models": round(statistics.median(outside), 3),
        "prm_tokens_per_token": round(prm_tokens / produced, 3),
        "reread_tokens_per_token": round(reread / produced, 2),
    }


def main(arguments: Sequence[str] | None = None) -> list[dict[str, object]]:
    """Run the benchmark, print it, and return the rows."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=32)
    parser.add_argument("--widths", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--peer-searches", type=int, default=4, help="by generate, which is slow")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32", help="of all sides")
    parser.add_argument("--threads", type=int, default=1, help="of generate; the engine takes one for such models")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of the engine with several")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    rng = Random(f"serving/{options.seed}")
    problems = [draw(rng, "countdown", 4 + i % 3, held_out=True)[0].problem for i in range(options.searches)]
    rows = []
    one = EngineConfig(dtype=options.dtype)
    several = EngineConfig(dtype=options.dtype, processes=options.processes)
    with (
        ETSEngine.from_pretrained("reference", config=one) as engine,
        ETSEngine.from_pretrained("reference", config=several) as crew,
    ):
        for warmed in (engine, crew):
            warmed.search_many(problems[:8], SearchConfig(width=max(options.widths)))
        for width in options.widths:
            peers = min(options.peer_searches, len(problems))
            row = bench(engine, crew, problems, width, peers, options.repeats, getattr(torch, options.dtype))
            row |= {
                "bench": "serving",
                "dtype": options.dtype,
                "processes": options.processes,
                **provenance(),
                "seed": options.seed,
            }
            rows.append(row)
            print(
                f"width {width}: {row['speedup_over_generate']} x the searches per second of generate; "
                f"{options.searches} together {row['speedup_together']} x one at a time "
                f"({row['cpu_speedup_together']} x by CPU seconds), {row['same_tree_together']:.1%} of them with the "
                f"same tree, in {options.processes} processes {row['speedup_in_processes']} x, "
                f"{row['same_tree_in_processes']:.1%}; {row['outside_models']:.0%} of a search is outside "
                f"the models; the PRM reads {row['prm_tokens_per_token']} tokens per token, from scratch "
                f"{row['reread_tokens_per_token']}",
                flush=True,
            )
            print(json.dumps(row), flush=True)
            if options.repeats > 1:
                RESULTS.parent.mkdir(exist_ok=True)
                with RESULTS.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return rows


if __name__ == "__main__":
    main()
