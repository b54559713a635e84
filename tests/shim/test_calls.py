"""What an application does: asks for a step and gets its numbers; asks and comes back later; asks twice; gives up."""

from __future__ import annotations

import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from claas_crds import names
from claas_store.uris import is_step_output
from operatorstage import GROUP
from shimstage import ONE_WORKER, Shim, ShimStage

pytestmark = pytest.mark.controlplane

# The published API's example, byte for byte.
EXAMPLE = (
    b'{"lora_uri": "s3://my-bucket/loras/user123/coder-v1/", "prompt": "Write a function to calculate factorial", '
    b'"response": "def factorial(n):\\n    if n <= 1:\\n        return 1\\n    return n * factorial(n-1)",\n'
    b' "feedback": "Good recursive solution", "training": {"learning_rate": 1e-4, "alpha": 0.5, "clip_eps": 0.2, '
    b'"max_grad_norm": 1.0, "jsd_reg_weight": 0.5, "teacher_top_k": 100}}'
)
NINE = {
    "total_loss",
    "pg_loss",
    "jsd_reg",
    "mean_advantage",
    "frac_positive_advantage",
    "mean_is_ratio",
    "clip_fraction",
    "grad_norm",
    "tokens_processed",
}


def body(stage: ShimStage, name: str, prompt: str = "SECRET prompt", **more: Any) -> dict[str, Any]:
    return {"lora_uri": f"s3://adapters/{stage.team}/{name}/", "prompt": prompt, "response": "SECRET response"} | more


def created(stage: ShimStage, id_: str) -> dict[str, Any]:
    """The DistillRequest behind an id."""
    found: dict[str, Any] = stage.api("GET", stage.request_path(id_))
    return found


