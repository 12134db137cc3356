"""`ets bench`, `ets grade` and `ets tree`: from options to a measurement or a page; they compute nothing."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ets_engine.commands.common import (
    EXIT_FAILURE,
    StepSeparator,
    engine_settings,
    fail,
    one_line_errors,
    option,
    quiet_libraries,
)
from ets_engine.errors import ConfigError


def bench(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go; a second run goes on from there.")],
    data: Annotated[
        str, option("PROBLEMS", "countdown, story, or a JSONL file with problem and answer.", default="countdown")
    ] = "countdown",
    limit: Annotated[int | None, option("COUNT", "Most problems.", default="200 of a family, all of a file")] = None,
    data_seed: Annotated[int, option("NUMBER", "Which fresh problems of a family.", default=2026)] = 2026,
    model: Annotated[
        str,
        option(
            "NAME",
            "Model that proposes steps: a folder, a hub name, or openai:http://host:8000/v1#name, whose KV is counted "
            "from the tree and whose bandwidth is unknown.",
            default="the shipped one",
        ),
    ] = "reference",
    verifier: Annotated[str | None, option("NAME", "Model that scores steps.", default="the shipped one")] = None,
    preset: Annotated[
        str, option("NAME", "Prompt, step boundaries and answers, see `ets models`.", default="as the model shows")
    ] = "auto",
    verifier_format: Annotated[
        str, option("NAME", "What the PRM reads, see `ets models`.", default="as the PRM shows")
    ] = "auto",
    step_separator: StepSeparator = None,
    device: Annotated[str, option("NAME", "Where the models run.", default="cuda where there is one")] = "auto",
    strategies: Annotated[
        str,
        option(
            "NAMES",
            "Search strategies, comma-separated, or all; ets:lambda_b=0.5 is a row of its own with that setting.",
            default="greedy,best_of_n,rebase,ets",
        ),
    ] = "greedy,best_of_n,rebase,ets",
    widths: Annotated[str, option("COUNTS", "Trajectories kept alive, comma-separated.", default="16")] = "16",
    seeds: Annotated[int, option("COUNT", "How often each problem is solved.", default=1)] = 1,
    concurrency: Annotated[int, option("COUNT", "Searches in flight while accuracy is measured.", default=16)] = 16,
    processes: Annotated[
        int, option("COUNT", "Processes that search, each with models of its own; on a CPU.", default=1)
    ] = 1,
    latency_problems: Annotated[
        int, option("COUNT", "Problems searched again one at a time, for latency.", default=20)
    ] = 20,
    mode: Annotated[
        str, option("NAME", "How answers are compared: math, numeric, choice or exact.", default="math")
    ] = "math",
    same_cost: Annotated[
        bool, typer.Option("--same-cost", help="Measure samples and votes at the KV and at the time of ets as well.")
    ] = False,
    trace: Annotated[bool, typer.Option("--trace", help="Write every search tree, for `ets tree`.")] = False,
    report: Annotated[bool, typer.Option("--report", help="Write report.html as well; needs matplotlib.")] = False,
    setting: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="Any other search setting, e.g. lambda_b=0.5.")
    ] = None,
) -> None:
    """Measure accuracy, KV, bandwidth and latency of search methods on the same problems and seeds.

    Writes results.jsonl (a line per search) and summary.json into FOLDER. Interrupted, the same command goes on where
    it stopped: what is measured already is not measured again, and its tree is not written again.

    Exit codes: 0 measured, 1 a failure, or no search worked, 2 bad usage, 130 aborted.
    """
    with one_line_errors():
        from rich.console import Console

        from ets_engine.config import SearchConfig
        from ets_engine.evaluation.methods import STRATEGIES, read_settings
        from ets_engine.evaluation.session import REPORT, Plan, compare
        from ets_engine.evaluation.table import summary_view
        from ets_engine.terminal import BenchProgress

        quiet_libraries(is_terminal=sys.stderr.isatty())
        base = read_settings(setting or ())
        if report:
            from ets_engine.evaluation.plot import require_matplotlib

            require_matplotlib()
        plan = Plan(
            out=out,
            model=model,
            verifier=verifier,
            engine=engine_settings(device, preset, verifier_format, step_separator, processes),
            data=data,
            limit=limit,
            data_seed=data_seed,
            strategies=STRATEGIES if strategies == "all" else _names(strategies),
            widths=[_count(width, "--widths") for width in _names(widths)],
            seeds=seeds,
            mode=mode,  # type: ignore[arg-type]
            concurrency=concurrency,
            latency_problems=latency_problems,
            base=SearchConfig(**base),
            same_cost=same_cost,
            trace=trace,
        )
        with BenchProgress(Console(stderr=True, highlight=False)) as progress:
            summary = compare(plan, progress.start, lambda result, record: progress.advance(record.method))
        console = Console(highlight=False)
        console.width = max(80, console.width)  # a narrower terminal wraps: a number that is cut is another one
        console.print(summary_view(summary))
        if report:
            from ets_engine.evaluation.report import report_page

            (out / REPORT).write_text(report_page(summary), encoding="utf-8")
            typer.echo(f"{out / REPORT}")
        if all(row.failed == row.searches for row in summary.rows):
            fail(f"no search worked: {summary.rows[0].first_error}", EXIT_FAILURE)


def grade(
    data: Annotated[str, typer.Argument(metavar="FILE", help="JSONL with problem, answer and worked solution.")],
    mode: Annotated[
        str, option("NAME", "How answers are compared: math, numeric, choice or exact.", default="math")
    ] = "math",
    limit: Annotated[int | None, option("COUNT", "Most problems.", default="all")] = None,
    least: Annotated[float, option("SHARE", "Share of problems below which this fails.", default=0.99)] = 0.99,
) -> None:
    """Find the answer in every worked solution of FILE, grade it, and grade a different answer of another problem.

    Exit codes: 0 at least SHARE of each is graded as it should be, 1 less is, 2 bad usage.
    """
    with one_line_errors():
        from ets_engine.evaluation.gold import check_gold
        from ets_engine.evaluation.problems import load_problems
        from ets_engine.terminal.words import one_line

        if not 0 <= least <= 1:
            raise ConfigError(f"--least {least:g}: give a share from 0 to 1")
        found = check_gold(load_problems(data, limit=limit), mode)  # type: ignore[arg-type]
        right = found.worked - len(found.unread) - len(found.wrong)
        if found.worked:
            typer.echo(f"{right} of {found.worked} worked solutions: the answer is found and right")
        else:
            typer.echo("no worked solutions to find answers in")
        refused = found.paired - len(found.confused)
        if found.paired:
            typer.echo(f"{refused} of {found.paired} other problems' answers are refused")
        else:
            typer.echo("no two different answers to tell apart")
        for name, ids in (("no answer found", found.unread), ("wrong", found.wrong), ("not refused", found.confused)):
            if ids:
                typer.echo(f"{name}: {', '.join(map(one_line, ids))}")
        if right < least * found.worked or refused < least * found.paired:
            fail(f"less than {least:.0%} of {data} is graded as it should be", EXIT_FAILURE)


def tree(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="From `ets bench --trace`, or what `ets solve --json --tree` printed."),
    ],
    out: Annotated[
        Path | None, option("FILE", "Where the page goes.", default="beside the tree, ending in .html")
    ] = None,
) -> None:
    """Write one HTML page that shows the tree: scores, KV tokens, what was pruned and why; it needs no network.

    Exit codes: 0 written, 2 bad usage.
    """
    with one_line_errors():
        from ets_engine.evaluation.tree_page import read_trace, tree_page

        page = tree_page(*read_trace(file))
        target = out or file.with_suffix(".html")
        if target.resolve() == file.resolve():
            raise ConfigError(f"--out {target} is the tree itself; name another file")
        try:
            target.write_text(page, encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {target}: {error.strerror}; name a file that can be written") from error
        typer.echo(f"{target}")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _count(text: str, option: str) -> int:
    """A whole number.

    Raises:
        ConfigError: It is none.
    """
    try:
        return int(text)
    except ValueError:
        raise ConfigError(f"{option}: {text!r} is no whole number") from None
