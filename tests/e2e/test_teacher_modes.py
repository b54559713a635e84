"""spec.teacher.mode: the student as its own teacher, and logprobs that the caller brings along."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import models
from claas_crds.request import Sample
from claas_worker.render import Limits, render
from deployment import BASE_MODEL, Deployment
from e2e import story
from kubectl import Object
from payloads import SHAPES, Row

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SAMPLE = story.sample("The capital of France is the beautiful city of Paris.")
TOP = 5


@pytest.fixture(scope="module")
def adapter_name(installed: Deployment) -> str:
    """A new adapter."""
    name = story.unique("modes")
    story.create_adapter(installed, name)
    return name


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    """What the caller's own engine thinks of the response, after the context that holds the feedback."""
    folder = models.smollm2_dir()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    one = render(Sample.model_validate(SAMPLE), AutoTokenizer.from_pretrained(folder), Limits(1024, 512))
    with torch.no_grad():
        ids = torch.tensor([[*one.prefix_teacher_ids, *one.response_ids]])
        logprobs = model(ids).logits[0, len(one.prefix_teacher_ids) - 1 : -1].log_softmax(-1)  # (N, V)
    best = logprobs.topk(TOP)
    return [
        Row(token, row[token].item(), dict(zip(top.tolist(), values.tolist(), strict=True)))
        for token, row, top, values in zip(one.response_ids, logprobs, best.indices, best.values, strict=True)
    ]


def train(where: Deployment, name: str, mode: str, sample: Object) -> Object:
    """A request in this mode, complete; its status, after what holds of every step."""
    before = story.adapter(where, name)["status"]
    request = story.request(
        where, story.unique(mode.lower()), adapterRef={"name": name}, samples=[sample], teacher={"mode": mode}
    )
    status = dict(story.complete(where, request)["status"])
    numbers = status["metadata"]
    assert numbers["teacherMode"] == mode
    assert numbers["gradNorm"] > 0
    assert numbers["jsd"] > 0
    assert numbers["totalLoss"] == pytest.approx(numbers["pgLoss"] + numbers["jsdReg"], abs=1e-6)
    assert story.adapter(where, name)["status"]["headSeq"] == before["headSeq"] + 1
    return status


def test_self_the_student_is_its_own_teacher(installed: Deployment, adapter_name: str, rows: list[Row]) -> None:
    numbers = train(installed, adapter_name, "Self", SAMPLE)["metadata"]
    assert numbers["teacherId"] == BASE_MODEL
    assert numbers["tokensProcessed"] == len(rows)


@pytest.mark.parametrize("shape", SHAPES)
def test_provided_the_caller_brings_a_teachers_logprobs(
    installed: Deployment, adapter_name: str, rows: list[Row], shape: str
) -> None:
    payload = SHAPES[shape](rows, AutoTokenizer.from_pretrained(models.smollm2_dir()))
    numbers = train(installed, adapter_name, "Provided", {**SAMPLE, "teacherLogprobs": payload})["metadata"]
    assert numbers["tokensProcessed"] == len(rows)
    if shape == "floats":
        assert numbers["jsdReg"] == 0, "chosen tokens alone: the divergence is a lower bound, reported and not trained"
    else:
        masses = [sum(map(math.exp, {**row.top, row.token: row.logprob}.values())) for row in rows]
        assert numbers["teacherTopkMass"] == pytest.approx(sum(masses) / len(rows), abs=0.05)