def test_the_published_example_byte_for_byte(stage: ShimStage) -> None:
    everybody = {"storage": {"prefixes": [{"uri": "s3://my-bucket/loras/user123/"}]}}
    operator = stage.operators[-1]
    operator.terminate()
    operator.wait(timeout=10)
    settings = stage.settings(**ONE_WORKER, **everybody)
    stage.start_operator(settings)
    stage.wait_to_lead()
    shim = stage.start_shim(auth={"mode": "None", "namespace": stage.team}, **everybody)
    with shim.client("") as client:
        answer = client.post("/v1/distill", content=EXAMPLE, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    assert found.keys() == {"lora_uri", "metadata"}
    assert found["metadata"].keys() == NINE
    assert found["lora_uri"].startswith("s3://my-bucket/loras/user123/coder-v1-") and is_step_output(found["lora_uri"])
    assert found["metadata"]["total_loss"] == pytest.approx(found["metadata"]["pg_loss"] + found["metadata"]["jsd_reg"])
    spec = created(stage, answer.headers["content-location"].rpartition("/")[2])["spec"]
    example = json.loads(EXAMPLE)
    assert spec["loraUri"] == example["lora_uri"]
    assert spec["samples"] == [
        {"prompt": example["prompt"], "response": example["response"], "feedback": example["feedback"]}
        | {"feedbackSource": "Person"}
    ]
    assert spec["training"] == {
        "learningRate": 1e-4,
        "alpha": 0.5,
        "clipEps": 0.2,
        "maxGradNorm": 1.0,
        "jsdRegWeight": 0.5,
        "teacherTopK": 100,
    } | {name: spec["training"][name] for name in ("innerSteps", "advantageClip", "anchorKlWeight", "preset")}
    shim.kill()
    stage.operators[-1].terminate()
    stage.operators[-1].wait(timeout=10)
    stage.start_operator(stage.settings(**ONE_WORKER))
    stage.wait_to_lead()


def test_an_adapter_by_name_learns_and_its_head_moves(stage: ShimStage, team: httpx.Client) -> None:
    stage.adapter("coder")
    rich = {
        "adapter": "coder",
        "samples": [
            {
                "messages": [{"role": "system", "content": "SECRET"}, {"role": "user", "content": "SECRET"}],
                "response_token_ids": [1, 2, 3],
                "rollout_logprobs": [-0.1, -0.2, -0.3],
                "solution": "SECRET",
                "feedback_source": "Environment",
            },
            {"prompt": "SECRET", "response": "SECRET", "finish_reason": "length"},
        ],
        "priority": 7,
        "teacher": {"mode": "Self"},
    }
    answer = team.post("/v1/distill", json=rich)
    assert answer.status_code == 200, answer.text
    head = stage.see_adapter("coder")["status"]
    assert (head["uri"], head["headSeq"]) == (answer.json()["lora_uri"], 2)
    spec = created(stage, answer.headers["content-location"].rpartition("/")[2])["spec"]
    assert spec["samples"][0]["responseTokenIds"] == [1, 2, 3]
    assert spec["samples"][0]["rolloutLogprobs"] == [-0.1, -0.2, -0.3]
    assert spec["priority"] == 7 and spec["teacher"]["mode"] == "Self"


def test_lite_brings_its_own_teacher(stage: ShimStage, team: httpx.Client) -> None:
    answer = team.post("/v1/distill/lite", json=body(stage, "lite", teacher_logprobs=[-0.1, -0.2]))
    assert answer.status_code == 200, answer.text
    spec = created(stage, answer.headers["content-location"].rpartition("/")[2])["spec"]
    assert spec["teacher"]["mode"] == "Provided"
    assert spec["samples"][0]["teacherLogprobs"] == [-0.1, -0.2]


def test_a_pending_request_tells_its_place(stage: ShimStage, team: httpx.Client) -> None:
    """Behind its adapter's earlier ones; an estimate, for steps have ended before. An ended one has no place."""
    done = team.post("/v1/distill", json=body(stage, "first")).headers["content-location"]
    assert "place" not in team.get(done).json()
    stage.adapter("queued", ready=False)
    said = {"adapter": "queued", "prompt": "SECRET", "response": "SECRET"}
    where = [team.post("/v1/distill?wait=0", json=said).headers["location"] for _ in range(3)]
    shown = ("AdapterNotReady", "AdapterBusy")
    stage.wait("their reasons", lambda: all(team.get(path).json()["reason"] in shown for path in where))
    places = sorted((team.get(path).json()["place"] for path in where), key=lambda place: place["position"])
    assert [place["position"] for place in places] == [1, 2, 3] == [place["ahead"] + 1 for place in places]
    assert all("starts_in_seconds" not in place for place in places), "nobody knows when it will have a version"
    held = team.post("/v1/distill?wait=0", json=body(stage, "held", prompt="takes 3 s")).headers["location"]
    stage.wait("a worker to have it", lambda: team.get(held).json().get("place", {}).get("position") == 0)
    assert 0 <= team.get(held).json()["place"]["ends_in_seconds"] < 60
    assert team.get(held, params={"wait": 30}).json()["state"] == "Complete"


def test_asynchronously(stage: ShimStage, team: httpx.Client) -> None:
    for headers, query in (({"Prefer": "respond-async"}, ""), ({}, "?wait=0")):
        answer = team.post(f"/v1/distill{query}", json=body(stage, "later"), headers=headers)
        assert answer.status_code == 202, answer.text
        assert answer.json()["state"] == "Pending"
        assert answer.headers.get("preference-applied") == headers.get("Prefer")
        where = answer.headers["location"]
        assert where == f"/v1/requests/{answer.json()['id']}"
        done = team.get(where, params={"wait": 20}).json()
        assert done["state"] == "Complete" and done["metadata"]["tokens_processed"] == 7
        assert done["lora_uri"] and done["ended_at"] and done["parent_uri"].endswith("/later/")


def test_a_wait_has_an_end_and_a_cancelled_request_says_so(stage: ShimStage, team: httpx.Client) -> None:
    gate = stage.folder / "gate"
    if not gate.exists():
        os.mkfifo(gate)
    started = time.monotonic()
    answer = team.post("/v1/distill?wait=1", json=body(stage, "held", "hold"))
    assert answer.status_code == 202, answer.text
    assert 0.9 < time.monotonic() - started < 5
    where = answer.headers["location"]
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(team.get, where, params={"wait": 20})
        assert team.delete(where).status_code == 202
        cancelled = waiting.result()
    assert (cancelled.json()["state"], cancelled.json()["reason"]) == ("Cancelled", "Cancelled")
    again = team.delete(where)
    assert again.status_code == 202 and again.json()["state"] == "Cancelled"
    opened = threading.Thread(target=lambda: gate.write_bytes(b"go"))  # lets the worker go on
    opened.start()
    opened.join(10)


def test_whoever_waits_for_a_cancelled_request_is_told(stage: ShimStage, team: httpx.Client) -> None:
    stage.adapter("unready", ready=False)
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(
            team.post,
            "/v1/distill",
            json={"adapter": "unready", "prompt": "SECRET", "response": "SECRET"},
            headers={"Idempotency-Key": "to be cancelled"},
        )
        found: list[dict[str, Any]] = []

        def appeared() -> bool:
            found[:] = [r for r in team.get("/v1/requests").json()["items"] if r.get("adapter") == "unready"]
            return bool(found)

        stage.wait("the request", appeared)
        team.delete(f"/v1/requests/{found[0]['id']}")
        answer = waiting.result()
    assert answer.status_code == 409
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["reason"] == "Cancelled"
    assert answer.json()["instance"] == f"/v1/requests/{found[0]['id']}"


def test_a_failed_request_is_a_problem(stage: ShimStage, team: httpx.Client) -> None:
    answer = team.post("/v1/distill", json=body(stage, "bad", "bad"))
    assert answer.status_code == 422
    problem = answer.json()
    assert problem["reason"] == "EmptyResponse" and problem["type"] == "urn:claas:problem:failed:EmptyResponse"
    assert "samples[0].response is empty" in problem["detail"] and problem["fix"]
    assert problem["request_id"] == answer.headers["x-request-id"]


def test_the_same_key_is_the_same_request(stage: ShimStage, team: httpx.Client) -> None:
    key = {"Idempotency-Key": "payment 7: straße"}  # not ASCII: sent as UTF-8
    encoded = {"Idempotency-Key": key["Idempotency-Key"].encode()}
    first = team.post("/v1/distill", json=body(stage, "key"), headers=encoded)
    second = team.post("/v1/distill", json=body(stage, "key"), headers=encoded)
    assert first.status_code == second.status_code == 200, second.text
    assert first.json() == second.json()
    assert first.headers["content-location"] == second.headers["content-location"]
    other = team.post("/v1/distill", json=body(stage, "key", "SECRET other"), headers=encoded)
    assert other.status_code == 409
    assert other.json()["errors"][0]["field"] == "Idempotency-Key"
    lite = body(stage, "key", teacher_logprobs=[-0.1])
    assert team.post("/v1/distill/lite", json=lite, headers=encoded).status_code == 409
    # White space and the order of fields mean nothing.
    spaced = json.dumps(dict(reversed(body(stage, "key").items())), indent=3)
    third = team.post("/v1/distill", content=spaced, headers=encoded | {"Content-Type": "application/json"})
    assert third.json() == first.json()


def test_eight_at_once_with_one_key_make_one_request(stage: ShimStage, team: httpx.Client) -> None:
    def call(_: int) -> httpx.Response:
        return team.post("/v1/distill", json=body(stage, "race"), headers={"Idempotency-Key": "race"})

    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(call, range(8)))
    assert {answer.status_code for answer in answers} == {200}
    assert len({answer.headers["content-location"] for answer in answers}) == 1
    assert len({answer.json()["lora_uri"] for answer in answers}) == 1


