"""What works by kubeconfig alone: doctor, deploy, serve, logs; and how a cluster's refusals are told."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from claas_operator.cli.exits import Exit
from clikit import Claas
from cluster import programs
from objectstore import free_port
from operatorkit import Raw
from operatorstage import GROUP
from shimstage import ShimStage

pytestmark = pytest.mark.controlplane

GPU_NODE = {"nvidia.com/gpu.product": "NVIDIA-L40S"}
TEACHER_NODE = {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}


def node(name: str, labels: dict[str, str], **allocatable: str) -> Raw:
    """A Node object; no kubelet is behind it."""
    return {"metadata": {"name": name, "labels": labels}, "status": {"allocatable": allocatable}}


@pytest.fixture
def nodes(stage: ShimStage) -> Iterator[None]:
    """Two nodes, as the chart's defaults want them."""
    made = {
        "l40s": (GPU_NODE, {"cpu": "32", "memory": "256Gi", "nvidia.com/gpu": "4"}),
        "a100": (TEACHER_NODE, {"cpu": "32", "memory": "512Gi", "nvidia.com/gpu": "1"}),
    }
    for name, (labels, allocatable) in made.items():
        stage.api("POST", "/api/v1/nodes", {"metadata": {"name": name, "labels": labels}})
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        ready = {"type": "Ready", "status": "True", "reason": "Test", "message": "", "lastHeartbeatTime": now}
        status = {"allocatable": allocatable, "capacity": allocatable, "conditions": [ready]}
        stage.api("PATCH", f"/api/v1/nodes/{name}/status", {"status": status})
        stage.wait(f"{name} to be untainted", lambda name=name: untaint(stage, name))
    yield
    for name in made:
        stage.api("DELETE", f"/api/v1/nodes/{name}")


def untaint(stage: ShimStage, name: str) -> bool:
    """Whether the node has no taint (a new one has node.kubernetes.io/not-ready until its controller has looked)."""
    stage.api("PATCH", f"/api/v1/nodes/{name}", {"spec": {"taints": None}})
    return not stage.api("GET", f"/api/v1/nodes/{name}")["spec"].get("taints")


def checks(done: Any) -> dict[str, Raw]:
    """The checks of --output json, by what was looked at."""
    return {check["what"]: check for check in done.json["checks"]}


# doctor


@pytest.fixture
def installed(stage: ShimStage) -> Iterator[None]:
    """What the chart would have left behind of the stage's release: a Deployment and the settings."""
    name = f"{stage.instance}-operator"
    labels = {
        "app.kubernetes.io/name": "claas",
        "app.kubernetes.io/component": "operator",
        "app.kubernetes.io/instance": stage.instance,
    }
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "operator", "image": "none"}]}}
    body = {
        "metadata": {"name": name, "labels": labels},
        "spec": {"replicas": 0, "selector": {"matchLabels": labels}, "template": pod},
    }
    deployments, maps = (
        f"/apis/apps/v1/namespaces/{stage.home}/deployments",
        f"/api/v1/namespaces/{stage.home}/configmaps",
    )
    stage.api("POST", deployments, body)
    settings = (stage.folder / "config.yaml").read_text()
    stage.api("POST", maps, {"metadata": {"name": name}, "data": {"config.yaml": settings}})
    yield
    stage.api("DELETE", f"{deployments}/{name}")
    stage.api("DELETE", f"{maps}/{name}")


def test_a_healthy_installation_has_nothing_wrong(admin: Claas, stage: ShimStage, installed: None, nodes: None) -> None:
    done = admin("doctor", "-o", "json")
    found = checks(done)
    assert [check for check in found.values() if check["level"] == "wrong"] == []
    assert done.code == 0
    assert found["leader"]["says"].endswith("leads")
    assert found["operator"]["says"].startswith(f"release {stage.instance} in namespace {stage.home}")
    assert "2 node(s) with any node" in found["pool l40s"]["says"]
    assert found["rights"]["says"] == f"you may teach in namespace {stage.team}"
    assert admin("health").code == 0


