"""The development environment, from the package registries alone; standard library only, because it runs first.

`python3.11 tests/bootstrap.py` makes
  * a dependency environment in the cache, keyed by the lock file's content, byte-compiled, shared by every clone of the
    project (and mounted read-only into the demo's Pods);
  * `.venv` in this checkout: those dependencies plus this checkout, editable.
Doing it again costs nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "tests" / "requirements.txt"
VENV = ROOT / ".venv"
UV = "uv==0.13.9"


def cache_dir() -> Path:
    """Where slow things are kept between clones: `${XDG_CACHE_HOME:-~/.cache}/claas`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "claas"


def say(message: str) -> None:
    """One line of progress."""
    print(f"{time.strftime('%H:%M:%S')} {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Hold a file lock: a second clone that builds the same thing waits and then finds it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


def run(*command: str | Path) -> None:
    """Run a command; its output is shown only when it fails."""
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stdout[-4000:]}\nfailed with exit code {done.returncode}")


def python_version() -> str:
    """The interpreter that everything here is locked for."""
    if sys.version_info[:2] != (3, 11):
        sys.exit(f"Python 3.11 is needed (locks and images are made for it); this is {sys.version.split()[0]}")
    return ".".join(map(str, sys.version_info[:3]))


def dependencies() -> Path:
    """The environment with everything of `tests/requirements.txt`; made when absent."""
    key = hashlib.sha256(LOCK.read_bytes() + python_version().encode() + UV.encode()).hexdigest()[:16]
    target = cache_dir() / f"deps-{key}"
    if (target / ".complete").exists():
        return target
    with exclusive(cache_dir() / f"deps-{key}.lock"):
        if (target / ".complete").exists():
            return target
        started = time.monotonic()
        say("Python packages: installing (about 6 GB)")
        shutil.rmtree(target, ignore_errors=True)
        run(sys.executable, "-m", "venv", target)
        python = target / "bin" / "python"
        run(python, "-m", "pip", "install", "-q", UV)
        run(python, "-m", "uv", "pip", "install", "-q", "--python", python, "--require-hashes", "--no-deps", "-r", LOCK)
        say(f"Python packages: compiling after {time.monotonic() - started:.0f} s")
        # Pods mount this folder read-only: without byte code each of them would compile torch anew.
        subprocess.run(
            [python, "-m", "compileall", "-q", "-j", "0", target / "lib"], stdout=subprocess.DEVNULL, check=False
        )
        (target / ".complete").touch()
        say(f"Python packages: done after {time.monotonic() - started:.0f} s")
    return target


def site_packages(environment: Path) -> Path:
    """The folder of an environment that holds its packages."""
    return environment / "lib" / "python3.11" / "site-packages"


def checkout_environment() -> Path:
    """`.venv`: the cached dependencies and this checkout, editable. Returns its interpreter."""
    packages = site_packages(dependencies())
    python = VENV / "bin" / "python"
    key = hashlib.sha256(f"{packages}{(ROOT / 'pyproject.toml').read_text()}".encode()).hexdigest()
    stamp = VENV / ".key"
    with exclusive(cache_dir() / "venv.lock"):
        if stamp.exists() and stamp.read_text() == key:
            return python
        shutil.rmtree(VENV, ignore_errors=True)
        run(sys.executable, "-m", "venv", "--without-pip", VENV)
        (site_packages(VENV) / "claas-dependencies.pth").write_text(
            f"import site; site.addsitedir({str(packages)!r})\n"
        )
        run(python, "-m", "uv", "pip", "install", "-q", "--python", python, "--no-deps", "-e", ROOT)
        for name in ("pytest", "mypy"):  # as people type them; the cached ones know nothing of this checkout
            script = VENV / "bin" / name
            script.write_text(f'#!/bin/sh\nexec "{python}" -m {name} "$@"\n')
            script.chmod(0o755)
        for program in ("ruff", "weed"):  # not Python: they run from anywhere
            (VENV / "bin" / program).symlink_to(packages.parents[2] / "bin" / program)
        stamp.write_text(key)
    return python


if __name__ == "__main__":
    print(checkout_environment())