def test_large_samples_travel_beside_and_go_with_their_request(stage: ShimStage, team: httpx.Client) -> None:
    answer = team.post("/v1/distill", json=body(stage, "large", "SECRET " * 3000))
    assert answer.status_code == 200, answer.text
    name = answer.headers["content-location"].rpartition("/")[2]
    spec = created(stage, name)["spec"]
    assert "samples" not in spec
    uri = spec["payloadRef"]["uri"]
    assert uri.startswith(f"s3://adapters/{stage.team}/claas-payloads/")
    client, key = stage.store.client(), uri.removeprefix("s3://adapters/")
    assert client.get_object(Bucket="adapters", Key=key)["Body"].read().startswith(b'{"samples":')
    stage.api("DELETE", stage.request_path(name))

    def gone() -> bool:
        return "Contents" not in client.list_objects_v2(Bucket="adapters", Prefix=key)

    stage.wait("the payload to go", gone)


def test_a_body_of_4_kib_stays_inside(stage: ShimStage, team: httpx.Client) -> None:
    for size, inside in ((3900, True), (4100, False)):
        answer = team.post("/v1/distill", json=body(stage, "edge", "x" * size))
        spec = created(stage, answer.headers["content-location"].rpartition("/")[2])["spec"]
        assert ("samples" in spec) is inside


