"""Every call of the API, as flows (see `flow`): paths, bodies, tries, waits and what the answers mean.

A call is tried again (429, 502, 503, 504, connection loss) only where a second sending cannot do a second thing: reads,
cancellations, rollbacks and inits, which say what shall be; and distills because each carries an idempotency key, made
here unless the caller has one. Waiting is done in long polls of WAIT_SECONDS, so no proxy sees an idle connection.
"""

from __future__ import annotations

import json
import math
import secrets
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, TypeVar, Unpack
from urllib.parse import quote

import httpx
from pydantic import BaseModel, ValidationError

from claas_client.errors import AnswerInvalid, ConnectionFailed, RequestFailed, WaitTimeout, problem_from
from claas_client.flow import Close, Emit, Flow, Line, Pause, Read, Send, Stream
from claas_client.models import (
    Adapter,
    Caller,
    DistillBody,
    Distilled,
    Event,
    Health,
    Initialised,
    InitOptions,
    Item,
    Lineage,
    LiteBody,
    Numbers,
    Page,
    ReasonMeaning,
    Request,
    Version,
)
from claas_client.retry import NOT_SENT, RETRIED_STATUS, Retries, retry_after_seconds
from claas_client.sse import Decoder

WAIT_SECONDS: Final = 25.0  # of one long poll
ANSWER_SECONDS: Final = 15.0  # a server may take to answer, beyond the wait that it was asked for
SILENCE_SECONDS: Final = 60.0  # of a stream of events; the server sends a comment more often
CONNECT_SECONDS: Final = 5.0
PAGE_SIZE: Final = 100
KEY_HEADER: Final = "Idempotency-Key"
NAMESPACE_HEADER: Final = "Claas-Namespace"

Body = Mapping[str, Any]
Query = Mapping[str, str | int | float | None]
M = TypeVar("M", bound=BaseModel)


@dataclass(frozen=True)
class Ticket:
    """A request that was accepted. `request` is as it was then."""

    id: str
    request: Request


