"""Who may do what: every route, for everybody who might try it. The table of routes is the application's own."""

from __future__ import annotations

import base64
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.routing import APIRoute

from claas_operator.shim.auth import KEY_LABEL, new_key
from claas_operator.shim.routes import router
from shimstage import Shim, ShimStage

pytestmark = pytest.mark.controlplane

# Every route with a body that would be accepted, and the names that it takes.
ROUTES = sorted((next(iter(route.methods)), route.path) for route in router.routes if isinstance(route, APIRoute))
OPEN = {("GET", "/v1/health")}
ANYBODY = {("GET", "/v1/reasons")}  # of whoever is known, in no namespace
WRITES = {"/v1/distill", "/v1/distill/lite", "/v1/lora/init", "/v1/adapters/{name}/rollback"}


def ids(route: tuple[str, str]) -> str:
    return f"{route[0]} {route[1]}"


@pytest.fixture(scope="module")
def secrets(stage: ShimStage) -> dict[str, str]:
    """What the tenant `other` has: an adapter, a request, a version."""
    team, stage.team = stage.team, stage.other
    stage.adapter("hidden")
    name = stage.request("hidden-request", "hidden")["metadata"]["name"]
    stage.team = team
    return {"adapter": "hidden", "request": name, "uri": f"s3://adapters/{stage.other}/hidden/"}


def call(
    client: httpx.Client, route: tuple[str, str], secrets: dict[str, str], query: dict[str, Any] | None = None
) -> httpx.Response:
    """The route, pointed at what is the other tenant's."""
    method, path = route
    path = path.replace("{id}", secrets["request"]).replace("{name}", secrets["adapter"])
    said = {"prompt": "SECRET", "response": "SECRET"}
    bodies: dict[str, Any] = {
        "/v1/distill": {"adapter": secrets["adapter"]} | said,
        "/v1/distill/lite": {"adapter": secrets["adapter"], "teacher_logprobs": [-1.0]} | said,
        "/v1/lora/init": {"output_uri": secrets["uri"]},
        "/v1/adapters/{name}/rollback": {"version": "hidden"},
    }
    query = {"wait": 0} | (query or {}) if route[1] in WRITES else query
    return client.request(method, path, json=bodies.get(route[1]), params=query)


def test_the_matrix_knows_every_route() -> None:
    assert {path for method, path in ROUTES if method == "POST"} == WRITES
    assert len(ROUTES) == 15


@pytest.mark.parametrize("route", [r for r in ROUTES if r not in OPEN], ids=ids)
def test_nobody_gets_in(shim: Shim, secrets: dict[str, str], route: tuple[str, str]) -> None:
    for token in ("", "nonsense", "a.b.c", "x" * 20000):
        with shim.client(token) as client:
            answer = call(client, route, secrets)
        assert answer.status_code == 401, (route, token[:10], answer.text)
        assert answer.headers["www-authenticate"].startswith("Bearer")
        assert "hidden" not in answer.text


@pytest.mark.parametrize("route", [r for r in ROUTES if r not in OPEN | ANYBODY], ids=ids)
def test_another_tenants_namespace_is_closed(
    stage: ShimStage, shim: Shim, secrets: dict[str, str], route: tuple[str, str]
) -> None:
    """The same answer whether the namespace, the adapter or the request exists."""
    with shim.client() as client:
        theirs = call(client, route, secrets, {"namespace": stage.other})
        nowhere = call(client, route, secrets, {"namespace": "no-such-namespace"})
        absent = call(client, route, {**secrets, "adapter": "absent", "request": "absent"}, {"namespace": stage.other})
        header = client.get("/v1/requests", headers={"Claas-Namespace": stage.other})
    assert theirs.status_code == nowhere.status_code == absent.status_code == header.status_code == 403, theirs.text
    answers = [blank(answer.json(), stage.other, "no-such-namespace") for answer in (theirs, nowhere, absent)]
    assert answers[0] == answers[1] == answers[2]


@pytest.mark.parametrize("route", [r for r in ROUTES if "{" in r[1] or r[1] in WRITES], ids=ids)
def test_another_tenants_names_mean_nothing_at_home(
    stage: ShimStage, shim: Shim, secrets: dict[str, str], route: tuple[str, str]
) -> None:
    """An id or a name of theirs is as unknown here as one that nobody has; a uri of theirs is refused unseen."""
    with shim.client() as client:
        theirs = call(client, route, secrets)
        absent = call(client, route, {"adapter": "absent", "request": "absent", "uri": secrets["uri"] + "absent/"})
    assert theirs.status_code == absent.status_code, theirs.text
    assert theirs.status_code == (403 if route[1] == "/v1/lora/init" else 404), theirs.text
    assert blank(theirs.json(), "hidden-request", "hidden", "absent") == blank(
        absent.json(), "hidden-request", "hidden", "absent"
    )


