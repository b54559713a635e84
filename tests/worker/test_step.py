"""The step on a small random Qwen2: oracles 9, 10, 11 and 13 of the design, the guards, and what a version holds."""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import json
import socket
import time
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from numpy.typing import NDArray

import models
from claas_crds.reasons import Reason
from claas_crds.request import Result, Training
from claas_store import uris
from claas_store.errors import AlreadyExists, NotFound, VersionInvalid
from claas_store.stores import open_store
from claas_store.version import read_version, write_version
from claas_teacher.client import TeacherClient
from claas_teacher.errors import TeacherUnavailable
from claas_worker import errors
from claas_worker.job import Job, Unfit, failure
from claas_worker.render import Limits, render
from claas_worker.sdpo import logprobs_from_hidden, sdpo_loss_from_hidden, topk_from_hidden
from claas_worker.student import Student
from trainee import FRENCH, SAMPLE, SHORT, Trainee, base_digest, tiny_student

Tensors = Mapping[str, NDArray[Any]]


@pytest.fixture(scope="module")
def student() -> Student:
    return tiny_student()


@pytest.fixture
def trainee(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainee:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    return Trainee(student, tmp_path)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[key], other[key]) for key in one)


def chosen_only(trainee: Trainee, sample: dict[str, Any], value: float = -2.0) -> dict[str, Any]:
    rendered = render(_sample(sample), trainee.student.tokenizer, Limits(1024, 512))
    return sample | {"teacherLogprobs": [value] * len(rendered.response_ids)}


def _sample(sample: dict[str, Any]) -> Any:
    from claas_crds.request import Sample

    return Sample.model_validate(sample)


# What a step does


def test_a_step_writes_a_version_that_plain_peft_loads(trainee: Trainee) -> None:
    parent = trainee.adapter("a")
    job = trainee.job(parent)
    result = trainee.step(job, trainee.phases.append)
    assert (result.outcome, result.reason, result.message) == ("Succeeded", "Succeeded", "")
    assert result.lora_uri == uris.next_version_uri(parent, job.created, job.uid, 1)
    assert trainee.phases == ["Loading", "Scoring", "Stepping", "Saving"]
    assert result.timings is not None and result.timings.step_ms is not None and result.timings.save_ms is not None

    version, before = read_version(result.lora_uri), read_version(parent)
    assert version.config == before.config
    assert not same(version.tensors, before.tensors)
    manifest = version.manifest
    assert manifest.parent is not None
    assert (manifest.parent.uri, manifest.parent.sha256) == (parent, before.manifest_sha256)
    assert (manifest.request_uid, manifest.attempt, manifest.template_id) == (job.uid, 1, "person-1/neutral-1")
    assert manifest.training["learningRate"] == 1e-4
    assert manifest.metadata == result.metadata

    model = transformers.AutoModelForCausalLM.from_pretrained(models.tiny_qwen_dir())
    adapted = peft.PeftModel.from_pretrained(model, result.lora_uri.removeprefix("file://"))
    loaded = peft.get_peft_model_state_dict(adapted)
    assert same({key: tensor.numpy() for key, tensor in loaded.items()}, version.tensors)


def test_the_numbers_are_those_of_the_definitions(trainee: Trainee) -> None:
    metadata = trainee.run(trainee.adapter("a"), training={"jsdRegWeight": 2, "pgWeight": 3}).metadata
    assert metadata is not None and metadata.jsd is not None and metadata.update_norm is not None
    assert metadata.total_loss == pytest.approx(metadata.pg_loss + metadata.jsd_reg)
    assert metadata.jsd_reg == pytest.approx(2 * metadata.jsd)
    assert metadata.pg_loss == pytest.approx(-3 * metadata.mean_advantage)  # on-policy: every ratio is 1
    assert (metadata.mean_is_ratio, metadata.clip_fraction, metadata.old_logprobs_source) == (1, 0, "snapshot")
    assert metadata.grad_norm > 0 and metadata.update_norm > 0
    assert metadata.effective_learning_rate == pytest.approx(1e-4 / 8)
    assert (metadata.optimizer_step, metadata.optimizer_state) == (1, "fresh")
    assert (metadata.teacher_mode, metadata.teacher_contrast) == ("Self", 2)
    assert (metadata.truncated, metadata.template_id) == (False, "person-1/neutral-1")
    expected = render(_sample(SAMPLE), trainee.student.tokenizer, Limits(1024, 512))
    assert metadata.tokens_processed == len(expected.response_ids)


