"""The search services of this process that were given a name."""

from __future__ import annotations

import threading

from ets_engine.errors import ConfigError
from ets_engine.protocols import SearchService

_registered: dict[str, SearchService] = {}
_lock = threading.Lock()


def register_service(name: str, service: SearchService) -> None:
    """Let a service be found by name, in this process; a name can be given anew.

    Raises:
        ConfigError: It is no service.

    Example:
        >>> from ets_engine.hosted import HostedEngine
        >>> register_service("my-model", HostedEngine(lambda request: [], name="my-model"))
        >>> registered_service("my-model").name
        'my-model'
    """
    if isinstance(service, type) or not isinstance(service, SearchService):
        raise ConfigError(f"service={service!r:.100}: give an ETSEngine, or anything else with submit(problem, config)")
    with _lock:
        _registered[name] = service


def registered_service(name: str) -> SearchService:
    """The service that was registered under this name; no model is loaded in its place.

    Raises:
        ConfigError: There is none.
    """
    service = look_up(name)
    if service is None:
        raise ConfigError(f"service={name!r} is not registered in this process; call register_service(name, service)")
    return service


def look_up(name: str) -> SearchService | None:
    """The service that was registered under this name, None where there is none."""
    with _lock:
        return _registered.get(name)
