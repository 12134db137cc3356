"""The fields that `ChatETS` and `ETSRunnable` have in common, and what they mean to the engine."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from langchain_core.runnables import Runnable
from pydantic import BaseModel, Field, PrivateAttr

from ets_engine.config import Reduce, SearchConfig, Strategy, Vote
from ets_engine.errors import ConfigError
from ets_engine.protocols import SearchService
from ets_engine.scorers import Scorer
from ets_engine.services import find_service
from ets_integrations.langchain.verifiers import RunnableVerifier
from ets_integrations.settings import Effort, fresh_seed, resolve_config, verifier_name

SEARCH_FIELDS = tuple(name for name in SearchConfig.model_fields if name != "deadline_s")


class SearchSettings(BaseModel):
    """Which models search, and how; a field that is None leaves the engine's default.

    Attributes:
        model: "reference" for the shipped models, a registered service, or a transformers model by folder or hub name.
        verifier: A PRM by name, None = the model's own; a function `(problem, steps) -> [0, 1]`; or a Runnable of
            `{"problem", "steps", "text"}` that returns a score.
        engine: A search service to use instead of `model`: an `ETSEngine`, a `HostedEngine`, or its registered name.
        effort: "low", "medium" or "high": width 4, 16 or 64 where none is given.
        timeout: Seconds after which the best so far is the answer.
        search: Any other field of `SearchConfig`.

    The others are `SearchConfig`'s fields of the same names. Without a seed every call draws a new one.
    """

    model: str = Field(default="reference", alias="model_name")
    verifier: Any = None
    engine: Any = Field(default=None, exclude=True, repr=False)
    effort: Effort | None = None
    strategy: Strategy | None = None
    width: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    max_tokens: int | None = None
    max_steps: int | None = None
    max_step_tokens: int | None = None
    lambda_b: float | None = None
    lambda_d: float | None = None
    cluster_cut: float | None = None
    kv_budget_tokens: int | None = None
    reduce: Reduce | None = None
    vote: Vote | None = None
    n_candidates: int | None = None
    seed: int | None = None
    timeout: float | None = None
    search: dict[str, Any] = Field(default_factory=dict)

    _services: dict[str, SearchService] = PrivateAttr(default_factory=dict)  # by model: it stays loaded while we live
    _nonce: str = PrivateAttr(default_factory=lambda: secrets.token_hex(8))

    def __getstate__(self) -> dict[Any, Any]:
        """Without what was loaded: a pickle names models, and whoever reads it finds its own."""
        state = super().__getstate__()
        private = {**(state["__pydantic_private__"] or {}), "_services": {}}
        return {**state, "__pydantic_private__": private}

    def resolve_search(
        self, changes: Mapping[str, Any] | None = None, *, stop: Sequence[str] | None = None
    ) -> SearchConfig:
        """The complete config of one call, the seed as it is given (0 where there is none).

        Args:
            changes: Settings of this call, by name; others are ignored.
            stop: Texts that end the answer.

        Raises:
            ConfigError: A value is out of range.
        """
        changes = changes or {}
        known = (*SEARCH_FIELDS, "effort", "timeout")
        own = {name: getattr(self, name) for name in known if name in type(self).model_fields}
        given = self.search | {name: value for name, value in own.items() if value is not None}
        changed = {name: changes[name] for name in known if changes.get(name) is not None}
        if "effort" in changed and "width" not in changed:
            given.pop("width", None)  # the effort of this call goes before the width of all calls
        given |= changed
        deadline_s, effort = given.pop("timeout", None), given.pop("effort", None)
        texts = given.pop("stop", None)
        stops = tuple(stop if stop is not None else [texts] if isinstance(texts, str) else texts or ())
        return resolve_config(given, effort=effort, deadline_s=deadline_s, stop=stops)

    def draw_seed(self, config: SearchConfig, changes: Mapping[str, Any] | None = None) -> SearchConfig:
        """The config with a new seed, unless one was asked for."""
        if self.seed is not None or "seed" in self.search or (changes or {}).get("seed") is not None:
            return config
        return config.model_copy(update={"seed": fresh_seed()})

    def find_service(self, model: str | None = None) -> SearchService:
        """The service that searches; it is loaded when it is first asked for.

        Args:
            model: Of this call, None = the one that the fields name.

        Raises:
            ConfigError: `engine` is no service.
            ModelLoadError: The model cannot be loaded.
        """
        if model is None and self.engine is not None and not isinstance(self.engine, str):
            if not isinstance(self.engine, SearchService):
                raise ConfigError(f"engine={self.engine!r:.100}: give an ETSEngine, a HostedEngine or its name")
            return self.engine
        name = model or self.engine or self.model
        if name not in self._services:
            self._services[name] = find_service(name, self.verifier if isinstance(self.verifier, str) else None)
        return self._services[name]

    def model_id(self, model: str | None = None) -> str:
        """Name of the models that `find_service` gives; nothing is loaded."""
        if model is None and self.engine is not None and not isinstance(self.engine, str):
            return str(getattr(self.engine, "name", self.engine))
        return model or self.engine or self.model

    def scorer(self) -> Scorer | None:
        """The verifier that goes along with each search, None = the service's own."""
        if isinstance(self.verifier, str) and self.engine is not None:
            raise ConfigError(
                f"verifier={self.verifier!r}: an engine has its PRM already; leave it out, or pass "
                "ets_engine.models.PrmScorer.from_pretrained(...)"
            )
        if self.verifier is None or isinstance(self.verifier, str):
            return None
        if isinstance(self.verifier, Runnable):
            return RunnableVerifier(self.verifier)
        return self.verifier

    def identity(self) -> dict[str, Any]:
        """Everything that decides an answer, as plain JSON: a cache key.

        What has no reliable name is told apart by this very object.
        """
        named = verifier_name(self.verifier)
        judged_by = f"object:{self._nonce}" if named is None and self.verifier is not None else named
        config = self.resolve_search()
        return {"model": self.model_id(), "verifier": judged_by, "search": config.model_dump(mode="json")}
