"""What a bench's row was measured with: machine, versions, commit."""

from __future__ import annotations

import platform
import re
import subprocess
from pathlib import Path

import torch
import transformers

INSTRUCTIONS = ("avx2", "avx512f", "avx512_bf16", "avx512_fp16", "avx_vnni", "amx_bf16")  # that matter to matmuls


def provenance(device: str = "cpu") -> dict[str, object]:
    """Fields of a row: the GPU, or the CPU and its instructions that matter; threads, versions, commit."""
    return {
        **_machine(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "commit": _commit(),
    }


def _machine(device: str) -> dict[str, object]:
    if device != "cpu":
        return {"machine": torch.cuda.get_device_name(), "instructions": []}
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
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else "unknown"