def test_repeated_steps_bring_student_and_teacher_together(trainee: Trainee) -> None:
    """Oracle 14 in small: D on the trained sample falls."""
    uri, divergences = trainee.adapter("a"), []
    for _ in range(4):
        paper = {"mode": "Self", "contrast": 0}  # a fixed point where they agree
        result = trainee.run(uri, training={"learningRate": 1e-2, "preset": "paper"}, teacher=paper)
        assert result.metadata is not None
        divergences.append(result.metadata.jsd)
        uri = result.lora_uri
    assert divergences == sorted(divergences, reverse=True)
    assert divergences[-1] < 0.9 * divergences[0]


# Oracle 9: gradients do not depend on how samples are split


@pytest.mark.parametrize("anchor", [0.0, 0.5])
def test_oracle_9_one_pass_is_many_micro_batches_is_permuted(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, anchor: float
) -> None:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    samples = [SAMPLE, SHORT, FRENCH, SHORT | {"prompt": "What is two and two?"}]
    learned, sizes = [], []
    for name, limit, order in (("one", 10_000, 1), ("each", 1, 1), ("permuted", 150, -1)):
        monkeypatch.setattr(student, "_micro_batch_tokens", limit)
        trainee = Trainee(student, tmp_path)
        # Trained parents, so that the anchor has something to hold; the same for all.
        parent = trainee.train(trainee.adapter(f"{name}-0"), samples[:1], training={"learningRate": 0.01}).uri
        result = trainee.run(parent, samples[::order], training={"anchorKlWeight": anchor})
        assert result.metadata is not None
        learned.append((read_version(result.lora_uri), result.metadata))
        sizes.append(len(student.micro_batches([_context(trainee, sample) for sample in samples])))
    assert sizes[0] == 1 and sizes[1] == 4 and 1 < sizes[2] < 4
    (version, numbers), *others = learned
    assert (numbers.anchor or 0.0) > 0 if anchor else numbers.anchor is None
    for other, other_numbers in others:
        assert other_numbers.grad_norm == pytest.approx(numbers.grad_norm, rel=1e-4)
        assert other_numbers.total_loss == pytest.approx(numbers.total_loss, rel=1e-4)
        assert version.optimizer is not None and other.optimizer is not None
        for key, moment in version.optimizer.exp_avg.items():  # the gradient, scaled
            np.testing.assert_allclose(other.optimizer.exp_avg[key], moment, rtol=2e-3, atol=2e-6 * numbers.grad_norm)


def _context(trainee: Trainee, sample: dict[str, Any]) -> Any:
    from claas_worker.student import Context

    rendered = render(_sample(sample), trainee.student.tokenizer, Limits(1024, 512))
    return Context(rendered.prefix_student_ids, rendered.response_ids)


def test_oracle_9_padding_changes_no_row(trainee: Trainee) -> None:
    contexts = [_context(trainee, sample) for sample in (SHORT, FRENCH, SAMPLE)]
    with torch.no_grad():
        together = trainee.student.hidden(contexts)
        for context, rows in zip(contexts, together, strict=True):
            assert rows.shape[0] == len(context.response_ids)
            (alone,) = trainee.student.hidden([context])
            torch.testing.assert_close(rows, alone, rtol=1e-4, atol=1e-5)


# Oracle 10: state by name, resumed


