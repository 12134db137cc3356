"""One `ets bench` from its settings to `results.jsonl` and `summary.json`; the commands print what it returns."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.evaluation.bench import Bench, OnResult
from ets_engine.evaluation.grading import Mode, grade
from ets_engine.evaluation.machine import copy_gb_s, provenance
from ets_engine.evaluation.methods import methods_of
from ets_engine.evaluation.problems import EvalProblem, load_problems
from ets_engine.evaluation.records import Results, Settings, read_results
from ets_engine.evaluation.summary import Summary, summarise
from ets_engine.service import ETSEngine

RESULTS, SUMMARY = "results.jsonl", "summary.json"


@dataclass(frozen=True, slots=True)
class Comparison:
    """What `ets bench` is asked for.

    Attributes:
        out: Folder of the results.
        model, verifier: As in `ETSEngine.from_pretrained`.
        engine: Where and how they run.
        data, limit, data_seed: As in `load_problems`.
        strategies, widths: As in `methods_of`.
        seeds: How often each problem is solved, seeds 0, 1, ...
        mode, concurrency, latency_problems: As in `Bench`.
        base: Settings of every search, apart from strategy, width and seed.
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

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds}: solve each problem at least once")


def compare(
    asked: Comparison, on_start: Callable[[int], None] = lambda total: None, on_result: OnResult | None = None
) -> Summary:
    """Measure what is missing in `asked.out`, and write its summary.

    Args:
        asked: What to measure.
        on_start: Called with the number of searches to come, once the models are loaded.
        on_result: Called with every search.

    Raises:
        ConfigError: A setting is out of range, or the folder holds results of other settings.
        ModelLoadError: A model cannot be loaded.
        KeyboardInterrupt: What was measured until then is kept, in the summary too.
    """
    problems = load_problems(asked.data, limit=asked.limit, seed=asked.data_seed)
    methods = methods_of(asked.strategies, asked.widths)
    for method in methods:
        method.config(asked.base, 0)  # refused before anything is loaded
    path = asked.out / RESULTS
    if path.exists():
        read_results(path)
    with (
        ETSEngine.from_pretrained(asked.model, asked.verifier, asked.engine) as engine,
        closing(Results(path, _settings(asked))) as results,
    ):
        bench = Bench(
            engine=engine,
            problems=problems,
            results=results,
            base=asked.base,
            seeds=range(asked.seeds),
            mode=asked.mode,
            concurrency=asked.concurrency,
            latency_problems=asked.latency_problems,
            on_result=on_result or (lambda result, record: None),
        )
        on_start(bench.count(methods))
        try:
            bench.run(methods)
        finally:
            summary = summarise(results.lines)
            (asked.out / SUMMARY).write_text(summary.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return summary


def _settings(asked: Comparison) -> Settings:
    device = "cpu" if asked.engine.device == "auto" else asked.engine.device
    if asked.engine.device == "auto":
        import torch

        device = "cuda" if torch.cuda.is_available() else "cpu"
    search = asked.base.model_dump(exclude={"strategy", "width", "seed", "trace", "n_candidates", "vote"})
    data = f"{asked.data} (seed {asked.data_seed})" if not Path(asked.data).is_file() else asked.data
    return Settings(
        model=asked.model,
        verifier=asked.verifier or ("reference" if asked.model == "reference" else ""),
        data=data,
        search=search | {"mode": asked.mode},
        machine=provenance(device),
        copy_gb_s=round(copy_gb_s(device), 1),
    )


@dataclass(frozen=True, slots=True)
class GoldCheck:
    """Whether a file's own answers are understood.

    Attributes:
        problems: In the file (count).
        unread: Ids whose worked solution gives no answer.
        wrong: Ids whose worked solution is graded as wrong.
        confused: Ids whose answer also accepts another problem's answer, written differently.
    """

    problems: int
    unread: tuple[str, ...]
    wrong: tuple[str, ...]
    confused: tuple[str, ...]


def check_gold(problems: Sequence[EvalProblem], mode: Mode = "math", seed: int = 0) -> GoldCheck:
    """Extract each worked solution's answer and grade it, then grade an answer drawn from another problem.

    Args:
        problems: With worked solutions where there are some; the answer itself stands in for a missing one.
        mode: How answers are compared.
        seed: Of the random pairing.
    """
    from random import Random

    from ets_engine.answers import MathView, ReferenceView

    rng = Random(f"gold/{seed}")
    unread: list[str] = []
    wrong: list[str] = []
    confused: list[str] = []
    for place, one in enumerate(problems):
        view = ReferenceView() if one.family else MathView()
        answer = view.answer(one.problem, one.solution) if one.solution else one.answer
        if answer is None:
            unread.append(one.id)
        elif not grade(one, answer, mode=mode).lenient:
            wrong.append(one.id)
        if len(problems) > 1:
            other = problems[(place + rng.randrange(1, len(problems))) % len(problems)]
            if grade(one, other.answer, mode=mode).lenient and not _same_text(one.answer, other.answer):
                confused.append(one.id)
    return GoldCheck(len(problems), tuple(unread), tuple(wrong), tuple(confused))


def _same_text(left: str, right: str) -> bool:
    from ets_engine.answers import normal_answer

    return normal_answer(left) == normal_answer(right)
