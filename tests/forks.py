"""Real processes of the product in 20 ms each: forked from one server process that has imported everything once.

Each is the very entry point that the images run (`claas_operator`, its shim, `claas`, `claas_worker`, `claas_store`),
with a pid, an environment and files of its own, killed and stopped by signals. Imports are a second of CPU for each
operator, two for a shim: hundreds of processes cost more by them than by all that they do. What an import itself must
not do is tested where a process is started in full (`clikit.Claas.start`, the images of the end-to-end tests).
"""

from __future__ import annotations

import ctypes
import importlib
import multiprocessing
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import kubernetes.aio.config.kube_config
import kubernetes.config.kube_config

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        *("chaos.step", "instant_worker", "claas_worker.agent", "claas_operator.main", "claas_store.__main__"),
        *("claas_operator.shim.app", "claas_operator.shim.__main__", "claas_operator.release"),
        *("claas_operator.cli.bycluster", "claas_operator.cli.byurl"),
    ]
)
_LOCK = threading.Lock()  # multiprocessing takes an exit code that two threads read at once for a failure
_DIE_WITH_PARENT = 1  # PR_SET_PDEATHSIG


class Forked:
    """A process, with the methods of subprocess.Popen that the tests use.

    Args:
        target: called in it with `given`; its exit code is what `sys.exit` gets there.
        out: where its stdout and, without `err`, its stderr are appended.
        environment: the whole of it.
        stdin: nothing, if not given.
    """

    def __init__(
        self,
        target: Callable[..., None],
        out: Path,
        environment: Mapping[str, str],
        *given: Any,
        err: Path | None = None,
        stdin: Path | None = None,
    ) -> None:
        files = [str(path) for path in (stdin or Path(os.devnull), out, err or out)]
        self._process = _CONTEXT.Process(
            target=_become, args=(target, files, dict(environment), os.getcwd(), *given), daemon=True
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
        """Its exit code.

        Raises:
            subprocess.TimeoutExpired: it has not ended within `timeout` seconds.
        """
        select.select([self.sentinel], [], [], timeout)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(f"pid {self.pid}", timeout)
        return code


# Of the processes below, `environment` comes on top of ours, and stdout and stderr go to `log`.


def operator(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_operator ARGUMENTS`."""
    return Forked(_claas, log, {**os.environ, **environment}, ["operator", "run", *arguments])


def release(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_operator.release ARGUMENTS`."""
    return Forked(_main, log, {**os.environ, **environment}, "claas_operator.release", list(arguments))


def shim(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_operator.shim ARGUMENTS`."""
    return Forked(_main, log, {**os.environ, **environment}, "claas_operator.shim.__main__", list(arguments))


def store(log: Path, environment: Mapping[str, str], arguments: Sequence[str]) -> Forked:
    """`python -m claas_store ARGUMENTS`."""
    return Forked(_main, log, {**os.environ, **environment}, "claas_store.__main__", list(arguments))


def worker(log: Path, environment: Mapping[str, str], step: str = "chaos.step") -> Forked:
    """`python -m claas_worker`, with the step of that module: `chaos.step` or `instant_worker`."""
    return Forked(_worker, log, {**os.environ, **environment}, step)


def claas(arguments: Sequence[str], environment: Mapping[str, str], out: Path, err: Path, stdin: Path | None) -> Forked:
    """`claas ARGUMENTS` with this environment alone."""
    return Forked(_claas, out, environment, list(arguments), err=err, stdin=stdin)


def _become(
    target: Callable[..., None], files: Sequence[str], environment: dict[str, str], folder: str, *given: Any
) -> None:
    ctypes.CDLL(None).prctl(_DIE_WITH_PARENT, signal.SIGKILL)
    os.chdir(folder)
    for number, path in enumerate(files):
        mode = os.O_WRONLY | os.O_CREAT | os.O_APPEND if number else os.O_RDONLY
        opened = os.open(path, mode, 0o600)
        os.dup2(opened, number)
        if opened != number:
            os.close(opened)
    sys.stdin = os.fdopen(0, encoding="utf-8", closefd=False)  # multiprocessing has put another in its place
    os.environ.clear()
    os.environ.update(environment)
    for module in (kubernetes.config.kube_config, kubernetes.aio.config.kube_config):
        module.KUBE_CONFIG_DEFAULT_LOCATION = environment.get("KUBECONFIG", "~/.kube/config")  # read at its import
    target(*given)


def _claas(arguments: list[str]) -> None:
    from claas_operator.cli import main

    sys.exit(main(arguments))


def _main(module: str, arguments: list[str]) -> None:
    sys.exit(importlib.import_module(module).main(arguments))


def _worker(step: str) -> None:
    from claas_worker import __main__ as worker

    worker.load_step = importlib.import_module(step).load
    sys.exit(worker.main([]))
