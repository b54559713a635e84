"""The chart in a real API server: installed by Helm, its Pods admitted, its policies tried, and uninstalled."""

from __future__ import annotations

import copy
import functools
import json
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import kubernetes
import pytest

from chart.rendering import CHART, VARIANTS, Helm, Object, pod_templates
from claas_crds import names
from claas_crds.reasons import Outcome
from claas_crds.request import Metadata, Result
from claas_worker.api import Lost, Requests
from claas_worker.job import Bound
from cluster import programs
from cluster.controlplane import ControlPlane
from kubectl import Kubectl
from operatorkit import NUMBERS

pytestmark = pytest.mark.controlplane

LIMIT_SECONDS = 60
NOW = "2026-01-01T00:00:00Z"
RELEASE = "trial"
PLACE = (names.GROUP, names.VERSION, "default", names.REQUEST_PLURAL)
JSON_PATCH = "application/json-patch+json"  # the client would send a list as a merge patch
VALUES = [
    *("--set", "crds.install=false,networkPolicy.enabled=true,operator.replicas=2"),
    *("--set", "seaweedfs.enabled=true,teacher.podDisruptionBudget=true"),
]


def until(what: str, ask: Callable[[], Any]) -> Any:
    """The first truthy answer of `ask`; fails after a minute with the last one."""
    end = time.monotonic() + LIMIT_SECONDS
    while not (answer := ask()):
        assert time.monotonic() < end, f"{what}: still {answer!r} after {LIMIT_SECONDS} s"
        time.sleep(0.1)
    return answer


@pytest.fixture(scope="module")
def kubectl(control_plane: ControlPlane) -> Kubectl:
    """An API server that knows our resources."""
    kubectl = Kubectl(control_plane.kubeconfig, programs.ensure_kubectl())
    for definition in sorted((CHART.parents[1] / "crds").glob("*.yaml")):
        kubectl("apply", "--server-side", "--force-conflicts", "-f", str(definition))
        kubectl("wait", "--for=condition=Established", "--timeout=30s", "-f", str(definition))
    return kubectl


def restricted_namespace(kubectl: Kubectl) -> str:
    """A new namespace that admits restricted Pods only."""
    name = f"chart-{uuid.uuid4().hex[:8]}"
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    until("the default service account", lambda: kubectl.get("serviceaccounts", "-n", name))
    return name


@pytest.fixture(scope="module")
def namespace(kubectl: Kubectl) -> Iterator[str]:
    """Where the release is installed while this module's tests run."""
    name = restricted_namespace(kubectl)
    kubectl.helm("install", RELEASE, str(CHART), "--namespace", name, *VALUES)
    yield name
    if json.loads(kubectl.helm("list", "--namespace", name, "-o", "json")):
        kubectl.helm("uninstall", RELEASE, "--namespace", name, "--no-hooks")


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_accepts_every_object(kubectl: Kubectl, helm: Helm, variant: str) -> None:
    """Definitions included, each field known (strict validation)."""
    namespace = restricted_namespace(kubectl)
    kubectl("create", "serviceaccount", "dry-operator", "-n", namespace)  # the hook is a Pod: it needs its own at once
    text = helm.run("template", "dry", str(CHART), "--namespace", namespace, *VARIANTS[variant]).stdout
    dry = ("--server-side", "--force-conflicts", "--dry-run=server", "--validate=strict")
    accepted = kubectl("apply", *dry, "-n", namespace, "-f", "-", stdin=text)
    assert "distillrequests.claas.dev serverside-applied" in accepted
    assert "deployment.apps/dry-operator serverside-applied" in accepted


