"""Thousands of short searches that are cancelled, late, interrupted, mistreated: nothing is lost and nothing leaks.

Random searches on the shipped models in a KV pool that is far too small for all of them: random strategies and
widths, cancelled ones, deadlines, callbacks and verifiers that raise, futures that are called off. Ends with the
engine's books checked: no page owned, every future done, memory flat. Then random bad input to `submit`: each ends in
a typed error or a result. Prints a table and appends a row to `results/soak.jsonl`.

    python cookbook/soak.py                      # 2,000 searches and 10,000 bad inputs; minutes
    python cookbook/soak.py --processes 2        # the same in two
    python cookbook/soak.py --searches 200 --inputs 500
"""

from __future__ import annotations

import argparse
import json
import resource
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future
from pathlib import Path
from random import Random
from typing import Any, get_args

from ets_engine import EngineConfig, ETSEngine, ETSError, QueueFullError, SearchConfig, SearchResult
from ets_engine.config import Strategy
from ets_engine.evaluation.machine import provenance
from ets_engine.reference.problems import draw

RESULTS = Path(__file__).parent / "results" / "soak.jsonl"
IN_FLIGHT = 48


class CallerError(Exception):
    """What a caller's own function raises here."""


def resident_mb() -> float:
    """Memory of this process now (MB)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 1e6


def submit_one(engine: ETSEngine, rng: Random, problem: str) -> tuple[str, Future[SearchResult]]:
    """A random search, perhaps a mistreated one; what is done to it."""
    config = SearchConfig(
        strategy=rng.choice(get_args(Strategy)),
        width=rng.choice((1, 2, 4, 8)),
        max_steps=rng.randint(1, 5),
        seed=rng.randrange(1000),
        deadline_s=rng.uniform(0.0001, 0.5) if rng.random() < 0.1 else None,
    )
    fate = rng.choices(
        ("plain", "cancelled", "called off", "raising callback", "raising verifier", "slow callback", "bad verifier"),
        (10, 3, 2, 2, 2, 1, 1),
    )[0]
    changes: dict[str, Any] = {}
    if fate == "cancelled":
        changes["cancel"] = event = threading.Event()
        timer = threading.Timer(rng.uniform(0, 0.2), event.set)
        timer.daemon = True
        timer.start()
    elif fate == "raising callback":
        kind = rng.choice(("start", "step", "end"))

        def on_event(event: Any) -> None:
            if event.kind == kind:
                raise CallerError(kind)

        changes["on_event"] = on_event
    elif fate == "slow callback":
        changes["on_event"] = lambda event: time.sleep(0.02)
    elif fate == "raising verifier":

        def verifier(problem: str, steps: Sequence[str]) -> float:
            if rng.random() < 0.3:
                raise CallerError("verifier")
            return 0.5

        changes["verifier"] = verifier
    elif fate == "bad verifier":
        changes["verifier"] = lambda problem, steps: rng.choice((float("nan"), 2.0, "no", None, 0.5))
    while True:
        try:
            future = engine.submit(problem, config, **changes)
            break
        except QueueFullError:
            time.sleep(0.01)
    if fate == "called off":
        future.cancel()
    return fate, future


def soak(searches: int, seed: int, processes: int) -> dict[str, object]:
    """Many searches at once; what came out, and the books afterwards."""
    rng = Random(f"soak/{seed}")
    problems = [draw(rng, "countdown", rng.choice((4, 5, 6)), held_out=True)[0].problem for _ in range(200)]
    tiny = {"kv_pool_tokens": 1536, "prefix_cache_tokens": 256, "max_queued_searches": 24}
    config = EngineConfig(device="cpu", processes=processes, **tiny)
    outcomes: Counter[str] = Counter()
    memory_mb: list[float] = []
    lost = 0
    with ETSEngine.from_pretrained("reference", config=config) as engine:
        pending: list[tuple[str, Future[SearchResult]]] = []
        started_s = time.perf_counter()
        for count in range(searches):
            pending.append(submit_one(engine, rng, rng.choice(problems)))
            if len(pending) >= IN_FLIGHT:
                lost += settle(pending.pop(0), outcomes)
            if count % max(1, searches // 20) == 0:
                memory_mb.append(resident_mb())
        for one in pending:
            lost += settle(one, outcomes)
        seconds = time.perf_counter() - started_s
        until_s = time.monotonic() + 10
        while (stats := engine.stats()).live + stats.waiting and time.monotonic() < until_s:
            time.sleep(0.01)
        memory_mb.append(resident_mb())
        owned = stats.kv_tokens - stats.prefix_tokens
    half = len(memory_mb) // 2
    return {
        "searches": searches,
        "processes": processes,
        "seconds": round(seconds, 1),
        "lost_futures": lost,
        "kv_tokens_owned_at_the_end": owned,
        "preemptions": stats.preemptions,
        "memory_mb_half_way": round(memory_mb[half], 1),
        "memory_mb_at_the_end": round(memory_mb[-1], 1),
        "outcomes": dict(sorted(outcomes.items())),
    }


def settle(one: tuple[str, Future[SearchResult]], outcomes: Counter[str]) -> int:
    """Wait for a search; 1 when it never ends."""
    fate, future = one
    try:
        outcome = future.result(timeout=60).finish_reason
    except TimeoutError:
        return 1
    except (CancelledError, CallerError, ETSError) as error:
        outcome = type(error).__name__
    outcomes[f"{fate}: {outcome}"] += 1
    return 0


def bad_input(rng: Random) -> tuple[Any, dict[str, Any]]:
    """A problem and settings, most of them nonsense."""
    problem = rng.choice(
        (
            "Use 4, 6, 10 and 19 to make 16.",
            "",
            " ",
            "Use 4 and 4.",
            "Use 1, 2, 3 and 4 to make " + "9" * rng.randint(1, 400) + ".",
            "".join(chr(rng.choice((rng.randrange(32, 127), rng.randrange(0x110000 - 2048)))) for _ in range(9)),
            "Some friends compare what they have.",
            None,
            17,
            ["Use 4, 6, 10 and 19 to make 16."],
            b"bytes",
        )
    )
    values = (-1, 0, 1, 2, 10**9, 1.5, float("nan"), float("inf"), None, "ets", "", [], {}, True)
    names = [*SearchConfig.model_fields, "nonsense"]
    return problem, {rng.choice(names): rng.choice(values) for _ in range(rng.choice((0, 1, 1, 2)))}


def try_bad_inputs(count: int, seed: int) -> dict[str, object]:
    """Random nonsense to `submit`; how each ended."""
    rng = Random(f"inputs/{seed}")
    endings: Counter[str] = Counter()
    with ETSEngine.from_pretrained("reference", config=EngineConfig(device="cpu", kv_pool_tokens=4096)) as engine:
        for _ in range(count):
            problem, settings = bad_input(rng)
            try:
                config = SearchConfig(**{"width": 2, "max_steps": 2, **settings, "deadline_s": 1.0})
                outcome = engine.submit(problem, config).result(timeout=60).finish_reason
            except ETSError as error:
                outcome = type(error).__name__
            except Exception as error:
                outcome = f"UNTYPED {type(error).__name__}: {error} for {problem!r:.60} {settings}"
            endings[outcome] += 1
    untyped = {name: number for name, number in endings.items() if name.startswith("UNTYPED")}
    return {"inputs": count, "untyped_errors": untyped, "endings": dict(sorted(endings.items()))}


def main(arguments: Sequence[str] | None = None) -> dict[str, object]:
    """Run both, print them, and return the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--searches", type=int, default=2000)
    parser.add_argument("--inputs", type=int, default=10000)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    row: dict[str, object] = {"bench": "soak", **soak(options.searches, options.seed, options.processes)}
    row |= try_bad_inputs(options.inputs, options.seed)
    row |= {**provenance(), "seed": options.seed}
    for name, value in row.items():
        print(f"{name}: {value}")
    if options.searches >= 1000:
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
