"""An HTTP proxy before a real server that fails as it is told: the API server, the object store or the teacher.

Every client has a door of its own (a port), so a fault may be for one of them, and a process can be killed at the very
call at which it is to die: before the server hears it, or after the server has carried it out and before the answer.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import ssl
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
from aiohttp import web
from yarl import URL

_HOP_BY_HOP = {
    "connection",
    "expect",
    "keep-alive",
    "transfer-encoding",
    "te",
    "trailer",
    "upgrade",
    "proxy-connection",
}
FOREVER = 1_000_000_000
_quiet = logging.getLogger("chaos.proxy")  # aiohttp complains of connections that are cut, as they should be
_quiet.disabled = True


@dataclass(frozen=True)
class Call:
    """A request on its way."""

    who: str
    method: str
    path: str  # with its query
    body: bytes

    @property
    def is_watch(self) -> bool:
        return "watch=true" in self.path or "watch=True" in self.path

    def __str__(self) -> str:
        return f"{self.who}: {self.method} {self.path}"


@dataclass
class Fault:
    """What goes wrong with the next `times` calls that match.

    Attributes:
        status: answered in place of the server, which hears nothing.
        cut: the connection is cut `before` the server hears, or `after` it has carried the call out.
        delay_seconds: before anything else.
        then: called with the call, when the connection is cut.
        nth: of a client's matching calls the first at which it happens.
    """

    who: str = ""  # a regular expression; empty: everybody
    method: str = ""
    path: str = ""
    body: str = ""
    times: int = 1
    status: int = 0
    text: str = ""
    headers: dict[str, str] = field(default_factory=dict)
    cut: str = ""
    delay_seconds: float = 0.0
    then: Callable[[Call], None] | None = None
    nth: int = 1
    hits: int = 0
    answered: int = 0  # of these, what the server has carried out, however late

    seen: Counter[str] = field(default_factory=Counter)  # matching calls by client

    def happens(self, call: Call) -> bool:
        """Whether it happens to this call, which counts."""
        if not self.matches(call):
            return False
        self.seen[call.who] += 1
        return self.seen[call.who] >= self.nth

    def matches(self, call: Call) -> bool:
        return (
            self.hits < self.times
            and bool(re.search(self.who, call.who))
            and bool(re.search(self.method, call.method))
            and bool(re.search(self.path, call.path))
            and (not self.body or bool(re.search(self.body.encode(), call.body)))
        )

    def __str__(self) -> str:
        effect = f"HTTP {self.status}" if self.status else f"cut {self.cut}" if self.cut else ""
        effect += f" {self.delay_seconds} s late" if self.delay_seconds else ""
        effect += " and a kill" if self.then else ""
        return f"{effect.strip()} for {self.times} of {self.who or '*'} {self.method or '*'} {self.path or '*'}"


class Proxy:
    """Before `upstream`; make it in the loop that it runs in."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.rstrip("/")
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=5),
        )
        self._runners: list[web.ServerRunner] = []
        self._open: dict[web.StreamResponse, tuple[Call, asyncio.Transport | None]] = {}
        self.faults: list[Fault] = []
        self.calls: list[Call] = []  # that came here
        self.failed: list[str] = []  # what met a fault, for the history
        self.refusing: set[str] = set()  # doors that are as good as unplugged

    async def door(self, who: str, identity: ssl.SSLContext | None = None) -> str:
        """A url that leads to the server; `identity`: what the API server takes the caller for."""

        async def serve(request: web.BaseRequest) -> web.StreamResponse:
            return await self._serve(who, identity, request)

        runner = web.ServerRunner(web.Server(serve, access_log=None, logger=_quiet), shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self._runners.append(runner)
        host, port = runner.addresses[0][:2]
        return f"http://{host}:{port}"

    async def close(self) -> None:
        for runner in self._runners:
            await runner.cleanup()
        await self._session.close()

    def fail(self, **what: Any) -> Fault:
        """Adds a fault."""
        fault = Fault(**what)
        self.faults.append(fault)
        return fault

    def heal(self) -> None:
        """All is well from now on."""
        self.faults.clear()
        self.refusing.clear()

    def cut(self, who: str = "") -> int:
        """Cuts the connections on which an answer is on its way (watches); how many."""
        cut = [transport for call, transport in self._open.values() if re.search(who, call.who)]
        for transport in cut:
            if transport is not None:
                transport.abort()
        return len(cut)

    async def expire(self, who: str = "") -> int:
        """Tells the watches that their resourceVersion is too old, as the API server does after a compaction."""
        status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
        line = json.dumps({"type": "ERROR", "object": status | {"message": "too old resource version"}}).encode()
        watches = [r for r, (call, _) in self._open.items() if call.is_watch and re.search(who, call.who)]
        for response in watches:
            with suppress(ConnectionError, RuntimeError):
                await response.write(line + b"\n")
        self.cut_responses(watches)
        return len(watches)

    def cut_responses(self, responses: list[web.StreamResponse]) -> None:
        """Ends these a moment later, when what was written has left."""
        for response in responses:
            transport = self._open.get(response, (None, None))[1]
            if transport is not None:
                transport.close()

    async def _serve(self, who: str, identity: ssl.SSLContext | None, request: web.BaseRequest) -> web.StreamResponse:
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport is not None:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")  # type: ignore[attr-defined]
        call = Call(who, request.method, request.raw_path, await request.read())
        self.calls.append(call)
        fault = next((fault for fault in self.faults if fault.happens(call)), None)
        if fault is not None:
            fault.hits += 1
            self.failed.append(f"{call}: {fault}")
            if fault.delay_seconds:
                await asyncio.sleep(fault.delay_seconds)
        if who in self.refusing:
            return self._abort(request)
        if fault and fault.cut == "before":
            return self._abort(request, fault, call)
        if fault and fault.status:
            return web.Response(status=fault.status, headers=fault.headers, text=fault.text or _STATUS % fault.status)
        headers = [(k, v) for k, v in request.headers.items() if k.lower() not in _HOP_BY_HOP]
        url = URL(self._upstream + request.raw_path, encoded=True)
        try:
            async with self._session.request(
                request.method,
                url,
                headers=headers,
                data=call.body or None,
                ssl=identity or True,
                allow_redirects=False,
            ) as answer:
                if fault:
                    fault.answered += 1
                if fault and fault.cut == "after":
                    return self._abort(request, fault, call)
                return await self._relay(call, request, answer)
        except aiohttp.ClientConnectionError:
            return self._abort(request)

    async def _relay(self, call: Call, request: web.BaseRequest, answer: aiohttp.ClientResponse) -> web.StreamResponse:
        response = web.StreamResponse(status=answer.status, reason=answer.reason)
        for key, value in answer.headers.items():
            if key.lower() not in _HOP_BY_HOP:
                response.headers.add(key, value)
        if "Content-Length" not in answer.headers and request.method != "HEAD":
            response.enable_chunked_encoding()
        self._open[response] = (call, request.transport)  # type: ignore[assignment]
        try:
            await response.prepare(request)
            async for chunk in answer.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
        except (ConnectionError, aiohttp.ClientError):
            return self._abort(request)
        finally:
            self._open.pop(response, None)
        return response

    @staticmethod
    def _abort(request: web.BaseRequest, fault: Fault | None = None, call: Call | None = None) -> web.StreamResponse:
        if fault and call and fault.then:
            fault.then(call)
        if request.transport is not None:
            request.transport.abort()  # type: ignore[attr-defined]
        return web.Response()


_STATUS = '{"kind":"Status","apiVersion":"v1","status":"Failure","code":%d,"reason":"InternalError","message":"no"}'
