"""The routes: parse, call, map. Each is a few lines over `Door` (effects) and `spec` (pure)."""

from __future__ import annotations

import asyncio
import json
import math
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Final

from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from claas_crds.adapter import LoraAdapterStatus
from claas_crds.reasons import Reason, describe
from claas_operator.shim import models, problems, spec
from claas_operator.shim.auth import Act
from claas_operator.shim.cluster import Object
from claas_operator.shim.door import Door, location, resource
from claas_operator.shim.http import OPEN, Route
from claas_operator.shim.problems import Problem
from claas_operator.shim.settings import INLINE_BYTES, NAMESPACE_PATTERN
from claas_operator.snapshot import Kind

DEFAULT_PAGE: Final = 50
MAX_PAGE: Final = 200
PING_SECONDS: Final = 15.0  # so that no proxy between us takes a quiet stream for a dead one
MAX_KEY: Final = 255
FORGET_SECONDS: Final = 10.0  # for the operator to see that a field was emptied
_NAME: Final = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")

router = APIRouter(prefix="/v1", route_class=Route)

_PATH: Final[dict[str, Any]] = {"schema": {"type": "string", "pattern": "^/v1/(requests|adapters)/"}}
_LOCATION: Final[dict[str, Any]] = {
    "Location": {"description": "Ask there.", "required": True} | _PATH,
    "Preference-Applied": {"description": "As in Prefer, where that was heeded.", "schema": {"type": "string"}},
}
_NOW: Final[dict[str, Any]] = {
    "description": "It has ended well.",
    "headers": {"Content-Location": {"description": "Its request or adapter."} | _PATH},
}


def _later(model: type[models.Answer]) -> dict[str, Any]:
    return {"model": model, "description": "It goes on; ask at Location.", "headers": _LOCATION}


_STEP: Final[dict[int | str, dict[str, Any]]] = {200: _NOW, 202: _later(models.Request)}
_MADE: Final[dict[int | str, dict[str, Any]]] = {200: _NOW, 202: _later(models.Adapter)}
_ROLLED_BACK: Final[dict[int | str, dict[str, Any]]] = {202: _later(models.Adapter)}
_CANCELLED: Final[dict[int | str, dict[str, Any]]] = {202: {"headers": _LOCATION}}
_STREAM: Final[dict[int | str, dict[str, Any]]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Events, each a Request as JSON."}
}
_UNHEALTHY: Final[dict[int | str, dict[str, Any]]] = {
    503: {"model": models.Health, "description": "A request would not be served."}
}


# What a call names beside its body


@dataclass(frozen=True)
class Tenant:
    """The namespace that a call is about, which its caller may use so."""

    namespace: str
    named: bool  # by the caller, so that a Location must name it too
    door: Door

    def location(self, kind: Kind, name: str) -> str:
        """Path of an object, as the caller would have to ask for it."""
        return location(kind, name, self.namespace if self.named else None)


async def _door(request: Request) -> Door:  # not async, it would cost a thread
    door: Door = request.app.state.door
    return door


AnyDoor = Annotated[Door, Depends(_door)]


def tenant(verb: str, kind: Kind) -> Callable[..., Awaitable[Tenant]]:
    """A dependency: the caller's namespace, in which they may do `verb` to `kind`."""

    async def admitted(
        request: Request,
        door: AnyDoor,
        namespace: Annotated[
            str | None,
            Query(pattern=NAMESPACE_PATTERN, include_in_schema=False),
        ] = None,
        claas_namespace: Annotated[
            str | None,
            Header(alias="Claas-Namespace", pattern=NAMESPACE_PATTERN, include_in_schema=False),
        ] = None,
    ) -> Tenant:
        if namespace and claas_namespace and namespace != claas_namespace:
            raise problems.invalid("namespace", "the parameter and the header Claas-Namespace differ: send one")
        named = namespace or claas_namespace
        wanted = named or request.state.caller.namespace
        if not wanted:
            detail = "this token has no namespace of its own: add ?namespace= or the header Claas-Namespace"
            raise problems.invalid("namespace", detail)
        name = request.path_params.get("id") or request.path_params.get("name") or ""
        await door.authorize(request, Act(verb, resource(kind), wanted, name), named is not None)
        return Tenant(wanted, named is not None, door)

    return admitted


