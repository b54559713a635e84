"""From bytes to a resource and back, without a cluster."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from pydantic import ValidationError

from claas_crds import request as crd
from claas_crds.reasons import Reason
from claas_crds.request import DistillRequestSpec
from claas_operator.settings import SettingsError
from claas_operator.shim import models, problems, spec
from claas_operator.shim.http import MAX_DEPTH, parse_json
from claas_operator.shim.models import DistillBody, InitBody, LiteBody
from claas_operator.shim.problems import Problem
from claas_operator.shim.rates import Rates
from claas_operator.shim.settings import ShimSettings, load
from operatorkit import MODEL, NUMBERS, Raw, adapter, ended, request, settings

SETTINGS = ShimSettings.of(settings())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b'{"a": 1} x',
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"a": 1e999}',
        b'{"a": -1e999}',
        b'{"a": 1' + b"0" * 5000 + b"}",
        b'{"a": "\\ud800"}',
        b'{"\\udfff": 1}',
        b'{"a": "\xff"}',
        b"\xff\xfe{\x00}\x00",
        b'{"a": 1, "a": 2}',
        b'{"a": "\x00"}',
        b"[" * 100_000,
        b"[" * (MAX_DEPTH + 1) + b"]" * (MAX_DEPTH + 1),
        b'{"a":' * 5000 + b"1" + b"}" * 5000,
        b"\xef\xbb\xbf{}",
    ],
    ids=lambda data: repr(data[:24]),
)
def test_what_is_not_json_is_refused_without_being_quoted(data: bytes) -> None:
    with pytest.raises(Problem) as caught:
        parse_json(data)
    assert caught.value.kind.status == 400


def test_json_that_looks_strange_is_taken() -> None:
    assert parse_json(b'{"a": "\\ud83d\\ude00 \\u0000", "b": 1e-400, "c": -9223372036854775807}') == {
        "a": "\U0001f600 \0",
        "b": 0.0,
        "c": -9223372036854775807,
    }
    assert parse_json(b"[" * MAX_DEPTH + b"]" * MAX_DEPTH)


def test_numbers_are_those_of_json_schema() -> None:
    """16.0 is a whole number; a whole number beyond 64 bits is a double, as the API server has it."""
    assert repr(parse_json(b"[16.0, 1e2, 0.5, 9223372036854775807]")) == "[16, 100, 0.5, 9223372036854775807]"
    assert repr(parse_json(b"[9223372036854775808, 1" + b"0" * 30 + b"]")) == "[9.223372036854776e+18, 1e+30]"


SAID = {"prompt": "p", "response": "r"}
URI = "s3://adapters/team/a/"


@pytest.mark.parametrize(
    ("body", "field", "words"),
    [
        (SAID, "lora_uri", "exactly one of lora_uri and adapter"),
        (SAID | {"lora_uri": URI, "adapter": "a"}, "lora_uri", "exactly one"),
        ({"lora_uri": URI}, "samples", "either samples or"),
        ({"lora_uri": URI, "prompt": "p"}, "response", "exactly one of response and response_token_ids"),
        ({"lora_uri": URI, "samples": [SAID]} | SAID, "samples", "either samples or"),
        ({"lora_uri": URI, "samples": []}, "samples", "at least 1"),
        ({"lora_uri": URI, "samples": [SAID, {"prompt": "p"}]}, "samples[1].response", "exactly one"),
        (SAID | {"lora_uri": URI, "messages": []}, "messages", "at least 1"),
        (SAID | {"lora_uri": "http://x/y"}, "lora_uri", "pattern"),
        (SAID | {"lora_uri": 7}, "lora_uri", "string"),
        (SAID | {"lora_uri": URI, "trainign": {}}, "trainign", "no field of this body"),
        (SAID | {"lora_uri": URI, "training": {"learning_rate": "1e-4"}}, "training.learning_rate", "number"),
        (SAID | {"lora_uri": URI, "training": {"learning_rate": True}}, "training.learning_rate", "number"),
        (SAID | {"lora_uri": URI, "training": {"teacher_top_k": 101}}, "training.teacher_top_k", "100"),
        (SAID | {"lora_uri": URI, "training": {"learningRate": 1e-4}}, "training.learningRate", "no field"),
        (SAID | {"adapter": "../secrets"}, "adapter", "pattern"),
        (SAID | {"adapter": "a", "pool": "p"}, "base_model", "lora_uri only"),
        (
            {"lora_uri": URI, "messages": [{"role": "assistant", "content": ""}], "response": "r"},
            "messages",
            "must end with a user or tool turn",
        ),
    ],
)
def test_a_mistake_names_its_field_and_the_fix(body: Raw, field: str, words: str) -> None:
    with pytest.raises(ValidationError) as caught:
        DistillBody.model_validate(body)
    errors = [error | {"loc": ("body", *error["loc"])} for error in caught.value.errors(include_input=False)]
    problem = problems.of_validation(errors)
    found = {error.field: error.detail for error in problem.errors}
    assert field in found, found
    assert words in found[field]


def test_lite_needs_logprobs_and_the_others_take_none() -> None:
    with pytest.raises(ValidationError, match="teacher_logprobs are needed here"):
        LiteBody.model_validate(SAID | {"lora_uri": URI})
    with pytest.raises(ValidationError):
        LiteBody.model_validate({"lora_uri": URI, "samples": [SAID]})
    with pytest.raises(ValidationError):
        DistillBody.model_validate(SAID | {"lora_uri": URI, "teacher_logprobs": [-1.0]})


def test_every_body_becomes_a_valid_resource() -> None:
    """Also what null means: absent."""
    for example in (models.PUBLISHED_EXAMPLE, models.RICH_EXAMPLE, dict.fromkeys(("feedback", "training"))):
        body = DistillBody.model_validate({"lora_uri": URI} | SAID | example if "adapter" not in example else example)
        made = spec.request_spec(body, SETTINGS) | {"samples": spec.samples_of(body)}
        assert DistillRequestSpec.model_validate(made).ttl_seconds_after_finished == 86400
    lite = LiteBody.model_validate(models.LITE_EXAMPLE)
    made = spec.request_spec(lite, SETTINGS) | {"samples": spec.samples_of(lite)}
    assert DistillRequestSpec.model_validate(made).teacher.mode == "Provided"


def test_the_teacher_is_asked_where_there_is_one() -> None:
    body = DistillBody.model_validate({"lora_uri": URI} | SAID)
    with_teacher = ShimSettings.of(settings(), teacher={"url": "http://teacher:8000"})
    assert spec.request_spec(body, SETTINGS)["teacher"] == {"mode": "Self"}
    assert spec.request_spec(body, with_teacher)["teacher"] == {"mode": "Server"}
    asked = DistillBody.model_validate({"lora_uri": URI, "teacher": {"mode": "Self"}} | SAID)
    assert spec.request_spec(asked, with_teacher)["teacher"] == {"mode": "Self"}


def test_the_rest_models_have_what_the_resources_have() -> None:
    assert models.Training.model_fields.keys() == crd.Training.model_fields.keys()
    assert models.Metadata.model_fields.keys() == crd.Metadata.model_fields.keys()
    assert models.Teacher.model_fields.keys() == crd.Teacher.model_fields.keys()
    assert models.Timings.model_fields.keys() == crd.Timings.model_fields.keys()
    assert models.LiteSample.model_fields.keys() == crd.Sample.model_fields.keys()
    for name, field in crd.Training.model_fields.items():
        assert models.Training.model_fields[name].metadata == field.metadata or name in ("preset", "truncate_response")


def test_every_reason_of_a_failure_has_a_status() -> None:
    """What ends a request without a step must not surprise its caller with a 500."""
    others = (
        "Pending NoCapacity AdapterBusy AdapterNotReady Accepted Bound Claimed Succeeded NoSignal "  # of a request
        "Creating Created Training Idle Deleting RolledBack Collecting Collected VersionsLeft Swept"  # of an adapter
    )
    assert [reason for reason in Reason if reason not in problems.STATUSES and reason not in others.split()] == []


def test_names_of_keys_and_uris() -> None:
    assert spec.request_name("a") == spec.request_name("a") != spec.request_name("b")
    assert spec.request_name(None) != spec.request_name(None)
    one = spec.adapter_name(InitBody(output_uri="s3://adapters/team/My.Coder_v1/"))
    assert one.startswith("my-coder-v1-")
    assert one == spec.adapter_name(InitBody(output_uri="s3://adapters/team/My.Coder_v1"))
    assert one != spec.adapter_name(InitBody(output_uri="s3://adapters/team/other/My.Coder_v1"))
    assert spec.adapter_name(InitBody(output_uri="s3://adapters/team/日本/")).startswith("lora-")


def test_a_request_tells_where_it_is_and_nothing_of_what_it_holds() -> None:
    raw = request("r", status=ended("Failed", "EmptyResponse") | {"state": "Failed", "reason": "EmptyResponse"})
    for shown in (spec.to_request(raw), spec.to_request(spec.trim_request(raw))):
        assert (shown.state, shown.reason, shown.adapter) == ("Failed", "EmptyResponse", "coder")
        assert "secret" not in shown.model_dump_json()
    assert "secret" not in json.dumps(spec.trim_request(raw))
    assert spec.to_request(request("r")).state == "Pending"


@pytest.mark.parametrize(
    ("asked", "shown"),
    [
        ("2025-12-31T23:59:59.250000Z", "2025-12-31T23:59:59.250000Z"),
        ("2026-01-01T00:00:00.750000Z", "2026-01-01T00:00:00.750000Z"),
        ("2026-01-01T00:00:01.250000Z", "2026-01-01T00:00:00Z"),
        ("2025-12-31T23:00:00.000000Z", "2026-01-01T00:00:00Z"),
        ("yesterday", "2026-01-01T00:00:00Z"),
        (None, "2026-01-01T00:00:00Z"),
    ],
)
def test_when_it_was_asked_for_is_believed_as_far_as_it_can_be(asked: str | None, shown: str) -> None:
    """The call's own time has microseconds, a resource's creation has none; whoever may patch could write anything."""
    raw = request("r")
    raw["metadata"] |= {"creationTimestamp": "2026-01-01T00:00:00Z", "annotations": {spec.ASKED_ANNOTATION: asked}}
    for each in (raw, spec.trim_request(raw)):
        assert spec.to_request(each).created_at == shown


def test_an_answer_has_the_nine_numbers_and_no_more() -> None:
    raw = request("r", status={"loraUri": URI, "metadata": NUMBERS | {"jsd": 0.1, "teacherId": "x"}})
    found = spec.to_distilled(raw)
    assert found is not None
    assert found.model_dump()["metadata"].keys() == models.Numbers.model_fields.keys()
    nothing = spec.to_distilled(request("r", status={"loraUri": URI, "reason": "NoSignal"}))
    assert nothing is not None
    numbers = nothing.metadata
    assert (numbers.total_loss, numbers.mean_is_ratio, numbers.tokens_processed) == (0, 1, 0)
    assert spec.to_distilled(request("r", status={"loraUri": URI})) is None, "no numbers are made up"


def history(*moves: tuple[int, str, str]) -> list[Raw]:
    return [
        {"seq": seq, "version": version, "uri": f"{URI}{version}/", "requestUid": uid, "at": "2026-01-01T00:00:00Z"}
        for seq, version, uid in moves
    ]


def test_a_lineage_goes_through_rollbacks() -> None:
    moves = history((1, "v1", ""), (2, "v2", "a"), (3, "v3", "b"), (4, "v2", ""), (5, "v5", "c"))
    raw = adapter(status={"headSeq": 5, "version": "v5", "history": moves})
    found = spec.lineage(raw, None)
    assert found is not None
    assert [version.version for version in found.items] == ["v5", "v2", "v1"]
    assert found.complete and found.items[0].head
    older = spec.lineage(raw, "v3")
    assert older is not None and [version.version for version in older.items] == ["v3", "v2", "v1"]
    assert spec.lineage(raw, "v9") is None
    cut = spec.lineage(adapter(status={"headSeq": 5, "version": "v5", "history": moves[3:]}), None)
    assert cut is not None and not cut.complete


def test_which_adapters_are_the_same() -> None:
    body = InitBody(output_uri=URI)
    wanted = spec.adapter_object(body, SETTINGS)
    stored = wanted | {"spec": wanted["spec"] | {"lora": {"r": 16, "alpha": 32, "targetModules": None}}}
    stored["spec"]["lora"].pop("targetModules")
    assert spec.same_adapter(wanted, stored)
    assert not spec.same_adapter(spec.adapter_object(InitBody(output_uri=URI, lora_r=8), SETTINGS), stored)
    assert not spec.same_adapter(spec.adapter_object(InitBody(output_uri=URI, init_from=URI + "b/"), SETTINGS), stored)


def test_rates_are_a_bucket_each() -> None:
    now = [0.0]
    rates = Rates(60, 3, lambda: now[0])
    assert [rates.wait_seconds("a") for _ in range(3)] == [0, 0, 0]
    assert rates.wait_seconds("a") == pytest.approx(1)
    assert rates.wait_seconds("b") == 0
    now[0] = 1.0
    assert rates.wait_seconds("a") == 0
    assert rates.wait_seconds("a") > 0
    assert Rates(0, 1, lambda: 0.0).wait_seconds("a") == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"auth": {"mode": "None"}}, "auth.namespace names the one tenant"),
        ({"auth": {"namespace": "team"}}, "goes with nothing else"),
        ({"waitSeconds": 1000}, "exceeds maxWaitSeconds"),
        ({"limits": {"maxBodyBytes": 1}}, "limits.maxBodyBytes"),
        ({"lmits": {}}, "lmits"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path: Any, changes: Raw, words: str) -> None:
    path = tmp_path / "shim.yaml"
    path.write_text(json.dumps({"instance": "claas", "namespace": "ns", "defaultBaseModel": MODEL} | changes))
    with pytest.raises(SettingsError) as caught:
        load(path)
    assert words in str(caught.value)


def test_a_field_has_the_bounds_and_the_words_of_the_resource() -> None:
    """Written once, in the contract; JSON's names and its default are told with them."""
    for ours, theirs in ((models.Training, crd.Training), (models.Sample, crd.Sample)):
        for name, field in ours.model_fields.items():
            assert [*map(repr, field.metadata)] == [*map(repr, theirs.model_fields[name].metadata)], name
            assert field.description and not re.search("[a-z][A-Z]", field.description.replace("AdamW", "")), name
    assert models.Training.model_fields["clip_eps"].description == "PPO clip range of the importance ratio (0.2)."
