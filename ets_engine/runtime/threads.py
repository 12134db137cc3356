"""How many threads torch computes with in the thread that runs the models."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence

import torch

from ets_engine.runtime.runner import Runner

SMALL_PARAMETERS = 10_000_000

_LOGGER = logging.getLogger(__name__)
_changing = threading.Lock()


def are_small(runners: Sequence[Runner]) -> bool:
    """Whether these models, on a CPU, have fewer parameters each than are worth a second thread.

    Waking threads takes longer than most operations on such a model: on two cores a search of width 16 on the shipped
    models (3.2 million parameters each) takes 0.85 to 1.0 s with two threads and 0.45 to 0.49 s with one, 32 of them
    together 0.27 to 0.34 and 0.21 to 0.23 s each. Where the bound lies between these and 190 million, which two threads
    do decode faster, has not been measured.
    """
    return all(one.device.type == "cpu" and one.num_parameters < SMALL_PARAMETERS for one in runners)


def use_one_thread() -> None:
    """Have torch compute with one thread in the calling thread, and with as many as before in all others.

    A thread that computes for the very first time while this is being set may be left with one as well.
    """
    with _changing:
        usual = torch.get_num_threads()
        if usual == 1:
            return
        torch.set_num_threads(1)  # here, and in threads that begin to compute later
        try:
            restore = threading.Thread(target=torch.set_num_threads, args=(usual,), name="ets-threads")
            restore.start()
            restore.join()
        except RuntimeError as error:  # no thread can be started
            torch.set_num_threads(usual)
            _LOGGER.warning("small models run on %d threads, which is slower: %s", usual, error)
