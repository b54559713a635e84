"""What surrounds every call: its id, its line in the log, its body within bounds, and its errors as problems."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
import traceback
import uuid
from collections.abc import Callable, Coroutine, MutableMapping
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final

import aiohttp
from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from kubernetes.aio.client.exceptions import ApiException
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match
from starlette.routing import Route as AnyRoute
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from claas_operator.api import describe
from claas_operator.shim import problems
from claas_operator.shim.models import FieldProblem
from claas_operator.shim.problems import Problem

log = logging.getLogger(__name__)

BODY_SECONDS: Final = 30.0
MAX_DEPTH: Final = 64
MAX_DIGITS: Final = 20
MAX_INTEGER: Final = 2**63 - 1
MAX_EXACT: Final = 2**53  # to here a double holds every whole number
OPEN: Final = "open"  # tag of the routes that ask nobody who they are
LEFT: Final = 499  # in the log: the caller did not wait for the answer
_REQUEST_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"cache-control", b"no-store"),
    (b"referrer-policy", b"no-referrer"),
)


class CallerLeft(Exception):
    """Nobody waits for the answer any more."""


class Envelope:
    """The outermost middleware: request id, log line, and an answer whatever happens. Plain ASGI: a call that waits
    costs no task of ours."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One call."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        state: MutableMapping[str, Any] = scope.setdefault("state", {})
        state["request_id"] = request_id
        state.setdefault("asked_at", datetime.now(UTC))  # the server knows it better
        started, status = time.perf_counter(), 0

        async def tell(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    (b"x-request-id", request_id.encode()),
                    *(pair for pair in _HEADERS if pair[0] not in own),
                ]
            await send(message)

        try:
            await self._app(scope, receive, tell)
        except (CallerLeft, ClientDisconnect):
            if not status:
                await Response(status_code=LEFT)(scope, receive, tell)
        except Exception as error:  # noqa: BLE001 (the last resort; the error's words may quote a body, so its place alone)
            log.error("unexpected error", extra={"request_id": request_id, "error": place(error)})
            if status:
                raise ConnectionResetError from None  # the answer has begun: break it off
            problem = Problem(problems.INTERNAL, "the call met an error of ours")
            await problem.answer(request_id)(scope, receive, tell)
        finally:
            route = scope.get("route")
            log.info(
                "call",
                extra={
                    "request_id": request_id,
                    "method": scope["method"],
                    "route": getattr(route, "path", "none"),
                    "status": status,
                    "ms": round((time.perf_counter() - started) * 1000, 1),
                    "namespace": state.get("namespace", ""),
                    "object": state.get("object", ""),
                },
            )


def place(error: BaseException) -> str:
    """`ValueError at spec.py:93 in trim`: where it was raised, in our own code if it passed there; no message."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if any(part.startswith("claas_") for part in Path(frame.filename).parts)]
    if not frames:
        return type(error).__name__
    frame = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} in {frame.name}"


class JsonRequest(Request):
    """A request whose body is read within bounds, and is JSON that every reader reads alike."""

    max_bytes = 0

    async def body(self) -> bytes:
        """The body.

        Raises:
            Problem: not JSON by its type (415), too large (413), too slow (408).
        """
        if not hasattr(self, "_body"):
            self._body = await self._read()
        return self._body

    async def _read(self) -> bytes:
        self._check_headers()
        chunks, size = [], 0
        try:
            async with asyncio.timeout(BODY_SECONDS):
                async for chunk in self.stream():
                    size += len(chunk)
                    if size > self.max_bytes:
                        raise self._too_large()
                    chunks.append(chunk)
        except TimeoutError:
            raise Problem(problems.TIMEOUT, f"the body was not there after {BODY_SECONDS:.0f} s") from None
        return b"".join(chunks)

    def _check_headers(self) -> None:
        length = self.headers.get("content-length", "")
        if length.isdigit() and int(length) > self.max_bytes:
            raise self._too_large()
        if length == "0":
            return  # no body at all: which field is missing says more
        kind = self.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Problem(problems.MEDIA, "Content-Type must be application/json")
        if self.headers.get("content-encoding", "identity").lower() != "identity":
            raise Problem(problems.MEDIA, "Content-Encoding: a compressed body is not read", fix="send it as it is")

    def _too_large(self) -> Problem:
        return Problem(problems.TOO_LARGE, f"a body has at most {self.max_bytes} bytes")

    async def json(self) -> Any:
        """The body as JSON.

        Raises:
            Problem: it is none, or a reader could read something else from it.
        """
        return parse_json(await self.body())


def parse_json(data: bytes) -> Any:
    """JSON as RFC 8259 has it: UTF-8, no NaN, every name once, numbers that a double holds, bounded depth.

    Raises:
        Problem: 400; it is not. The position is told, the content is not.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Problem(problems.MALFORMED, f"the body is not UTF-8 (byte {error.start})") from None
    try:
        value = json.loads(
            text,
            parse_constant=_no_constant,
            parse_float=_number,
            parse_int=_integer,
            object_pairs_hook=_unique,
        )
    except json.JSONDecodeError as error:
        raise Problem(problems.MALFORMED, f"the body is not JSON (character {error.pos})") from None
    except RecursionError:
        raise _too_deep() from None
    if _depth(value) > MAX_DEPTH:
        raise _too_deep()
    if "\\u" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise Problem(problems.MALFORMED, "the body holds half of a surrogate pair (\\ud800 to \\udfff)") from None
    return value


def _no_constant(_: str) -> Any:
    raise Problem(problems.MALFORMED, "NaN and Infinity are not JSON")


