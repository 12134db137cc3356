"""The fields that `ChatETS` and `ETSRunnable` have in common, and what they mean to the engine."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any, Self, TypeVar

from langchain_core.runnables import Runnable
from pydantic import AliasChoices, BaseModel, Field, PrivateAttr, model_validator

from ets_engine.config import Reduce, SearchConfig, Strategy, Vote
from ets_engine.errors import ConfigError
from ets_engine.protocols import SearchService
from ets_engine.registry import look_up
from ets_engine.scorers import Scorer
from ets_engine.services import find_service
from ets_integrations.langchain.verifiers import RunnableVerifier
from ets_integrations.settings import Effort, fresh_seed, resolve_config, verifier_name

T = TypeVar("T")

CALL_SETTINGS = (*SearchConfig.model_fields, "effort", "timeout")
"""What may be given per call."""

FIXED = {
    **dict.fromkeys(("verifier", "engine", "output"), "give it to the constructor"),
    "search": "give its settings by their own names",
    "model_name": "say model",
    "stop_sequences": "say stop",
}
"""What a call cannot change, and the way out."""

_UNUSED = ("api_key",)
"""What LangChain gives to every chat model, and nothing here needs."""

_found: dict[tuple[str, str | None], SearchService] = {}
"""By model and PRM: it stays loaded when whoever asked for it is thrown away; a closed one is replaced."""


class SearchSettings(BaseModel):
    """Which models search, and how; a field that is None leaves the engine's default.

    Attributes:
        model: "reference" for the shipped models, a registered service, or a transformers model by folder or hub name.
        verifier: A PRM by name, None = the model's own; a function `(problem, steps) -> [0, 1]`; or a Runnable of
            `{"problem", "steps", "text"}` that returns a score.
        engine: A search service to use instead of `model`: an `ETSEngine`, a `HostedEngine`, or its registered name.
        effort: "low", "medium" or "high": width 4, 16 or 64 where none is given.
        timeout: Seconds after which the best so far is the answer.
        search: Any other field of `SearchConfig`; it may also be given by its own name, as `top_k=20`.

    The others are `SearchConfig`'s fields of the same names. Without a seed every call draws a new one. An unknown name
    is refused. What was loaded by name is shared by all instances and stays loaded until it is closed, as by
    `get_engine(model).close()`.
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

    _judge: tuple[Any, str] | None = PrivateAttr(default=None)  # the verifier told apart last, and as what

    @model_validator(mode="before")
    @classmethod
    def _read_names(cls, data: Any) -> Any:
        """Put fields of `SearchConfig` that are none of ours into `search`, and refuse what nobody reads."""
        search = data.get("search") or {} if isinstance(data, Mapping) else None
        if not isinstance(search, Mapping):
            return data
        known = _input_names(cls)
        others = {name: value for name, value in data.items() if name not in known and name not in _UNUSED}
        if unknown := others.keys() - set(SearchConfig.model_fields):
            names = ", ".join(map(_with_guess, sorted(unknown)))
            allowed = sorted({*cls.model_fields, *SearchConfig.model_fields})
            raise ConfigError(f"{cls.__name__} has no setting {names}; choose from {', '.join(allowed)}")
        moved = {name: value for name, value in others.items() if value is not None}
        data = {name: value for name, value in data.items() if name in known}
        if "deadline_s" in moved and data.get("timeout") is None:
            data["timeout"] = moved.pop("deadline_s")
        return {**data, "search": {**search, **moved}}

    def resolve_search(
        self, changes: Mapping[str, Any] | None = None, *, stop: str | Sequence[str] | None = None
    ) -> SearchConfig:
        """The complete config of one call, the seed as it is given (0 where there is none).

        Args:
            changes: Settings of this call, by name; what LangChain or an agent says besides is none of the search's.
            stop: A text that ends the answer, or some.

        Raises:
            ConfigError: A value is out of range, a name is a misspelt one, or a call cannot change it.
        """
        changes = {name: value for name, value in (changes or {}).items() if value is not None}
        _check_changes(changes)
        own = {name: getattr(self, name) for name in CALL_SETTINGS if name in type(self).model_fields}
        given = self.search | {name: value for name, value in own.items() if value is not None}
        changed = {name: changes[name] for name in CALL_SETTINGS if name in changes}
        if "deadline_s" in changed:
            changed.setdefault("timeout", changed.pop("deadline_s"))
        if "effort" in changed and "width" not in changed:
            given.pop("width", None)  # the effort of this call goes before the width of all calls
        given |= changed
        deadline_s, effort = given.pop("timeout", None), given.pop("effort", None)
        texts = given.pop("stop", None) if stop is None else stop
        given["stop"] = (texts,) if isinstance(texts, str) else tuple(texts or ())
        return resolve_config(given, effort=effort, deadline_s=deadline_s)

    def with_search(self, settings: Mapping[str, Any]) -> Self:
        """A copy whose calls are all as if they were given these settings.

        Args:
            settings: By name; `CALL_SETTINGS` and "model".

        Raises:
            ConfigError: As `resolve_search`.
        """
        self.resolve_search(settings)
        given = {name: value for name, value in settings.items() if value is not None}
        if "deadline_s" in given:
            given.setdefault("timeout", given.pop("deadline_s"))
        search = {name: value for name, value in self.search.items() if name not in given}
        update: dict[str, Any] = {name: given.pop(name) for name in type(self).model_fields if name in given}
        if "effort" in update and "width" not in update:
            update["width"] = None
            search.pop("width", None)
        if "model" in update:
            update["engine"] = None
        return self.model_copy(update={**update, "search": {**search, **given}})

    def draw_seed(self, config: SearchConfig, changes: Mapping[str, Any] | None = None) -> SearchConfig:
        """The config with a new seed, unless one was asked for."""
        if self._is_seeded() or (changes or {}).get("seed") is not None:
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
        service = self._at_hand(model)
        if service is None:
            name = self._names(model)
            service = _found[name] = find_service(*name)
        return service

    def _at_hand(self, model: str | None) -> SearchService | None:
        """The service, None = it has to be loaded, or waited for while another is."""
        if model is None and self.engine is not None and not isinstance(self.engine, str):
            if not isinstance(self.engine, SearchService):
                raise ConfigError(f"engine={self.engine!r:.100}: give an ETSEngine, a HostedEngine or its name")
            return self.engine
        name = self._names(model)
        known = look_up(name[0]) or _found.get(name)
        return None if getattr(known, "is_closed", False) else known

    def _names(self, model: str | None) -> tuple[str, str | None]:
        """Of a model that is no object, and of its PRM, None = the model's own."""
        return model or self.engine or self.model, self.verifier if isinstance(self.verifier, str) else None

    async def make_off_loop(self, make: Callable[[], T], model: str | None = None) -> T:
        """What `make` makes with the service of this model, in a thread unless the service is at hand.

        Loading weights takes seconds, and so does waiting while others are loaded.
        """
        return make() if self._at_hand(model) is not None else await asyncio.to_thread(make)

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
        """Everything that decides an answer, as plain JSON: a cache key; no seed is None.

        A verifier that has no reliable name is told apart as the object that it is.
        """
        judged_by = verifier_name(self.verifier)
        if judged_by is None and self.verifier is not None:
            if self._judge is None or self._judge[0] is not self.verifier:
                self._judge = self.verifier, f"object:{secrets.token_hex(8)}"
            judged_by = self._judge[1]
        search = self.resolve_search().model_dump(mode="json")
        if not self._is_seeded():
            search["seed"] = None
        return {"model": self.model_id(), "verifier": judged_by, "search": search}

    def _is_seeded(self) -> bool:
        return self.seed is not None or self.search.get("seed") is not None


