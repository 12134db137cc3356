"""What a loaded model is, how it runs and what it takes, for people and reports."""

from __future__ import annotations

from ets_engine.runtime import Runner
from ets_engine.types import ModelDescription


def describe_model(runner: Runner, name: str | None, format: str, details: dict[str, str]) -> ModelDescription:
    """See `ModelDescription`; a model without a name was given as an object."""
    pages, model = runner.tree.pool.max_pages, runner.model
    return ModelDescription(
        name=name or "given",
        architecture=type(model).__name__,
        format=format,
        details=details,
        attention=_attention(runner),
        dtype=str(runner.dtype).removeprefix("torch."),
        device=str(runner.device),
        parameters=runner.num_parameters,
        weight_bytes=sum(one.numel() * one.element_size() for one in model.parameters()),
        context_tokens=runner.context_tokens,
        kv_bytes_per_token=runner.bytes_per_token,
        kv_pool_tokens=None if pages is None else pages * runner.tree.pool.page_tokens,
    )


def _attention(runner: Runner) -> str:
    layers, fused = len(runner.tree.pool.shapes), runner.fused_layers
    words = [f"tree attention over {layers} layers"]
    if fused:
        words.append(f"{'all' if fused == layers else fused} of them fused")
    if runner.uses_graphs:
        words.append("passes of one token a branch in CUDA graphs")
    return ", ".join(words)
