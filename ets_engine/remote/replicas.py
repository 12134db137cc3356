"""Several servers of one model as one: which replica gets a request, and what happens when one fails."""

from __future__ import annotations

import contextvars
import hashlib
import random
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import httpx

from ets_engine.deadline import remaining_s
from ets_engine.remote.address import Address
from ets_engine.remote.server import AbandonedError, Server, ServerError

T = TypeVar("T")

_SLACK = 8  # branches that a replica may have more in flight than the idlest before new subtrees go elsewhere
_KNOWN_HOMES = 65536  # prefixes whose replica is remembered
_PING_S = 5.0
_NAP_S = 0.1


def rest(duration_s: float) -> None:
    """Wait, for no longer than the search goes on that asked."""
    end_s = time.monotonic() + duration_s
    while (left_s := min(end_s - time.monotonic(), remaining_s())) > 0:
        time.sleep(min(left_s, _NAP_S))


@contextmanager
def held(lock: threading.Lock) -> Iterator[None]:
    """Hold a lock under which another search may wait for a server.

    Raises:
        AbandonedError: The search that asks ended before it was free.
    """
    while not lock.acquire(timeout=min(_NAP_S, remaining_s())):
        if remaining_s() <= 0:
            raise AbandonedError("the search ended before the server was known")
    try:
        yield
    finally:
        lock.release()


@dataclass(eq=False)
class _Replica:
    server: Server
    load: int = 0  # branches in flight
    down_until_s: float = 0.0


