"""How much the operator takes: `python tests/bench/operator_load.py run|flood|plot|verdict`, or `make bench-operator`.

`run` makes a release on a real control plane of its own (`releasestage`): the real operator, real agents with a step
that takes no time, the chart's rights and admission policies. In one go it measures

* raw: what this API server takes of as many writes of the same sizes, from a client that only writes;
* idle: created to bound, one request at a time, with warm workers that wait;
* load: all requests at once over all adapters and namespaces, until the last is Complete;
* restart: with all those objects there and as many new ones waiting, from the process' start to the first binding.

`flood` measures fairness: a namespace asks for thousands of steps that take time, another for one now and then.

What was written, when and by whom comes from the API server's audit log, never from our own counting. Each `run` and
`flood` adds a record to the JSON file; `plot` draws them, and `verdict` compares them with tests/bench/bounds.yaml.
Needs this repository's environment, etcd and an API server (built with Go the first time: five minutes). A small one:

    python tests/bench/operator_load.py run --requests 40 --adapters 8 --namespaces 2 --workers 2 --idle 5
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import aiohttp

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench import operator_plots
from bench.record import Judged, bounds, circumstances, judged, write
from claas_crds import names
from claas_crds.generate import RESOURCES, definition
from cluster.controlplane import ControlPlane
from cluster.process import wait_for
from operatorkit import bound, claim, ended, result
from operatorstage import GROUP
from releasestage import HOME, RELEASE, Raw, Release

WRITES_PER_REQUEST = 7
IN_FLIGHT = 32  # writes of users at a time; more only wait in the API server
BATCH = 4
IDLE_REQUESTS = 200
SAMPLE_SECONDS = 0.5
PROGRESS_SECONDS = 15
STEP_SECONDS = 0.5  # of a flood's requests
SINGLES = 20
PROBE_GROUP = "raw.example.com"  # a copy of our kind that nobody watches
WRITES = ("create", "update", "patch", "delete")
TICKS = os.sysconf("SC_CLK_TCK")


# Users


class Users:
    """Somebody with many connections who only writes."""

    def __init__(self, session: aiohttp.ClientSession, url: str) -> None:
        self._session, self._url = session, url
        self._slots = asyncio.Semaphore(IN_FLIGHT)

    async def post(self, path: str, body: Raw) -> Raw:
        """Creates an object."""
        async with self._slots, self._session.post(self._url + path, json=body) as answer:
            return await _json(answer)

    async def patch(self, path: str, body: Raw) -> Raw:
        """A merge patch."""
        headers = {"Content-Type": "application/merge-patch+json"}
        async with self._slots, self._session.patch(self._url + path, json=body, headers=headers) as answer:
            return await _json(answer)

    async def watch(self, path: str) -> AsyncIterator[Raw]:
        """Changes from now on."""
        async with self._session.get(f"{self._url}{path}?limit=1") as answer:
            version = (await _json(answer))["metadata"]["resourceVersion"]
        async with self._session.get(f"{self._url}{path}?watch=1&resourceVersion={version}") as answer:
            async for line in answer.content:
                yield json.loads(line)


async def _json(answer: aiohttp.ClientResponse) -> Raw:
    text = await answer.read()
    assert answer.status < 300, f"{answer.method} {answer.url.path}: HTTP {answer.status}: {text[:500]!r}"
    content: Raw = json.loads(text)
    return content


@asynccontextmanager
async def users(control_plane: ControlPlane) -> AsyncIterator[Users]:
    """Of the group that the stage has made cluster admins; unlike system:masters they queue like everybody."""
    identity = control_plane.authority.issue("load", "load", groups=["load"])
    tls = ssl.create_default_context(cafile=str(control_plane.authority.certificate))
    tls.load_cert_chain(identity.certificate, identity.key)
    connector = aiohttp.TCPConnector(limit=IN_FLIGHT + 1, ssl=tls)
    async with aiohttp.ClientSession(connector=connector, read_bufsize=2**20) as session:
        yield Users(session, control_plane.url)


def admit_users(control_plane: ControlPlane) -> None:
    """Lets them do everything."""
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": "cluster-admin"}
    subject = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Group", "name": "load"}
    body = {"metadata": {"name": "load"}, "roleRef": role, "subjects": [subject]}
    control_plane.api("POST", "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings", body)


@dataclass(frozen=True)
class Plan:
    """How much of what."""

    requests: int
    adapters: int
    namespaces: int
    spec_bytes: int
    prompt: str = "hello"

    def places(self) -> list[tuple[str, str]]:
        """Namespace and adapter, all of them."""
        return [(f"team-{i % self.namespaces}", f"a{i}") for i in range(self.adapters)]

    def request(self, name: str, adapter: str) -> Raw:
        """One whose spec is as long as it should be."""
        sample = {"prompt": self.prompt, "response": "yes", "feedback": ""}
        spec = {"adapterRef": {"name": adapter}, "samples": [sample]}
        sample["feedback"] = "x" * (self.spec_bytes - len(json.dumps(spec)))
        return {
            "apiVersion": names.API_VERSION,
            "kind": names.REQUEST_KIND,
            "metadata": {"name": name},
            "spec": spec,
        }


async def create(somebody: Users, plan: Plan, prefix: str) -> None:
    """All requests, round robin over the adapters."""
    places = plan.places()

    async def one(i: int) -> None:
        namespace, adapter = places[i % len(places)]
        await somebody.post(_requests(namespace), plan.request(f"{prefix}{i}", adapter))

    await _many(one, plan.requests)


async def _many(one: Any, count: int) -> None:
    """`one(i)` for all i, as many at a time as users have connections."""
    numbers = iter(range(count))

    async def some() -> None:
        for i in numbers:
            await one(i)

    async with asyncio.TaskGroup() as group:
        for _ in range(IN_FLIGHT):
            group.create_task(some())


def _requests(namespace: str, name: str = "") -> str:
    return f"{GROUP}/namespaces/{namespace}/{names.REQUEST_PLURAL}/{name}".rstrip("/")


# Raw


async def raw(control_plane: ControlPlane, plan: Plan) -> Raw:
    """As many writes as the requests will take, one request after the other on each connection, and nobody watches."""
    resource = next(r for r in RESOURCES if r.plural == names.REQUEST_PLURAL)
    copy = definition(resource)
    copy["metadata"]["name"] = f"{names.REQUEST_PLURAL}.{PROBE_GROUP}"
    copy["spec"]["group"] = PROBE_GROUP
    copy["spec"]["names"] |= {"shortNames": [], "categories": []}
    control_plane.api("POST", "/apis/apiextensions.k8s.io/v1/customresourcedefinitions", copy)
    base = f"/apis/{PROBE_GROUP}/{names.VERSION}/namespaces/default/{names.REQUEST_PLURAL}"
    wait_for("the copy to be served", lambda: control_plane.api.get(base) is not None, 30)
    worker = f"{RELEASE}-l40s-1-abcde"
    steps = [
        {"state": "Assigned", "reason": "", **ended("Assigned", "Bound")},
        bound(worker),
        claim(worker),
        {"progress": {"phase": "Stepping", "at": "2026-05-01T12:00:00.000000Z"}},
        result(),
        {"state": "Complete", **ended("Complete", "Succeeded"), "metadata": result()["result"]["metadata"]},
    ]
    assert 1 + len(steps) == WRITES_PER_REQUEST
    async with users(control_plane) as somebody:

        async def one(i: int) -> None:
            body = plan.request(f"raw{i}", "a0") | {"apiVersion": f"{PROBE_GROUP}/{names.VERSION}"}
            await somebody.post(base, body)
            for status in steps:
                await somebody.patch(f"{base}/raw{i}/status", {"status": status})

        before, started = cpu_seconds(control_plane), time.monotonic()
        await _many(one, plan.requests)
        seconds = time.monotonic() - started
    used = {name: round(spent - before[name], 1) for name, spent in cpu_seconds(control_plane).items()}
    writes = plan.requests * WRITES_PER_REQUEST
    await asyncio.to_thread(_delete_all, control_plane, base)
    return {"writes": writes, "seconds": seconds, "writes_per_second": writes / seconds, "cpu_seconds": used}


def _delete_all(control_plane: ControlPlane, collection: str) -> None:
    """Their memory and their watch caches must not be carried into what is measured next."""
    definitions = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
    control_plane.api("DELETE", f"{definitions}/{names.REQUEST_PLURAL}.{PROBE_GROUP}")
    wait_for("the copies to go", lambda: control_plane.api.get(collection) is None, 300)


# What the processes cost


def cpu_seconds(control_plane: ControlPlane, release: Release | None = None) -> dict[str, float]:
    """Of each part, since its start; the workers together."""
    parts: dict[str, list[int]] = {name: [process.pid] for name, process in control_plane.processes.items()}
    parts["users"] = [os.getpid()]
    if release is not None:
        parts["operator"] = [process.pid for process in release.operators if process.poll() is None]
        parts["workers"] = [process.pid for process in release.kubelet.processes.values()]
    return {name: sum(map(_cpu_seconds, pids)) for name, pids in parts.items()}


def _cpu_seconds(pid: int) -> float:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / TICKS


def rss_bytes(pid: int) -> int:
    """Resident memory now; 0 for a process that is gone."""
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


@contextmanager
def sampled(pid: int) -> Iterator[list[tuple[float, int]]]:
    """Wall-clock time and resident memory of a process, twice a second."""
    samples: list[tuple[float, int]] = []
    over = threading.Event()

    def look() -> None:
        while not over.is_set():
            samples.append((time.time(), rss_bytes(pid)))
            over.wait(SAMPLE_SECONDS)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()


# The audit log


@dataclass
class Story:
    """What the audit log tells, read on as it grows. Times are the API server's, in seconds.

    Attributes:
        writes: successful ones, by (who, resource with subresource, verb); who: users, operator, workers or others.
        write_times: of the writes to requests and adapters.
        told: of these, the ones that only say what a request waits for, or that it runs; the protocol has none.
    """

    control_plane: ControlPlane
    offset: int = 0
    writes: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    refused: Counter[tuple[str, str, str, int]] = field(default_factory=Counter)
    write_times: list[float] = field(default_factory=list)
    told: int = 0
    created: dict[str, float] = field(default_factory=dict)
    bound: dict[str, float] = field(default_factory=dict)
    complete: dict[str, float] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def read(self) -> None:
        """What has been added since."""
        assert self.control_plane.audit is not None
        with self.control_plane.audit.open("rb") as file:
            file.seek(self.offset)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.offset += len(line)
                self._take(json.loads(line))

    def _take(self, event: Raw) -> None:
        verb, where = event["verb"], event.get("objectRef") or {}
        if verb not in WRITES or event.get("stage") != "ResponseComplete":
            return
        who = _who(event["user"]["username"])
        resource = "/".join(filter(None, (where.get("resource", ""), where.get("subresource", ""))))
        code = event["responseStatus"]["code"]
        if code >= 300:
            self.refused[who, resource, verb, code] += 1
            return
        self.writes[who, resource, verb] += 1
        if where.get("apiGroup") != names.GROUP:
            return
        at = datetime.fromisoformat(event["stageTimestamp"]).timestamp()
        self.write_times.append(at)
        name = f"{where['namespace']}/{where['name']}"
        if resource == names.REQUEST_PLURAL and verb == "create":
            self.created[name] = at
        elif resource == f"{names.REQUEST_PLURAL}/status" and who == "operator":
            status = event["requestObject"]["status"]
            if status.get("worker"):
                self.bound.setdefault(name, at)
            elif status.get("state") == "Complete":
                self.complete[name] = at
            elif status.get("state") in ("Failed", "Cancelled"):
                self.failed[name] = status.get("reason", "")
            else:
                self.told += 1

    def by_kind(self) -> dict[str, int]:
        """The writes, for a record."""
        return {" ".join(key): count for key, count in sorted(self.writes.items()) if key[0] != "others"}

    def on_objects(self) -> int:
        """Writes to requests and adapters, by users, operator and workers."""
        return len(self.write_times)

    def all(self) -> int:
        """Theirs, Leases, Events, Jobs and Pods included; not those of Kubernetes' own controllers."""
        return sum(count for (who, _, _), count in self.writes.items() if who != "others")


