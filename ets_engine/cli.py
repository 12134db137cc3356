"""The `ets` command: from options to an engine, from its result to a terminal; it decides nothing about a search."""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ets_engine.commands import measure, models
from ets_engine.commands.common import (
    EXIT_ABORTED,
    EXIT_FAILURE,
    StepSeparator,
    engine_settings,
    fail,
    one_line_errors,
    option,
    quiet_libraries,
)
from ets_engine.errors import ConfigError

if TYPE_CHECKING:
    from types import FrameType

    from ets_engine.config import EngineConfig, SearchConfig
    from ets_engine.remote import RemoteEngine
    from ets_engine.service import ETSEngine
    from ets_engine.types import SearchResult

PRICED = ("ets", "ets_kv", "ets_published")  # strategies that heed lambda_b
COVERING = ("ets", "ets_published")  # and lambda_d

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


def load_engine(model: str, verifier: str | None, config: EngineConfig) -> ETSEngine | RemoteEngine:
    """The engine that searches; this is where torch is imported."""
    from ets_engine.services import open_engine

    return open_engine(model, verifier, config)


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


@app.command(short_help="Solve a problem; show the answer and what it cost.")
def solve(
    problem: Annotated[str, typer.Argument(metavar="PROBLEM", help="What to solve; - reads it from standard input.")],
    model: Annotated[
        str,
        option(
            "NAME",
            "Model that proposes steps: a folder, a hub name, or openai:http://host:8000/v1#name.",
            default="the shipped one",
        ),
    ] = "reference",
    verifier: Annotated[
        str | None,
        option(
            "NAME",
            "What scores steps: a PRM by folder or hub name; logprob, self_certainty or probe:FILE for a model here; "
            "judge:openai:... or pooling:openai:... for a model on a server.",
            default="the shipped model's own",
        ),
    ] = None,
    preset: Annotated[
        str, option("NAME", "Prompt, step boundaries and answers, see `ets models`.", default="as the model shows")
    ] = "auto",
    verifier_format: Annotated[
        str, option("NAME", "What the PRM reads, see `ets models`.", default="as the PRM shows")
    ] = "auto",
    step_separator: StepSeparator = None,
    device: Annotated[
        str, option("NAME", "Where the models run, e.g. cpu or cuda.", default="cuda where there is one")
    ] = "auto",
    strategy: Annotated[
        str,
        option(
            "NAME",
            "ets, ets_kv, ets_published, rebase, dora, beam, beam_sqrt, dvts, best_of_n or greedy.",
            default="ets",
        ),
    ] = "ets",
    width: Annotated[int | None, option("COUNT", "Trajectories kept alive.", default=16)] = None,
    seed: Annotated[int, option("NUMBER", "The same seed gives the same tree.", default=0)] = 0,
    temperature: Annotated[float | None, option("NUMBER", "Sampling temperature.", default=1.0)] = None,
    max_tokens: Annotated[int | None, option("COUNT", "Most tokens of one solution.", default=1024)] = None,
    max_step_tokens: Annotated[int | None, option("COUNT", "Most tokens of one step.", default=256)] = None,
    lambda_b: Annotated[
        float | None, option("NUMBER", "Price of keeping the whole tree in the KV cache.", default=1.0)
    ] = None,
    lambda_d: Annotated[float | None, option("NUMBER", "Worth of keeping every different idea.", default=1.0)] = None,
    kv_budget: Annotated[
        int | None, option("TOKENS", "Most KV tokens of the policy held at once.", default="no limit")
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
    with _Interrupts() as interrupts, one_line_errors():
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
        engine = engine_settings(device, preset, verifier_format, step_separator)
        _check_models(text, model, verifier, engine)
        result = _search(text, config, interrupts, model, verifier, engine)
        _show(result, as_json=json, tree=tree)
        if result.answer is None:
            fail(_no_answer(result), EXIT_FAILURE)


app.command(short_help="Measure methods side by side on the same problems.")(measure.bench)
app.command(short_help="Check that a file's own answers are understood.")(measure.grade)
app.command(short_help="Make a page of a search tree.")(measure.tree)
app.command("models", short_help="List presets, PRM formats and what known models take.")(models.models)
app.command(short_help="Load a pair of models and say what was found.")(models.check)


def _search_config(given: dict[str, Any]) -> SearchConfig:
    """Settings from the options that were given, refused before any model is loaded.

    Raises:
        ConfigError: An option is out of range, contradicts another, or would have no effect.
    """
    from ets_engine.config import SearchConfig
    from ets_engine.search.build import build_selector, effective_width

    config = SearchConfig(**given)
    build_selector(config)
    for name, strategies in (("lambda_b", PRICED), ("lambda_d", COVERING)):
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
        ConfigError: It is empty or not valid UTF-8, or there is no standard input to read it from.
    """
    if problem == "-" and sys.stdin is None:
        raise ConfigError("PROBLEM is -, and standard input is closed: say what to solve")
    try:
        text = sys.stdin.buffer.read().decode() if problem == "-" else problem.encode().decode()
    except UnicodeError:
        raise ConfigError("PROBLEM is not valid UTF-8 text") from None
    if not text.strip():
        raise ConfigError("PROBLEM is empty: say what to solve")
    return text.strip()


def _check_models(text: str, model: str, verifier: str | None, engine: EngineConfig) -> None:
    """Refuse at once what the engine would refuse after loading the models, and what would have no effect.

    Raises:
        ConfigError: A model of the caller's needs a verifier, or an option has no effect on one behind a server.
        ReferenceDomainError: The shipped models do not know this kind of problem.
    """
    from ets_engine.config import REMOTE
    from ets_engine.reference import REFERENCE, check_domain

    if REFERENCE in (model, engine.preset):
        check_domain(text)
    if model.startswith(REMOTE):  # the address is not repeated, it may hold a password
        if verifier is None:
            raise ConfigError(
                "--model openai:... needs something that scores its steps: pass --verifier, a PRM's name, "
                "judge:openai:URL#model or pooling:openai:URL#model"
            )
        if verifier.startswith("judge:") and (unread := engine.changed(("verifier_format", "step_separator"))):
            names = ", ".join("--" + one.partition("=")[0].replace("_", "-") for one in unread)
            raise ConfigError(f"{names} has no effect on a server's model: leave it out")
    elif verifier is None and model != REFERENCE:
        raise ConfigError(
            f"--model {model} needs something that scores its steps: pass --verifier, a PRM's name or logprob"
        )


def _search(
    text: str,
    config: SearchConfig,
    interrupts: _Interrupts,
    model: str,
    verifier: str | None,
    engine_config: EngineConfig,
) -> SearchResult:
    """Load the models and search, with progress on standard error where that is a terminal."""
    from rich.console import Console

    from ets_engine.search.build import effective_width
    from ets_engine.terminal import LiveProgress

    errors = Console(stderr=True, highlight=False)
    quiet_libraries(is_terminal=errors.is_terminal)
    with _status(errors, "Loading the models"):
        engine = load_engine(model, verifier, engine_config)
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


if __name__ == "__main__":
    main()
