"""The chart in a cluster, as `make demo` and the end-to-end tests have it: images, volumes, `helm install`, readiness.

Two kinds of cluster. Our own (`cluster`): slim images are imported on its nodes, and the Python packages, the small
model and SeaweedFS' data are folders of this machine, mounted as `local` volumes. A given one (KUBECONFIG): full images
come from REGISTRY (`make push REGISTRY=…`), the model from the hub, volumes from the default storage class.
"""

from __future__ import annotations

import base64
import contextlib
import os
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import yaml

import bootstrap
import images
import models
from cluster import nodes, programs
from cluster.nodes import Cluster
from kubectl import CommandFailed, Kubectl, Object

ROOT = Path(__file__).resolve().parent.parent
NAMESPACE = "claas-system"
RELEASE = "claas"
USER = "user123"
# The second is the published API's example.
PREFIXES = ("s3://adapters/{namespace}/", "s3://my-bucket/loras/{namespace}/")
BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEACHER_SECONDS = 600
ENGINE_SECONDS = 300


@dataclass(frozen=True)
class Deployment:
    """An installed release."""

    kubectl: Kubectl
    given: bool
    tools: Path

    @contextlib.contextmanager
    def store(self) -> Iterator[None]:
        """The release's object store, reachable from here by `claas_store` inside the block."""
        secret = self.kubectl.get("secret", f"{RELEASE}-storage", "-n", NAMESPACE)["data"]
        with self.kubectl.forwarded(f"{RELEASE}-seaweedfs", 8333, namespace=NAMESPACE) as port:
            settings = {
                name: base64.b64decode(secret[name]).decode() for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")
            }
            settings |= {"AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}", "AWS_REGION": "us-east-1"}
            with mock.patch.dict(os.environ, settings):
                yield

    def logs(self, lines: int = 12) -> str:
        """The last log lines of every Pod of the release, for an error's end."""
        parts = [self.kubectl("get", "pod", "-n", NAMESPACE, "-o", "wide")]
        for pod in self.kubectl.get("pod", "-n", NAMESPACE):
            name = pod["metadata"]["name"]
            with contextlib.suppress(CommandFailed):  # it has not started: the table above says so
                parts.append(
                    f"--- {name}\n" + self.kubectl("logs", name, "-n", NAMESPACE, f"--tail={lines}", "--all-containers")
                )
        return "\n".join(parts)


def say(message: str) -> None:
    """Progress, on stderr."""
    bootstrap.say(message)


def reach() -> Cluster:
    """The cluster that KUBECONFIG names, or our own, started or reused."""
    if given := os.environ.get("KUBECONFIG"):
        return Cluster(Path(given), programs.ensure_kubectl(), Path("/nonexistent"))
    return nodes.up()


