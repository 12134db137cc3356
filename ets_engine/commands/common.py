"""What every `ets` command shares: options, exit codes, and errors as one line; it knows no command."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from ets_engine.errors import ETSError

if TYPE_CHECKING:
    from ets_engine.config import EngineConfig

EXIT_ANSWER, EXIT_FAILURE, EXIT_USAGE, EXIT_ABORTED = 0, 1, 2, 130


def option(metavar: str, text: str, *, default: object = None) -> Any:
    """An option; `default` says what its absence means where that is not an empty value."""
    shown = "" if default is None else f" [default: {default}]"
    return typer.Option(metavar=metavar, help=text + shown, show_default=False)


def engine_settings(
    device: str, preset: str, verifier_format: str, step_separator: str | None, processes: int = 1
) -> EngineConfig:
    """Settings from the options that say which models run where.

    Raises:
        ConfigError: There is no such preset or format, or the count is out of range.
    """
    from ets_engine.config import EngineConfig

    separator = None if step_separator is None else step_separator.replace("\\n", "\n")
    named: dict[str, Any] = {"preset": preset, "verifier_format": verifier_format}
    return EngineConfig(device=device, step_separator=separator, processes=processes, **named)


StepSeparator = Annotated[
    str | None, option("TEXT", "Ends a step for a PRM of format trl or skywork; \\n is a line end.", default="\\n")
]


def quiet_libraries(*, is_terminal: bool) -> None:
    """Keep other libraries' notes off standard error, download bars excepted where somebody watches."""
    import warnings

    warnings.filterwarnings("ignore")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    if not is_terminal:
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@contextmanager
def one_line_errors() -> Iterator[None]:
    """End the process with one line and the right exit code, whatever goes wrong."""
    try:
        yield
    except ETSError as error:
        fail(str(error), EXIT_USAGE if isinstance(error, ValueError) else EXIT_FAILURE)
    except (typer.Exit, BrokenPipeError):
        raise
    except Exception as error:
        if os.environ.get("ETS_TRACEBACK"):
            raise
        fail(f"{type(error).__name__}: {error} (ETS_TRACEBACK=1 shows where)", EXIT_FAILURE)


def fail(message: str, code: int) -> NoReturn:
    """Leave with one line on standard error."""
    from ets_engine.terminal.words import one_line

    typer.echo(f"ets: {one_line(message)}", err=True)
    raise typer.Exit(code)
