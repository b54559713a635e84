"""The two-node cluster does what ours relies on, seen from the host as a user sees it: a kubeconfig and kubectl.

It has a cluster of its own, beside the one that a developer may have running.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cluster import images, nodes
from cluster.layout import NODES, Layout
from cluster.nodes import Cluster
from cluster.process import wait_for
from cluster.programs import PAUSE_IMAGE, PAUSE_TAR
from kubectl import CommandFailed, Kubectl

pytestmark = [pytest.mark.cluster, pytest.mark.skipif(os.geteuid() != 0, reason="needs root"), pytest.mark.timeout(600)]

L40S, A100 = NODES["l40s"], NODES["a100"]
IMAGE = "localhost/claas-cluster-test:1"
RESTRICTED = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An image with Python."""
    folder = tmp_path_factory.mktemp("image")
    (folder / "Dockerfile").write_text(
        'ARG BASE=python:3.11-slim-bookworm\nFROM ${BASE}\nUSER 1000\nENTRYPOINT ["python3", "-u"]\n'
    )
    images.build(IMAGE, folder / "Dockerfile", folder, base=images.base())
    images.export(IMAGE, folder / "image.tar")
    return folder / "image.tar"


@pytest.fixture(scope="module")
def own(archive: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A cluster of this module's own, with the image on both nodes; ended and forgotten afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CLAAS_CLUSTER_DIR", str(tmp_path_factory.mktemp("cluster") / "state"))
        try:
            cluster = nodes.up()
            nodes.load(archive, list(NODES))
            yield cluster
        finally:
            nodes.down(images_too=True)


@pytest.fixture(scope="module")
def kubectl(own: Cluster) -> Kubectl:
    """kubectl on that cluster, through the kubeconfig that ``up`` has written."""
    return Kubectl(own.kubeconfig, own.tools)


@pytest.fixture
def namespace(kubectl: Kubectl, request: pytest.FixtureRequest) -> Iterator[str]:
    """A namespace of the test's own, in which only restricted Pods may run."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower())[:50].strip("-")
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    kubectl.apply({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}})
    kubectl("-n", name, "wait", "--for=create", "serviceaccount/default", "--timeout=30s")
    yield name
    kubectl("delete", "namespace", name, "--wait=false")


def pod_spec(code: str, *, product: str | None = None, gpus: int = 0, **more: Any) -> dict[str, Any]:
    """A Pod that runs Python ``code`` as the restricted policy demands."""
    resources = {"limits": {"nvidia.com/gpu": str(gpus)}} if gpus else {}
    container = {"name": "main", "image": IMAGE, "args": ["-c", code], "resources": resources, **more}
    return {
        "restartPolicy": "Never",
        "nodeSelector": {"nvidia.com/gpu.product": product} if product else {},
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [{**container, "securityContext": RESTRICTED}],
    }


def job(name: str, code: str, *, backoff: int = 0, **options: Any) -> dict[str, Any]:
    spec = {"backoffLimit": backoff, "template": {"spec": pod_spec(code, **options)}}
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": name}, "spec": spec}


def server(name: str, product: str) -> list[dict[str, Any]]:
    """A Pod that answers HTTP with its node's name, and its Service."""
    code = (
        "import http.server, os\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers(); self.wfile.write(os.environ['NODE'].encode())\n"
        "http.server.HTTPServer(('', 8000), Handler).serve_forever()\n"
    )
    node = {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}}
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    spec = pod_spec(code, product=product, env=[node], readinessProbe=probe)
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": f"{name}-0", "labels": {"app": name}}, "spec": spec}
    ports = [{"port": 80, "targetPort": 8000}]
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}}
    return [pod, {**service, "spec": {"selector": {"app": name}, "ports": ports}}]


def ask(kubectl: Kubectl, namespace: str, pod: str, url: str) -> str:
    """What ``url`` answers to a Pod, tried for 20 s: a Service follows the readiness of its Pod by a second or two."""
    code = (
        "import sys, time, urllib.request\n"
        "for attempt in range(40):\n"
        "    try:\n"
        "        print(urllib.request.urlopen(sys.argv[1], timeout=2).read().decode()); break\n"
        "    except OSError as error:\n"
        "        print(error, file=sys.stderr); time.sleep(0.5)\n"
    )
    return kubectl("-n", namespace, "exec", pod, "--", "python3", "-c", code, url, seconds=120).strip()


