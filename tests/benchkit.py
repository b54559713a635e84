"""Running the benches as a user does, as processes: for the tests that run them in small, for correctness alone."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

BENCHES = Path(__file__).resolve().parent / "bench"
LIMIT_SECONDS = 240
KNOWN = ("bench", "at", "commit", "machine", "cpus", "cpu", "python", "packages", "load_average")


def call(name: str, *arguments: str | Path, code: int = 0) -> str:
    """A bench's stdout; it has to end with `code`."""
    command = [sys.executable, str(BENCHES / f"{name}.py"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
    assert done.returncode == code, f"{name}: {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def result_of(name: str, folder: Path, *arguments: str | Path) -> Any:
    """What a bench writes with --out; it begins with its circumstances, and its plot is drawn."""
    out = folder / f"{name}.json"
    call(name, "--out", out, *arguments)
    result = json.loads(out.read_text())
    assert [result.get("bench"), set(KNOWN) - result.keys()] == [name, set()]
    call("bench_plots", out, "--folder", folder)
    assert_drawn(out.with_suffix(".png"))
    return result


def assert_drawn(path: Path) -> None:
    """A picture with more than its white ground, text and lines: some bar or curve is coloured."""
    with Image.open(path) as picture:
        colors = {color for _, color in picture.convert("RGB").getcolors(1 << 24) if len(set(color)) > 1}
    assert colors, f"{path} shows nothing"


def assert_positive(numbers: Mapping[str, Any], *names: str) -> None:
    """These are there, finite, and more than nothing."""
    found = {name: numbers.get(name) for name in names}
    assert all(isinstance(one, int | float) and math.isfinite(one) and one > 0 for one in found.values()), found
