"""What an engine and its helper processes tell each other; pickled, over a socket that nobody else can reach."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ets_engine.config import EngineConfig, SearchConfig
from ets_engine.errors import EngineError
from ets_engine.messages import Message, Prompt
from ets_engine.protocols import Cancel, OnEvent
from ets_engine.scorers import EqualVerifier, EvidenceScorer
from ets_engine.serving.job import Job
from ets_engine.types import EngineStats, SearchEvent


@dataclass(frozen=True, slots=True)
class Order:
    """The first message to a helper: which models it is to load, as one of so many processes (count)."""

    model: str
    verifier: str | None
    config: EngineConfig
    processes: int


@dataclass(frozen=True, slots=True)
class Take:
    """A job, by its number, as `pack` wrote it."""

    number: int
    packed: bytes


@dataclass(frozen=True, slots=True)
class Stop:
    """Nobody waits for that job any more, or its caller wants the best so far."""

    number: int


@dataclass(frozen=True, slots=True)
class Close:
    """Finish what there is, and end."""


@dataclass(frozen=True, slots=True)
class Ready:
    """A helper's first message: its models are loaded, or why they are not."""

    error: Exception | None


@dataclass(frozen=True, slots=True)
class Refused:
    """A job that the helper cannot do: it has no such function as the job names, for instance."""

    number: int


@dataclass(frozen=True, slots=True)
class Told:
    """Progress of a job."""

    number: int
    event: SearchEvent


@dataclass(frozen=True, slots=True)
class Done:
    """What a job came to, an `Outcome` or an exception, pickled; and what its process has done so far, if it knows."""

    number: int
    outcome: bytes
    stats: EngineStats | None


@dataclass(frozen=True, slots=True)
class _Packed:
    """A job without what belongs to its caller's process."""

    problem: str
    prompt: Prompt
    prm_problem: str
    config: SearchConfig
    tools: Sequence[Message]
    read_step: Callable[[str], str] | None
    is_judged: bool  # by the engine's own verifier, else by none
    has_listener: bool
    waited_s: float


def pack(job: Job, own: EvidenceScorer | None) -> bytes | None:
    """A job for another process, None where it needs something of its caller's: a verifier or a selector.

    Args:
        job: That no scheduler has.
        own: The engine's verifier, where that is no PRM.
    """
    is_own = job.verifier is None or job.verifier is own
    if job.selector is not None or not (is_own or isinstance(job.verifier, EqualVerifier)):
        return None
    packed = _Packed(
        job.problem,
        job.prompt,
        job.prm_problem,
        job.config,
        job.tools,
        job.read_step,
        is_judged=is_own,
        has_listener=job.on_event is not None,
        waited_s=time.perf_counter() - job.began_s,
    )
    try:
        return pickle.dumps(packed)
    except Exception:  # a function that has no name, say
        return None


def portable(error: BaseException) -> Exception:
    """An exception that the other process can read: itself, or what it says."""
    try:
        if isinstance(pickle.loads(pickle.dumps(error)), Exception) and isinstance(error, Exception):
            return error
    except Exception:
        pass
    return EngineError(f"{type(error).__name__} in a helper process: {error}")


def unpack(packed: bytes, own: EvidenceScorer | None, on_event: OnEvent, cancel: Cancel) -> Job:
    """A job for this process's scheduler.

    Args:
        packed: By `pack`, in the engine's process.
        own: This process's verifier, where that is no PRM.
        on_event: Told the progress, if anybody wants it.
        cancel: Stops it.
    """
    one: _Packed = pickle.loads(packed)
    return Job(
        one.problem,
        prompt=one.prompt,
        prm_problem=one.prm_problem,
        config=one.config,
        selector=None,
        verifier=own if one.is_judged else EqualVerifier(),
        view=None,
        on_event=on_event if one.has_listener else None,
        cancel=cancel,
        tools=one.tools,
        read_step=one.read_step,
        began_s=time.perf_counter() - one.waited_s,
    )
