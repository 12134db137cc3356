"""In which threads torch computes, and with how many of its own."""

from __future__ import annotations

import contextvars
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from ets_engine.runtime.runner import Runner

SMALL_PARAMETERS = 10_000_000

T = TypeVar("T")

_LOGGER = logging.getLogger(__name__)
_changing = threading.Lock()


def run_apart(work: Callable[[], T]) -> T:
    """What the work returns or raises, from a thread of its own that has ended by then.

    OpenMP gives each thread that computes a team of threads, and keeps it as long as that thread lives. Once all teams
    together outnumber the cores, GNU's lets those that wait sleep at once, and every operation of the engine's thread
    has to wake some: on two cores, decode passes of 16 rows through 143 million parameters took 71 and 81 ms after the
    model had been loaded in the main thread, 62 and 64 ms after it had been loaded here (two runs, no bench kept).

    Example:
        >>> run_apart(lambda: 1 + 1)
        2
    """
    pool = ThreadPoolExecutor(1, thread_name_prefix="ets-apart")
    future = pool.submit(contextvars.copy_context().run, work)
    try:
        return future.result()
    finally:
        pool.shutdown(wait=future.done())  # who interrupts this does not wait for the work


def are_small(runners: Sequence[Runner]) -> bool:
    """Whether these models, on a CPU, have fewer parameters each than are worth a second thread.

    Waking threads takes longer than most operations on such a model: on two cores a search of width 16 on the shipped
    models (3.2 million parameters each) took 0.85 to 1.0 s with two threads and 0.45 to 0.66 s with one, 32 of them
    together 0.27 to 0.34 and 0.19 to 0.27 s each (`bench_serving.py --widths 16 --threads 2` and `1`, at commit
    f6ec125, before this was decided here). Where the bound lies between these and 143 million, which two threads do
    decode faster, has not been measured.
    """
    return all(one.device.type == "cpu" and one.num_parameters < SMALL_PARAMETERS for one in runners)


def share_threads(num_processes: int, *, is_small: bool) -> int | None:
    """Threads for the passes of one of several processes with the same models (count), None = as many as torch has.

    Example:
        >>> share_threads(2, is_small=True), share_threads(1, is_small=False)
        (1, None)
    """
    if is_small:
        return 1
    return None if num_processes == 1 else max(1, torch.get_num_threads() // num_processes)


def use_threads(count: int) -> None:
    """Have torch compute with so many threads in the calling thread, and with as many as before in all others.

    A thread that computes for the very first time while this is being set may be left with as many.
    """
    with _changing:
        usual = torch.get_num_threads()
        if usual == count:
            return
        torch.set_num_threads(count)  # here, and in threads that begin to compute later
        try:
            restore = threading.Thread(target=torch.set_num_threads, args=(usual,), name="ets-threads")
            restore.start()
            restore.join()
        except RuntimeError as error:  # no thread can be started
            torch.set_num_threads(usual)
            _LOGGER.warning("models run on %d threads instead of %d, which is slower: %s", usual, count, error)
