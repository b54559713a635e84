"""The two clients. Their methods are `Calls`' own, done by blocking or by awaiting: see there for what each raises."""

from __future__ import annotations

import functools
import ssl
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from types import TracebackType
from typing import Any, Concatenate, Final, ParamSpec, Self, TypeVar

import httpx

from claas_client import flow
from claas_client.calls import Calls, Ticket
from claas_client.flow import Flow, Stream
from claas_client.models import Request
from claas_client.retry import Retries

P = ParamSpec("P")
T = TypeVar("T")

TIMEOUT_SECONDS: Final = 30.0
Token = str | Callable[[], str]


def _calls(
    url: str,
    token: Token | None,
    api_key: str | None,
    namespace: str | None,
    timeout: float,
    retries: Retries | None,
) -> Calls:
    if token is not None and api_key is not None:
        raise ValueError("give token or api_key, not both")
    given = token if token is not None else api_key or ""
    credential = given if callable(given) else lambda: given
    return Calls(url, credential, namespace, timeout, retries or Retries())


def _blocking(call: Callable[Concatenate[Calls, P], Flow[T]]) -> Callable[Concatenate[Client, P], T]:
    @functools.wraps(call)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return flow.run(client.http, call(client.calls, *args, **kwargs))

    return method


def _iterating(call: Callable[Concatenate[Calls, P], Stream[T]]) -> Callable[Concatenate[Client, P], Iterator[T]]:
    @functools.wraps(call)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return flow.stream(client.http, call(client.calls, *args, **kwargs))

    return method


def _handing(call: Callable[Concatenate[Calls, P], Flow[Ticket]]) -> Callable[Concatenate[Client, P], Handle]:
    @functools.wraps(call)
    def method(client: Client, /, *args: P.args, **kwargs: P.kwargs) -> Handle:
        return Handle(client, flow.run(client.http, call(client.calls, *args, **kwargs)))

    return method


def _awaiting(
    call: Callable[Concatenate[Calls, P], Flow[T]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, T]]:
    @functools.wraps(call)
    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await flow.run_async(client.http, call(client.calls, *args, **kwargs))

    return method


def _aiterating(
    call: Callable[Concatenate[Calls, P], Stream[T]],
) -> Callable[Concatenate[AsyncClient, P], AsyncIterator[T]]:
    @functools.wraps(call)
    def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return flow.stream_async(client.http, call(client.calls, *args, **kwargs))

    return method


def _ahanding(
    call: Callable[Concatenate[Calls, P], Flow[Ticket]],
) -> Callable[Concatenate[AsyncClient, P], Coroutine[Any, Any, AsyncHandle]]:
    @functools.wraps(call)
    async def method(client: AsyncClient, /, *args: P.args, **kwargs: P.kwargs) -> AsyncHandle:
        return AsyncHandle(client, await flow.run_async(client.http, call(client.calls, *args, **kwargs)))

    return method


