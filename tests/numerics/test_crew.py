"""An engine of two processes: results as from one, nothing lost when a process dies, nothing left when all is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError, Future, wait
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from ets_engine.config import EngineConfig
from ets_engine.errors import ConfigError, ContextLengthError, EngineClosedError, ModelLoadError
from ets_engine.models import Preset, StepBoundary
from ets_engine.search.selectors import Rebase
from ets_engine.service import ETSEngine
from ets_engine.serving import helper as helpers
from ets_engine.serving.crew import Crew
from ets_engine.serving.helper import Helper
from ets_engine.types import SearchEvent

from .test_serving import PROBLEMS, Essence, make, scheduler, settings, settle

pytestmark = pytest.mark.skipif(os.name != "posix", reason="helper processes need a POSIX system")


@pytest.fixture(scope="module")
def alone(folders: tuple[str, str]) -> Iterator[ETSEngine]:
    with make(folders) as engine:
        yield engine


@pytest.fixture(scope="module")
def shared(folders: tuple[str, str]) -> Iterator[ETSEngine]:
    with make(folders, processes=2, max_queued_searches=16) as engine:
        yield engine


@pytest.fixture
def engine(shared: ETSEngine) -> Iterator[ETSEngine]:
    yield shared
    settle(shared)
    until_s = time.monotonic() + 10
    while helper_of(shared).num_jobs and time.monotonic() < until_s:
        time.sleep(0.001)
    assert helper_of(shared).num_jobs == 0


def helper_of(engine: ETSEngine) -> Helper:
    (found,) = engine._crew._helpers
    return found


def pid_of(engine: ETSEngine) -> int:
    return helper_of(engine).pid


@contextmanager
def busy(engine: ETSEngine, count: int = 12) -> Iterator[None]:
    """While this process has so many searches, the next ones go to the helper."""
    gate = threading.Event()

    def verifier(problem: str, steps: Sequence[str]) -> float:
        gate.wait(60)
        return 0.5

    futures = [engine.submit(PROBLEMS[0], settings(max_steps=1), verifier=verifier) for _ in range(count)]
    try:
        while len(scheduler(engine)._live) < count or engine._worker._num_waiting:
            time.sleep(0.001)
        yield
    finally:
        gate.set()
        for future in futures:
            assert future.result(timeout=60).trace is not None


@contextmanager
def frozen(engine: ETSEngine) -> Iterator[None]:
    """The helper does nothing meanwhile."""
    os.kill(pid_of(engine), signal.SIGSTOP)
    try:
        yield
    finally:
        with suppress(ProcessLookupError):  # it was killed
            os.kill(pid_of(engine), signal.SIGCONT)


def test_results_are_those_of_one_process(engine: ETSEngine, alone: ETSEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    lent: list[bool] = []
    lend = Crew._lend
    monkeypatch.setattr(Crew, "_lend", lambda self, job: lent.append(lend(self, job)) or lent[-1])
    jobs = [(problem, settings(seed=seed, width=4 + seed)) for seed in range(3) for problem in PROBLEMS]
    futures = [engine.submit(*job) for job in jobs]
    found = [future.result(timeout=60) for future in futures]
    assert [Essence(one) for one in found] == [Essence(alone.search(*job)) for job in jobs]
    assert lent.count(True) >= len(jobs) // 3
    here, there = engine._worker.stats(), helper_of(engine).stats
    assert there is not None and there.policy_tokens > 0 < here.policy_tokens
    assert engine.stats().policy_tokens == here.policy_tokens + there.policy_tokens


def test_searches_alone_stay_here(engine: ETSEngine) -> None:
    with frozen(engine):
        for problem in PROBLEMS[:3]:
            assert engine.search(problem, settings()).trace is not None
            settle(engine)


def test_what_a_caller_brings_is_used(engine: ETSEngine, alone: ETSEngine) -> None:
    class Loud:
        def answer(self, problem: str, text: str) -> str | None:
            return text.upper()

        def same(self, left: str, right: str) -> bool:
            return left == right

    asked: list[str] = []

    def verifier(problem: str, steps: Sequence[str]) -> float:
        asked.append(problem)
        return 0.5

    given: dict[str, dict[str, Any]] = {
        "view": {"view": Loud()},
        "problem": {"problem_text": "what the verifier reads"},
        "read_step": {"read_step": str.strip},
        "lambda": {"read_step": lambda text: text.strip()},
        "selector": {"selector": Rebase(0.2)},
        "verifier": {"verifier": verifier},
    }
    with busy(engine):
        lent, found = [], []
        for options in given.values():
            before = helper_of(engine).num_jobs
            with frozen(engine):
                future = engine.submit(PROBLEMS[1], settings(), **options)
                lent.append(helper_of(engine).num_jobs > before)
            found.append(future.result(timeout=60))
    assert dict(zip(given, lent, strict=True)) == {
        **{"view": True, "problem": True, "read_step": True},
        **{"lambda": False, "selector": False, "verifier": False},
    }
    assert asked
    for result, options in zip(found, given.values(), strict=True):
        assert Essence(result) == Essence(alone.search(PROBLEMS[1], settings(), **options))
        assert result.strategy == ("Rebase" if "selector" in options else "ets")
    assert found[1].problem == "what the verifier reads"


def test_a_function_that_the_helper_cannot_find_is_called_here(
    engine: ETSEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = types.ModuleType("only_here")
    exec("def read(text):\n    return text.strip()\n", module.__dict__)
    monkeypatch.setitem(sys.modules, "only_here", module)
    with busy(engine):
        with frozen(engine):
            future = engine.submit(PROBLEMS[1], settings(), read_step=module.read)
            assert helper_of(engine).num_jobs == 1
        assert future.result(timeout=60).trace is not None


def test_events_arrive_in_order(engine: ETSEngine, alone: ETSEngine) -> None:
    here: list[SearchEvent] = []
    there: list[SearchEvent] = []
    alone.search(PROBLEMS[2], settings(), on_event=here.append)
    with busy(engine), frozen(engine):
        future = engine.submit(PROBLEMS[2], settings(), on_event=there.append)
        assert helper_of(engine).num_jobs == 1
    future.result(timeout=60)
    assert [(one.kind, one.depth, one.kept) for one in there] == [(one.kind, one.depth, one.kept) for one in here]


def test_a_listener_that_raises_ends_its_search(engine: ETSEngine) -> None:
    def on_event(event: SearchEvent) -> None:
        raise KeyError("not today")

    with busy(engine), frozen(engine):
        future = engine.submit(PROBLEMS[2], settings(), on_event=on_event)
        assert helper_of(engine).num_jobs == 1
    with pytest.raises(KeyError, match="not today"):
        future.result(timeout=60)


def test_cancel_and_deadline_reach_the_helper(engine: ETSEngine) -> None:
    cancel = threading.Event()

    class Broken:
        def is_set(self) -> bool:
            raise KeyError("who asks?")

    with busy(engine), frozen(engine):
        stopped = engine.submit(PROBLEMS[0], settings(), cancel=cancel)
        failed = engine.submit(PROBLEMS[0], settings(), cancel=Broken())
        late = engine.submit(PROBLEMS[0], settings(deadline_s=0.05))
        assert helper_of(engine).num_jobs == 3
        cancel.set()
        time.sleep(0.1)
    assert stopped.result(timeout=60).finish_reason == "cancelled"
    assert late.result(timeout=60).finish_reason == "deadline"
    with pytest.raises(KeyError, match="who asks"):
        failed.result(timeout=60)


def test_a_cancel_may_take_the_lock_under_which_searches_are_submitted(engine: ETSEngine) -> None:
    lock = threading.Lock()

    class Locked:
        def is_set(self) -> bool:
            with lock:
                return False

    futures: list[Future[Any]] = []
    with busy(engine):
        for i in range(60):
            with lock:
                futures.append(engine.submit(PROBLEMS[i % 8], settings(max_steps=1), cancel=Locked()))
            while len(futures) - sum(future.done() for future in futures) > 8:
                time.sleep(0.001)
    assert all(future.result(timeout=60).trace is not None for future in futures)


def test_a_flood_of_long_messages_holds_nobody_up(engine: ETSEngine) -> None:
    """Both processes send all the time, and neither waits for the other to read."""
    text, futures = "x" * 100_000, list[Future[Any]]()

    def submit(count: int) -> None:
        for i in range(count):
            futures.append(engine.submit(PROBLEMS[i % 8], settings(max_steps=1, width=1), problem_text=text))

    with busy(engine):
        callers = [threading.Thread(target=submit, args=(4,)) for _ in range(4)]
        with frozen(engine):
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join(timeout=20)
            assert not any(caller.is_alive() for caller in callers)
        assert all(isinstance(future.exception(timeout=60), ContextLengthError) for future in futures)


def test_a_future_can_be_called_off(engine: ETSEngine) -> None:
    with busy(engine), frozen(engine):
        futures = [engine.submit(problem, settings()) for problem in PROBLEMS[:3]]
        assert helper_of(engine).num_jobs == 3
        assert futures[1].cancel()
        assert futures[1] in wait(futures, timeout=5, return_when="FIRST_COMPLETED").done, "who waits is told"
        assert helper_of(engine).num_jobs == 2
    with pytest.raises(CancelledError):
        futures[1].result()
    assert futures[0].result(timeout=60).trace is not None and futures[2].result(timeout=60).trace is not None


def test_errors_keep_their_kind(engine: ETSEngine) -> None:
    with busy(engine), frozen(engine):
        future = engine.submit("1+" * 5000, settings())
        assert helper_of(engine).num_jobs == 1
    with pytest.raises(ContextLengthError, match="tokens"):
        future.result(timeout=60)


def test_a_helper_is_given_no_more_than_may_wait(engine: ETSEngine) -> None:
    futures: list[Future[Any]] = []
    with busy(engine), busy(engine, 8), frozen(engine):
        futures += [engine.submit(PROBLEMS[0], settings(max_steps=1)) for _ in range(24)]
        assert helper_of(engine).num_jobs == 16
    for future in futures:
        future.result(timeout=60)


@pytest.mark.parametrize("how", ["killed", "garbled"])
def test_searches_of_a_helper_that_dies_begin_anew_here(
    folders: tuple[str, str], alone: ETSEngine, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[SearchEvent] = []
    once: list[SearchEvent] = []
    long = settings(max_steps=12, max_tokens=120, width=12)
    expected = [Essence(alone.search(problem, long)) for problem in PROBLEMS]
    alone.search(PROBLEMS[0], long, on_event=once.append)
    with make(folders, processes=2) as engine:
        with busy(engine):
            futures = [engine.submit(problem, long, on_event=events.append) for problem in PROBLEMS[:1]]
            while not any(event.kind == "step" for event in events):
                time.sleep(0.0005)
            if how == "killed":
                os.kill(pid_of(engine), signal.SIGKILL)
            else:
                guest = next(iter(engine._crew._guests.values()))
                guest.courier.tell = None  # type: ignore[assignment] # what the helper's thread does next fails
            futures += [engine.submit(problem, long) for problem in PROBLEMS[1:]]
            found = [Essence(future.result(timeout=60)) for future in futures]
        assert found == expected
        assert "a helper process" in caplog.text
        shown = [(one.kind, one.depth) for one in events]
        assert shown == sorted(set(shown), key=shown.index), "nothing is told twice"
        assert {depth for kind, depth in shown if kind == "step"} == {one.depth for one in once if one.kind == "step"}
        assert not helper_of(engine).is_alive
        assert engine.search(PROBLEMS[0], settings()).trace is not None, "it goes on with the processes that it has"
        settle(engine)


def test_close_finishes_what_every_process_has(folders: tuple[str, str], caplog: pytest.LogCaptureFixture) -> None:
    engine, cancel = make(folders, processes=2), threading.Event()
    closing = threading.Thread(target=engine.close)
    with busy(engine), frozen(engine):
        futures = [
            engine.submit(problem, settings(), cancel=cancel if i == 3 else None, on_event=lambda event: None)
            for i, problem in enumerate(PROBLEMS)
        ]
        assert helper_of(engine).num_jobs == len(PROBLEMS)
        closing.start()
        while not engine._crew.is_closed:
            time.sleep(0.001)
        with pytest.raises(EngineClosedError, match="closed"):
            engine.submit(PROBLEMS[0], settings())
        cancel.set()
        time.sleep(0.1)
    closing.join(timeout=30)
    reasons = [future.result(timeout=10).finish_reason for future in futures]
    assert reasons[3] == "cancelled" and "cancelled" not in reasons[:3] + reasons[4:]
    assert helper_of(engine).exit_code == 0 and not is_running(pid_of(engine))
    assert not caplog.records


def test_a_helper_may_die_while_its_engine_closes_and_the_queue_is_full(
    folders: tuple[str, str], alone: ETSEngine
) -> None:
    engine = make(folders, processes=2)
    closing = threading.Thread(target=engine.close)
    with busy(engine), frozen(engine):
        futures = [engine.submit(problem, settings()) for problem in PROBLEMS]
        engine._worker._max_queued = 1
        closing.start()
        while not engine._crew.is_closed:
            time.sleep(0.001)
        os.kill(pid_of(engine), signal.SIGKILL)
        while helper_of(engine).is_alive:
            time.sleep(0.001)
    found = [Essence(future.result(timeout=30)) for future in futures]
    closing.join(timeout=30)
    assert not closing.is_alive()
    assert found == [Essence(alone.search(problem, settings())) for problem in PROBLEMS]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_fork_leaves_the_helper_alone(engine: ETSEngine) -> None:
    child = os.fork()
    if child == 0:
        try:
            engine.close()
            engine._crew.stop()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    with busy(engine):
        assert engine.submit(PROBLEMS[0], settings()).result(timeout=60).trace is not None
    assert helper_of(engine).is_alive


def test_settings_that_cannot_be_honoured_are_refused(folders: tuple[str, str], tmp_path: Path) -> None:
    config = EngineConfig(device="cpu", processes=2)
    preset = Preset("mine", "for a test", boundary=StepBoundary("\n"))
    with pytest.raises(ConfigError, match="processes=2 and preset='mine'"):
        ETSEngine.from_pretrained(*folders, config, preset=preset)
    with pytest.raises(ModelLoadError):
        ETSEngine.from_pretrained(str(tmp_path), None, config)


def test_a_helper_that_cannot_start_is_an_error_at_load(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(helpers, "PROGRAM", "raise SystemExit(3)")
    with pytest.raises(ModelLoadError, match="ended with code 3"):
        make(folders, processes=2)


def test_a_helpers_own_trouble_at_load_is_an_error_too(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    start = Helper.__init__

    def elsewhere(self: Helper, order: Any) -> None:
        start(self, replace(order, model="/no/such/folder"))

    monkeypatch.setattr(Helper, "__init__", elsewhere)
    with pytest.raises(ModelLoadError, match="/no/such/folder"):
        make(folders, processes=2)


@pytest.mark.parametrize("end", ["return", "SIGKILL"])
def test_no_process_outlives_the_engines(folders: tuple[str, str], end: str) -> None:
    """Whether the main program ends with searches under way, or is killed."""
    code = f"""
import os, signal
from ets_engine import EngineConfig, ETSEngine, SearchConfig
engine = ETSEngine.from_pretrained(*{folders!r}, EngineConfig(device="cpu", processes=2))
futures = [engine.submit("what is 1+1?", SearchConfig(width=32, max_steps=40)) for _ in range(40)]
print(engine._crew._helpers[0]._process.pid, flush=True)
if {end!r} == "SIGKILL":
    os.kill(os.getpid(), signal.SIGKILL)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == (0 if end == "return" else -signal.SIGKILL), done.stderr
    until_s = time.monotonic() + 20
    while is_running(int(done.stdout)) and time.monotonic() < until_s:
        time.sleep(0.05)
    assert not is_running(int(done.stdout))


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"