def _who(user: str) -> str:
    return {
        "load": "users",
        f"system:serviceaccount:{HOME}:{RELEASE}-operator": "operator",
        f"system:serviceaccount:{HOME}:{RELEASE}-worker": "workers",
    }.get(user, "others")


# The phases


def settings(release: Release, workers: int, batch: int) -> None:
    """Warm workers that stay, and no operation Jobs, whose Pods nobody here would run."""
    (pool,) = release.settings["pools"]
    pool |= {"minWorkers": workers, "maxWorkers": workers, "batch": batch, "maxRequests": 1_000_000}
    release.settings.setdefault("timings", {})["sweepSeconds"] = 0


def adapters(release: Release, plan: Plan) -> None:
    """All of them, each with a head."""
    for i in range(plan.namespaces):
        release.namespace(f"team-{i}")
    for namespace, name in plan.places():
        release.adapter(namespace, name, retention={"keepLast": 500})


def wait_for_workers(release: Release, count: int) -> None:
    """Until so many Leases say Ready."""
    path = f"/apis/coordination.k8s.io/v1/namespaces/{HOME}/leases"

    def ready() -> bool:
        leases = release.api("GET", path)["items"]
        states = [(lease["metadata"].get("annotations") or {}).get(names.LEASE_STATE) for lease in leases]
        return states.count(names.STATE_READY) >= count

    release.wait(f"{count} workers to be Ready", ready)


