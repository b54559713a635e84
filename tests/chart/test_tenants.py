"""Two tenants in a Namespace pool and two in a Shared one: who can read, write and name what.

Everything that keeps them apart is real: the API server with what the chart installs (RBAC, admission policies), tokens
of service accounts, the operator's process with the chart's settings and the token of its account, and an object store
that knows each tenant of the Namespace pool by a key of its own, which lies in that tenant's Secret. No kubelet runs.
"""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from chart.rendering import CHART
from chart.test_install import kubectl  # noqa: F401  (a fixture: the API server with our two kinds)
from claas_crds import names
from claas_store.create import init_adapter
from claas_store.errors import StorageDenied
from claas_store.stores import open_store
from claas_store.version import read_version
from cluster.api import Api, ApiError
from cluster.controlplane import ControlPlane
from cluster.process import kill, spawn, wait_for
from kubectl import Kubectl, Object
from objectstore import ObjectStore, running, secret_of
from store import examples
from store.chains import first

pytestmark = pytest.mark.controlplane

RBAC = "rbac.authorization.k8s.io"
RELEASE, HOME = "tenants", "tenants-home"
# One tenant's name begins with the other's, which begins its prefix as well.
OWN, SHARED = ("green", "greenhouse"), ("red", "redwood")
TENANTS = (*OWN, *SHARED)
KEYS = {tenant: [f"{right}:adapters/{tenant}/*" for right in ("Read", "Write", "List")] for tenant in OWN}
KEYS["pool"] = ["Read", "Write", "List"]
POOLS = [
    {"name": "shared"},
    {
        "name": "own",
        "isolation": "Namespace",
        "serviceAccountName": "trainer",
        "credentialsSecret": "store",
        "modelClaim": "model",
    },
]


def place(tenant: str) -> str:
    return f"s3://adapters/{tenant}/"


def collection(plural: str, namespace: str) -> str:
    """The path of all objects of a kind, ours or one of Kubernetes' core."""
    ours = plural in (names.REQUEST_PLURAL, names.ADAPTER_PLURAL)
    return f"/{f'apis/{names.API_VERSION}' if ours else 'api/v1'}/namespaces/{namespace}/{plural}"


@dataclass(frozen=True)
class World:
    """The release and its tenants; `admin` may do everything."""

    control_plane: ControlPlane
    admin: Api
    store: ObjectStore
    folder: Path

    def account(self, namespace: str, name: str, *roles: str) -> None:
        """A service account with these ClusterRoles in its namespace."""
        self.admin("POST", collection("serviceaccounts", namespace), {"metadata": {"name": name}})
        subject = {"kind": "ServiceAccount", "name": name, "namespace": namespace}
        for role in roles:
            reference = {"apiGroup": RBAC, "kind": "ClusterRole", "name": role}
            body = {"metadata": {"name": f"{name}-{role}"}, "roleRef": reference, "subjects": [subject]}
            self.admin("POST", f"/apis/{RBAC}/v1/namespaces/{namespace}/rolebindings", body)

    def token(self, account: str, namespace: str, pod: str = "") -> str:
        """A token of a service account by TokenRequest, bound to a Pod where one is named."""
        bound = {"boundObjectRef": {"apiVersion": "v1", "kind": "Pod", "name": pod}} if pod else {}
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": bound}
        path = f"{collection('serviceaccounts', namespace)}/{account}/token"
        token: str = self.admin("POST", path, body)["status"]["token"]
        return token

    def acting(self, account: str, namespace: str, pod: str = "") -> Api:
        """The API server as the bearer of that token and nothing else."""
        authority = self.control_plane.authority.certificate
        return Api(self.control_plane.url, authority, token=self.token(account, namespace, pod))

    def user(self, tenant: str) -> Api:
        """Somebody with `edit` in the tenant's namespace."""
        return self.acting("user", tenant)

    def environment(self, namespace: str, secret: str, reader: Api | None = None) -> dict[str, str]:
        """What a Pod of `namespace` gets from its Secret."""
        data = (reader or self.admin)("GET", f"{collection('secrets', namespace)}/{secret}")["data"]
        keys = {name: base64.b64decode(value).decode() for name, value in data.items()}
        return {"AWS_ENDPOINT_URL_S3": self.store.endpoint, "AWS_REGION": "us-east-1", **keys}


