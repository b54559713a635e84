"""`GET /openapi.json` and `GET /docs`: OpenAPI 3.1 with examples, and Swagger UI from a package of ours: no CDN.

Where the caller says who they are, the document says which uris are theirs: its patterns and examples then lie below
their own prefixes, and what is tried out in the page works.
"""

from __future__ import annotations

import copy
import importlib.resources
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from http import HTTPStatus
from typing import Any, Final

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from fastapi.responses import HTMLResponse, JSONResponse

from claas_crds.model import URI_PATTERN
from claas_operator.shim import models, problems
from claas_operator.shim.auth import bearer
from claas_operator.shim.http import OPEN
from claas_operator.shim.problems import Problem

_POLICY: Final = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)
_PAGE: Final = """<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>CLaaS</title><link rel="icon" href="data:,">
<link rel="stylesheet" href="docs/swagger-ui.css"></head>
<body><div id="ui"></div><script src="docs/swagger-ui-bundle.js"></script><script src="docs/start.js"></script></body>
</html>
"""
# Who has authorized gets their own document: its examples lie below their prefixes.
_START: Final = """\
let token;
const own = () => ({statePlugins: {auth: {wrapActions: {authorize: (before, system) => (given) => {
  const done = before(given);
  token = given.bearer && given.bearer.value;
  system.specActions.download(system.specSelectors.url());
  return done;
}}}}});
SwaggerUIBundle({
  url: "openapi.json", dom_id: "#ui", deepLinking: true, validatorUrl: null, plugins: [own],
  requestInterceptor: (request) => {
    if (request.loadSpec && token) request.headers.Authorization = "Bearer " + token;
    return request;
  },
});
"""
_ASSETS: Final = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript"}
# As `claas_store.uris` has it, but for its length in bytes: neither `.` nor `..`, and no character with two readings.
_NAMES: Final = r"/?#\\\x00-\x20\x7f-\x9f\u2028\u2029"
_SEGMENT: Final = f"[^.{_NAMES}][^{_NAMES}]{{0,254}}|[.][^.{_NAMES}][^{_NAMES}]{{0,253}}|[.][.][^{_NAMES}]{{1,253}}"
_ABOUT: Final = """\
Feedback on one response of a model becomes one training step on your own LoRA adapter.

`POST /v1/lora/init` makes an adapter, `POST /v1/distill` teaches it, and answers when that is done (or, with
`Prefer: respond-async`, at once). Every error is a problem document (RFC 9457) that names the field and the fix.

Every call is about the caller's own namespace; one that is not, and that they have rights in, is named by the parameter
`?namespace=` or the header `Claas-Namespace`.
"""


_ID_HEADER: Final = {
    "X-Request-Id": {
        "description": "Of this call, as in the log.",
        "required": True,
        "schema": {"type": "string", "pattern": "^[A-Za-z0-9._-]{1,64}$"},
    }
}
_ID_PARAMETER: Final = {
    "name": "X-Request-Id",
    "in": "header",
    "description": "Your name for this call: 1 to 64 of A-Z, a-z, 0-9, '.', '_' and '-'; others are ignored.",
    "schema": {"type": "string"},
}