class Replicas:
    """Sends requests to replicas of one model: a prefix stays where its KV is, and a dead replica loses nothing.

    A request names the prefixes it shares, most specific first: its subtree, say, then its prompt. It goes where one of
    them went before. A new subtree goes to its prompt's replica, or to the idlest where that one has clearly more to
    do. On a timeout, a lost connection, 408, 429 or a 5xx the request is tried again: at once on a replica that has not
    failed it yet, then after a growing, jittered pause, or after what `Retry-After` says. A replica that seems dead is
    left aside for a while and asked for its models before it gets requests again.

    A search's deadline cuts every wait short, and after it, or once the search is cancelled, there is no other try.

    Args:
        servers: At least one.
        retries: More tries of a request after the first (count), over all replicas; each replica gets one in any case.
        backoff_s: First pause, doubled each time.
        max_wait_s: Longest pause; where `Retry-After` asks for more, the request fails.
        cooldown_s: How long a dead replica is left aside.
        max_concurrent_requests: Most requests in flight, over all replicas (count).
        clock: Seconds as a number.
        sleep: Waits between tries.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        *,
        retries: int = 4,
        backoff_s: float = 0.5,
        max_wait_s: float = 30.0,
        cooldown_s: float = 30.0,
        max_concurrent_requests: int = 64,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = rest,
    ) -> None:
        """See the class."""
        self._replicas = [_Replica(server) for server in servers]
        self._retries = retries
        self._backoff_s = backoff_s
        self._max_wait_s = max_wait_s
        self._cooldown_s = cooldown_s
        self._clock = clock
        self._sleep = sleep
        self._homes: OrderedDict[str, _Replica] = OrderedDict()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(max_concurrent_requests, thread_name_prefix="ets-requests")
        self._pings = ThreadPoolExecutor(len(self._replicas), thread_name_prefix="ets-pings")  # wait for no request

    @classmethod
    def connect(
        cls,
        address: Address,
        *,
        api_key_env: str = "OPENAI_API_KEY",
        timeout_s: float = 120.0,
        retries: int = 4,
        max_concurrent_requests: int = 64,
        transport: httpx.BaseTransport | None = None,
    ) -> Replicas:
        """The replicas at an address; nothing is asked yet. The arguments are as in `Server` and in `Replicas`."""
        servers = [
            Server(
                url,
                api_key_env=api_key_env,
                timeout_s=timeout_s,
                max_connections=max_concurrent_requests,
                transport=transport,
            )
            for url in address.urls
        ]
        return cls(servers, retries=retries, max_concurrent_requests=max_concurrent_requests)

    @property
    def servers(self) -> tuple[Server, ...]:
        """All of them, dead or not."""
        return tuple(replica.server for replica in self._replicas)

    def post(
        self,
        path: str,
        body: Mapping[str, Any],
        *,
        prefixes: Sequence[str] = (),
        load: int = 1,
        retries: int | None = None,
    ) -> dict[str, Any]:
        """The reply of one replica.

        Args:
            path: As in `Server.post`.
            body: To be sent.
            prefixes: What names the KV that the request shares with others, most specific first; `digest` keeps the
                names of long texts short, as very many are remembered.
            load: Branches that it asks for (count).
            retries: Instead of the usual number.

        Raises:
            ServerError: The last failure, when no try is left or another try cannot help.
            AbandonedError: The search that asks ended first.
        """
        failed: list[_Replica] = []
        tries = max((self._retries if retries is None else retries) + 1, len(self._replicas))
        for tried in range(1, tries + 1):
            if (left_s := remaining_s()) <= 0:
                raise AbandonedError(f"the search ended before {path} was asked")
            replica = self._take(prefixes, load, failed)
            try:
                return replica.server.post(path, body, left_s)
            except ServerError as error:
                if remaining_s() <= 0:
                    raise AbandonedError(f"the search ended before {path} had answered") from error
                failed.append(replica)
                if error.is_down:
                    replica.down_until_s = self._clock() + self._cooldown_s
                if not error.is_retryable or tried == tries:
                    raise
                if all(one in failed for one in self._replicas):
                    self._sleep(self._pause_s(error, tried // len(self._replicas) - 1))
                    failed.clear()
            finally:
                with self._lock:
                    replica.load -= load
        raise AssertionError("the last try returns or raises")

    def map(self, call: Callable[[T], Any], items: Sequence[T]) -> list[Any]:
        """Results of `call` for all items, side by side; a `ServerError` is a result, in the place of its item.

        All calls run with this call's context variables, and so know the search that asks. Once that is to end, nobody
        waits for them any more, and an `AbandonedError` stands in the place of each that is not done.
        """

        def guarded(item: T) -> Any:
            try:
                return call(item)
            except ServerError as error:
                return error

        futures = [self._pool.submit(contextvars.copy_context().run, guarded, item) for item in items]
        try:
            return [_wait_for(future) for future in futures]
        finally:
            for future in futures:
                future.cancel()

    def close(self) -> None:
        """Wait for the requests in flight, and close all connections."""
        self._pool.shutdown(wait=True)
        self._pings.shutdown(wait=True)
        for server in self.servers:
            server.close()

    def _pause_s(self, error: ServerError, rounds: int) -> float:
        if error.retry_after_s is not None:
            if error.retry_after_s > self._max_wait_s:
                raise error
            return error.retry_after_s
        return min(self._max_wait_s, self._backoff_s * 2 ** max(0, rounds)) * random.uniform(0.5, 1.0)

    def _take(self, prefixes: Sequence[str], load: int, failed: Sequence[_Replica]) -> _Replica:
        """The replica for a request, counted as in flight there."""
        self._revive()
        with self._lock:
            untried = [replica for replica in self._replicas if replica not in failed]
            now_s = self._clock()
            live = [replica for replica in untried if replica.down_until_s <= now_s] or untried
            chosen = self._choose(prefixes, live)
            chosen.load += load
            if prefixes:
                self._homes[prefixes[0]] = chosen
                self._homes.move_to_end(prefixes[0])
                if len(self._homes) > _KNOWN_HOMES:
                    self._homes.popitem(last=False)
            return chosen

    def _choose(self, prefixes: Sequence[str], live: Sequence[_Replica]) -> _Replica:
        idlest = min(live, key=lambda replica: replica.load)
        if not prefixes:
            return idlest
        known = (self._homes.get(prefix) for prefix in prefixes)
        homes = [home for home in known if home is not None and home in live]
        if homes and homes[0] is self._homes.get(prefixes[0]):
            return homes[0]
        near = homes[0] if homes else max(live, key=lambda replica: _rank(prefixes[-1], replica.server.url))
        return idlest if near.load > idlest.load + _SLACK else near

    def _revive(self) -> None:
        """Have replicas whose time is up asked whether they live; they get no requests until then, and nobody waits."""
        now_s = self._clock()
        with self._lock:
            if len(self._replicas) == 1:
                return
            due = [replica for replica in self._replicas if 0 < replica.down_until_s <= now_s]
            for replica in due:
                replica.down_until_s = now_s + self._cooldown_s
        with suppress(RuntimeError):  # closed meanwhile
            for replica in due:
                self._pings.submit(self._ping, replica)

    def _ping(self, replica: _Replica) -> None:
        try:
            replica.server.get("/models", _PING_S)
        except ServerError as error:
            if error.is_down:
                return
        replica.down_until_s = 0.0


def _wait_for(future: Future[Any]) -> Any:
    """Its result, or an `AbandonedError` if the search that asks ends first."""
    while not future.done() and (left_s := remaining_s()) > 0:
        wait([future], min(left_s, _NAP_S))
    return future.result() if future.done() else AbandonedError("the search ended before a request was done")


def digest(text: str) -> str:
    """A short name of a text, any text: a lone surrogate has one as well."""
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()[:32]


def _rank(prefix: str, url: str) -> bytes:
    """Highest random weight: each prefix has an order of the replicas of its own, which a lost one does not change."""
    return hashlib.sha256(f"{prefix}\n{url}".encode()).digest()