def test_oracle_10_twenty_requests_are_twenty_steps_in_one_process_bitwise(trainee: Trainee) -> None:
    """Each request loads its parent from the store and saves a version. The one process is plain PEFT: its forward
    pass, and torch's AdamW, warm-up and clipping written out here."""
    uri = trainee.adapter("a")
    requests = read_version(uri)
    for _ in range(20):
        requests = trainee.train(requests.uri, [SHORT], teacher={"mode": "Self", "contrast": 0})

    student, training = trainee.student, Training()
    adapted = peft.PeftModel.from_pretrained(
        copy.deepcopy(student.model), uri.removeprefix("file://"), is_trainable=True
    )
    parameters = {
        name.replace(".default", ""): parameter
        for name, parameter in adapted.named_parameters()
        if parameter.requires_grad
    }
    in_order = [parameters[key] for key in sorted(parameters)]
    rendered = render(_sample(SHORT), student.tokenizer, Limits(1024, 512))
    response = torch.tensor(rendered.response_ids)

    def hidden(prefix: Sequence[int]) -> torch.Tensor:
        ids = torch.tensor([[*prefix, *rendered.response_ids][:-1]])
        states: torch.Tensor = adapted.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        return states[0, len(prefix) - 1 :]  # (N, d)

    optimizer = torch.optim.AdamW(in_order, lr=1e-4, betas=(0.9, 0.999), weight_decay=0.01)
    for k in range(20):
        with torch.no_grad():
            support, _ = topk_from_hidden(hidden(rendered.prefix_student_ids), student.head, training.teacher_top_k)
            scores = logprobs_from_hidden(hidden(rendered.prefix_teacher_ids), student.head, support)
        loss, _ = sdpo_loss_from_hidden(hidden(rendered.prefix_student_ids), student.head, response, support, scores)
        loss.backward()
        norm = float(torch.nn.utils.get_total_norm([p.grad for p in in_order if p.grad is not None]))
        if norm > training.max_grad_norm:
            for parameter in in_order:
                assert parameter.grad is not None
                parameter.grad.mul_(training.max_grad_norm / norm)
        optimizer.param_groups[0]["lr"] = 1e-4 * min(1, (k + 1) / 8)
        optimizer.step()
        optimizer.zero_grad()
    assert same({key: parameter.detach().numpy() for key, parameter in parameters.items()}, requests.tensors)
    assert requests.optimizer is not None and requests.optimizer.step == 20


def test_oracle_10_inner_steps_resume_where_requests_do(trainee: Trainee) -> None:
    """Optimizer steps count on, whether they are inner steps or requests."""
    uri = trainee.adapter("a")
    metadata = trainee.run(uri, training={"innerSteps": 3}).metadata
    assert metadata is not None
    assert (metadata.optimizer_step, metadata.effective_learning_rate) == (3, pytest.approx(1e-4 * 3 / 8))
    assert metadata.mean_is_ratio == 1.0  # of the first inner step


def test_oracle_10_a_changed_learning_rate_is_honoured(trainee: Trainee) -> None:
    first = trainee.train(trainee.adapter("a")).uri
    slow, fast = (trainee.run(first, training={"learningRate": rate}).metadata for rate in (1e-6, 1e-3))
    assert slow is not None and fast is not None and slow.update_norm and fast.update_norm
    assert slow.optimizer_state == fast.optimizer_state == "resumed"
    assert (slow.effective_learning_rate, fast.effective_learning_rate) == (2e-6 / 8, 2e-3 / 8)
    assert fast.update_norm / slow.update_norm == pytest.approx(1000, rel=0.05)


def test_a_state_of_another_shape_is_started_afresh_and_said_so(trainee: Trainee) -> None:
    from claas_store.version import Manifest, write_version

    small, large = trainee.train(trainee.adapter("small", r=4)), read_version(trainee.adapter("large", r=8))
    manifest = Manifest(base_model=large.manifest.base_model)
    mixed = write_version(f"file://{trainee.folder}/mixed/", large.config, large.tensors, small.optimizer, manifest)
    metadata = trainee.run(mixed.uri).metadata
    assert metadata is not None
    assert metadata.optimizer_state == "fresh: the stored state is of rank 4, the adapter of rank 8"
    assert metadata.optimizer_step == 1


# Oracle 11: the base stays, adapters leave nothing


def test_oracle_11_the_base_is_bit_identical_after_any_sequence(trainee: Trainee) -> None:
    before = base_digest(trainee.student)
    seven = trainee.adapter("seven")
    two = trainee.adapter("two", target_modules=["q_proj", "v_proj"], r=4)
    trainee.run(seven)
    trainee.run(two, training={"anchorKlWeight": 1.0, "innerSteps": 2})
    with pytest.raises(errors.PromptTooLong):
        Trainee(trainee.student, trainee.folder, limits=Limits(8, 512)).run(seven)
    with pytest.raises(errors.LogprobLengthMismatch):  # raised with the adapter in
        trainee.run(two, [SAMPLE | {"rolloutLogprobs": [-1.0]}])
    with pytest.raises(errors.NonFiniteWeights):
        _explode(trainee, seven)
    assert base_digest(trainee.student) == before


