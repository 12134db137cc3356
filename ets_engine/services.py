"""Finds a search service by name: one that was registered, one over a server, or the process's engine of that model."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

from ets_engine.config import REMOTE, EngineConfig
from ets_engine.protocols import SearchService
from ets_engine.registry import look_up

if TYPE_CHECKING:
    from ets_engine.remote import RemoteEngine

_connected: weakref.WeakValueDictionary[tuple[str, str | None, EngineConfig], RemoteEngine] = (
    weakref.WeakValueDictionary()
)
_lock = threading.Lock()


def find_service(model: str, verifier: str | None = None, config: EngineConfig | None = None) -> SearchService:
    """The registered service of this name, else the process's one of this model, made when first asked for.

    Args:
        model: A registered name; `openai:URL[,URL...]#model`, a model behind OpenAI-compatible servers (see
            `ets_engine.remote.connect`); or a model as in `ETSEngine.from_pretrained`.
        verifier: As there; a registered service has its own.
        config: As there.

    Raises:
        ModelLoadError: A model cannot be loaded, or its architecture cannot be honoured.
        ConfigError: The shipped PRM is asked to judge another model, an address is wrong, or a device is absent.
    """
    service = look_up(model)
    if service is not None:
        return service
    if model.startswith(REMOTE):
        return _find_connected(model, verifier, config or EngineConfig())
    from ets_engine.service import get_engine  # it loads torch

    return get_engine(model, verifier, config)


def _find_connected(model: str, verifier: str | None, config: EngineConfig) -> SearchService:
    from ets_engine.remote import Address, connect

    key = (Address.parse(model).name, verifier, config)
    with _lock:
        engine = _connected.get(key)
        if engine is None or engine.is_closed:
            engine = _connected[key] = connect(*key, rebuild=(find_service, key))
        return engine
