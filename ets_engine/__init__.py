"""Efficient Tree Search (arXiv 2502.13575) over a tree-shaped KV cache.

Every public name loads on first use, so importing this package is cheap and loads no model library:

    >>> import ets_engine
    >>> ets_engine.SearchConfig(strategy="rebase", width=4).width
    4
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ets_engine.config import EngineConfig, SearchConfig
    from ets_engine.errors import (
        ConfigError,
        ContextLengthError,
        EngineClosedError,
        EngineError,
        ETSError,
        ModelLoadError,
        NoUsableAnswerError,
        PoolExhaustedError,
        ProtocolError,
        QueueFullError,
        ReferenceDomainError,
        UnsupportedModelError,
    )
    from ets_engine.hosted import HostedEngine
    from ets_engine.registry import register_service
    from ets_engine.service import ETSEngine, get_engine
    from ets_engine.services import find_service
    from ets_engine.types import EngineStats, SearchEvent, SearchResult

__version__ = "0.1.0"

_HOME = {
    "ConfigError": "errors",
    "ContextLengthError": "errors",
    "ETSEngine": "service",
    "ETSError": "errors",
    "EngineClosedError": "errors",
    "EngineConfig": "config",
    "EngineError": "errors",
    "EngineStats": "types",
    "HostedEngine": "hosted",
    "ModelLoadError": "errors",
    "NoUsableAnswerError": "errors",
    "PoolExhaustedError": "errors",
    "ProtocolError": "errors",
    "QueueFullError": "errors",
    "ReferenceDomainError": "errors",
    "SearchConfig": "config",
    "SearchEvent": "types",
    "SearchResult": "types",
    "UnsupportedModelError": "errors",
    "find_service": "services",
    "get_engine": "service",
    "register_service": "registry",
}  # public name -> the module that defines it

__all__ = [
    "ConfigError",
    "ContextLengthError",
    "ETSEngine",
    "ETSError",
    "EngineClosedError",
    "EngineConfig",
    "EngineError",
    "EngineStats",
    "HostedEngine",
    "ModelLoadError",
    "NoUsableAnswerError",
    "PoolExhaustedError",
    "ProtocolError",
    "QueueFullError",
    "ReferenceDomainError",
    "SearchConfig",
    "SearchEvent",
    "SearchResult",
    "UnsupportedModelError",
    "__version__",
    "find_service",
    "get_engine",
    "register_service",
]


def __getattr__(name: str) -> Any:
    """Load a public name from its home module and keep it, so that this runs once per name."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Public names, loaded or not."""
    return sorted({*globals(), *__all__})
