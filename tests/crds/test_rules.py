"""What the API server and the models refuse, and what they say then: one table for both.

A message names the field and the fix. `kubectl` asks for strict field validation, and so do these tests.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import kubernetes
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from claas_crds import names
from claas_crds.adapter import LoraAdapterSpec
from claas_crds.model import Model, explain
from claas_crds.request import LOGPROB_BYTES, MAX_INLINE_BYTES, TOKEN_ID_BYTES, DistillRequestSpec

Json = dict[str, Any]

USER = {"role": "user", "content": "hello"}
ASSISTANT = {"role": "assistant", "content": "hi"}
TARGET = "set exactly one of spec.adapterRef and spec.loraUri"
SOURCE = "set exactly one of spec.samples and spec.payloadRef"
CONTEXT = "a sample needs either prompt or messages, not both: set exactly one"
ANSWER = "a sample needs either response or responseTokenIds, not both: set exactly one"
TURNS = "messages need a user turn, and must end with a user or tool turn"
TOO_LARGE = "spec.samples exceed 16384 bytes together: put them into an object, named in spec.payloadRef"
PAYLOAD = {"uri": "s3://bucket/payloads/one.json", "sha256": "0" * 64}


def sample(**changes: Any) -> Json:
    """A good sample with fields changed, or taken away where None."""
    fields = {"prompt": "p", "response": "r", **changes}
    return {name: value for name, value in fields.items() if value is not None}


def request(**changes: Any) -> Json:
    """The spec of a good DistillRequest with fields changed, or taken away where None."""
    fields = {"adapterRef": {"name": "coder"}, "samples": [sample()], **changes}
    return {name: value for name, value in fields.items() if value is not None}


def adapter(**changes: Any) -> Json:
    """The spec of a good LoraAdapter with fields changed, or taken away where None."""
    fields = {"baseModel": "Qwen/Qwen2.5-Coder-3B-Instruct", "storage": {"uri": "s3://bucket/coder-v1/"}, **changes}
    return {name: value for name, value in fields.items() if value is not None}


def bare(uri: str) -> Json:
    return request(adapterRef=None, loraUri=uri)


# id: spec, what the API server's answer holds, what Python's holds
REFUSED_REQUESTS: dict[str, tuple[Json, list[str], list[str]]] = {
    "no target": (request(adapterRef=None), ["spec.adapterRef: ", TARGET], [TARGET]),
    "two targets": (request(loraUri="s3://bucket/a"), ["spec.adapterRef: ", TARGET], [TARGET]),
    "empty target": (
        request(adapterRef={}),
        ["spec.adapterRef.name: Required value"],
        ["spec.adapterRef.name: Field required"],
    ),
    "impossible name": (
        request(adapterRef={"name": "My Adapter"}),
        ["spec.adapterRef.name: Invalid value", "should match '^[a-z0-9]"],
        ["spec.adapterRef.name: String should match pattern '^[a-z0-9]"],
    ),
    "no samples": (request(samples=None), ["spec.samples: ", SOURCE], [SOURCE]),
    "empty samples": (
        request(samples=[]),
        ["spec.samples in body should have at least 1 items"],
        ["spec.samples: List should have at least 1 item"],
    ),
    "too many samples": (
        request(samples=[sample()] * 33),
        ["spec.samples: Too many: 33: must have at most 32 items"],
        ["spec.samples: List should have at most 32 items"],
    ),
    "samples and payload": (request(payloadRef=PAYLOAD), ["spec.samples: ", SOURCE], [SOURCE]),
    "no response": (
        request(samples=[sample(), sample(response=None)]),
        ["spec.samples[1].response: ", ANSWER],
        ["spec.samples[1]: " + ANSWER],
    ),
    "two responses": (
        request(samples=[sample(responseTokenIds=[1])]),
        ["spec.samples[0].response: ", ANSWER],
        ["spec.samples[0]: " + ANSWER],
    ),
    "no prompt": (request(samples=[sample(prompt=None)]), ["spec.samples[0].prompt: ", CONTEXT], [CONTEXT]),
    "prompt and messages": (
        request(samples=[sample(messages=[USER])]),
        ["spec.samples[0].prompt: ", CONTEXT],
        ["spec.samples[0]: " + CONTEXT],
    ),
    "no messages": (
        request(samples=[sample(prompt=None, messages=[])]),
        ["spec.samples[0].messages in body should have at least 1 items"],
        ["spec.samples[0].messages: List should have at least 1 item"],
    ),
    "assistant's turn last": (
        request(samples=[sample(prompt=None, messages=[USER, ASSISTANT])]),
        ["spec.samples[0].messages: ", TURNS],
        ["spec.samples[0]: " + TURNS],
    ),
    "no user's turn": (
        request(samples=[sample(prompt=None, messages=[{"role": "tool", "content": "42"}])]),
        ["spec.samples[0].messages: ", TURNS],
        ["spec.samples[0]: " + TURNS],
    ),
    "unknown role": (
        request(samples=[sample(prompt=None, messages=[{"role": "robot", "content": "x"}])]),
        ["spec.samples[0].messages[0].role: Unsupported value", '"user"'],
        ["spec.samples[0].messages[0].role: Input should be 'system', 'user'"],
    ),
    "negative token id": (
        request(samples=[sample(response=None, responseTokenIds=[-1])]),
        ["spec.samples[0].responseTokenIds[0] in body should be greater than or equal to 0"],
        ["spec.samples[0].responseTokenIds[0]: Input should be greater than or equal to 0"],
    ),
    "positive log-probability": (
        request(samples=[sample(rolloutLogprobs=[0.5])]),
        ["spec.samples[0].rolloutLogprobs[0] in body should be less than or equal to 0.0001"],
        ["spec.samples[0].rolloutLogprobs[0]: Input should be less than or equal to 0.0001"],
    ),
    "alpha above 1": (
        request(training={"alpha": 1.5}),
        ["spec.training.alpha: Invalid value: 1.5", "should be less than or equal to 1"],
        ["spec.training.alpha: Input should be less than or equal to 1"],
    ),
    "alpha below 0": (
        request(training={"alpha": -0.1}),
        ["spec.training.alpha: Invalid value: -0.1", "should be greater than or equal to 0"],
        ["spec.training.alpha: Input should be greater than or equal to 0"],
    ),
    "negative learning rate": (
        request(training={"learningRate": -1e-4}),
        ["spec.training.learningRate: Invalid value: -0.0001", "should be greater than 0"],
        ["spec.training.learningRate: Input should be greater than 0"],
    ),
    "learning rate 0": (
        request(training={"learningRate": 0}),
        ["spec.training.learningRate: Invalid value: 0", "should be greater than 0"],
        ["spec.training.learningRate: Input should be greater than 0"],
    ),
    "learning rate as text": (
        request(training={"learningRate": "fast"}),
        ["spec.training.learningRate: Invalid value", "must be of type number"],
        ["spec.training.learningRate: Input should be a valid number"],
    ),
    "teacherTopK 0": (
        request(training={"teacherTopK": 0}),
        ["spec.training.teacherTopK: Invalid value: 0", "should be greater than or equal to 1"],
        ["spec.training.teacherTopK: Input should be greater than or equal to 1"],
    ),
    "teacherTopK 101": (
        request(training={"teacherTopK": 101}),
        ["spec.training.teacherTopK: Invalid value: 101", "should be less than or equal to 100"],
        ["spec.training.teacherTopK: Input should be less than or equal to 100"],
    ),
    "unknown preset": (
        request(training={"preset": "magic"}),
        ["spec.training.preset: Unsupported value", '"default", "paper"'],
        ["spec.training.preset: Input should be 'default' or 'paper'"],
    ),
    "unknown field": (
        request(training={"learningrate": 1e-4}),
        ['strict decoding error: unknown field "spec.training.learningrate"'],
        ["spec.training.learningrate: Extra inputs are not permitted"],
    ),
    "unknown field of a sample": (
        request(samples=[sample(reply="r")]),
        ['strict decoding error: unknown field "spec.samples[0].reply"'],
        ["spec.samples[0].reply: Extra inputs are not permitted"],
    ),
    "base model of an adapter": (
        request(baseModel="m"),
        ["spec.adapterRef: ", "spec.baseModel and spec.pool go with spec.loraUri only"],
        ["spec.baseModel and spec.pool go with spec.loraUri only"],
    ),
    "uri of the web": (
        bare("https://x/a"),
        ["spec.loraUri: ", "s3://BUCKET/PATH/ or file:///PATH/"],
        ["spec.loraUri must"],
    ),
    "uri of a bucket": (bare("s3://bucket"), ["spec.loraUri: ", "s3://BUCKET/PATH/"], ["spec.loraUri must be s3://"]),
    "uri of a host": (bare("file://host/a"), ["spec.loraUri: ", "file:///PATH/"], ["spec.loraUri must be s3://"]),
    "uri that climbs": (bare("s3://bucket/a/../b"), ["spec.loraUri: ", "'..' segment"], ["spec.loraUri must be s3://"]),
    "uri that climbs at its end": (bare("file:///a/.."), ["spec.loraUri: ", "'..' segment"], ["spec.loraUri must"]),
    "uri with an empty segment": (bare("s3://bucket/a//b"), ["spec.loraUri: ", "segment"], ["spec.loraUri must"]),
    "uri with a query": (bare("s3://bucket/a?versionId=1"), ["spec.loraUri: ", "'?'"], ["spec.loraUri must be s3://"]),
    "uri with a line's end": (
        bare("s3://bucket/a\n"),
        ["spec.loraUri: ", "without space"],
        ["spec.loraUri must be s3://"],
    ),
    "payload's uri": (
        request(samples=None, payloadRef={**PAYLOAD, "uri": "http://x/y"}),
        ["spec.payloadRef.uri: ", "spec.payloadRef.uri must be s3://BUCKET/PATH or file:///PATH"],
        ["spec.payloadRef.uri must be s3://BUCKET/PATH or file:///PATH"],
    ),
    "payload's digest": (
        request(samples=None, payloadRef={**PAYLOAD, "sha256": "abc"}),
        ["spec.payloadRef.sha256: Invalid value"],
        ["spec.payloadRef.sha256: String should have at least 64 characters"],
    ),
    "no teacher's logprobs": (
        request(teacher={"mode": "Provided"}, samples=[sample(teacherLogprobs=[-1]), sample()]),
        ["spec.samples[1].teacherLogprobs: Required value"],
        ["spec.teacher.mode Provided needs teacherLogprobs in every one of spec.samples"],
    ),
    "contrast with a teacher that is not the student": (
        request(teacher={"mode": "Server", "contrast": 1}),
        ["spec.teacher.contrast", "spec.teacher.contrast needs spec.teacher.mode Self: leave it out"],
        ["spec.teacher.contrast needs spec.teacher.mode Self: leave it out"],
    ),
    "one long text": (
        request(samples=[sample(feedback="x" * (MAX_INLINE_BYTES + 1))]),
        ["spec.samples[0].feedback: Too long: may not be more than 16384 bytes"],
        [TOO_LARGE],
    ),
    "many short texts": (
        request(samples=[sample(prompt="x" * 4096, solution="y" * 4095)] * 2),  # with "r": 2 x 8192
        [],
        [],
    ),
    "many texts": (
        request(samples=[sample(prompt="x" * 4096, solution="y" * 4096)] * 2),
        ["spec.samples: ", TOO_LARGE],
        [TOO_LARGE],
    ),
    "long texts in UTF-8": (
        request(samples=[sample(prompt="日" * (MAX_INLINE_BYTES // 3 + 1))]),
        ["spec.samples: ", TOO_LARGE],
        [TOO_LARGE],
    ),
    "long chat": (
        request(samples=[sample(prompt=None, messages=[{**USER, "content": "x" * 500}] * 33)]),
        ["spec.samples: ", TOO_LARGE],
        [TOO_LARGE],
    ),
    "many token ids": (
        request(samples=[sample(response=None, responseTokenIds=[7] * (MAX_INLINE_BYTES // TOKEN_ID_BYTES))]),
        ["spec.samples: ", TOO_LARGE],
        [TOO_LARGE],
    ),
    "many log-probabilities": (
        request(samples=[sample(rolloutLogprobs=[-1] * (MAX_INLINE_BYTES // LOGPROB_BYTES + 1))]),
        ["spec.samples: ", TOO_LARGE],
        [TOO_LARGE],
    ),
    "deadline 0": (
        request(activeDeadlineSeconds=0),
        ["spec.activeDeadlineSeconds in body should be greater than or equal to 1"],
        ["spec.activeDeadlineSeconds: Input should be greater than or equal to 1"],
    ),
}
ACCEPTED_REQUESTS: dict[str, Json] = {
    "least": request(),
    "exactly 16 KiB": REFUSED_REQUESTS.pop("many short texts")[0],
    "longest text": request(samples=[sample(prompt="x" * (MAX_INLINE_BYTES - 1))]),
    "bare": bare("file:///adapters/coder/"),
    "bare with its own pool": {**bare("s3://bucket/a"), "baseModel": "m", "pool": "l40s"},
    "payload": request(samples=None, payloadRef=PAYLOAD),
    "payload with provided logprobs": request(samples=None, payloadRef=PAYLOAD, teacher={"mode": "Provided"}),
    "floats": request(teacher={"mode": "Provided"}, samples=[sample(teacherLogprobs=[-1, -0.5])]),
    "legacy object": request(
        teacher={"mode": "Provided"}, samples=[sample(teacherLogprobs={"tokens": ["a"], "top_logprobs": [{"a": -1}]})]
    ),
    "prompt_logprobs": request(
        teacher={"mode": "Provided"}, samples=[sample(teacherLogprobs=[None, {"12": {"logprob": -1, "rank": 1}}])]
    ),
    "token ids": request(samples=[sample(response=None, responseTokenIds=[0, 151935], rolloutLogprobs=[0, -9])]),
    "tool's turn last": request(
        samples=[sample(prompt=None, messages=[USER, ASSISTANT, {"role": "tool", "content": ""}])]
    ),
    "edges": request(training={"alpha": 0, "teacherTopK": 1, "pgWeight": 0, "innerSteps": 16, "learningRate": 1}),
    "dots in names": bare("s3://my.bucket/..a/b..c/v1.5/"),
    "empty answer": request(samples=[sample(response="")]),  # the worker's word: EmptyResponse
}
REFUSED_ADAPTERS: dict[str, tuple[Json, list[str], list[str]]] = {
    "rank 0": (
        adapter(lora={"r": 0}),
        ["spec.lora.r: Invalid value: 0", "should be greater than or equal to 1"],
        ["spec.lora.r: Input should be greater than or equal to 1"],
    ),
    "alpha 0": (
        adapter(lora={"alpha": 0}),
        ["spec.lora.alpha: Invalid value: 0", "should be greater than 0"],
        ["spec.lora.alpha: Input should be greater than 0"],
    ),
    "no layers": (
        adapter(lora={"targetModules": []}),
        ["spec.lora.targetModules in body should have at least 1 items"],
        ["spec.lora.targetModules: List should have at least 1 item"],
    ),
    "no base model": (
        adapter(baseModel=None),
        ["spec.baseModel: Required value"],
        ["spec.baseModel: Field required"],
    ),
    "no storage": (adapter(storage=None), ["spec.storage: Required value"], ["spec.storage: Field required"]),
    "uri of the web": (
        adapter(storage={"uri": "https://bucket/a"}),
        ["spec.storage.uri: ", "spec.storage.uri must be s3://BUCKET/PATH/ or file:///PATH/"],
        ["spec.storage.uri must be s3://BUCKET/PATH/ or file:///PATH/"],
    ),
    "fork of the web": (
        adapter(initFrom={"uri": "hf://org/adapter"}),
        ["spec.initFrom.uri: ", "spec.initFrom.uri must be s3://BUCKET/PATH/ or file:///PATH/"],
        ["spec.initFrom.uri must be s3://BUCKET/PATH/ or file:///PATH/"],
    ),
    "unknown field": (
        adapter(rank=8),
        ['strict decoding error: unknown field "spec.rank"'],
        ["spec.rank: Extra inputs are not permitted"],
    ),
    "unknown policy": (
        adapter(deletionPolicy="Forget"),
        ["spec.deletionPolicy: Unsupported value", '"Retain", "Delete"'],
        ["spec.deletionPolicy: Input should be 'Retain' or 'Delete'"],
    ),
}
BOTH: list[tuple[str, type[Model], dict[str, tuple[Json, list[str], list[str]]]]] = [
    (names.REQUEST_PLURAL, DistillRequestSpec, REFUSED_REQUESTS),
    (names.ADAPTER_PLURAL, LoraAdapterSpec, REFUSED_ADAPTERS),
]
REFUSED = [
    pytest.param(plural, model, *case, id=f"{plural}: {name}")
    for plural, model, cases in BOTH
    for name, case in cases.items()
]
KINDS = {names.REQUEST_PLURAL: names.REQUEST_KIND, names.ADAPTER_PLURAL: names.ADAPTER_KIND}


class Server:
    """The API server's word on specs, as kubectl would ask for it."""

    def __init__(self, api: kubernetes.client.CustomObjectsApi, namespace: str) -> None:
        self.api, self.where = api, {"group": names.GROUP, "version": names.VERSION, "namespace": namespace}

    def create(self, plural: str, spec: Json, *, dry_run: bool = False) -> Json:
        body = {
            "apiVersion": names.API_VERSION,
            "kind": KINDS[plural],
            "metadata": {"generateName": "t-"},
            "spec": spec,
        }
        dry = {"dry_run": "All"} if dry_run else {}
        created: Json = self.api.create_namespaced_custom_object(
            **self.where, plural=plural, body=body, field_validation="Strict", **dry
        )
        return created

    def replace_spec(self, plural: str, name: str, change: list[Json]) -> Json:
        """A JSON Patch of the spec."""
        patch = [{**operation, "path": f"/spec{operation['path']}"} for operation in change]
        patched: Json = self.api.patch_namespaced_custom_object(
            **self.where, plural=plural, name=name, body=patch, _content_type="application/json-patch+json"
        )
        return patched


