"""Replay search trees through random weights: the engine at the size of real models, without a checkpoint.

A replay says which nodes get how many children of how many tokens (`replay.py`). All sides decode the same tree: ours
over the tree cache, fed the recorded tokens, with a token drawn at every step and thrown away; `generate`, which reads
whole padded paths anew each round; transformers' continuous batching and vLLM, which find read prefixes in their
caches. The last three go on with what they draw, and all draw the recorded number of tokens (`generate` in each round
as many as the longest step has).

    python cookbook/bench_search.py --shape toy                        # seconds; writes no row
    python cookbook/bench_search.py --shape reference                  # the shape of the shipped policy; minutes
    python cookbook/bench_search.py --shape llama-3.2-1b --widths 16 --rounds 2 --sides ours --steps 0
    python cookbook/bench_search.py --shape llama-3.1-8b --device cuda --compile --peer-rounds 2
    python cookbook/bench_search.py --shape qwen2.5-7b --device cuda --trees FILE.json --trace FOLDER
    python cookbook/bench_search.py --roofline                         # the table of roofline.md; no model is run

Where passes are CUDA graphs, ours plays every tree once before the clock runs, which captures them; the row says how
long that took. Without `--trees` and `--trace` the trees are grown by REBASE and ETS (`replay.grow`). Prints a table,
then one JSON line, and appends that line to `results/bench_search.jsonl`. "/ floor" is the time of all decode steps
over the sum of their floors: the larger of memory (weights and every distinct KV token read once, at the speed of a
large copy) and matmul (2 x weights x rows, at the speed of a large product). What the copy and the product measure is
part of the row; on a busy machine both are low, and the ratio flatters. CPU seconds stand beside the wall times in the
row.
"""

from __future__ import annotations

import argparse
import copy
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from replay import MATH500, DecodeStep, Replay, Round, Workload, decode_steps, grow, read_traces, read_trees
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from ets_engine.config import EngineConfig
from ets_engine.evaluation.machine import copy_gb_s, provenance
from ets_engine.runtime import Runner, SamplingParams, uniforms
from ets_engine.runtime.transfer import Readback, upload

RESULTS = Path(__file__).parent / "results" / "bench_search.jsonl"
SIDES = ("ours", "generate", "continuous", "vllm")
STRATEGIES = ("rebase", "ets")
WIDTHS = (16, 64, 256)
WARM_UP = Replay("warm-up", 8, (Round((0, 0), (3, 2)), Round((1, 1), (2, 2))))
T = TypeVar("T")
Ids = list[list[int]]  # of each node


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
    "reference": Shape("llama", 6, 192, 512, 6, 3, 32, 133, tied=True, work=Workload(30, 12, 28, 5), widths=(16, 64)),
    "toy": Shape("llama", 2, 64, 128, 4, 2, 16, 256, tied=True, work=Workload(24, 3, 8, 4), widths=(4, 8)),
}
REAL = ("llama-3.2-1b", "qwen2.5-7b", "llama-3.1-8b")


@dataclass(frozen=True, slots=True)
class Speed:
    """Of a machine: bytes per second through memory, floating-point operations per second in a large matmul."""

    bytes_per_s: float
    flops_per_s: float


H200 = Speed(4.8e12, 989e12)  # as published: HBM3e bandwidth, dense bf16


class Unavailable(Exception):
    """Why a peer cannot run here."""


@dataclass(frozen=True, slots=True)
class Played:
    """One replay by one side; KV figures are None where a side does not show them.

    Attributes:
        seconds, cpu_seconds: From the prompt to the last token.
        step_seconds: Of each decode step, drawing included, in the order of `decode_steps`; empty for peers.
        mean_kv_tokens, peak_kv_tokens: Held, over decode steps.
        peak_kv_bytes: Memory behind the peak, rounding up to pages included.
    """

    seconds: float
    cpu_seconds: float
    step_seconds: tuple[float, ...] = ()
    mean_kv_tokens: float | None = None
    peak_kv_tokens: int | None = None
    peak_kv_bytes: int | None = None


Player = Callable[[Replay, Ids], Played]


# ------------------------------------------------------------------ models and floors


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


def build_models(shape: Shape, dtype: torch.dtype, device: str, seed: int) -> tuple[PreTrainedModel, PreTrainedModel]:
    """Two models over the same random weights: one for the runner, which changes its attention, one for the peers."""
    torch.manual_seed(seed)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(model_config(shape), dtype=dtype).eval()
    return model, share_weights(model)


