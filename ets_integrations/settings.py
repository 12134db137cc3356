"""What both frameworks' adapters make of a user's settings: one search config, a fresh seed, a name for a verifier."""

from __future__ import annotations

import hashlib
import inspect
import secrets
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, Literal

from ets_engine.config import SearchConfig
from ets_engine.errors import ConfigError

Effort = Literal["low", "medium", "high"]
WIDTHS: dict[str, int] = {"low": 4, "medium": 16, "high": 64}
"""Trajectories kept alive, by effort."""


def resolve_config(
    settings: SearchConfig | Mapping[str, Any] | None = None, *, effort: str | None = None, **changes: Any
) -> SearchConfig:
    """One complete config; what is said explicitly goes before the effort, the effort before the defaults.

    Args:
        settings: A config, or some of its fields.
        effort: "low", "medium" or "high": the width where none is given.
        changes: Fields that are changed; None leaves one as it is.

    Raises:
        ConfigError: An unknown effort or field, or a value out of range.

    Example:
        >>> resolve_config({"strategy": "rebase"}, effort="high", max_steps=None).width
        64
        >>> resolve_config({"width": 8}, effort="high").width
        8
    """
    if effort is not None and effort not in WIDTHS:
        raise ConfigError(f"effort={effort!r}: choose one of {', '.join(WIDTHS)}")
    given = settings.model_dump(exclude_unset=True) if isinstance(settings, SearchConfig) else dict(settings or {})
    given |= {name: value for name, value in changes.items() if value is not None}
    if effort is not None:
        given.setdefault("width", WIDTHS[effort])
    return SearchConfig(**given)


def fresh_seed() -> int:
    """A seed that nobody has used: two calls that ask for no seed are two samples."""
    return secrets.randbits(63)


def verifier_name(verifier: str | Callable[..., Any] | object | None) -> str | None:
    """What tells one verifier from another in a cache key, None where nothing reliable does.

    A PRM is its name, an object with a text `id` that, and a function its module, name, source, and the plain values of
    its module that it reads. A lambda has none (several may share a line), nor has a function that closes over
    something, or whose defaults or globals may change: two of one source may judge differently.

    Example:
        >>> verifier_name("path/to/prm")
        'path/to/prm'
        >>> def at_most(limit):
        ...     return lambda problem, steps: float(len(steps) <= limit)
        >>> verifier_name(at_most(3)) is None
        True
    """
    if verifier is None or isinstance(verifier, str):
        return verifier
    if isinstance(name := getattr(verifier, "id", None), str):
        return name
    if not inspect.isfunction(verifier) or verifier.__closure__ or verifier.__name__ == "<lambda>":
        return None
    read = {name: verifier.__globals__[name] for name in _names(verifier.__code__) if name in verifier.__globals__}
    values = {name: one for name, one in read.items() if not _is_code(one)}
    defaults = [*(verifier.__defaults__ or ()), *(verifier.__kwdefaults__ or {}).values()]
    if any(not isinstance(one, str | int | float | None) for one in [*defaults, *values.values()]):
        return None  # it may change
    try:
        source = inspect.getsource(verifier)
    except (OSError, TypeError):
        return None
    digest = hashlib.sha256(f"{source}{defaults!r}{sorted(values.items())!r}".encode()).hexdigest()[:16]
    return f"py:{verifier.__module__}.{verifier.__qualname__}:{digest}"


def _names(code: CodeType) -> set[str]:
    """Every name that is looked up outside of a function, in the functions and comprehensions within it too."""
    inner = [_names(one) for one in code.co_consts if isinstance(one, CodeType)]
    return set(code.co_names).union(*inner)


def _is_code(value: object) -> bool:
    """Whether this is a module, a class or a function, which a program does not change as it runs."""
    return inspect.ismodule(value) or inspect.isclass(value) or inspect.isroutine(value)