@pytest.fixture
def server(api: kubernetes.client.CustomObjectsApi, namespace: str) -> Server:
    return Server(api, namespace)


def said(error: kubernetes.client.ApiException) -> str:
    """The API server's message; a refusal is a 400 or a 422, anything else is a failed test."""
    assert error.status in (400, 422), error
    return str(json.loads(error.body)["message"])


@pytest.mark.parametrize(("plural", "model", "spec", "_server", "messages"), REFUSED)
def test_python_refuses(plural: str, model: type[Model], spec: Json, _server: list[str], messages: list[str]) -> None:
    with pytest.raises(ValidationError) as caught:
        model.model_validate(spec)
    for message in messages:
        assert message in explain(caught.value)


@pytest.mark.controlplane
@pytest.mark.parametrize(("plural", "_model", "spec", "messages", "_python"), REFUSED)
def test_the_api_server_refuses(
    server: Server, plural: str, _model: type[Model], spec: Json, messages: list[str], _python: list[str]
) -> None:
    with pytest.raises(kubernetes.client.ApiException) as caught:
        server.create(plural, spec, dry_run=True)
    for message in messages:
        assert message in said(caught.value)


@pytest.mark.parametrize("name", ACCEPTED_REQUESTS)
def test_python_accepts(name: str) -> None:
    DistillRequestSpec.model_validate(ACCEPTED_REQUESTS[name])


