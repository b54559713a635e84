"""Looking around: pages, versions, lineage, rollback, and the events of a request."""

from __future__ import annotations

import json
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from claas_crds import names
from operatorstage import GROUP
from shimstage import Shim, ShimStage

pytestmark = pytest.mark.controlplane

SAID = {"prompt": "SECRET", "response": "SECRET"}


def pages(client: httpx.Client, path: str, **params: Any) -> list[dict[str, Any]]:
    """Every item, page by page."""
    found: list[dict[str, Any]] = []
    while True:
        page = client.get(path, params=params)
        assert page.status_code == 200, page.text
        assert len(page.json()["items"]) <= params["limit"]
        found += page.json()["items"]
        if "continue" not in page.json():
            return found
        params["continue"] = page.json()["continue"]


def teach(client: httpx.Client, adapter: str) -> dict[str, Any]:
    answer = client.post("/v1/distill", json=SAID | {"adapter": adapter})
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def test_pages(stage: ShimStage, team: httpx.Client) -> None:
    for number in range(5):
        stage.adapter(f"page-{number}")
    made = [team.post("/v1/distill?wait=0", json=SAID | {"adapter": f"page-{n}"}).json()["id"] for n in range(5)]
    assert {a["name"] for a in pages(team, "/v1/adapters", limit=2)} >= {f"page-{n}" for n in range(5)}
    listed = [r["id"] for r in pages(team, "/v1/requests", limit=2)]
    assert len(listed) == len(set(listed)) and set(made) <= set(listed)
    assert "SECRET" not in team.get("/v1/requests").text


def test_versions_and_lineage(stage: ShimStage, team: httpx.Client) -> None:
    stage.adapter("family")
    uris = [teach(team, "family")["lora_uri"] for _ in range(3)]
    versions = pages(team, "/v1/adapters/family/versions", limit=2)
    assert [v["seq"] for v in versions] == [4, 3, 2, 1]
    assert [v["lora_uri"] for v in versions[:3]] == uris[::-1]
    assert [v["head"] for v in versions] == [True, False, False, False]
    lineage = team.get("/v1/adapters/family/lineage").json()
    assert [v["seq"] for v in lineage["items"]] == [4, 3, 2, 1] and lineage["complete"]
    older = team.get("/v1/adapters/family/lineage", params={"version": versions[2]["version"]}).json()
    assert [v["seq"] for v in older["items"]] == [2, 1]
    assert team.get("/v1/adapters/family/lineage", params={"version": "nobody"}).status_code == 404
    adapter = team.get("/v1/adapters/family").json()
    assert (adapter["lora_uri"], adapter["head_seq"], adapter["steps"], adapter["tokens"]) == (uris[2], 4, 3, 21)


def test_rollback_asks_the_operator_and_waits_for_it(stage: ShimStage, team: httpx.Client) -> None:
    """The operator's part is played by the test where this release's operator does not roll back yet."""
    stage.adapter("regret")
    teach(team, "regret")
    path = f"{GROUP}/namespaces/{stage.team}/{names.ADAPTER_PLURAL}/regret"
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(team.post, "/v1/adapters/regret/rollback", json={"version": "regret"})
        stage.wait("the wish", lambda: stage.see_adapter("regret")["spec"].get("rollbackTo") == "regret")
        raw = stage.see_adapter("regret")
        first = raw["status"]["history"][0]
        if raw["status"]["headSeq"] == 2:
            moved = first | {"seq": 3}
            status = {
                "uri": first["uri"],
                "version": "regret",
                "headSeq": 3,
                "history": [*raw["status"]["history"], moved],
                "rolledBackGeneration": raw["metadata"]["generation"],
            }
            stage.api("PATCH", f"{path}/status", {"status": status})
        answer = waiting.result()
    assert answer.status_code == 200, answer.text
    assert (answer.json()["version"], answer.json()["head_seq"]) == ("regret", 3)
    again = team.post("/v1/adapters/regret/rollback", json={"version": "regret"})
    assert (again.status_code, again.json()["head_seq"]) == (200, 3), "it is the head already"
    for unknown in ("nobody", "../regret"):
        assert team.post("/v1/adapters/regret/rollback", json={"version": unknown}).status_code == 404


