"""A process of the product, started in full, that tells at its end how Python's collector was set in it."""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from cluster.process import spawn


@contextlib.contextmanager
def watched(
    folder: Path, environment: Mapping[str, str], module: str, arguments: Sequence[str]
) -> Iterator[tuple[Path, dict[str, Any]]]:
    """`main(ARGUMENTS)` of a module in a process of its own, until the block ends; its log, and what it tells then:
    `frozen`, the objects that are not looked at any more, and `threshold`, by which the rest is."""
    answer, log, told = folder / "collector.json", folder / "collector.log", dict[str, Any]()
    command = [sys.executable, __file__, str(answer), module, *arguments]
    process = spawn(command, log, environment={**environment, "PYTHONPATH": os.pathsep.join(sys.path)})
    try:
        yield log, told
        process.terminate()
        process.wait(timeout=20)
        told |= json.loads(answer.read_text())
    finally:
        process.kill()


def _tell(answer: str) -> None:
    Path(answer).write_text(json.dumps({"frozen": gc.get_freeze_count(), "threshold": gc.get_threshold()}))


if __name__ == "__main__":
    _, where, name, *given = sys.argv
    atexit.register(_tell, where)
    sys.exit(importlib.import_module(name).main(given))
