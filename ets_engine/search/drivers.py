"""The plain synchronous driver: it answers a search's requests one by one, in the caller's thread."""

from __future__ import annotations

from collections.abc import Callable, Generator
from typing import Any

from ets_engine.errors import ConfigError
from ets_engine.protocols import Embedder, Policy, Verifier
from ets_engine.search.requests import Embed, Expand, Progress, Request, Retain, Score, Start, StopSearch
from ets_engine.search.tree import SearchTree
from ets_engine.types import SearchEvent


def run(
    searching: Generator[Request, Any, SearchTree],
    policy: Policy,
    verifier: Verifier,
    embedder: Embedder | None = None,
    *,
    on_event: Callable[[SearchEvent], None] | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> SearchTree:
    """Run a search to its end.

    Args:
        searching: What `search()` returned, not yet started.
        policy: Proposes steps.
        verifier: Scores steps.
        embedder: Needed only by selectors with `needs_embeddings`.
        on_event: Called with every progress event.
        should_stop: Asked before every request; once it says True the search ends with the tree so far, as it does
            where policy, verifier or embedder raise `StopSearch`.

    Returns:
        The tree, with `tree.stopped` set when it was stopped early.

    Example:
        >>> from ets_engine.config import SearchConfig
        >>> from ets_engine.search.loop import search
        >>> from ets_engine.testing import FakePolicy, TableVerifier
        >>> tree = run(search(SearchConfig(strategy="rebase", width=4)), FakePolicy(seed=1), TableVerifier())
        >>> len(tree.closed)
        4
    """
    try:
        request = next(searching)
        while True:
            try:
                if should_stop is not None and should_stop():
                    raise StopSearch
                found = answer(request, policy, verifier, embedder, on_event)
            except StopSearch as stop:
                should_stop = None
                request = searching.throw(stop)
            else:
                request = searching.send(found)
    except StopIteration as ended:
        return ended.value


def answer(
    request: Request,
    policy: Policy,
    verifier: Verifier,
    embedder: Embedder | None = None,
    on_event: Callable[[SearchEvent], None] | None = None,
) -> object:
    """Do what one request asks and return what to send back.

    Raises:
        ConfigError: Embeddings are asked for, and there is no embedder.
    """
    match request:
        case Start():
            return policy.start()
        case Expand(parents, children):
            return policy.expand(parents, children)
        case Score(nodes, parents, texts):
            return verifier.score(nodes, parents, texts)
        case Embed(nodes, texts):
            if embedder is None:
                raise ConfigError("embedder=None: this selector needs step embeddings; pass an embedder or lambda_d=0")
            return embedder.embed(nodes, texts)
        case Retain(leaves):
            policy.retain(leaves)
            return verifier.retain(leaves)
        case Progress(event):
            return on_event(event) if on_event is not None else None
