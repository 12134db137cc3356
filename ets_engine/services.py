"""Finds a search service by name: one that was registered, else the process's engine of that model."""

from __future__ import annotations

import threading

from ets_engine.config import EngineConfig
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
        >>> find_service("my-model").name
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
    with _lock:
        service = _registered.get(name)
    if service is None:
        raise ConfigError(f"service={name!r} is not registered in this process; call register_service(name, service)")
    return service


def find_service(model: str, verifier: str | None = None, config: EngineConfig | None = None) -> SearchService:
    """The registered service of this name, else the process's engine of this model, loaded when first asked for.

    Args:
        model: A registered name, or a model as in `ETSEngine.from_pretrained`.
        verifier: As there; a registered service has its own.
        config: As there.

    Raises:
        ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
        ConfigError: The shipped PRM is asked to judge another model, or a device is absent.
    """
    with _lock:
        service = _registered.get(model)
    if service is not None:
        return service
    from ets_engine.service import get_engine  # it loads torch

    return get_engine(model, verifier, config)
