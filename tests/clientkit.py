"""For tests of the REST client: a transport that answers what the test says, and a driver for either client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import httpx

from claas_client import AsyncClient, Client, Retries

Handler = Callable[[httpx.Request], httpx.Response]
URL = "https://claas.test"
# Pauses are decided as ever, and last a thousandth.
QUICK = Retries(attempts=4, base_seconds=0.001, cap_seconds=0.01, jitter=lambda: 1.0)


@dataclass
class Script:
    """Answers calls one after the other, and remembers them. An exception is raised in a response's place."""

    answers: list[httpx.Response | Exception]
    seen: list[httpx.Request] = field(default_factory=list)

    def __call__(self, request: httpx.Request) -> httpx.Response:
        request.read()
        self.seen.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return httpx.Response(answer.status_code, headers=answer.headers, content=answer.content)

    @property
    def paths(self) -> list[str]:
        """Method and path of every call."""
        return [f"{request.method} {request.url.path}" for request in self.seen]


class Driver:
    """A client, blocking or awaiting, behind one interface."""

    def __init__(self, kind: str, handler: Handler, options: dict[str, Any]) -> None:
        self._kind, self._handler = kind, handler
        self._options = {"retries": QUICK, "token": "t"} | options
        if "api_key" in options:
            del self._options["token"]

    def call(self, method: str, *args: Any, **kwargs: Any) -> Any:
        """The result of one call."""
        transport = httpx.MockTransport(self._handler)
        if self._kind == "sync":
            with Client(URL, transport=transport, **self._options) as client:
                return getattr(client, method)(*args, **kwargs)

        async def awaited() -> Any:
            async with AsyncClient(URL, transport=transport, **self._options) as client:
                return await getattr(client, method)(*args, **kwargs)

        return asyncio.run(awaited())

    def items(self, method: str, *args: Any, **kwargs: Any) -> list[Any]:
        """All that a list or a stream gives."""
        transport = httpx.MockTransport(self._handler)
        if self._kind == "sync":
            with Client(URL, transport=transport, **self._options) as client:
                return list(getattr(client, method)(*args, **kwargs))

        async def awaited() -> list[Any]:
            async with AsyncClient(URL, transport=transport, **self._options) as client:
                return [item async for item in getattr(client, method)(*args, **kwargs)]

        return asyncio.run(awaited())


Use = Callable[..., Driver]
