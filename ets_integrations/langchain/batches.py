"""Batches of searches: as many at a time as the service takes, however few processors there are."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from functools import partial
from typing import Any

from langchain_core.runnables import Runnable, RunnableConfig, ensure_config

from ets_engine.errors import ETSError
from ets_integrations.langchain.inner_calls import SearchLimit
from ets_integrations.langchain.settings import SearchSettings

Configs = RunnableConfig | Sequence[RunnableConfig] | None


class SearchBatches(SearchSettings, Runnable[Any, Any]):
    """Sets `max_concurrency` where nobody has: left alone, LangChain asks too few questions at a time, or all."""

    name: str | None = None  # as in `RunnableSerializable`

    def batch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """Answer many questions together: as many searches at a time as the engine takes, unless `config` says less."""
        config = limit_batch(config, self._most(kwargs.get("model"))) if inputs else config
        return super().batch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch(
        self, inputs: list[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> list[Any]:
        """`batch` for an event loop."""
        config = limit_batch(config, await self._amost(kwargs.get("model"))) if inputs else config
        return await super().abatch(inputs, config, return_exceptions=return_exceptions, **kwargs)

    def batch_as_completed(
        self, inputs: Sequence[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> Iterator[Any]:
        """`batch`, each answer with the place of its question, as they come."""
        config = limit_batch(config, self._most(kwargs.get("model"))) if inputs else config
        yield from super().batch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs)

    async def abatch_as_completed(
        self, inputs: Sequence[Any], config: Any = None, *, return_exceptions: bool = False, **kwargs: Any
    ) -> AsyncIterator[Any]:
        """`batch_as_completed` for an event loop."""
        config = limit_batch(config, await self._amost(kwargs.get("model"))) if inputs else config
        async for one in super().abatch_as_completed(inputs, config, return_exceptions=return_exceptions, **kwargs):
            yield one

    def _most(self, model: str | None) -> int | None:
        """Searches that the service takes at a time, None = there is none, as every question of its own will say."""
        try:
            return self.find_service(model).max_concurrent_searches
        except ETSError:
            return None

    async def _amost(self, model: str | None) -> int | None:
        try:
            service = await self.make_off_loop(partial(self.find_service, model), model)
        except ETSError:
            return None
        return service.max_concurrent_searches


def limit_batch(config: Configs, most: int | None) -> Configs:
    """The config or configs of a batch, at most so many questions at a time where nobody says anything of it.

    Example:
        >>> limit_batch([{"max_concurrency": 2}, {}], 64)
        [{'max_concurrency': 2}, {'max_concurrency': 64}]
    """
    around = ensure_config().get("max_concurrency")
    if most is None or (around and not isinstance(around, SearchLimit)):
        return config
    if isinstance(config, Sequence):
        return [_limit(one, most) for one in config]
    return _limit(config, most)


def _limit(config: RunnableConfig | None, most: int) -> RunnableConfig:
    config = config or {}
    return config if config.get("max_concurrency") else {**config, "max_concurrency": SearchLimit(most)}
