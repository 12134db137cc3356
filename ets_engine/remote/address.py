"""Where a model is served: `openai:URL[,URL...]#model` as a value, without secrets."""

from __future__ import annotations

from dataclasses import dataclass
from urllib.parse import urlsplit

from ets_engine.config import REMOTE
from ets_engine.errors import ConfigError


@dataclass(frozen=True, slots=True)
class Address:
    """Replicas of one model behind OpenAI-compatible servers.

    Attributes:
        urls: Base addresses, e.g. "http://gpu1:8000/v1"; all serve the same weights.
        model: The model's name there.
    """

    urls: tuple[str, ...]
    model: str

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read `openai:URL[,URL...]#model`; a URL without a path means `/v1` there.

        Raises:
            ConfigError: It is no such address, or holds a password or a query; its value is not repeated then.

        Example:
            >>> Address.parse("openai:http://a:8000,http://b:8000/v1/#Qwen/Qwen2.5-7B").name
            'openai:http://a:8000/v1,http://b:8000/v1#Qwen/Qwen2.5-7B'
        """
        where, _, model = text.removeprefix(REMOTE).partition("#")
        if not text.startswith(REMOTE) or not model or not where:
            raise ConfigError("this address of a model is not legible; write openai:http://host:8000/v1#model-name")
        return cls(tuple(_base_url(url.strip()) for url in where.split(",")), model)

    @property
    def name(self) -> str:
        """As `parse` reads it."""
        return f"{REMOTE}{','.join(self.urls)}#{self.model}"


def _base_url(url: str) -> str:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port
    except ValueError:
        host = port = parts = None
    if parts is None or parts.scheme not in ("http", "https") or not host:
        raise ConfigError("a server's address must be like http://host:8000/v1; several are separated by commas")
    if parts.username is not None or parts.password is not None or parts.query:
        raise ConfigError(
            f"the address of the server {host} holds a user name, a password or a query; keep secrets out of "
            "addresses, a key belongs into the environment variable that api_key_env names"
        )
    where = f"[{host}]" if ":" in host else host
    return f"{parts.scheme}://{where}{'' if port is None else f':{port}'}{parts.path.rstrip('/') or '/v1'}"
