"""Train the reference PRM from the policy's weights, on corrupted solutions and the policy's own rollouts; resumable.

python cookbook/training/train_prm.py --init runs/policy/step-2400 --rollouts runs/rollouts.jsonl --out runs/prm
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForTokenClassification, AutoTokenizer

from data import Encoder, Judged, corrupted, shorten, verifier_batches
from optim import has_fast_bf16, make_optimizers, resume, save, set_lr, update

LANGUAGE_WEIGHT = 0.2  # of predicting right steps, beside judging them
TOKEN_WEIGHT = 0.5  # of judging every token
PARTS = 4  # of a batch on a CPU, by length: little padding; batches of short rows alone would be almost all wrong ones
FAMILIES = ("countdown", "story")


def read_rollouts(path: Path) -> dict[str, list[Judged]]:
    """Rollouts by family, as `make_rollouts.py` writes them."""
    found: dict[str, list[Judged]] = {"countdown": [], "story": []}
    with path.open() as lines:
        for line in lines:
            row = json.loads(line)
            found[row["family"]].append((row["problem"], row["lines"], row["labels"]))
    return found


def draw_samples(rng: Random, family: str, rollouts: list[Judged]) -> Iterator[Judged]:
    """Corrupted solutions, and rollouts every other time when there are any."""
    while True:
        yield shorten(rng, rng.choice(rollouts) if rollouts and rng.random() < 0.5 else corrupted(rng, family))


class Batches(Dataset[dict[str, list[tuple[Tensor, ...]]]]):
    """What each step trains on, by family; a step's batches follow from the seed and its number, whoever makes them."""

    def __init__(
        self, encode: Encoder, rollouts: dict[str, list[Judged]], seed: int, tokens: list[int], parts: int
    ) -> None:
        self.encode, self.rollouts, self.seed, self.tokens, self.parts = encode, rollouts, seed, tokens, parts

    def __getitem__(self, step: int) -> dict[str, list[tuple[Tensor, ...]]]:
        batches: dict[str, list[tuple[Tensor, ...]]] = {}
        for family, num_tokens in zip(FAMILIES, self.tokens, strict=True):
            samples = draw_samples(Random(f"prm/{self.seed}/{step}/{family}"), family, self.rollouts[family])
            batches[family] = verifier_batches(self.encode, samples, num_tokens // self.parts, self.parts)
        return batches


def describe(family: str, sums: Tensor) -> dict[str, float]:
    """A step's losses (of steps, tokens, words) and its share of steps judged right, named for the log."""
    names = (family, f"{family}_token", f"{family}_language", f"{family}_accuracy")
    return dict(zip(names, (round(value, 4) for value in sums.tolist()), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--init", type=Path, required=True, help="policy or PRM to start from")
    parser.add_argument("--rollouts", type=Path, help="labelled rollouts of the policy")
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--tokens", type=int, nargs=2, default=[5120, 5120], help="per step: of countdown, of story")
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("runs/prm"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--workers", type=int, default=0, help="processes that make batches; 12 feed a GPU")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    tokenizer = AutoTokenizer.from_pretrained(args.init)
    encode = Encoder(tokenizer)
    model = AutoModelForTokenClassification.from_pretrained(
        args.init,
        num_labels=2,
        id2label={0: "wrong", 1: "right"},
        label2id={"wrong": 0, "right": 1},
        dtype=torch.float32,
    ).to(args.device)
    if has_fast_bf16(args.device):
        model.set_attn_implementation("eager")  # then trains twice as fast as SDPA on a CPU at these lengths
    optimizers = make_optimizers(model, args.lr)
    checkpoint = args.out / "checkpoint.pt"
    start, seconds = resume(checkpoint, model, optimizers)
    rollouts = read_rollouts(args.rollouts) if args.rollouts else {"countdown": [], "story": []}
    on_cpu = args.device == "cpu"
    body = torch.compile(model.model, dynamic=True) if on_cpu else model.model
    batches = Batches(encode, rollouts, args.seed, args.tokens, PARTS if on_cpu else 1)
    loader = DataLoader(batches, batch_size=None, sampler=range(start, args.steps), num_workers=args.workers)
    embedding = model.get_input_embeddings().weight
    began = time.time() - seconds
    for step, batch in enumerate(loader, start):
        set_lr(optimizers, args.lr, step, args.steps)
        report: dict[str, Tensor] = {}
        for family, parts in batch.items():
            totals = [sum(int((part[i] >= 0).sum()) for part in parts) for i in (1, 2, 3)]
            sums = torch.zeros(4, device=args.device)
            for part in parts:
                ids, steps, tokens, targets = (one.to(args.device) for one in part)
                with torch.autocast(args.device, dtype=torch.bfloat16, enabled=has_fast_bf16(args.device)):
                    hidden = body(input_ids=ids, use_cache=False).last_hidden_state
                known = targets[:, 1:] >= 0
                words = hidden[:, :-1][known].float() @ embedding.T
                judged, every = model.score(hidden[steps >= 0].float()), model.score(hidden[tokens >= 0].float())
                losses = torch.stack(
                    [
                        F.cross_entropy(judged, steps[steps >= 0], reduction="sum") / totals[0],
                        F.cross_entropy(every, tokens[tokens >= 0], reduction="sum") / totals[1],
                        F.cross_entropy(words, targets[:, 1:][known], reduction="sum") / totals[2],
                    ]
                )
                (losses @ torch.tensor([1.0, TOKEN_WEIGHT, LANGUAGE_WEIGHT], device=args.device) / 2).backward()
                right = (judged.argmax(-1) == steps[steps >= 0]).sum() / totals[0]
                sums += torch.cat([losses.detach(), right[None]])
            report[family] = sums
        update(model, optimizers)
        if (step + 1) % 25 == 0:
            told = {name: value for family, sums in report.items() for name, value in describe(family, sums).items()}
            print(json.dumps({"step": step + 1, "s": round(time.time() - began), **told}), flush=True)
        if (step + 1) % 100 == 0 or step + 1 == args.steps:
            save(checkpoint, model, optimizers, step + 1, time.time() - began)
    model.save_pretrained(args.out / "final")
    tokenizer.save_pretrained(args.out / "final")


if __name__ == "__main__":
    main()
