"""The addresses of one teacher, and which of them has the least to do. Needs httpx only.

Nothing is pinned: a replica that was restarted is asked again as soon as its time-out is over, and names are resolved
anew every few seconds, so the Pods of a headless Service come and go unseen.
"""

from __future__ import annotations

import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import httpcore
import httpx

from claas_teacher.errors import TeacherAnswerInvalid

QUEUE_HEADER = "Claas-Queue-Tokens"
KEEPALIVE_SECONDS = 4.0  # below vLLM's 5, so that a pooled connection is not one that the server is just closing
RESOLVE_SECONDS = 10.0
STALE_SECONDS = 1.0  # a load older than that is asked again, where there is a choice
LOAD_TIMEOUT_SECONDS = 1.0
DOWN_BASE_SECONDS, DOWN_CAP_SECONDS = 0.5, 30.0

_DEADLINE: ContextVar[float] = ContextVar("deadline", default=float("inf"))


@contextmanager
def ends_at(deadline: float) -> Iterator[None]:
    """No wait on a connection goes on after `deadline`: httpx bounds each wait, and a server that drips has many."""
    before = _DEADLINE.set(deadline)
    try:
        yield
    finally:
        _DEADLINE.reset(before)


class _Stream(httpcore.NetworkStream):
    """A connection that looks at the deadline of whoever uses it."""

    def __init__(self, stream: httpcore.NetworkStream) -> None:
        self._stream = stream

    def read(self, max_bytes: int, timeout: float | None = None) -> bytes:
        left = _DEADLINE.get() - time.monotonic()
        if left <= 0:
            raise httpcore.ReadTimeout("the deadline passed while the answer was read")
        return self._stream.read(max_bytes, left if timeout is None else min(timeout, left))

    def write(self, buffer: bytes, timeout: float | None = None) -> None:
        self._stream.write(buffer, timeout)

    def close(self) -> None:
        self._stream.close()

    def start_tls(
        self, ssl_context: ssl.SSLContext, server_hostname: str | None = None, timeout: float | None = None
    ) -> httpcore.NetworkStream:
        return _Stream(self._stream.start_tls(ssl_context, server_hostname, timeout))

    def get_extra_info(self, info: str) -> object:
        return self._stream.get_extra_info(info)


class _Network(httpcore.SyncBackend):
    def connect_tcp(
        self,
        host: str,
        port: int,
        timeout: float | None = None,
        local_address: str | None = None,
        socket_options: Iterable[httpcore.SOCKET_OPTION] | None = None,
    ) -> httpcore.NetworkStream:
        return _Stream(super().connect_tcp(host, port, timeout, local_address, socket_options))


class _Transport(httpx.HTTPTransport):
    """httpx's, on such connections."""

    def __init__(self, limits: httpx.Limits) -> None:
        context = httpx.create_ssl_context()
        super().__init__(verify=context)
        self._pool = httpcore.ConnectionPool(
            ssl_context=context,
            max_connections=limits.max_connections,
            keepalive_expiry=limits.keepalive_expiry,
            network_backend=_Network(),
        )


class Replica:
    """One address of the teacher, with its pooled connections and what is known of its load."""

    def __init__(self, url: httpx.URL, connections: int) -> None:
        self.url = str(url).rstrip("/")
        limits = httpx.Limits(max_connections=connections, keepalive_expiry=KEEPALIVE_SECONDS)
        # trust_env off: a proxy of the cluster's must not stand between us and a Service.
        self.http = httpx.Client(base_url=self.url, transport=_Transport(limits), trust_env=False)
        self.down_until = 0.0
        self._reported, self._reported_at = 0, float("-inf")
        self._in_flight = 0
        self._failures = 0
        self._lock = threading.Lock()

    @property
    def load(self) -> int:
        """Tokens that wait there, as far as is known: what it said last, and what we have sent and not heard of."""
        return self._reported + self._in_flight

    @property
    def stale(self) -> bool:
        """Whether its load is worth asking for again."""
        return time.monotonic() - self._reported_at > STALE_SECONDS

    @contextmanager
    def sending(self, tokens: int) -> Iterator[None]:
        """Count tokens as its load for as long as it has not answered."""
        with self._lock:
            self._in_flight += tokens
        try:
            yield
        finally:
            with self._lock:
                self._in_flight -= tokens

    def answered(self, headers: Mapping[str, str]) -> None:
        """It lives; and it may have said how much it has to do."""
        value = headers.get(QUEUE_HEADER, "")
        self._failures, self.down_until = 0, 0.0
        if re.fullmatch("[0-9]{1,15}", value):
            self.reported(int(value))

    def reported(self, tokens: int) -> None:
        """It said how much it has to do; what we sent is among that."""
        self._reported, self._reported_at = max(0, tokens - self._in_flight), time.monotonic()

    def failed(self) -> None:
        """It was out of reach: others first, for longer each time."""
        self._failures += 1
        self.down_until = time.monotonic() + min(DOWN_CAP_SECONDS, DOWN_BASE_SECONDS * 2**self._failures)