@pytest.mark.controlplane
@pytest.mark.parametrize("name", ACCEPTED_REQUESTS)
def test_the_api_server_accepts_and_fills_in_what_python_would(server: Server, name: str) -> None:
    spec = ACCEPTED_REQUESTS[name]
    stored = server.create(names.REQUEST_PLURAL, spec)["spec"]
    assert stored == DistillRequestSpec.model_validate(spec).model_dump(by_alias=True, exclude_none=True)


@pytest.mark.controlplane
@pytest.mark.parametrize(
    ("before", "change", "message"),
    [
        (request(), {"op": "replace", "path": "/adapterRef/name", "value": "other"}, "spec.adapterRef is immutable"),
        (
            bare("s3://bucket/a"),
            {"op": "replace", "path": "/loraUri", "value": "s3://bucket/b"},
            "spec.loraUri is immutable",
        ),
        (bare("s3://bucket/a"), {"op": "add", "path": "/baseModel", "value": "m"}, "spec.baseModel is immutable"),
        ({**bare("s3://bucket/a"), "pool": "x"}, {"op": "remove", "path": "/pool"}, "spec.pool is immutable"),
        (request(), {"op": "add", "path": "/samples/-", "value": sample()}, "spec.samples is immutable"),
        (request(), {"op": "replace", "path": "/samples/0/response", "value": "R"}, "spec.samples is immutable"),
        (
            request(samples=[sample(teacherLogprobs=[-1])]),
            {"op": "replace", "path": "/samples/0/teacherLogprobs/0", "value": -2},
            "spec.samples is immutable",
        ),
        (
            request(samples=[sample(teacherLogprobs=[-1])]),
            {"op": "remove", "path": "/samples/0/teacherLogprobs"},
            "spec.samples is immutable",
        ),
        (
            request(samples=None, payloadRef=PAYLOAD),
            {"op": "replace", "path": "/payloadRef/sha256", "value": "1" * 64},
            "spec.payloadRef is immutable",
        ),
        (request(), {"op": "replace", "path": "/training/alpha", "value": 0.25}, "spec.training is immutable"),
        (request(), {"op": "add", "path": "/training/pgWeight", "value": 0}, "spec.training is immutable"),
        (request(), {"op": "replace", "path": "/teacher/mode", "value": "Self"}, "spec.teacher is immutable"),
        (request(), {"op": "replace", "path": "/priority", "value": 7}, "spec.priority is immutable"),
        (request(), {"op": "replace", "path": "/backoffLimit", "value": 0}, "spec.backoffLimit is immutable"),
        (
            request(),
            {"op": "replace", "path": "/activeDeadlineSeconds", "value": 5},
            "spec.activeDeadlineSeconds is immutable",
        ),
        (
            request(),
            {"op": "add", "path": "/ttlSecondsAfterFinished", "value": 5},
            "spec.ttlSecondsAfterFinished is immutable",
        ),
        (
            request(ttlSecondsAfterFinished=5),
            {"op": "remove", "path": "/ttlSecondsAfterFinished"},
            "spec.ttlSecondsAfterFinished is immutable",
        ),
        (
            request(cancel=True),
            {"op": "replace", "path": "/cancel", "value": False},
            "spec.cancel cannot be taken back",
        ),
        (request(cancel=True), {"op": "remove", "path": "/cancel"}, "spec.cancel cannot be taken back"),
    ],
    ids=lambda value: f"{value['op']} {value['path']}" if isinstance(value, dict) and "op" in value else "",
)
def test_a_request_stays_as_it_was_created(server: Server, before: Json, change: Json, message: str) -> None:
    created = server.create(names.REQUEST_PLURAL, before)
    with pytest.raises(kubernetes.client.ApiException) as caught:
        server.replace_spec(names.REQUEST_PLURAL, created["metadata"]["name"], [change])
    assert f"{message}: create another DistillRequest" in said(caught.value)