def install(cluster: Cluster, *, given: bool, full: bool = False) -> Deployment:
    """Install or upgrade the release and return when everything that it runs is Ready.

    Args:
        full: on our own cluster, the images that users build, gigabytes of packages included, instead of slim ones.

    Raises:
        CommandFailed, ClusterError: what did not, with the last log lines.
    """
    kubectl = Kubectl(cluster.kubeconfig, cluster.tools)
    kubectl.apply(
        {"apiVersion": "v1", "kind": "Namespace",
         "metadata": {"name": NAMESPACE, "labels": {"pod-security.kubernetes.io/enforce": "restricted"}}},
        {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": USER}},
    )  # fmt: skip
    values = _given_values() if given else _own_values(kubectl, cluster, full)
    values["storage"] = {"prefixes": [{"namespace": "*", "uri": uri} for uri in PREFIXES]}
    values["seaweedfs"]["buckets"] = [uri.split("/")[2] for uri in PREFIXES]
    deployment = Deployment(kubectl, given, cluster.tools)
    folder = bootstrap.cache_dir() / "values"
    folder.mkdir(parents=True, exist_ok=True)
    ours = folder / f"{os.getpid()}-release.yaml"
    ours.write_text(yaml.safe_dump(values))
    chart = ROOT / "charts" / "claas"
    files = [chart / "values-cpu.yaml", *([] if given or full else [chart / "values-slim.yaml"]), ours]
    try:
        say("helm install")
        kubectl.helm(
            "upgrade", "--install", RELEASE, str(chart), "-n", NAMESPACE, *(f"--values={file}" for file in files)
        )
        for part, seconds in (("seaweedfs", 120), ("operator", 180), ("teacher", TEACHER_SECONDS)):
            started = time.monotonic()
            kubectl(
                "rollout",
                "status",
                f"deploy/{RELEASE}-{part}",
                "-n",
                NAMESPACE,
                f"--timeout={seconds}s",
                seconds=seconds + 30,
            )
            say(f"{part} is ready after {time.monotonic() - started:.0f} s")
    except CommandFailed as error:
        raise CommandFailed(f"{error}\n{deployment.logs()}") from None
    finally:
        ours.unlink()
    return deployment


def uninstall(deployment: Deployment) -> None:
    """`helm uninstall`, and wait until no Pod, Job or Lease of the release is left."""
    deployment.kubectl.helm("uninstall", RELEASE, "-n", NAMESPACE, "--wait")
    ours = f"app.kubernetes.io/instance={RELEASE}"
    wait = ("wait", "pod,job,lease", "-n", NAMESPACE, "-l", ours, "--for=delete", "--timeout=120s")
    deployment.kubectl(*wait, seconds=130)


def _given_values() -> dict[str, Any]:
    registry = os.environ.get("REGISTRY")
    if not registry:
        sys.exit(
            "KUBECONFIG names a cluster of yours: set REGISTRY too, to where `make push REGISTRY=…` put the images"
        )
    key = images.sources_key()
    return {
        "image": {name: f"{registry.rstrip('/')}/claas-{name}:{key}" for name in images.NAMES},
        "model": {"id": BASE_MODEL},
        "teacher": {"model": {"id": BASE_MODEL}, "args": ["--max-model-len=2048"]},
        "seaweedfs": {"enabled": True},
    }


def _own_values(kubectl: Kubectl, cluster: Cluster, full: bool) -> dict[str, Any]:
    built = images.build(slim=not full)
    images.load(built)
    store: dict[str, Any] = {"enabled": True, "image": built["worker"].tag, "persistence": {"existingClaim": "demo-s3"}}
    if full:  # SeaweedFS is no dependency of ours: its program lies in the development environment
        slim = yaml.safe_load((ROOT / "charts" / "claas" / "values-slim.yaml").read_text())["seaweedfs"]
        store = {**slim, **store}
    folder = cluster.state / "volumes"
    for name in ("student", "teacher", "s3"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        # The kubelet changes a local volume's group at its first writable mount only, so ours are the Pods' from birth.
        shutil.chown(folder / name, 1000, 1000)
    kubectl.apply(
        *volume("claas-deps", bootstrap.dependencies(), "ReadOnlyMany"),
        *volume("demo-source", models.smollm2_dir(), "ReadOnlyMany"),
        *volume("demo-student", folder / "student", "ReadWriteMany", ["l40s"]),
        *volume("demo-teacher", folder / "teacher", "ReadWriteMany", ["a100"]),
        *volume("demo-s3", folder / "s3", "ReadWriteOnce", ["a100"]),
    )
    # The images keep their names, so Pods of earlier code must be told to go.
    build = {"podAnnotations": {"claas.dev/build": images.sources_key()}}
    gpu = {"requests": {"cpu": "100m", "memory": "1Gi"}, "limits": {"nvidia.com/gpu": 1, "memory": "8Gi"}}
    source = {"id": BASE_MODEL, "source": "file:///source"}
    return {
        "image": {name: image.tag for name, image in built.items()},
        "model": {**source, "volume": {"existingClaim": "demo-student"}},
        "teacher": {
            "model": {**source, "volume": {"existingClaim": "demo-teacher"}},
            "args": ["--max-model-len=2048"],
            "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
            "resources": gpu,
            **build,
        },
        "operator": build,
        "poolDefaults": {"resources": gpu, **build},
        "pools": [{"name": "l40s", "nodeSelector": {"nvidia.com/gpu.product": "NVIDIA-L40S"}}],
        "fetch": {
            "extraVolumes": [
                {"name": "source", "persistentVolumeClaim": {"claimName": "demo-source", "readOnly": True}}
            ],
            "extraVolumeMounts": [{"name": "source", "mountPath": "/source", "readOnly": True}],
        },
        "seaweedfs": store,
    }


def volume(
    name: str, path: Path, mode: str, on: list[str] | None = None, *, namespace: str = NAMESPACE
) -> list[Object]:
    """A folder of this machine, which the nodes see, as a bound volume and claim."""
    spec = {"accessModes": [mode], "storageClassName": "", "volumeMode": "Filesystem"}
    whole = name if namespace == NAMESPACE else f"{namespace}-{name}"
    where = {"key": "kubernetes.io/hostname", "operator": "In", "values": on or ["l40s", "a100"]}
    volume = {
        "apiVersion": "v1", "kind": "PersistentVolume", "metadata": {"name": whole},
        "spec": {
            **spec, "capacity": {"storage": "20Gi"}, "persistentVolumeReclaimPolicy": "Retain",
            "local": {"path": str(path.resolve())},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [where]}]}},
            "claimRef": {"namespace": namespace, "name": name},
        },
    }  # fmt: skip
    claim = {
        "apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": name, "namespace": namespace},
        "spec": {**spec, "volumeName": whole, "resources": {"requests": {"storage": "20Gi"}}},
    }  # fmt: skip
    return [volume, claim]
