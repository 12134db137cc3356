"""One server over HTTP: one request, one reply or one line saying what went wrong; it never tries again."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from time import time
from typing import Any

import httpx

from ets_engine.errors import EngineError

_RETRYABLE = {408, 429}  # and every 5xx
_CONNECT_S = 10.0
_SHOWN = 200  # characters of what a server says that an error repeats


class ServerError(EngineError):
    """A server refused a request, failed, or cannot be reached.

    Attributes:
        status: HTTP status of its reply, None without a legible one.
        is_retryable: Whether the same request may succeed later, or on another replica.
        is_down: Whether the server itself seems to be at fault: no connection, no reply, or a 5xx.
        retry_after_s: Seconds after which the server asks to try again, None where it does not say.
    """

    def __init__(
        self,
        message: str,
        *,
        status: int | None = None,
        is_retryable: bool = False,
        is_down: bool = False,
        retry_after_s: float | None = None,
    ) -> None:
        """See the class."""
        super().__init__(message)
        self.status = status
        self.is_retryable = is_retryable
        self.is_down = is_down
        self.retry_after_s = retry_after_s


class AbandonedError(ServerError):
    """The search that asked has ended, so nobody waits for a reply any more; that is no fault of the server's."""


class Server:
    """Speaks JSON with one OpenAI-compatible server; any number of threads may use it.

    The key is read from the environment for each request, sent in the `Authorization` header to this server alone, and
    kept nowhere. Redirects are not followed, so it never reaches another host.

    Args:
        url: Base address, e.g. "http://host:8000/v1".
        api_key_env: Environment variable that holds the key; unset or empty = none is sent.
        timeout_s: Longest wait for a reply.
        max_connections: Most connections at a time (count).
        transport: Instead of the network.

    Example:
        >>> Server("http://127.0.0.1:8000/v1")
        Server('http://127.0.0.1:8000/v1')
    """

    def __init__(
        self,
        url: str,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        max_connections: int = 64,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        """See the class."""
        self.url = url
        self._root = url.removesuffix("/v1")
        self._api_key_env = api_key_env
        self._timeout_s = timeout_s
        self._client = httpx.Client(
            limits=httpx.Limits(max_connections=max_connections, max_keepalive_connections=max_connections),
            follow_redirects=False,
            transport=transport,
        )

    def __repr__(self) -> str:
        """Without the key."""
        return f"Server({self.url!r})"

    def post(self, path: str, body: Mapping[str, Any], timeout_s: float = math.inf) -> dict[str, Any]:
        """The reply to a JSON body.

        Args:
            path: Below the base address, "/completions" for instance; "^/tokenize" is below the server's root.
            body: To be sent.
            timeout_s: Longest wait for it, where that is less than the server's.

        Raises:
            ServerError: In one line, what went wrong.
        """
        response = self._send("POST", path, body, timeout_s)
        try:
            found = response.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ServerError(
                f"{self._where(path)} answered no JSON object: {self._clean(response.text)!r}; give the address of an "
                "OpenAI-compatible server, http://host:8000/v1 for instance",
                status=200,
            )
        return found

    def get(self, path: str, timeout_s: float = math.inf) -> httpx.Response:
        """A page of the server, with any status below 300; the arguments are as in `post`.

        Raises:
            ServerError: As `post`.
        """
        return self._send("GET", path, None, timeout_s)

    def close(self) -> None:
        """Close all connections."""
        self._client.close()

    def _where(self, path: str) -> str:
        return self._root + path[1:] if path.startswith("^") else self.url + path

    def _send(self, method: str, path: str, body: Mapping[str, Any] | None, timeout_s: float) -> httpx.Response:
        where, key = self._where(path), self._key()
        if key and not (key.isascii() and key.isprintable()):
            raise ServerError(f"{where}: {self._api_key_env} holds a key that no header can hold")
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        wait_s = min(timeout_s, self._timeout_s)
        pool_s = wait_s if timeout_s < self._timeout_s else None
        timeout = httpx.Timeout(wait_s, connect=min(_CONNECT_S, wait_s), pool=pool_s)
        try:
            response = self._client.request(method, where, json=body, headers=headers, timeout=timeout)
        except httpx.TimeoutException:
            raise ServerError(
                f"{where} did not answer within {wait_s:g} s; look at its log, or raise timeout_s",
                is_retryable=True,
                is_down=True,
            ) from None
        except httpx.LocalProtocolError:  # its text repeats the header, and so perhaps the key
            raise ServerError(f"{where}: HTTP has no place for such a request; correct the address") from None
        except (httpx.RequestError, httpx.InvalidURL) as error:  # refused, reset, closed half-way
            said = self._clean(f"{type(error).__name__}: {error}")
            way_out = "; start the server, or correct the address" if isinstance(error, httpx.ConnectError) else ""
            raise ServerError(f"{where} broke off: {said}{way_out}", is_retryable=True, is_down=True) from None
        except UnicodeEncodeError as error:
            lone = error.object[error.start : error.end]
            raise ServerError(
                f"{where}: the request holds {lone!a:.20}, half a character, which no JSON can say; leave it out"
            ) from None
        if response.status_code < 300:
            return response
        raise self._refusal(where, response)

    def _refusal(self, where: str, response: httpx.Response) -> ServerError:
        status = response.status_code
        message = f"{where} answered {status}: {self._clean(_detail(response)) or response.reason_phrase}"
        if status < 400:
            message = f"{where} redirects, and redirects are not followed; give the final address"
        elif status == 401:
            message += f"; put a valid key into the environment variable {self._api_key_env}"
        elif status == 404:
            message += f"; look at {self.url}/models for the names of its models"
        return ServerError(
            message,
            status=status,
            is_retryable=status in _RETRYABLE or status >= 500,
            is_down=status >= 500,
            retry_after_s=_seconds(response.headers.get("retry-after")),
        )

    def _key(self) -> str | None:
        return os.environ.get(self._api_key_env, "").strip() or None

    def _clean(self, text: str) -> str:
        """What a server says on one short line, which never repeats the key and holds nothing for a terminal."""
        key = self._key()
        text = text.replace(key, "[key]") if key else text
        line = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
        return line if len(line) <= _SHOWN else line[:_SHOWN] + "..."


def _detail(response: httpx.Response) -> str:
    """The part of an error's body that is meant for people."""
    try:
        found: Any = response.json()
    except ValueError:
        return response.text
    for name in ("error", "message", "detail"):
        if isinstance(found, dict) and found.get(name):
            found = found[name]
    return found if isinstance(found, str) else str(found)


def _seconds(retry_after: str | None) -> float | None:
    """A `Retry-After` header: seconds, or a date."""
    if retry_after is None:
        return None
    try:
        return max(0.0, float(retry_after))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time())
    except ValueError:
        return None