class Client:
    """A CLaaS server, seen by one caller. Thread-safe. Close it, or use it as a context manager.

    Args:
        url: of the server, https://HOST[:PORT][/PATH].
        token: a bearer token, or a function that gives the present one before each try.
        api_key: a key instead of a token.
        namespace: where the caller's own is not meant.
        timeout: seconds of a call that waits for nothing, with all its tries.
        retries: how often and how patiently; `Retries(attempts=1)` never tries again.
        transport: httpx's, for tests and special networks.
        verify: of TLS: True, or a context that knows your authority.
    """

    def __init__(
        self,
        url: str,
        *,
        token: Token | None = None,
        api_key: str | None = None,
        namespace: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        retries: Retries | None = None,
        transport: httpx.BaseTransport | None = None,
        verify: bool | ssl.SSLContext = True,
    ) -> None:
        self.calls = _calls(url, token, api_key, namespace, timeout, retries)
        self.http = httpx.Client(transport=transport, verify=verify)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the pooled connections."""
        self.http.close()

    def handle(self, id: str) -> Handle:
        """To wait for, follow or cancel a request by its id. Nothing is asked yet."""
        return Handle(self, Ticket(id, Request(id=id)))

    distill = _blocking(Calls.distill)
    distill_lite = _blocking(Calls.distill_lite)
    submit = _handing(Calls.submit)
    submit_lite = _handing(Calls.submit_lite)
    init_lora = _blocking(Calls.init_lora)
    request = _blocking(Calls.request)
    requests = _iterating(Calls.requests)
    wait = _blocking(Calls.wait)
    cancel = _blocking(Calls.cancel)
    events = _iterating(Calls.events)
    adapters = _iterating(Calls.adapters)
    adapter = _blocking(Calls.adapter)
    versions = _iterating(Calls.versions)
    lineage = _blocking(Calls.lineage)
    rollback = _blocking(Calls.rollback)
    health = _blocking(Calls.health)
    whoami = _blocking(Calls.whoami)
    reasons = _blocking(Calls.reasons)


class AsyncClient:
    """`Client` for asyncio: the same methods, awaited; lists and events are read with `async for`."""

    def __init__(
        self,
        url: str,
        *,
        token: Token | None = None,
        api_key: str | None = None,
        namespace: str | None = None,
        timeout: float = TIMEOUT_SECONDS,
        retries: Retries | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
        verify: bool | ssl.SSLContext = True,
    ) -> None:
        self.calls = _calls(url, token, api_key, namespace, timeout, retries)
        self.http = httpx.AsyncClient(transport=transport, verify=verify)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Closes the pooled connections."""
        await self.http.aclose()

    def handle(self, id: str) -> AsyncHandle:
        """To wait for, follow or cancel a request by its id. Nothing is asked yet."""
        return AsyncHandle(self, Ticket(id, Request(id=id)))

    distill = _awaiting(Calls.distill)
    distill_lite = _awaiting(Calls.distill_lite)
    submit = _ahanding(Calls.submit)
    submit_lite = _ahanding(Calls.submit_lite)
    init_lora = _awaiting(Calls.init_lora)
    request = _awaiting(Calls.request)
    requests = _aiterating(Calls.requests)
    wait = _awaiting(Calls.wait)
    cancel = _awaiting(Calls.cancel)
    events = _aiterating(Calls.events)
    adapters = _aiterating(Calls.adapters)
    adapter = _awaiting(Calls.adapter)
    versions = _aiterating(Calls.versions)
    lineage = _awaiting(Calls.lineage)
    rollback = _awaiting(Calls.rollback)
    health = _awaiting(Calls.health)
    whoami = _awaiting(Calls.whoami)
    reasons = _awaiting(Calls.reasons)


def _blocking_by_id(call: Callable[Concatenate[Calls, str, P], Flow[T]]) -> Callable[Concatenate[Handle, P], T]:
    @functools.wraps(call)
    def method(handle: Handle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return flow.run(handle.client.http, call(handle.client.calls, handle.id, *args, **kwargs))

    return method


def _iterating_by_id(
    call: Callable[Concatenate[Calls, str, P], Stream[T]],
) -> Callable[Concatenate[Handle, P], Iterator[T]]:
    @functools.wraps(call)
    def method(handle: Handle, /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        return flow.stream(handle.client.http, call(handle.client.calls, handle.id, *args, **kwargs))

    return method


def _awaiting_by_id(
    call: Callable[Concatenate[Calls, str, P], Flow[T]],
) -> Callable[Concatenate[AsyncHandle, P], Coroutine[Any, Any, T]]:
    @functools.wraps(call)
    async def method(handle: AsyncHandle, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return await flow.run_async(handle.client.http, call(handle.client.calls, handle.id, *args, **kwargs))

    return method


def _aiterating_by_id(
    call: Callable[Concatenate[Calls, str, P], Stream[T]],
) -> Callable[Concatenate[AsyncHandle, P], AsyncIterator[T]]:
    @functools.wraps(call)
    def method(handle: AsyncHandle, /, *args: P.args, **kwargs: P.kwargs) -> AsyncIterator[T]:
        return flow.stream_async(handle.client.http, call(handle.client.calls, handle.id, *args, **kwargs))

    return method


class Handle:
    """A request that goes on by itself.

    Attributes:
        id: names it, to anybody who may see it.
        accepted: the request as it was when it was accepted.
    """

    def __init__(self, client: Client, ticket: Ticket) -> None:
        self.client, self.id, self.accepted = client, ticket.id, ticket.request

    request = _blocking_by_id(Calls.request)
    wait = _blocking_by_id(Calls.wait)
    cancel = _blocking_by_id(Calls.cancel)
    events = _iterating_by_id(Calls.events)


class AsyncHandle:
    """`Handle` for asyncio."""

    def __init__(self, client: AsyncClient, ticket: Ticket) -> None:
        self.client, self.id, self.accepted = client, ticket.id, ticket.request

    request = _awaiting_by_id(Calls.request)
    wait = _awaiting_by_id(Calls.wait)
    cancel = _awaiting_by_id(Calls.cancel)
    events = _aiterating_by_id(Calls.events)