@pytest.mark.controlplane
def test_a_request_can_be_cancelled(server: Server) -> None:
    created = server.create(names.REQUEST_PLURAL, request(samples=[sample(teacherLogprobs={"a": [1, None]})]))
    cancelled = server.replace_spec(
        names.REQUEST_PLURAL, created["metadata"]["name"], [{"op": "replace", "path": "/cancel", "value": True}]
    )
    assert cancelled["spec"] == {**created["spec"], "cancel": True}


@pytest.mark.controlplane
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"op": "replace", "path": "/baseModel", "value": "m"},
            "spec.baseModel is immutable: create another LoraAdapter",
        ),
        ({"op": "replace", "path": "/lora/r", "value": 8}, "spec.lora is immutable: create another LoraAdapter"),
        (
            {"op": "replace", "path": "/storage/uri", "value": "s3://bucket/b/"},
            "spec.storage is immutable: create another LoraAdapter",
        ),
        (
            {"op": "add", "path": "/initFrom", "value": {"uri": "s3://bucket/b/"}},
            "spec.initFrom is immutable: create another LoraAdapter",
        ),
    ],
    ids=lambda value: value["path"] if isinstance(value, dict) else "",
)
def test_an_adapter_keeps_its_identity(server: Server, change: Json, message: str) -> None:
    created = server.create(names.ADAPTER_PLURAL, adapter())
    with pytest.raises(kubernetes.client.ApiException) as caught:
        server.replace_spec(names.ADAPTER_PLURAL, created["metadata"]["name"], [change])
    assert message in said(caught.value)


