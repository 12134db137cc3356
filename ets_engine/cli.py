"""The `ets` command: from options to an engine, from its result to a terminal; it decides nothing about a search."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ets_engine.errors import ConfigError, ETSError

if TYPE_CHECKING:
    from types import FrameType

    from ets_engine.config import EngineConfig, SearchConfig
    from ets_engine.service import ETSEngine
    from ets_engine.types import SearchResult

EXIT_ANSWER, EXIT_FAILURE, EXIT_USAGE, EXIT_ABORTED = 0, 1, 2, 130

_MODELS, _SEARCH, _OUTPUT = "Models", "Search", "Output"
_PRICED = ("ets", "ets_kv", "ets_published")
_COVERING = ("ets", "ets_published")

app = typer.Typer(
    name="ets",
    help="Efficient Tree Search: answers from a language model that tries many ways and keeps the good ones.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Entry point of the `ets` command."""
    _keep_native_chatter_off_stdout()
    app()


def _keep_native_chatter_off_stdout() -> None:
    """Write results to a duplicate of standard output; what C libraries print to the original is dropped.

    HiGHS prints a debug line now and then that no option silences, and `--json` promises nothing but JSON.
    """
    if not isinstance(sys.stdout, io.TextIOWrapper):
        return  # nobody to protect: closed, or replaced by a caller in Python
    sys.stdout.flush()
    results, nowhere = os.dup(sys.stdout.fileno()), os.open(os.devnull, os.O_WRONLY)
    encoding, errors = sys.stdout.encoding, sys.stdout.errors
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    sys.stdout = open(results, "w", encoding=encoding, errors=errors, buffering=1 if os.isatty(results) else -1)  # noqa: SIM115


def load_engine(model: str, verifier: str | None, config: EngineConfig) -> ETSEngine:
    """The engine that searches; this is where torch is imported."""
    from ets_engine.service import ETSEngine

    return ETSEngine.from_pretrained(model, verifier, config)


def _print_version(wanted: bool) -> None:
    if wanted:
        from ets_engine import __version__

        typer.echo(f"ets {__version__}")
        raise typer.Exit