def test_what_is_wrong_is_said_with_its_remedy(admin: Claas, stage: ShimStage, installed: None, nodes: None) -> None:
    stage.adapter("lost", ready=False)
    stage.request("waits", "lost")
    outside = {"baseModel": "org/base", "storage": {"uri": "s3://elsewhere/x/"}}
    body = {"apiVersion": "claas.dev/v1alpha1", "kind": "LoraAdapter", "metadata": {"name": "outside"}, "spec": outside}
    stage.api("POST", f"{GROUP}/namespaces/{stage.team}/loraadapters", body)
    stage.wait("its condition", lambda: (stage.see_adapter("outside").get("status") or {}).get("conditions"))
    pod = {"metadata": {"name": "stuck", "labels": {"app.kubernetes.io/instance": stage.instance}}}
    pod |= {"spec": {"containers": [{"name": "worker", "image": "none"}]}}
    stage.api("POST", f"/api/v1/namespaces/{stage.home}/pods", pod)
    waiting = {"name": "worker", "ready": False, "restartCount": 0, "image": "none", "imageID": ""}
    waiting |= {"state": {"waiting": {"reason": "ImagePullBackOff", "message": "no such image"}}}
    stage.pod_status("stuck", {"phase": "Pending", "containerStatuses": [waiting]})
    try:
        done = admin("doctor", "-o", "json")
        found = checks(done)
        assert done.code == Exit.FAILED
        assert "1 thing(s) wrong" in done.err
        assert found["Pod stuck"]["says"] == "ImagePullBackOff: no such image"
        assert "push the images" in found["Pod stuck"]["fix"]
        assert found[f"adapter {stage.team}/outside"]["says"].startswith("StorageDenied: ")
        assert all(check["fix"] for check in found.values() if check["level"] != "ok")
        table = admin("doctor")
        assert table.out.startswith("WHAT\tIS\tSAYS\tFIX\n")
        assert len(table.rows) == len(done.json["checks"])
    finally:
        stage.api("DELETE", f"/api/v1/namespaces/{stage.home}/pods/stuck", {"gracePeriodSeconds": 0})
        stage.api("DELETE", f"{GROUP}/namespaces/{stage.team}/loraadapters/outside")


def test_a_cluster_without_claas(admin: Claas) -> None:
    done = admin("doctor", "--release", "nowhere", "--release-namespace", "default", "-o", "json")
    found = checks(done)
    assert done.code == Exit.FAILED
    assert found["operator"] == {
        "what": "operator",
        "level": "wrong",
        "says": "there is no release nowhere in namespace default",
        "fix": "claas deploy; or name another with --release and --release-namespace",
    }


def test_a_tenant_s_doctor_says_what_it_may_not_see(stage: ShimStage) -> None:
    kubeconfig = str(stage.control_plane.kubeconfig_of("somebody"))
    done = Claas({"KUBECONFIG": kubeconfig, "CLAAS_NAMESPACE": stage.team})("doctor", "-o", "json")
    found = checks(done)
    assert found["operator"]["level"] == "warning"
    assert "cannot be seen" in found["operator"]["says"]
    assert found["rights"]["level"] == "ok"


def test_an_api_server_that_is_not_there(tmp_path: Path, stage: ShimStage) -> None:
    config = yaml.safe_load(stage.control_plane.kubeconfig.read_text())
    config["clusters"][0]["cluster"]["server"] = "https://127.0.0.1:9"
    file = tmp_path / "kubeconfig"
    file.write_text(yaml.safe_dump(config))
    for words in (["get", "adapters"], ["distill", "--adapter", "a", "--prompt", "p", "--response", "r"]):
        done = Claas({"KUBECONFIG": str(file)})(*words)
        assert (done.code, done.out) == (Exit.UNREACHABLE, "")
        assert "no answer from the API server https://127.0.0.1:9" in done.err
    assert "no answer" in Claas({"KUBECONFIG": str(file)})("doctor").out


@pytest.mark.parametrize("text", ["", "[]", "a: [", "kind: Config\nclusters: 7"])
def test_a_kubeconfig_that_is_none(tmp_path: Path, text: str) -> None:
    file = tmp_path / "kubeconfig"
    file.write_text(text)
    done = Claas({"KUBECONFIG": str(file)})("get", "adapters")
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert "kubeconfig" in done.err


def test_an_unknown_context(stage: ShimStage) -> None:
    done = Claas({"KUBECONFIG": str(stage.control_plane.kubeconfig)})("get", "adapters", "--context", "nope")
    assert (done.code, done.out) == (Exit.USAGE, "")


