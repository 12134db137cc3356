"""Carry what a PRM learned on top of its policy over to a newer policy of the same shape, as a start to train from.

Task arithmetic (Ilharco et al. 2023, arXiv 2212.04089): new PRM = new policy + (old PRM - old policy), in every weight
that they share; the PRM's head stays as it is. Both old models are moved to the new policy's tokenizer first.

python cookbook/training/graft_prm.py --old-policy OLD --old-prm OLD_PRM --policy POLICY --out runs/graft
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

from data import adopt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--old-policy", type=Path, required=True)
    parser.add_argument("--old-prm", type=Path, required=True)
    parser.add_argument("--policy", type=Path, required=True, help="the new one")
    parser.add_argument("--out", type=Path, default=Path("runs/graft"))
    args = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(args.policy)
    prm = AutoModelForTokenClassification.from_pretrained(args.old_prm, dtype=torch.float32)
    old = AutoModelForCausalLM.from_pretrained(args.old_policy, dtype=torch.float32)
    new = AutoModelForCausalLM.from_pretrained(args.policy, dtype=torch.float32).state_dict()
    adopt(prm, AutoTokenizer.from_pretrained(args.old_prm), tokenizer)
    adopt(old, AutoTokenizer.from_pretrained(args.old_policy), tokenizer)
    before, after = old.state_dict(), prm.state_dict()
    prm.load_state_dict(
        {name: new[name] + after[name] - before[name] if name in new else after[name] for name in after}
    )
    prm.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
