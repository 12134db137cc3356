"""A transformers model over a KV tree: load, extend, sample, decode steps."""

from ets_engine.runtime.branches import Branch, FinishedBranch, Leaf
from ets_engine.runtime.checkpoints import Checkpoint, open_checkpoint
from ets_engine.runtime.decoder import StepDecoder
from ets_engine.runtime.loading import load_causal_lm, load_weights, resolve_device, resolve_dtype
from ets_engine.runtime.runner import Runner, RunnerStats
from ets_engine.runtime.sampler import SamplingParams, sample, uniforms
from ets_engine.runtime.stops import StopFinder, StopRules
from ets_engine.runtime.usage import DecodeUsage

__all__ = [
    "Branch",
    "Checkpoint",
    "DecodeUsage",
    "FinishedBranch",
    "Leaf",
    "Runner",
    "RunnerStats",
    "SamplingParams",
    "StepDecoder",
    "StopFinder",
    "StopRules",
    "load_causal_lm",
    "load_weights",
    "open_checkpoint",
    "resolve_device",
    "resolve_dtype",
    "sample",
    "uniforms",
]
