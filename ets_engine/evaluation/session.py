"""One `ets bench` from its settings to its files; the commands print what it returns."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from ets_engine.config import REMOTE, EngineConfig, SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.evaluation.bench import Bench, OnResult, check_counts
from ets_engine.evaluation.grading import Mode
from ets_engine.evaluation.machine import copy_gb_s, provenance
from ets_engine.evaluation.methods import Method, check_base, methods_of
from ets_engine.evaluation.problems import EvalProblem, load_problems
from ets_engine.evaluation.records import Line, Record, Results, Settings
from ets_engine.evaluation.rows import Summary
from ets_engine.evaluation.same_cost import same_cost_methods, stale_methods
from ets_engine.evaluation.summary import summarise
from ets_engine.evaluation.tree_page import write_trace
from ets_engine.reference import REFERENCE, policy_path, prm_path
from ets_engine.runtime.threads import run_apart
from ets_engine.services import open_engine
from ets_engine.types import SearchResult

RESULTS, SUMMARY, REPORT, TRACES = "results.jsonl", "summary.json", "report.html", "traces"


@dataclass(frozen=True, slots=True)
class Plan:
    """What `ets bench` is asked for.

    Attributes:
        out: Folder of the results.
        model, verifier: As in `open_engine`. Of a model behind a server, KV is counted from the tree, latencies hold
            whatever the server's own prefix cache saves, and bandwidth and FLOPs are unknown.
        engine: Where and how they run.
        data, limit, data_seed: As in `load_problems`.
        strategies, widths: As in `methods_of`.
        seeds: How often each problem is solved, seeds 0, 1, ...
        mode, concurrency, latency_problems: As in `Bench`.
        base: Settings of every search, apart from strategy, width and seed.
        same_cost: Whether best-of-N is measured at the cost of each ETS row too; see `same_cost_methods`.
        trace: Whether each search's tree is written as well.
    """

    out: Path
    model: str = "reference"
    verifier: str | None = None
    engine: EngineConfig = field(default_factory=EngineConfig)
    data: str = "countdown"
    limit: int | None = None
    data_seed: int = 2026
    strategies: Sequence[str] = ("greedy", "best_of_n", "rebase", "ets")
    widths: Sequence[int] = (16,)
    seeds: int = 1
    mode: Mode = "math"
    concurrency: int = 16
    latency_problems: int = 20
    base: SearchConfig = field(default_factory=SearchConfig)
    same_cost: bool = False
    trace: bool = False

    def __post_init__(self) -> None:
        """Refuse at once what would fail, or do nothing, for every search."""
        there = next((one for one in (self.out, *self.out.parents) if one.exists()), self.out)
        if there.is_file():
            raise ConfigError(f"out={str(self.out)!r}: {str(there)!r} is a file; name a folder")
        check_counts(self.mode, self.seeds, self.concurrency, self.latency_problems)
        methods = methods_of(self.strategies, self.widths)
        for method in methods:
            method.check(self.base)
        check_base(methods, self.base)
        if self.model != REFERENCE and self.verifier is None:
            name = f"{REMOTE}..." if self.model.startswith(REMOTE) else self.model  # an address may hold a password
            raise ConfigError(f"model={name!r} needs a model that scores its steps: name a verifier")
        widths = {method.width for method in methods if method.strategy == "best_of_n"}
        if self.same_cost and (len(widths) < 2 or "ets" not in self.strategies):
            raise ConfigError("same_cost needs the strategies ets and best_of_n, and at least two widths")


def compare(
    plan: Plan, on_start: Callable[[int], None] = lambda total: None, on_result: OnResult | None = None
) -> Summary:
    """Measure what is missing in `plan.out`, and write its summary.

    Args:
        plan: What to measure.
        on_start: Called with the number of searches to come, once the models are loaded, and again for those whose
            settings depend on what the first ones cost.
        on_result: Called with every search.

    Returns:
        Of all that was measured on the plan's problems, by this run and by earlier ones.

    Raises:
        ConfigError: The data cannot be read, or the folder holds results of other settings.
        ModelLoadError: A model cannot be loaded.
        KeyboardInterrupt: What was measured until then is kept, in the summary too.
    """
    problems = load_problems(plan.data, limit=plan.limit, seed=plan.data_seed)
    places = {problem.id: place for place, problem in enumerate(problems)}
    methods = methods_of(plan.strategies, plan.widths)

    def keep(result: SearchResult | None, record: Record) -> None:
        if plan.trace and result is not None:
            name = re.sub(r"[^\w.-]+", "-", record.problem)  # ids may be anything, the place tells them apart
            name = name.encode()[:80].decode(errors="ignore")  # file systems count bytes
            name = f"{places[record.problem]}-{name}-seed{record.seed}.jsonl"
            write_trace(result, plan.out / TRACES / re.sub(r"[^\w@=.() -]+", "-", record.method) / name)
        if on_result is not None:
            on_result(result, record)

    # every prompt is read anew: else whichever method came first would pay for all of them
    engine_config = EngineConfig(**{**plan.engine.model_dump(), "prefix_cache_tokens": 0})
    with (
        _made(plan.out),
        open_engine(plan.model, plan.verifier, engine_config) as engine,
        closing(Results(plan.out / RESULTS, _settings(plan))) as results,
    ):
        bench = Bench(
            engine=engine,
            problems=problems,
            results=results,
            base=plan.base.model_copy(update={"trace": plan.trace}),
            seeds=range(plan.seeds),
            mode=plan.mode,
            concurrency=plan.concurrency,
            latency_problems=plan.latency_problems,
            processes=plan.engine.processes,
            on_result=keep,
        )

        def run(wanted: Sequence[Method]) -> None:
            total = bench.count(wanted)
            on_start(total)
            if total:
                bench.warm_up()
            bench.run(wanted)

        try:
            run(methods)
            if plan.same_cost:
                run(same_cost_methods(summarise(results.lines, problems).rows))
        finally:
            summary = _summarise_present(results.lines, problems)
            (plan.out / SUMMARY).write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def _summarise_present(lines: Sequence[Line], problems: Sequence[EvalProblem]) -> Summary:
    """Without samples at what was another method's cost before more problems were measured."""
    summary = summarise(lines, problems)
    stale = stale_methods(summary.rows)
    if not stale:
        return summary
    return summarise([line for line in lines if isinstance(line, Settings) or line.method not in stale], problems)


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder before models load; what is empty when something fails is taken away again.

    Raises:
        ConfigError: It cannot be made.
    """
    missing = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"no folder {folder} can be made for results: {error.strerror}") from error
    try:
        yield
    except BaseException:
        with suppress(OSError):  # it is not empty
            for one in missing:
                one.rmdir()
        raise


def _settings(plan: Plan) -> Settings:
    import torch

    device = plan.engine.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = plan.engine.dtype
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    chosen = plan.engine.model_dump(include={"preset", "verifier_format", "step_separator"}, exclude_defaults=True)
    search = plan.base.model_dump(mode="json", exclude={"strategy", "width", "seed", "trace", "n_candidates", "vote"})
    path = Path(plan.data)
    return Settings(
        model=plan.model,
        verifier=plan.verifier or REFERENCE,
        weights=_weights(plan.model, plan.verifier or REFERENCE),
        data=str(path.resolve()) if path.is_file() else f"{plan.data} (seed {plan.data_seed})",
        search=search | {"mode": plan.mode} | chosen,
        device=device,
        dtype=dtype,
        machine=provenance(device),
        copy_gb_s=round(run_apart(lambda: copy_gb_s(device)), 1),
    )


def _weights(model: str, verifier: str) -> str:
    """Short hash of the weights' files: content of the shipped ones, size and time of other local ones, else names."""
    digest = hashlib.sha256(f"{model}\0{verifier}".encode())
    for name, shipped in ((model, policy_path()), (verifier, prm_path())):
        folder = Path(shipped if name == REFERENCE else name)
        for file in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            stat = file.stat()
            digest.update(file.read_bytes() if name == REFERENCE else f"{stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]
