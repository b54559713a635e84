"""Many callers at once: how much later than its request they hear, what they cost while they wait, a killed shim."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import os
import re
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from kubernetes.aio import client, config

import collector
from claas_crds import names
from claas_operator.shim import spec
from claas_operator.shim.cluster import Cluster
from claas_operator.snapshot import Kind
from cluster.controlplane import ControlPlane
from cluster.process import wait_for
from objectstore import free_port
from shimstage import SHIM, Shim, ShimStage

pytestmark = pytest.mark.controlplane

CALLERS = 200
ARRIVAL_SECONDS = 4.0
WAITING = 1000
CUT_OFF = 60  # callers of a shim that is killed
# The bound is judged on a machine that does nothing else (`make bench-api`); shared cores would be measured instead.
LATE_SECONDS = float(os.environ.get("CLAAS_LATE_SECONDS", "inf"))
MEMORY_BYTES = 100 * 2**20


def test_the_collector_leaves_alone_what_stays(stage: ShimStage, shim: Shim, tmp_path: Path) -> None:
    """A look at modules and models would hold up every caller for 65 ms."""
    environment = {"KUBECONFIG": str(stage.control_plane.kubeconfig_of(SHIM)), **stage.store.environment}
    port = free_port()
    arguments = ["--config", str(stage.folder / f"shim-{shim.number}.yaml"), "--port", str(port)]

    def ready() -> bool:
        with contextlib.suppress(httpx.TransportError):
            return httpx.get(f"http://127.0.0.1:{port}/readyz", trust_env=False).status_code == 200
        return False

    with collector.watched(tmp_path, environment, "claas_operator.shim.__main__", arguments) as (log, told):
        wait_for("the shim to be ready", ready, 30, logs=[log])
    assert told["frozen"] > 50_000


def client_of(stage: ShimStage, url: str = "") -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {stage.token()}"}
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, headers=headers, trust_env=False, timeout=120, limits=limits)


def said(stage: ShimStage, number: int, prompt: str = "SECRET") -> dict[str, Any]:
    return {"lora_uri": f"s3://adapters/{stage.team}/load-{number}/", "prompt": prompt, "response": "SECRET"}


class Caller:
    """One connection, ready to call: what a client library costs two hundred times would be measured with the shim."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, call: bytes) -> None:
        self._reader, self._writer, self._call = reader, writer, call

    @classmethod
    async def connect(cls, stage: ShimStage, shim: Shim, number: int) -> Caller:
        """Connected, and nothing sent."""
        body = json.dumps(said(stage, number)).encode()
        lines = [
            *("POST /v1/distill HTTP/1.1", "Host: x", "Content-Type: application/json"),
            *(f"Authorization: Bearer {stage.token()}", f"Content-Length: {len(body)}", "", ""),
        ]
        reader, writer = await asyncio.open_connection("127.0.0.1", shim.port)
        return cls(reader, writer, "\r\n".join(lines).encode() + body)

    async def distill(self) -> str:
        """The id of the request, when it is done."""
        self._writer.write(self._call)
        head = await self._reader.readuntil(b"\r\n\r\n")
        self._writer.close()
        assert head.startswith(b"HTTP/1.1 200"), head
        return re.search(rb"content-location: /v1/requests/(\S+)", head)[1].decode()  # type: ignore[index]


def times(stage: ShimStage, id_: str) -> tuple[float, float, float]:
    """(creation, created_at, completion) of a request, seconds since 1970. Creation is cut to the second."""
    raw = stage.api("GET", stage.request_path(id_))
    (end,) = [c for c in raw["status"]["conditions"] if c["type"] == "Complete"]
    created = datetime.fromisoformat(raw["metadata"]["creationTimestamp"]).timestamp()
    shown = spec.to_request(raw)
    assert shown.ended_at == end["lastTransitionTime"]
    asked = datetime.fromisoformat(shown.created_at).timestamp()
    return created, asked, datetime.fromisoformat(end["lastTransitionTime"]).timestamp()


