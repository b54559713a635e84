"""Container images without a Docker engine and a registry: a Debian base, Dockerfile builds, archives for nodes.

No base image can be pulled where the tests run, so every Dockerfile takes ``ARG BASE=python:3.11-slim-bookworm``, and
``base`` makes a stand-in for that one from Debian's packages: the same Python, ``python`` and ``pip`` on the PATH.

    name = base(["g++"])
    build("localhost/claas-worker:1", Path("worker/Dockerfile"), Path("."), base=name)
    export("localhost/claas-worker:1", Path("worker.tar"))      # for `nodes.load`
"""

import configparser
import functools
import hashlib
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import bootstrap
from cluster import programs
from cluster.process import ClusterError, run, run_with_progress, say

SUITE = "bookworm"
PYTHON = ["ca-certificates", "python3", "python3-pip", "python-is-python3"]
RECIPE = "1"  # part of a base image's key: raise it when the way it is made changes

DEBOOTSTRAP_SECONDS = 1200
BUILD_SECONDS = 2400
EXPORT_SECONDS = 900

CA_CERTIFICATES = Path("/etc/ssl/certs")
PIP_NETWORK_OPTIONS = (
    *("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "proxy"),
    *("cert", "client-cert", "timeout", "default-timeout", "retries"),
)


def base(packages: Sequence[str] = ()) -> str:
    """The name of a Debian image with Python 3.11, pip, CA certificates and ``packages``, made on first use.

    Raises:
        ClusterError: it could not be made; with the end of debootstrap's log.
    """
    programs.ensure_packages(programs.IMAGE_PACKAGES)
    wanted = sorted({*PYTHON, *packages})
    key = hashlib.sha256("\n".join([RECIPE, SUITE, *wanted]).encode()).hexdigest()[:12]
    name = f"localhost/claas-base:{key}"
    with programs.cache_lock(f"image-{key}"):
        if not _exists(name):
            folder = programs.cached(f"base-{key}", functools.partial(_debootstrap, wanted))
            _import(name, folder / "root.tar")
    return name


def _debootstrap(packages: Sequence[str], into: Path, log: Path) -> None:
    if os.geteuid() != 0:
        raise ClusterError(
            "making a Debian base image needs root (debootstrap); or set BASE to an image with Python 3.11"
        )
    with tempfile.TemporaryDirectory(dir=into) as scratch:
        root = Path(scratch) / "root"
        command = ["debootstrap", "--variant=minbase", f"--include={','.join(packages)}", SUITE, str(root), *_mirror()]
        run_with_progress(
            f"making a Debian base image with {' '.join(packages)}", command, log, seconds=DEBOOTSTRAP_SECONDS
        )
        for leftover in [
            *root.glob("var/cache/apt/archives/*.deb"),
            *root.glob("var/lib/apt/lists/*_*"),
            *root.glob("var/log/*.log"),
        ]:
            leftover.unlink()
        # As in the official Python images, pip installs for the whole system: the container is the environment
        for marker in root.glob("usr/lib/python3*/EXTERNALLY-MANAGED"):
            marker.unlink()
        # Nothing else may be left of the machine on which it was made
        for name in ("etc/resolv.conf", "etc/hostname"):
            (root / name).write_text("")
        run(
            [
                "tar",
                "--create",
                "--file",
                into / "root.tar",
                "--numeric-owner",
                "--exclude=./dev/*",
                "--exclude=./proc/*",
                "--exclude=./sys/*",
                "--directory",
                root,
                ".",
            ],
            seconds=300,
        )


def _mirror() -> list[str]:
    """The mirror from which this machine gets the same packages; none, and so debootstrap's own, elsewhere."""
    if not shutil.which("apt-get"):
        return []
    site = "$(REPO_URI) $(CODENAME) $(COMPONENT) $(CREATED_BY)"
    for line in run(["apt-get", "indextargets", "--format", site], seconds=60).splitlines():
        uri, *what = line.split()
        if what == [SUITE, "main", "Packages"]:
            return [uri]
    return []


def _import(name: str, root: Path) -> None:
    say(f"importing {name}")
    container = _buildah("from", "scratch").strip()
    try:
        _buildah("add", container, root, "/", seconds=EXPORT_SECONDS)
        _buildah("config", "--env", "LANG=C.UTF-8", "--cmd", "python3", container)
        _buildah("commit", "--timestamp", "0", container, name, seconds=EXPORT_SECONDS)
    finally:
        _buildah("rm", container)


def build(
    tag: str,
    dockerfile: Path,
    context: Path,
    *,
    base: str,
    arguments: Mapping[str, str] | None = None,
    volumes: Sequence[str] = (),
    target: str = "",
) -> None:
    """Builds ``dockerfile`` with ``--build-arg BASE=<base>``; unchanged layers come from the last build.

    RUN steps use this machine's network, CA certificates and pip configuration, none of which gets into the image
    (an empty ``/etc/pip.conf`` stays where one was mounted).

    Args:
        tag: the image's name, such as ``localhost/claas-worker:1``.
        arguments: further build arguments.
        volumes: ``HOST:CONTAINER:ro`` folders that RUN steps see, for caches.
        target: the stage to build; the last one by default.

    Raises:
        ClusterError: a step failed; with the end of the build's output.
    """
    programs.ensure_packages(programs.IMAGE_PACKAGES)
    log = bootstrap.cache_dir() / f"build-{tag.rpartition('/')[2].replace(':', '-')}.log"
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        command = ["buildah", "build", "--layers", "--pull-never", "--file", str(dockerfile), "--tag", tag]
        for name, value in {"BASE": base, **(arguments or {})}.items():
            command += ["--build-arg", f"{name}={value}"]
        for volume in [*_host_volumes(Path(folder)), *volumes]:
            command += ["--volume", volume]
        command += ["--target", target] if target else []
        run_with_progress(
            f"building {tag}", [*command, str(context)], log, seconds=BUILD_SECONDS, environment=builder_environment()
        )


def export(tag: str, archive: Path) -> None:
    """Writes the image as a Docker archive under its own name, whole or not at all.

    Not as an OCI archive: buildah compresses those, which for gigabytes on their way to a node of this machine is most
    of the time.
    """
    unfinished = archive.with_name(f".{archive.name}.part")
    unfinished.unlink(missing_ok=True)
    _buildah("push", "--quiet", tag, f"docker-archive:{unfinished}:{tag}", seconds=EXPORT_SECONDS)
    unfinished.rename(archive)


def _host_volumes(folder: Path) -> list[str]:
    """What makes RUN steps reach package indexes where this machine does."""
    volumes = [f"{CA_CERTIFICATES}:{CA_CERTIFICATES}:ro"] if CA_CERTIFICATES.is_dir() else []
    settings = pip_settings(os.environ)
    for option in ("find-links", "cert", "client-cert"):
        for path in settings.get("global", option, fallback="").split():
            if Path(path).exists() and not Path(path).is_relative_to(CA_CERTIFICATES):
                volumes.append(f"{path}:{path}:ro")
    with (folder / "pip.conf").open("w") as file:
        settings.write(file)
    return [*volumes, f"{folder / 'pip.conf'}:/etc/pip.conf:ro"]


def pip_settings(environment: Mapping[str, str]) -> configparser.ConfigParser:
    """Where and how this machine's pip reaches package indexes, as one file would say it: its files, then ``PIP_…``.

    The certificates default to the system's bundle, which ``pip`` of the official images does not use by itself.
    """
    found = configparser.ConfigParser(interpolation=None)
    home, named = Path(environment.get("HOME", "/")), environment.get("PIP_CONFIG_FILE", os.devnull)
    found.read(["/etc/pip.conf", home / ".pip/pip.conf", home / ".config/pip/pip.conf", named])
    bundle = CA_CERTIFICATES / "ca-certificates.crt"
    options = {"cert": str(bundle)} if bundle.exists() else {}
    for option in PIP_NETWORK_OPTIONS:
        variable = f"PIP_{option.upper().replace('-', '_')}"
        for value in (found.get("global", option, fallback=None), environment.get(variable)):
            if value is not None:
                options[option] = value
    settings = configparser.ConfigParser(interpolation=None)
    settings["global"] = options
    return settings


def _exists(name: str) -> bool:
    return name in _buildah("images", "--format", "{{.Name}}:{{.Tag}}").split()


def _buildah(*arguments: str | Path, seconds: float = 60) -> str:
    return run(["buildah", *arguments], seconds=seconds, environment=builder_environment())


@functools.cache
def builder_environment() -> dict[str, str]:
    """buildah's settings: chroot as isolation, which works inside containers too; overlay for layers where it can."""
    chosen = {"BUILDAH_ISOLATION": "chroot", "STORAGE_DRIVER": os.environ.get("STORAGE_DRIVER", "overlay")}
    try:
        run(["buildah", "info"], seconds=60, environment=chosen)
    except ClusterError as error:
        say(
            f"buildah cannot use {chosen['STORAGE_DRIVER']} here, so it copies every layer (vfs): "
            f"{str(error).splitlines()[-1]}"
        )
        chosen["STORAGE_DRIVER"] = "vfs"
    return chosen