# deploy


@pytest.fixture(scope="module")
def helm() -> dict[str, str]:
    """An environment in which helm is on the PATH."""
    return {"PATH": f"{programs.ensure_kubectl()}:{os.environ['PATH']}"}


@pytest.fixture
def deployer(stage: ShimStage, helm: dict[str, str], tmp_path: Path) -> Claas:
    """An administrator with helm."""
    home = {"HELM_CACHE_HOME": str(tmp_path), "HELM_CONFIG_HOME": str(tmp_path), "HELM_DATA_HOME": str(tmp_path)}
    return Claas({"KUBECONFIG": str(stage.control_plane.kubeconfig)} | helm | home)


CREDENTIALS = ["--set", "storage.credentials.accessKeyId=k,storage.credentials.secretAccessKey=s"]
# The stage has brought the kinds, and there is no storage class.
CLASSES = ["--set", "model.volume.existingClaim=m,teacher.model.volume.existingClaim=t,crds.install=false"]


def test_a_cluster_without_fitting_nodes_is_not_installed_to(deployer: Claas, stage: ShimStage) -> None:
    done = deployer("deploy", "-n", stage.home, "--release", "trial", *CREDENTIALS, "-o", "json")
    assert done.code == Exit.FAILED
    assert not done.json["installed"]
    assert "not fit" in done.err
    assert "crds.install=false" in done.json["checks"][2]["fix"], "the kinds are not this release's"
    deployments = stage.api("GET", f"/apis/apps/v1/namespaces/{stage.home}/deployments")["items"]
    assert "trial-operator" not in [item["metadata"]["name"] for item in deployments]


def test_a_dry_run_checks_everything_and_changes_nothing(deployer: Claas, stage: ShimStage, nodes: None) -> None:
    words = ["deploy", "--dry-run", "-n", stage.home, "--release", "trial", *CREDENTIALS, *CLASSES]
    done = deployer(*words, "-o", "json")
    found = checks(done)
    assert [check for check in found.values() if check["level"] == "wrong"] == []
    assert done.code == 0, done.err
    assert "nvidia.com/gpu.product=NVIDIA-L40S: room for 4, 4 GPUs allocatable" in found["pool l40s"]["says"]
    assert "1 GPUs allocatable" in found["teacher"]["says"]
    assert found["API server"]["says"] == "would take the objects"
    assert found["server version"]["level"] == "ok"
    assert "objects would be installed" in done.err
    names = [i["metadata"]["name"] for i in stage.api("GET", f"/api/v1/namespaces/{stage.home}/configmaps")["items"]]
    assert "trial-operator" not in names


def test_wrong_labels_are_answered_with_those_that_there_are(deployer: Claas, stage: ShimStage, nodes: None) -> None:
    words = ["deploy", "--dry-run", "-n", stage.home, "--release", "trial", *CREDENTIALS, *CLASSES]
    done = deployer(
        *words, "--set-json", 'pools=[{"name":"h100","nodeSelector":{"nvidia.com/gpu.product":"H100"}}]', "-o", "json"
    )
    check = checks(done)["pool h100"]
    assert check["level"] == "wrong"
    assert "NVIDIA-A100-SXM4-80GB, NVIDIA-L40S" in check["fix"]


def test_quota_secret_and_storage_class_are_looked_at(deployer: Claas, stage: ShimStage, nodes: None) -> None:
    quota = {"metadata": {"name": "small"}, "spec": {"hard": {"requests.nvidia.com/gpu": "0"}}}
    base = f"/api/v1/namespaces/{stage.home}/resourcequotas"
    stage.api("POST", base, quota)
    try:
        stage.wait("the quota", lambda: (stage.api("GET", f"{base}/small").get("status") or {}).get("hard"))
        secret = ["--set", "storage.credentials.existingSecret=mine"]
        done = deployer("deploy", "--dry-run", "-n", stage.home, "--release", "trial", *secret, "-o", "json")
    finally:
        stage.api("DELETE", f"{base}/small")
    found = checks(done)
    assert found["quota"]["level"] == "wrong"
    assert "requests.nvidia.com/gpu: 2 wanted, 0 left" in found["quota"]["says"]
    assert found["Secret mine"]["level"] == "wrong"
    assert "kubectl create secret generic mine --from-literal=AWS_ACCESS_KEY_ID=…" in found["Secret mine"]["fix"]
    assert found["volume trial-model"]["says"] == "names no storage class, and the cluster has no default one"


