"""A seeded run: random users of one release, and everything else that may go wrong, at random; then the invariants.

`plan(seed)` decides all of it beforehand, so a seed says the same to every run: who does what when, what is killed and
what fails. What the processes make of it depends on the machine; a failure prints the history that led there.

    make chaos SEEDS=50        seeds 0 to 49, one after the other on each of two control planes
    make chaos SEED=7          that one again
"""

from __future__ import annotations

import argparse
import queue
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import objectstore
from chaos import witness
from chaos.background import Background
from chaos.release import LORA, WORKER, Release, World
from chaos.test_operator_dies import WRITES
from chaos.test_worker_dies import DEATHS
from claas_crds import names
from claas_crds.reasons import Reason
from claas_operator.jobs import OPERATION_STEMS
from cluster.api import ApiError
from cluster.controlplane import ControlPlane
from operatorstage import GROUP, apply_crds

SECONDS = 9.0
TEAMS, ADAPTERS, REQUESTS, WISHES, TROUBLES = 2, 2, 16, 6, 16
OPERATION = f"-({'|'.join(OPERATION_STEMS.values())})-[0-9a-f]{{16}}-"  # in the names of operation Pods
FAULTS: tuple[dict[str, Any], ...] = (
    {"status": 409},
    {"status": 429, "headers": {"Retry-After": "1"}},
    {"status": 500},
    {"status": 503},
    {"cut": "before"},
    {"cut": "after"},
    {"delay_seconds": 1.5},
)
STORE_FAULTS: tuple[dict[str, Any], ...] = (
    {"status": 503},
    {"status": 403},
    {"status": 500},
    {"cut": "before"},
    {"cut": "after", "method": "PUT"},
    {"delay_seconds": 0.7},
)


@dataclass(frozen=True)
class Deed:
    """Something that somebody does, so many seconds after the start."""

    at: float
    name: str
    given: dict[str, Any]

    def __str__(self) -> str:
        return f"{self.at:6.2f} {self.name} " + " ".join(f"{key}={value}" for key, value in self.given.items())


def plan(seed: int) -> list[Deed]:
    """What happens, in the order of time."""
    chance = random.Random(seed)
    deeds = [Deed(0.0, "adapter", adapter) for adapter in _adapters(chance)]
    for number in range(REQUESTS):
        at = chance.uniform(0.3, SECONDS)
        request = {"name": f"r{number}", "team": chance.randrange(TEAMS), "adapter": f"a{chance.randrange(ADAPTERS)}"}
        deeds.append(Deed(at, "request", request | {"spec": _spec(chance)}))
        deeds += _second_thoughts(chance, at, request)
    deeds += [Deed(chance.uniform(1.0, SECONDS), *_wish(chance)) for _ in range(WISHES)]
    deeds += [Deed(chance.uniform(0.5, SECONDS), *_trouble(chance)) for _ in range(TROUBLES)]
    return sorted(deeds, key=lambda deed: deed.at)


def _adapters(chance: random.Random) -> Iterator[dict[str, Any]]:
    for team in range(TEAMS):
        for number in range(ADAPTERS):
            spec: dict[str, Any] = {"deletionPolicy": chance.choice(["Retain", "Retain", "Delete"])}
            if chance.random() < 0.3:
                spec["retention"] = {"keepLast": 2}
            yield {"team": team, "name": f"a{number}", "spec": spec}


def _spec(chance: random.Random) -> dict[str, Any]:
    """Of a request."""
    prompt = chance.choice(
        ["SECRET", "SECRET", "slow SECRET", "slow SECRET", "slow SECRET", "bad SECRET", "nothing SECRET"]
    )
    spec: dict[str, Any] = {
        "samples": [{"prompt": prompt, "response": "SECRET", "feedback": "SECRET"}],
        "teacher": {"mode": chance.choice(["Server", "Server", "Self"])},
        "priority": chance.choice([0, 0, 1]),
        "backoffLimit": chance.choice([1, 3, 3, 6]),
    }
    if chance.random() < 0.1:
        spec["activeDeadlineSeconds"] = 4
    if chance.random() < 0.1:
        spec["ttlSecondsAfterFinished"] = 1
    return spec


