"""A real teacher on this machine's processor: `vllm_server(...)`, and the session's fixture `teacher_server`.

`python -m claas_teacher` in a process group of its own on a free port, waited for until a scoring has gone through it;
it ends with whoever started it, however that ends, and a failure to start shows the end of its log.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import pytest

import models
from bootstrap import cache_dir

READY_LIMIT_SECONDS = 300
STOP_LIMIT_SECONDS = 20
POLL_SECONDS = 0.05
# Small steps, so that a short sample already crosses from one to the next.
SMOLLM2_FLAGS = ("--dtype", "float32", "--max-model-len", "2048", "--max-num-batched-tokens", "128")


@dataclass
class TeacherServer:
    """A running server. `waited` is what `/claas/v1/ready` said while it started, changes only."""

    url: str
    model: str
    process: subprocess.Popen[bytes]
    log: Path
    ready_seconds: float = 0.0
    waited: list[tuple[int, str]] = field(default_factory=list)

    def log_tail(self, lines: int = 30) -> str:
        """The last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def processes(self) -> list[int]:
        """The live processes of its group (the server, the engine, its worker)."""
        return [pid for pid in map(int, filter(str.isdigit, os.listdir("/proc"))) if _group_of(pid) == self.process.pid]

    def resident_bytes(self) -> int:
        """Memory of the whole group, shared pages counted once (proportional set size)."""
        total = 0
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError, FileNotFoundError):
                rollup = Path(f"/proc/{pid}/smaps_rollup").read_text()
                total += int(rollup.split("\nPss:")[1].split()[0]) * 1024
        return total


@contextlib.contextmanager
def vllm_server(
    model: Path,
    *flags: str,
    log: Path,
    environment: Mapping[str, str] | None = None,
    limit: float = READY_LIMIT_SECONDS,
) -> Iterator[TeacherServer]:
    """Run the teacher on `model` with vLLM's `flags`, ready when it is yielded; the whole group is gone afterwards.

    Raises:
        RuntimeError: it ended or was not ready within `limit` seconds; with the end of its log.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "claas_teacher", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            start_new_session=True,
        )
    server = TeacherServer(f"http://127.0.0.1:{port}", str(model), process, log)
    # vLLM's engine outlives a server that is killed. The pipe closes when we end: then the whole group is killed.
    guard = ["sh", "-c", 'cat >/dev/null; kill -s KILL -- "-$0"', str(process.pid), f"guards the server of {log}"]
    with subprocess.Popen(guard, stdin=subprocess.PIPE, start_new_session=True) as watcher:
        try:
            _wait_until_ready(server, limit)
            yield server
        finally:
            try:
                _stop(server)
            finally:
                watcher.kill()


def _wait_until_ready(server: TeacherServer, limit: float) -> None:
    started = time.monotonic()
    with httpx.Client(base_url=server.url, timeout=5, trust_env=False) as http:
        while (spent := time.monotonic() - started) < limit:
            if server.process.poll() is not None:
                raise RuntimeError(f"the teacher ended with {server.process.returncode}:\n{server.log_tail()}")
            with contextlib.suppress(httpx.TransportError):
                answer = http.get("/claas/v1/ready")
                seen = (answer.status_code, answer.json()["reason"])
                if server.waited[-1:] != [seen]:
                    server.waited.append(seen)
                if answer.status_code == httpx.codes.OK:
                    server.ready_seconds = spent
                    return
            time.sleep(POLL_SECONDS)
    raise RuntimeError(f"the teacher was not ready after {limit:.0f} s (it said {server.waited}):\n{server.log_tail()}")


def _stop(server: TeacherServer) -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.process.wait(STOP_LIMIT_SECONDS)
        deadline = time.monotonic() + STOP_LIMIT_SECONDS
        while server.processes() and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)
        if not server.processes():
            return
    raise RuntimeError(f"processes of the teacher outlive SIGKILL: {server.processes()}")


def _group_of(pid: int) -> int | None:
    """The process group of a live process; None of one that is gone or only waits to be reaped."""
    try:
        state, _, group = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:3]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return int(group) if state != "Z" else None


def cache_environment() -> dict[str, str]:
    """Kept between sessions: what vLLM compiles with g++ on its first scoring (12 s)."""
    return {"CLAAS_CACHE_DIR": str(cache_dir() / "teacher")}


def chosen_ids_environment(folder: Path) -> dict[str, str]:
    """What makes vLLM run the V2 model runner, the one that gathers chosen ids, without a GPU.

    Its kernels are Triton's, and Triton's interpreter runs those on a processor; only vLLM's question whether there is
    a backend for one has to be answered, by a `sitecustomize` in `folder`.
    """
    (folder / "sitecustomize.py").write_text(
        "from types import SimpleNamespace\n"
        "from triton.backends import backends\n"
        "backends['cpu'] = SimpleNamespace(driver=SimpleNamespace(is_active=lambda: True), compiler=None)\n"
    )
    return {
        **cache_environment(),
        "PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")]),
        "TRITON_INTERPRET": "1",
        "VLLM_USE_V2_MODEL_RUNNER": "1",
    }


@pytest.fixture(scope="session")
def teacher_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherServer]:
    """SmolLM2-135M-Instruct in float32 behind the whole server, one for the session."""
    log = tmp_path_factory.mktemp("teacher") / "log"
    # A short queue, so that a test can fill it in seconds.
    environment = {**cache_environment(), "CLAAS_TEACHER_QUEUE_TOKENS": "2048"}
    with vllm_server(models.smollm2_dir(), *SMOLLM2_FLAGS, log=log, environment=environment) as server:
        yield server