@pytest.fixture
def real(deployer: Claas, stage: ShimStage) -> Iterator[list[str]]:
    """`claas deploy` of a release that goes with the test. Its admission policy would bind the stage's operator too."""
    yield [
        "deploy",
        "-n",
        stage.home,
        "--release",
        "real",
        *CREDENTIALS,
        *CLASSES,
        "--set",
        "admissionPolicy.enabled=false",
    ]
    # No hooks: there is no kubelet to run their Pods.
    uninstall = ["helm", "uninstall", "real", "-n", stage.home, "--no-hooks"]
    subprocess.run(uninstall, env=os.environ | deployer.environment, capture_output=True, timeout=60, check=False)


def test_deploy_installs_and_again_upgrades(deployer: Claas, stage: ShimStage, nodes: None, real: list[str]) -> None:
    done = deployer(*real)
    assert done.code == 0, done.err
    assert done.out.startswith("WHAT\tIS\tSAYS\tFIX\n")
    assert "release real is installed" in done.err
    path = f"/apis/apps/v1/namespaces/{stage.home}/deployments/real-operator"
    assert stage.api.get(path) is not None
    assert deployer(*real, "--set", "operator.replicas=2").code == 0
    assert stage.api("GET", path)["spec"]["replicas"] == 2


def test_what_the_chart_refuses_is_said_in_its_words(deployer: Claas) -> None:
    done = deployer("deploy", "--dry-run", "--set", "poolDefault.batch=3")
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert "poolDefault" in done.err


def test_render_prints_manifests(deployer: Claas) -> None:
    done = deployer("deploy", "--render", *CREDENTIALS)
    kinds = {item["kind"] for item in yaml.safe_load_all(done.out)}
    assert {"Deployment", "CustomResourceDefinition"} <= kinds


def test_without_helm(stage: ShimStage) -> None:
    done = Claas({"KUBECONFIG": str(stage.control_plane.kubeconfig), "PATH": "/nonexistent"})("deploy", "--dry-run")
    assert done.code == Exit.FAILED
    assert "helm is not on the PATH" in done.err


# serve


def test_serve_is_the_rest_api_for_a_kubeconfig(admin: Claas, stage: ShimStage, installed: None) -> None:
    port = free_port()
    admin.environment.update(stage.store.environment)
    release = ["--release", stage.instance, "--release-namespace", stage.home]
    running = admin.start("serve", "--port", str(port), "--auth", "None", "--auth-namespace", stage.team, *release)
    url = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        assert running.process.poll() is None, running.end()
        try:
            return httpx.get(f"{url}/readyz", trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    stage.wait("the server", answers)
    stage.adapter("served")
    words = ["distill", "--adapter", "served", "--prompt", "SECRET", "--response", "r", "-o", "json"]
    by_url = Claas({"CLAAS_URL": url})
    assert by_url(*words).json["state"] == "Complete"
    assert checks(by_url("doctor", "-o", "json"))["transport"]["level"] == "warning"
    done = running.end(signal.SIGINT)
    assert done.code == 0
    assert "SECRET" not in done.err


# logs


def test_logs_of_a_request_without_a_worker(admin: Claas, stage: ShimStage) -> None:
    stage.adapter("silent", ready=False)
    stage.request("quiet", "silent")
    done = admin("logs", "quiet")
    assert (done.code, done.out) == (Exit.NOT_FOUND, "")
    assert "it waits: claas get request quiet" in done.err


def test_logs_of_a_worker_that_is_gone(admin: Claas, stage: ShimStage) -> None:
    stage.adapter("gone")
    stage.request("old", "gone")
    stage.complete("old")
    stage.api("PATCH", f"{stage.request_path('old')}/status", {"status": {"worker": "claas-gone-1"}})
    done = admin("logs", "old")
    assert done.code == Exit.NOT_FOUND
    assert "Pod claas-gone-1 is gone" in done.err


def test_logs_are_not_for_urls() -> None:
    done = Claas({"CLAAS_URL": "https://x.test"})("logs", "x", "--help")
    assert done.code == 0
    assert "--url" not in done.out
    assert re.search(r"By kubeconfig only", done.out)
