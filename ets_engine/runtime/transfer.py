"""Between host and device without waiting for what the device is still busy with; on a CPU, nothing to it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from numpy.typing import NDArray


def upload(
    numbers: Sequence[int] | Sequence[float] | NDArray[np.generic], device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    """Numbers on a device, behind what it does now. [N].

    Example:
        >>> upload([1, 2], torch.device("cpu"), torch.int64)
        tensor([1, 2])
    """
    tensor = torch.as_tensor(numbers, dtype=dtype)
    return tensor if device.type == "cpu" else tensor.pin_memory().to(device, non_blocking=True)


class Readback:
    """Reads tensors as they were at a mark, while the device goes on with what was launched after it.

    Args:
        device: Of the tensors.

    Example:
        >>> readback, numbers = Readback(torch.device("cpu")), torch.ones(2)
        >>> readback.mark()
        >>> with readback.reading():
        ...     numbers.tolist()
        [1.0, 1.0]
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._event = torch.cuda.Event() if device.type == "cuda" else None

    def mark(self) -> None:
        """What has been launched until now is what `reading` waits for."""
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Work and copies to the host that begin right after the mark; what was launched later must not change them."""
        if self._stream is None or self._event is None:
            yield
            return
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(self._event)
            yield
            self._stream.synchronize()
