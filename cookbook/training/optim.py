"""What both training scripts share: optimizers, the learning-rate schedule, and checkpoints to go on from."""

from __future__ import annotations

from pathlib import Path

import torch


def make_optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, heads and norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and ".layers." in name)]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


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
