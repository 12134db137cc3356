"""Replay search trees through random weights: the engine at the size of real models, without a checkpoint.

A replay says which nodes get how many children of how many tokens (`replay.py`). All sides decode the same tree: ours
over the tree cache (`replay_searches.py`), fed the recorded tokens, with a token drawn at every step and thrown away,
and the peers (`replay_players.py`): `generate`, continuous batching, vLLM. They go on with what they draw, and all draw
the recorded number of tokens (`generate` in each round as many as the longest step has).

    python cookbook/bench_search.py --shape toy                        # seconds; writes no row
    python cookbook/bench_search.py --shape reference                  # the shape of the shipped policy; minutes
    python cookbook/bench_search.py --shape llama-3.2-1b --widths 16 --rounds 2 --sides ours --steps 0
    python cookbook/bench_search.py --shape llama-3.1-8b --device cuda --peer-rounds 2
    python cookbook/bench_search.py --shape qwen2.5-7b --device cuda --trees FILE.json --trace FOLDER
    python cookbook/bench_search.py --shape llemma-7b --device cuda --widths 64 --sides --pools 49152 98304
    python cookbook/bench_search.py --roofline                         # the table of roofline.md; no model is run

vLLM takes half of a GPU for itself, and changes settings of the process: give it a run of its own (`--sides vllm`).
Where passes are CUDA graphs, ours plays every tree once before the clock runs, which captures them; the row says how
long that took. Without `--trees` and `--trace` the trees are grown by REBASE and ETS (`replay.grow`). Prints a table,
then one JSON line, and appends that line to `results/bench_search.jsonl`. "/ floor" is the time of all decode steps
over the sum of their floors: the larger of memory (weights and every distinct KV token read once, at the speed of a
large copy) and matmul (2 x weights x rows, at the speed of a large product). What the copy and the product measure is
part of the row; on a busy machine both are low, and the ratio flatters. CPU seconds stand beside the wall times in the
row.

`--pools` then plays several searches at once: `--together` trees of each strategy and width, grown from seeds in a row,
in a KV pool of so many tokens. Each runs in the same forward passes as the others, and the next one starts as soon as
the peaks of those that run leave room for its own. So the smaller trees are, the more searches share the reading of the
weights. A tree that does not fit alone is not run; ETS is set against REBASE where all trees of both are. `--sides`
without a name leaves the trees alone out.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from replay import Replay, decode_steps, grow, read_traces, read_trees
from replay_floors import (
    H200,
    REAL,
    SHAPES,
    STRATEGIES,
    WIDTHS,
    Shape,
    Speed,
    floor_s,
    num_parameters,
    roofline,
    step_bytes,
    step_flops,
)
from replay_players import (
    WARM_UP,
    Ids,
    Played,
    Player,
    attempt,
    build_models,
    continuous_player,
    generate_player,
    share_weights,
    token_ids,
    vllm_player,
    widest,
)
from replay_pools import play_pools
from replay_searches import our_player, peak_pages
from transformers import PreTrainedModel

from ets_engine.config import EngineConfig
from ets_engine.evaluation.machine import copy_gb_s, matmul_flops_per_s, provenance
from ets_engine.runtime import Runner

RESULTS = Path(__file__).parent / "results" / "bench_search.jsonl"
SIDES = ("ours", "generate", "continuous", "vllm")


# ------------------------------------------------------------------ one by one


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
    options: argparse.Namespace, runner: Runner | None, plain: PreTrainedModel, context_tokens: int
) -> dict[str, Player]:
    """The sides asked for that run here; why the others do not is printed. `ours` needs a runner."""
    makers: dict[str, Callable[[], Player]] = {
        "generate": lambda: generate_player(plain),
        "continuous": lambda: continuous_player(share_weights(plain)),  # it changes the model's attention
        "vllm": lambda: vllm_player(plain, plain.dtype, context_tokens),
    }
    if runner is not None:
        makers["ours"] = lambda: our_player(runner, options.seed)
    ids = token_ids(WARM_UP, plain.config.vocab_size, options.seed)
    players = {name: player for name in options.sides if (player := attempt(name, makers[name])) is not None}
    return {name: play for name, play in players.items() if attempt(name, partial(play, WARM_UP, ids)) is not None}


def play_alone(
    options: argparse.Namespace,
    asked: Sequence[tuple[Replay, list[str]]],
    runner: Runner | None,
    plain: PreTrainedModel,
    shape: Shape,
    speed: Speed,
) -> dict[str, Any]:
    """Every side on every tree that it is asked for, interleaved, then the leak check."""
    work = [(replay, token_ids(replay, shape.vocabulary, options.seed)) for replay, _ in asked]
    context_tokens = max(replay.longest_path_tokens for replay, _ in asked)
    players = make_players(options, runner, plain, context_tokens)
    print(f"{'tree':24}{'side':12}{'tokens/s':>10}{'s':>9}{'mean KV':>10}{'peak KV':>10}{'peak MB':>10}", end="")
    print(f"{'step ms':>10}{'floor ms':>10}{'/ floor':>9}")
    rows: list[dict[str, Any]] = []
    for (replay, ids), (_, names) in zip(work, asked, strict=True):
        runs: dict[str, list[Played]] = {name: [] for name in players if name in names}
        first_s = players["ours"](replay, ids).seconds if runner is not None and runner.uses_graphs else None
        for _ in range(options.repeats):
            for name in list(runs):
                if (played := attempt(name, partial(players[name], replay, ids))) is None:
                    del players[name], runs[name]
                else:
                    runs[name].append(played)
        sides = {name: describe(played, replay, shape, plain.dtype.itemsize, speed) for name, played in runs.items()}
        rows.append(
            {
                "tree": replay.name,
                "prompt_tokens": replay.prompt_tokens,
                "tokens": replay.generated_tokens,
                "rounds": len(replay.rounds),
                "width": widest(replay),
                "ours_capturing_s": first_s and round(first_s, 3),
                "sides": sides,
            }
        )
        for name, side in sides.items():
            print_side(replay, name, side)
    ratios = compare_strategies(rows)
    for width, ratio in ratios.items():
        print(
            f"width {width}: ETS's tree {ratio['searches_per_s_ratio']} x the searches/s of REBASE's, "
            f"1/{ratio['mean_kv_ratio']} of the mean KV"
        )
    found: dict[str, Any] = {"trees": rows, "ets_over_rebase": ratios}
    if options.steps and runner is not None:
        found["memory"] = check_leaks(runner, players["ours"], work, options.steps)
        print("memory: " + ", ".join(f"{name} {value}" for name, value in found["memory"].items()))
    return found


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


# ------------------------------------------------------------------ the run


def bench(options: argparse.Namespace, shape: Shape, dtype: torch.dtype) -> dict[str, Any]:
    """The trees one by one, then several at once."""
    speed = Speed(1e9 * copy_gb_s(options.device), matmul_flops_per_s(dtype, options.device))
    asked = load_replays(options, shape)
    model, plain = build_models(shape, dtype, options.device, options.seed)
    runner = None
    if "ours" in options.sides or options.pools:
        runner = Runner(model, EngineConfig(compile_layers=options.compile, kv_pool_tokens=pool_for(asked)))
    row: dict[str, Any] = {
        "bench": "search",
        "shape": options.shape,
        "model": asdict(shape),
        "parameters": num_parameters(shape),
        "dtype": str(dtype).removeprefix("torch."),
        "compiled": options.compile,
        "uses_graphs": runner is not None and runner.uses_graphs,
        "copy_gb_s": round(speed.bytes_per_s / 1e9, 1),
        "matmul_gflop_s": round(speed.flops_per_s / 1e9, 1),
        **provenance(options.device),
        "seed": options.seed,
    }
    if options.sides:
        row |= play_alone(options, asked, runner, plain, shape, speed)
    if (vllm := sys.modules.get("vllm")) is not None:
        row["vllm"] = vllm.__version__
    del plain  # where the runner has joined layers, theirs are separate weights, and pools are large
    if options.pools and runner is not None:
        row |= play_pools(options, runner, shape)
    return row


def pool_for(asked: Sequence[tuple[Replay, list[str]]]) -> int:
    """KV tokens that every tree fits in, one at a time; the rest of the memory is the peers'."""
    page_tokens = EngineConfig().page_tokens
    return page_tokens * max(peak_pages(replay, page_tokens) for replay in (WARM_UP, *(replay for replay, _ in asked)))


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
    parser.add_argument("--sides", nargs="*", default=list(SIDES), choices=SIDES, help="on each tree alone")
    parser.add_argument("--pools", type=int, nargs="+", default=[], help="KV tokens; then trees are played at once")
    parser.add_argument("--together", type=int, default=8, help="trees of each strategy and width in a pool")
    parser.add_argument("--steps", type=int, default=1000, help="decode steps of the leak check, 0 = none")
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], help="default: float32 for reference and toy")
    parser.add_argument("--device", default="cpu")
    parser.add_argument(
        "--compile", action="store_true", help="layers of ours that are not fused through torch.compile"
    )
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
