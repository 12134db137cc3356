"""How many threads torch computes with in the thread that runs the models."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch

from ets_engine.runtime.runner import Runner

SMALL_PARAMETERS = 10_000_000


def are_small(runners: Sequence[Runner]) -> bool:
    """Whether these models, on a CPU, have fewer parameters than are worth a second thread.

    Waking threads takes longer than most operations on such a model. On two cores the shipped models (3.2 million
    parameters each) search no faster with two threads than with one, 0.41 and 0.40 s at width 16; and once another
    thread has computed as well, so that OpenMP has more threads than there are cores and puts waiting ones to sleep at
    once, with two they take 0.78 s.
    """
    return all(one.device.type == "cpu" and one.num_parameters < SMALL_PARAMETERS for one in runners)


def use_one_thread() -> None:
    """Have torch compute with one thread in the calling thread, and with as many as before in all others."""
    usual = torch.get_num_threads()
    torch.set_num_threads(1)  # here, and in threads that begin to compute later
    restore = threading.Thread(target=torch.set_num_threads, args=(usual,), name="ets-threads")
    restore.start()
    restore.join()
