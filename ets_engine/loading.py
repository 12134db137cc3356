"""From names to models: a policy and what scores its steps, loaded, checked against each other, given room for KV."""

from __future__ import annotations

from dataclasses import dataclass

from ets_engine.config import REMOTE, EngineConfig
from ets_engine.errors import ConfigError
from ets_engine.models import PolicyFormat, Preset, PrmFormat, Probe, SentenceEmbedder, find_intrinsic, load_prm
from ets_engine.models.presets import check_preset, find_preset
from ets_engine.protocols import Embedder
from ets_engine.reference import REFERENCE, policy_path
from ets_engine.runtime import Runner, load_causal_lm, resolve_device
from ets_engine.runtime.kv_memory import reserve_kv
from ets_engine.runtime.threads import run_apart
from ets_engine.scorers import EvidenceScorer

# KV tokens that a search holds in the PRM for each one in the policy: the policy's branches share what they have in
# common token by token, the PRM's only whole equal steps. Peak against peak on the shipped models: 1.07 to 1.14 for ETS
# on countdowns at widths 16 and 256 and on stories at 64, 1.02 to 1.21 over all methods.
PRM_KV_TOKENS = 1.1
_SERVED = (REMOTE, "judge:", "pooling:")  # what verifiers behind servers begin with


@dataclass(frozen=True, slots=True, eq=False)
class LoadedModels:
    """What an engine runs on; nothing else may use them.

    Attributes:
        policy: It proposes steps.
        format: Its prompt and step boundaries.
        verifier: The PRM and what it reads, or a scorer of what the policy computes anyway; None = there is neither.
        embedder: Says how differently steps reason, None = the policy's hidden states do.
    """

    policy: Runner
    format: PolicyFormat
    verifier: tuple[Runner, PrmFormat] | EvidenceScorer | None
    embedder: Embedder | None


def load_models(model: str, verifier: str | None, config: EngineConfig, preset: Preset | None = None) -> LoadedModels:
    """Load a policy and its verifier; the arguments are as in `ETSEngine.from_pretrained`.

    Raises:
        ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
        ConfigError: The shipped PRM is asked to judge another model, a device is absent, there is no such preset, or a
            probe was trained on a policy of another width.
    """
    if preset is not None and config.preset != "auto":
        raise ConfigError(f"preset={preset.name!r} and EngineConfig.preset={config.preset!r}: give one of them")
    check_preset(config.preset)
    own = model == REFERENCE
    if verifier is None and own:
        verifier = REFERENCE
    if verifier == REFERENCE and not own:
        raise ConfigError(
            f"verifier={verifier!r} only knows the problems of model='reference', not {model!r}'s; pass a PRM, or "
            "a function to search(..., verifier=function)"
        )
    if verifier is not None and verifier.startswith(_SERVED):
        raise ConfigError(
            f"verifier={verifier!r} goes with a policy behind a server, model='openai:...'; here pass a PRM, "
            "logprob, or to search(..., verifier=) a JudgeVerifier or PoolingVerifier of ets_engine.remote"
        )
    intrinsic = None if verifier is None else find_intrinsic(verifier)
    if verifier is None or intrinsic is not None:
        config.refuse_prm_settings("what each search brings" if verifier is None else repr(verifier))

    def load() -> LoadedModels:
        embedder = None if config.embedder is None else SentenceEmbedder.from_pretrained(config.embedder, config)
        loaded, tokenizer = load_causal_lm(policy_path() if own else model, config)
        if isinstance(intrinsic, Probe):
            intrinsic.check_width(loaded.config.get_text_config(decoder=True).hidden_size)
        ended = _eos_ids(loaded.generation_config.eos_token_id, tokenizer.eos_token_id)
        policy = Runner(loaded, config, verify=not own, reserve=False)
        shape = PolicyFormat.of(tokenizer, ended, preset or find_preset(config.preset, model, tokenizer))
        judge: tuple[Runner, PrmFormat] | None = None
        if verifier is not None and intrinsic is None:
            judge = load_prm(verifier, config, reserve=False)
        reserve_kv({policy: 1.0} if judge is None else {policy: 1.0, judge[0]: PRM_KV_TOKENS}, config)
        return LoadedModels(policy, shape, intrinsic or judge, embedder)

    return run_apart(load) if resolve_device(config).type == "cpu" else load()


def _eos_ids(*found: int | list[int] | None) -> frozenset[int]:
    """Every end-of-text id that the checkpoint names."""
    return frozenset(i for ids in found if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