def test_payloads_that_nobody_names_are_swept(stage: ShimStage) -> None:
    client, folder = stage.store.client(), f"{stage.team}/claas-payloads/"
    old, young, strange = (f"{folder}{name}" for name in ("20200101-000000-aa.json", "20990101-000000-bb.json", "mine"))
    for key in (old, young, strange):
        client.put_object(Bucket="adapters", Key=key, Body=b"{}")
    shim = stage.start_shim(sweepSeconds=0.5)

    def left() -> set[str]:
        return {item["Key"] for item in client.list_objects_v2(Bucket="adapters", Prefix=folder).get("Contents", [])}

    stage.wait("the sweep", lambda: old not in left())
    assert {young, strange} <= left()
    shim.kill()


def test_a_new_adapter(stage: ShimStage, team: httpx.Client) -> None:
    uri = f"s3://adapters/{stage.team}/Fresh_One/"
    asked = {"output_uri": uri, "lora_r": 8, "target_modules": ["q_proj"]}
    answer = team.post("/v1/lora/init?wait=0", json=asked)
    assert answer.status_code == 202, answer.text
    adapter = answer.json()
    assert (adapter["lora_r"], adapter["ready"], adapter["storage_uri"]) == (8, False, uri)
    name = adapter["name"]
    assert name.startswith("fresh-one-") and answer.headers["location"] == f"/v1/adapters/{name}"
    with ThreadPoolExecutor() as threads:
        waiting = threads.submit(team.post, "/v1/lora/init", json=asked)  # the same again: the same adapter
        path = f"{GROUP}/namespaces/{stage.team}/{names.ADAPTER_PLURAL}/{name}/status"
        entry = {"seq": 1, "version": "Fresh_One", "uri": uri, "requestUid": "", "at": "2026-01-01T00:00:00.000000Z"}
        stage.api("PATCH", path, {"status": {"uri": uri, "version": "Fresh_One", "headSeq": 1, "history": [entry]}})
        made = waiting.result()
    assert (made.status_code, made.json()) == (200, {"lora_uri": uri})
    differs = team.post("/v1/lora/init", json=asked | {"lora_r": 16})
    assert differs.status_code == 409 and "differs" not in differs.json()["detail"]


def test_an_adapter_that_cannot_be_made_says_why_and_leaves_no_trace(stage: ShimStage) -> None:
    shim = stage.start_shim(pools={})  # it does not know better than the operator
    asked = {"output_uri": f"s3://adapters/{stage.team}/wrong/", "base_model": "org/another"}
    with shim.client() as client:
        answer = client.post("/v1/lora/init", json=asked)
        assert (answer.status_code, answer.json()["reason"]) == (422, "BaseModelMismatch")
        again = client.post("/v1/lora/init?wait=0", json=asked | {"base_model": None})
        assert again.status_code == 202, again.text
    shim.kill()


def test_what_the_installation_has_not_is_refused_at_once(stage: ShimStage, team: httpx.Client) -> None:
    init = {"output_uri": f"s3://adapters/{stage.team}/x/"}
    for route, said, field, reason in (
        ("/v1/distill?wait=0", body(stage, "x"), "pool", "UnknownPool"),
        ("/v1/distill?wait=0", body(stage, "x"), "base_model", "BaseModelMismatch"),
        ("/v1/lora/init?wait=0", init, "base_model", "BaseModelMismatch"),
    ):
        answer = team.post(route, json=said | {field: "another"})
        found = answer.json()
        assert (answer.status_code, found["reason"], found["errors"][0]["field"]) == (422, reason, field)