def _number(text: str) -> int | float:
    """What a double holds; whole where it is: JSON has one kind of number, and 16.0 is 16."""
    value = float(text)
    if value in (float("inf"), float("-inf")):
        raise Problem(problems.MALFORMED, "a number is too large for a double")
    return int(value) if value.is_integer() and abs(value) <= MAX_EXACT else value


def _integer(text: str) -> int | float:
    """As it is where 64 bits hold it, else what a double makes of it, as the API server has it."""
    value = int(text) if len(text) <= MAX_DIGITS else MAX_INTEGER + 1
    return value if abs(value) <= MAX_INTEGER else _number(text)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise Problem(problems.MALFORMED, "an object has a name twice")
    return found


def _too_deep() -> Problem:
    return Problem(problems.MALFORMED, f"the body nests deeper than {MAX_DEPTH} levels")


def _depth(value: Any) -> int:
    """Levels of containers, without recursion."""
    depth, level = 0, [value]
    while level:
        level = [
            child
            for parent in level
            for child in (parent.values() if isinstance(parent, dict) else parent if isinstance(parent, list) else ())
            if isinstance(child, dict | list)
        ]
        depth += 1
    return depth


Handler = Callable[[Request], Coroutine[Any, Any, Response]]


class Route(APIRoute):
    """A route that knows its caller before it reads anything of the body. Those with the tag OPEN ask nobody."""

    def get_route_handler(self) -> Handler:
        """FastAPI's handler, behind ours."""
        inner = super().get_route_handler()
        known = {parameter.alias for dependant in _dependants(self.dependant) for parameter in dependant.query_params}

        async def handle(request: Request) -> Response:
            door = request.app.state.door
            if OPEN not in self.tags:
                await door.admit(request)
            if strange := sorted(set(request.query_params) - known):
                shown = ", ".join(sorted(known)) or "none"
                raise problems.invalid(strange[0][:64], f"is no parameter of this route; there are: {shown}")
            bounded = JsonRequest(request.scope, request.receive)
            bounded.max_bytes = door.settings.limits.max_body_bytes
            return await inner(bounded)

        return handle


def _dependants(dependant: Any) -> list[Any]:
    return [dependant, *(found for child in dependant.dependencies for found in _dependants(child))]


def install_handlers(app: FastAPI) -> None:
    """Every error that a route or FastAPI raises becomes a problem."""

    def answer(request: Request, problem: Problem) -> Response:
        return problem.answer(request.state.request_id)

    async def on_problem(request: Request, error: Exception) -> Response:
        assert isinstance(error, Problem)
        return answer(request, error)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return answer(request, problems.of_validation(error.errors()))

    async def on_http(request: Request, error: Exception) -> Response:
        assert isinstance(error, StarletteHTTPException)
        if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
            response = answer(request, Problem(problems.METHOD, f"{request.method} is not a method of this route"))
            response.headers["Allow"] = ", ".join(_methods(app, request))
            return response
        if error.status_code == HTTPStatus.NOT_FOUND:
            return answer(request, Problem(problems.NOT_FOUND, "there is no such route", fix="see GET /docs"))
        return answer(request, Problem(problems.MALFORMED, "the request cannot be read"))

    async def on_api(request: Request, error: Exception) -> Response:
        problem = of_api(error)
        if problem.kind is problems.UNAVAILABLE:
            log.warning("api server", extra={"request_id": request.state.request_id, "error": describe(error)})
        return answer(request, problem)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(StarletteHTTPException, on_http)
    for failure in (ApiException, aiohttp.ClientError, TimeoutError, OSError):
        app.add_exception_handler(failure, on_api)


def _methods(app: FastAPI, request: Request) -> list[str]:
    """What may be done at this path; Starlette's own header knows the first of its routes alone."""
    routes = (r for r in app.routes if isinstance(r, AnyRoute) and r.matches(request.scope)[0] is not Match.NONE)
    return sorted({method for route in routes for method in route.methods or ()})


def of_api(error: Exception) -> Problem:
    """What the API server's failure means to a caller. What it said is theirs to read only where they caused it."""
    status = error.status if isinstance(error, ApiException) else None
    if status == HTTPStatus.GONE:
        return Problem(problems.EXPIRED, "`continue` is too old")
    if status in (HTTPStatus.BAD_REQUEST, HTTPStatus.UNPROCESSABLE_ENTITY):
        errors = [
            FieldProblem(field=cause.get("field", "body")[:200], detail=cause.get("message", "")[:1000])
            for cause in _causes(error)
        ]
        return Problem(problems.INVALID, "the API server does not accept it", errors=errors)
    if status == HTTPStatus.NOT_FOUND:
        return Problem(problems.NOT_FOUND, "it is gone by now")
    if status == HTTPStatus.CONFLICT:
        return Problem(problems.CONFLICT, "it has changed meanwhile", fix="look at it, and ask again")
    if status == HTTPStatus.FORBIDDEN:
        said = str(_status(error).get("message"))
        if "exceeded quota" in said:
            return Problem(problems.QUOTA, "the namespace has as many objects as it may", retry_seconds=60)
        if "being terminated" in said:
            return Problem(problems.CONFLICT, "the namespace is being deleted", fix="choose another")
        if "cannot" not in said:  # what RBAC says of ourselves
            return Problem(problems.FORBIDDEN, "a policy of the cluster refuses it")
    return Problem(problems.UNAVAILABLE, "the Kubernetes API server does not answer as it should")


def _status(error: Exception) -> dict[str, Any]:
    try:
        found = json.loads(getattr(error, "body", None) or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _causes(error: Exception) -> list[dict[str, str]]:
    return list((_status(error).get("details") or {}).get("causes") or [])[:20]