async def idle(control_plane: ControlPlane, plan: Plan, count: int, pause_seconds: float = 0.0) -> list[float]:
    """Seconds from a request's creation to the news that it is bound, as a user would see it: one at a time."""
    waits, places = [], plan.places()
    async with users(control_plane) as somebody:
        changes = somebody.watch(f"{GROUP}/{names.REQUEST_PLURAL}")
        first = asyncio.ensure_future(anext(changes))
        await asyncio.sleep(0.5)  # the watch is on its way; a request made before it began would not be seen
        for i in range(count):
            namespace, adapter = places[i % len(places)]
            started, name = time.monotonic(), f"idle{i}"
            posted = asyncio.create_task(somebody.post(_requests(namespace), plan.request(name, adapter)))
            seen = False
            while True:
                event = await (first if first is not None else anext(changes))
                first = None  # type: ignore[assignment]
                about, status = event["object"]["metadata"], event["object"].get("status") or {}
                if (about["namespace"], about["name"]) != (namespace, name):
                    continue
                if status.get("worker") and not seen:
                    waits.append(time.monotonic() - started)
                    seen = True
                if status.get("state") == "Complete":
                    break
            await posted
            await asyncio.sleep(pause_seconds)
    return waits


async def load(control_plane: ControlPlane, release: Release, plan: Plan) -> Raw:
    """All requests at once, until the last one has ended."""
    (operator,) = [process for process in release.operators if process.poll() is None]
    story = Story(control_plane, offset=_size(control_plane))
    before, started = cpu_seconds(control_plane, release), time.time()
    limit = time.monotonic() + 120 + plan.requests / 5
    with sampled(operator.pid) as memory:
        async with users(control_plane) as somebody:
            creating = asyncio.create_task(create(somebody, plan, "r"))
            said = time.monotonic()
            while len(story.complete) + len(story.failed) < plan.requests:
                await asyncio.sleep(SAMPLE_SECONDS)
                await asyncio.to_thread(story.read)
                if time.monotonic() - said >= PROGRESS_SECONDS:
                    said = time.monotonic()
                    _say(f"load: {len(story.created)} created, {len(story.complete)} of {plan.requests} complete")
                assert operator.poll() is None, "the operator has died"
                assert time.monotonic() < limit, f"{len(story.complete)} of {plan.requests} complete, no more time"
            await creating
    spent = {name: round(now - before[name], 2) for name, now in cpu_seconds(control_plane, release).items()}
    assert not story.failed, f"requests failed: {Counter(story.failed.values())}"
    first, last = min(story.created.values()), max(story.complete.values())
    waits = sorted(story.bound[name] - at for name, at in story.created.items())
    return {
        "seconds": last - first,
        "requests_per_second": plan.requests / (last - first),
        "writes": story.by_kind(),
        "refused": {" ".join(map(str, key)): count for key, count in sorted(story.refused.items())},
        "writes_per_request": story.on_objects() / plan.requests,
        "told_per_request": story.told / plan.requests,
        "all_writes_per_request": story.all() / plan.requests,
        "writes_per_second": story.on_objects() / (last - first),
        "created_to_bound_seconds": _quantiles(waits),
        "cpu_seconds": spent,
        "rss_bytes": max(size for _, size in memory),
        "timeline": _timeline(story, memory, started),
    }