def test_pods_reach_each_other_through_services_and_dns_across_nodes(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(*server("on-l40s", L40S.product), *server("on-a100", A100.product), namespace=namespace)
    kubectl(
        "-n", namespace, "wait", "--for=condition=Ready", "pod/on-l40s-0", "pod/on-a100-0", "--timeout=60s", seconds=70
    )
    for here, there in (("l40s", "a100"), ("a100", "l40s")):
        for host in (f"on-{there}", f"on-{there}.{namespace}.svc.cluster.local"):
            assert ask(kubectl, namespace, f"on-{here}-0", f"http://{host}/") == there
        assert ask(kubectl, namespace, f"on-{here}-0", f"http://on-{here}/") == here, (
            "a Pod reaches itself by its Service"
        )


def test_nothing_outside_is_reachable_from_a_pod(kubectl: Kubectl, namespace: str) -> None:
    code = (
        "import socket\n"
        "try: socket.create_connection(('192.0.2.1', 53), 10); print('reached')\n"
        "except OSError as error: print(error)\n"
    )
    kubectl.apply(job("call-home", code), namespace=namespace)
    kubectl("-n", namespace, "wait", "--for=condition=Complete", "job/call-home", "--timeout=60s", seconds=70)
    assert "No route to host" in kubectl("-n", namespace, "logs", "job/call-home")


def test_a_restricted_job_with_a_gpu_lands_on_its_node_without_privileges(kubectl: Kubectl, namespace: str) -> None:
    code = (
        "import os\n"
        "status = dict(line.split(':', 1) for line in open('/proc/self/status'))\n"
        "print(os.getuid(), *(status[key].strip() for key in ('Seccomp', 'NoNewPrivs', 'CapBnd')))\n"
    )
    kubectl.apply(job("gpu", code, product=L40S.product, gpus=1), namespace=namespace)
    kubectl("-n", namespace, "wait", "--for=condition=Complete", "job/gpu", "--timeout=60s", seconds=70)
    assert kubectl("-n", namespace, "logs", "job/gpu").split() == ["1000", "2", "1", "0000000000000000"]
    (pod,) = kubectl.get("pod", "-n", namespace, "-l", "job-name=gpu")
    assert pod["spec"]["nodeName"] == "l40s"


def test_a_pod_that_is_not_restricted_is_refused(kubectl: Kubectl, namespace: str) -> None:
    with pytest.raises(CommandFailed, match=r'violates PodSecurity "restricted:latest"'):
        kubectl("-n", namespace, "run", "plain", f"--image={IMAGE}")


def test_three_gpus_do_not_fit_on_a_node(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(job("three", "pass", product=A100.product, gpus=3), namespace=namespace)
    condition = '--for=jsonpath={.status.conditions[?(@.type=="PodScheduled")].reason}=Unschedulable'
    kubectl("-n", namespace, "wait", "--for=create", "pod", "-l", "job-name=three", "--timeout=30s")
    kubectl("-n", namespace, "wait", condition, "pod", "-l", "job-name=three", "--timeout=30s")
    (pod,) = kubectl.get("pod", "-n", namespace, "-l", "job-name=three")
    assert "1 Insufficient nvidia.com/gpu" in pod["status"]["conditions"][0]["message"]


def test_exec_logs_and_port_forward_work_from_the_host(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(*server("web", A100.product), namespace=namespace)
    kubectl("-n", namespace, "wait", "--for=condition=Ready", "pod/web-0", "--timeout=60s", seconds=70)
    assert kubectl("-n", namespace, "exec", "web-0", "--", "python3", "-c", "print(6 * 7)").strip() == "42"
    with kubectl.forwarded("web", 80, namespace=namespace) as port:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=10) as answer:
            assert answer.read() == b"a100"
    assert '"GET / HTTP/1.1" 200' in kubectl("-n", namespace, "logs", "web-0")


def test_a_large_answer_comes_whole_through_the_forwarder(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(job("chatty", "for n in range(50_000): print(n, 'x' * 90)"), namespace=namespace)
    kubectl("-n", namespace, "wait", "--for=condition=Complete", "job/chatty", "--timeout=60s", seconds=70)
    expected = "".join(f"{n} {'x' * 90}\n" for n in range(50_000))
    assert kubectl("-n", namespace, "logs", "job/chatty") == expected, "5 MB, less than what makes the kubelet rotate"


def test_a_killed_container_fails_its_job(kubectl: Kubectl, namespace: str) -> None:
    kubectl.apply(
        job("victim", "import time; print('here', flush=True); time.sleep(600)", product=L40S.product),
        namespace=namespace,
    )
    kubectl("-n", namespace, "wait", "--for=create", "pod", "-l", "job-name=victim", "--timeout=30s")
    kubectl(
        "-n", namespace, "wait", "--for=condition=Ready", "pod", "-l", "job-name=victim", "--timeout=60s", seconds=70
    )
    (pod,) = kubectl.get("pod", "-n", namespace, "-l", "job-name=victim")
    container = pod["status"]["containerStatuses"][0]["containerID"].removeprefix("containerd://")
    ctr = Layout.load(Layout.default().state).programs / "ctr"
    kill = [*nodes.enter("l40s"), str(ctr), "-n", "k8s.io", "task", "kill", "--signal", "SIGKILL", container]
    subprocess.run(kill, check=True, timeout=30)
    kubectl("-n", namespace, "wait", "--for=condition=Failed", "job/victim", "--timeout=60s", seconds=70)
    pod = kubectl.get("pod", pod["metadata"]["name"], "-n", namespace)
    ended = pod["status"]["containerStatuses"][0]["state"]["terminated"]
    assert (pod["status"]["phase"], ended["exitCode"], ended["reason"]) == ("Failed", 137, "Error")


def test_a_memory_limit_is_enforced(kubectl: Kubectl, namespace: str) -> None:
    hog = job("hog", "x = bytearray(300 << 20); print(len(x))")
    hog["spec"]["template"]["spec"]["containers"][0]["resources"] = {"limits": {"memory": "64Mi"}}
    kubectl.apply(hog, namespace=namespace)
    kubectl("-n", namespace, "wait", "--for=condition=Failed", "job/hog", "--timeout=60s", seconds=70)
    (pod,) = kubectl.get("pod", "-n", namespace, "-l", "job-name=hog")
    assert pod["status"]["containerStatuses"][0]["state"]["terminated"]["reason"] == "OOMKilled"


def test_a_local_volume_hands_a_restricted_pod_the_machines_disk(
    kubectl: Kubectl, namespace: str, tmp_path: Path
) -> None:
    (tmp_path / "weights").write_text("real bytes")
    for folder in (tmp_path, *tmp_path.parents[:2]):
        folder.chmod(0o755)
    affinity = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["l40s"]}
    name = f"{namespace[:30]}-disk"
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadOnlyMany"],
        "storageClassName": name,
        "persistentVolumeReclaimPolicy": "Retain",
        "local": {"path": str(tmp_path)},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [affinity]}]}},
    }
    claim = {"accessModes": ["ReadOnlyMany"], "storageClassName": name, "resources": {"requests": {"storage": "1Gi"}}}
    reader = job("reader", "print(open('/disk/weights').read())")
    spec = reader["spec"]["template"]["spec"]
    spec["volumes"] = [{"name": "disk", "persistentVolumeClaim": {"claimName": "disk", "readOnly": True}}]
    spec["containers"][0]["volumeMounts"] = [{"name": "disk", "mountPath": "/disk", "readOnly": True}]
    kubectl.apply(
        {"apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": name}, "spec": volume},
        {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "disk"}, "spec": claim},
        reader,
        namespace=namespace,
    )
    try:
        kubectl("-n", namespace, "wait", "--for=condition=Complete", "job/reader", "--timeout=60s", seconds=70)
        assert kubectl("-n", namespace, "logs", "job/reader").strip() == "real bytes"
    finally:
        kubectl("delete", "persistentvolume", name, "--wait=false")


