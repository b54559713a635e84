"""`make test`'s pytest: two lanes side by side, because half of the time of the slow tests is waiting.

One lane has what starts a cluster or an engine; the other has every other folder of tests, so a new one is never left
out. Each lane's lines are shown as they come, with its name before them, and both summaries stand at the end. Arguments
go to both.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

TESTS = Path(__file__).resolve().parent
SLOW = ("e2e", "cluster", "teacher", "learning")  # nodes, engines, a model that is trained
SHOWN_AT_THE_END = 12  # lines of each lane: what failed, and the counts


def lanes() -> dict[str, list[str]]:
    """Folders of tests by lane."""
    folders = sorted({path.relative_to(TESTS).parts[0] for path in TESTS.glob("*/**/test_*.py")})
    assert set(SLOW) <= set(folders), folders
    chosen = {"slow": list(SLOW), "rest": [name for name in folders if name not in SLOW]}
    return {lane: [f"tests/{name}" for name in names] for lane, names in chosen.items()}


def relay(lane: str, stream: IO[str], kept: list[str]) -> None:
    """Shows a lane's lines, and keeps them."""
    for line in stream:
        kept.append(line)
        print(f"{lane:4} {line}", end="", flush=True)


def main() -> int:
    """Zero only if both lanes are green."""
    started = time.monotonic()
    running: dict[str, tuple[subprocess.Popen[str], threading.Thread, list[str]]] = {}
    for lane, folders in lanes().items():
        command = [
            sys.executable,
            "-m",
            "pytest",
            *folders,
            "-q",
            *sys.argv[1:],
            "-o",
            f"cache_dir=.pytest_cache/{lane}",
        ]
        process = subprocess.Popen(
            command,
            cwd=TESTS.parent,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        assert process.stdout is not None
        kept: list[str] = []
        thread = threading.Thread(target=relay, args=(lane, process.stdout, kept))
        thread.start()
        running[lane] = (process, thread, kept)
    codes = []
    for process, thread, _ in running.values():
        thread.join()
        codes.append(process.wait())
    for lane, (_, _, kept) in running.items():
        print(f"\n--- {lane} ---\n{''.join(kept[-SHOWN_AT_THE_END:])}", end="")
    print(f"both lanes: {time.monotonic() - started:.0f} s")
    return 1 if any(codes) else 0


if __name__ == "__main__":
    sys.exit(main())