def events(client: httpx.Client, path: str) -> list[tuple[str, dict[str, Any]]]:
    """Every event until the stream ends."""
    found, name = [], ""
    with client.stream("GET", path) as stream:
        assert stream.headers["content-type"].startswith("text/event-stream")
        for line in stream.iter_lines():
            if line.startswith("event: "):
                name = line.removeprefix("event: ")
            elif line.startswith("data: "):
                found.append((name, json.loads(line.removeprefix("data: "))))
    return found


def test_events_follow_a_request_to_its_end(stage: ShimStage, shim: Shim, team: httpx.Client) -> None:
    stage.adapter("watched", ready=False)
    id_ = team.post("/v1/distill?wait=0", json=SAID | {"adapter": "watched"}).json()["id"]
    with ThreadPoolExecutor() as threads, shim.client() as another:
        streams = [threads.submit(events, client, f"/v1/requests/{id_}/events") for client in (team, another)]
        stage.wait("its reason", lambda: stage.see(id_).get("reason") == "AdapterNotReady")
        uri = f"s3://adapters/{stage.team}/watched/"
        entry = {"seq": 1, "version": "watched", "uri": uri, "requestUid": "", "at": "2026-01-01T00:00:00.000000Z"}
        path = f"{GROUP}/namespaces/{stage.team}/{names.ADAPTER_PLURAL}/watched/status"
        stage.api("PATCH", path, {"status": {"uri": uri, "version": "watched", "headSeq": 1, "history": [entry]}})
        for stream in streams:
            seen = stream.result(timeout=30)
            assert [name for name, _ in seen[:-1]] == ["phase"] * (len(seen) - 1) and seen[-1][0] == "end"
            assert {"Pending", "Complete"} <= {shown["state"] for _, shown in seen}
            assert "AdapterNotReady" in {shown["reason"] for _, shown in seen}
            assert seen[-1][1]["metadata"]["tokens_processed"] == 7
            assert "SECRET" not in json.dumps(seen)
    assert [name for name, _ in events(team, f"/v1/requests/{id_}/events")] == ["end"], "of what has ended, its end"


def test_a_stream_ends_when_its_request_is_deleted_or_the_shim_stops(stage: ShimStage) -> None:
    shim = stage.start_shim()
    stage.adapter("doomed", ready=False)
    with shim.client() as client, ThreadPoolExecutor() as threads:
        ids = [client.post("/v1/distill?wait=0", json=SAID | {"adapter": "doomed"}).json()["id"] for _ in range(2)]
        streams = [threads.submit(events, client, f"/v1/requests/{id_}/events") for id_ in ids]
        waiting = threads.submit(client.get, f"/v1/requests/{ids[0]}", params={"wait": 60})
        stage.wait("the streams", lambda: shim.log.read_text().count("distill") >= 2)
        threading.Event().wait(0.5)
        stage.api("DELETE", stage.request_path(ids[0]))
        assert streams[0].result(timeout=10)[-1][0] == "phase"
        assert waiting.result(timeout=10).status_code == 410
        shim.process.terminate()
        assert streams[1].result(timeout=10)[-1][0] == "phase"
    assert shim.process.wait(timeout=15) == 0


def test_a_stream_ends_when_its_time_is_over(stage: ShimStage) -> None:
    shim = stage.start_shim(waitSeconds=0.5, maxWaitSeconds=0.5)
    stage.adapter("slow", ready=False)
    with shim.client() as client:
        id_ = client.post("/v1/distill?wait=0", json=SAID | {"adapter": "slow"}).json()["id"]
        started = time.monotonic()
        assert events(client, f"/v1/requests/{id_}/events")[-1][1]["state"] == "Pending"
        assert time.monotonic() - started < 5
    shim.kill()