@dataclass(frozen=True)
class Wait:
    """How long the answer may take, and whether that was the caller's preference."""

    seconds: float
    preferred: str = ""


async def _wait(
    door: AnyDoor,
    wait: Annotated[
        float | None,
        Query(
            ge=0,
            le=86400,
            allow_inf_nan=False,
            description="Seconds that the answer may wait for the end; 0: answer 202 at once. The installation's limit "
            "holds (GET /v1/whoami).",
        ),
    ] = None,
    prefer: Annotated[
        str | None, Header(max_length=512, description="respond-async, or wait=SECONDS (RFC 7240).")
    ] = None,
) -> Wait:
    limit = door.settings.max_wait_seconds
    if wait is not None:
        return Wait(min(wait, limit))
    words = [word.strip().lower() for word in (prefer or "").split(",")]
    if "respond-async" in words:
        return Wait(0.0, "respond-async")
    for word in words:
        if (found := re.fullmatch(r"wait\s*=\s*\"?(\d{1,6})\"?", word)) is not None:
            return Wait(min(float(found[1]), limit), f"wait={found[1]}")
    return Wait(door.settings.wait_seconds)


AnyWait = Annotated[Wait, Depends(_wait)]
Limit = Annotated[int, Query(ge=1, le=MAX_PAGE, description="Items of a page, at most.")]
_CONTINUE: Final = "`continue` of the page before."
Continue = Annotated[
    str | None, Query(alias="continue", max_length=4096, pattern="^[A-Za-z0-9_=-]+$", description=_CONTINUE)
]
Key = Annotated[
    str | None,
    Header(
        alias="Idempotency-Key",
        max_length=MAX_KEY,
        pattern=r"^[!-~\x80-\xff]([ -~\x80-\xff]*[!-~\x80-\xff])?$",
        description="Any text of yours, such as a UUID. The same key and body are the same request; another body is a "
        "409.",
    ),
]
Name = Annotated[str, Path(description="Its name.", max_length=253, pattern=f"^{_NAME.pattern}$")]
Id = Annotated[str, Path(description="The request's id.", max_length=253, pattern=f"^{_NAME.pattern}$")]


def _accepted(where: str, body: models.Answer, wait: Wait, status: int = HTTPStatus.ACCEPTED) -> Response:
    headers = {"Location": where} | ({"Preference-Applied": wait.preferred} if wait.preferred else {})
    return JSONResponse(_json(body), status, headers=headers)


def _json(body: models.Answer) -> Any:
    return body.model_dump(mode="json", by_alias=True, exclude_none=True)


# Distillation


MayAsk = Annotated[Tenant, Depends(tenant("create", Kind.REQUEST))]


@router.post("/distill", response_model=models.Distilled, responses=_STEP)
async def distill(
    request: Request, tenant: MayAsk, wait: AnyWait, body: models.DistillBody, key: Key = None
) -> Response:
    """One training step on an adapter, from feedback on a response.

    With the header `Idempotency-Key` (any text of yours), the same key and body are the same request, whichever replica
    answers; another body is a 409. A key is remembered for as long as its request is.
    """
    return await _distill(request, tenant, wait, body, key, "distill")


@router.post("/distill/lite", response_model=models.Distilled, responses=_STEP)
async def distill_lite(
    request: Request, tenant: MayAsk, wait: AnyWait, body: models.LiteBody, key: Key = None
) -> Response:
    """The same with the teacher's log-probabilities given: no teacher is asked.

    `Idempotency-Key` as above.
    """
    return await _distill(request, tenant, wait, body, key, "distill/lite")