def share_weights(model: PreTrainedModel) -> PreTrainedModel:
    """A copy with a config of its own over the same weights."""
    return copy.deepcopy(model, {id(one): one for one in model.parameters()})


def matmul_flops_per_s(dtype: torch.dtype, device: str, repeats: int = 5) -> float:
    """Of a large square product, the best of some tries."""
    size = 8192 if device.startswith("cuda") else 1024
    left = torch.randn((size, size), device=device).to(dtype)
    best_s = float("inf")
    for _ in range(repeats + 1):  # the first one prepares
        began_s = time.perf_counter()
        torch.mm(left, left)
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * size**3 / best_s


def step_bytes(step: DecodeStep, shape: Shape, itemsize: int) -> int:
    """Weights once and every distinct KV token once."""
    return (shape.read_weights + step.read_tokens * shape.kv_numbers) * itemsize


def step_flops(step: DecodeStep, shape: Shape) -> int:
    """2 x weights x rows; attention, a few percent at these lengths, is left out."""
    return 2 * shape.read_weights * step.rows


def floor_s(step: DecodeStep, shape: Shape, itemsize: int, speed: Speed) -> float:
    """Seconds below which the step cannot go on a machine."""
    return max(step_bytes(step, shape, itemsize) / speed.bytes_per_s, step_flops(step, shape) / speed.flops_per_s)


# ------------------------------------------------------------------ the sides


def token_ids(tree: Replay, vocabulary: int, seed: int) -> Ids:
    """Random ids for every node, as many as were recorded; 0 is padding and left out."""
    rng = np.random.default_rng(seed)
    counts = [tree.prompt_tokens, *(count for one in tree.rounds for count in one.num_tokens)]
    return [rng.integers(1, vocabulary, count).tolist() for count in counts]


def our_player(runner: Runner, seed: int = 0) -> Player:
    """Over the tree cache: forks, one token per live branch and forward pass, releases as the replay says."""
    tree, sampling, readback = runner.tree, SamplingParams(), Readback(runner.device)
    drawn = torch.empty(0)

    def sample(hidden: torch.Tensor, states: Sequence[int], nodes: Sequence[int], positions: Sequence[int]) -> None:
        """A token for each node from its row of the hidden states, as a search would."""
        nonlocal drawn
        if list(states) != list(range(len(hidden))):
            hidden = hidden[upload(states, runner.device, torch.int64)]
        drawn = runner.draw(hidden, [sampling] * len(nodes), uniforms([seed] * len(nodes), nodes, positions))[0]
        readback.mark()

    def read() -> None:
        """The tokens drawn last; a GPU is at work on the next pass by then, as in a search."""
        with readback.reading():
            drawn.tolist()

    readback.mark()

    @torch.inference_mode()
    def play(replay: Replay, ids: Ids) -> Played:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        tree.reset_peak()
        leaves = {0: (tree.root(), ids[0])}  # KV node, and the tokens at its end that are not read yet
        step_seconds, resident = [], []
        for one, children in replay.numbered():
            for node in leaves.keys() - set(one.retained):
                tree.release(leaves.pop(node)[0])
            step_s = time.perf_counter()
            hidden = runner.extend_last([leaves[node] for node in one.retained])
            read()
            rows = {node: row for row, node in enumerate(one.retained)}
            handles = [tree.fork(leaves[parent][0]) for parent in one.parents]
            ends = [tree.path_tokens(handle) for handle in handles]
            sample(hidden, [rows[parent] for parent in one.parents], children, ends)
            if one.retained != (0,):
                step_seconds.append(time.perf_counter() - step_s)
                resident.append(tree.resident_tokens)
            for done in range(1, max(one.num_tokens)):
                step_s = time.perf_counter()
                live = [row for row, count in enumerate(one.num_tokens) if count > done]
                hidden = runner.extend_last([(handles[row], [ids[children[row]][done - 1]]) for row in live])
                read()
                sample(hidden, range(len(live)), [children[row] for row in live], [ends[row] + done for row in live])
                step_seconds.append(time.perf_counter() - step_s)
                resident.append(tree.resident_tokens)
            leaves |= {child: (handle, ids[child][-1:]) for child, handle in zip(children, handles, strict=True)}
        read()
        for handle, _ in leaves.values():
            tree.release(handle)
        return Played(
            time.perf_counter() - began_s,
            time.process_time() - cpu_s,
            tuple(step_seconds),
            statistics.mean(resident) if resident else 0.0,
            tree.peak_tokens,
            tree.peak_pages * tree.pool.page_tokens * runner.bytes_per_token,
        )

    return play


