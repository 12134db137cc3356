"""`dspy.LM` whose every call is one tree search."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import dspy
from dspy import lm15

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError
from ets_engine.protocols import SearchService
from ets_engine.scorers import Scorer
from ets_integrations.dspy.calls import Caching, calling
from ets_integrations.dspy.engine import AsyncSearchEngine, SearchEngine
from ets_integrations.dspy.request import SETTINGS, refuse_search_settings
from ets_integrations.dspy.source import ServiceSource
from ets_integrations.settings import resolve_config

PREFIX = "ets/"


class _OfInstances:
    """A method for which the class shows `dspy.LM`'s own: a class with another one has no engine, as DSPy sees it."""

    def __init__(self, method: Callable[..., Any]) -> None:
        self._method = method

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return getattr(dspy.LM, self._method.__name__)
        return self._method.__get__(instance, owner)


class ETSLM(dspy.LM):
    """A DSPy language model that answers every call by one tree search; nothing in the program changes.

    The complete search settings travel in every request, so DSPy's caches never take one search's answer for another's.
    Equal requests in flight share one search wherever DSPy would give both the same answer; `read_request` says when.
    Weights are loaded by the first request. Copies, deep copies too, share them.

    Args:
        model: "ets/reference" for the shipped model, or a transformers causal LM by folder or hub name, "ets/" before
            it or not; or the name of a registered service.
        verifier: A PRM by name, or `verifier(problem, steps) -> [0, 1]`, which reads them without DSPy's markup. None
            takes the service's own. Calls whose function `verifier_name` cannot name are not cached.
        search: Search settings, all or some.
        effort: "low", "medium" or "high": the width where `search` has none. A call's own `reasoning_effort` goes
            before any width.
        reasoning_effort: DSPy's name for `effort`.
        service: The service itself, or the name of a registered one, instead of a model.
        seed: Same seed, same answer; a `rollout_id` and the samples of `n=` count on from it. None = a new one for
            every search, as `dspy.BestOfN` needs.
        **kwargs: As in `dspy.LM`: `temperature`, `max_tokens`, `stop`, `cache`, `num_retries`, `callbacks` ...

    Raises:
        ConfigError: A setting is unknown or out of range, or a service at hand is to get a PRM by name.

    Example:
        >>> lm = ETSLM("ets/reference", search={"strategy": "rebase"}, effort="low")
        >>> lm.kwargs["metadata"]["ets"]["search"]["width"]
        4
        >>> lm.search(width=8)["metadata"]["ets"]["search"]["width"]
        8
    """

    def __init__(
        self,
        model: str = "ets/reference",
        *,
        verifier: str | Scorer | None = None,
        search: SearchConfig | Mapping[str, Any] | None = None,
        effort: str | None = None,
        reasoning_effort: str | None = None,
        service: SearchService | str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        """See the class."""
        effort = one_effort(effort, reasoning_effort)
        if isinstance(verifier, str) and service is not None:
            raise ConfigError(
                f"verifier={verifier!r}: service={service!r:.60} has its own; pass a function, or a model"
            )
        refuse_search_settings(kwargs)
        source = ServiceSource(model.removeprefix(PREFIX), verifier, service)
        own = {one: kwargs[one] for one in ("temperature", "max_tokens") if kwargs.get(one) is not None}
        settings = dump_search(search, effort=effort, seed=seed, **own)
        ets = {"model": source.name, "verifier": source.verifier_name, "search": settings}
        self._ets = ets
        kwargs["metadata"] = {**(kwargs.get("metadata") or {}), "ets": ets}
        super().__init__(
            PREFIX + source.name,
            engine=SearchEngine(source),
            async_engine=AsyncSearchEngine(source),
            **kwargs,
        )

    def search(self, *, effort: str | None = None, **changes: Any) -> dict[str, Any]:
        """Keyword arguments for one call, or for one module, with other search settings than this LM's.

        Args:
            effort: "low", "medium" or "high": sets the width, where `changes` do not.
            changes: Search settings; `seed=None` draws a new one for every search.

        Raises:
            ConfigError: A setting is unknown or out of range.

        Example:
            >>> lm = ETSLM("ets/reference")
            >>> predict = dspy.Predict("question -> answer", **lm.search(width=4))
        """
        ets = self.complete_search({"search": override(effort, changes)})
        own = {name: ets["search"][name] for name in (*SETTINGS, "stop") if name in changes}
        return {"metadata": {**self._metadata, "ets": ets}, **own}

    def copy(
        self,
        *,
        search: SearchConfig | Mapping[str, Any] | None = None,
        effort: str | None = None,
        reasoning_effort: str | None = None,
        **kwargs: Any,
    ) -> ETSLM:
        """As `dspy.LM`; `search` and an effort, under either name, change some of the search settings.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        refuse_search_settings(kwargs)
        copied = super().copy(**kwargs)
        changes = {name: value for name, value in said(search).items() if kwargs.get(name) is None}
        copied.kwargs |= copied.search(effort=one_effort(effort, reasoning_effort), **changes)
        copied._ets = copied.kwargs["metadata"]["ets"]
        return copied

    def complete_search(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """What `metadata["ets"]` of a request says: this LM's settings but for those that are given, and its models.

        Raises:
            ConfigError: A setting is unknown or out of range.
        """
        own = self._metadata.get("ets", self._ets)
        models = {"model": self.source.name, "verifier": self.source.verifier_name}
        return {**given, **models, "search": dump_search({**own["search"], **given.get("search", {})})}

    def __call__(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """As `dspy.LM`."""
        with self._calling(prompt, kwargs) as prompt:
            return super().__call__(prompt, messages=messages, **kwargs)

    async def acall(self, prompt: Any = None, *, messages: Any = None, **kwargs: Any) -> Any:
        """As `dspy.LM`; a cancelled task stops its search."""
        with self._calling(prompt, kwargs) as prompt:
            return await super().acall(prompt, messages=messages, **kwargs)

    @_OfInstances
    def forward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """As `dspy.LM`."""
        with self._calling(prompt, kwargs) as prompt:
            return super().forward(prompt, messages=messages, **kwargs)

    @_OfInstances
    async def aforward(self, prompt: Any = None, messages: Any = None, **kwargs: Any) -> Any:
        """As `dspy.LM`."""
        with self._calling(prompt, kwargs) as prompt:
            return await super().aforward(prompt, messages=messages, **kwargs)

    @contextmanager
    def _calling(self, prompt: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
        """Complete a call's settings, and let the engine know what DSPy does not tell it."""
        refuse_search_settings(kwargs)
        if isinstance(prompt, lm15.Request):
            prompt = self._complete_request(prompt)
        elif isinstance(kwargs.get("request"), lm15.Request):
            kwargs["request"] = self._complete_request(kwargs["request"])
        else:
            metadata = kwargs.get("metadata") or self._metadata
            kwargs["metadata"] = {**metadata, "ets": self.complete_search(metadata.get("ets", {}))}
        is_wanted = kwargs.get("cache", self.cache) and self._cache_responses
        has_cache = dspy.cache.enable_memory_cache or dspy.cache.enable_disk_cache
        kwargs["cache"] = Caching(bool(is_wanted and has_cache))
        rollout_id = kwargs.get("rollout_id", self.kwargs.get("rollout_id"))
        with calling(rollout_id=rollout_id, cache=kwargs["cache"]):
            yield prompt

    def _complete_request(self, request: lm15.Request) -> lm15.Request:
        extensions = dict(request.config.extensions or {})
        metadata = dict(extensions.get("metadata") or {})
        metadata["ets"] = self.complete_search(metadata.get("ets", {}))
        config = replace(request.config, extensions={**extensions, "metadata": metadata})
        return replace(request, config=config)

    @property
    def _metadata(self) -> dict[str, Any]:
        return self.kwargs.get("metadata") or {}  # a copy may have been given other metadata, or none

    @property
    def _cache_responses(self) -> bool:
        """Whether DSPy may cache at all, which it asks at every door."""
        return not self.source.has_nameless_verifier

    @property
    def source(self) -> ServiceSource:
        """Where searches run."""
        return self.engine.source

    def dump_state(self) -> dict[str, Any]:
        """Names and settings, as JSON; loading asks for `allow_unsafe_lm_state=True`.

        Raises:
            TypeError: The verifier is a function.
        """
        parts = self.source.dump_state()
        kwargs = {name: value for name, value in self.kwargs.items() if name != "metadata" and value is not None}
        metadata = {name: value for name, value in self._metadata.items() if name != "ets"}
        return {
            "_dspy_lm_class": f"{type(self).__module__}.{type(self).__qualname__}",
            **kwargs,
            **parts,
            **({"metadata": metadata} if metadata else {}),
            "search": self.complete_search({})["search"],
            "cache": self.cache,
            "num_retries": self.num_retries,
        }

    @classmethod
    def load_state(cls, state: dict[str, Any], *, allow_custom_lm_class: bool = False) -> ETSLM:
        """The LM of this state; nothing is loaded before its first request."""
        state = {name: value for name, value in state.items() if name != "_dspy_lm_class"}
        search = {name: value for name, value in state.pop("search").items() if (name, value) != ("seed", None)}
        return cls(**state, search=search)


def dump_search(
    search: SearchConfig | Mapping[str, Any] | None = None, *, effort: str | None = None, **changes: Any
) -> dict[str, Any]:
    """Every search setting as JSON; the seed is None where none is given, which asks for a new one each time.

    Raises:
        ConfigError: A setting is unknown or out of range.

    Example:
        >>> dump_search({"width": 8})["seed"], dump_search({"width": 8, "seed": 3})["seed"]
        (None, 3)
    """
    given = said(search)
    if given.get("seed", 0) is None:
        del given["seed"]
    config = resolve_config(given, effort=effort, **changes)
    seed = config.seed if "seed" in config.model_fields_set else None
    return {**config.model_dump(mode="json"), "seed": seed}


def said(search: SearchConfig | Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that are said.

    Example:
        >>> said(SearchConfig(width=8))
        {'width': 8}
    """
    return search.model_dump(exclude_unset=True) if isinstance(search, SearchConfig) else dict(search or {})


def one_effort(effort: str | None, reasoning_effort: str | None) -> str | None:
    """The effort that is said, under DSPy's name or this library's.

    Raises:
        ConfigError: Both are said, and differ.
    """
    if effort is not None and reasoning_effort is not None and effort != reasoning_effort:
        raise ConfigError(f"effort={effort!r} and reasoning_effort={reasoning_effort!r} say the same thing; give one")
    return effort if effort is not None else reasoning_effort


def override(effort: str | None, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Only the settings that are said: an effort stands for its width.

    Raises:
        ConfigError: The effort is unknown.
    """
    width = {"width": resolve_config(effort=effort).width} if effort is not None else {}
    return {**width, **changes}
