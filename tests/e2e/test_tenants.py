"""A pool of isolation Namespace on the real cluster: a tenant's Jobs run under its account, with its key alone."""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

import bootstrap
from cluster.nodes import Cluster
from deployment import BASE_MODEL, NAMESPACE, RELEASE, ROOT, Deployment, volume
from e2e import story
from kubectl import Kubectl, Object, condition

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.stress,
    pytest.mark.timeout(900),
    pytest.mark.skipif(
        bool(os.environ.get("KUBECONFIG")), reason="the model's volume must be a folder of this machine"
    ),
]
# One tenant's name, and so its prefix, begins with the other's.
TENANTS = ("green", "greenhouse")
ADAPTER = "own"
POOL = {
    "name": "own",
    "isolation": "Namespace",
    "serviceAccountName": "trainer",
    "credentialsSecret": "store",
    "modelClaim": "model",
    "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"},
}
LOOK = """
import sys
from claas_store.errors import StoreError
from claas_store.stores import open_store
for uri in sys.argv[1:]:
    store = open_store(uri)
    for what in (lambda: store.list(uri), lambda: store.get(uri + "claas.json"), lambda: store.put(uri + "x", b"x")):
        try:
            what()
            print("allowed")
        except StoreError as error:
            print(error.reason)
"""


@dataclass(frozen=True)
class Pair:
    """Two tenants with an adapter each, trained once."""

    kubectl: Kubectl
    workers: dict[str, Object]  # the Pod that trained it, by tenant
    requests: dict[str, Object]


def uri(tenant: str, name: str = ADAPTER) -> str:
    return f"s3://adapters/{tenant}/{name}/"


@pytest.fixture(scope="module")
def pair(installed: Deployment, cluster: Cluster) -> Iterator[Pair]:
    kubectl = installed.kubectl
    try:
        for tenant in TENANTS:
            welcome(kubectl, cluster, tenant)
        pools = [{"name": "l40s", "nodeSelector": POOL["nodeSelector"]}, POOL]
        upgrade(kubectl, pools)
        workers, requests = {}, {}
        for tenant in TENANTS:
            kubectl.apply(adapter(tenant, uri(tenant)))
            kubectl.wait(f"la/{ADAPTER}", "condition=Ready", namespace=tenant, seconds=story.LIMIT_SECONDS)
            kubectl.apply(request(tenant))
            kubectl.wait("dr/first", "condition=Complete", namespace=tenant, seconds=story.COLD_SECONDS)
            requests[tenant] = kubectl.get("dr", "first", "-n", tenant)
            workers[tenant] = kubectl.get("pod", requests[tenant]["status"]["worker"], "-n", tenant)
        yield Pair(kubectl, workers, requests)
    finally:
        for tenant in TENANTS:
            kubectl("delete", "dr,la", "--all", "-n", tenant, "--wait", seconds=120)
        upgrade(kubectl, [{"name": "l40s", "nodeSelector": POOL["nodeSelector"]}])
        kubectl("delete", "namespace", *TENANTS, "--wait", seconds=180)
        kubectl("delete", "pv", *(f"{tenant}-{name}" for tenant in TENANTS for name in ("claas-deps", "model")))


def upgrade(kubectl: Kubectl, pools: list[Object]) -> None:
    """The release with these pools, its operator running on them."""
    chart = str(ROOT / "charts" / "claas")
    kubectl.helm(
        "upgrade", RELEASE, chart, "-n", NAMESPACE, "--reuse-values", "--set-json", f"pools={json.dumps(pools)}"
    )
    kubectl("rollout", "status", f"deploy/{RELEASE}-operator", "-n", NAMESPACE, "--timeout=120s", seconds=150)


