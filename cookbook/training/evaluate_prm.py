"""Measure a PRM on held-out rollouts: step AUC, step accuracy, and how often its best of all samples is right.

python cookbook/training/make_rollouts.py --policy POLICY --problems 200 --samples 16 --held-out --out held.jsonl
python cookbook/training/evaluate_prm.py --prm runs/prm/final --rollouts held.jsonl
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from scipy.stats import mannwhitneyu
from transformers import AutoModelForTokenClassification, AutoTokenizer

from data import Encoder, pad

BATCH = 64


@torch.inference_mode()
def score(model: torch.nn.Module, encode: Encoder, rows: list[dict]) -> list[list[float]]:
    """Probability that all is right up to each line, per rollout."""
    order = sorted(range(len(rows)), key=lambda place: sum(map(len, rows[place]["lines"])))
    scores: list[list[float]] = [[] for _ in rows]
    for start in range(0, len(rows), BATCH):
        batch = order[start : start + BATCH]
        judged = [encode.judged(rows[i]["problem"], rows[i]["lines"], rows[i]["labels"]) for i in batch]
        right = model(input_ids=pad([ids for ids, _ in judged], encode.pad)).logits.softmax(-1)[..., 1]
        for place, (_, marks), values in zip(batch, judged, right.tolist(), strict=True):
            scores[place] = [value for value, mark in zip(values, marks, strict=False) if mark >= 0]
    return scores


def report(rows: list[dict], scores: list[list[float]]) -> dict[str, float]:
    """Figures of one family and level (or all)."""
    labels, values = [], []
    by_problem: dict[str, list[tuple[float, bool]]] = defaultdict(list)
    for row, path in zip(rows, scores, strict=True):
        wrong = row["labels"].index(False) if False in row["labels"] else len(row["labels"])
        labels += row["labels"][: wrong + 1]
        values += path[: wrong + 1]
        by_problem[row["problem"]].append((path[-1] if path else 0.0, row["solved"]))
    right, value = np.array(labels), np.array(values)
    auc = mannwhitneyu(value[right], value[~right]).statistic / (right.sum() * (~right).sum())
    solvable = [
        sorted(paths, key=lambda path: path[0])[-1][1] for paths in by_problem.values() if any(p[1] for p in paths)
    ]
    return {
        "pass@1": float(np.mean([row["solved"] for row in rows])),
        "pass@n": len(solvable) / len(by_problem),
        "step_auc": float(auc),
        "step_accuracy": float(((value > 0.5) == right).mean()),
        "selection": float(np.mean(solvable)) if solvable else 0.0,
        "problems": len(by_problem),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prm", type=Path, required=True)
    parser.add_argument("--rollouts", type=Path, required=True)
    args = parser.parse_args()
    model = AutoModelForTokenClassification.from_pretrained(args.prm, dtype=torch.float32).eval()
    encode = Encoder(AutoTokenizer.from_pretrained(args.prm))
    rows = [json.loads(line) for line in args.rollouts.read_text().splitlines()]
    rows = [row for row in rows if row["lines"]]
    scores = score(model, encode, rows)
    for family in sorted({row["family"] for row in rows}):
        for level in (None, *sorted({row["level"] for row in rows if row["family"] == family})):
            chosen = [i for i, row in enumerate(rows) if row["family"] == family and level in (None, row["level"])]
            found = report([rows[i] for i in chosen], [scores[i] for i in chosen])
            print(family, "all" if level is None else level, json.dumps({k: round(v, 3) for k, v in found.items()}))


if __name__ == "__main__":
    main()
