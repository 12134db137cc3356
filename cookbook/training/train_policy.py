"""Train the reference policy on generated problems; resumable, the same weights for the same seed and machine.

python cookbook/training/train_policy.py --steps 2400 --out runs/policy
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from data import MAX_TOKENS, Encoder, adopt, build_tokenizer, drill_batch, policy_batch
from optim import has_fast_bf16, make_optimizers, resume, save, set_lr, update


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
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        bos_token_id=bos,
        eos_token_id=eos,
        pad_token_id=pad,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--init", type=Path, help="weights to go on from, instead of random ones")
    parser.add_argument("--tokens", type=int, nargs=2, default=[4096, 6144], help="per step: of countdown, of story")
    parser.add_argument("--drills", type=int, default=150, help="first steps, in which stories only look numbers up")
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
    if args.init:
        model = LlamaForCausalLM.from_pretrained(args.init, dtype=torch.float32).train()
        adopt(model, AutoTokenizer.from_pretrained(args.init), tokenizer)
    else:
        model = make_model(len(tokenizer), encode.bos, encode.eos, encode.pad)
    model.to(args.device)
    if has_fast_bf16(args.device):
        model.set_attn_implementation("eager")  # then trains twice as fast as SDPA on a CPU at these lengths
    optimizers = make_optimizers(model, args.lr)
    checkpoint = args.out / "checkpoint.pt"
    start, seconds = resume(checkpoint, model, optimizers)
    body = model.model if args.no_compile else torch.compile(model.model, dynamic=True)
    began = time.time() - seconds
    for step in range(start, args.steps):
        set_lr(optimizers, args.lr, step, args.steps)
        losses: dict[str, float] = {}
        for family, num_tokens in zip(("countdown", "story"), args.tokens, strict=True):
            rng = Random(f"{args.seed}/{step}/{family}")
            if family == "story" and step < args.drills:
                ids, targets = drill_batch(rng, encode, num_tokens)
            else:
                ids, targets = policy_batch(rng, encode, family, num_tokens)
            ids, targets = ids.to(args.device), targets.to(args.device)
            kept = targets[:, 1:] >= 0
            with torch.autocast(args.device, dtype=torch.bfloat16, enabled=has_fast_bf16(args.device)):
                hidden = body(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
                logits = model.lm_head(hidden[kept])
            loss = F.cross_entropy(logits.float(), targets[:, 1:][kept])
            (loss / 2).backward()
            losses[family] = loss.item()
        update(model, optimizers)
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