def document(app: FastAPI) -> dict[str, Any]:
    """The API, as it is for everybody."""
    found = get_openapi(
        title="CLaaS",
        version="1",
        openapi_version="3.1.0",
        description=_ABOUT,
        routes=app.routes,
        servers=[{"url": "/"}],
    )
    components = found.setdefault("components", {})
    schemas = components.setdefault("schemas", {})
    problem = models.Problem.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas |= problem.pop("$defs", {}) | {"Problem": problem}
    for leftover in ("HTTPValidationError", "ValidationError"):
        schemas.pop(leftover, None)
    components["securitySchemes"] = {"bearer": {"type": "http", "scheme": "bearer"}}
    answer = {
        "description": "A problem (RFC 9457).",
        "content": {problems.MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
        "headers": {
            "Retry-After": {
                "description": "Seconds to wait; with 429 and 503.",
                "schema": {"type": "string", "pattern": "^[1-9][0-9]*$"},
            },
            "WWW-Authenticate": {"description": "With 401.", "schema": {"type": "string"}},
            "Allow": {"description": "With 405: what may be done there.", "schema": {"type": "string"}},
        },
    }
    for operation in _operations(found):
        if OPEN in operation.pop("tags", []):
            operation["security"] = []
        operation["responses"].pop("422", None)
        operation["responses"]["default"] = copy.deepcopy(answer)
        for response in operation["responses"].values():
            response.setdefault("headers", {}).update(_ID_HEADER)
        operation["parameters"] = [*operation.get("parameters", []), _ID_PARAMETER]
    found["security"] = [{"bearer": []}]
    _link(found)
    return found


def _operations(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for path in found["paths"].values():
        yield from path.values()


def _link(found: dict[str, Any]) -> None:
    """Where the id in one answer goes: readers, and tools that try sequences of calls, can follow."""
    paths = found["paths"]

    def link(
        path: str, method: str, status: str, known: dict[str, str], *targets: tuple[str, str], **body: str
    ) -> None:
        links = paths[path][method]["responses"][status].setdefault("links", {})
        for target_method, target in targets:
            links[f"{target_method}-{target.strip('/').replace('/', '-')}"] = {
                "operationId": paths[target][target_method]["operationId"],
                "parameters": known,
            } | ({"requestBody": body} if body else {})

    request, events = "/v1/requests/{id}", "/v1/requests/{id}/events"
    adapter = "/v1/adapters/{name}"
    of_request = (("get", request), ("delete", request), ("get", events))
    of_adapter = (("get", adapter), ("get", f"{adapter}/versions"), ("get", f"{adapter}/lineage"))
    for path in ("/v1/distill", "/v1/distill/lite"):
        link(path, "post", "202", {"id": "$response.body#/id"}, *of_request)
    link("/v1/requests", "get", "200", {"id": "$response.body#/items/0/id"}, *of_request)
    link("/v1/lora/init", "post", "202", {"name": "$response.body#/name"}, *of_adapter)
    link("/v1/adapters", "get", "200", {"name": "$response.body#/items/0/name"}, *of_adapter)
    for path in ("/v1/requests", "/v1/adapters", f"{adapter}/versions"):
        name = {"name": "$request.path.name"} if "{name}" in path else {}
        link(path, "get", "200", name | {"continue": "$response.body#/continue"}, ("get", path))
    version = "$response.body#/items/0/version"
    for path in (f"{adapter}/versions", f"{adapter}/lineage"):
        name = {"name": "$request.path.name"}
        link(path, "get", "200", name | {"version": version}, ("get", f"{adapter}/lineage"))
        link(path, "get", "200", name, ("post", f"{adapter}/rollback"), version=version)


def tailored(found: dict[str, Any], prefixes: Sequence[str], pools: Mapping[str, str]) -> dict[str, Any]:
    """The document for somebody whose uris lie below `prefixes`, where these pools hold these base models."""
    mine = copy.deepcopy(found)
    roots = [prefix.rstrip("/") for prefix in prefixes]
    escaped = (re.sub(r"[.^$*+?()[\]{}|\\]", r"\\\g<0>", root) for root in roots)  # re.escape's is not ECMA 262's
    pattern = f"^({'|'.join(escaped)})(/({_SEGMENT}))+/?$"
    old = models.EXAMPLE_URI.partition("/coder-v1")[0]

    def visit(node: Any) -> Any:
        if isinstance(node, dict):
            return {
                name: pattern if name == "pattern" and value == URI_PATTERN else visit(value)
                for name, value in node.items()
            }
        if isinstance(node, list):
            return [visit(item) for item in node]
        return node.replace(old, roots[0]) if isinstance(node, str) else node

    schemas = mine["components"]["schemas"] = visit(mine["components"]["schemas"])
    for body in ("DistillBody", "LiteBody", "InitBody"):
        for field, known in (("pool", pools.keys()), ("base_model", pools.values())):
            if pools and field in schemas[body]["properties"]:
                schemas[body]["properties"][field]["anyOf"][0] = {"type": "string", "enum": sorted(set(known))}
    return mine


def install(app: FastAPI) -> None:
    """The three routes; they are not part of the document."""

    @lru_cache(maxsize=1)
    def everybodys() -> dict[str, Any]:
        return document(app)

    app.openapi = everybodys  # type: ignore[method-assign]

    @app.get("/openapi.json", include_in_schema=False)
    async def openapi(request: Request) -> Response:
        door = request.app.state.door
        found = everybodys()
        if door.settings.auth.mode == "None" or request.headers.get("authorization"):
            caller = await door.auth.caller(bearer(request.headers.get("authorization")))
            if caller.namespace and (prefixes := door.settings.prefixes(caller.namespace)):
                found = tailored(found, prefixes, door.settings.pools)
        return JSONResponse(found)

    @app.get("/docs", include_in_schema=False)
    async def page() -> Response:
        return HTMLResponse(_PAGE, headers={"Content-Security-Policy": _POLICY})

    @app.get("/docs/start.js", include_in_schema=False)
    async def start() -> Response:
        return Response(_START, media_type="text/javascript")

    @app.get("/docs/{asset}", include_in_schema=False)
    async def file(asset: str) -> Response:
        if asset not in _ASSETS:
            raise Problem(problems.NOT_FOUND, "there is no such file")
        return Response(_asset(asset), media_type=_ASSETS[asset], headers={"Cache-Control": "public, max-age=3600"})

    @app.get("/livez", include_in_schema=False)
    async def livez(request: Request) -> Response:
        alive = request.app.state.door.alive()
        return Response(status_code=HTTPStatus.OK if alive else HTTPStatus.SERVICE_UNAVAILABLE)

    @app.get("/readyz", include_in_schema=False)
    async def readyz(request: Request) -> Response:
        door = request.app.state.door
        ready = door.requests.synced.is_set() and door.adapters.synced.is_set() and not door.requests.closed
        return Response(status_code=HTTPStatus.OK if ready else HTTPStatus.SERVICE_UNAVAILABLE)


@lru_cache(maxsize=2)
def _asset(name: str) -> bytes:
    try:
        return (importlib.resources.files("fastapi_offline") / "static" / name).read_bytes()
    except (ModuleNotFoundError, FileNotFoundError):
        raise Problem(problems.NOT_FOUND, "Swagger UI is not installed", fix="pip install 'claas[operator]'") from None
