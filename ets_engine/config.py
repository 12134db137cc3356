"""Settings of a search and of an engine: frozen, validated in the constructor, JSON in and out."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError, field_validator

from ets_engine.errors import ConfigError

Strategy = Literal[
    "greedy",
    "best_of_n",
    "beam",
    "beam_sqrt",
    "dvts",
    "rebase",
    "ets_kv",
    "ets",
    "ets_published",
    "dora",
]
Reduce = Literal["last", "min", "prod", "mean"]
Vote = Literal["best", "majority", "weighted"]
VerifierFormat = Literal["auto", "math_shepherd", "llemma", "rlhflow", "skywork", "qwen", "trl"]

MAX_LAMBDA = 1e6  # far beyond what prunes all but one branch; HiGHS fails on numbers of 1e16
REMOTE = "openai:"
"""What the name of a model behind OpenAI-compatible servers begins with."""


class Config(BaseModel):
    """Base of the settings types: unknown names and bad values raise `ConfigError`."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def __init__(self, **data: Any) -> None:
        """Validate every setting.

        Raises:
            ConfigError: naming each bad setting, its value and what is allowed.
        """
        try:
            super().__init__(**data)
        except ValidationError as error:
            problems = "; ".join(
                f"{'.'.join(map(str, item['loc'])) or 'settings'}={item['input']!r}: {item['msg']}"
                for item in error.errors()
            )
            raise ConfigError(f"{type(self).__name__}: {problems}") from None

    def fingerprint(self) -> str:
        """Short hash of every setting, equal exactly when the settings are equal."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        """Of the fingerprint: settings may hold mappings, which have no hash of their own."""
        return hash(self.fingerprint())

    def replace(self, **changes: Any) -> Config:
        """The same settings with some changed, validated again."""
        return type(self)(**{**self.model_dump(), **changes})


class SearchConfig(Config):
    """Everything that decides a search's outcome, apart from the models and the problem.

    Attributes:
        strategy: Which selector; "greedy" is one trajectory at temperature 0.
        width: Trajectories kept alive (count).
        max_steps: Most steps of a trajectory (depth).
        max_step_tokens: Most tokens of one step.
        max_tokens: Most tokens of one trajectory, prompt excluded.
        temperature: Sampling temperature; 0 is greedy.
        stop: Texts that finish a trajectory where they first appear; they are no part of it.
        top_p, top_k, min_p: Sampling cuts; 1.0, 0 and 0.0 switch them off.
        seed: Same seed, same models, same settings: same tree.
        keep: Leaves kept by "beam" and "dvts", None = width / 4 (at least 1); "beam_sqrt" ignores it.
        softmax_temperature: REBASE's, ETS's and DORA's temperature over step scores; DORA's paper has 0.1 for it.
        lambda_b: ETS's price of keeping the whole tree. Dimensionless, >= 0.
        lambda_d: ETS's worth of full semantic coverage. Dimensionless, >= 0.
        cluster_cut: Cosine distance at which steps stop being the same idea, in [0, 2].
        node_cost: What lambda_b prices: "tokens" (ours) or "nodes" (published).
        allocation: How ETS splits the width over kept leaves: "floor_one" gives each a child first (ours), "ceil" is
            the published sequential ceiling, which may give some none.
        merge_branches: Whether branches that draw the same tokens below the same step are computed and stored once, and
            equal steps judged once, by models that run here. It changes nothing that is found; False measures what it
            saves.
        kv_budget_tokens: Hard cap on resident KV tokens of the policy, None = no cap.
        reduce: Step scores of a path to one trajectory score.
        vote: Trajectories to one answer.
        n_candidates: Most distinct answers returned.
        deadline_s: Seconds from submission after which the best so far is returned, None = no deadline.
        trace: Return the whole tree.
    """

    strategy: Strategy = "ets"
    width: int = Field(default=16, ge=1, le=4096)
    max_steps: int = Field(default=40, ge=1, le=1000)
    max_step_tokens: int = Field(default=256, ge=1)
    max_tokens: int = Field(default=1024, ge=1)
    stop: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    temperature: float = Field(default=1.0, ge=0.0, le=10.0)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)
    top_k: int = Field(default=0, ge=0)
    min_p: float = Field(default=0.0, ge=0.0, le=1.0)
    seed: int = Field(default=0, ge=0, lt=2**63)
    keep: int | None = Field(default=None, ge=1)
    softmax_temperature: float = Field(default=0.2, gt=0.0)
    lambda_b: float = Field(default=1.0, ge=0.0, le=MAX_LAMBDA)
    lambda_d: float = Field(default=1.0, ge=0.0, le=MAX_LAMBDA)
    cluster_cut: float = Field(default=0.2, ge=0.0, le=2.0)
    node_cost: Literal["tokens", "nodes"] = "tokens"
    allocation: Literal["floor_one", "ceil"] = "floor_one"
    merge_branches: bool = True
    kv_budget_tokens: int | None = Field(default=None, ge=1)
    reduce: Reduce = "last"
    vote: Vote = "weighted"
    n_candidates: int = Field(default=8, ge=1)
    deadline_s: float | None = Field(default=None, gt=0.0)
    trace: bool = False


class EngineConfig(Config):
    """Where and how the models run.

    Attributes:
        device: "auto" takes CUDA when it is there.
        dtype: "auto" is float32 on a CPU, bfloat16 on CUDA.
        page_tokens: Tokens per KV page.
        kv_pool_tokens: Most KV tokens per model, None = what fits into `kv_memory_fraction`. On a CPU the pool begins
            small and doubles; on a GPU it is taken at load, up to a million tokens of it.
        kv_memory_fraction: Of the memory that is free once the models are loaded, what one model's KV may take. Policy
            and PRM on one device share twice that, at most 0.9, so that a search runs out of both pools at once.
        prefill_chunk_tokens: Most tokens of one prompt read per forward pass, and between two decode steps.
        prefix_cache_tokens: Most tokens of read prompts kept per model, for later prompts that begin alike; they
            make room as soon as a search needs it. 0 = none.
        cuda_graphs: Whether decode passes are captured as CUDA graphs, "auto" = where the model allows it. Faster at
            every size that a GPU does in less time than its host needs to launch it.
        compile_layers: Whether decoder layers go through torch.compile: the first passes take tens of seconds, later
            ones less than without. On a GPU, layers of the usual kind (Llama, Mistral, Qwen) in bf16 or fp16 have
            launches of their own, as fast, and are never compiled.
        processes: How many processes search, this one included, each with the same models and KV pools of its own. On a
            CPU, one per core multiplies what small models search together; a model whose passes keep all cores busy
            gains nothing. They are started by `ETSEngine.from_pretrained`, and end with the engine.
        max_queued_searches: Most searches that wait for room in the KV pools; one more is refused.
        trust_remote_code: Whether a checkpoint may run code of its own.
        preset: Prompt, step boundary and answer pattern of the policy: a name that `ets models` lists, "auto" = as the
            checkpoint's name and chat template suggest.
        verifier_format: What the PRM reads and where its score stands, "auto" = as the checkpoint shows.
        step_separator: Ends every step for a PRM of the "trl" and "skywork" formats, which must be the one of its
            training; None = the usual one of the format.
        embedder: A sentence-transformers model that says how differently steps reason, by folder or hub name; None =
            the policy's own hidden states.
        load_options: More arguments of transformers' `from_pretrained` for the policy, e.g. a `quantization_config`.
        verifier_load_options: The same for the PRM.
    """

    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    page_tokens: int = Field(default=16, ge=1, le=1024)
    kv_pool_tokens: int | None = Field(default=None, ge=16)
    kv_memory_fraction: float = Field(default=0.4, gt=0.0, le=1.0)
    prefill_chunk_tokens: int = Field(default=2048, ge=1)
    prefix_cache_tokens: int = Field(default=16384, ge=0)
    cuda_graphs: bool | Literal["auto"] = "auto"
    compile_layers: bool = False
    processes: int = Field(default=1, ge=1, le=256)
    max_queued_searches: int = Field(default=4096, ge=1)
    trust_remote_code: bool = False
    preset: str = "auto"
    verifier_format: VerifierFormat = "auto"
    step_separator: str | None = Field(default=None, min_length=1)
    embedder: str | None = None
    load_options: dict[str, JsonValue] = {}
    verifier_load_options: dict[str, JsonValue] = {}

    @field_validator("load_options", "verifier_load_options")
    @classmethod
    def _in_one_order(cls, options: dict[str, JsonValue]) -> JsonValue:
        """Equal options are written alike, so that equal settings have one fingerprint."""
        return _sorted(options)

    def changed(self, names: Sequence[str]) -> list[str]:
        """Which of these settings are not the usual ones, for names and messages.

        Example:
            >>> EngineConfig(dtype="float64", preset="plain").changed(["preset", "embedder", "dtype"])
            ["preset='plain'", "dtype='float64'"]
        """
        usual = EngineConfig()
        return [
            f"{name}={_sorted(getattr(self, name))!r}" for name in names if getattr(self, name) != getattr(usual, name)
        ]

    def refuse_prm_settings(self, instead: str) -> None:
        """Refuse settings that only a PRM loaded here would read, where there is none.

        Args:
            instead: What scores steps, for the message.

        Raises:
            ConfigError: One of them is not the usual one.

        Example:
            >>> EngineConfig(dtype="float64").refuse_prm_settings("a function")
        """
        unread = self.changed(("verifier_format", "step_separator"))
        unread += ["verifier_load_options"] if self.verifier_load_options else []  # which may hold a secret
        if unread:
            raise ConfigError(
                f"{', '.join(unread)}: no PRM is loaded here that would read it, steps are scored by {instead}; leave "
                "it out, or name a PRM as the verifier"
            )


def _sorted(value: JsonValue) -> JsonValue:
    """The same value with the keys of all its mappings in alphabetical order."""
    if isinstance(value, dict):
        return {key: _sorted(value[key]) for key in sorted(value)}
    return [_sorted(one) for one in value] if isinstance(value, list) else value