def pod_of(template: Object, name: str) -> Object:
    """A Pod made from a template, as a controller makes it."""
    metadata = {"name": name, "labels": template["metadata"]["labels"]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": template["spec"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_api_server_admits_every_pod(kubectl: Kubectl, helm: Helm, variant: str) -> None:
    """Under the restricted Pod Security Standard; those of the operator's settings too, which nobody else checks."""
    namespace = restricted_namespace(kubectl)
    client = kubernetes.config.new_client_from_config(str(kubectl.kubeconfig))
    core = kubernetes.client.CoreV1Api(client)
    for account in ("operator", "worker", "operation", "teacher", "shim"):
        core.create_namespaced_service_account(namespace, {"metadata": {"name": f"claas-{account}"}})
    for name, template in pod_templates(helm.render(*VARIANTS[variant])).items():
        dry = {"dry_run": "All", "field_validation": "Strict", "_request_timeout": 10}
        assert core.create_namespaced_pod(namespace, pod_of(template, "x"), **dry).metadata.name == "x", name


def test_every_deployment_and_job_gets_its_pods(kubectl: Kubectl, namespace: str) -> None:
    def components() -> list[str]:
        pods = kubectl.get("pods", "-n", namespace)
        return sorted(pod["metadata"]["labels"]["app.kubernetes.io/component"] for pod in pods)

    expected = ["fetch", "fetch", "operator", "operator", "seaweedfs", "shim", "teacher"]
    until("Pods of every workload", lambda: components() == expected)


def test_generated_credentials_survive_an_upgrade(kubectl: Kubectl, namespace: str) -> None:
    before = kubectl.get("secret", f"{RELEASE}-storage", "-n", namespace)["data"]
    changed = ("--set", "poolDefaults.maxWorkers=4")
    kubectl.helm("upgrade", RELEASE, str(CHART), "--namespace", namespace, *VALUES, *changed)
    assert kubectl.get("secret", f"{RELEASE}-storage", "-n", namespace)["data"] == before


def worker_template() -> Object:
    """The Pod template of the release's pool; a new one, to be changed."""
    return copy.deepcopy(_worker_template())


@functools.cache
def _worker_template() -> Object:
    objects = Helm(programs.ensure_kubectl() / "helm").render("--set", "crds.install=false", release=RELEASE)
    return pod_templates(objects)["pool l40s"]


class Worker:
    """A worker's Pod (pending: there is no node) and what its token may do."""

    def __init__(self, kubectl: Kubectl, namespace: str, url: str) -> None:
        self.kubectl, self.namespace, self.name = kubectl, namespace, f"{RELEASE}-l40s-1-{uuid.uuid4().hex[:5]}"
        kubectl.apply(pod_of(worker_template(), self.name), namespace=namespace)
        bound = ("--bound-object-kind", "Pod", "--bound-object-name", self.name)
        self.client = as_token(kubectl, url, kubectl("create", "token", f"{RELEASE}-worker", "-n", namespace, *bound))


def as_token(kubectl: Kubectl, url: str, token: str) -> kubernetes.client.ApiClient:
    """A client that shows the token and nothing else."""
    configuration = kubernetes.client.Configuration()
    kubernetes.config.load_kube_config(str(kubectl.kubeconfig), client_configuration=configuration)
    configuration.cert_file = configuration.key_file = None
    configuration.host = url
    configuration.api_key = {"authorization": f"Bearer {token.strip()}"}
    return kubernetes.client.ApiClient(configuration)


@pytest.fixture(scope="module")
def workers(kubectl: Kubectl, control_plane: ControlPlane, namespace: str) -> list[Worker]:
    """Two of them, once the policies are in force (which takes the API server a moment)."""
    made = [Worker(kubectl, namespace, control_plane.url) for _ in range(2)]
    probe = request_bound_to(kubectl, "nobody")

    def denied(words: str, act: Callable[..., Any], *arguments: Any) -> bool:
        try:
            act(*arguments)
        except kubernetes.client.ApiException as error:
            return words in error.body
        return False

    until("the policy of requests", lambda: denied("not bound to Pod", patch, made[0].client, probe, PROGRESS))
    until("the policy of Leases", lambda: denied("only the Lease", put_lease, made[0], f"probe-{uuid.uuid4().hex[:6]}"))
    return made


def request_bound_to(kubectl: Kubectl, worker: str) -> str:
    """A request of the namespace `default`, bound as the operator does it; returns its name."""
    name = f"r-{uuid.uuid4().hex[:8]}"
    spec = {"loraUri": "s3://adapters/default/a/", "samples": [{"prompt": "p", "response": "r"}]}
    made = {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND, "metadata": {"name": name}, "spec": spec}
    admin_of(kubectl).create_namespaced_custom_object(*PLACE, made, _request_timeout=10)
    status = {"worker": worker, "attempt": 1, "state": "Assigned", "parent": {"uri": "s3://adapters/default/a/"}}
    write_status(kubectl, name, {"status": status})
    return name


@functools.cache
def admin_of(kubectl: Kubectl) -> Any:
    """A cluster admin by the client library: faster than a process for each of many requests."""
    return kubernetes.client.CustomObjectsApi(kubernetes.config.new_client_from_config(str(kubectl.kubeconfig)))


def write_status(kubectl: Kubectl, name: str, body: Object | list[Object]) -> None:
    """Patch the request's status as a cluster admin, with a merge patch or a JSON Patch."""
    kind = JSON_PATCH if isinstance(body, list) else "application/merge-patch+json"
    admin_of(kubectl).patch_namespaced_custom_object_status(*PLACE, name, body, _content_type=kind, _request_timeout=10)


def patch(client: kubernetes.client.ApiClient, name: str, status: Object) -> Object:
    """Write fields of the request's status as `client`, by JSON Patch as workers do; None removes one."""
    return json_patch(
        client,
        name,
        *(
            {"op": "remove", "path": f"/status/{field}"}
            if value is None
            else {"op": "add", "path": f"/status/{field}", "value": value}
            for field, value in status.items()
        ),
    )


def json_patch(client: kubernetes.client.ApiClient, name: str, *operations: Object) -> Object:
    """A JSON Patch of the request's status subresource as `client`."""
    api = kubernetes.client.CustomObjectsApi(client)
    answer: Object = api.patch_namespaced_custom_object_status(
        *PLACE, name, list(operations), _content_type=JSON_PATCH, _request_timeout=10
    )
    return answer


def refused(act: Callable[..., Any], *arguments: Any, **more: Any) -> str:
    """What the API server says when it refuses the call (403); anything else fails the test."""
    with pytest.raises(kubernetes.client.ApiException) as caught:
        act(*arguments, **more)
    assert caught.value.status == 403, caught.value
    return str(json.loads(caught.value.body)["message"])


COMPLETE = {"type": "Complete", "status": "True", "reason": "Succeeded", "message": "", "lastTransitionTime": NOW}
PROGRESS = {"progress": {"phase": "Loading", "at": NOW}}


def claim(worker: str) -> Object:
    return {"claim": {"worker": worker, "attempt": 1, "at": NOW}}


def test_a_worker_writes_claim_progress_and_result_of_its_own_requests(kubectl: Kubectl, workers: list[Worker]) -> None:
    mine, _ = workers
    name = request_bound_to(kubectl, mine.name)
    patch(mine.client, name, claim(mine.name))
    patch(mine.client, name, PROGRESS)
    result = {"attempt": 1, "outcome": "Failed", "reason": "InternalError", "at": NOW}
    after = patch(mine.client, name, {"result": result})["status"]
    assert after["claim"]["worker"] == after["worker"] == mine.name
    assert after["result"]["reason"] == "InternalError"
    assert "progress" not in patch(mine.client, name, {"progress": None})["status"]


@pytest.mark.parametrize("later", [{"outcome": "Failed", "reason": "InternalError"}, {"message": "more"}, None])
def test_a_result_stands_until_the_operator_binds_anew(
    kubectl: Kubectl, workers: list[Worker], later: Object | None
) -> None:
    """Between the operator's look at a success and the commit of it nothing else may be reported."""
    mine, _ = workers
    name = request_bound_to(kubectl, mine.name)
    success = {"attempt": 1, "outcome": "Succeeded", "reason": "", "at": NOW, "loraUri": "s3://adapters/default/a-1/"}
    patch(mine.client, name, claim(mine.name) | {"result": success})
    said = refused(patch, mine.client, name, {"result": later and success | later})
    assert "a result of the current attempt stands" in said
    after = patch(mine.client, name, {"result": success, **PROGRESS})["status"]
    assert (after["result"]["outcome"], after["progress"]["phase"]) == ("Succeeded", "Loading"), "the same is no other"
    write_status(kubectl, name, {"status": {"attempt": 2, "claim": None, "result": None}})
    patch(mine.client, name, {"result": success | {"attempt": 2}})


def test_a_report_is_repeated_after_a_lost_answer_and_never_contradicted(
    kubectl: Kubectl, workers: list[Worker]
) -> None:
    mine, _ = workers
    name = request_bound_to(kubectl, mine.name)
    requests = Requests(mine.client, mine.name)
    bound = requests.claim(Bound.of(kubectl.get("dr", name, "-n", "default")))
    numbers = Metadata.model_validate(NUMBERS | {"totalLoss": 1 / 3, "gradNorm": 1e-7, "meanIsRatio": 1.0})
    uri = "s3://adapters/default/a-1/"
    result = Result(attempt=1, outcome=Outcome.SUCCEEDED, reason="", at=NOW, lora_uri=uri, metadata=numbers, gpu_ms=7)
    requests.report(bound, result)
    version = kubectl.get("dr", name, "-n", "default")["metadata"]["resourceVersion"]
    requests.report(bound, result)
    with pytest.raises(Lost, match="a result of this attempt is there"):
        requests.report(bound, result.model_copy(update={"outcome": Outcome.FAILED}))
    after = kubectl.get("dr", name, "-n", "default")
    assert (after["metadata"]["resourceVersion"], after["status"]["result"]["outcome"]) == (version, "Succeeded")


@pytest.mark.parametrize(
    "status",
    [
        {"worker": "another"},
        {"worker": None},
        {"attempt": 2},
        {"state": "Complete"},
        {"loraUri": "s3://adapters/default/stolen/"},
        {"parent": {"uri": "s3://adapters/default/b/"}},
        {"parent": None},
        {"conditions": [COMPLETE]},
        {**PROGRESS, "attempt": 2},
    ],
    ids=lambda status: json.dumps(status)[:40],
)
def test_a_worker_writes_nothing_else(kubectl: Kubectl, workers: list[Worker], status: Object) -> None:
    mine, _ = workers
    name = request_bound_to(kubectl, mine.name)
    before = admin_of(kubectl).get_namespaced_custom_object(*PLACE, name)["status"]
    said = refused(patch, mine.client, name, status)
    assert "may write only status.claim, status.progress and status.result" in said
    assert admin_of(kubectl).get_namespaced_custom_object(*PLACE, name)["status"] == before


def test_a_worker_may_not_touch_another_workers_request(kubectl: Kubectl, workers: list[Worker]) -> None:
    mine, other = workers
    name = request_bound_to(kubectl, mine.name)
    assert f"not bound to Pod {other.name}" in refused(patch, other.client, name, claim(other.name))
    assert f"not bound to Pod {other.name}" in refused(patch, other.client, name, {"worker": other.name})


def test_a_request_that_is_bound_to_nobody_is_nobodys(kubectl: Kubectl, workers: list[Worker]) -> None:
    name = request_bound_to(kubectl, "somebody")
    write_status(kubectl, name, [{"op": "remove", "path": "/status"}])
    for status in (claim(workers[0].name), {"worker": workers[0].name}):
        operation = {"op": "add", "path": "/status", "value": status}
        assert "not bound to Pod" in refused(json_patch, workers[0].client, name, operation)


def test_a_token_without_a_pod_writes_nothing(
    kubectl: Kubectl, control_plane: ControlPlane, namespace: str, workers: list[Worker]
) -> None:
    stolen = as_token(kubectl, control_plane.url, kubectl("create", "token", f"{RELEASE}-worker", "-n", namespace))
    name = request_bound_to(kubectl, workers[0].name)
    assert "only a token bound to a Pod" in refused(patch, stolen, name, claim(workers[0].name))


def test_a_namesake_in_another_namespace_is_not_the_worker(
    kubectl: Kubectl, control_plane: ControlPlane, workers: list[Worker]
) -> None:
    """A token says which Pod it is bound to by name alone, and a tenant names its Pods as it likes."""
    mine, tenant = workers[0], restricted_namespace(kubectl)
    request = request_bound_to(kubectl, mine.name)
    role = next(o for o in kubectl.get("clusterroles") if o["metadata"]["name"].endswith(f"{RELEASE}-worker"))
    account = f"--serviceaccount={tenant}:default"
    binding = ("rolebinding", f"{tenant}-worker", f"--clusterrole={role['metadata']['name']}", account)
    kubectl("create", *binding, "-n", "default")
    template = worker_template()
    template["spec"]["serviceAccountName"] = "default"
    kubectl.apply(pod_of(template, mine.name), namespace=tenant)
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", mine.name)
    namesake = as_token(kubectl, control_plane.url, kubectl("create", "token", "default", "-n", tenant, *bound))
    said = ""

    def seen() -> bool:
        nonlocal said
        said = refused(patch, namesake, request, claim(mine.name))
        return "cannot patch resource" not in said

    until("the role binding", seen)
    assert f"do not run in the namespace of system:serviceaccount:{tenant}:default" in said
    patch(mine.client, request, claim(mine.name))


def test_a_tenants_worker_sees_and_writes_its_own_namespace_alone(
    kubectl: Kubectl, control_plane: ControlPlane, workers: list[Worker]
) -> None:
    """`isolation: Namespace`: the worker's role is bound to the tenant's service account in the tenant's namespace."""
    tenant = restricted_namespace(kubectl)
    role = next(o for o in kubectl.get("clusterroles") if o["metadata"]["name"].endswith(f"{RELEASE}-worker"))
    account = f"--serviceaccount={tenant}:default"
    kubectl("create", "rolebinding", "worker", f"--clusterrole={role['metadata']['name']}", account, "-n", tenant)
    template, pod = worker_template(), f"worker-{uuid.uuid4().hex[:6]}"
    template["spec"]["serviceAccountName"] = "default"
    kubectl.apply(pod_of(template, pod), namespace=tenant)
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", pod)
    client = as_token(kubectl, control_plane.url, kubectl("create", "token", "default", "-n", tenant, *bound))
    api, place = kubernetes.client.CustomObjectsApi(client), (names.GROUP, names.VERSION)

    def may_list() -> bool:
        try:
            return "items" in api.list_namespaced_custom_object(*place, tenant, names.REQUEST_PLURAL)
        except kubernetes.client.ApiException:
            return False

    until("the role binding", may_list)
    theirs = request_bound_to(kubectl, pod)  # of another namespace, and in the name of this very Pod
    assert "cannot list resource" in refused(api.list_cluster_custom_object, *place, names.REQUEST_PLURAL)
    assert "cannot list resource" in refused(api.list_namespaced_custom_object, *PLACE[:3], names.REQUEST_PLURAL)
    assert "cannot get resource" in refused(api.get_namespaced_custom_object, *PLACE, theirs)
    assert "cannot patch resource" in refused(patch, client, theirs, claim(pod))


def test_a_token_ends_with_its_pod(kubectl: Kubectl, control_plane: ControlPlane, namespace: str) -> None:
    """One that was carried away is worth nothing once the Pod is gone."""
    gone = Worker(kubectl, namespace, control_plane.url)
    request = request_bound_to(kubectl, gone.name)
    kubectl("delete", "pod", gone.name, "-n", namespace, "--grace-period=0", "--force")

    def code() -> int:
        with pytest.raises(kubernetes.client.ApiException) as caught:
            patch(gone.client, request, claim("another"))
        status: int = caught.value.status
        return status

    until("the token to end", lambda: code() == 401)


def test_a_worker_changes_no_spec_and_creates_nothing(kubectl: Kubectl, workers: list[Worker]) -> None:
    mine, _ = workers
    name = request_bound_to(kubectl, mine.name)
    api = kubernetes.client.CustomObjectsApi(mine.client)
    cancel = {"spec": {"cancel": True}}
    assert "cannot patch resource" in refused(api.patch_namespaced_custom_object, *PLACE, name, cancel)
    body = kubectl.get("dr", name, "-n", "default")
    assert "cannot create resource" in refused(api.create_namespaced_custom_object, *PLACE, body)
    assert "cannot delete resource" in refused(api.delete_namespaced_custom_object, *PLACE, name)
    secrets = kubernetes.client.CoreV1Api(mine.client).list_namespaced_secret
    assert "cannot list resource" in refused(secrets, "default")
    assert "cannot list resource" in refused(secrets, mine.namespace)


def test_the_operator_writes_the_whole_status(
    kubectl: Kubectl, control_plane: ControlPlane, namespace: str, workers: list[Worker]
) -> None:
    token = kubectl("create", "token", f"{RELEASE}-operator", "-n", namespace)
    operator = as_token(kubectl, control_plane.url, token)
    name = request_bound_to(kubectl, workers[0].name)
    assert patch(operator, name, {"worker": workers[1].name, "attempt": 2})["status"]["attempt"] == 2
    assert "cannot list resource" in refused(kubernetes.client.CoreV1Api(operator).list_namespaced_secret, namespace)


def put_lease(worker: Worker, name: str) -> Any:
    """Create a Lease in the release's namespace."""
    body = {"metadata": {"name": name}, "spec": {"holderIdentity": "x", "leaseDurationSeconds": 15}}
    return kubernetes.client.CoordinationV1Api(worker.client).create_namespaced_lease(worker.namespace, body)


def test_a_worker_holds_its_own_lease_and_no_other(kubectl: Kubectl, workers: list[Worker]) -> None:
    mine, other = workers
    leases = kubernetes.client.CoordinationV1Api(mine.client)
    made = put_lease(mine, mine.name)
    made.spec.holder_identity = "me"
    leases.replace_namespaced_lease(mine.name, mine.namespace, made)
    put_lease(other, other.name)
    theft = {"spec": {"holderIdentity": "thief"}}
    assert "only the Lease" in refused(leases.patch_namespaced_lease, other.name, mine.namespace, theft)
    assert "only the Lease" in refused(leases.delete_namespaced_lease, other.name, mine.namespace)
    assert "only the Lease" in refused(put_lease, mine, f"{RELEASE}-operator")
    leases.delete_namespaced_lease(mine.name, mine.namespace)


def test_editors_of_a_namespace_may_ask_for_steps_and_not_write_status(kubectl: Kubectl, namespace: str) -> None:
    for role in ("edit", "view"):
        kubectl("create", "rolebinding", role, f"--clusterrole={role}", f"--user={role}-user", "-n", namespace)

    admin = kubernetes.client.AuthorizationV1Api(kubernetes.config.new_client_from_config(str(kubectl.kubeconfig)))

    def can(role: str, verb: str, resource: str, subresource: str = "") -> bool:
        what = {"namespace": namespace, "group": names.GROUP, "resource": resource, "subresource": subresource}
        review = {"spec": {"user": f"{role}-user", "resourceAttributes": {**what, "verb": verb}}}
        return bool(admin.create_subject_access_review(review).status.allowed)

    until("aggregation", lambda: can("edit", "create", "distillrequests"))
    assert can("edit", "delete", "loraadapters")
    assert not can("edit", "patch", "distillrequests", "status")
    assert not can("edit", "operate", "distillrequests")
    assert can("view", "watch", "distillrequests")
    assert not can("view", "create", "distillrequests")


def play_the_hook(kubectl: Kubectl, namespace: str) -> None:
    """There is no kubelet: the Pod that Helm waits for ends by our hand."""
    name = f"{RELEASE}-uninstall"
    (pod,) = until(
        "the hook", lambda: kubectl.get("pods", "-n", namespace, "--field-selector", f"metadata.name={name}")
    )
    assert pod["spec"]["containers"][0]["command"] == ["python3", "-m", "claas_operator.release"]
    status = {"status": {"phase": "Succeeded"}}
    kubectl("patch", "pod", name, "-n", namespace, "--subresource=status", "--type=merge", "-p", json.dumps(status))


def test_nothing_but_data_outlives_an_uninstall(kubectl: Kubectl, namespace: str, workers: list[Worker]) -> None:
    """A worker's Job goes with the operator's Deployment, which owns it. The last test here: it ends the release."""
    deployment = kubectl.get("deployment", f"{RELEASE}-operator", "-n", namespace)
    owner = {"apiVersion": "apps/v1", "kind": "Deployment", "name": f"{RELEASE}-operator"}
    owner["uid"] = deployment["metadata"]["uid"]
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": f"{RELEASE}-l40s-1", "ownerReferences": [owner]},
        "spec": {"backoffLimit": 0, "template": worker_template()},
    }
    kubectl.apply(job, namespace=namespace)
    until("the worker's Pod", lambda: kubectl.get("pods", "-n", namespace, "-l", f"job-name={RELEASE}-l40s-1"))
    for worker in workers:
        kubectl("delete", "pod", worker.name, "-n", namespace, "--grace-period=0", "--force")

    hook = threading.Thread(target=play_the_hook, args=(kubectl, namespace))
    hook.start()
    kubectl.helm("uninstall", RELEASE, "--namespace", namespace)
    hook.join()
    workloads = "deployments,replicasets,jobs,pods,services,poddisruptionbudgets,networkpolicies"
    kinds = f"{workloads},configmaps,secrets,serviceaccounts,roles,rolebindings"
    ours = f"app.kubernetes.io/instance={RELEASE}"
    until("the end of everything", lambda: not kubectl.get(kinds, "-n", namespace, "-l", ours))
    assert not kubectl.get("clusterroles,clusterrolebindings,validatingadmissionpolicies", "-l", ours)
    claims = kubectl.get("persistentvolumeclaims", "-n", namespace, "-l", ours)
    kept = [claim["metadata"]["name"] for claim in claims if "deletionTimestamp" not in claim["metadata"]]
    assert kept == [f"{RELEASE}-seaweedfs"]
    assert kubectl.get("crd", "distillrequests.claas.dev")
