"""The control plane alone: a real API server that needs no root, keeps what it knows, and dies with its parent."""

import json
import os
import signal
import ssl
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from cluster import programs
from cluster.controlplane import ControlPlane
from cluster.process import wait_for
from kubectl import CommandFailed, Kubectl

pytestmark = pytest.mark.controlplane

PARENT = """
import os, sys
from pathlib import Path
from cluster.controlplane import ControlPlane
control_plane = ControlPlane(Path(sys.argv[1]), controllers=False)
control_plane.start()
print(*(process.pid for process in control_plane.processes.values()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def kubectl(control_plane: ControlPlane) -> Kubectl:
    return Kubectl(control_plane.kubeconfig, programs.ensure_kubectl())


def test_a_token_is_taken_for_its_service_account(control_plane: ControlPlane, kubectl: Kubectl) -> None:
    token = kubectl("create", "token", "default").strip()
    request = urllib.request.Request(
        f"{control_plane.url}/apis/authentication.k8s.io/v1/selfsubjectreviews",
        data=b'{"apiVersion": "authentication.k8s.io/v1", "kind": "SelfSubjectReview"}',
        headers={"Authorization": f"Bearer {token}", "Content-Type": "application/json"},
    )
    trusted = ssl.create_default_context(cafile=str(control_plane.authority.certificate))
    with urllib.request.urlopen(request, timeout=10, context=trusted) as answer:
        user = json.load(answer)["status"]["userInfo"]
    assert user["username"] == "system:serviceaccount:default:default"


def test_what_rbac_allows_a_user_can_be_tried(control_plane: ControlPlane) -> None:
    nobody = Kubectl(control_plane.kubeconfig_of("nobody"), programs.ensure_kubectl())
    with pytest.raises(CommandFailed, match='User "nobody" cannot list resource "secrets"'):
        nobody("get", "secrets")


def test_jobs_make_pods_and_namespaces_end(kubectl: Kubectl) -> None:
    kubectl("create", "namespace", "short")
    kubectl("-n", "short", "create", "job", "one", "--image=none")
    kubectl("-n", "short", "wait", "--for=create", "pod", "-l", "job-name=one", "--timeout=30s")
    kubectl("delete", "namespace", "short", "--timeout=30s")


def test_a_restart_keeps_data_and_kubeconfig(tmp_path: Path) -> None:
    with ControlPlane(tmp_path, controllers=False) as control_plane:
        kubectl = Kubectl(control_plane.kubeconfig, programs.ensure_kubectl())
        kubectl("create", "configmap", "kept", "--from-literal=key=value")
        control_plane.stop()
        with pytest.raises(CommandFailed, match="refused"):
            kubectl("get", "configmap", "kept")
        control_plane.start()
        assert kubectl("get", "configmap", "kept", "-o", "jsonpath={.data.key}") == "value"


def test_everything_dies_with_a_killed_parent(tmp_path: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    ) as parent:
        assert parent.stdout is not None
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2
        assert all(Path(f"/proc/{pid}").exists() for pid in pids)
        os.kill(parent.pid, signal.SIGKILL)
        wait_for("etcd and the API server to end", lambda: not any(_runs(pid) for pid in pids), 10)


def _runs(pid: int) -> bool:
    """Whether it is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