@pytest.mark.parametrize("field", ["lora_uri", "output_uri", "init_from"])
def test_another_tenants_prefix_is_closed(stage: ShimStage, shim: Shim, secrets: dict[str, str], field: str) -> None:
    own = f"s3://adapters/{stage.team}/mine/"
    for uri in (
        secrets["uri"],
        f"s3://adapters/{stage.other}/absent/",
        f"s3://adapters/{stage.team}x/a/",
        f"s3://adapters/{stage.team}%2f..%2f{stage.other}/hidden/",
        f"s3://adapters/{stage.team}/../{stage.other}/hidden/",
        "s3://adapters/",
        "file:///etc/",
    ):
        said = {"prompt": "SECRET", "response": "SECRET"}
        asked = {field: uri} | (said if field == "lora_uri" else {"output_uri": own} if field == "init_from" else {})
        with shim.client() as client:
            answer = client.post("/v1/distill" if field == "lora_uri" else "/v1/lora/init", json=asked)
        assert answer.status_code in (403, 422), (uri, answer.text)
        assert answer.json()["errors"][0]["field"] == field


@pytest.mark.parametrize("route", [r for r in ROUTES if r not in OPEN | ANYBODY], ids=ids)
def test_a_viewer_reads_and_a_stranger_does_nothing(
    stage: ShimStage, shim: Shim, secrets: dict[str, str], route: tuple[str, str]
) -> None:
    with shim.client(stage.token("viewer")) as client:
        answer = call(client, route, secrets)
    reads = route[0] == "GET"
    assert (answer.status_code in (200, 404)) is reads and (answer.status_code == 403) is not reads, answer.text
    with shim.client(stage.token("nobody")) as client:
        assert call(client, route, secrets).status_code == 403


def test_rights_in_two_namespaces_are_kept_apart(stage: ShimStage, shim: Shim, secrets: dict[str, str]) -> None:
    with shim.client(stage.token("editor", stage.other)) as client:
        assert client.get(f"/v1/requests/{secrets['request']}").status_code == 200
        assert [a["name"] for a in client.get("/v1/adapters").json()["items"]] == ["hidden"]
        assert client.get("/v1/adapters", params={"namespace": stage.team}).status_code == 403
    with shim.client() as client:
        assert "hidden" not in client.get("/v1/adapters").text + client.get("/v1/requests").text


def test_a_page_of_another_tenant_cannot_be_turned(stage: ShimStage, shim: Shim, secrets: dict[str, str]) -> None:
    """The API server's own continue token names a key; it must lie in the namespace that is listed."""
    with shim.client(stage.token("editor", stage.other)) as client:
        for number in range(2):
            said = {"adapter": "hidden", "prompt": "SECRET", "response": "SECRET"}
            assert client.post("/v1/distill?wait=0", json=said | {"priority": number}).status_code == 202
        token = client.get("/v1/requests?limit=1").json()["continue"]
        assert client.get("/v1/requests", params={"continue": token}).status_code == 200
    with shim.client() as client:
        answer = client.get("/v1/requests", params={"continue": token})
    assert "hidden" not in answer.text
    assert answer.status_code in (200, 422)


def test_one_key_is_two_requests_of_two_tenants(stage: ShimStage, shim: Shim, secrets: dict[str, str]) -> None:
    key = {"Idempotency-Key": "shared"}
    seen = set()
    for namespace in (stage.team, stage.other):
        with shim.client(stage.token("editor", namespace)) as client:
            said = {"lora_uri": f"s3://adapters/{namespace}/k/", "prompt": namespace, "response": "SECRET"}
            answer = client.post("/v1/distill", json=said, headers=key)
            assert answer.status_code == 200, answer.text
            seen.add(answer.json()["lora_uri"])
    assert len(seen) == 2