def _explode(trainee: Trainee, uri: str) -> None:
    """A stored second moment below zero: Adam divides by the root of it."""
    from claas_store.version import Manifest, OptimizerState, write_version

    version = trainee.train(uri)
    state = version.optimizer
    assert state is not None
    key = next(iter(state.exp_avg_sq))
    broken = {**state.exp_avg_sq, key: np.full_like(state.exp_avg_sq[key], -1.0)}
    name = f"file://{trainee.folder}/broken-{uuid.uuid4().hex[:6]}/"
    manifest = Manifest(base_model=version.manifest.base_model)
    state = OptimizerState(state.step, state.rank, state.target_modules, state.exp_avg, broken)
    trainee.run(write_version(name, version.config, version.tensors, state, manifest).uri)


def test_oracle_11_an_adapter_does_not_inherit_the_last_ones_targets(student: Student, trainee: Trainee) -> None:
    seven = trainee.adapter("seven", r=16)
    two = trainee.adapter("two", target_modules=["q_proj", "v_proj"], r=4)
    alone = trainee.train(two)
    for _ in range(2):
        trainee.train(seven, training={"learningRate": 1.0})
    after = trainee.train(two)
    assert same(after.tensors, alone.tensors)
    assert after.manifest.metadata == alone.manifest.metadata
    assert len(after.tensors) == 2 * 2 * student.model.config.num_hidden_layers


# Oracle 11: a batched step is its single steps