def test_up_reuses_a_healthy_cluster(own: Cluster, kubectl: Kubectl) -> None:
    uid = kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}")
    started = time.monotonic()
    assert nodes.up() == own
    assert time.monotonic() - started < 5
    assert kubectl("get", "namespace", "kube-system", "-o", "jsonpath={.metadata.uid}") == uid


def test_load_skips_what_a_node_has(own: Cluster, archive: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes.load(archive, list(NODES))
    assert sorted(re.findall(r"(\w+) has (\S+) already", capsys.readouterr().err)) == [("a100", IMAGE), ("l40s", IMAGE)]
    nodes.load(Layout.load(Layout.default().state).programs / PAUSE_TAR, ["l40s"])
    assert f"l40s has {PAUSE_IMAGE} already" in capsys.readouterr().err, "an OCI archive is recognised as well"


# From here on the tests end the cluster, in the order in which they stand


def test_after_a_kill_nothing_stays_and_the_images_are_still_there(
    kubectl: Kubectl, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = Layout.default()
    kubectl.apply(*server("doomed", L40S.product))
    kubectl("wait", "--for=condition=Ready", "pod/doomed-0", "--timeout=60s", seconds=70)
    processes, top = running(layout), int(re.findall(r"process +(\d+)", nodes.status())[0])
    assert len(processes) > 10
    os.kill(top, signal.SIGKILL)
    wait_for("the end of every process", lambda: not running(layout), 20)
    assert nodes.status().startswith("down")

    nodes.up()
    capfd.readouterr()
    nodes.load(archive, list(NODES))
    assert capfd.readouterr().err.count("already") == 2
    assert kubectl("get", "pods", "-o", "name") == "", "the new cluster knows nothing of the old one's Pods"
    kubectl.apply(*server("reborn", L40S.product))
    kubectl("wait", "--for=condition=Ready", "pod/reborn-0", "--timeout=60s", seconds=70)
    ctr = [*nodes.enter("l40s"), str(Layout.load(layout.state).programs / "ctr"), "-n", "k8s.io"]
    containers = subprocess.run(
        [*ctr, "containers", "list", "-q"], capture_output=True, text=True, check=True, timeout=30
    )
    assert len(containers.stdout.split()) == 2, "reborn-0 and its sandbox, and none of the old cluster"


def test_damaged_images_are_given_up_in_one_line(
    own: Cluster, archive: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    layout = Layout.default()
    nodes.down()
    database = layout.data / "a100" / "containerd" / "io.containerd.metadata.v1.bolt" / "meta.db"
    database.write_bytes(b"\xff" * database.stat().st_size)
    nodes.up()
    said = [line for line in capfd.readouterr().err.splitlines() if "damaged" in line]
    assert len(said) == 1
    assert said[0].startswith("cluster: node a100: starting without stored images")
    nodes.load(archive, list(NODES))
    said_on_load = capfd.readouterr().err
    assert "l40s has" in said_on_load
    assert "on a100 in" in said_on_load


def test_down_leaves_nothing_but_logs(own: Cluster) -> None:
    layout = Layout.default()
    assert running(layout)
    nodes.down()
    assert not running(layout)
    assert [path.name for path in layout.state.iterdir()] == ["log"]
    assert not list(Path("/sys/fs/cgroup").glob(f"**/{layout.cgroup}"))
    assert str(layout.state) not in Path("/proc/self/mounts").read_text()
    assert str(layout.data) not in Path("/proc/self/mounts").read_text()
    names = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True).stdout
    assert not {"l40s", "a100"} & set(names.split())
    assert {path.name for path in (layout.data / "l40s").iterdir()} == {"containerd"}


def running(layout: Layout) -> list[int]:
    """Every process that has to do with the cluster: its command names a folder of it, or it is in a Pod."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            command, cgroups = (folder / "cmdline").read_text(errors="replace"), (folder / "cgroup").read_text()
            if str(layout.state) in command or str(layout.data) in command or layout.cgroup in cgroups:
                found.append(int(folder.name))
    return found