async def _distill(
    request: Request,
    tenant: Tenant,
    wait: Wait,
    body: models.DistillBody | models.LiteBody,
    key: str | None,
    route: str,
) -> Response:
    raw = await _request_of(request, tenant, body, key, route)
    name = raw["metadata"]["name"]
    request.state.object = name
    where = tenant.location(Kind.REQUEST, name)
    raw = await tenant.door.until(request, Kind.REQUEST, raw, _ended, wait.seconds)
    end = spec.ended(raw)
    if end is None:
        return _accepted(where, spec.to_request(raw), wait)
    if end["type"] != "Complete":
        raise problems.failed(end.get("reason", ""), end.get("message", ""), where)
    if (found := spec.to_distilled(raw)) is None:
        return _accepted(where, spec.to_request(raw), wait)
    return JSONResponse(_json(found), headers={"Content-Location": where})


async def _request_of(
    request: Request, tenant: Tenant, body: models.DistillBody | models.LiteBody, key: str | None, route: str
) -> Object:
    """The DistillRequest that this call is: made now, or before by the same key."""
    door, namespace = tenant.door, tenant.namespace
    if body.lora_uri is not None:
        door.check_parent("lora_uri", body.lora_uri, namespace)
        door.check_pool(body.pool, body.base_model)
    samples = spec.samples_of(body)
    if len(samples) > door.settings.limits.max_samples:
        raise problems.invalid("samples", f"at most {door.settings.limits.max_samples} samples")
    wanted = spec.request_spec(body, door.settings)
    name = spec.request_name(key)
    digest = spec.digest(route, wanted | {"samples": samples}, key or name)
    if key is not None:
        found = await door.cluster.get(Kind.REQUEST, namespace, name)
        if found is not None:
            return _same(found, digest, tenant)
    if body.adapter is not None:
        await door.read(Kind.ADAPTER, namespace, body.adapter)
    payload = None
    if len(json.dumps(samples, ensure_ascii=False).encode()) > INLINE_BYTES:
        payload = await door.payload(namespace, samples)
    content = {"payloadRef": payload} if payload else {"samples": samples}
    try:
        whole = spec.request_object(name, wanted | content, digest, request.state.asked_at)
        raw, made = await door.create(Kind.REQUEST, namespace, whole)
    except BaseException:
        if payload:
            door.payloads.drop(payload)
        raise
    if payload and not made and (raw["spec"].get("payloadRef") or {}).get("uri") != payload["uri"]:
        door.payloads.drop(payload)
    return _same(raw, digest, tenant)


def _same(raw: Object, digest: str, tenant: Tenant) -> Object:
    """The request that a key made before, if its body was this one."""
    if (raw["metadata"].get("annotations") or {}).get(spec.BODY_ANNOTATION) != digest:
        detail = "this Idempotency-Key was used with another body"
        error = models.FieldProblem(field="Idempotency-Key", detail=detail)
        where = tenant.location(Kind.REQUEST, raw["metadata"]["name"])
        raise Problem(problems.CONFLICT, detail, fix="use a new key for a new body", errors=[error], instance=where)
    return raw


def _ended(raw: Object) -> bool:
    return spec.ended(raw) is not None


# Requests


@router.get("/requests", response_model=models.RequestList)
async def list_requests(
    tenant: Annotated[Tenant, Depends(tenant("list", Kind.REQUEST))],
    limit: Limit = DEFAULT_PAGE,
    token: Continue = None,
) -> Response:
    """The namespace's requests, page by page, by name."""
    items, following = await tenant.door.page(Kind.REQUEST, tenant.namespace, limit, token)
    found = models.RequestList(items=[spec.to_request(raw) for raw in items], continue_=following or None)
    return JSONResponse(_json(found))


MayRead = Annotated[Tenant, Depends(tenant("get", Kind.REQUEST))]


