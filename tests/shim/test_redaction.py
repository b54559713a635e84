"""No text of a request is in a log, an Event, an annotation, a metric, a status or an error, whatever goes wrong.

Every part that sees it is real (operator, shim, worker's agent, object store, API server); the step is one that fails
as its prompt says. The real step's errors are tried in tests/worker, the teacher's log in tests/teacher.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from claas_crds import names
from cluster.api import ApiError
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore, free_port
from operatorstage import GROUP
from shimstage import ONE_WORKER, Shim, ShimStage

pytestmark = pytest.mark.controlplane

MARK = "marigold-7Q"
KINDS = (
    f"{GROUP}/{names.REQUEST_PLURAL}",
    f"{GROUP}/{names.ADAPTER_PLURAL}",
    "/apis/batch/v1/jobs",
    "/api/v1/pods",
    "/api/v1/events",
    "/api/v1/configmaps",
    "/apis/events.k8s.io/v1/events",
    "/apis/coordination.k8s.io/v1/leases",
)


@pytest.fixture(scope="module")
def metrics() -> str:
    return f"http://127.0.0.1:{free_port()}/metrics"


@pytest.fixture(scope="module")
def stage(
    claas_api: ControlPlane, object_store: ObjectStore, tmp_path_factory: pytest.TempPathFactory, metrics: str
) -> Iterator[ShimStage]:
    """As the other modules', with an operator that is scraped and logs all it can."""
    with ShimStage(claas_api, tmp_path_factory.mktemp("redaction"), "redaction", object_store) as made:
        made.start_operator(made.settings(**ONE_WORKER), "--metrics", metrics, "--log-level", "DEBUG")
        made.wait_to_lead()
        made.start_worker()
        yield made


def texts(word: str) -> dict[str, Any]:
    """A sample with the mark in every field that holds text; `word` tells the step how to end."""
    return {
        "prompt": f"{word} {MARK} prompt",
        "response": f"{MARK} response",
        "feedback": f"{MARK} feedback",
        "solution": f"{MARK} solution",
    }


def create(stage: ShimStage, **spec: Any) -> str:
    """By the API server, as `kubectl create` does."""
    name = f"r-{uuid.uuid4().hex[:8]}"
    on = {} if "adapterRef" in spec else {"loraUri": f"s3://adapters/{stage.team}/{name}/"}
    body = {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND, "metadata": {"name": name}}
    stage.api("POST", f"{GROUP}/namespaces/{stage.team}/{names.REQUEST_PLURAL}", body | {"spec": on | spec})
    return name


def payload(stage: ShimStage, content: bytes, sha256: str = "") -> dict[str, str]:
    """An object of the namespace, and a reference to it."""
    key = f"{stage.team}/{uuid.uuid4().hex}.json"
    stage.store.client().put_object(Bucket="adapters", Key=key, Body=content)
    return {"uri": f"s3://adapters/{key}", "sha256": sha256 or hashlib.sha256(content).hexdigest()}


def answers(client: httpx.Client, stage: ShimStage) -> list[httpx.Response]:
    """What the shim says to requests that end in every way, or do not begin."""
    uri = f"s3://adapters/{stage.team}/{uuid.uuid4().hex[:8]}/"
    good = {"lora_uri": uri, **texts("")}
    messages = [{"role": "system", "content": MARK}, {"role": "user", "content": f"crash {MARK}"}]
    bodies: list[Any] = [
        good,
        good | {"prompt": f"crash {MARK}"},
        good | {"prompt": f"bad {MARK}"},
        {"lora_uri": uri, "messages": messages, "response": MARK, "feedback": MARK},
        good | {"prompt": f"{MARK} " * 2000},  # too large for a spec: a payload
        good | {"prompt": [MARK]},
        good | {"feedback": {"text": MARK}},
        good | {"response": None},
        good | {"training": {"learning_rate": MARK}},
        good | {"promt": MARK},
        {"lora_uri": MARK, "prompt": MARK, "response": MARK},
        [MARK],
    ]
    said = [client.post("/v1/distill", json=body, timeout=60) for body in bodies]
    broken = json.dumps(good)[:-5].encode()
    return [*said, client.post("/v1/distill", content=broken, headers={"Content-Type": "application/json"})]


def test_no_text_of_a_request_is_anywhere_but_in_its_spec(stage: ShimStage, metrics: str) -> None:
    shim: Shim = stage.start_shim()
    stage.adapter()
    with shim.client() as client:
        said = answers(client, stage)
    assert {answer.status_code for answer in said} >= {200, 422}, [answer.status_code for answer in said]

    whole = json.dumps({"samples": [texts("crash")]}).encode()
    ended = [create(stage, samples=[texts(word)]) for word in ("", "bad", "crash", "phases")]
    ended.append(create(stage, samples=[texts("")], adapterRef={"name": "coder"}))
    ended.append(create(stage, samples=[texts("crash")], adapterRef={"name": "coder"}))
    ended += [
        create(stage, payloadRef=payload(stage, whole)),
        create(stage, payloadRef=payload(stage, whole, sha256="0" * 64)),
        create(stage, payloadRef=payload(stage, MARK.encode())),
        create(stage, payloadRef=payload(stage, json.dumps({"samples": [{"prompt": MARK, MARK: MARK}]}).encode())),
        create(stage, payloadRef={"uri": f"s3://elsewhere/{stage.team}/x.json", "sha256": "0" * 64}),
    ]
    retried = create(stage, samples=[texts("unavailable")], backoffLimit=1)
    for spec in (
        {"samples": [texts("") | {"prompt": 7}]},
        {"samples": [texts("") | {"rolloutLogprobs": [MARK]}]},
        {"samples": [texts("")], "training": {"learningRate": MARK}},
        {"samples": [texts("")], "teacher": {"mode": MARK}},
    ):
        with pytest.raises(ApiError):  # the API server's own words, to whoever sent it
            create(stage, **spec)
    for name in (*ended, retried):
        stage.wait(f"{name} to end", lambda name=name: stage.see(name).get("state") in ("Complete", "Failed"))
    states = {stage.see(name)["state"] for name in (*ended, retried)}
    assert states == {"Complete", "Failed"}, "or nothing has failed"

    for answer in said:
        whole_answer = answer.text + json.dumps(dict(answer.headers))
        assert MARK not in whole_answer, f"the shim's answer {answer.status_code} quotes the request"
    for log in stage.logs:
        assert MARK not in log.read_text(), f"{log.name} holds text of a request"
    assert "done" in Path(stage.logs[0]).read_text(), "the operator logs what it does"
    assert MARK not in httpx.get(metrics, trust_env=False).text
    for path in KINDS:
        for found in stage.api("GET", path)["items"]:
            seen = {key: value for key, value in found.items() if key != "spec"}
            assert MARK not in json.dumps(seen), f"{path} {found['metadata']['name']} holds text of a request"
