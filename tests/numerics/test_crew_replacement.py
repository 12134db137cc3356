"""A helper process that died is replaced by another one: when, when not, and while its engine closes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from ets_engine.serving import crew as crews
from ets_engine.serving.helper import Helper

from .test_crew import busy, helper_of, is_running, pid_of
from .test_serving import PROBLEMS, Essence, make, settings, settle

pytestmark = pytest.mark.skipif(os.name != "posix", reason="helper processes need a POSIX system")


def wait_for(condition: Callable[[], bool]) -> None:
    until_s = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until_s
        time.sleep(0.002)


def test_another_helper_takes_the_place_of_one_that_died(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "MIN_SERVED_S", 0.0)
    with make(folders) as alone:
        expected = [Essence(alone.search(problem, settings())) for problem in PROBLEMS]
    with make(folders, processes=2) as engine:
        with busy(engine):
            futures = [engine.submit(problem, settings()) for problem in PROBLEMS]
            assert [Essence(future.result(timeout=60)) for future in futures] == expected
        done = engine.stats().policy_forwards
        os.kill(pid_of(engine), signal.SIGKILL)
        wait_for(lambda: any(one.is_alive for one in engine._crew._helpers[1:]))
        first, second = engine._crew._helpers
        assert not first.is_alive and engine.stats().policy_forwards == done
        with busy(engine):
            futures = [engine.submit(problem, settings()) for problem in PROBLEMS]
            assert second.num_jobs > 0
            assert [Essence(future.result(timeout=60)) for future in futures] == expected
        settle(engine)
    assert second.exit_code == 0 and not is_running(second.pid)
    assert [record.levelname for record in caplog.records] == ["WARNING"]


def test_a_helper_that_dies_at_once_is_not_replaced(folders: tuple[str, str]) -> None:
    with make(folders, processes=2) as engine:
        os.kill(pid_of(engine), signal.SIGKILL)
        helper_of(engine).join()
        assert len(engine._crew._helpers) == 1


def test_another_helper_that_cannot_load_is_not_followed_by_a_third(
    folders: tuple[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "MIN_SERVED_S", 0.0)
    with make(folders, processes=2) as engine:
        first = helper_of(engine)
        first._order = replace(first._order, model=str(tmp_path))
        os.kill(first.pid, signal.SIGKILL)
        wait_for(lambda: len(engine._crew._helpers) == 2)
        engine._crew._helpers[1].join()
        assert len(engine._crew._helpers) == 2 and not engine._crew._helpers[1].is_alive
        assert "could not load its models: ModelLoadError" in caplog.text
        assert engine.search(PROBLEMS[0], settings()).trace is not None


def test_a_helper_started_while_its_engine_closes_is_ended(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a finalizer closes the engine in the thread that starts it."""
    monkeypatch.setattr(crews, "MIN_SERVED_S", 0.0)
    engine, start = make(folders, processes=2), Helper.start_another

    def start_and_close(self: Helper) -> Helper:
        another = start(self)
        engine._crew.close(wait=False)
        return another

    monkeypatch.setattr(Helper, "start_another", start_and_close)
    os.kill(pid_of(engine), signal.SIGKILL)
    wait_for(lambda: len(engine._crew._helpers) == 2)
    second = engine._crew._helpers[1]
    second.join()
    assert not second.is_alive and not is_running(second.pid)
    engine.close()


def test_where_no_thread_can_be_started_there_is_no_other_helper(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "MIN_SERVED_S", 0.0)
    engine = make(folders, processes=2)

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(Helper, "listen", fail)
    first = helper_of(engine)
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    assert engine._crew._helpers == (first,) and "no other helper process can be started: can't" in caplog.text
    engine.close()


def test_an_engine_may_close_while_another_helper_starts(
    folders: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(crews, "MIN_SERVED_S", 0.0)
    engine = make(folders, processes=2)
    os.kill(pid_of(engine), signal.SIGKILL)
    wait_for(lambda: len(engine._crew._helpers) == 2)
    engine.close()
    second = engine._crew._helpers[1]
    assert not second.is_alive and not second.is_ready and not is_running(second.pid)
    assert len(caplog.records) == 1, "of the first one's end"
