"""Real processes of the product in 20 ms each: forked from one server process that has imported everything once.

Each is the very entry point that the images run (`claas_operator`, `claas_worker`, `claas_store`), with a pid of its
own, killed and stopped by signals. The worker's step is `chaos.step`, put in at the seam that `load_step` is.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import select
import signal
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes.aio.config.kube_config
import kubernetes.config.kube_config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["chaos.step", "claas_worker.agent", "claas_operator.main", "claas_store.__main__"])
_LOCK = threading.Lock()  # multiprocessing takes an exit code that two threads read at once for a failure
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Forked:
    """A process, with the methods of subprocess.Popen that the tests use."""

    def __init__(self, target: Callable[..., None], log: Path, environment: Mapping[str, str], *given: Any) -> None:
        self._process = _CONTEXT.Process(
            target=_become, args=(target, str(log), dict(environment), *given), daemon=True
        )
        with _LOCK:
            self._process.start()
        self.pid: int = self._process.pid or 0

    @property
    def sentinel(self) -> int:
        """A file descriptor that is readable when it has ended."""
        return self._process.sentinel

    @property
    def returncode(self) -> int | None:
        """Negative: the signal that killed it."""
        return self.poll()

    def poll(self) -> int | None:
        with _LOCK:
            return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def wait(self, timeout: float = 30) -> int:
        """Its exit code."""
        select.select([self.sentinel], [], [], timeout)
        code = self.poll()
        assert code is not None, f"pid {self.pid} did not end within {timeout} s"
        return code


def operator(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_operator ARGUMENTS`."""
    return Forked(_operator, log, environment, list(arguments))


def worker(log: Path, environment: Mapping[str, str]) -> Forked:
    """`python -m claas_worker`, with the step of `chaos.step`."""
    return Forked(_worker, log, environment)


def store(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_store ARGUMENTS`."""
    return Forked(_store, log, environment, list(arguments))


def _become(target: Callable[..., None], log: str, environment: dict[str, str], *given: Any) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(out, 1)
    os.dup2(out, 2)
    os.environ.update(environment)
    for module in (kubernetes.config.kube_config, kubernetes.aio.config.kube_config):
        module.KUBE_CONFIG_DEFAULT_LOCATION = environment.get("KUBECONFIG", "")  # read when it was imported
    target(*given)


def _operator(arguments: list[str]) -> None:
    from claas_operator.cli import main

    sys.exit(main(["operator", "run", *arguments]))


def _worker() -> None:
    from chaos.step import load
    from claas_worker import __main__ as worker

    worker.load_step = load
    sys.exit(worker.main([]))


def _store(arguments: list[str]) -> None:
    from claas_store.__main__ import main

    sys.exit(main(arguments))
