"""The tests' own object store leaves no process behind."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

STARTS = """
import pathlib, sys, time
import objectstore
with objectstore.running(pathlib.Path(sys.argv[1])) as store:
    print(store.process.pid, flush=True)
    time.sleep(300)
"""


def test_it_dies_with_its_parent(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": ":".join([str(Path(__file__).parent.parent), *(path for path in sys.path if path)])}
    parent = subprocess.Popen(
        [sys.executable, "-c", STARTS, str(tmp_path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        assert parent.stdout is not None
        process = Path(f"/proc/{int(parent.stdout.readline())}")
        assert "weed" in (process / "cmdline").read_text()
    finally:
        parent.send_signal(signal.SIGKILL)
        parent.wait(timeout=30)
    end = time.monotonic() + 30
    while process.exists() and "State:\tZ" not in (process / "status").read_text():
        assert time.monotonic() < end, "SeaweedFS outlived its parent"
        time.sleep(0.05)
