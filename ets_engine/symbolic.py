"""Symbolic equality by math-verify, in a process of its own: what never ends is killed with it, in whatever thread.

Sympy cannot be interrupted from outside (`9^{9^9}` is one call into C), and math-verify's own time limits need signals,
which only a main thread gets.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import suppress
from functools import lru_cache
from pathlib import Path

_LOGGER = logging.getLogger(__name__)
_START_S = 60  # most seconds until math-verify is imported
_MEMORY_BYTES = 4 << 30  # of address space
_READY = b"."


class SymbolicProcess:
    """Compares from any thread, one pair at a time; starts at the first one, and again after one that took too long.

    Args:
        limit_s: Most seconds for one expression or pair; then the answer is no.

    Example:
        >>> process = SymbolicProcess()
        >>> process.same("x+1", "1+x"), process.same("x+1", "x")
        (True, False)
        >>> process.close()
    """

    def __init__(self, limit_s: int = 3) -> None:
        self._limit_s = limit_s
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # process id of who started it: a forked child must not talk into its parent's pipe
        self._has_warned = False
        self._deaths = Counter[str]()  # how often an expression cost the process its life
        self._ask = lru_cache(maxsize=20_000)(self._ask_once)

    def same(self, left: str, right: str) -> bool:
        """Whether two LaTeX expressions are equal; no where one is illegible or they take too long.

        An expression that took too long twice is never looked at again: it would cost the limit with every other one.
        """
        if max(self._deaths[left], self._deaths[right]) > 1:
            return False
        try:
            return self._ask(left) and self._ask(right) and self._ask(left, right)
        except OSError as error:  # it did not start: this says nothing of the expressions, and is not remembered
            if not self._has_warned:
                _LOGGER.warning("answers are compared without math-verify, and some that are equal differ: %s", error)
            self._has_warned = True
            return False

    def close(self) -> None:
        """End the process; another comparison starts one again."""
        with self._lock:
            self._stop()

    def _ask_once(self, *texts: str) -> bool:
        with self._lock:
            stdin, stdout = self._pipes()
            try:
                os.write(stdin, json.dumps(texts).encode() + b"\n")
                reply = os.read(stdout, 1)
            except OSError:
                reply = b""
            if not reply:  # it ran out of time or memory, and is dead
                self._deaths.update(texts)
                self._stop()
            return reply == b"1"

    def _pipes(self) -> tuple[int, int]:
        if self._process is None or self._owner != os.getpid():
            self._process = self._start()
            self._owner = os.getpid()
        assert self._process.stdin is not None and self._process.stdout is not None
        return self._process.stdin.fileno(), self._process.stdout.fileno()

    def _start(self) -> subprocess.Popen[bytes]:
        """A process that has said it is ready."""
        here = str(Path(__file__).parents[1])
        process = subprocess.Popen(  # -P: a random.py where the user stands is not Python's
            [sys.executable, "-P", "-c", f"from ets_engine.symbolic import serve; serve({self._limit_s})"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(path or here for path in sys.path)},
            start_new_session=True,  # the terminal's Ctrl-C is not meant for it
        )
        assert process.stdout is not None
        if os.read(process.stdout.fileno(), 1) != _READY:
            process.kill()
            process.communicate()
            raise ChildProcessError(f"its process ended with {process.returncode} before it was ready")
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is not None and self._owner == os.getpid():
            process.kill()
            process.communicate()


def serve(limit_s: int) -> None:
    """The process: per line of standard input a list of one expression (legible?) or two (equal?), one byte back.

    `_READY` comes before all replies.
    """
    signal.alarm(_START_S)  # its default action ends the process, whatever it is busy with
    from math_verify import parse, verify

    with suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))

    @lru_cache(maxsize=10_000)
    def read(text: str) -> list[object]:
        return parse(f"${text}$", parsing_timeout=None)  # type: ignore[arg-type]

    def equal(gold: list[object], found: list[object]) -> bool:  # it is not always the same both ways: x > 3, (3, oo)
        return bool(verify(gold, found, timeout_seconds=None))  # type: ignore[arg-type]

    replies = os.dup(1)
    os.dup2(2, 1)  # what libraries print is no reply
    signal.alarm(0)
    os.write(replies, _READY)
    for line in sys.stdin:
        right = False
        signal.alarm(limit_s)
        with suppress(Exception):
            first, *second = map(read, json.loads(line))
            right = bool(first and (not second or equal(first, second[0]) or equal(second[0], first)))
        signal.alarm(0)
        os.write(replies, b"1" if right else b"0")