@app.callback()
def _ets(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Options of every command."""


def _option(metavar: str, text: str, *, default: object = None) -> Any:
    """An option; `default` says what its absence means where that is not an empty value."""
    shown = "" if default is None else f" [default: {default}]"
    return typer.Option(metavar=metavar, help=text + shown, show_default=False)


@app.command(short_help="Solve a problem; show the answer and what it cost.")
def solve(
    problem: Annotated[str, typer.Argument(metavar="PROBLEM", help="What to solve; - reads it from standard input.")],
    model: Annotated[
        str, _option("NAME", "Model that proposes steps: a folder or a hub name.", default="the shipped one")
    ] = "reference",
    verifier: Annotated[
        str | None,
        _option("NAME", "Model that scores steps: a folder or a hub name.", default="the shipped model's own"),
    ] = None,
    device: Annotated[
        str, _option("NAME", "Where the models run, e.g. cpu or cuda.", default="cuda where there is one")
    ] = "auto",
    strategy: Annotated[
        str,
        _option(
            "NAME",
            "ets, ets_kv, ets_published, rebase, dora, beam, beam_sqrt, dvts, best_of_n or greedy.",
            default="ets",
        ),
    ] = "ets",
    width: Annotated[int | None, _option("COUNT", "Trajectories kept alive.", default=16)] = None,
    seed: Annotated[int, _option("NUMBER", "The same seed gives the same tree.", default=0)] = 0,
    temperature: Annotated[float | None, _option("NUMBER", "Sampling temperature.", default=1.0)] = None,
    max_tokens: Annotated[int | None, _option("COUNT", "Most tokens of one solution.", default=1024)] = None,
    max_step_tokens: Annotated[int | None, _option("COUNT", "Most tokens of one step.", default=256)] = None,
    lambda_b: Annotated[
        float | None, _option("NUMBER", "Price of keeping the whole tree in the KV cache.", default=1.0)
    ] = None,
    lambda_d: Annotated[float | None, _option("NUMBER", "Worth of keeping every different idea.", default=1.0)] = None,
    kv_budget: Annotated[
        int | None, _option("TOKENS", "Most KV tokens of the policy held at once.", default="no limit")
    ] = None,
    tree: Annotated[
        bool, typer.Option("--tree", help="Draw the search tree; with --json, include it as `trace`.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="Print the whole result as one line of JSON.")] = False,
) -> None:
    """Solve PROBLEM by tree search and show the answer, its steps and what it cost.

    Ctrl-C ends the search with the best answer so far; a second Ctrl-C aborts.

    Exit codes: 0 an answer, 1 a failure or no answer, 2 bad usage, 130 aborted.
    """
    with _Interrupts() as interrupts, _one_line_errors():
        settings = {
            "strategy": strategy,
            "width": width,
            "seed": seed,
            "temperature": temperature,
            "max_tokens": max_tokens,
            "max_step_tokens": max_step_tokens,
            "lambda_b": lambda_b,
            "lambda_d": lambda_d,
            "kv_budget_tokens": kv_budget,
            "trace": tree,
        }
        config = _search_config({name: value for name, value in settings.items() if value is not None})
        text = _read_problem(problem)
        _check_models(text, model, verifier)
        result = _search(text, config, interrupts, model=model, verifier=verifier, device=device)
        _show(result, as_json=json, tree=tree)
        if result.answer is None:
            _fail(_no_answer(result), EXIT_FAILURE)


@app.command(short_help="Measure methods side by side on the same problems.")
def bench(
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="Where results go; a second run goes on from there.")],
    data: Annotated[
        str, _option("DATA", "countdown, story, or a JSONL file with problem and answer.", default="countdown")
    ] = "countdown",
    limit: Annotated[int | None, _option("COUNT", "Most problems.", default="200 of a family, all of a file")] = None,
    data_seed: Annotated[int, _option("NUMBER", "Which fresh problems of a family.", default=2026)] = 2026,
    model: Annotated[str, _option("NAME", "Model that proposes steps.", default="the shipped one")] = "reference",
    verifier: Annotated[str | None, _option("NAME", "Model that scores steps.", default="the shipped one")] = None,
    device: Annotated[str, _option("NAME", "Where the models run.", default="cuda where there is one")] = "auto",
    strategies: Annotated[
        str, _option("NAMES", "Search strategies, comma-separated, or all.", default="greedy,best_of_n,rebase,ets")
    ] = "greedy,best_of_n,rebase,ets",
    widths: Annotated[str, _option("COUNTS", "Trajectories kept alive, comma-separated.", default="16")] = "16",
    seeds: Annotated[int, _option("COUNT", "How often each problem is solved.", default=1)] = 1,
    concurrency: Annotated[int, _option("COUNT", "Searches in flight while accuracy is measured.", default=16)] = 16,
    latency_problems: Annotated[
        int, _option("COUNT", "Problems searched again one at a time, for latency.", default=20)
    ] = 20,
    mode: Annotated[
        str, _option("NAME", "How answers are compared: math, numeric, choice or exact.", default="math")
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
    with _one_line_errors():
        from rich.console import Console

        from ets_engine.config import EngineConfig, SearchConfig
        from ets_engine.evaluation.methods import STRATEGIES
        from ets_engine.evaluation.session import REPORT, Plan, compare
        from ets_engine.evaluation.table import summary_view
        from ets_engine.terminal import BenchProgress

        _quiet_libraries(is_terminal=sys.stderr.isatty())
        base = _pairs(setting or ())
        for name, users in (("lambda_b", _PRICED), ("lambda_d", _COVERING)):
            if name in base and strategies != "all" and not set(_names(strategies)) & set(users):
                raise ConfigError(f"--setting {name} has no effect with {strategies}: add one of {', '.join(users)}")
        if report:
            from ets_engine.evaluation.report import require_matplotlib

            require_matplotlib()
        plan = Plan(
            out=out,
            model=model,
            verifier=verifier,
            engine=EngineConfig(device=device),
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
        Console(highlight=False).print(summary_view(summary))
        if report:
            from ets_engine.evaluation.report import report_page

            (out / REPORT).write_text(report_page(summary), encoding="utf-8")
            typer.echo(f"{out / REPORT}")
        if all(row.failed == row.searches for row in summary.rows):
            _fail(f"no search worked: {summary.rows[0].first_error}", EXIT_FAILURE)


@app.command(short_help="Check that a file's own answers are understood.")
def grade(
    data: Annotated[str, typer.Argument(metavar="FILE", help="JSONL with problem, answer and worked solution.")],
    mode: Annotated[
        str, _option("NAME", "How answers are compared: math, numeric, choice or exact.", default="math")
    ] = "math",
    limit: Annotated[int | None, _option("COUNT", "Most problems.", default="all")] = None,
    least: Annotated[float, _option("SHARE", "Share of problems below which this fails.", default=0.99)] = 0.99,
) -> None:
    """Find the answer in every worked solution of FILE, grade it, and grade an answer of another problem as well.

    Exit codes: 0 at least SHARE of each is graded as it should be, 1 less is, 2 bad usage.
    """
    with _one_line_errors():
        from ets_engine.evaluation.gold import check_gold
        from ets_engine.evaluation.problems import load_problems

        if not 0 <= least <= 1:
            raise ConfigError(f"--least {least:g}: give a share from 0 to 1")
        found = check_gold(load_problems(data, limit=limit), mode)  # type: ignore[arg-type]
        right = found.worked - len(found.unread) - len(found.wrong)
        if found.worked:
            typer.echo(f"{right} of {found.worked} worked solutions: the answer is found and right")
        else:
            typer.echo("no worked solutions to find answers in")
        typer.echo(f"{found.problems - len(found.confused)} of {found.problems} other problems' answers are refused")
        for name, ids in (("no answer found", found.unread), ("wrong", found.wrong), ("not refused", found.confused)):
            if ids:
                typer.echo(f"{name}: {', '.join(ids)}")
        if right < least * found.worked or found.problems - len(found.confused) < least * found.problems:
            _fail(f"less than {least:.0%} of {data} is graded as it should be", EXIT_FAILURE)


@app.command(short_help="Make a page of a search tree.")
def tree(
    file: Annotated[
        Path,
        typer.Argument(metavar="FILE", help="From `ets bench --trace`, or what `ets solve --json --tree` printed."),
    ],
    out: Annotated[
        Path | None, _option("FILE", "Where the page goes.", default="beside the tree, ending in .html")
    ] = None,
) -> None:
    """Write one HTML page that shows the tree: scores, KV tokens, what was pruned and why; it needs no network.

    Exit codes: 0 written, 2 bad usage.
    """
    with _one_line_errors():
        from ets_engine.evaluation.tree_page import read_trace, tree_page

        page = tree_page(*read_trace(file))
        target = out or file.with_suffix(".html")
        target.write_text(page, encoding="utf-8")
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


def _pairs(texts: Sequence[str]) -> dict[str, Any]:
    """Settings by name, values read as JSON where they are JSON.

    Raises:
        ConfigError: There is no `=`, or an option of its own decides it.
    """
    from json import JSONDecodeError, loads

    found: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or name in ("strategy", "width", "seed", "trace", "n_candidates", "vote"):
            raise ConfigError(f"--setting {text!r}: give NAME=VALUE, NAME not one of the options")
        try:
            found[name] = loads(value)
        except JSONDecodeError:
            found[name] = value
    return found


def _search_config(given: dict[str, Any]) -> SearchConfig:
    """Settings from the options that were given, refused before any model is loaded.

    Raises:
        ConfigError: An option is out of range, contradicts another, or would have no effect.
    """
    from ets_engine.config import SearchConfig
    from ets_engine.search.build import build_selector, effective_width

    config = SearchConfig(**given)
    build_selector(config)
    for name, strategies in (("lambda_b", _PRICED), ("lambda_d", _COVERING)):
        if name in given and config.strategy not in strategies:
            flag = "--" + name.replace("_", "-")
            raise ConfigError(f"{flag} has no effect with strategy {config.strategy!r}: use {', '.join(strategies)}")
    if "width" in given and config.width != effective_width(config):
        raise ConfigError(f"--width {config.width} has no effect with strategy 'greedy': it follows one trajectory")
    if config.strategy == "greedy" and given.get("temperature", 0) > 0:
        raise ConfigError(f"--temperature {config.temperature:g} has no effect with strategy 'greedy'")
    return config


def _read_problem(problem: str) -> str:
    """The problem as text.

    Raises:
        ConfigError: It is empty or not valid UTF-8.
    """
    try:
        text = sys.stdin.buffer.read().decode() if problem == "-" else problem.encode().decode()
    except UnicodeError:
        raise ConfigError("PROBLEM is not valid UTF-8 text") from None
    if not text.strip():
        raise ConfigError("PROBLEM is empty: say what to solve")
    return text.strip()


def _check_models(text: str, model: str, verifier: str | None) -> None:
    """Refuse at once what the engine would refuse after loading the models.

    Raises:
        ConfigError: A model of the caller's needs a verifier.
        ReferenceDomainError: The shipped models do not know this kind of problem.
    """
    from ets_engine.reference import REFERENCE, check_domain

    if model == REFERENCE:
        check_domain(text)
    elif verifier is None:
        raise ConfigError(f"--model {model} needs a model that scores its steps: pass --verifier NAME_OR_PATH")


def _search(
    text: str, config: SearchConfig, interrupts: _Interrupts, *, model: str, verifier: str | None, device: str
) -> SearchResult:
    """Load the models and search, with progress on standard error where that is a terminal."""
    from rich.console import Console

    from ets_engine.config import EngineConfig
    from ets_engine.search.build import effective_width
    from ets_engine.terminal import LiveProgress

    errors = Console(stderr=True, highlight=False)
    _quiet_libraries(is_terminal=errors.is_terminal)
    with _status(errors, "Loading the models"):
        engine = load_engine(model, verifier, EngineConfig(device=device))
    with engine, LiveProgress(errors, width=effective_width(config), is_stopping=interrupts.is_set) as progress:
        interrupts.searching = True
        try:
            return engine.search(text, config, on_event=progress.update, cancel=interrupts)
        finally:
            interrupts.searching = False


def _show(result: SearchResult, *, as_json: bool, tree: bool) -> None:
    """Print a result on standard output."""
    if as_json:
        typer.echo(result.model_dump_json().encode())  # one line makes JSONL; bytes are UTF-8 whatever the terminal
        return
    from rich.console import Console

    from ets_engine.terminal import result_view, tree_view

    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what this terminal cannot show
    output = Console(highlight=False)
    output.print(result_view(result))
    if tree:
        output.print()
        output.print(tree_view(result))


def _no_answer(result: SearchResult) -> str:
    from ets_engine.terminal import no_answer_reason

    hints = {"length": "raise --max-tokens or --width", "no_answer": "raise --width or try another --seed"}
    hint = hints.get(result.finish_reason)
    return f"no answer: {no_answer_reason(result)}" + (f"; {hint}" if hint else "")


@contextmanager
def _status(errors: Any, message: str) -> Iterator[None]:
    if not errors.is_terminal:
        yield
        return
    with errors.status(message, spinner="dots" if errors.encoding.startswith("utf") else "line"):
        yield


def _quiet_libraries(*, is_terminal: bool) -> None:
    """Keep other libraries' notes off standard error, download bars excepted where somebody watches."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class _Interrupts:
    """What Ctrl-C means: during a search first "stop and show the best so far"; otherwise "leave at once".

    Only the main thread may handle signals; elsewhere this does nothing.
    """

    def __init__(self) -> None:
        self.searching = False
        self.asked = False
        self._owns_signals = threading.current_thread() is threading.main_thread()

    def __enter__(self) -> _Interrupts:
        if self._owns_signals:
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if self._owns_signals:
            signal.signal(signal.SIGINT, self._before)

    def is_set(self) -> bool:
        """Whether the search should stop and show the best so far."""
        return self.asked

    def _handle(self, _signal: int, _frame: FrameType | None) -> None:
        if self.asked or not self.searching:
            _abort()
        self.asked = True


def _abort() -> NoReturn:
    """Leave without waiting for anything; the cursor, which the progress display hides, comes back."""
    restore = b"\r\x1b[K\x1b[?25h" if os.isatty(2) else b""
    os.write(2, restore + b"ets: aborted\n")
    os._exit(EXIT_ABORTED)


@contextmanager
def _one_line_errors() -> Iterator[None]:
    """End the process with one line and the right exit code, whatever goes wrong."""
    try:
        yield
    except ETSError as error:
        _fail(str(error), EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILURE)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("ETS_TRACEBACK"):
            raise
        _fail(f"{type(error).__name__}: {error} (ETS_TRACEBACK=1 shows where)", EXIT_FAILURE)


def _fail(message: str, code: int) -> NoReturn:
    from ets_engine.terminal.words import one_line

    typer.echo(f"ets: {one_line(message)}", err=True)
    raise typer.Exit(code)


if __name__ == "__main__":
    main()