class Calls:
    """The calls at one url by one caller.

    Args:
        credential: asked before each try, so that a token may rotate; gives the bearer token, or an empty text.
        timeout_s: of a call that waits for nothing, with all its tries.
    """

    def __init__(
        self, url: str, credential: Callable[[], str], namespace: str | None, timeout_s: float, retries: Retries
    ) -> None:
        parsed = httpx.URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host or parsed.query or parsed.fragment:
            raise ValueError(f"{url!r} is not the url of a server: https://HOST[:PORT][/PATH]")
        self.url = str(parsed).rstrip("/")
        self._credential, self._timeout_s, self._retries = credential, timeout_s, retries
        self._headers = {"Accept": "application/json", "User-Agent": "claas-client"}
        if namespace:
            self._headers[NAMESPACE_HEADER] = namespace

    # Teaching

    def distill(
        self, *, timeout: float | None = 600.0, idempotency_key: str | None = None, **body: Unpack[DistillBody]
    ) -> Flow[Distilled]:
        """Feedback becomes one training step; returns when it is done.

        Args:
            timeout: seconds to wait for it; None: for ever. The request goes on beyond it.
            idempotency_key: the same key and body again is the same request, however often it is sent.
            body: `lora_uri` or `adapter`; `prompt` (or `messages`) and `response`, or `samples`; see DistillBody.

        Raises:
            RequestFailed: accepted, and ended without a step.
            WaitTimeout: it goes on.
            ProblemError: refused; `field` says where.
            ConnectionFailed: no answer; with `idempotency_key`, of which the same call may be sent again.
        """
        return (yield from self._distill("/v1/distill", body, timeout, idempotency_key))

    def distill_lite(
        self, *, timeout: float | None = 600.0, idempotency_key: str | None = None, **body: Unpack[LiteBody]
    ) -> Flow[Distilled]:
        """As `distill`, with log-probabilities by a teacher of your own (`teacher_logprobs`)."""
        return (yield from self._distill("/v1/distill/lite", body, timeout, idempotency_key))

    def submit(self, *, idempotency_key: str | None = None, **body: Unpack[DistillBody]) -> Flow[Ticket]:
        """As `distill`, and returns as soon as it is accepted."""
        return (yield from self._submit("/v1/distill", body, idempotency_key))

    def submit_lite(self, *, idempotency_key: str | None = None, **body: Unpack[LiteBody]) -> Flow[Ticket]:
        """As `distill_lite`, and returns as soon as it is accepted."""
        return (yield from self._submit("/v1/distill/lite", body, idempotency_key))

    def init_lora(
        self, output_uri: str, *, timeout: float | None = 600.0, **options: Unpack[InitOptions]
    ) -> Flow[Initialised]:
        """A new adapter at `output_uri`, without effect until it is trained (or from `init_from`: a fork).

        The same call again is the same adapter.

        Raises:
            RequestFailed: it could not be created; WaitTimeout, ProblemError, ConnectionFailed: as `distill`.
        """
        body = {"output_uri": output_uri, **options}
        response = yield from self._post_until_done("/v1/lora/init", body, timeout, output_uri)
        return _parse(Initialised, response)

    # Requests

    def request(self, id: str) -> Flow[Request]:
        """The request as it is now."""
        return _parse(Request, (yield from self._get(f"/v1/requests/{_segment(id)}")))

    def requests(self, *, adapter: str | None = None) -> Stream[Request]:
        """All requests of the namespace, or those of one adapter, page by page."""
        yield from self._pages(Page[Request], "/v1/requests", lambda found: adapter in (None, found.adapter))

    def wait(self, id: str, *, timeout: float | None = None) -> Flow[Distilled]:
        """Waits for the request's end.

        Raises:
            RequestFailed: it ended without a step.
            WaitTimeout: it has not ended after `timeout` seconds.
        """
        deadline = _deadline(timeout)
        while True:
            left = deadline - time.monotonic()
            polled = max(0.0, min(WAIT_SECONDS, left))
            response = yield from self._get(f"/v1/requests/{_segment(id)}", {"wait": _seconds(polled)}, polled)
            request = _parse(Request, response)
            if request.ended:
                return outcome(request)
            if time.monotonic() >= deadline:
                raise WaitTimeout(id, timeout or 0.0)

    def cancel(self, id: str) -> Flow[Request]:
        """Asks to stop it: loses to a step that is done already."""
        return _parse(Request, (yield from self._checked("DELETE", f"/v1/requests/{_segment(id)}")))

    def events(self, id: str, *, timeout: float | None = None) -> Stream[Event]:
        """Every change of the request, beginning with how it is now, until it has ended. Reconnects by itself.

        Raises:
            WaitTimeout: it has not ended after `timeout` seconds.
        """
        decoder, seen, tried, deadline = Decoder(), None, 0, _deadline(timeout)
        while True:
            silence = max(0.001, min(SILENCE_SECONDS, deadline - time.monotonic()))
            response = yield from self._open_stream(f"/v1/requests/{_segment(id)}/events", decoder.last_id, silence)
            problem = "the stream has ended before the request"
            try:
                while (line := (yield Line(response))) is not None:
                    found = decoder.feed(line)
                    if found is not None:
                        tried, event = 0, Event(type=found.type, request=_parse_text(Request, found.data, response))
                        if event != seen:
                            yield Emit(event)
                        seen = event
                        if event.request.ended:
                            yield Close(response)
                            return
                    if deadline - time.monotonic() < silence - 1:
                        problem = ""  # this connection would wait through a silence that outlasts the deadline
                        break
            except httpx.TransportError as error:
                problem = type(error).__name__
            yield Close(response)
            if time.monotonic() >= deadline:
                raise WaitTimeout(id, timeout or 0.0)
            if not problem:
                continue
            tried += 1
            pause = self._retries.pause(tried, decoder.retry_seconds, math.inf)
            if pause is None:
                raise ConnectionFailed(f"{self.url}: {problem}, given up after {tried} tries")
            yield Pause(pause)

    # Adapters

    def adapters(self) -> Stream[Adapter]:
        """All adapters of the namespace, page by page."""
        yield from self._pages(Page[Adapter], "/v1/adapters")

    def adapter(self, name: str) -> Flow[Adapter]:
        """The adapter and its head."""
        return _parse(Adapter, (yield from self._get(f"/v1/adapters/{_segment(name)}")))

    def versions(self, name: str) -> Stream[Version]:
        """How its head moved, newest first, page by page."""
        yield from self._pages(Page[Version], f"/v1/adapters/{_segment(name)}/versions")

    def lineage(self, name: str, *, version: str | None = None) -> Flow[Lineage]:
        """A version (the head, unless one is named) and its ancestors, each trained on the next."""
        return _parse(Lineage, (yield from self._get(f"/v1/adapters/{_segment(name)}/lineage", {"version": version})))

    def rollback(self, name: str, version: str, *, timeout: float | None = 60.0) -> Flow[Adapter]:
        """Makes an old version the head again, and returns when it is."""
        path = f"/v1/adapters/{_segment(name)}/rollback"
        return _parse(Adapter, (yield from self._post_until_done(path, {"version": version}, timeout, name)))

    # The installation

    def health(self) -> Flow[Health]:
        """Each part's state; an installation that would let a request wait is an answer too, not an error."""
        deadline = _deadline(self._timeout_s)
        response = yield from self._call("GET", "/v1/health", deadline=deadline, final=frozenset({503}))
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE:
            try:
                return _parse(Health, response)
            except AnswerInvalid:
                raise problem_from(response) from None
        return _parse(Health, self._good(response))

    def whoami(self) -> Flow[Caller]:
        """Whom the server takes us for: namespace, storage prefixes, limits."""
        return _parse(Caller, (yield from self._get("/v1/whoami")))

    def reasons(self) -> Flow[list[ReasonMeaning]]:
        """Every reason that a request or an adapter may show, and what it means."""
        return _parse(Page[ReasonMeaning], (yield from self._get("/v1/reasons"))).items

    # What they are made of

    def _distill(self, path: str, body: Body, timeout: float | None, key: str | None) -> Flow[Distilled]:
        deadline = _deadline(timeout)
        polled = max(0.0, min(WAIT_SECONDS, deadline - time.monotonic()))
        response = yield from self._post(path, body, polled, key or new_key())
        if response.status_code != httpx.codes.ACCEPTED:
            return _parse(Distilled, response)
        id = _parse(Request, response).id
        left = deadline - time.monotonic()
        if left <= 0:
            raise WaitTimeout(id, timeout or 0.0)
        return (yield from self.wait(id, timeout=None if timeout is None else left))

    def _submit(self, path: str, body: Body, key: str | None) -> Flow[Ticket]:
        response = yield from self._post(path, body, 0.0, key or new_key())
        if response.status_code == httpx.codes.ACCEPTED:
            request = _parse(Request, response)
        else:  # the key's request has ended long ago
            where = httpx.URL(response.headers.get("Content-Location", ""))
            request = yield from self.request(where.path.rpartition("/")[2])
        return Ticket(request.id, request)

    def _post_until_done(self, path: str, body: Body, timeout: float | None, what: str) -> Flow[httpx.Response]:
        """For what is the same however often it is sent: 202 means that it is under way, and it is sent again."""
        deadline, tried = _deadline(timeout), 0
        while True:
            polled = max(0.0, min(WAIT_SECONDS, deadline - time.monotonic()))
            response = yield from self._post(path, body, polled, None, safe=True)
            if response.status_code != httpx.codes.ACCEPTED:
                return response
            left = deadline - time.monotonic()
            if left <= 0:
                raise WaitTimeout(what, timeout or 0.0)
            tried += 1
            # A server that has waited needs no pause; one that does not wait is not to be asked without end.
            yield Pause(min(left, 0.1 * min(tried, 20)))

    def _post(
        self, path: str, body: Body, wait_s: float, key: str | None, *, safe: bool = False
    ) -> Flow[httpx.Response]:
        headers = {KEY_HEADER: key} if key else {}
        response = yield from self._call(
            "POST",
            path,
            query={"wait": _seconds(wait_s)},
            body=body,
            headers=headers,
            deadline=_deadline(self._timeout_s + wait_s),
            silence_s=wait_s + ANSWER_SECONDS,
            safe=safe or key is not None,
        )
        return self._good(response)

    def _get(self, path: str, query: Query | None = None, wait_s: float = 0.0) -> Flow[httpx.Response]:
        deadline = _deadline(self._timeout_s + wait_s)
        silence_s = wait_s + ANSWER_SECONDS
        return self._good((yield from self._call("GET", path, query=query, deadline=deadline, silence_s=silence_s)))

    def _checked(self, method: str, path: str) -> Flow[httpx.Response]:
        return self._good((yield from self._call(method, path, deadline=_deadline(self._timeout_s))))

    def _pages(
        self, page_of: type[Page[Item]], path: str, wanted: Callable[[Item], bool] = lambda _: True
    ) -> Stream[Item]:
        following: str | None = None
        while True:
            page = _parse(page_of, (yield from self._get(path, {"limit": PAGE_SIZE, "continue": following})))
            for item in page.items:
                if wanted(item):
                    yield Emit(item)
            following = page.following
            if not following:
                return

    def _open_stream(self, path: str, last_id: str, silence_s: float) -> Flow[httpx.Response]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": last_id} if last_id else {})
        response = yield from self._call(
            "GET", path, headers=headers, deadline=_deadline(self._timeout_s), silence_s=silence_s, stream=True
        )
        if response.is_success and "text/event-stream" in response.headers.get("content-type", ""):
            return response
        if response.is_success:
            yield Close(response)
            raise AnswerInvalid(f"{self.url}{path}: no stream of events; is the url right?")
        yield Read(response)
        yield Close(response)
        raise problem_from(response)

    def _call(
        self,
        method: str,
        path: str,
        *,
        deadline: float,
        query: Query | None = None,
        body: Body | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float = ANSWER_SECONDS,
        safe: bool = True,
        stream: bool = False,
        final: frozenset[int] = frozenset(),
    ) -> Flow[httpx.Response]:
        """One call over as many tries as it takes; the last answer, whatever it says.

        Args:
            deadline: monotonic, of all tries together.
            silence_s: the server may stay silent for so long.
            safe: a second sending does nothing more than the first.
            final: statuses that are answers, not failures.
        """
        content = None if body is None else _encoded(body)
        tried = 0
        while True:
            tried += 1
            request = self._build(method, path, query, content, headers or {}, silence_s, deadline)
            asked: float | None = None
            failure: httpx.TransportError | None = None
            response: httpx.Response | None = None
            try:
                response = yield Send(request, stream)
            except httpx.TransportError as error:
                failure = error
                again = safe or isinstance(error, NOT_SENT)
            else:
                assert response is not None
                if response.status_code not in RETRIED_STATUS - final:
                    return response
                if stream:
                    yield Read(response)
                    yield Close(response)
                asked = retry_after_seconds(response.headers.get("Retry-After"))
                refused_unseen = response.status_code == httpx.codes.TOO_MANY_REQUESTS
                # What has failed for good says so with its reason: the same key would fetch the same failure.
                again = (safe or refused_unseen) and not isinstance(problem_from(response), RequestFailed)
            pause = self._retries.pause(tried, asked, deadline - time.monotonic()) if again else None
            if pause is None:
                if response is not None:
                    return response
                problem = type(failure).__name__
                key = (headers or {}).get(KEY_HEADER, "")
                said = f"{method} {self.url}{path}: {problem}, given up after {tried} tries"
                raise ConnectionFailed(said, idempotency_key=key) from failure
            yield Pause(pause)

    def _build(
        self,
        method: str,
        path: str,
        query: Query | None,
        content: bytes | None,
        headers: Mapping[str, str],
        silence_s: float,
        deadline: float,
    ) -> httpx.Request:
        left = max(deadline - time.monotonic(), 0.001)
        timeout = httpx.Timeout(
            connect=min(CONNECT_SECONDS, left), read=silence_s, write=min(silence_s, left), pool=left
        )
        whole = {**self._headers, **headers}
        if content is not None:
            whole["Content-Type"] = "application/json"
        if credential := self._credential():
            whole["Authorization"] = f"Bearer {credential}"
        return httpx.Request(
            method,
            self.url + path,
            params={name: str(value) for name, value in (query or {}).items() if value is not None} or None,
            content=content,
            headers=whole,
            extensions={"timeout": timeout.as_dict()},
        )

    def _good(self, response: httpx.Response) -> httpx.Response:
        if response.is_success:
            return response
        if response.is_redirect:
            where = response.headers.get("location", "")
            raise AnswerInvalid(f"{self.url} redirects to {where}: give that url, redirects are not followed")
        raise problem_from(response, retry_after_seconds(response.headers.get("Retry-After")))