def secret(key: str) -> Object:
    data = {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": secret_of(key)}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "store"}, "stringData": data}


@pytest.fixture(scope="module")
def world(kubectl: Kubectl, control_plane: ControlPlane) -> Iterator[World]:  # noqa: F811
    """The chart installed, the tenants' accounts and Secrets made as docs and values say, and the operator running."""
    with tempfile.TemporaryDirectory(prefix="claas-tenants-", ignore_cleanup_errors=True) as path:
        folder = Path(path)
        with running(folder, rights=KEYS) as store:
            made = World(control_plane, control_plane.api, store, folder)
            for namespace in (HOME, *TENANTS):
                made.admin("POST", "/api/v1/namespaces", {"metadata": {"name": namespace}})
            made.admin("POST", collection("secrets", HOME), secret("pool"))
            values = {
                "crds": {"install": False},
                "pools": POOLS,
                "storage": {"endpoint": store.endpoint, "credentials": {"existingSecret": "store"}},
                "model": {"id": examples.BASE},
                "operator": {"timings": {"retryBaseSeconds": 0.5, "relistSeconds": 5}},
            }
            (folder / "values.yaml").write_text(yaml.safe_dump(values))
            kubectl.helm("install", RELEASE, str(CHART), "-n", HOME, "-f", str(folder / "values.yaml"))
            for tenant in TENANTS:
                made.account(tenant, "user", "edit")
            for tenant in OWN:
                made.account(tenant, "trainer", f"{HOME}-{RELEASE}-worker", f"{HOME}-{RELEASE}-worker-lease")
                made.admin("POST", collection("secrets", tenant), secret(tenant))
            for tenant in TENANTS:
                with as_(made.environment(HOME, "store")):
                    first(f"{place(tenant)}there")
            config = folder / "config.yaml"
            settings = made.admin("GET", f"{collection('configmaps', HOME)}/{RELEASE}-operator")
            config.write_text(settings["data"]["config.yaml"])
            identity = yaml.safe_load(kubectl.kubeconfig.read_text())
            for user in identity["users"]:
                user["user"] = {"token": made.token(f"{RELEASE}-operator", HOME)}
            (folder / "kubeconfig").write_text(yaml.safe_dump(identity))
            environment = {"KUBECONFIG": str(folder / "kubeconfig"), "PYTHONPATH": os.pathsep.join(sys.path)}
            log = folder / "operator.log"
            process = spawn(
                [sys.executable, "-m", "claas_operator", "--config", str(config)], log, environment=environment
            )
            try:
                wait_for("the operator to lead", lambda: '"synced"' in log.read_text(), 60)
                yield made
            finally:
                kill([process])
                kubectl.helm("uninstall", RELEASE, "-n", HOME, "--no-hooks")


class as_:
    """Inside the block the code under test has these variables, and no other credentials."""

    def __init__(self, environment: dict[str, str]) -> None:
        self._environment, self._patch = environment, pytest.MonkeyPatch()

    def __enter__(self) -> None:
        for variable, value in self._environment.items():
            self._patch.setenv(variable, value)

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def refusal(act: Callable[[], Any]) -> str:
    """What the API server said when it refused; empty when it did not."""
    try:
        act()
    except ApiError as error:
        return str(error)
    return ""


def adapter(name: str, uri: str, **spec: Any) -> Object:
    given = {"baseModel": examples.BASE, "storage": {"uri": uri}, "lora": LORA} | spec
    return {"apiVersion": names.API_VERSION, "kind": names.ADAPTER_KIND, "metadata": {"name": name}, "spec": given}


def request(name: str, **spec: Any) -> Object:
    given = {"samples": [{"prompt": "p", "response": "r"}]} | spec
    return {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND, "metadata": {"name": name}, "spec": given}


LORA = {"r": 4, "alpha": 8, "targetModules": ["q_proj", "down_proj"]}


def unique(word: str) -> str:
    return f"{word}-{uuid.uuid4().hex[:6]}"


# The API: users


@pytest.mark.parametrize("tenant", TENANTS)
@pytest.mark.parametrize("namespace", TENANTS)
def test_a_user_sees_and_asks_in_its_own_namespace_alone(world: World, tenant: str, namespace: str) -> None:
    me, name, own = world.user(tenant), unique("visit"), tenant == namespace
    requests = collection(names.REQUEST_PLURAL, namespace)
    there = f"{requests}/{name}-there"
    world.admin("POST", requests, request(f"{name}-there", loraUri=f"{place(namespace)}there/"))
    asks: dict[str, Callable[[], Any]] = {
        "read requests": lambda: me("GET", requests),
        "read adapters": lambda: me("GET", collection(names.ADAPTER_PLURAL, namespace)),
        "read the Secret": lambda: me("GET", collection("secrets", namespace)),
        "make a request": lambda: me("POST", requests, request(name, loraUri=f"{place(namespace)}there/")),
        "cancel a request": lambda: me("PATCH", there, {"spec": {"cancel": True}}),
        "delete a request": lambda: me("DELETE", there),
    }
    for what, act in asks.items():
        said = refusal(act)
        assert (said == "") == own, f"{tenant} in {namespace}: {what}: {said}"
        assert own or "Forbidden" in said, said
    if own:  # what the operator and the workers say is nobody else's to say
        mine = f"{requests}/{name}"
        assert "Forbidden" in refusal(partial(me, "PATCH", f"{mine}/status", {"status": {"worker": "mine"}}))
        assert "immutable" in refusal(partial(me, "PATCH", mine, {"spec": {"loraUri": place("red")}}))


# The API: workers

# By name: where it runs, as whom, and how it is called.
WORKERS = {
    "shared": (HOME, f"{RELEASE}-worker", f"{RELEASE}-shared-1-aaaaa"),
    "green": ("green", "trainer", f"{RELEASE}-own-1-bbbbb"),
    "greenhouse": ("greenhouse", "trainer", f"{RELEASE}-own-1-ccccc"),
    # What a tenant may do: a Pod of its own under the name of somebody else's worker.
    "green as the shared one": ("green", "trainer", f"{RELEASE}-shared-1-aaaaa"),
    "green as greenhouse's": ("green", "trainer", f"{RELEASE}-own-1-ccccc"),
}
# The workers that a request of each namespace may be bound to, as the operator binds it.
BOUND = {"green": "green", "greenhouse": "greenhouse", "red": "shared", "redwood": "shared"}


@pytest.fixture(scope="module")
def workers(world: World) -> dict[str, Api]:
    made = {}
    for who, (namespace, account, name) in WORKERS.items():
        spec = {"serviceAccountName": account, "containers": [{"name": "worker", "image": "example/claas:1"}]}
        world.admin("POST", collection("pods", namespace), {"metadata": {"name": name}, "spec": spec})
        made[who] = world.acting(account, namespace, name)
    return made


def claim(worker: Api, request: str, pod: str) -> str:
    """What the API server says to a claim, written as the agent writes it; empty when it takes it."""
    value = {"worker": pod, "attempt": 1, "at": "2026-01-01T00:00:00Z"}
    return refusal(
        partial(worker, "PATCH", f"{request}/status", [{"op": "add", "path": "/status/claim", "value": value}])
    )


@pytest.mark.parametrize("who", WORKERS)
@pytest.mark.parametrize("namespace", TENANTS)
@pytest.mark.parametrize("bound_to", ["shared", "green", "greenhouse"])
def test_a_worker_claims_what_is_bound_to_it_where_its_pool_runs(
    world: World, workers: dict[str, Api], who: str, namespace: str, bound_to: str
) -> None:
    home, _, pod = WORKERS[who]
    name, worker = unique("bound"), WORKERS[bound_to][2]
    # No operator touches it: its adapter does not exist, and the status says that it runs.
    requests = collection(names.REQUEST_PLURAL, namespace)
    world.admin("POST", requests, request(name, adapterRef={"name": "none"}))
    status = {"worker": worker, "attempt": 1, "state": "Assigned", "parent": {"uri": place(namespace)}}
    world.admin("PATCH", f"{requests}/{name}/status", {"status": status})
    said = claim(workers[who], f"{requests}/{name}", pod)
    reaches = home in (HOME, namespace)
    genuine = pod == worker and home == (HOME if bound_to == "shared" else namespace)
    assert (said == "") == genuine, f"{who} on {namespace}'s request for {bound_to}: {said}"
    if not reaches:
        assert "cannot patch resource" in said
    elif pod != worker and not genuine:
        assert f"not bound to Pod {pod}" in said
    elif not genuine:
        assert f"the workers of the pool of Pod {pod} do not run in the namespace of" in said


@pytest.mark.parametrize("who", WORKERS)
@pytest.mark.parametrize("namespace", [HOME, *TENANTS])
def test_a_worker_reads_requests_where_it_works_and_no_secrets_anywhere(
    workers: dict[str, Api], who: str, namespace: str
) -> None:
    """A Shared pool's workers see all requests: its tenants trust them, as the values say."""
    readable = {names.REQUEST_PLURAL} if WORKERS[who][0] in (HOME, namespace) else set()
    for kind in (names.REQUEST_PLURAL, names.ADAPTER_PLURAL, "secrets", "pods"):
        said, allowed = refusal(partial(workers[who], "GET", collection(kind, namespace))), kind in readable
        assert (said == "") == allowed, f"{who} reads {kind} in {namespace}: {said}"
        assert allowed or "Forbidden" in said


# The store, by the Secrets as the cluster holds them

HOLDERS = {"pool": (HOME, set(TENANTS)), "green": ("green", {"green"}), "greenhouse": ("greenhouse", {"greenhouse"})}


@pytest.mark.parametrize("holder", HOLDERS)
@pytest.mark.parametrize("tenant", TENANTS)
def test_a_credential_reads_and_writes_below_its_own_prefix_alone(world: World, holder: str, tenant: str) -> None:
    namespace, reaches = HOLDERS[holder]
    reader = world.user(holder) if holder in OWN else None  # a tenant's own Secret, with its own token
    there, name = f"{place(tenant)}there/", unique("made")
    acts: dict[str, Callable[[], Any]] = {
        "read": lambda: read_version(there),
        "list": lambda: open_store(there).list(place(tenant)),
        "write": lambda: open_store(there).put(f"{place(tenant)}{name}/claas.json", b"{}"),
        "make a version": lambda: first(f"{place(tenant)}{name}-v"),
        "delete": lambda: open_store(there).delete(f"{place(tenant)}{name}/claas.json"),
    }
    with as_(world.environment(namespace, "store", reader)):
        for what, act in acts.items():
            if tenant in reaches:
                act()
            else:
                with pytest.raises(StorageDenied, match="HTTP 403 AccessDenied") as caught:
                    act()
                assert secret_of(holder) not in str(caught.value), what


# Names: what an object may ask for

TRICKS = [
    "s3://adapters/{other}/x/",
    "s3://adapters/{me}/../{other}/x/",
    "s3://adapters/{me}/./x/",
    "s3://adapters/{me}//x/",
    "s3://adapters//{me}/x/",
    "s3://adapters/{me}/%2e%2e/{other}/x/",
    "s3://adapters/{me}%2f..%2f{other}/x/",
    "s3://adapters/{me}/%252e%252e/{other}/x/",
    "s3://adapters/{me}\\..\\{other}/x/",
    "s3://adapters/{me}/x/?versionId=1",
    "s3://adapters/{me}",
    "s3://adapters/{me}-not/x/",
    "s3://adapters/x/",
    "s3://other/{me}/x/",
    "file:///{me}/x/",
]
PAIRS = [("green", "greenhouse"), ("greenhouse", "green"), ("red", "redwood"), ("redwood", "red")]
POOL_OF = dict.fromkeys(OWN, "own") | dict.fromkeys(SHARED, "shared")


def fates(world: World, tenant: str, wanted: dict[str, Object]) -> dict[str, str]:
    """The reasons with which objects were refused, by the API server's rules or by the operator."""
    me = world.user(tenant)
    found, waiting = dict[str, str](), dict[str, str]()
    for what, made in wanted.items():
        plural = names.ADAPTER_PLURAL if made["kind"] == names.ADAPTER_KIND else names.REQUEST_PLURAL
        try:
            me("POST", collection(plural, tenant), made)
            waiting[made["metadata"]["name"]] = what
        except ApiError as error:
            found[what] = "Invalid" if error.code == 422 else f"HTTP {error.code}"

    def decided() -> bool:
        for plural, kind in ((names.ADAPTER_PLURAL, "Ready"), (names.REQUEST_PLURAL, "Failed")):
            for seen in world.admin("GET", collection(plural, tenant))["items"]:
                told = [c for c in seen.get("status", {}).get("conditions", []) if c["type"] == kind]
                if told and (what := waiting.pop(seen["metadata"]["name"], "")):
                    found[what] = told[0]["reason"]
        return not waiting

    wait_for(f"a decision about all objects of {tenant}", decided, 60)
    return found


@pytest.mark.parametrize(("tenant", "other"), PAIRS)
def test_no_object_names_anothers_place_however_it_is_written(world: World, tenant: str, other: str) -> None:
    pool, home = POOL_OF[tenant], f"{place(tenant)}{unique('x')}/"
    wanted: dict[str, Object] = {}
    for trick in TRICKS:
        uri = trick.format(me=tenant, other=other)
        payload = {"samples": None, "payloadRef": {"uri": f"{uri.rstrip('/')}/p.json", "sha256": "0" * 64}}
        objects = {
            "spec.storage.uri": adapter(unique("at"), uri, pool=pool),
            "spec.initFrom.uri": adapter(
                unique("from"), f"{home}{uuid.uuid4().hex[:6]}/", pool=pool, initFrom={"uri": uri}
            ),
            "spec.loraUri": request(unique("bare"), loraUri=uri, pool=pool),
            "spec.payloadRef.uri": request(unique("payload"), loraUri=f"{place(tenant)}there/", pool=pool, **payload),
        }
        if trick == "s3://adapters/{me}":  # its payload would lie in the place itself
            del objects["spec.payloadRef.uri"]
        for field, made in objects.items():
            if made["spec"].get("samples", "") is None:
                del made["spec"]["samples"]
            wanted[f"{field} {uri}"] = made
    found = fates(world, tenant, wanted)
    assert set(found.values()) == {"Invalid", "StorageDenied"}, found
    assert found[f"spec.storage.uri s3://adapters/{other}/x/"] == "StorageDenied"
    jobs = world.user(tenant)("GET", f"/apis/batch/v1/namespaces/{tenant}/jobs")
    assert jobs["items"] == [], "no Job was made for any of them"


@pytest.mark.parametrize(("tenant", "other"), PAIRS)
def test_an_operation_runs_where_and_as_whom_its_pool_says_and_reaches_no_further(
    world: World, tenant: str, other: str, tmp_path: Path
) -> None:
    """The Job that the operator made, run here with what its Pod would get."""
    name, uri = unique("mine"), f"{place(tenant)}{unique('mine')}/"
    adapters = collection(names.ADAPTER_PLURAL, tenant)
    uid = world.user(tenant)("POST", adapters, adapter(name, uri, pool=POOL_OF[tenant]))["metadata"]["uid"]
    own, jobs = tenant in OWN, list[Object]()

    def made() -> bool:
        path = f"/apis/batch/v1/jobs?labelSelector={names.ADAPTER_UID_LABEL}={uid}"
        jobs[:] = world.admin("GET", path)["items"]
        return bool(jobs)

    wait_for("a create Job", made, 30)
    (job,) = jobs
    pod = job["spec"]["template"]["spec"]
    account = "trainer" if own else f"{RELEASE}-operation"
    assert (job["metadata"]["namespace"], pod["serviceAccountName"]) == (tenant if own else HOME, account)
    assert pod["automountServiceAccountToken"] is False, "an operation has no token at all"
    container = pod["containers"][0]
    refs = {e["name"]: e["valueFrom"]["secretKeyRef"] for e in container["env"] if "valueFrom" in e}
    assert {ref["name"] for ref in refs.values()} == {"store"}
    environment = world.environment(job["metadata"]["namespace"], "store")
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    arguments = [str(argument) for argument in container["args"]]
    arguments[arguments.index("--model-dir") + 1] = str(examples.model_dir(tmp_path / "model"))

    def run(words: list[str]) -> Object:
        command = [sys.executable, "-m", "claas_store", *words]
        done = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, check=False, timeout=60)
        answer: Object = json.loads(done.stdout.splitlines()[-1])
        return answer

    assert run(arguments)["ok"], "its own place"
    arguments[arguments.index("--uri") + 1] = f"{place(other)}{unique('theft')}/"
    answer = run(arguments)
    assert answer["ok"] != own, "a Shared pool's credential reaches all its tenants; a tenant's own does not"
    assert not own or answer["reason"] == "StorageDenied"
    if own:
        with as_(environment), pytest.raises(StorageDenied):
            init_adapter(
                f"{place(tenant)}fork/", examples.BASE, tmp_path / "model", f"{place(other)}there/", examples.LORA, uid
            )
