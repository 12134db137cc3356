"""One helper process as its engine sees it: started, talked to, ended; it knows no jobs."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from typing import Protocol

from ets_engine.errors import ConfigError, ModelLoadError
from ets_engine.serving.channel import Channel
from ets_engine.serving.messages import Order, Ready
from ets_engine.types import EngineStats

PROGRAM = "import ets_engine.helper_process as _; _.main({handle})"
POLL_S = 0.02  # how often cancellation is looked at while the process has jobs
IDLE_S = 0.1  # and how often whether it has any
END_S = 30.0  # how long a process that has nothing left to do may take to end

_LOGGER = logging.getLogger(__name__)


class Listener(Protocol):
    """Who is told what a helper says; all calls come from one thread per helper."""

    def hear(self, helper: Helper, message: object) -> None:
        """A message came."""
        ...

    def look_after(self, helper: Helper) -> None:
        """Called every now and then."""
        ...

    def part(self, helper: Helper) -> None:
        """The process has ended, or is ended now: nothing comes from it any more."""
        ...

    def replace(self, helper: Helper) -> None:
        """It ended by itself, and all that it leaves is done."""
        ...

    def welcome(self, helper: Helper) -> None:
        """It had not loaded its models when it was first listened to, and has now."""
        ...


class Helper:
    """A process with the same models as the engine's.

    Args:
        order: What it is to load.
        folder: Where it is started, and paths begin; None = here.

    Attributes:
        num_jobs: Jobs that it has (count); its crew counts them.
        is_alive: Whether it can be given jobs.
        is_ready: Whether its models are loaded.
        served_s: How long it was ready until it ended; 0.0 before.
        stats: What it had done when it last finished one.

    Raises:
        ConfigError: This system has no socket pairs that a child process can inherit, or no Python to start.
    """

    def __init__(self, order: Order, folder: str | None = None) -> None:
        """Start it; `wait_ready` says when it can take jobs."""
        if os.name != "posix" or not sys.executable or getattr(sys, "frozen", False):
            raise ConfigError("EngineConfig.processes > 1 needs a POSIX system and a Python to start; leave it at 1")
        ours, theirs = socket.socketpair()
        self._order, self._folder = order, folder or os.getcwd()
        path = os.pathsep.join(one or self._folder for one in sys.path if isinstance(one, str))
        with ours, theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", PROGRAM.format(handle=theirs.fileno())],
                stdin=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": path},
                cwd=self._folder,
            )
            self._channel = Channel(ours.detach())
        self._thread: threading.Thread | None = None
        self._is_expected_to_end = self._is_killed = False
        self.num_jobs = 0
        self.is_alive = True
        self.is_ready = False
        self.served_s = self._ready_s = 0.0
        self.stats: EngineStats | None = None
        self._channel.put(order)

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """Of the process, None = it has not been seen to end."""
        return self._process.returncode

    def start_another(self) -> Helper:
        """One with the same models, that can be given no jobs yet.

        Raises:
            OSError: The system has no room for one.
            ConfigError: As for the first one.
        """
        helper = Helper(self._order, self._folder)
        helper.is_alive = False
        return helper

    def wait_ready(self) -> None:
        """Wait until its models are loaded.

        Raises:
            ETSError: What the engine itself would raise while it loads such models.
            ModelLoadError: The process ended meanwhile.
        """
        try:
            while not self._channel.poll(IDLE_S):  # a fork of somebody's may keep its end of the socket open
                if self._process.poll() is not None and not self._channel.poll(0):
                    raise EOFError
            ready = self._channel.get()
        except (EOFError, OSError) as error:
            code = self._reap()
            raise ModelLoadError(f"a helper process ended with code {code} while it loaded its models") from error
        assert isinstance(ready, Ready)
        if ready.error is not None:
            raise ready.error
        self.is_ready, self._ready_s = True, time.monotonic()

    def listen(self, listener: Listener) -> None:
        """Tell somebody what it says, until it ends; where its models are not loaded yet, when they are."""
        thread = threading.Thread(target=self._listen, args=(listener,), name="ets-helper", daemon=True)
        thread.start()
        self._thread = thread

    def put(self, message: object) -> None:
        """Tell it something; where it has ended, nobody hears that."""
        self._channel.put(message)

    def expect_end(self) -> None:
        """From now on its end is no surprise."""
        self._is_expected_to_end = True

    def kill(self) -> None:
        """End it at once."""
        self._is_killed = True
        self._process.kill()
        if self._thread is None:
            self._reap()
            self._channel.close()

    def join(self) -> None:
        """Wait until it has ended."""
        if self._thread is not None:
            self._thread.join()

    def _listen(self, listener: Listener) -> None:
        looked_s = 0.0
        try:
            while self.is_ready or self._get_ready(listener):
                if self._channel.poll(POLL_S if self.num_jobs else IDLE_S):
                    listener.hear(self, self._channel.get())
                elif self._process.poll() is not None:  # a fork of somebody's may keep its end of the socket open
                    break
                if time.monotonic() - looked_s >= POLL_S:
                    listener.look_after(self)
                    looked_s = time.monotonic()
        except (EOFError, OSError):
            pass
        except BaseException:
            _LOGGER.exception("what a helper process said could not be read; it is ended")
            self._process.kill()
        num_left = self.num_jobs
        self.served_s = time.monotonic() - self._ready_s if self.is_ready else 0.0
        listener.part(self)
        code = self._reap()
        self._channel.close()
        if not self._is_killed and (num_left or not self._is_expected_to_end):
            _LOGGER.warning(
                "a helper process ended with code %s; its %d searches begin anew in the engine's own", code, num_left
            )
            listener.replace(self)

    def _get_ready(self, listener: Listener) -> bool:
        """Wait until its models are loaded; False where they cannot be, and it is ended."""
        try:
            self.wait_ready()
        except Exception as error:  # whatever loading raises there
            if not self._is_killed:
                _LOGGER.warning("another helper process could not load its models: %r", error)
            self._is_killed = True
            self._process.kill()
            return False
        listener.welcome(self)
        return True

    def _reap(self) -> int:
        """Wait for its end, and see to it; the exit code."""
        try:
            return self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
