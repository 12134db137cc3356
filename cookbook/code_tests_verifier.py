"""Recipe: unit tests as the verifier of code: candidates run in processes of their own, limited in time and memory.

Only finished programs are judged; an unfinished one gets a neutral score. The model here is a script of candidates, so
that the recipe runs anywhere; put your own behind `HostedEngine`, or give the scorer to `ETSEngine.search`.

Limits stop accidents, not attacks: a program can still read your files and use the network. Run code that you do not
trust in a container or a virtual machine. POSIX only.

    python cookbook/code_tests_verifier.py
"""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ets_engine import HostedEngine, SearchConfig
from ets_engine.hosted import ProposalRequest
from ets_engine.scorers import OutcomeScorer
from ets_engine.types import Step, StopReason

PROGRAM = re.compile(r"```python\n(.*?)```", re.S)
LIMITED = """
import resource, sys
for kind, most in (("CPU", {timeout_s}), ("AS", {memory_bytes}), ("FSIZE", {file_bytes}), ("CORE", 0)):
    resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
exec(compile(sys.stdin.read(), "candidate", "exec"), {{"__name__": "candidate"}})
"""


@dataclass(frozen=True)
class CodeTests:
    """Scores a solution by the share of tests that its last program passes; 0.0 without a program.

    Attributes:
        tests: Python statements, each run after the program in a process of its own; one that raises has failed.
        timeout_s: Seconds that one may take, of the clock and of the CPU.
        memory_bytes: Address space that it may take.
        file_bytes: Size of the largest file that it may write.
    """

    tests: tuple[str, ...]
    timeout_s: int = 5
    memory_bytes: int = 512 * 2**20
    file_bytes: int = 2**20

    def __call__(self, problem: str, steps: Sequence[str]) -> float:
        programs = PROGRAM.findall("".join(steps))
        return sum(self.passes(programs[-1], test) for test in self.tests) / len(self.tests) if programs else 0.0

    def passes(self, program: str, test: str) -> bool:
        """Whether the test runs to its end after the program: one that leaves early, with whatever status, has failed.

        A process that outlives its time is killed, with all that it started.
        """
        done = secrets.token_hex(8)  # a file that is written at the very end
        prelude = LIMITED.format(timeout_s=self.timeout_s, memory_bytes=self.memory_bytes, file_bytes=self.file_bytes)
        with tempfile.TemporaryDirectory() as folder:
            running = subprocess.Popen(
                [sys.executable, "-I", "-c", prelude],
                cwd=folder,
                env={},
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
            with running:
                try:
                    running.communicate(f"{program}\n{test}\nopen({done!r}, 'w').close()\n".encode(), self.timeout_s)
                except subprocess.TimeoutExpired:
                    return False
                finally:
                    with suppress(ProcessLookupError):
                        os.killpg(running.pid, signal.SIGKILL)
            return (Path(folder) / done).exists()


TESTS = ("assert fib(0) == 0", "assert fib(1) == 1", "assert fib(10) == 55", "assert fib(90) > 10**18")
PLANS = ("Recursion will do.\n", "Two variables and a loop.\n")
BODIES = {
    PLANS[0]: "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)\n",  # too slow for fib(90)
    PLANS[1]: "def fib(n):\n    a, b = 0, 1\n    for _ in range(n):\n        a, b = b, a + b\n    return a\n",
}


def propose(request: ProposalRequest) -> list[Step]:
    """A stand-in for a model: first one of two plans, then the program to it."""
    steps = []
    for child, partial in zip(request.children, request.partials, strict=True):
        if not partial:
            steps.append(Step(PLANS[child % 2], 6, StopReason.BOUNDARY))
        else:
            steps.append(Step(f"```python\n{BODIES[partial]}```", 40, StopReason.FINISHED))
    return steps


def main() -> None:
    """Search for a program that passes the tests."""
    verifier = OutcomeScorer(CodeTests(TESTS, timeout_s=2), lambda text: PROGRAM.search(text) is not None, neutral=0.5)
    with HostedEngine(propose, verifier, name="scripted") as engine:
        config = SearchConfig(strategy="rebase", width=4, vote="best")
        result = engine.search("Write fib(n), the n-th Fibonacci number, in Python.", config)
    print(result.text)
    print(f"score {result.score:.2f}: {len(TESTS)} tests, {result.trajectories} programs judged")


if __name__ == "__main__":
    main()
