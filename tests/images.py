"""The three images: built by buildah, named by what is in them, pushed or handed to the nodes.

    python tests/images.py build [--slim]      prints their names
    python tests/images.py push REGISTRY       pushes the full ones: values image.registry=REGISTRY

Full images hold the Python packages (gigabytes, minutes); slim ones hold our code alone and expect the packages at
/deps. BASE names another base image than the one made here from Debian's packages.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import bootstrap
from cluster import images, nodes
from cluster.layout import NODES
from cluster.process import ClusterError, run

ROOT = Path(__file__).resolve().parent.parent
NAMES = ("operator", "worker", "teacher")
# vLLM compiles on a CPU at run time, and binds memory to cores.
PACKAGES = {"teacher": ("g++", "libnuma1", "python3-dev")}
# The operator may land on either node; the others where their pool or model is.
PLACES = {"operator": tuple(NODES), "worker": ("l40s", "a100"), "teacher": ("a100",)}


# What is free before and taken at the height of it: layers, an archive, and what the nodes hold of it.
FULL_BYTES = 15 * 10**9


@dataclass(frozen=True)
class Image:
    """One built image."""

    name: str
    tag: str


def sources_key() -> str:
    """Hash of every file that an image build sees: tracked or not, as it lies in the checkout."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "crds", "operator", "worker", "teacher",
         "pyproject.toml", ".dockerignore"],
        cwd=ROOT, capture_output=True, check=True,
    ).stdout  # fmt: skip
    digest = hashlib.sha256()
    for name in sorted(filter(None, listed.decode().split("\0"))):
        path = ROOT / name
        if path.is_file():
            digest.update(hashlib.sha256(name.encode()).digest() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:12]


def verified() -> Path:
    """A file that exists once the full images of these Dockerfiles and locks have run a request on this machine."""
    digest = hashlib.sha256(repr(PACKAGES).encode())
    for name in NAMES:
        for file in (ROOT / name).glob("requirements*.txt"):
            digest.update(file.read_bytes())
        digest.update((ROOT / name / "Dockerfile").read_bytes())
    return bootstrap.cache_dir() / f"images-verified-{digest.hexdigest()[:16]}"


def no_room(needs_bytes: int = FULL_BYTES) -> str:
    """Why the full images cannot be built and run here, where disk is what is missing; else empty."""
    for folder in (bootstrap.cache_dir(), Path("/var/lib/containers")):  # the nodes, and buildah's layers
        there = next(place for place in (folder, *folder.parents) if place.exists())
        free_bytes = shutil.disk_usage(there).free
        if free_bytes < needs_bytes:
            needs, free = needs_bytes / 10**9, free_bytes / 10**9
            return f"the full images need {needs:.0f} GB of free disk at {folder}, and there are {free:.1f} GB"
    return ""


def build(*, slim: bool, cpu_teacher: bool = True, names: tuple[str, ...] = NAMES) -> dict[str, Image]:
    """Build the images of this checkout; unchanged ones cost a second each."""
    built = {}
    for name in names:
        base = os.environ.get("BASE") or images.base(PACKAGES.get(name, ()))
        # One name for every state of the code: nodes then replace an image instead of collecting them.
        tag = f"localhost/claas-{name}:{'slim' if slim else 'full'}"
        arguments = {"DEPS": "slim" if slim else "full"}
        if name == "teacher" and cpu_teacher:
            arguments["REQUIREMENTS"] = "teacher/requirements-cpu.txt"
        images.build(tag, ROOT / name / "Dockerfile", ROOT, base=base, arguments=arguments)
        built[name] = Image(name, tag)
    return built


def load(built: dict[str, Image]) -> None:
    """Import the images on the nodes that run them."""
    folder = bootstrap.cache_dir() / "images"
    folder.mkdir(parents=True, exist_ok=True)
    for image in built.values():
        archive = folder / f"{image.tag.rpartition('/')[2].replace(':', '-')}.tar"
        images.export(image.tag, archive)
        nodes.load(archive, PLACES[image.name])
        archive.unlink()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("build", help="build them and print their names")
    making.add_argument("--slim", action="store_true", help="our code alone")
    making.add_argument("--cpu", action="store_true", help="the teacher for a CPU")
    pushing = commands.add_parser("push", help="build the full images and push them")
    pushing.add_argument("registry", help="such as registry.example.com/team")
    pushing.add_argument("--cpu", action="store_true", help="the teacher for a CPU")
    options = parser.parse_args()
    try:
        built = build(slim=getattr(options, "slim", False), cpu_teacher=options.cpu)
        for image in built.values():
            if options.command == "push":
                target = f"{options.registry.rstrip('/')}/claas-{image.name}:{sources_key()}"
                run(
                    ["buildah", "push", image.tag, f"docker://{target}"],
                    seconds=3600,
                    environment=images.builder_environment(),
                )
                print(target)
            else:
                print(image.tag)
    except ClusterError as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
