"""Says an engine's errors in DSPy's words, so that DSPy retries what may pass and nothing else."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dspy import lm15

from ets_engine.errors import (
    ContextLengthError,
    EngineClosedError,
    EngineError,
    ETSError,
    ModelLoadError,
    QueueFullError,
)

RETRY_AFTER_S = 1.0
"""How long DSPy waits before it asks a full engine again."""


@contextmanager
def dspy_errors() -> Iterator[None]:
    """Raise DSPy's error in place of the engine's; any other exception passes as it is.

    DSPy retries a full queue and a failed forward pass (`num_retries`), and nothing that would fail again: settings,
    a prompt that is too long, memory that is not there, an engine that was closed. `dspy.ReAct` shortens its
    trajectory when the prompt is too long.

    Example:
        >>> try:
        ...     with dspy_errors():
        ...         raise QueueFullError("4096 searches wait already")
        ... except lm15.RateLimitError as error:
        ...     print(error.retry_after)
        1.0
    """
    try:
        yield
    except ETSError as error:
        raise to_dspy(error) from error


def to_dspy(error: ETSError) -> lm15.ProviderError:
    """The DSPy error that means the same."""
    text = f"{type(error).__name__}: {error}"
    match error:
        case ContextLengthError():
            return lm15.ContextLengthError(text)
        case QueueFullError():
            return lm15.RateLimitError(text, retry_after=RETRY_AFTER_S)
        case ModelLoadError():
            return lm15.UnsupportedModelError(text)
        case EngineError() if not isinstance(error, EngineClosedError):
            return lm15.ServerError(text)
        case _:
            return lm15.InvalidRequestError(text)