@router.get("/requests/{id}", response_model=models.Request)
async def get_request(
    request: Request,
    tenant: MayRead,
    id: Id,
    wait: Annotated[
        float | None,
        Query(ge=0, le=86400, allow_inf_nan=False, description="Answer when it has ended, or after so many seconds."),
    ] = None,
) -> Response:
    """Where a request is and stands in the queue, or how it ended."""
    raw = await tenant.door.read(Kind.REQUEST, tenant.namespace, id)
    seconds = min(wait or 0.0, tenant.door.settings.max_wait_seconds)
    raw = await tenant.door.until(request, Kind.REQUEST, raw, _ended, seconds)
    found = spec.to_request(raw)
    if not _ended(raw):
        found.place = await tenant.door.places.of(raw["metadata"]["uid"])
    return JSONResponse(_json(found))


@router.delete("/requests/{id}", status_code=HTTPStatus.ACCEPTED, response_model=models.Request, responses=_CANCELLED)
async def cancel_request(tenant: Annotated[Tenant, Depends(tenant("patch", Kind.REQUEST))], id: Id) -> Response:
    """Cancels a request; one that has ended stays as it is."""
    door = tenant.door
    raw = await door.read(Kind.REQUEST, tenant.namespace, id)
    if not _ended(raw) and not raw["spec"].get("cancel"):
        path = door.cluster.path(Kind.REQUEST, tenant.namespace, id)
        raw = await door.cluster.merge(path, {"metadata": {"uid": raw["metadata"]["uid"]}, "spec": {"cancel": True}})
    return _accepted(tenant.location(Kind.REQUEST, id), spec.to_request(raw), Wait(0))


@router.get("/requests/{id}/events", response_class=StreamingResponse, responses=_STREAM)
async def request_events(tenant: MayRead, id: Id) -> Response:
    """The request's phases as server-sent events, until it has ended: `phase` with each change, `end` at last."""
    raw = await tenant.door.read(Kind.REQUEST, tenant.namespace, id)
    return StreamingResponse(_events(tenant, raw), media_type="text/event-stream")


async def _events(tenant: Tenant, raw: Object) -> AsyncIterator[bytes]:
    """The newest state first, then every change that can be seen from outside."""
    told = ""
    async for state in _states(tenant, raw):
        if state is None:
            yield b": ping\n\n"
            continue
        shown = json.dumps(_json(spec.to_request(state)), ensure_ascii=False)
        if shown != told:
            told = shown
            event = "end" if _ended(state) else "phase"
            yield f"event: {event}\nid: {state['metadata']['resourceVersion']}\ndata: {shown}\n\n".encode()
        if _ended(state):
            return


async def _states(tenant: Tenant, raw: Object) -> AsyncIterator[Object | None]:
    door, uid = tenant.door, raw["metadata"]["uid"]
    yield raw
    if _ended(raw):
        return
    clock = asyncio.get_running_loop().time
    end = clock() + door.settings.max_wait_seconds  # whoever still wants to know asks again
    with door.requests.subscribe(uid) as subscription:
        crowded = door.requests.waiting > door.settings.limits.max_waiting
        while clock() < end and not crowded and not door.requests.over(raw):
            try:
                async with asyncio.timeout_at(min(end, clock() + PING_SECONDS)):
                    await subscription.news()
            except TimeoutError:
                yield None
                continue
            if subscription.gone or subscription.closed:
                return
            if subscription.latest is not None:
                yield subscription.latest
                if _ended(subscription.latest):
                    return
    last = await door.cluster.get(Kind.REQUEST, tenant.namespace, raw["metadata"]["name"])
    if last is not None and last["metadata"]["uid"] == uid:
        yield last


# Adapters


