"""`python -m learning survey|bearing|run|plot|verdict`: the experiment, in as many processes as wanted; JSON.

`bearing` says which preference's words bring out which other preference (its kin). `run` takes lists for preferences,
arms and seeds, and settings as often as wanted, and runs every combination. `plot` draws what it wrote; `verdict` says
what of oracle 14 it does not show, and fails if there is any.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # before torch: libgomp's barriers spin by default

import torch

from learning.experiment import Settings, World, falls, run_trial
from learning.plots import plot
from learning.preferences import BY_NAME
from learning.survey import WORDINGS, bearing, kin, survey, wording

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


def _bearing(name: str | None, settings: Settings) -> dict[str, Any]:
    assert _world is not None
    return bearing(_world, BY_NAME[name] if name else None, settings)


def _trial(name: str, arm: Any, seed: int, settings: Settings) -> dict[str, Any]:
    assert _world is not None
    started = time.monotonic()
    with wording(settings.wording):
        record = run_trial(_world, BY_NAME[name], arm, seed, settings)
    return record | {"seconds": round(time.monotonic() - started, 1)}


def verdict(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """What oracle 14 asks of the trials and they do not show, in sentences; empty: it learns.

    A rise is one beyond three standard errors of the difference of two shares, so that chance is not called learning.
    """
    failures = []
    fell = [falls(record) for record in records if record["arm"] == "feedback"]
    shown, trained = (sum(counts) for counts in zip(*fell, strict=True)) if fell else (0, 0)
    if shown <= 0.95 * trained or not trained:
        failures.append(f"D fell in {shown} of {trained} requests")
    for record in records:
        name = f"{record['preference']} {record['arm']} seed {record['seed']}"
        start, end = ends(record["compliance"])
        settings = record["settings"]
        answers = settings["held_out"] * settings["draws"]
        noise = math.sqrt((start * (1 - start) + end * (1 - end)) / answers)
        rose = end - start > 3 * noise
        if rose != (record["arm"] == "feedback"):
            failures.append(f"{name}: compliance {start:.2f} to {end:.2f}, standard error {noise:.2f}")
        before, after = ends(record["probes"])
        if after["facts"] < 0.9 * before["facts"] or before["nll"] < 0.9 * after["nll"]:
            failures.append(
                f"{name}: facts {before['facts']:.2f} to {after['facts']:.2f}, nll "
                f"{before['nll']:.2f} to {after['nll']:.2f}"
            )
        if record["arm"] == "empty" and any(step["reason"] != "NoSignal" for step in record["requests"]):
            failures.append(f"{name}: a request without feedback trained")
    return failures


def ends(by_step: Mapping[Any, Any]) -> tuple[Any, Any]:
    """Values at the first and at the last step. Steps are numbers, or strings of them after a trip through JSON."""
    steps = sorted(by_step, key=int)
    return by_step[steps[0]], by_step[steps[-1]]


def line(record: dict[str, Any]) -> str:
    """A trial in one line."""
    if "shares" in record:
        return f"{record['words']:10} " + " ".join(f"{name}={value:.2f}" for name, value in record["shares"].items())
    if "arm" not in record:
        return " ".join(f"{key}={value:.2f}" if isinstance(value, float) else value for key, value in record.items())
    fell, trained = falls(record)
    start, end = ends(record["probes"])
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
    parser.add_argument("what", choices=["survey", "bearing", "run", "plot", "verdict"])
    parser.add_argument("--preferences", default=",".join(BY_NAME))
    parser.add_argument("--arms", default="feedback,shuffled,empty")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--settings", action="append", help="JSON, fields of Settings; may be repeated, all are run")
    parser.add_argument("--wordings", default=",".join(WORDINGS), help="of the hindsight block, for survey")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes, each with a model of its own")
    parser.add_argument("--threads", type=int, default=2, help="of each")
    parser.add_argument("--out", type=Path, required=True, help="JSON: written by survey and run, else read")
    args = parser.parse_args()

    if args.what in ("plot", "verdict"):
        records = json.loads(args.out.read_text())["records"]
        if args.what == "plot":
            plot(records, args.out.with_suffix(".png"))
            return
        sys.exit("\n".join(verdict(records)) or None)
    names = args.preferences.split(",")
    settings = [Settings(**json.loads(text)) for text in args.settings or ["{}"]]
    work: Iterable[tuple[Any, ...]]
    task: Callable[..., dict[str, Any]]
    if args.what == "survey":
        task, work = _survey, [(name, settings[0], args.wordings.split(",")) for name in names]
    elif args.what == "bearing":
        task, work = _bearing, [(name, settings[0]) for name in (None, *BY_NAME)]
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
    if args.what == "bearing":
        for name, others in kin(records).items():
            print(f"{name}: kin {', '.join(others) or 'none'}")
