"""The tests' own way to run a teacher: what cannot start says why, and nothing outlives whoever started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

import vllmserver
from vllmserver import vllm_server

pytestmark = pytest.mark.vllm


def test_a_server_that_ends_shows_its_log(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    broken = {"CLAAS_CACHE_DIR": str(tmp_path / "file" / "cache")}
    with pytest.raises(RuntimeError, match=r"ended with 1:\nCLAAS_CACHE_DIR=.* cannot be written"):
        with vllm_server(tmp_path, log=tmp_path / "log", environment=broken):
            pass


def test_a_server_that_is_never_ready_is_given_up_and_gone(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="not ready after 1 s"):
        with vllm_server(tmp_path, log=tmp_path / "log", limit=1):
            pass
    assert not processes_that_mention(tmp_path)


def test_it_dies_with_a_test_run_that_is_killed(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from vllmserver import vllm_server\n"
        "with vllm_server(Path(sys.argv[1]), log=Path(sys.argv[1]) / 'log'): pass"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(vllmserver.__file__).parent)}
    run = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    try:
        wait_for(lambda: len(processes_that_mention(tmp_path)) == 3)  # the run, its server and the guard
    finally:
        os.kill(run.pid, signal.SIGKILL)
        run.wait(10)
    wait_for(lambda: not processes_that_mention(tmp_path))


def processes_that_mention(folder: Path) -> list[int]:
    """Live processes with `folder` on their command line."""
    found = []
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        try:
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if str(folder).encode() in words:
            found.append(pid)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 20) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not come true"
        time.sleep(0.05)