class Replicas:
    """All addresses of one teacher.

    Args:
        urls: http://HOST:PORT each; a HOST with several addresses stands for all of them (http only: a certificate
            names the host).
        connections: pooled, for each replica.
        ask_load: asks a replica for the tokens that wait there, within so many seconds.
    """

    def __init__(self, urls: Sequence[str], connections: int, ask_load: Callable[[Replica, float], int]) -> None:
        try:
            given = [httpx.URL(url.strip()) for url in urls]
        except httpx.InvalidURL:
            given = []
        if not given or any(url.scheme not in ("http", "https") or not url.host for url in given):
            raise ValueError("teacher url: expected http://HOST:PORT")
        # As messages and statuses show them: without anybody's password.
        self.urls = [str(url.copy_with(userinfo=b"")).rstrip("/") for url in given]
        self._given, self._connections, self._ask_load = given, connections, ask_load
        self._replicas: dict[str, Replica] = {}
        self._resolved_at = float("-inf")
        self._lock = threading.Lock()

    @property
    def count(self) -> int:
        """How many there are."""
        return len(self._current())

    def choose(self, avoid: Collection[str]) -> Replica:
        """The least loaded that is not to be avoided, of those that are not down; any rather than none."""
        known = self._current()
        candidates = [replica for replica in known if replica.url not in avoid] or known
        now = time.monotonic()
        up = [replica for replica in candidates if replica.down_until <= now] or candidates
        if len(up) > 1:
            for replica in up:
                if replica.stale:
                    self._refresh(replica)
        return min(up, key=lambda replica: (replica.down_until > time.monotonic(), replica.load))

    def others(self, avoid: Collection[str]) -> bool:
        """Whether one is left that is neither to be avoided nor down."""
        now = time.monotonic()
        return any(replica.url not in avoid and replica.down_until <= now for replica in self._current())

    def close(self) -> None:
        """Close all connections."""
        with self._lock:
            for replica in self._replicas.values():
                replica.http.close()

    def _refresh(self, replica: Replica) -> None:
        try:
            replica.reported(self._ask_load(replica, LOAD_TIMEOUT_SECONDS))
        except httpx.PoolTimeout:
            return  # it is our own scorings that keep it busy
        except (httpx.RequestError, TeacherAnswerInvalid):
            replica.failed()

    def _current(self) -> list[Replica]:
        with self._lock:
            if time.monotonic() - self._resolved_at > RESOLVE_SECONDS:
                wanted = {str(url): url for given in self._given for url in _addresses(given)}
                for gone in self._replicas.keys() - wanted.keys():
                    del self._replicas[gone]  # its connections close when its last answer has been read
                for name, url in wanted.items():
                    if name not in self._replicas:
                        self._replicas[name] = Replica(url, self._connections)
                self._resolved_at = time.monotonic()
            return list(self._replicas.values())


def _addresses(url: httpx.URL) -> list[httpx.URL]:
    """The url itself, or one for each address where its name has several of one family (a headless Service)."""
    if url.scheme == "https":
        return [url]
    try:
        found = socket.getaddrinfo(url.host, url.port or 80, type=socket.SOCK_STREAM)
    except OSError:
        return [url]  # the connection will say so
    family = found[0][0]
    hosts = sorted({str(address[0]) for of, _, _, _, address in found if of == family})
    return [url.copy_with(host=host) for host in hosts] if len(hosts) > 1 else [url]
