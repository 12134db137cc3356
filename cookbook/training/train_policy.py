"""Train the reference policy on generated problems; resumable, the same weights for the same seed and machine.

    python cookbook/training/train_policy.py --steps 3000 --out runs/policy
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from data import Encoder, build_tokenizer, policy_batch
from transformers import LlamaConfig, LlamaForCausalLM


def make_model(vocab_size: int, bos: int, eos: int, pad: int) -> LlamaForCausalLM:
    """The reference architecture: a plain 2.4M-parameter Llama with grouped queries and tied embeddings."""
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        num_hidden_layers=6,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=32,
        intermediate_size=512,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


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


def save(path: Path, model: torch.nn.Module, optimizers: list[torch.optim.Optimizer], step: int, seconds: float) -> None:
    """Write a checkpoint that training can go on from."""
    state = {"model": model.state_dict(), "step": step, "seconds": seconds}
    torch.save(state | {"optimizers": [o.state_dict() for o in optimizers]}, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").rename(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--tokens", type=int, default=2560, help="tokens per family per step")
    parser.add_argument("--lr", type=float, default=2.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/policy"))
    parser.add_argument("--snapshots", type=int, nargs="*", default=[], help="also export the model at these steps")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = build_tokenizer()
    encode = Encoder(tokenizer)
    model = make_model(len(tokenizer), encode.bos, encode.eos, encode.pad).to(args.device)
    optimizers = make_optimizers(model, args.lr)
    start, seconds = 0, 0.0
    checkpoint = args.out / "checkpoint.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        start, seconds = state["step"], state["seconds"]
    body = model.model if args.no_compile else torch.compile(model.model, dynamic=True)
    began = time.time() - seconds
    for step in range(start, args.steps):
        set_lr(optimizers, args.lr, step, args.steps)
        losses: dict[str, float] = {}
        for family in ("countdown", "story"):
            ids, targets = policy_batch(Random(f"{args.seed}/{step}/{family}"), encode, family, args.tokens)
            ids, targets = ids.to(args.device), targets.to(args.device)
            hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            kept = targets[:, 1:] >= 0
            loss = F.cross_entropy(model.lm_head(hidden[kept]), targets[:, 1:][kept])
            (loss / 2).backward()
            losses[family] = loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if (step + 1) % 25 == 0:
            print(json.dumps({"step": step + 1, "s": round(time.time() - began), **losses}), flush=True)
        if (step + 1) % 200 == 0 or step + 1 == args.steps:
            save(checkpoint, model, optimizers, step + 1, time.time() - began)
        if step + 1 in args.snapshots or step + 1 == args.steps:
            folder = args.out / f"step-{step + 1}"
            model.save_pretrained(folder)
            tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    main()
