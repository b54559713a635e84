"""Every error that the API answers, as one table of kinds and one of reasons (RFC 9457).

A problem names the field and the fix, and never quotes the input, nor says anything of another tenant: what is not
there and what is not yours are told alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any, Final

from fastapi import HTTPException
from fastapi.responses import JSONResponse

from claas_crds.reasons import Reason, describe
from claas_operator.shim.models import FieldProblem
from claas_operator.shim.models import Problem as ProblemBody

MEDIA_TYPE: Final = "application/problem+json"
RETRY_SECONDS: Final = 5


@dataclass(frozen=True)
class Kind:
    """One kind of error: the end of its `type`, its status and its title."""

    slug: str
    status: HTTPStatus
    title: str
    fix: str


MALFORMED = Kind("malformed", HTTPStatus.BAD_REQUEST, "The body cannot be read", "send one JSON object in UTF-8")
UNAUTHENTICATED = Kind(
    "unauthenticated", HTTPStatus.UNAUTHORIZED, "Nobody known", "send `Authorization: Bearer TOKEN` with a valid token"
)
FORBIDDEN = Kind("forbidden", HTTPStatus.FORBIDDEN, "Not permitted", "ask whoever runs the cluster for the right")
OUTSIDE = Kind(
    "outside-prefixes", HTTPStatus.FORBIDDEN, "The uri is not the namespace's", "choose a uri below one of the prefixes"
)
NOT_FOUND = Kind("not-found", HTTPStatus.NOT_FOUND, "No such thing here", "list what there is, or name the namespace")
METHOD = Kind("method", HTTPStatus.METHOD_NOT_ALLOWED, "The route has no such method", "see GET /docs")
TIMEOUT = Kind("body-timeout", HTTPStatus.REQUEST_TIMEOUT, "The body did not arrive", "send it at once, and again")
CONFLICT = Kind("conflict", HTTPStatus.CONFLICT, "It exists already, and differs", "choose another name, key or uri")
EXPIRED = Kind("expired", HTTPStatus.GONE, "The list has moved on", "start again without `continue`")
TOO_LARGE = Kind(
    "too-large", HTTPStatus.REQUEST_ENTITY_TOO_LARGE, "The body is too large", "send fewer or shorter samples"
)
MEDIA = Kind(
    "media-type", HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "Not JSON", "send `Content-Type: application/json` and a JSON body"
)
INVALID = Kind("invalid", HTTPStatus.UNPROCESSABLE_ENTITY, "A value is not accepted", "correct the fields in `errors`")
RATE = Kind("rate", HTTPStatus.TOO_MANY_REQUESTS, "Too many calls", "wait as long as Retry-After says")
QUOTA = Kind(
    "quota",
    HTTPStatus.TOO_MANY_REQUESTS,
    "The namespace's quota is used up",
    "wait for requests to end, or ask for more",
)
INTERNAL = Kind("internal", HTTPStatus.INTERNAL_SERVER_ERROR, "An error of ours", "try again; quote the request_id")
UNAVAILABLE = Kind("unavailable", HTTPStatus.SERVICE_UNAVAILABLE, "A part does not answer", "try again in a moment")
FAILED: Final = "failed"  # of the kinds below, one a reason

# A request that failed, or an adapter that could not be made: what its caller is told. Not listed: 500.
STATUSES: Final[Mapping[str, HTTPStatus]] = {
    Reason.CANCELLED: HTTPStatus.CONFLICT,
    Reason.VERSION_CONFLICT: HTTPStatus.CONFLICT,
    Reason.ADAPTER_GONE: HTTPStatus.GONE,
    Reason.ADAPTER_NOT_FOUND: HTTPStatus.NOT_FOUND,
    Reason.VERSION_UNKNOWN: HTTPStatus.NOT_FOUND,
    Reason.VERSION_COLLECTED: HTTPStatus.GONE,
    Reason.STORAGE_DENIED: HTTPStatus.FORBIDDEN,
    Reason.PAYLOAD_TOO_LARGE: HTTPStatus.REQUEST_ENTITY_TOO_LARGE,
    Reason.QUOTA_EXCEEDED: HTTPStatus.TOO_MANY_REQUESTS,
    Reason.UNKNOWN_POOL: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.BASE_MODEL_MISMATCH: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.INVALID_SPEC: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.EMPTY_RESPONSE: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.RESPONSE_TOO_LONG: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.PROMPT_TOO_LONG: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.LOGPROB_LENGTH_MISMATCH: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NON_FINITE_INPUT: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NON_FINITE_LOSS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NON_FINITE_GRAD: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.NON_FINITE_WEIGHTS: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.TOKENIZER_MISMATCH: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.ADAPTER_INVALID: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.PAYLOAD_INVALID: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.CREATE_FAILED: HTTPStatus.UNPROCESSABLE_ENTITY,
    Reason.TEACHER_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Reason.STORAGE_UNAVAILABLE: HTTPStatus.SERVICE_UNAVAILABLE,
    Reason.BACKOFF_LIMIT_EXCEEDED: HTTPStatus.SERVICE_UNAVAILABLE,
    Reason.WORKER_LOST: HTTPStatus.SERVICE_UNAVAILABLE,
    Reason.DEADLINE_EXCEEDED: HTTPStatus.GATEWAY_TIMEOUT,
    Reason.INTERNAL_ERROR: HTTPStatus.INTERNAL_SERVER_ERROR,
}


class Problem(HTTPException):
    """An error to be answered. An HTTPException, so that FastAPI lets it pass wherever it is raised."""

    def __init__(
        self,
        kind: Kind,
        detail: str,
        *,
        fix: str = "",
        errors: Sequence[FieldProblem] = (),
        reason: str | None = None,
        instance: str | None = None,
        retry_seconds: float | None = None,
    ) -> None:
        headers = {}
        if kind is UNAUTHENTICATED:
            headers["WWW-Authenticate"] = 'Bearer realm="claas"'
        if retry_seconds is None and kind.status is HTTPStatus.SERVICE_UNAVAILABLE:
            retry_seconds = RETRY_SECONDS
        if retry_seconds is not None:
            headers["Retry-After"] = str(max(1, round(retry_seconds + 0.5)))
        super().__init__(kind.status, detail, headers)
        self.kind, self.fix, self.errors = kind, fix or kind.fix, list(errors)
        self.reason, self.instance = reason, instance

    def answer(self, request_id: str) -> JSONResponse:
        """The response."""
        body = ProblemBody(
            type=f"urn:claas:problem:{self.kind.slug}",
            title=self.kind.title,
            status=self.kind.status,
            detail=self.detail,
            fix=self.fix,
            reason=self.reason,
            errors=self.errors,
            instance=self.instance,
            request_id=request_id,
        )
        content = body.model_dump(mode="json", exclude_none=True)
        return JSONResponse(content, self.kind.status, headers=self.headers, media_type=MEDIA_TYPE)


def invalid(field: str, detail: str) -> Problem:
    """One field at fault."""
    return Problem(INVALID, f"{field}: {detail}", errors=[FieldProblem(field=field, detail=detail)])


def failed(reason: str, message: str, instance: str) -> Problem:
    """A request ended without a step, or an adapter could not be made."""
    known = Reason(reason) if reason in set(Reason) else Reason.INTERNAL_ERROR
    status = STATUSES.get(known, HTTPStatus.INTERNAL_SERVER_ERROR)
    kind = Kind(f"{FAILED}:{known}", status, "The step was not made", describe(known))
    return Problem(kind, message or describe(known), reason=reason, instance=instance)


def of_validation(errors: Iterable[Mapping[str, Any]]) -> Problem:
    """What pydantic found in a body or in parameters, without the input."""
    found = [_field_problem(error) for error in errors]
    shown = found[:20]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    first = f"{shown[0].field}: {shown[0].detail}" if shown else "the request is not accepted"
    return Problem(INVALID, first + more, errors=shown)


def _field_problem(error: Mapping[str, Any]) -> FieldProblem:
    where, *path = error.get("loc") or ("body",)
    if error.get("type") == "rule":
        path = [*path, str((error.get("ctx") or {}).get("field"))]
    # A union's members show up in the path as their types' names, which are no fields.
    steps = [step for step in path if isinstance(step, int) or not _is_type_name(step)]
    field = "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps).lstrip(".")[:200]
    return FieldProblem(field=field or str(where), detail=_message(error))


def _is_type_name(step: str) -> bool:
    return "[" in step or step in ("str", "int", "float", "bool", "none", "list", "dict")


def _message(error: Mapping[str, Any]) -> str:
    if error.get("type") == "extra_forbidden":
        return "is no field of this body: remove it, or correct its spelling"
    if error.get("type") == "missing":
        return "is needed"
    return str(error.get("msg", "is not accepted"))
