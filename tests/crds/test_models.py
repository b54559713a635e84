"""The models as Python sees them: names, defaults, round trips, and errors that quote nobody's text."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from claas_crds.adapter import LoraAdapterSpec, LoraAdapterStatus
from claas_crds.model import MAX_MESSAGE, Condition, explain, refusal
from claas_crds.reasons import DEPENDENCY_REASONS, ConditionType, Outcome, Reason, describe
from claas_crds.request import (
    LOGPROB_BYTES,
    MAX_INLINE_BYTES,
    TOKEN_ID_BYTES,
    DistillRequestSpec,
    DistillRequestStatus,
    Payload,
    Result,
    Training,
    inline_bytes,
)

SAMPLE = {"prompt": "p", "response": "r"}
REQUEST = {"adapterRef": {"name": "coder"}, "samples": [SAMPLE]}
METADATA = {
    "totalLoss": 0.5,
    "pgLoss": 0.3,
    "jsdReg": 0.2,
    "meanAdvantage": -0.1,
    "fracPositiveAdvantage": 0.4,
    "meanIsRatio": 1.0,
    "clipFraction": 0.0,
    "gradNorm": 2.0,
    "tokensProcessed": 7,
}


@pytest.mark.parametrize("reason", Reason)
def test_every_reason_has_a_sentence(reason: Reason) -> None:
    assert len(describe(reason).split()) >= 3


def test_reasons_and_condition_types_fit_kubernetes_conditions() -> None:
    assert all(name.isidentifier() and name[0].isupper() for name in [*Reason, *ConditionType, *Outcome])
    assert set(Reason) > DEPENDENCY_REASONS


def test_training_defaults_are_the_published_ones() -> None:
    published = {
        "learning_rate": 1e-4,
        "alpha": 0.5,
        "clip_eps": 0.2,
        "max_grad_norm": 1.0,
        "teacher_top_k": 100,
        "inner_steps": 1,
        "advantage_clip": 10.0,
        "anchor_kl_weight": 0.0,
    }
    assert published.items() <= Training().model_dump().items()
    assert Training().weights() == (1.0, 0.5)


@pytest.mark.parametrize(
    ("training", "chosen_only", "weights"),
    [
        ({"preset": "paper"}, False, (0.0, 1.0)),
        ({"preset": "paper", "pgWeight": 0.25}, False, (0.25, 1.0)),
        ({"preset": "paper", "jsdRegWeight": 0}, False, (0.0, 0.0)),
        ({}, True, (1.0, 0.0)),
        ({"jsdRegWeight": 0.5}, True, (1.0, 0.5)),
        ({"preset": "paper"}, True, (0.0, 1.0)),
    ],
)
def test_explicit_weights_win_over_the_preset(training: dict[str, object], chosen_only: bool, weights: object) -> None:
    assert Training.model_validate(training).weights(chosen_only=chosen_only) == weights


def test_a_request_reads_from_yaml_names_and_from_rest_names_alike() -> None:
    camel = {**REQUEST, "training": {"teacherTopK": 7, "maxGradNorm": 2}, "ttlSecondsAfterFinished": 5}
    snake = {
        "adapter_ref": {"name": "coder"},
        "samples": [SAMPLE],
        "training": {"teacher_top_k": 7, "max_grad_norm": 2},
        "ttl_seconds_after_finished": 5,
    }
    assert DistillRequestSpec.model_validate(camel) == DistillRequestSpec.model_validate(snake)


def test_specs_and_statuses_survive_the_wire() -> None:
    spec = DistillRequestSpec.model_validate(
        {
            **REQUEST,
            "samples": [
                {
                    "messages": [{"role": "user", "content": "größer?"}],
                    "response_token_ids": [1, 2],
                    "solution": "日本",
                },
                {**SAMPLE, "rolloutLogprobs": [-0.5, -1], "teacherLogprobs": {"token_logprobs": [-1, None]}},
            ],
            "training": {"preset": "paper", "truncateResponse": "head"},
        }
    )
    adapter = LoraAdapterSpec.model_validate(
        {"baseModel": "m", "storage": {"uri": "s3://abc/d"}, "initFrom": {"uri": "file:///x"}, "rollbackTo": "v"}
    )
    status = DistillRequestStatus.model_validate(
        {
            "worker": "w",
            "result": {"attempt": 1, "outcome": "Succeeded", "reason": "Succeeded", "at": "t", "metadata": METADATA},
        }
    )
    for model in (spec, adapter, status, LoraAdapterStatus()):
        wire = json.loads(json.dumps(model.model_dump(by_alias=True, exclude_none=True, mode="json")))
        assert type(model).model_validate(wire) == model
    assert status.result is not None
    assert status.result.metadata is not None
    assert status.result.model_dump(by_alias=True, exclude_none=True, mode="json")["metadata"] == METADATA


def test_a_status_of_a_later_release_is_read() -> None:
    assert DistillRequestStatus.model_validate({"worker": "w", "sparkle": 1}).worker == "w"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_result_never_carries_numbers_that_json_has_not(number: float) -> None:
    with pytest.raises(ValidationError, match=r"metadata\.gradNorm"):
        Result.model_validate(
            {
                "attempt": 1,
                "outcome": "Succeeded",
                "reason": "x",
                "at": "t",
                "metadata": {**METADATA, "gradNorm": number},
            }
        )


def test_a_long_message_is_cut_and_the_status_stays_writable() -> None:
    condition = Condition(type="Failed", status="True", reason="x", message="é" * 5000, last_transition_time="t")
    assert len(condition.message) == MAX_MESSAGE
    assert condition.message.endswith("é…")


def test_errors_name_every_bad_field_and_quote_no_text() -> None:
    secret = "my private conversation"
    with pytest.raises(ValidationError) as caught:
        DistillRequestSpec.model_validate(
            {
                "adapterRef": {"name": secret},
                "samples": [{"prompt": secret, "response": secret, "feedbackSource": secret}],
                "training": {"alpha": 1.5, "learningrate": 1, "preset": secret},
            }
        )
    text = explain(caught.value)
    for field in (
        "adapterRef.name",
        "samples[0].feedbackSource",
        "training.alpha",
        "training.learningrate",
        "training.preset",
    ):
        assert f"spec.{field}: " in text
    assert secret not in text
    assert secret not in str(caught.value)
    assert "\n" not in text
    assert refusal(caught.value) is Reason.INVALID_SPEC


def test_a_request_that_is_only_too_large_has_its_own_reason() -> None:
    def too_large(**more: object) -> ValidationError:
        with pytest.raises(ValidationError) as caught:
            DistillRequestSpec.model_validate(
                {**REQUEST, "samples": [{**SAMPLE, "prompt": "x" * MAX_INLINE_BYTES}], **more}
            )
        return caught.value

    assert refusal(too_large()) is Reason.PAYLOAD_TOO_LARGE
    assert "spec.payloadRef" in explain(too_large())
    assert refusal(too_large(priority=5000)) is Reason.INVALID_SPEC


def test_inline_bytes_count_utf8_and_numbers() -> None:
    samples = DistillRequestSpec.model_validate(
        {
            **REQUEST,
            "samples": [
                {"messages": [{"role": "system", "content": "ab"}, {"role": "user", "content": "é"}], "response": "日"},
                {"prompt": "p", "responseTokenIds": [1, 2, 3], "rolloutLogprobs": [-1, -2, -3], "feedback": "f"},
                {**SAMPLE, "solution": "s", "teacherLogprobs": [-1, -2]},
            ],
        }
    ).samples
    assert samples is not None
    assert [sample.inline_bytes() for sample in samples] == [
        2 + 2 + 3,
        1 + 3 * TOKEN_ID_BYTES + 3 * LOGPROB_BYTES + 1,
        3 + len("[-1,-2]"),
    ]
    assert inline_bytes(samples) == sum(sample.inline_bytes() for sample in samples)


def test_logprobs_of_a_teacher_count_too() -> None:
    with pytest.raises(ValidationError) as caught:
        DistillRequestSpec.model_validate(
            {**REQUEST, "samples": [{**SAMPLE, "teacherLogprobs": [-0.123456789] * 2000}]}
        )
    assert refusal(caught.value) is Reason.PAYLOAD_TOO_LARGE


def test_a_payload_in_the_store_may_be_larger_than_a_request() -> None:
    long = {"prompt": "x" * 100_000, "response": "y" * 50_000}
    chat = {"messages": [{"role": "user", "content": "more"}] * 200, "response": "z"}
    assert len(Payload.model_validate_json(json.dumps({"samples": [long] * 40 + [chat]})).samples) == 41
    with pytest.raises(ValidationError, match="samples"):
        Payload.model_validate({"samples": []})