@pytest.mark.controlplane
def test_an_adapter_can_be_rolled_back_and_kept_otherwise(server: Server) -> None:
    created = server.create(names.ADAPTER_PLURAL, adapter())
    changes = {"rollbackTo": "coder-v1", "pool": "a100", "deletionPolicy": "Delete", "retention": {"keepLast": 3}}
    patch = [{"op": "add", "path": f"/{field}", "value": value} for field, value in changes.items()]
    changed = server.replace_spec(names.ADAPTER_PLURAL, created["metadata"]["name"], patch)
    assert changed["spec"] == {**created["spec"], **changes}


@st.composite
def changed(draw: st.DrawFn, good: Json, changes: dict[str, st.SearchStrategy[Any]]) -> Json:
    """`good` with up to three fields replaced, added, or taken away (None)."""
    fields = draw(st.lists(st.sampled_from(sorted(changes)), max_size=3, unique=True))
    fields = {**good, **{field: draw(st.none() | changes[field]) for field in fields}}
    return {name: value for name, value in fields.items() if value is not None}


def specs() -> st.SearchStrategy[Json]:
    """Requests with a few fields that are unusual, missing or bad."""
    texts = st.sampled_from(["", "p", "é" * 2500, "日" * 6000])
    turns = st.builds(dict, role=st.sampled_from(["system", "user", "assistant", "tool"]), content=texts)
    tails = st.text(alphabet="as3:/.?# \né", max_size=6)
    uris = st.builds(str.__add__, st.sampled_from(["s3://bucket/", "s3://bucket/a/", "file:///", "s3://", ""]), tails)
    provided = st.sampled_from([[-1], {"tokens": []}, []])
    samples = changed(
        sample(),
        {
            "prompt": texts,
            "messages": st.lists(turns, max_size=3),
            "response": texts,
            "responseTokenIds": st.lists(st.sampled_from([0, 7, 2**31]), max_size=2),
            "finishReason": st.sampled_from(["stop", "abort"]),
            "feedback": texts,
            "solution": texts,
            "rolloutLogprobs": st.lists(st.sampled_from([0, -3.5, 0.1]), max_size=2),
            "teacherLogprobs": provided,
        },
    )
    chats = st.builds(lambda messages: sample(prompt=None, messages=messages), st.lists(turns, max_size=3))
    scored = st.builds(lambda logprobs: sample(teacherLogprobs=logprobs), provided)
    training = changed(
        {},
        {
            "alpha": st.sampled_from([0, 0.5, 1, 1.5]),
            "learningRate": st.sampled_from([1e-4, 1, 0]),
            "teacherTopK": st.sampled_from([1, 100, 101]),
            "preset": st.sampled_from(["paper", "rock"]),
        },
    )
    changes = {
        "adapterRef": st.sampled_from([{"name": "coder"}, {"name": "-"}, {}]),
        "loraUri": uris,
        "pool": st.sampled_from(["l40s", "L40S"]),
        "samples": st.lists(samples, max_size=3) | st.lists(chats, max_size=2) | st.lists(scored, max_size=2),
        "payloadRef": st.builds(dict, uri=uris, sha256=st.sampled_from(["0" * 64, "G" * 64])),
        "training": training,
        "teacher": st.sampled_from([{"mode": "Provided"}, {"mode": "Self"}, {"mode": "None"}, {}]),
        "priority": st.sampled_from([0, 1000, 1001]),
    }
    return st.sampled_from([request(), bare("s3://bucket/a/")]).flatmap(lambda good: changed(good, changes))


@pytest.fixture(scope="module")
def default_server(api: kubernetes.client.CustomObjectsApi) -> Iterator[Server]:
    return Server(api, "default")


@pytest.mark.controlplane
@settings(
    max_examples=400, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(spec=specs())
def test_python_and_the_api_server_agree(default_server: Server, spec: Json) -> None:
    try:
        DistillRequestSpec.model_validate(spec)
        python = ""
    except ValidationError as error:
        python = explain(error)
    try:
        default_server.create(names.REQUEST_PLURAL, spec, dry_run=True)
        api_server = ""
    except kubernetes.client.ApiException as error:
        api_server = said(error)
    assert bool(python) == bool(api_server), f"Python: {python or 'accepts'}\nAPI server: {api_server or 'accepts'}"