BATCH: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what each adapter is, and what its request asks for
    ({"r": 16}, {"samples": [SAMPLE, SHORT]}),
    ({"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"samples": [FRENCH], "training": {"anchorKlWeight": 0.5}}),
    ({"r": 32, "alpha": 8, "target_modules": ["down_proj"]}, {"samples": [SHORT], "training": {"innerSteps": 3}}),
    (
        {"r": 5, "target_modules": ["o_proj", "up_proj"]},
        {"training": {"alpha": 1, "preset": "paper", "teacherTopK": 7}},
    ),
]


def rounded_once(one: Tensors, other: Tensors) -> bool:
    """Equal, but for the last bit of fp32: what is left of float64's rounding when it is stored."""
    return one.keys() == other.keys() and all(np.allclose(one[key], other[key], rtol=2**-23, atol=1e-13) for key in one)


def test_oracle_11_a_batched_step_is_its_single_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four adapters of different ranks, targets, options and numbers of samples; trained parents, so that no gradient
    is zero; in float64, where another order of additions is not visible in what is stored."""
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    student = tiny_student()
    student.model.double()
    student.head = student.model.get_output_embeddings().weight
    trainee = Trainee(student, tmp_path)
    before = base_digest(student)
    jobs = []
    for number, (lora, spec) in enumerate(BATCH):
        parent = trainee.train(trainee.adapter(f"a{number}", **lora), [SHORT], training={"learningRate": 0.01}).uri
        jobs += [trainee.job(parent, **spec), trainee.job(parent, **spec)]
    alone = [trainee.step(job, trainee.phases.append) for job in jobs[::2]]
    together = trainee.step.batch([(job, trainee.phases.append) for job in jobs[1::2]])
    for one, other in zip(alone, together, strict=True):
        assert isinstance(other, Result) and other.metadata is not None and one.metadata is not None
        assert one.outcome == other.outcome == "Succeeded"
        for name, number in one.metadata.model_dump().items():
            expected = pytest.approx(number, rel=2e-6, abs=1e-9) if isinstance(number, float) else number
            assert other.metadata.model_dump()[name] == expected, name
        single, batched = read_version(one.lora_uri), read_version(other.lora_uri)
        assert rounded_once(batched.tensors, single.tensors)
        assert single.optimizer is not None and batched.optimizer is not None
        assert rounded_once(batched.optimizer.exp_avg, single.optimizer.exp_avg)
        assert rounded_once(batched.optimizer.exp_avg_sq, single.optimizer.exp_avg_sq)
    assert base_digest(student) == before


def test_oracle_11_a_batch_in_micro_batches_is_the_whole(
    student: Student, trainee: Trainee, monkeypatch: pytest.MonkeyPatch
) -> None:
    """fp32, so the bound is oracle 9's. A request's rows are cut in two, and one micro-batch holds two requests'."""
    parents = [trainee.adapter("a"), trainee.adapter("b", r=4, target_modules=["q_proj", "v_proj"])]
    norms = []
    for limit in (10_000, 130, 1):
        monkeypatch.setattr(student, "_micro_batch_tokens", limit)
        jobs = [trainee.job(parent, [SHORT, SAMPLE, SHORT]) for parent in parents]
        results = trainee.step.batch([(job, trainee.phases.append) for job in jobs])
        norms.append(
            [result.metadata.grad_norm for result in results if isinstance(result, Result) and result.metadata]
        )
    assert norms[1] == pytest.approx(norms[0], rel=1e-4) and norms[2] == pytest.approx(norms[0], rel=1e-4)


def test_oracle_11_what_another_request_holds_changes_no_bit(trainee: Trainee) -> None:
    """The other's weights overflow in the forward pass, or in Adam, or are sound: of equal shape each time."""
    uri, sound = trainee.adapter("a"), trainee.train(trainee.adapter("b"))
    key = next(iter(sound.tensors))
    huge = {key: np.full_like(tensor, 1e30) for key, tensor in sound.tensors.items()}
    assert sound.optimizer is not None
    negative = {**sound.optimizer.exp_avg_sq, key: np.full_like(sound.optimizer.exp_avg_sq[key], -1.0)}
    broken = dataclasses.replace(sound.optimizer, exp_avg_sq=negative)
    others = [
        sound.uri,
        write_version(f"file://{trainee.folder}/huge/", sound.config, huge, None, sound.manifest).uri,
        write_version(f"file://{trainee.folder}/broken/", sound.config, sound.tensors, broken, sound.manifest).uri,
    ]
    kept, ends = [], []
    for other in others:
        jobs = [trainee.job(other, [SHORT]), trainee.job(uri, [SHORT]), trainee.job(other, [SAMPLE])]
        first, result, last = trainee.step.batch([(job, trainee.phases.append) for job in jobs])
        assert isinstance(result, Result)
        kept.append((read_version(result.lora_uri), result.metadata))
        ends.append((type(first), type(last)))
    assert ends == [(Result,) * 2, (errors.NonFiniteInput,) * 2, (errors.NonFiniteWeights,) * 2]
    for version, metadata in kept[1:]:
        assert same(version.tensors, kept[0][0].tensors)
        assert metadata == kept[0][1]


def test_a_batch_gives_each_request_its_own_end(trainee: Trainee) -> None:
    """Every failure that a request can bring along; those that go on train as if alone."""
    good, other = trainee.adapter("good"), trainee.adapter("other", r=4)
    taken = trainee.job(other, [SHORT])
    open_store(other).put(uris.next_version_uri(other, taken.created, taken.uid, 1) + "adapter_config.json", b"x")
    finished = trainee.job(other, [SHORT])
    first = trainee.step(finished, trainee.phases.append)
    mismatch = errors.LogprobLengthMismatch
    silent = {key: SHORT[key] for key in ("prompt", "response")}
    foreign = f"file://{trainee.folder}/foreign/"
    version = read_version(other)
    write_version(foreign, version.config | {"use_dora": True}, version.tensors, None, version.manifest)
    jobs: list[tuple[Job, object]] = [
        (trainee.job(other, [SHORT | {"response": ""}]), errors.EmptyResponse),
        (trainee.job(f"file://{trainee.folder}/none/"), NotFound),
        (trainee.job(foreign), errors.AdapterInvalid),
        (trainee.job(other, [SHORT], teacher={"mode": "Server"}), errors.TeacherUnavailable),
        (trainee.job(other, [SHORT | {"teacherLogprobs": [-1.0]}], teacher={"mode": "Provided"}), mismatch),
        (trainee.job(other, [SHORT | {"rolloutLogprobs": [-1.0]}]), mismatch),
        (trainee.job(good, [SHORT], uid="0badcafe-0"), "Succeeded"),
        (trainee.job(other, [silent]), "NoSignal"),
        (taken, AlreadyExists),
        (trainee.job(other, [SHORT], uid=finished.uid, attempt=2), "Succeeded"),
        (trainee.job(good, [SHORT], uid="0badcafe-0"), errors.VersionConflict),
        (trainee.job(other, [chosen_only(trainee, SHORT)], teacher={"mode": "Provided"}), "Succeeded"),
    ]
    phases: list[list[str]] = [[] for _ in jobs]
    before = base_digest(trainee.student)
    ends = trainee.step.batch([(job, told.append) for (job, _), told in zip(jobs, phases, strict=True)])
    for end, (_, expected) in zip(ends, jobs, strict=True):
        found = end.outcome if isinstance(end, Result) else type(end)
        assert found == expected, end
    assert base_digest(trainee.student) == before
    adopted = ends[9]
    assert isinstance(adopted, Result) and adopted.lora_uri == first.lora_uri and phases[9] == []
    assert phases[0] == ["Loading"] and phases[3] == ["Loading", "Scoring"] and phases[7][-1] == "Stepping"
    assert phases[6] == ["Loading", "Scoring", "Stepping", "Saving"] == phases[8]


# NoSignal and the guards: no version


def test_no_feedback_in_mode_self_is_no_signal(trainee: Trainee) -> None:
    uri = trainee.adapter("a")
    result = trainee.run(uri, [{key: SAMPLE[key] for key in ("prompt", "response")}])
    assert (result.outcome, result.reason, result.lora_uri) == ("NoSignal", "NoSignal", uri)
    assert result.metadata is not None
    assert result.metadata.jsd == pytest.approx(0, abs=1e-9)
    assert (result.metadata.update_norm, result.metadata.optimizer_step) == (0.0, 0)
    assert trainee.versions() == ["a"]
    assert "Saving" not in trainee.phases


@pytest.mark.parametrize(
    ("sample", "limits", "error"),
    [
        (SAMPLE | {"response": ""}, None, errors.EmptyResponse),
        (SAMPLE, Limits(1024, 4), errors.ResponseTooLong),
        (SAMPLE, Limits(4, 512), errors.PromptTooLong),
        (SAMPLE | {"rolloutLogprobs": [-0.1] * 3}, None, errors.LogprobLengthMismatch),
        (
            {"prompt": "x", "responseTokenIds": [151_936], "feedback": "y"},
            Limits(99, 99, 151_936),
            errors.TokenizerMismatch,
        ),
    ],
)
def test_bad_input_is_refused_by_name_and_leaves_no_version(
    trainee: Trainee, sample: dict[str, Any], limits: Limits | None, error: type[errors.GuardError]
) -> None:
    uri = trainee.adapter("a")
    with pytest.raises(error, match=r"sample"):
        Trainee(trainee.student, trainee.folder, limits=limits).run(uri, [SHORT, sample])
    assert trainee.versions() == ["a"]


def test_a_nan_in_the_model_is_no_version(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """A broken forward pass shows at the loss, a broken gradient before the update."""
    uri = trainee.adapter("a")
    hidden = trainee.student.hidden
    monkeypatch.setattr(trainee.student, "hidden", lambda *given: [rows * torch.nan for rows in hidden(*given)])
    with pytest.raises((errors.NonFiniteInput, errors.NonFiniteLoss)):
        trainee.run(uri)
    monkeypatch.setattr(trainee.student, "hidden", lambda *given: [_NanBack.apply(rows) for rows in hidden(*given)])
    with pytest.raises(errors.NonFiniteGrad):
        trainee.run(uri)
    assert trainee.versions() == ["a"]


class _NanBack(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        return upstream * torch.nan


def test_weights_that_are_not_finite_are_not_saved(trainee: Trainee) -> None:
    uri = trainee.adapter("a")
    with pytest.raises(errors.NonFiniteWeights, match=r"lora_[AB]"):
        _explode(trainee, uri)
    assert sorted(name.split("-")[0] for name in trainee.versions()) == ["a", "a", "broken"]


def test_memory_that_runs_out_makes_the_worker_unfit(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*given: object) -> None:
        torch.empty(2**50, dtype=torch.uint8)

    before = base_digest(trainee.student)
    monkeypatch.setattr(trainee.student, "hidden", exhausted)
    with pytest.raises(Unfit) as caught:
        trainee.run(trainee.adapter("a"))
    assert failure(caught.value, 1).outcome == "Retryable"
    two = [(trainee.job(trainee.adapter(name)), trainee.phases.append) for name in "bc"]
    assert [type(end) for end in trainee.step.batch(two)] == [Unfit, Unfit]
    assert base_digest(trainee.student) == before


def test_a_truncated_response_trains_its_head(trainee: Trainee) -> None:
    short = Trainee(trainee.student, trainee.folder, limits=Limits(1024, 8, 151_936))
    sample = SAMPLE | {"rolloutLogprobs": [-1.0] * len(_context(trainee, SAMPLE).response_ids)}
    result = short.run(trainee.adapter("a"), [sample], training={"truncateResponse": "head"})
    assert result.metadata is not None
    assert (result.metadata.tokens_processed, result.metadata.truncated) == (8, True)


def test_a_stale_rollout_is_said(trainee: Trainee) -> None:
    sample = SAMPLE | {"rolloutLogprobs": [-1.0] * len(_context(trainee, SAMPLE).response_ids)}
    result = trainee.run(trainee.adapter("a"), [sample])
    assert result.metadata is not None and result.metadata.old_logprobs_source == "rollout"
    assert result.message.startswith("stale or misaligned rollout")


# Oracle 13: faults between the files and the manifest, retries


def test_oracle_13_a_retry_adopts_what_a_dead_attempt_finished(trainee: Trainee) -> None:
    uri, uid = trainee.adapter("a"), str(uuid.uuid4())
    first = trainee.run(uri, uid=uid)
    trainee.phases.clear()
    again = trainee.run(uri, uid=uid, attempt=2)
    assert (again.lora_uri, again.metadata, again.attempt) == (first.lora_uri, first.metadata, 2)
    assert trainee.phases == []
    assert len(trainee.versions()) == 2


def test_oracle_13_a_dead_attempt_without_manifest_is_left_alone(trainee: Trainee) -> None:
    uri, uid = trainee.adapter("a"), str(uuid.uuid4())
    first = trainee.run(uri, uid=uid)
    open_store(first.lora_uri).delete(first.lora_uri + "claas.json")
    again = trainee.run(uri, uid=uid, attempt=2)
    assert again.lora_uri == first.lora_uri.removesuffix("/") + "-a2/"
    assert read_version(again.lora_uri).manifest.attempt == 2
    with pytest.raises(NotFound):
        read_version(first.lora_uri)
    with pytest.raises(AlreadyExists) as caught:  # its own uri is taken: the next attempt's is not
        trainee.run(uri, uid=uid)
    assert (failure(caught.value, 1).outcome, failure(caught.value, 1).reason) == ("Retryable", "VersionConflict")


@pytest.mark.parametrize("what", ["request", "parent"])
def test_oracle_13_nothing_of_another_request_or_parent_is_adopted(trainee: Trainee, what: str) -> None:
    """The first attempt's folder holds a whole version, but of another request, or of another parent."""
    uid = str(uuid.uuid4())
    other = uid[:8] + str(uuid.uuid4())[8:]  # the same name, since eight characters are in it
    parent, sibling = trainee.adapter("a"), trainee.train(trainee.adapter("a-20260101-000000-0badcafe"))
    first = trainee.run(parent if what == "request" else sibling.uri, uid=other if what == "request" else uid)
    again = trainee.run(parent, uid=uid, attempt=2)
    assert again.lora_uri == first.lora_uri.removesuffix("/") + "-a2/"
    manifest = read_version(again.lora_uri).manifest
    assert manifest.parent is not None
    assert (manifest.request_uid, manifest.parent.uri) == (uid, parent)


def test_what_a_dead_attempt_is_said_to_have_finished_is_read_within_bounds(trainee: Trainee) -> None:
    """Whoever may write below the prefix may write such a manifest; the worker is everybody's."""
    uri, uid = trainee.adapter("a"), str(uuid.uuid4())
    manifest = trainee.run(uri, uid=uid).lora_uri + "claas.json"
    said = json.loads(open_store(manifest).get(manifest))
    said["files"]["adapter_model.safetensors"]["size"] = 3 * 2**30
    open_store(manifest).put(manifest, json.dumps(said).encode(), if_absent=False)
    with pytest.raises(VersionInvalid, match=rf"adapter_model\.safetensors has {3 * 2**30} bytes, at most"):
        trainee.run(uri, uid=uid, attempt=2)


# Where the samples come from


def test_samples_from_a_payload_object(trainee: Trainee) -> None:
    content = json.dumps({"samples": [SAMPLE]}).encode()
    where = f"file://{trainee.folder}/payload.json"
    open_store(where).put(where, content)
    reference = {"uri": where, "sha256": hashlib.sha256(content).hexdigest()}
    inline, by_reference = trainee.adapter("a"), trainee.adapter("b")
    assert same(trainee.train(by_reference, None, payloadRef=reference).tensors, trainee.train(inline).tensors)
    for change, message in (({"sha256": "0" * 64}, "sha256"), ({"uri": where + ".gone"}, "uri")):
        with pytest.raises(errors.PayloadInvalid, match=message):
            trainee.run(by_reference, None, payloadRef=reference | change)


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"samples": []}', b'{"samples": [{"prompt": "wombat"}]}'])
def test_a_payload_that_is_none_is_refused_without_being_quoted(trainee: Trainee, content: bytes) -> None:
    where = f"file://{trainee.folder}/payload.json"
    open_store(where).put(where, content)
    reference = {"uri": where, "sha256": hashlib.sha256(content).hexdigest()}
    with pytest.raises(errors.PayloadInvalid) as caught:
        trainee.run(trainee.adapter("a"), None, payloadRef=reference)
    assert "wombat" not in str(caught.value)


# teacher.mode


def test_mode_server_without_a_teacher_waits_for_one(trainee: Trainee) -> None:
    with pytest.raises(errors.TeacherUnavailable) as caught:
        trainee.run(trainee.adapter("a"), teacher={"mode": "Server"})
    assert failure(caught.value, 1).outcome == "Retryable"


def test_nobody_waits_for_a_silent_teacher_longer_than_for_the_request(
    student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    with (
        socket.create_server(("127.0.0.1", 0)) as silent,
        TeacherClient(f"http://127.0.0.1:{silent.getsockname()[1]}") as client,
    ):
        trainee = Trainee(student, tmp_path, client)
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable) as caught:
            trainee.run(trainee.adapter("a"), teacher={"mode": "Server"}, activeDeadlineSeconds=2)
        assert time.monotonic() - started < 10
    assert failure(caught.value, 1).outcome == "Retryable"


def test_mode_provided_learns_from_the_callers_logprobs(trainee: Trainee) -> None:
    """Chosen tokens alone: jsdRegWeight is 0, the divergence is still measured."""
    result = trainee.run(trainee.adapter("a"), [chosen_only(trainee, SAMPLE)], teacher={"mode": "Provided"})
    assert result.outcome == "Succeeded" and result.metadata is not None
    assert result.metadata.jsd_reg == 0 and result.metadata.jsd is not None and result.metadata.jsd > 0
    assert result.metadata.teacher_mode == "Provided"
    assert result.metadata.frac_positive_advantage == 1.0  # a random model gives each of these tokens less than e^-2


# What may not be loaded (the rest is in test_bank.py)


def test_a_version_of_another_base_model_is_refused(trainee: Trainee) -> None:
    from claas_store.version import Manifest, write_version

    version = read_version(trainee.adapter("a"))
    uri = f"file://{trainee.folder}/foreign/"
    foreign = write_version(uri, version.config, version.tensors, None, Manifest(base_model="another/model"))
    with pytest.raises(errors.AdapterInvalid, match="another/model") as caught:
        trainee.run(foreign.uri)
    assert failure(caught.value, 1).reason == Reason.ADAPTER_INVALID


SMALL = {
    **{"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4},
    **{"num_key_value_heads": 4, "vocab_size": 64},
}


@pytest.mark.parametrize(
    ("config", "why"),
    [
        (transformers.PhiConfig(**SMALL), "has a bias in its lm_head"),
        (transformers.Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=0.5), "scales or caps its logits"),
        (transformers.CohereConfig(**SMALL, logit_scale=0.25), "scales or caps its logits"),
    ],
    ids=lambda value: type(value).__name__ if not isinstance(value, str) else "",
)
def test_a_model_whose_logits_are_more_than_its_head_is_refused_at_the_start(
    config: transformers.PreTrainedConfig, why: str, student: Student
) -> None:
    """However little that is: the loss would leave it out, and nobody would see."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    bias = getattr(model.lm_head, "bias", None)
    if bias is not None:
        torch.nn.init.constant_(bias, 1e-4)
    with pytest.raises(ValueError, match=why):
        Student(model.eval(), student.tokenizer, base_model="tests/odd").warm_up()
    student.warm_up()