@router.post("/lora/init", response_model=models.Initialised, responses=_MADE)
async def init_lora(
    request: Request,
    tenant: Annotated[Tenant, Depends(tenant("create", Kind.ADAPTER))],
    wait: AnyWait,
    body: models.InitBody,
) -> Response:
    """A new adapter; the answer is its first version. The same body again is the same adapter."""
    door, namespace = tenant.door, tenant.namespace
    door.check_parent("output_uri", body.output_uri, namespace)
    door.check_pool(None, body.base_model)
    if body.init_from is not None:
        door.check_uri("init_from", body.init_from, namespace, door.settings.fork_prefixes(namespace))
    wanted = spec.adapter_object(body, door.settings)
    raw = await _adapter_of(tenant, wanted)
    name = raw["metadata"]["name"]
    request.state.object = name
    where = tenant.location(Kind.ADAPTER, name)
    raw = await door.until(request, Kind.ADAPTER, raw, spec.settled, wait.seconds)
    if (failure := spec.unmade(raw)) is not None:
        raise problems.failed(failure.get("reason", ""), failure.get("message", ""), where)
    if not spec.settled(raw):
        return _accepted(where, spec.to_adapter(raw), wait)
    answer = models.Initialised(lora_uri=wanted["spec"]["storage"]["uri"])
    return JSONResponse(_json(answer), headers={"Content-Location": where})


async def _adapter_of(tenant: Tenant, wanted: Object) -> Object:
    """The LoraAdapter: made now, or there before and the same. One that never came to be makes room."""
    door, namespace = tenant.door, tenant.namespace
    raw, made = await door.create(Kind.ADAPTER, namespace, wanted)
    if not made and spec.unmade(raw) is not None and spec.DOOR_LABEL in (raw["metadata"].get("labels") or {}):
        name, uid = raw["metadata"]["name"], raw["metadata"]["uid"]
        await door.cluster.delete(Kind.ADAPTER, namespace, name, uid=uid)
        raw, made = await door.create(Kind.ADAPTER, namespace, wanted)
    if not made and not spec.same_adapter(wanted, raw):
        detail = "an adapter of this name exists, with another uri, base model or shape"
        where = tenant.location(Kind.ADAPTER, raw["metadata"]["name"])
        raise Problem(problems.CONFLICT, detail, fix="choose another output_uri or name", instance=where)
    return raw


@router.get("/adapters", response_model=models.AdapterList)
async def list_adapters(
    tenant: Annotated[Tenant, Depends(tenant("list", Kind.ADAPTER))],
    limit: Limit = DEFAULT_PAGE,
    token: Continue = None,
) -> Response:
    """The namespace's adapters, page by page, by name."""
    items, following = await tenant.door.page(Kind.ADAPTER, tenant.namespace, limit, token)
    found = models.AdapterList(items=[spec.to_adapter(raw) for raw in items], continue_=following or None)
    return JSONResponse(_json(found))


MayReadAdapter = Annotated[Tenant, Depends(tenant("get", Kind.ADAPTER))]


@router.get("/adapters/{name}", response_model=models.Adapter)
async def get_adapter(tenant: MayReadAdapter, name: Name) -> Response:
    """An adapter and its head."""
    return JSONResponse(_json(spec.to_adapter(await tenant.door.read(Kind.ADAPTER, tenant.namespace, name))))


@router.get("/adapters/{name}/versions", response_model=models.VersionList)
async def list_versions(
    tenant: MayReadAdapter,
    name: Name,
    limit: Limit = DEFAULT_PAGE,
    token: Annotated[str | None, Query(alias="continue", pattern="^[0-9]{1,15}$", description=_CONTINUE)] = None,
) -> Response:
    """How its head moved, newest first."""
    raw = await tenant.door.read(Kind.ADAPTER, tenant.namespace, name)
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    below = math.inf if token is None else int(token)
    found = [entry for entry in reversed(status.history) if entry.seq < below]
    page = [spec.to_version(entry, status.version) for entry in found[:limit]]
    following = str(page[-1].seq) if len(found) > limit else None
    return JSONResponse(_json(models.VersionList(items=page, continue_=following)))


@router.get("/adapters/{name}/lineage", response_model=models.Lineage)
async def get_lineage(
    tenant: MayReadAdapter,
    name: Name,
    version: Annotated[
        str | None, Query(min_length=1, max_length=253, description="Name of a version; the head when absent.")
    ] = None,
) -> Response:
    """A version and what it was trained on, back to the first."""
    found = spec.lineage(await tenant.door.read(Kind.ADAPTER, tenant.namespace, name), version)
    if found is None:
        raise _no_version(name, tenant)
    return JSONResponse(_json(found))