def _second_thoughts(chance: random.Random, at: float, request: dict[str, Any]) -> Iterator[Deed]:
    later, about = at + chance.uniform(0.05, 1.5), {"team": request["team"], "name": request["name"]}
    draw = chance.random()
    if draw < 0.1:
        yield Deed(later, "cancel", about)
    elif draw < 0.15:
        yield Deed(later, "delete_request", about)


def _wish(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """What a user does to an adapter."""
    about = {"team": chance.randrange(TEAMS), "name": f"a{chance.randrange(ADAPTERS)}"}
    which = chance.randrange(1, 4)  # of its history, from the end
    new = f"n{chance.randrange(1000)}"
    return chance.choice(
        [
            ("rollback", about | {"which": which}),
            ("rollback", about | {"which": which}),
            ("fork", about | {"which": which, "new": new, "into": about["team"]}),
            ("fork", about | {"which": which, "new": new, "into": chance.randrange(TEAMS)}),
            ("bare", about | {"which": which, "new": new, "into": chance.randrange(TEAMS)}),
            ("change_adapter", about | {"spec": {"retention": {"keepLast": chance.randrange(1, 4)}}}),
            ("change_adapter", about | {"spec": {"deletionPolicy": chance.choice(["Retain", "Delete"])}}),
            ("delete_adapter", about),
            ("make_anew", about | {"uri": new}),
        ]
    )


def _trouble(chance: random.Random) -> tuple[str, dict[str, Any]]:
    """What goes wrong."""
    when, times = chance.choice(["before", "after"]), chance.randrange(1, 6)
    seconds = chance.uniform(0.5, 4.0)
    return chance.choice(
        [
            ("kill_operator", {"which": chance.choice(["leader", "other"])}),
            ("kill_operator_at", {"write": chance.choice([*WRITES]), "when": when}),
            ("stop_operator", {"seconds": seconds}),
            ("kill_worker", {"which": chance.random()}),
            ("kill_worker", {"which": chance.random()}),
            ("kill_worker_at", {"moment": chance.choice([*DEATHS])}),
            ("kill_worker_at", {"moment": chance.choice([*DEATHS])}),
            ("kill_operation_at", {"call": chance.randrange(1, 8), "when": when}),
            ("kill_operation_at", {"call": chance.randrange(1, 8), "when": when}),
            ("stop_worker", {"which": chance.random(), "seconds": seconds}),
            ("lose_node", {"which": chance.random()}),
            ("delete_pod", {"which": chance.random()}),
            ("delete_job", {"which": chance.random()}),
            ("fail_api", {"who": chance.choice(["operator", WORKER, ""]), "times": times, **chance.choice(FAULTS)}),
            ("fail_api", {"who": chance.choice(["operator", WORKER, ""]), "times": times, **chance.choice(FAULTS)}),
            ("cut_watches", {}),
            ("expire_watches", {}),
            ("partition", {"who": chance.choice(["leader", "worker"]), "seconds": seconds}),
            ("fail_store", {"times": times, **chance.choice(STORE_FAULTS)}),
            ("fail_teacher", {"seconds": seconds, **chance.choice(FAULTS[2:6])}),
        ]
    )


class Run:
    """Does what a plan says to a release."""

    def __init__(self, release: Release) -> None:
        self.release = release
        self._undo: list[tuple[float, str, Callable[[], None]]] = []

    def run(self, deeds: list[Deed]) -> None:
        """All of it, in time; then everything ends, and is judged.

        Raises:
            AssertionError: an invariant is broken; the message has the history.
        """
        self.release.replicas = 2
        self.release.supervise()
        first = [deed for deed in deeds if deed.name == "adapter"]
        for deed in first:
            self._adapter(**deed.given)
        self._wait_for_adapters(len(first))
        self.release.request("warm", "a0", teacher={"mode": "Self"})
        self.release.complete("warm")
        deeds = [deed for deed in deeds if deed.name != "adapter"]
        start = time.monotonic()
        for deed in deeds:
            while (left := start + deed.at - time.monotonic()) > 0:
                self._tick(start)
                time.sleep(min(left, 0.05))
            self.release.say(f"-- {deed}")
            try:
                getattr(self, f"_{deed.name}")(**deed.given)
            except ApiError as error:  # what it was about is not there, or the contract refuses it
                self.release.say(f"   refused: {error}"[:200])
        for _, _, undo in self._undo:
            undo()
        self._give_up_what_waits()
        self.release.settle()

    def _wait_for_adapters(self, count: int) -> None:
        """Trouble begins when there is something to disturb."""

        def made() -> bool:
            raws = [raw for plural, raw in self.release.listed() if plural == names.ADAPTER_PLURAL]
            return sum(bool((raw.get("status") or {}).get("headSeq")) for raw in raws) == count

        self.release.wait("the adapters", made, 60)

    def _tick(self, start: float) -> None:
        self.release.supervise()
        now = time.monotonic()
        for entry in [entry for entry in self._undo if entry[0] <= now]:
            self._undo.remove(entry)
            self.release.say(f"   over: {entry[1]}")
            entry[2]()

    def _after(self, seconds: float, what: str, undo: Callable[[], None]) -> None:
        self._undo.append((time.monotonic() + seconds, what, undo))

    def _give_up_what_waits(self) -> None:
        """A request may wait for an adapter that nobody makes, for ever: its user cancels it."""
        self.release.heal()
        never = {Reason.ADAPTER_NOT_FOUND, Reason.ADAPTER_NOT_READY}
        end = time.monotonic() + 60
        waiting = True
        while waiting and time.monotonic() < end:
            self.release.supervise()
            waiting = False
            for team in self.release.teams:
                for raw in self.release.api("GET", f"{GROUP}/namespaces/{team}/{names.REQUEST_PLURAL}")["items"]:
                    status = raw.get("status") or {}
                    waiting = waiting or not witness.ended(status)
                    if not witness.ended(status) and status.get("reason") in never and not raw["spec"].get("cancel"):
                        self._cancel(self.release.teams.index(team), raw["metadata"]["name"])
            time.sleep(0.3)

    # Users

    def _path(self, plural: str, team: int, name: str = "") -> str:
        return f"{GROUP}/namespaces/{self.release.teams[team]}/{plural}/{name}".rstrip("/")

    def _create(self, kind: str, plural: str, team: int, name: str, spec: dict[str, Any]) -> None:
        body = {"apiVersion": names.API_VERSION, "kind": kind, "metadata": {"name": name}, "spec": spec}
        self.release.api("POST", self._path(plural, team), body)

    def _adapter(self, team: int, name: str, spec: dict[str, Any], uri: str = "") -> None:
        folder = f"s3://adapters/{self.release.teams[team]}/{uri or name}/"
        whole = {"baseModel": "org/base", "storage": {"uri": folder}, "lora": LORA} | spec
        self._create(names.ADAPTER_KIND, names.ADAPTER_PLURAL, team, name, whole)

    def _request(self, team: int, name: str, adapter: str, spec: dict[str, Any]) -> None:
        self._create(names.REQUEST_KIND, names.REQUEST_PLURAL, team, name, {"adapterRef": {"name": adapter}} | spec)

    def _cancel(self, team: int, name: str) -> None:
        self.release.api("PATCH", self._path(names.REQUEST_PLURAL, team, name), {"spec": {"cancel": True}})

    def _delete_request(self, team: int, name: str) -> None:
        self.release.api("DELETE", self._path(names.REQUEST_PLURAL, team, name))

    def _change_adapter(self, team: int, name: str, spec: dict[str, Any]) -> None:
        self.release.api("PATCH", self._path(names.ADAPTER_PLURAL, team, name), {"spec": spec})

    def _delete_adapter(self, team: int, name: str) -> None:
        self.release.api("DELETE", self._path(names.ADAPTER_PLURAL, team, name))

    def _make_anew(self, team: int, name: str, uri: str) -> None:
        self._delete_adapter(team, name)
        self._adapter(team, name, {}, uri)

    def _old(self, team: int, name: str, which: int) -> dict[str, Any]:
        """An entry of an adapter's history."""
        raw = self.release.api("GET", self._path(names.ADAPTER_PLURAL, team, name))
        history = (raw.get("status") or {}).get("history") or []
        if not history:
            raise ApiError(404, "it has no version yet")
        found: dict[str, Any] = history[-min(which, len(history))]
        return found

    def _rollback(self, team: int, name: str, which: int) -> None:
        body = {"spec": {"rollbackTo": self._old(team, name, which)["version"]}}
        self.release.api("PATCH", self._path(names.ADAPTER_PLURAL, team, name), body)

    def _fork(self, team: int, name: str, which: int, new: str, into: int) -> None:
        self._adapter(into, new, {"initFrom": {"uri": self._old(team, name, which)["uri"]}})
        self._request(into, f"of-{new}", new, _spec(random.Random(new)))

    def _bare(self, team: int, name: str, which: int, new: str, into: int) -> None:
        spec = {"loraUri": self._old(team, name, which)["uri"]} | _spec(random.Random(new))
        self._create(names.REQUEST_KIND, names.REQUEST_PLURAL, into, f"bare-{new}", spec)

    # Troubles

    def _operator(self, which: str) -> int:
        """The leader's index, or the other's."""
        alive = [i for i, process in enumerate(self.release.operators) if process.poll() is None]
        words = {i: [x["leading"] for x in self.release.lines(i) if x["message"] == "leadership"] for i in alive}
        leading = [i for i in alive if words[i] and words[i][-1]]
        other = [i for i in alive if i not in leading]
        found = (leading or alive) if which == "leader" else (other or alive)
        if not found:
            raise ApiError(404, "no operator")
        return found[0]

    def _kill_operator(self, which: str) -> None:
        self.release.operators[self._operator(which)].kill()

    def _kill_operator_at(self, write: str, when: str) -> None:
        self.release.kill_operator_at(when, who=f"operator-{self._operator('leader')}", **WRITES[write])

    def _stop_operator(self, seconds: float) -> None:
        process = self.release.operators[self._operator("leader")]
        self.release.stop_process(process)
        self._after(seconds, "the operator was stopped", lambda: self.release.go_on(process))

    def _worker(self, which: float) -> str:
        alive = sorted(self.release.kubelet.workers())
        if not alive:
            raise ApiError(404, "no worker")
        return alive[int(which * len(alive))]

    def _kill_worker(self, which: float) -> None:
        self.release.kubelet.processes[self._worker(which)].kill()

    def _kill_operation_at(self, call: int, when: str) -> None:
        """The next operation is killed at its so-many-th call of the store."""
        self.release.kill_operation_at(OPERATION, call, when)

    def _kill_worker_at(self, moment: str) -> None:
        call, when = DEATHS[moment]
        self.release.kill_worker_at(call["where"], when, **{k: v for k, v in call.items() if k != "where"})

    def _stop_worker(self, which: float, seconds: float) -> None:
        process = self.release.kubelet.processes[self._worker(which)]
        self.release.stop_process(process)
        self._after(seconds, "the worker was stopped", lambda: self.release.go_on(process))

    def _lose_node(self, which: float) -> None:
        """Its kubelet is gone, and its line is dead for a while; its process goes on."""
        name = self._worker(which)
        self.release.kubelet.lose(name)
        self._cut_off(name, 4.0)

    def _delete_pod(self, which: float) -> None:
        self.release.api("DELETE", f"/api/v1/namespaces/{self.release.home}/pods/{self._worker(which)}")

    def _delete_job(self, which: float) -> None:
        job = self._worker(which).rpartition("-")[0]
        path = f"/apis/batch/v1/namespaces/{self.release.home}/jobs/{job}"
        self.release.api("DELETE", path, {"propagationPolicy": "Background"})

    def _fail_api(self, **what: Any) -> None:
        self.release.fail("api", **what)

    def _fail_store(self, **what: Any) -> None:
        self.release.fail("store", **what)

    def _fail_teacher(self, seconds: float, **what: Any) -> None:
        fault = self.release.fail("teacher", times=10**9, **what)
        self._after(seconds, "the teacher failed", lambda: setattr(fault, "times", 0))

    def _cut_watches(self) -> None:
        self.release.world.background.loop.call_soon_threadsafe(self.release.api_proxy.cut)

    def _expire_watches(self) -> None:
        self.release.world.background.call(self.release.api_proxy.expire())

    def _partition(self, who: str, seconds: float) -> None:
        name = f"operator-{self._operator('leader')}" if who == "leader" else self._worker(0)
        self._cut_off(name, seconds)

    def _cut_off(self, name: str, seconds: float) -> None:
        proxy, loop = self.release.api_proxy, self.release.world.background.loop
        proxy.refusing.add(name)
        loop.call_soon_threadsafe(proxy.cut, f"^{name}$")
        self._after(seconds, f"{name} was cut off", lambda: proxy.refusing.discard(name))


def run(world: World, seed: int, pace: float = 1.0) -> Counter[str]:
    """One seed, in `pace` times its seconds; counts how requests ended, further attempts, and processes killed.

    Raises:
        AssertionError: an invariant is broken; with the seed's plan and history.
    """
    folder = Path(tempfile.mkdtemp(prefix=f"claas-chaos-{seed}-"))
    deeds = [replace(deed, at=deed.at * pace) for deed in plan(seed)]
    try:
        with Release(world, folder, f"seed-{seed}", teams=TEAMS, pool={"maxWorkers": 2}) as release:
            try:
                Run(release).run(deeds)
            except AssertionError as error:
                raise AssertionError(f"seed {seed} (make chaos SEED={seed})\n{error}") from None
            return _count(release)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _count(release: Release) -> Counter[str]:
    counts: Counter[str] = Counter()
    for life in witness.lives(release.witness.history(), "DistillRequest").values():
        end = witness.terminal(life[-1].status)
        counts["ended"] += end is not None
        counts[f"as {end['reason']}" if end else "deleted before the end"] += 1
        counts["further attempts"] += max(0, (life[-1].status.get("attempt") or 0) - 1)
    processes = [*release.operators, *release.kubelet.processes.values()]
    counts["killed"] = sum(process.returncode == -signal.SIGKILL for process in processes)
    return counts


@dataclass
class Score:
    """How it went so far."""

    out: Path
    seeds: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    failed: list[int] = field(default_factory=list)

    def count(self, world: World, seed: int) -> None:
        """Runs a seed and counts it."""
        self.seeds += 1
        try:
            counts = run(world, seed)
        except Exception as error:  # noqa: BLE001 (it is shown, and counted)
            self.failed.append(seed)
            self.out.mkdir(parents=True, exist_ok=True)
            path = self.out / f"seed-{seed}.txt"
            path.write_text(f"{type(error).__name__}: {error}")
            print(f"seed {seed} FAILED, see {path}\n{str(error)[:2000]}", flush=True)
        else:
            self.counts += counts
            killed, again = counts["killed"], counts["further attempts"]
            print(f"seed {seed}: {counts['ended']} requests have ended, {killed} kills, {again} retries", flush=True)


def lane(seeds: queue.SimpleQueue[int], score: Score, seconds: float) -> None:
    """Seed after seed on a control plane of its own: operators see all namespaces, so one release at a time."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory(prefix="claas-chaos-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        (folder / "store").mkdir()
        with (
            ControlPlane(folder / "control-plane") as control_plane,
            objectstore.running(folder / "store") as store,
            Background() as background,
        ):
            apply_crds(control_plane)
            world = World(control_plane, store, background, folder)
            with suppress(queue.Empty):
                while time.monotonic() < end:
                    score.count(world, seeds.get_nowait())
            world.close()


def main() -> int:
    """Many seeds, or one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=50)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="only this one")
    parser.add_argument("--lanes", type=int, default=2, help="seeds side by side, each on a control plane of its own")
    parser.add_argument("--seconds", type=float, default=86_400, help="no new seed is begun after so long")
    parser.add_argument("--out", type=Path, default=Path("build/chaos"), help="for histories of failures")
    options = parser.parse_args()
    chosen = [options.seed] if options.seed is not None else range(options.first, options.first + options.seeds)
    if options.seed is not None:
        print(*plan(options.seed), sep="\n")
    todo: queue.SimpleQueue[int] = queue.SimpleQueue()
    for seed in chosen:
        todo.put(seed)
    score, started = Score(options.out), time.monotonic()
    with ThreadPoolExecutor(options.lanes) as lanes:
        for running in [
            lanes.submit(lane, todo, score, options.seconds) for _ in range(min(options.lanes, len(chosen)))
        ]:
            running.result()
    minutes = (time.monotonic() - started) / 60
    print(f"{score.seeds} seeds in {minutes:.1f} minutes, {score.seeds / minutes:.1f} a minute; ", end="")
    print(f"failed: {sorted(score.failed) or 'none'}")
    print(*(f"{count} {what}" for what, count in score.counts.most_common()), sep=", ")
    return 1 if score.failed else 0


if __name__ == "__main__":
    sys.exit(main())