def welcome(kubectl: Kubectl, cluster: Cluster, tenant: str) -> None:
    """What the administrator does for a tenant of such a pool: account, rights, model, and a key for its prefix."""
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": tenant}})
    key, word = f"key{secrets.token_hex(8)}", secrets.token_hex(16)
    kubectl.apply(
        *volume("claas-deps", bootstrap.dependencies(), "ReadOnlyMany", namespace=tenant),
        *volume("model", cluster.state / "volumes" / "student", "ReadOnlyMany", ["l40s"], namespace=tenant),
    )
    kubectl.apply(
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "trainer"}},
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "store"},
            "stringData": {"AWS_ACCESS_KEY_ID": key, "AWS_SECRET_ACCESS_KEY": word},
        },
        *(binding(role) for role in ("worker", "worker-lease")),
        namespace=tenant,
    )
    actions = ",".join(f"{right}:adapters/{tenant}/*" for right in ("Read", "Write", "List"))
    program = kubectl.get("deploy", f"{RELEASE}-seaweedfs", "-n", NAMESPACE)["spec"]["template"]["spec"]["containers"][
        0
    ]["command"][0]
    command = f"s3.configure -user={tenant} -access_key={key} -secret_key={word} -actions={actions} -apply"
    kubectl(
        "exec",
        f"deploy/{RELEASE}-seaweedfs",
        "-n",
        NAMESPACE,
        "--",
        "sh",
        "-c",
        f"echo '{command}' | {program} shell -master=127.0.0.1:9333",
        seconds=60,
    )


def binding(role: str) -> Object:
    return {
        "apiVersion": "rbac.authorization.k8s.io/v1",
        "kind": "RoleBinding",
        "metadata": {"name": role},
        "roleRef": {
            "apiGroup": "rbac.authorization.k8s.io",
            "kind": "ClusterRole",
            "name": f"{NAMESPACE}-{RELEASE}-{role}",
        },
        "subjects": [{"kind": "ServiceAccount", "name": "trainer"}],
    }


def adapter(tenant: str, where: str, name: str = ADAPTER) -> Object:
    return {
        "apiVersion": "claas.dev/v1alpha1",
        "kind": "LoraAdapter",
        "metadata": {"name": name, "namespace": tenant},
        "spec": {"baseModel": BASE_MODEL, "storage": {"uri": where}, "pool": POOL["name"]},
    }


def request(tenant: str) -> Object:
    return {
        "apiVersion": "claas.dev/v1alpha1",
        "kind": "DistillRequest",
        "metadata": {"name": "first", "namespace": tenant},
        "spec": {
            "adapterRef": {"name": ADAPTER},
            "samples": [story.sample("The capital of France is Paris, I think.")],
        },
    }


@pytest.mark.parametrize("tenant", TENANTS)
def test_the_job_runs_in_the_tenants_namespace_as_the_tenant(pair: Pair, tenant: str) -> None:
    pod, done = pair.workers[tenant], pair.requests[tenant]
    assert condition(done, "Complete")["reason"] == "Succeeded"
    assert done["status"]["loraUri"].startswith(f"s3://adapters/{tenant}/{ADAPTER}-")
    assert pod["metadata"]["namespace"] == tenant
    assert pod["spec"]["serviceAccountName"] == "trainer"
    references = [
        variable["valueFrom"]["secretKeyRef"]["name"]
        for variable in pod["spec"]["containers"][0]["env"]
        if "secretKeyRef" in variable.get("valueFrom", {})
    ]
    assert references and set(references) == {"store"}


@pytest.mark.parametrize(("tenant", "other"), [TENANTS, TENANTS[::-1]])
def test_its_key_opens_its_own_prefix_alone(pair: Pair, tenant: str, other: str) -> None:
    said = pair.kubectl(
        "exec", pair.workers[tenant]["metadata"]["name"], "-n", tenant, "--",
        "python3", "-c", LOOK, uri(tenant), uri(other),
    ).split()  # fmt: skip
    assert said == ["allowed", "allowed", "allowed", "StorageDenied", "StorageDenied", "StorageDenied"]


def test_an_adapter_in_anothers_prefix_is_refused(pair: Pair) -> None:
    green, greenhouse = TENANTS
    pair.kubectl.apply(adapter(green, uri(greenhouse, "stolen"), "stolen"))
    pair.kubectl.wait("la/stolen", "condition=Ready=False", namespace=green, seconds=story.LIMIT_SECONDS)
    assert condition(pair.kubectl.get("la", "stolen", "-n", green), "Ready")["reason"] == "StorageDenied"
