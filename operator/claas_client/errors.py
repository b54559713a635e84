"""What a call can raise. An answer that is a problem document (RFC 9457) becomes the class of its status.

ClaasError
├── ProblemError            the server refused: type, title, status, detail, fix, field, reason, request_id
│   ├── BadRequest          400, 405, 413, 415, 422: `field` says where
│   ├── Unauthorized        401
│   ├── Forbidden           403
│   ├── NotFound            404
│   ├── Conflict            409: the key was used with another body, the name is taken, …
│   ├── TooManyRequests     429: `retry_after` seconds
│   ├── ServerProblem       5xx
│   └── RequestFailed       a request or an adapter was accepted, and has ended without a step or a version: `reason`
├── WaitTimeout             the wait has ended, the request goes on: `request_id`
├── ConnectionFailed        no answer, after all tries
└── AnswerInvalid           an answer that no CLaaS server gives
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Final

from pydantic import ValidationError

from claas_client.models import FieldProblem, Request

if TYPE_CHECKING:
    import httpx

REQUEST_ID_HEADER: Final = "X-Request-Id"
MAX_TEXT: Final = 2000


class ClaasError(Exception):
    """Base of all."""


class ConnectionFailed(ClaasError):
    """No answer, after all tries; the cause is the last one's error.

    Attributes:
        idempotency_key: of a call that may or may not have arrived. Sent again with it, it happens once.
    """

    def __init__(self, message: str, *, idempotency_key: str = "") -> None:
        super().__init__(message)
        self.idempotency_key = idempotency_key


class AnswerInvalid(ClaasError):
    """An answer that no CLaaS server gives: is the url right?"""


class WaitTimeout(ClaasError):
    """The wait has ended before what was waited for. That goes on: wait again, or cancel it.

    Attributes:
        request_id: of the request; of an adapter, its name or uri.
    """

    def __init__(self, request_id: str, timeout_s: float) -> None:
        super().__init__(f"{request_id} has not ended within {timeout_s:g} s; it goes on")
        self.request_id = request_id


class ProblemError(ClaasError):
    """The server's refusal.

    Attributes:
        status: the HTTP status.
        title: the kind of problem in a few words.
        detail: what is wrong this time. Never quotes what was sent.
        type: uri of the kind of problem.
        fix: what to do about it.
        field: path of the first field at fault, such as `training.learning_rate`; empty when it is about none.
        errors: all fields at fault.
        reason: where a request or an adapter failed, its reason, such as ResponseTooLong.
        instance: the request or adapter that it is about.
        request_id: what the server's log calls this call (X-Request-Id).
        retry_after: seconds after which the server would be asked again.
    """

    def __init__(
        self,
        status: int,
        title: str,
        detail: str = "",
        *,
        type: str = "about:blank",
        fix: str = "",
        errors: Sequence[FieldProblem] = (),
        reason: str = "",
        instance: str = "",
        request_id: str = "",
        retry_after: float | None = None,
    ) -> None:
        first = errors[0] if errors else None
        said = f"{first.field}: {first.detail}" if first else detail or title
        super().__init__(said + (f" ({fix})" if fix and fix != said else ""))
        self.status, self.title, self.detail, self.type, self.fix = status, title, detail, type, fix
        self.errors, self.field = tuple(errors), first.field if first else ""
        self.reason, self.instance = reason, instance
        self.request_id, self.retry_after = request_id, retry_after


class BadRequest(ProblemError):
    """The call cannot be served as it is; `field` says where."""


class Unauthorized(ProblemError):
    """No token or key, or one that is not valid (any more)."""


class Forbidden(ProblemError):
    """The token or key is valid, and may not do this."""


class NotFound(ProblemError):
    """No such thing, or not for this token or key."""


class Conflict(ProblemError):
    """It contradicts what is there: an idempotency key with another body, a name that is taken."""


class TooManyRequests(ProblemError):
    """A limit of this tenant; `retry_after` says for how many seconds."""


class ServerProblem(ProblemError):
    """The server, or what it depends on, failed."""


class RequestFailed(ProblemError):
    """What was asked for was accepted, and has ended without success: `reason` says why, in one word of the API.

    Attributes:
        request: as it ended, where the client has seen it.
    """

    request: Request | None = None

    @classmethod
    def of(cls, request: Request) -> RequestFailed:
        """From a request that was seen to have ended; there is no HTTP status then (0)."""
        detail = f"request {request.id} {request.state.lower()}: {request.reason}: {request.message}"
        made = cls(0, f"The request has {request.state.lower()}", detail, reason=request.reason, instance=request.id)
        made.request = request
        return made


_CLASSES: Final[Mapping[int, type[ProblemError]]] = {
    401: Unauthorized,
    403: Forbidden,
    404: NotFound,
    409: Conflict,
    429: TooManyRequests,
}


def problem_from(response: httpx.Response, retry_after: float | None = None) -> ProblemError:
    """The exception for a response that is not a success, whatever its body is. The body must have been read."""
    status, document = response.status_code, _document(response)
    reason = _text(document, "reason")
    kind = _CLASSES.get(status, ServerProblem if status >= 500 else BadRequest)
    if reason and _text(document, "instance"):
        kind = RequestFailed
    return kind(
        status,
        _text(document, "title") or response.reason_phrase or f"HTTP {status}",
        _text(document, "detail"),
        type=_text(document, "type") or "about:blank",
        fix=_text(document, "fix"),
        errors=_errors(document),
        reason=reason,
        instance=_text(document, "instance"),
        request_id=response.headers.get(REQUEST_ID_HEADER, ""),
        retry_after=retry_after,
    )


def _document(response: httpx.Response) -> Mapping[str, Any]:
    if "json" not in response.headers.get("content-type", ""):
        return {}
    try:
        found = json.loads(response.content)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _text(document: Mapping[str, Any], name: str) -> str:
    value = document.get(name)
    return value[:MAX_TEXT] if isinstance(value, str) else ""


def _errors(document: Mapping[str, Any]) -> list[FieldProblem]:
    found = document.get("errors")
    try:
        return [FieldProblem.model_validate(item) for item in found] if isinstance(found, list) else []
    except ValidationError:
        return []
