"""A transformers model over a KV tree: load, extend, sample, decode steps."""

from ets_engine.runtime.branches import Branch, DecodeUsage, FinishedBranch, Leaf
from ets_engine.runtime.decoder import StepDecoder
from ets_engine.runtime.loading import load_causal_lm, load_token_classifier, resolve_device, resolve_dtype
from ets_engine.runtime.runner import Runner, RunnerStats
from ets_engine.runtime.sampler import SamplingParams, sample, uniforms
from ets_engine.runtime.stops import StopFinder, StopRules

__all__ = [
    "Branch",
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
    "load_token_classifier",
    "resolve_device",
    "resolve_dtype",
    "sample",
    "uniforms",
]
