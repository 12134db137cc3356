"""Finds a search service by name: one that was registered, one over a server, or the process's engine of that model."""

from __future__ import annotations

import threading
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from ets_engine.config import REMOTE, EngineConfig
from ets_engine.errors import ConfigError
from ets_engine.protocols import SearchService
from ets_engine.registry import look_up

if TYPE_CHECKING:
    from ets_engine.remote import RemoteEngine
    from ets_engine.remote import ServerDescription as ServerDescription  # which commands read
    from ets_engine.service import ETSEngine

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
        ConfigError: The shipped PRM is asked to judge another model, an address is wrong, a name is that of a file, or
            a device is absent.
    """
    service = look_up(model)
    if service is not None:
        return service
    if model.startswith(REMOTE):
        return _find_connected(model, verifier, config or EngineConfig())
    _check_folders(model, verifier)
    from ets_engine.service import get_engine  # it loads torch

    return get_engine(model, verifier, config)


def open_engine(
    model: str, verifier: str | None = None, config: EngineConfig | None = None
) -> ETSEngine | RemoteEngine:
    """An engine of the caller's own, which the caller closes: one that loads its models, or one over a server.

    Args:
        model: `openai:URL[,URL...]#model`, or a model as in `ETSEngine.from_pretrained`.
        verifier: As in `find_service`.
        config: As in `find_service`.

    Raises:
        ModelLoadError: As `find_service`.
        ConfigError: As `find_service`.
    """
    if model.startswith(REMOTE):
        from ets_engine.remote import connect

        return connect(model, verifier, config)
    _check_folders(model, verifier)
    from ets_engine.service import ETSEngine  # it loads torch

    return ETSEngine.from_pretrained(model, verifier, config)


def _check_folders(model: str, verifier: str | None) -> None:
    """Refuse a file in the place of its folder, as `open_checkpoint` does, before anything is loaded.

    Raises:
        ConfigError: A name is that of a file.
    """
    for role, name in (("model", model), ("verifier", verifier)):
        if name is not None and Path(name).is_file():
            raise ConfigError(f"{role}={name!r} is a file; give the folder that holds it, {str(Path(name).parent)!r}")


def _find_connected(model: str, verifier: str | None, config: EngineConfig) -> SearchService:
    from ets_engine.remote import Address, connect

    key = (Address.parse(model).name, verifier, config)
    with _lock:
        engine = _connected.get(key)
        if engine is None or engine.is_closed:
            engine = _connected[key] = connect(*key, rebuild=(find_service, key))
        return engine