def _size(control_plane: ControlPlane) -> int:
    assert control_plane.audit is not None
    return control_plane.audit.stat().st_size


def _quantiles(values: Sequence[float]) -> Raw:
    ordered = sorted(values)
    return {
        "count": len(ordered),
        "p50": statistics.median(ordered),
        "p99": ordered[min(len(ordered) - 1, int(len(ordered) * 0.99))],
        "max": ordered[-1],
    }


def _timeline(story: Story, memory: Sequence[tuple[float, int]], started: float) -> list[Raw]:
    """A row a second: how many wait, how long those bound in it had waited, how much was written, how large we are."""
    seconds = int(max(story.complete.values()) - started) + 2
    rows: list[Raw] = [{"second": i, "queue": 0, "writes": 0, "rss_bytes": 0, "waits": []} for i in range(seconds)]

    def at(when: float) -> int:
        return min(seconds - 1, max(0, int(when - started)))

    change: Counter[int] = Counter(at(when) for when in story.created.values())
    change.subtract(at(when) for when in story.bound.values())
    for when in story.write_times:
        rows[at(when)]["writes"] += 1
    for when, size in memory:
        rows[at(when)]["rss_bytes"] = max(size, rows[at(when)]["rss_bytes"])
    for name, when in story.bound.items():
        rows[at(when)]["waits"].append(when - story.created[name])
    queue = 0
    for row in rows:
        queue += change[row["second"]]
        row["queue"], waits = queue, row.pop("waits")
        row["wait_p50"] = statistics.median(waits) if waits else None
    return rows