def generate_player(model: PreTrainedModel) -> Player:
    """One `generate` per round on whole paths, left-padded, each with KV of its own."""
    generate: Any = model.generate

    def play(replay: Replay, ids: Ids) -> Played:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        paths, held, peak_bytes = {0: ids[0]}, [], 0
        for one, children in replay.numbered():
            new = max(one.num_tokens)
            longest = max(len(paths[parent]) for parent in one.parents)
            padding = [longest - len(paths[parent]) for parent in one.parents]
            rows = [[0] * pad + paths[parent] for pad, parent in zip(padding, one.parents, strict=True)]
            mask = [[0] * pad + [1] * (longest - pad) for pad in padding]
            output = generate(
                torch.tensor(rows, device=model.device),
                attention_mask=torch.tensor(mask, device=model.device),
                do_sample=True,
                top_k=0,
                min_new_tokens=new,
                max_new_tokens=new,
                return_dict_in_generate=True,
            )
            cached = [tensor for layer in output.past_key_values.layers for tensor in (layer.keys, layer.values)]
            peak_bytes = max(peak_bytes, sum(tensor.nbytes for tensor in cached))
            held += [len(rows) * (longest + done) for done in range(1, new)]
            drawn = output.sequences[:, longest:].tolist()
            paths = {
                child: paths[parent] + drawn[row][:count]
                for row, (child, parent, count) in enumerate(zip(children, one.parents, one.num_tokens, strict=True))
            }
        seconds = time.perf_counter() - began_s, time.process_time() - cpu_s
        return Played(*seconds, (), statistics.mean(held or [0]), max(held, default=0), peak_bytes)

    return play


