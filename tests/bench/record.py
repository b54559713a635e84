"""What the benches have in common: what a result begins with, where it goes, and the bounds that it is held against.

A result is one JSON object: the circumstances below, the bounds of `bounds.yaml`, then the bench's own numbers, whose
names end in their units (`_ms`, `_seconds`, `_gib`); ratios have none. `bench_plots.py` draws it.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import yaml

BOUNDS = Path(__file__).with_name("bounds.yaml")
WORDS = ("at_most", "at_least")

Raw = dict[str, Any]
Bounds = Mapping[str, Mapping[str, Any]]


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Of a bench whose module says `doc`; all of them have `--out`."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, help="JSON file that the result goes to")
    return made


def circumstances(bench: str, *packages: str) -> Raw:
    """The machine, the moment, the code, and the versions of these packages."""
    return {
        "bench": bench,
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _said("git", "-C", str(BOUNDS.parent), "describe", "--always", "--dirty") or None,
        "machine": machine(),
        "cpus": os.cpu_count(),
        "cpu": _cpu(),
        "python": platform.python_version(),
        "packages": {name: importlib.metadata.version(name) for name in packages},
        "load_average": os.getloadavg(),
    }


def machine() -> str:
    """The cards, or the processor."""
    cards = _said("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    one = f"{cards[0]}, {os.cpu_count()} cores" if cards else f"{_cpu()}, {os.cpu_count()} cores"
    return f"{len(cards)} x {one}" if len(cards) > 1 else one


def used_bytes() -> int | None:
    """Memory in use on the first card, by everybody; None without a card."""
    mebibytes = _said("nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits").split()
    return int(mebibytes[0]) << 20 if mebibytes else None


def write(out: Path | None, result: object) -> None:
    """To the file, if one was named; a bench that is cut off leaves what it wrote last."""
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        part = out.with_name(f"{out.name}.part")
        part.write_text(json.dumps(result, indent=1))
        part.replace(out)


# Bounds


def bounds(bench: str) -> Bounds:
    """By the names of numbers."""
    found: Bounds = yaml.safe_load(BOUNDS.read_text())[bench]
    return found


@dataclass(frozen=True)
class Judged:
    """One number of all runs of one kind and size, against its bound."""

    run: str
    field: str
    values: Sequence[float]
    word: str
    limit: float

    @property
    def holds(self) -> bool:
        """In every run, not on average."""
        return max(self.values) <= self.limit if self.word == "at_most" else min(self.values) >= self.limit

    def __str__(self) -> str:
        spread = f"{statistics.fmean(self.values):.4g} ({min(self.values):.4g} to {max(self.values):.4g})"
        word = "within" if self.holds else "NOT WITHIN"
        return f"{self.run}, {len(self.values)} runs: {self.field} {spread}, {word} {self.word} {self.limit:g}"


def judged(run: str, records: Iterable[Mapping[str, Any]], limits: Bounds) -> list[Judged]:
    """Each bound whose number (a place in the records, with dots) some record has."""
    known = list(records)
    return [
        Judged(run, field, values, word, bound[word])
        for field, bound in limits.items()
        if (values := [value for record in known if (value := look_up(record, field)) is not None])
        for word in WORDS
        if word in bound
    ]


def look_up(record: Mapping[str, Any], field: str) -> float | None:
    """The number at a place; None where there is none."""
    found: Any = record
    for part in field.split("."):
        if not isinstance(found, Mapping) or part not in found:
            return None
        found = found[part]
    return float(found)


def _cpu() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line for line in lines if "model name" in line), platform.machine()).rpartition(":")[2].strip()


def _said(*command: str) -> str:
    """A command's stdout; empty where there is no such command, or it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