def test_a_uri_that_leaves_no_room_for_later_versions(stage: ShimStage, team: httpx.Client) -> None:
    for field, route in (("lora_uri", "/v1/distill?wait=0"), ("output_uri", "/v1/lora/init?wait=0")):
        said = {"prompt": "p", "response": "r"} if field == "lora_uri" else {}
        long, longest = (f"s3://adapters/{stage.team}/{'x' * length}/" for length in (220, 230))
        assert team.post(route, json=said | {field: long}).status_code == 202
        answer = team.post(route, json=said | {field: longest})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field)


def test_unknown_adapters_and_foreign_uris(stage: ShimStage, team: httpx.Client) -> None:
    answer = team.post("/v1/distill", json={"adapter": "nobody", "prompt": "SECRET", "response": "SECRET"})
    assert answer.status_code == 404
    for uri in (f"s3://adapters/{stage.other}/x/", "s3://elsewhere/x/", f"s3://adapters/{stage.team}/"):
        answer = team.post("/v1/distill", json=body(stage, "x") | {"lora_uri": uri})
        assert answer.status_code == 403, uri
        assert answer.json()["errors"][0]["field"] == "lora_uri"
        assert f"s3://adapters/{stage.team}/" in answer.json()["detail"]
    for uri in (f"s3://adapters/{stage.team}/../{stage.other}/x/", f"s3://adapters/{stage.team}/./x/"):
        assert team.post("/v1/distill", json=body(stage, "x") | {"lora_uri": uri}).status_code in (403, 422)


def test_every_call_has_an_id_and_a_line_in_the_log(shim: Shim, team: httpx.Client) -> None:
    answer = team.get("/v1/requests", headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    hostile = team.get("/v1/requests/nobody", headers={"X-Request-Id": "x" * 100})
    assert hostile.headers["x-request-id"] != "x" * 100
    assert hostile.json()["request_id"] == hostile.headers["x-request-id"]
    lines = [json.loads(line) for line in shim.log.read_text().splitlines()]
    (line,) = [line for line in lines if line.get("request_id") == "mine-1"]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/requests", 200)


def test_health(stage: ShimStage, shim: Shim) -> None:
    with shim.client("") as nobody:
        answer = nobody.get("/v1/health")
        assert answer.status_code == 200, answer.text
        found = answer.json()
        assert found["status"] == "healthy"
        assert {part: found[part]["status"] for part in ("operator", "workers", "object_store", "api_server")} == {
            "operator": "healthy",
            "workers": "healthy",
            "object_store": "healthy",
            "api_server": "healthy",
        }
        assert found["workers"]["ready"] == 1 and found["teacher"]["status"] == "unknown"
    without = stage.start_shim(teacher={"url": "http://127.0.0.1:9"})
    with without.client("") as nobody:
        answer = nobody.get("/v1/health")
    assert (answer.status_code, answer.json()["teacher"]["status"]) == (503, "unhealthy")
    without.kill()


def test_sigterm_tells_those_who_wait_where_to_ask(stage: ShimStage) -> None:
    shim = stage.start_shim()
    stage.adapter("never", ready=False)
    with shim.client() as client, ThreadPoolExecutor() as threads:
        waiting = threads.submit(
            client.post, "/v1/distill", json={"adapter": "never", "prompt": "SECRET", "response": "SECRET"}
        )
        stage.wait(
            "the request", lambda: any(r.get("adapter") == "never" for r in client.get("/v1/requests").json()["items"])
        )
        shim.process.terminate()
        answer = waiting.result()
        assert answer.status_code == 202, answer.text
        assert shim.process.wait(timeout=10) == 0
    assert created(stage, answer.json()["id"])["metadata"]["labels"]["claas.dev/door"] == "rest"