def continuous_player(model: PreTrainedModel) -> Player:
    """Continuous batching of transformers: paged, finds read prefixes again, ends every path with its step."""
    from transformers.generation.configuration_utils import ContinuousBatchingConfig

    page_tokens = 32  # short enough for steps to be shared; the default of 256 would share little
    settings = GenerationConfig(do_sample=True, top_k=0, max_new_tokens=1, eos_token_id=-1, pad_token_id=0)
    serve: Any = model.continuous_batching_context_manager

    def play(replay: Replay, ids: Ids) -> Played:
        pages = (replay.longest_path_tokens // page_tokens + 2) * _widest(replay)  # nothing shared at worst
        on_cpu = model.device.type == "cpu"  # where it cannot tell how much memory is free
        config = ContinuousBatchingConfig(
            page_size=page_tokens,
            num_blocks=pages if on_cpu else None,
            max_batch_tokens=max(2048, _widest(replay)) if on_cpu else None,
        )
        with serve(settings, continuous_batching_config=config) as manager:
            began_s, cpu_s = time.perf_counter(), time.process_time()
            paths = {0: ids[0]}
            for one, children in replay.numbered():
                asked = {
                    manager.add_request(paths[parent], max_new_tokens=count): (child, parent)
                    for child, parent, count in zip(children, one.parents, one.num_tokens, strict=True)
                }
                grown: dict[int, list[int]] = {}
                while len(grown) < len(asked):
                    result = manager.get_result(timeout=1)
                    if result is None and not manager.is_running():
                        raise Unavailable("its generation thread ended")
                    if result is None or not result.is_finished():
                        continue
                    if result.error is not None:
                        raise Unavailable(f"it failed: {result.error}")
                    child, parent = asked[result.request_id]
                    grown[child] = paths[parent] + list(result.generated_tokens)
                paths = grown
            return Played(time.perf_counter() - began_s, time.process_time() - cpu_s)

    return play


def vllm_player(model: PreTrainedModel, dtype: torch.dtype, context_tokens: int) -> Player:
    """A vLLM with random weights of the same shape and its prefix cache on; half of the GPU is its own."""
    try:
        import vllm  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise Unavailable("vllm is not installed") from None
    with tempfile.TemporaryDirectory() as folder:
        model.config.save_pretrained(folder)
        llm = vllm.LLM(
            model=folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            dtype=str(dtype).removeprefix("torch."),
            enable_prefix_caching=True,
            max_model_len=context_tokens,
            gpu_memory_utilization=0.5,
        )

    def play(replay: Replay, ids: Ids) -> Played:
        began_s, cpu_s = time.perf_counter(), time.process_time()
        paths = {0: ids[0]}
        for one, children in replay.numbered():
            outputs = llm.generate(
                [{"prompt_token_ids": paths[parent]} for parent in one.parents],
                [vllm.SamplingParams(max_tokens=count, ignore_eos=True, detokenize=False) for count in one.num_tokens],
                use_tqdm=False,
            )
            paths = {
                child: paths[parent] + list(output.outputs[0].token_ids)
                for child, parent, output in zip(children, one.parents, outputs, strict=True)
            }
        return Played(time.perf_counter() - began_s, time.process_time() - cpu_s)

    return play


def _widest(replay: Replay) -> int:
    return max(len(one.parents) for one in replay.rounds)


# ------------------------------------------------------------------ the run


def describe(played: Sequence[Played], replay: Replay, shape: Shape, itemsize: int, speed: Speed) -> dict[str, Any]:
    """One side's figures on one tree, from all of its runs."""
    seconds = [one.seconds for one in played]
    last = played[-1]
    row: dict[str, Any] = {
        "seconds": [round(one, 4) for one in seconds],
        "cpu_seconds": [round(one.cpu_seconds, 4) for one in played],
        "tokens_per_s": round(replay.generated_tokens / statistics.median(seconds), 1),
        "mean_kv_tokens": None if last.mean_kv_tokens is None else round(last.mean_kv_tokens, 1),
        "peak_kv_tokens": last.peak_kv_tokens,
        "peak_kv_bytes": last.peak_kv_bytes,
    }
    if last.mean_kv_tokens is not None:
        row["mean_kv_bytes"] = round(last.mean_kv_tokens * shape.kv_numbers * itemsize)
    if last.step_seconds:
        steps = decode_steps(replay)
        floors = [floor_s(step, shape, itemsize, speed) for step in steps]
        memory = [step_bytes(step, shape, itemsize) / speed.bytes_per_s for step in steps]
        matmul = [step_flops(step, shape) / speed.flops_per_s for step in steps]
        per_step = [statistics.median(times) for times in zip(*(one.step_seconds for one in played), strict=True)]
        assert len(per_step) == len(steps), "the engine took other decode steps than the replay says"
        row |= {
            "decode_steps": len(steps),
            "step_ms": round(1e3 * statistics.mean(per_step), 3),
            "memory_floor_ms": round(1e3 * statistics.mean(memory), 3),
            "matmul_floor_ms": round(1e3 * statistics.mean(matmul), 3),
            "over_floor": round(sum(per_step) / sum(floors), 2),
        }
    return row


def held_bytes(device: str) -> int:
    """Memory that is in use now: of the GPU by tensors, else of the process."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def check_leaks(runner: Runner, play: Player, work: Sequence[tuple[Replay, Ids]], steps: int) -> dict[str, Any]:
    """Decode until so many steps are done and say by how much memory grew; the trees were all played before."""
    device = str(runner.device)
    on_gpu = device.startswith("cuda")
    before = held_bytes(device)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    done = searches = 0
    while done < steps:
        replay, ids = work[searches % len(work)]
        done += len(play(replay, ids).step_seconds)
        searches += 1
    runner.tree.check_integrity()
    assert runner.tree.resident_tokens == 0, f"{runner.tree.resident_tokens} KV tokens are held by nobody"
    weights = sum(one.nbytes for one in runner.model.parameters())
    row: dict[str, Any] = {
        "decode_steps": done,
        "searches": searches,
        "growth_bytes": held_bytes(device) - before,
        "weight_bytes": weights,
        "pool_bytes": runner.tree.pool.allocated_bytes,
    }
    if on_gpu:
        row["peak_bytes"] = torch.cuda.max_memory_allocated(device)
        row["peak_over_weights_and_pool"] = round(row["peak_bytes"] / (weights + row["pool_bytes"]), 3)
    return row


def load_replays(options: argparse.Namespace, shape: Shape) -> list[tuple[Replay, list[str]]]:
    """Recorded trees, evenly picked to `--limit`, or grown ones, and the sides that play each."""
    recorded: list[Replay] = []
    for path, read in ((options.trace, read_traces), (options.trees, read_trees)):
        if path is not None:
            found = read(path)
            recorded += found[:: -(-len(found) // options.limit)]
    widths = options.widths or shape.widths
    grown = [grow(strategy, width, shape.work, options.seed) for width in widths for strategy in STRATEGIES]
    replays = [replay.cut(options.rounds) for replay in recorded or grown]
    if options.peer_rounds is None:
        return [(replay, options.sides) for replay in replays]
    first = [
        replace(replay.cut(options.peer_rounds), name=f"{replay.name}/{options.peer_rounds}") for replay in replays
    ]
    return [(replay, ["ours"]) for replay in replays] + [(replay, options.sides) for replay in first]


def compare_strategies(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """ETS's grown trees against REBASE's, by width: searches per second and mean KV."""
    ours = {row["tree"]: row["sides"]["ours"] for row in rows if "ours" in row["sides"]}
    found = {}
    for name in ours:
        strategy, _, width = name.partition("@")
        if strategy == "ets" and (other := ours.get(f"rebase@{width}")) is not None:
            mine = ours[name]
            found[width] = {
                "searches_per_s_ratio": round(
                    statistics.median(other["seconds"]) / statistics.median(mine["seconds"]), 3
                ),
                "mean_kv_ratio": round(other["mean_kv_tokens"] / mine["mean_kv_tokens"], 3),
            }
    return found


def make_players(
    options: argparse.Namespace, runner: Runner, plain: PreTrainedModel, context_tokens: int
) -> dict[str, Player]:
    """The sides asked for that run here; why the others do not is printed."""
    makers: dict[str, Callable[[], Player]] = {
        "ours": lambda: our_player(runner, options.seed),
        "generate": lambda: generate_player(plain),
        "continuous": lambda: continuous_player(share_weights(plain)),  # it changes the model's attention
        "vllm": lambda: vllm_player(plain, runner.dtype, context_tokens),
    }
    ids = token_ids(WARM_UP, plain.config.vocab_size, options.seed)
    players = {name: player for name in options.sides if (player := attempt(name, makers[name])) is not None}
    return {name: play for name, play in players.items() if attempt(name, partial(play, WARM_UP, ids)) is not None}


def attempt(name: str, work: Callable[[], T]) -> T | None:
    """What the work returns; None, and a line that says why, where a peer fails. A failure of ours is raised."""
    try:
        return work()
    except Exception as error:
        if name == "ours":
            raise
        print(f"{name}: skipped, {(str(error) or type(error).__name__).splitlines()[0]:.200}")
        return None


def bench(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """Every side on every tree, interleaved, then the leak check."""
    speed = Speed(1e9 * copy_gb_s(options.device), matmul_flops_per_s(dtype, options.device))
    asked = load_replays(options, shape)
    model, plain = build_models(shape, dtype, options.device, options.seed)
    runner = Runner(model, EngineConfig(compile_layers=options.compile))
    work = [(replay, token_ids(replay, shape.vocabulary, options.seed)) for replay, _ in asked]
    context_tokens = max(replay.longest_path_tokens for replay, _ in asked)
    players = make_players(options, runner, plain, context_tokens)
    print(f"{'tree':24}{'side':12}{'tokens/s':>10}{'s':>9}{'mean KV':>10}{'peak KV':>10}{'peak MB':>10}", end="")
    print(f"{'step ms':>10}{'floor ms':>10}{'/ floor':>9}")
    rows: list[dict[str, Any]] = []
    for (replay, ids), (_, sides_asked) in zip(work, asked, strict=True):
        runs: dict[str, list[Played]] = {name: [] for name in players if name in sides_asked}
        first_s = players["ours"](replay, ids).seconds if runner.uses_graphs and "ours" in players else None
        for _ in range(options.repeats):
            for name in list(runs):
                if (played := attempt(name, partial(players[name], replay, ids))) is None:
                    del players[name], runs[name]
                else:
                    runs[name].append(played)
        sides = {name: describe(played, replay, shape, dtype.itemsize, speed) for name, played in runs.items()}
        rows.append(
            {
                "tree": replay.name,
                "prompt_tokens": replay.prompt_tokens,
                "tokens": replay.generated_tokens,
                "rounds": len(replay.rounds),
                "width": _widest(replay),
                "ours_capturing_s": first_s and round(first_s, 3),
                "sides": sides,
            }
        )
        for name, side in sides.items():
            print_side(replay, name, side)
    row = {
        "bench": "search",
        "shape": options.shape,
        "model": asdict(shape),
        "parameters": num_parameters(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": options.compile,
        "uses_graphs": runner.uses_graphs,
        "copy_gb_s": round(speed.bytes_per_s / 1e9, 1),
        "matmul_gflop_s": round(speed.flops_per_s / 1e9, 1),
        "trees": rows,
        "ets_over_rebase": compare_strategies(rows),
        **provenance(options.device),
        "seed": options.seed,
    }
    for width, ratio in row["ets_over_rebase"].items():
        print(
            f"width {width}: ETS's tree {ratio['searches_per_s_ratio']} x the searches/s of REBASE's, "
            f"1/{ratio['mean_kv_ratio']} of the mean KV"
        )
    if options.steps and "ours" in players:
        row["memory"] = check_leaks(runner, players["ours"], work, options.steps)
        print("memory: " + ", ".join(f"{name} {value}" for name, value in row["memory"].items()))
    return row


def print_side(replay: Replay, name: str, side: dict[str, Any]) -> None:
    """One line of the table."""

    def cell(value: float | None, width: int, digits: int) -> str:
        return f"{'-':>{width}}" if value is None else f"{value:{width}.{digits}f}"

    peak_bytes, floors = side["peak_kv_bytes"], (side.get("memory_floor_ms"), side.get("matmul_floor_ms"))
    print(
        f"{replay.name:24.23}{name:12}",
        cell(side["tokens_per_s"], 10, 1),
        cell(statistics.median(side["seconds"]), 9, 2),
        cell(side["mean_kv_tokens"], 10, 0),
        cell(side["peak_kv_tokens"], 10, 0),
        cell(None if peak_bytes is None else peak_bytes / 1e6, 10, 1),
        cell(side.get("step_ms"), 10, 2),
        cell(max((floor for floor in floors if floor is not None), default=None), 10, 2),
        cell(side.get("over_floor"), 9, 2),
        sep="",
        flush=True,
    )


# ------------------------------------------------------------------ the roofline


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


def main(arguments: Sequence[str] | None = None) -> dict[str, Any] | None:
    """Run the benchmark, print it, and return the row; None for the roofline."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="reference", choices=sorted(SHAPES))
    parser.add_argument(
        "--trace", type=Path, help="folder of `ets bench --trace`, or a file of `ets solve --json --tree`"
    )
    parser.add_argument("--trees", type=Path, help="JSON file of trees; `replay.read_trees` has the format")
    parser.add_argument("--limit", type=int, default=8, help="most trees of each of those, evenly picked")
    parser.add_argument("--widths", type=int, nargs="+", help="of the grown trees, instead of the shape's own")
    parser.add_argument("--rounds", type=int, help="only the first rounds of every tree")
    parser.add_argument(
        "--peer-rounds", type=int, help="peers play only so many rounds of every tree, and so does ours beside them"
    )
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES)
    parser.add_argument("--steps", type=int, default=1000, help="decode steps of the leak check, 0 = none")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 for reference and toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true", help="our layers through torch.compile")
    parser.add_argument("--threads", type=int, help="default: torch's own choice")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--roofline", action="store_true", help="print the table of roofline.md")
    options = parser.parse_args(arguments)
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    if options.roofline:
        here = Speed(1e9 * copy_gb_s(options.device), matmul_flops_per_s(torch.bfloat16, options.device))
        machine = provenance(options.device)
        print(
            f"here: {machine['machine']} {' '.join(machine['instructions'])}, {machine['threads']} threads, "
            f"{here.bytes_per_s / 1e9:.1f} GB/s copied, {here.flops_per_s / 1e9:.0f} GFLOP/s in a bf16 product\n"
        )
        print(roofline(options.widths or WIDTHS, options.seed, {"H200": H200, "here": here}))
        return None
    shape = SHAPES[options.shape]
    small = options.shape not in REAL and not options.device.startswith("cuda")
    dtype = getattr(torch, options.dtype or ("float32" if small else "bfloat16"))
    row = bench(options, shape, dtype)
    print(json.dumps(row))
    if options.shape != "toy":
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
