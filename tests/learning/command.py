"""`python -m learning survey|run`: the whole experiment, in as many processes as the machine bears; JSON out.

`run` takes lists for preferences, arms, seeds and learning rates, and runs every combination.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: libgomp's barriers spin by default

import torch

from learning.experiment import Settings, World, falls, run_trial
from learning.preferences import BY_NAME
from learning.survey import WORDINGS, survey, wording

DEFAULTS = dataclasses.asdict(Settings())
_world: World | None = None


def _start(folder: str, device: str, threads: int) -> None:
    """A process of the pool gets its own model."""
    global _world
    os.environ["CLAAS_FILE_ROOTS"] = folder
    _world = World(Path(folder), device=device, threads=threads)


def _survey(name: str, settings: Settings, wordings: list[str]) -> dict[str, Any]:
    assert _world is not None
    return survey(_world, BY_NAME[name], settings, wordings)


def _trial(name: str, arm: Any, seed: int, settings: Settings) -> dict[str, Any]:
    assert _world is not None
    started = time.monotonic()
    with wording(settings.wording):
        record = run_trial(_world, BY_NAME[name], arm, seed, settings)
    return record | {"seconds": round(time.monotonic() - started, 1)}


def line(record: dict[str, Any]) -> str:
    """A trial in one line."""
    if "arm" not in record:
        return " ".join(f"{key}={value:.2f}" if isinstance(value, float) else value for key, value in record.items())
    fell, trained = falls(record)
    first, last = min(record["probes"]), max(record["probes"])
    start, end = record["probes"][first], record["probes"][last]
    chosen = json.dumps({key: value for key, value in record["settings"].items() if value != DEFAULTS[key]})
    curve = " ".join(f"{value:.2f}" for value in record["compliance"].values())
    return (
        f"{record['preference']:10} {record['arm']:8} seed {record['seed']} {chosen}"
        f": {curve} | D fell {fell}/{trained} | facts {start['facts']:.2f}>{end['facts']:.2f} "
        f"nll {start['nll']:.3f}>{end['nll']:.3f} | {record['seconds']} s"
    )


def main() -> None:
    """Parses, runs, prints a line for each result as it comes, writes them all."""
    parser = argparse.ArgumentParser(prog="python -m learning", description=__doc__)
    parser.add_argument("what", choices=["survey", "run"])
    parser.add_argument("--preferences", default=",".join(BY_NAME))
    parser.add_argument("--arms", default="feedback,shuffled,empty")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--settings", action="append", help="JSON, fields of Settings; may be repeated, all are run")
    parser.add_argument("--wordings", default=",".join(WORDINGS), help="of the hindsight block, for survey")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once, each with a model of its own")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    names = args.preferences.split(",")
    settings = [Settings(**json.loads(text)) for text in args.settings or ["{}"]]
    work: Iterable[tuple[Any, ...]]
    task: Callable[..., dict[str, Any]]
    if args.what == "survey":
        task, work = _survey, [(name, settings[0], args.wordings.split(",")) for name in names]
    else:
        seeds = [int(seed) for seed in args.seeds.split(",")]
        orders = itertools.product(settings, names, args.arms.split(","), seeds)
        task, work = _trial, [(name, arm, seed, one) for one, name, arm, seed in orders]
    started, records = time.monotonic(), []
    with (
        tempfile.TemporaryDirectory() as folder,
        ProcessPoolExecutor(
            args.jobs,
            mp_context=multiprocessing.get_context("spawn"),
            initializer=_start,
            initargs=(folder, args.device, args.threads),
        ) as pool,
    ):
        for future in as_completed([pool.submit(task, *one) for one in work]):
            records.append(future.result())
            print(line(records[-1]), flush=True)
            machine = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or "cpu"
            about = {"device": machine, "torch": torch.__version__, "seconds": round(time.monotonic() - started, 1)}
            args.out.write_text(json.dumps({"about": about, "records": records}, indent=1))