def test_api_keys(stage: ShimStage, secrets: dict[str, str]) -> None:
    shim = stage.start_shim(auth={"mode": "ApiKey", "cacheSeconds": 0.2})
    key, digest = new_key()
    data = {"sha256": digest, "namespace": stage.team}
    path = f"/api/v1/namespaces/{stage.home}/secrets"
    encoded = {name: base64.b64encode(value.encode()).decode() for name, value in data.items()}
    stage.api("POST", path, {"metadata": {"name": "key", "labels": {KEY_LABEL: "true"}}, "data": encoded})
    stage.api("POST", path, {"metadata": {"name": "unlabelled"}, "data": encoded | {"sha256": "", "x": ""}})
    with shim.client(key) as client:
        stage.wait("the key to be known", lambda: client.get("/v1/whoami").status_code == 200)
        assert client.get("/v1/whoami").json()["namespace"] == stage.team
        assert call(client, ("GET", "/v1/requests"), secrets).status_code == 200
        for route in (r for r in ROUTES if r not in OPEN | ANYBODY):
            assert call(client, route, secrets, {"namespace": stage.other}).status_code == 403, route
    for wrong in ("", digest, key + "x", key[:-1], "claas_"):
        with shim.client(wrong) as client:
            assert client.get("/v1/requests").status_code == 401
    stage.api("DELETE", f"{path}/key")
    with shim.client(key) as client:
        stage.wait("the key to be withdrawn", lambda: client.get("/v1/requests").status_code == 401)
    assert key not in shim.log.read_text()
    shim.kill()


def test_without_authentication_there_is_one_tenant_and_the_log_says_so(
    stage: ShimStage, secrets: dict[str, str]
) -> None:
    shim = stage.start_shim(auth={"mode": "None", "namespace": stage.team})
    with shim.client("") as client:
        assert client.get("/v1/whoami").json()["namespace"] == stage.team
        for route in (r for r in ROUTES if r not in OPEN | ANYBODY):
            assert call(client, route, secrets, {"namespace": stage.other}).status_code == 403, route
    assert "nobody is asked who they are" in shim.log.read_text()
    shim.kill()


def test_a_namespace_that_the_release_does_not_serve_is_not_asked_in_vain(
    stage: ShimStage, secrets: dict[str, str]
) -> None:
    shim = stage.start_shim(watchNamespaces=[stage.team])
    with shim.client() as client, shim.client(stage.token("editor", stage.other)) as another:
        assert client.get("/v1/requests").status_code == 200
        refused = another.get("/v1/requests")
        assert refused.status_code == 403
        assert f"this one serves {stage.team}" in refused.json()["fix"]
    shim.kill()


def test_a_withdrawn_right_is_gone_within_the_caches_time(stage: ShimStage, secrets: dict[str, str]) -> None:
    shim = stage.start_shim(auth={"cacheSeconds": 0.5})
    token = stage.token("viewer", stage.other)
    binding = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{stage.other}/rolebindings/viewer"
    with shim.client(token) as client:
        assert client.get("/v1/requests").status_code == 200
        stage.api("DELETE", binding)
        stage.wait("the right to go", lambda: client.get("/v1/requests").status_code == 403)
    shim.kill()


def test_too_many_calls_are_told_when_to_come_back(stage: ShimStage, secrets: dict[str, str]) -> None:
    shim = stage.start_shim(limits={"requestsPerMinute": 60, "burst": 5})
    with shim.client() as client, shim.client(stage.token("editor", stage.other)) as another:
        answers = [client.get("/v1/requests") for _ in range(8)]
        assert [answer.status_code for answer in answers].count(200) in (5, 6)
        limited = answers[-1]
        assert limited.status_code == 429
        assert 1 <= int(limited.headers["retry-after"]) <= 2
        assert another.get("/v1/requests").status_code == 200, "another tenant's calls are another's"
        assert client.get("/v1/health").status_code == 200
    shim.kill()


def test_no_token_and_no_sample_is_logged(stage: ShimStage, shim: Shim, tmp_path: Path) -> None:
    with shim.client() as client:
        client.post("/v1/distill", json={"prompt": "SECRET", "response": 7, "SECRET-field": 1})
    text = shim.log.read_text()
    assert stage.token() not in text and "SECRET" not in text
    assert not re.search(r"eyJ[\w-]{20}", text)


def blank(found: dict[str, Any], *names: str) -> dict[str, Any]:
    """A problem without what the caller said and the call's own id."""
    text = {key: str(value) for key, value in found.items() if key != "request_id"}
    for name in names:
        text = {key: value.replace(name, "*") for key, value in text.items()}
    return text
