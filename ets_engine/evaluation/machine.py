"""What something was measured on: machine, versions, commit, and how fast it copies and multiplies."""

from __future__ import annotations

import platform
import re
import subprocess
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16")  # that matter to matmuls
COPY_BYTES = 1 << 28


def provenance(device: str = "cpu") -> dict[str, Any]:
    """The GPU, or the CPU and its instructions that matter; versions, commit, and the threads that torch is set to.

    An engine computes with one thread where its models are small (`ets_engine.runtime.threads`), whatever that says.
    """
    import scipy
    import torch
    import transformers

    return {
        **_machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "scipy": scipy.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def copy_gb_s(device: str = "cpu", repeats: int = 5) -> float:
    """Bytes read plus bytes written per second by a large copy, the best of some tries (GB/s)."""
    import torch

    source = torch.zeros(COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best_s = float("inf")
    for _ in range(repeats + 1):  # the first one touches the pages
        began_s = time.perf_counter()
        target.copy_(source)
        if source.device.type == "cuda":
            torch.cuda.synchronize(source.device)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * COPY_BYTES / best_s / 1e9


def matmul_flops_per_s(dtype: torch.dtype, device: str = "cpu", repeats: int = 5) -> float:
    """Floating-point operations per second of a large square product, the best of some tries."""
    import torch

    size = 8192 if device.startswith("cuda") else 1024
    left = torch.randn((size, size), device=device).to(dtype)
    best_s = float("inf")
    for _ in range(repeats + 1):  # the first one prepares
        began_s = time.perf_counter()
        torch.mm(left, left)
        if left.device.type == "cuda":
            torch.cuda.synchronize(left.device)
        best_s = min(best_s, time.perf_counter() - began_s)
    return 2 * size**3 / best_s


def _machine(device: str) -> dict[str, Any]:
    if device != "cpu":
        import torch

        return {"machine": torch.cuda.get_device_name(device), "instructions": []}
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    name = re.search(r"^model name\s*: (.*)$", info, re.M)
    flags = set((re.search(r"^flags\s*: (.*)$", info, re.M) or [""])[0].split())
    return {
        "machine": name[1] if name else platform.processor() or platform.machine(),
        "instructions": [flag for flag in INSTRUCTIONS if flag in flags],
    }


def _commit() -> str:
    """Short hash of the checkout, "unknown" outside of one."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() if done.returncode == 0 else "unknown"