def new_key() -> str:
    """An idempotency key that nobody else has."""
    return f"auto-{secrets.token_hex(16)}"


def outcome(request: Request) -> Distilled:
    """What a request that has ended has brought.

    Raises:
        RequestFailed: no step.
        AnswerInvalid: it says that it is Complete, and not with which version or numbers.
    """
    if request.state != "Complete":
        raise RequestFailed.of(request)
    if request.lora_uri is None:
        raise AnswerInvalid(f"request {request.id} is Complete without a version")
    if request.metadata is None and request.reason != "NoSignal":
        raise AnswerInvalid(f"request {request.id} is Complete with {request.lora_uri}, and its numbers were lost")
    numbers = _NOTHING_LEARNT if request.metadata is None else request.metadata.model_dump()
    return Distilled(lora_uri=request.lora_uri, metadata=Numbers.model_validate(numbers))


# Student and teacher agreed: every term is zero and every ratio one. The server answers the same.
_NOTHING_LEARNT: Final = dict.fromkeys(Numbers.model_fields, 0) | {"mean_is_ratio": 1.0}


def _encoded(body: Body) -> bytes:
    """As JSON; absent and None are the same.

    Raises:
        ValueError: NaN or infinity, which JSON does not have.
    """
    given = {name: value for name, value in body.items() if value is not None}
    return json.dumps(given, allow_nan=False, ensure_ascii=False, separators=(",", ":")).encode()


def _parse(model: type[M], response: httpx.Response) -> M:
    return _parse_text(model, response.content, response)


def _parse_text(model: type[M], text: bytes | str, response: httpx.Response) -> M:
    try:
        return model.model_validate_json(text)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) or "the whole" for problem in error.errors()[:3])
        where = f"{response.request.url.copy_with(query=None)}"
        raise AnswerInvalid(f"{where}: not an answer of CLaaS ({fields}); is the url right?") from None


def _segment(name: str) -> str:
    """A name as one segment of a path: `.` and `..` would be another path.

    Raises:
        ValueError: it is empty, `.` or `..`.
    """
    if name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not a name")
    return quote(name, safe="")


def _seconds(seconds: float) -> str:
    return f"{seconds:.3f}".rstrip("0").rstrip(".")


def _deadline(timeout: float | None) -> float:
    return math.inf if timeout is None else time.monotonic() + timeout