async def restart(control_plane: ControlPlane, release: Release, plan: Plan) -> Raw:
    """The operator goes, as many requests come as there were, and the next operator starts."""
    release.stop_operator()
    async with users(control_plane) as somebody:
        await create(somebody, plan, "s")
    story, started = Story(control_plane, offset=_size(control_plane)), time.time()
    index = release.start_operator()
    pid, largest = release.operators[index].pid, 0
    limit = time.monotonic() + 120
    while not story.bound:
        await asyncio.sleep(0.1)
        largest = max(largest, rss_bytes(pid))
        story.read()
        assert time.monotonic() < limit, "nothing was bound within two minutes"
    settle = time.monotonic() + 5
    while time.monotonic() < settle:
        await asyncio.sleep(0.1)
        largest = max(largest, rss_bytes(pid))
    return {
        "objects": 2 * plan.requests,
        "waiting": plan.requests,
        "first_binding_seconds": min(story.bound.values()) - started,
        "rss_bytes": largest,
    }


async def run(options: argparse.Namespace, folder: Path) -> Raw:
    """All phases with one control plane."""
    plan = Plan(options.requests, min(options.adapters, options.requests), options.namespaces, options.spec_bytes)
    record: Raw = {"kind": "load", **circumstances("operator_load"), **vars(plan), "batch": BATCH}
    record["workers"] = options.workers
    with ControlPlane(folder / "control-plane", audit=True) as control_plane:
        admit_users(control_plane)
        if not options.no_raw:
            record["raw"] = await raw(control_plane, plan)
            _say(f"raw: {record['raw']['writes_per_second']:.0f} writes/s")
        (folder / "release").mkdir()
        with Release(control_plane, folder / "release", "--set", "teacher.enabled=false") as release:
            settings(release, options.workers, BATCH)
            adapters(release, plan)
            command = (sys.executable, "-m")
            if options.profile:
                command = (sys.executable, "-m", "cProfile", "-o", str(options.profile.resolve()), "-m")
            release.start_operator(command=command)
            release.wait_to_lead()
            wait_for_workers(release, options.workers)
            if options.idle:
                waits = await idle(control_plane, plan, options.idle)
                record["idle_created_to_bound_seconds"] = _quantiles(waits)
                _say(f"idle: {record['idle_created_to_bound_seconds']}")
            record["load"] = await load(control_plane, release, plan)
            _say(json.dumps({key: value for key, value in record["load"].items() if key != "timeline"}, indent=1))
            if options.restart:
                record["restart"] = await restart(control_plane, release, plan)
                _say(f"restart: {record['restart']}")
            release.stop_operator(number=signal.SIGTERM)
    if "raw" in record:
        record["share_of_raw"] = record["load"]["writes_per_second"] / record["raw"]["writes_per_second"]
        _say(f"share of raw: {record['share_of_raw']:.2f}")
    record["load_average_after"] = os.getloadavg()
    return record


