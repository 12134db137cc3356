"""Decoder layers through torch.compile: what lies between matmuls and attention becomes a few fused kernels."""

from __future__ import annotations

from collections.abc import Collection

import torch
from transformers import AttentionInterface, PreTrainedModel

from ets_engine.errors import UnsupportedModelError
from ets_engine.runtime.hook import ATTENTION_NAME, attend_in_tree


def compile_layers(model: PreTrainedModel, skipped: Collection[torch.nn.Module] = ()) -> int:
    """Compile every decoder layer in place, at its first call; all layers of a class share what is compiled.

    Attention is left as it is: it is no tensor program but a kernel over index lists.

    Args:
        model: Of transformers.
        skipped: Layers that are left as they are.

    Returns:
        Layers compiled (count).

    Raises:
        UnsupportedModelError: The model does not say which of its modules are its layers.
    """
    names = set(getattr(model, "_no_split_modules", None) or ())
    layers = [module for module in model.modules() if type(module).__name__ in names]
    if not layers:
        raise UnsupportedModelError(f"{type(model).__name__} names no decoder layers; use compile_layers=False")
    AttentionInterface.register(ATTENTION_NAME, torch.compiler.disable(attend_in_tree))
    left = set(layers) - set(skipped)
    for layer in left:
        layer.compile(dynamic=True)
    return len(left)