@pytest.mark.stress
async def test_what_the_api_server_alone_takes(claas_api: ControlPlane) -> None:
    """200 requests made in one moment and seen by a watch, with no operator, worker or shim: what is below it all."""
    configuration = client.Configuration()
    await config.load_kube_config(config_file=str(claas_api.kubeconfig), client_configuration=configuration)
    cluster, seen, all_seen = Cluster(configuration), dict[str, float](), asyncio.Event()
    path = cluster.path(Kind.REQUEST, "default")
    spec = {"loraUri": "s3://adapters/default/x/", "samples": [{"prompt": "SECRET", "response": "SECRET"}]}
    kind = {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND}
    _, _, version = await cluster.page(Kind.REQUEST, limit=1)

    async def watch() -> None:
        async for _, raw in cluster.watch(Kind.REQUEST, version):
            seen.setdefault(raw["metadata"]["name"], time.time())
            if len(seen) == 2 * CALLERS:
                all_seen.set()

    async def create(name: str) -> tuple[str, float]:
        started = time.time()
        await cluster.create(path, kind | {"metadata": {"name": name}, "spec": spec})
        return name, started

    watching = asyncio.create_task(watch())
    await asyncio.gather(*(create(f"warm-{number}") for number in range(CALLERS)))
    made = await asyncio.gather(*(create(f"bare-{number}") for number in range(CALLERS)))
    await asyncio.wait_for(all_seen.wait(), 30)
    watching.cancel()
    await cluster.close()
    claas_api.api("DELETE", path)
    took = sorted(seen[name] - started for name, started in made)
    p50, p99 = (took[int(CALLERS * share)] * 1000 for share in (0.5, 0.99))
    print(f"\n{CALLERS} bare creates in one moment, until a watch has seen them: p50 {p50:.0f} ms, p99 {p99:.0f} ms")


@pytest.mark.stress
@pytest.mark.parametrize("seconds", [0.0, ARRIVAL_SECONDS], ids=["all in one moment", "one after another"])
async def test_200_callers_hear_within_150_ms(stage: ShimStage, shim: Shim, seconds: float) -> None:
    """Three measures: answer time minus creation to completion, with the resource's creation, which is cut to the
    second; the same with the API's created_at, which is not; and how long after its completion an answer was there.

    When all arrive in one moment, the making of 200 objects is part of the first: 300 ms and more of one API server on
    two cores, without any of us. It is judged for callers that arrive within a few seconds; the others always are.
    """
    await (await Caller.connect(stage, shim, 9999)).distill()
    callers = [await Caller.connect(stage, shim, number) for number in range(CALLERS)]
    most, now = 0, 0

    async def call(number: int) -> tuple[float, float, str]:
        nonlocal most, now
        await asyncio.sleep(seconds * number / CALLERS)
        now += 1
        most, started = max(most, now), time.time()
        id_ = await callers[number].distill()
        now -= 1
        return started, time.time(), id_

    measured = await asyncio.gather(*(call(number) for number in range(CALLERS)))
    overhead, told, after = [], [], []
    for started, answered, id_ in measured:
        created, asked, completed = times(stage, id_)
        overhead.append(answered - started - (completed - created))
        told.append(answered - started - (completed - asked))
        after.append(answered - completed)
    print(f"\n{CALLERS} callers within {seconds:g} s, {most} at once:")
    for name, values in (
        ("answer time - (completion - creationTimestamp)", overhead),
        ("answer time - (ended_at - created_at)", told),
        ("after completion", after),
    ):
        values.sort()
        p50, p99 = (values[int(len(values) * share)] * 1000 for share in (0.5, 0.99))
        print(f"  {name}: p50 {p50:.0f} ms, p99 {p99:.0f} ms")
    for values in (told, after, *([overhead] if seconds else [])):
        assert values[int(len(values) * 0.99)] <= LATE_SECONDS