@router.post("/adapters/{name}/rollback", response_model=models.Adapter, responses=_ROLLED_BACK)
async def rollback(
    request: Request,
    tenant: Annotated[Tenant, Depends(tenant("patch", Kind.ADAPTER))],
    name: Name,
    wait: AnyWait,
    body: models.RollbackBody,
) -> Response:
    """Makes an old version the head again. Steps that are under way end first."""
    door, path = tenant.door, tenant.door.cluster.path(Kind.ADAPTER, tenant.namespace, name)
    raw = await door.read(Kind.ADAPTER, tenant.namespace, name)
    status = LoraAdapterStatus.model_validate(raw.get("status") or {})
    if body.version not in {entry.version for entry in status.history} or body.version in status.collecting:
        raise _no_version(name, tenant)
    where = tenant.location(Kind.ADAPTER, name)
    if status.version == body.version and raw["spec"].get("rollbackTo") in (None, body.version):
        return JSONResponse(_json(spec.to_adapter(raw)))
    if raw["spec"].get("rollbackTo") == body.version:
        # It was asked for before: the operator answers a change, so it must have seen the field empty.
        raw = await door.cluster.merge(path, {"spec": {"rollbackTo": None}})
        await door.until(request, Kind.ADAPTER, raw, _unanswered, FORGET_SECONDS)
    raw = await door.cluster.merge(path, {"spec": {"rollbackTo": body.version}})
    generation = raw["metadata"]["generation"]
    raw = await door.until(
        request, Kind.ADAPTER, raw, lambda now: spec.rolled_back(now, body.version, generation), wait.seconds
    )
    if not spec.rolled_back(raw, body.version, generation):
        return _accepted(where, spec.to_adapter(raw), wait)
    if (refusal := spec.not_rolled_back(raw, generation)) is not None:
        raise problems.failed(refusal.get("reason", ""), refusal.get("message", ""), where)
    return JSONResponse(_json(spec.to_adapter(raw)))


def _unanswered(raw: Object) -> bool:
    return not (raw.get("status") or {}).get("rollbackAnswered")


def _no_version(name: str, tenant: Tenant) -> Problem:
    return Problem(
        problems.NOT_FOUND,
        "the adapter has no such version, or no longer",
        fix=f"see GET /v1/adapters/{name}/versions",
        instance=tenant.location(Kind.ADAPTER, name),
    )


# The installation


@router.get("/health", tags=[OPEN], response_model=models.Health, responses=_UNHEALTHY)
async def health(door: AnyDoor) -> Response:
    """Whether a request would be served now, part by part."""
    found = await door.health.look()
    status = HTTPStatus.OK if found.status == "healthy" else HTTPStatus.SERVICE_UNAVAILABLE
    return JSONResponse(_json(found), status)


@router.get("/whoami", response_model=models.Caller)
async def whoami(request: Request, tenant: Annotated[Tenant, Depends(tenant("list", Kind.REQUEST))]) -> Response:
    """The caller's namespace, where it may store, and what one call may ask."""
    settings = tenant.door.settings
    limits = settings.limits
    found = models.Caller(
        namespace=tenant.namespace,
        storage_prefixes=settings.prefixes(tenant.namespace),
        default_base_model=settings.default_base_model,
        teacher=settings.teacher is not None,
        limits=models.Limits(
            max_body_bytes=limits.max_body_bytes,
            max_samples=limits.max_samples,
            max_wait_seconds=settings.max_wait_seconds,
            requests_per_minute=limits.requests_per_minute,
        ),
    )
    return JSONResponse(_json(found))


@router.get("/reasons", response_model=models.Reasons)
async def reasons() -> Response:
    """Every reason that a request or an adapter may show, and the status of an answer that fails with it."""
    items = [
        models.ReasonMeaning(reason=reason, meaning=describe(reason), http_status=problems.STATUSES.get(reason))
        for reason in Reason
    ]
    return JSONResponse(_json(models.Reasons(items=items)))
