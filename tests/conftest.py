"""What every test may rely on: no network, no deadlines, and GPU tests that skip or fail, never silently pass."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings

if TYPE_CHECKING:
    import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach a network

# A deadline measures how busy the machine is. On CI the examples are the same each time; elsewhere new ones are tried.
settings.register_profile("project", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("project")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip a test marked `gpu` where there is no CUDA device, or fail it where ETS_REQUIRE_GPU=1."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        if os.environ.get("ETS_REQUIRE_GPU") == "1":
            pytest.fail("ETS_REQUIRE_GPU=1, but there is no CUDA device")
        pytest.skip("no CUDA device")


@pytest.fixture
def cuda(request: pytest.FixtureRequest) -> torch.device:
    """The CUDA device, for tests marked `gpu`."""
    import torch

    assert request.node.get_closest_marker("gpu"), "a test that takes `cuda` must be marked `gpu`"
    return torch.device("cuda")
