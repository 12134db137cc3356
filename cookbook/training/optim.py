"""What both training scripts share: optimizers, their schedule, the machine's precision, checkpoints to go on from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """Momentum made orthogonal (Newton-Schulz, K. Jordan 2024), at the scale of AdamW's steps (arXiv 2502.16982).

    As `torch.optim.Muon`, in float32: that one computes in bfloat16 whatever the machine, 40 times slower on a CPU
    without instructions for it.
    """

    def __init__(self, params: list[Tensor], lr: float, momentum: float = 0.95, weight_decay: float = 0.05) -> None:
        """See the class."""
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """One step on the gradients there are."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if "momentum" not in self.state[matrix]:
                    self.state[matrix]["momentum"] = torch.zeros_like(matrix)
                average = self.state[matrix]["momentum"].lerp_(matrix.grad, 1 - group["momentum"])
                direction = orthogonalize(matrix.grad.lerp(average, group["momentum"]))
                matrix.mul_(1 - group["lr"] * group["weight_decay"])
                matrix.add_(direction, alpha=-0.2 * max(matrix.shape) ** 0.5 * group["lr"])


def orthogonalize(matrix: Tensor) -> Tensor:
    """Singular values brought near one, singular vectors kept."""
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    out = wide / wide.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = out @ out.T
        out = 3.4445 * out + (-4.7750 * gram + 2.0315 * gram @ gram) @ out
    return out.T if matrix.shape[0] > matrix.shape[1] else out


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, heads and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [Muon(matrices, lr), torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


def has_fast_bf16(device: str) -> bool:
    """Whether bfloat16 is worth using: on a CPU without instructions for it, it is many times slower than float32."""
    return device != "cpu" or torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def set_lr(optimizers: list[torch.optim.Optimizer], peak: float, step: int, steps: int, warmup: int = 100) -> None:
    """Linear warm-up, flat, then linear decay to zero over the last 60 %."""
    lr = peak * min(1.0, (step + 1) / warmup, max(0.0, (steps - step) / (0.6 * steps)))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr


def update(model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    """One optimizer step on the gradients gathered so far, clipped; then forget them."""
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def save(
    path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float
) -> None:
    """Write a checkpoint that training can go on from."""
    state = {"model": model.state_dict(), "step": step, "seconds": seconds}
    torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def resume(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer]) -> tuple[int, float]:
    """Load a checkpoint if there is one; steps done and seconds spent so far."""
    if not path.exists():
        return 0, 0.0
    state = torch.load(path, weights_only=True)
    model.load_state_dict(state["model"])
    for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
        optimizer.load_state_dict(saved)
    return state["step"], state["seconds"]