async def flood(options: argparse.Namespace, folder: Path) -> Raw:
    """One namespace asks for thousands of steps that take time; another for one now and then."""
    plan = Plan(options.requests, 50, 1, 1024, prompt=f"takes {STEP_SECONDS} s")
    record: Raw = {"kind": "flood", **circumstances("operator_load"), **vars(plan), "step_seconds": STEP_SECONDS}
    record["workers"] = options.workers
    with ControlPlane(folder / "control-plane", audit=True) as control_plane:
        admit_users(control_plane)
        (folder / "release").mkdir()
        with Release(control_plane, folder / "release", "--set", "teacher.enabled=false") as release:
            settings(release, options.workers, 1)
            adapters(release, plan)
            release.namespace("quiet")
            release.adapter("quiet", "alone")
            release.start_operator()
            release.wait_to_lead()
            wait_for_workers(release, options.workers)
            story = Story(control_plane)
            async with users(control_plane) as somebody:
                await create(somebody, plan, "f")
                for i in range(SINGLES):
                    await somebody.post(_requests("quiet"), plan.request(f"single{i}", "alone"))
                    limit = time.monotonic() + 60
                    while f"quiet/single{i}" not in story.complete:
                        await asyncio.sleep(0.2)
                        story.read()
                        assert time.monotonic() < limit, f"single{i} has not ended within a minute"
            record["still_waiting"] = len(story.created) - len(story.bound)
            assert record["still_waiting"] > plan.requests / 2, "the flood was over too soon to say anything"
            singles = [f"quiet/single{i}" for i in range(SINGLES)]
            record["created_to_bound_seconds"] = _quantiles([story.bound[s] - story.created[s] for s in singles])
            _say(f"flood: {record['created_to_bound_seconds']}")
    return record


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# The verdict


def verdict(records: Sequence[Mapping[str, Any]]) -> list[Judged]:
    """Mean and spread of what the bounds name, over the records of the same kind and size."""
    alike: dict[tuple[str, int], list[Raw]] = {}
    for record in records:
        alike.setdefault((_name(record), record["requests"]), []).append({record["kind"]: record})
    limits = bounds("operator")
    return [
        one
        for (name, requests), group in alike.items()
        for one in judged(
            name, group, {k: b for k, b in limits.items() if requests <= b.get("up_to_requests", requests)}
        )
    ]


def _name(record: Mapping[str, Any]) -> str:
    return f"{record['kind']} of {record['requests']} requests of {record['spec_bytes']} bytes"


def main(argv: Sequence[str] | None = None) -> int:
    """0, or 1 where a bound does not hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, requests, workers in (("run", 10_000, 8), ("flood", 5_000, 4)):
        command = commands.add_parser(name)
        command.add_argument("--requests", type=int, default=requests)
        command.add_argument("--workers", type=int, default=workers, help="real agents that stay")
        command.add_argument("--out", type=Path, default=Path("build/operator-load.json"))
    run_ = commands.choices["run"]
    run_.add_argument("--adapters", type=int, default=200)
    run_.add_argument("--namespaces", type=int, default=20)
    run_.add_argument("--spec-bytes", type=int, default=1024)
    run_.add_argument("--idle", type=int, default=IDLE_REQUESTS, help="single requests before the load; 0: none")
    run_.add_argument("--restart", action="store_true", help="restart the operator with everything there")
    run_.add_argument("--no-raw", action="store_true", help="leave the raw rate out")
    run_.add_argument("--profile", type=Path, help="of the operator, by cProfile (which makes it slow)")
    for name in ("plot", "verdict"):
        commands.add_parser(name).add_argument("--out", type=Path, default=Path("build/operator-load.json"))
    options = parser.parse_args(argv)
    records = json.loads(options.out.read_text()) if options.out.exists() else []
    if options.command == "plot":
        operator_plots.plot(records, options.out.with_suffix(".png"))
    elif options.command == "verdict":
        found = verdict(records)
        print("\n".join(map(str, found)) or f"no records in {options.out}")
        return 0 if found and all(one.holds for one in found) else 1
    else:
        with tempfile.TemporaryDirectory(prefix="claas-bench-") as folder:
            record = asyncio.run((run if options.command == "run" else flood)(options, Path(folder)))
        write(options.out, [*records, record])
    return 0


if __name__ == "__main__":
    sys.exit(main())