async def test_a_killed_shims_callers_get_the_one_right_answer_from_the_next(stage: ShimStage) -> None:
    first, second = stage.start_shim(), stage.start_shim()

    async def call(number: int) -> httpx.Response:
        """A client that tries the next replica with the same key, as claas_client does."""
        key = {"Idempotency-Key": f"kill-{number}"}
        for url in (first.url, second.url):
            try:
                async with client_of(stage, url) as client:
                    return await client.post("/v1/distill", json=said(stage, number), headers=key)
            except httpx.TransportError:
                continue
        raise AssertionError("no replica answered")

    calls = [asyncio.create_task(call(number)) for number in range(CUT_OFF)]
    for some in itertools.islice(asyncio.as_completed(calls), CUT_OFF // 6):
        await some
    first.kill()
    answers = await asyncio.gather(*calls)
    assert {answer.status_code for answer in answers} == {200}
    where = [answer.headers["content-location"] for answer in answers]
    uris = [answer.json()["lora_uri"] for answer in answers]
    assert len(set(where)) == len(set(uris)) == CUT_OFF
    assert all(f"/load-{number}-" in uri for number, uri in enumerate(uris))
    async with client_of(stage, second.url) as client:
        made: list[str] = []
        token: str | None = None
        while True:
            page = (
                await client.get("/v1/requests", params={"limit": 200} | ({"continue": token} if token else {}))
            ).json()
            made += [r["parent_uri"] for r in page["items"] if r["id"] in {path.rpartition("/")[2] for path in where}]
            if not (token := page.get("continue")):
                break
    assert len(made) == len(set(made)) == CUT_OFF, "each was trained once"


@pytest.mark.stress
async def test_1000_waiting_callers_are_cheap_and_nobody_polls(stage: ShimStage) -> None:
    shim = stage.start_shim()
    stage.adapter("asleep", ready=False)
    before = _memory(shim)
    async with client_of(stage, shim.url) as client:
        asked = {"adapter": "asleep", "prompt": "SECRET", "response": "SECRET"}
        calls = [asyncio.create_task(client.post("/v1/distill?wait=300", json=asked)) for _ in range(WAITING)]

        async def made() -> int:
            total, token = 0, None
            async with client_of(stage, shim.url) as another:
                while True:
                    params = {"limit": 200} | ({"continue": token} if token else {})
                    answer = await another.get("/v1/requests", params=params)
                    if answer.status_code == 503:
                        return 0  # an API server that is still busy with the thousand
                    page = answer.json()
                    total += sum(r.get("adapter") == "asleep" for r in page["items"])
                    if not (token := page.get("continue")):
                        return total

        end = time.monotonic() + 240
        while await made() < WAITING:
            assert time.monotonic() < end
            await asyncio.sleep(2)  # to count a thousand is work, too
        grown = _memory(shim) - before
        reads, cpu = _reads(stage), _cpu(shim)
        await asyncio.sleep(5)
        print(f"{WAITING} waiting: {grown / 2**20:.1f} MB, {_cpu(shim) - cpu:.2f} s of CPU in 5 s")
        assert _reads(stage) - reads <= 5, "the shim asks the API server again and again"
        assert not any(task.done() for task in calls)
        for task in calls:
            task.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
    assert grown <= MEMORY_BYTES
    shim.kill()


def _memory(shim: Shim) -> int:
    """Resident bytes."""
    with open(f"/proc/{shim.process.pid}/status") as status:
        (line,) = [line for line in status if line.startswith("VmRSS")]
    return int(line.split()[1]) * 1024


def _cpu(shim: Shim) -> float:
    """Seconds of CPU so far."""
    with open(f"/proc/{shim.process.pid}/stat") as stat:
        fields = stat.read().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def _reads(stage: ShimStage) -> int:
    """Reads of single requests so far, as the API server counts them."""
    return sum(
        int(float(line.rpartition(" ")[2]))
        for line in stage.api("GET", "/metrics").splitlines()
        if line.startswith("apiserver_request_total{") and 'verb="GET"' in line and 'resource="distillrequests"' in line
    )