def _check_changes(names: Iterable[str]) -> None:
    """Refuse settings of a call that would not be honoured, where they are meant for us.

    Raises:
        ConfigError: One is misspelt, or is for the constructor.
    """
    for name in names:
        if name in FIXED:
            raise ConfigError(f"{name}= is no setting of a call; {FIXED[name]}")
        if name not in CALL_SETTINGS and _guess(name) is not None:
            raise ConfigError(f"no setting of a call is named {_with_guess(name)}")


def _guess(name: str) -> str | None:
    """The setting that a misspelt name stands for; a name that others use in earnest (`top_n`, `min_tokens`) is none.

    Example:
        >>> [_guess(name) for name in ("widht", "lamda_b", "deadline", "min_tokens", "tools")]
        ['width', 'lambda_b', 'deadline_s', None, None]
    """
    near = [one for one in CALL_SETTINGS if sorted(one) == sorted(name)]
    near += get_close_matches(name, CALL_SETTINGS, n=1, cutoff=0.85)
    return near[0] if near else None


def _with_guess(name: str) -> str:
    guess = _guess(name)
    return repr(name) if guess is None else f"{name!r} (did you mean {guess!r}?)"


def _input_names(model: type[BaseModel]) -> set[str]:
    """Every name under which a model's constructor takes a field."""
    names: set[str] = set(model.model_fields)
    for field in model.model_fields.values():
        alias = field.validation_alias
        choices = alias.choices if isinstance(alias, AliasChoices) else [alias]
        names.update(one for one in choices if isinstance(one, str))
    return names
