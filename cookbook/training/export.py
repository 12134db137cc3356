"""Write the trained policy and PRM into the package, in half precision, and check that nothing was lost on the way.

python cookbook/training/export.py --policy runs/policy/step-2400 --prm runs/prm/final
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoModelForTokenClassification, AutoTokenizer

import ets_engine.reference

HOME = Path(ets_engine.reference.__file__).parent
LIMIT_BYTES = 16_000_000


def export(auto: type, source: Path, target: Path) -> int:
    """Save one model as float16 with its tokenizer; the bytes it takes.

    Raises:
        ValueError: Outputs of the saved model differ from the trained one's by more than rounding.
    """
    model = auto.from_pretrained(source, dtype=torch.float32).eval()
    ids = torch.randint(4, model.config.vocab_size, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        before = model(input_ids=ids).logits
        model.half().save_pretrained(target)
        AutoTokenizer.from_pretrained(source).save_pretrained(target)
        after = auto.from_pretrained(target, dtype=torch.float32).eval()(input_ids=ids).logits
    (target / "model.safetensors").chmod(0o644)  # saved for the owner alone, but the package is for everybody
    error = (before - after).abs().max().item()
    if error > 0.1:
        raise ValueError(f"{target} differs from {source} by {error:.3f}: do not ship it")
    print(f"{target}: largest logit error {error:.4f}")
    return sum(path.stat().st_size for path in target.iterdir())


def main() -> None:
    """Export both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", type=Path, required=True)
    parser.add_argument("--prm", type=Path, required=True)
    args = parser.parse_args()
    size = export(AutoModelForCausalLM, args.policy, HOME / "policy")
    size += export(AutoModelForTokenClassification, args.prm, HOME / "prm")
    print(f"{size / 1e6:.1f} MB in all")
    if size > LIMIT_BYTES:
        raise ValueError(f"{size} bytes are more than the {LIMIT_BYTES} that the package may carry")


if __name__ == "__main__":
    main()
