"""One training step, read top to bottom: load the version, render both contexts, score, train, save, report.

Knows nothing of Kubernetes: a `Job` in, a `Result` out, or an error with a `reason`. Nothing of an attempt becomes a
version unless everything went well: nothing is written before the last guard has passed, and the manifest comes last.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from collections.abc import Mapping, Sequence
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from claas_crds.model import explain
from claas_crds.reasons import Outcome, Reason
from claas_crds.request import Metadata, Payload, Result, Sample, Timings, Training
from claas_store import uris
from claas_store.errors import NotFound, TooLarge
from claas_store.stores import open_store
from claas_store.version import (
    Manifest,
    ParentVersion,
    TeacherUsed,
    find_manifest,
    read_version,
    write_version,
)
from claas_worker.errors import AdapterInvalid, LogprobLengthMismatch, PayloadInvalid
from claas_worker.job import InvalidSpec, Job, Report, Unfit, now
from claas_worker.optim import AdapterOptimizer
from claas_worker.render import Limits, Rendered, render
from claas_worker.score import Question, Scored, Scorer
from claas_worker.sdpo import NO_SIGNAL_JSD, anchor_kl, combine, logprobs_from_hidden, sdpo_loss_from_hidden
from claas_worker.student import Adapter, Context, Student

log = logging.getLogger(__name__)

MAX_PAYLOAD_BYTES = 64 * 2**20
STALE_RATIO = 0.2  # |mean importance ratio - 1| beyond it: the rollout was another policy's, or is misaligned


class Item(NamedTuple):
    """One sample, ready to be trained on: N response tokens."""

    context: Context  # the student's
    response_ids: Tensor  # (N,)
    scored: Scored
    rollout_logprobs: Tensor | None  # (N,) log mu, where the request knows it


class TrainingStep:
    """Runs jobs, one after another, on one student.

    Args:
        student: the base model; bit-identical after every job, however it ends.
        scorer: asks the teacher.
        limits: tokens that prompts and responses may have.
    """

    def __init__(self, student: Student, scorer: Scorer, limits: Limits) -> None:
        self._student, self._scorer, self._limits = student, scorer, limits

    def __call__(self, job: Job, report: Report) -> Result:
        """Trains `job.parent` on the job's samples and writes the new version, unless there is nothing to learn.

        Raises:
            GuardError, StoreError, TeacherError, InvalidSpec: each with its `reason`; no version was made.
            Unfit: the same, and this process should end.
        """
        try:
            return _adopt(job) or self._run(job, report)
        except (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError) as error:
            raise Unfit(f"the device failed or is out of memory ({type(error).__name__})") from error
        except RuntimeError as error:
            if "can't allocate memory" in str(error):  # torch's words on a CPU
                raise Unfit("out of memory") from error
            raise

    def _run(self, job: Job, report: Report) -> Result:
        student, training = self._student, job.spec.training
        clock = Clock()

        report("Loading")
        samples = _samples(job)
        rendered = [
            render(
                sample,
                student.tokenizer,
                self._limits,
                truncate_response=training.truncate_response,
                where=f"samples[{index}]",
            )
            for index, sample in enumerate(samples)
        ]
        parent = read_version(job.parent.uri, adopt=not job.parent.adapter_uid, base_model=student.base_model)
        if (base := parent.manifest.base_model) and student.base_model and base != student.base_model:
            raise AdapterInvalid(
                f"the version belongs to the base model {base}, this worker holds {student.base_model}"
            )
        with student.adapter(parent.config, parent.tensors) as adapter:
            clock.lap("load_ms")

            report("Scoring")
            scored, teacher_id = self._score(job, samples, rendered)
            items = [_item(*parts) for parts in zip(range(len(samples)), samples, rendered, scored, strict=True)]
            clock.lap("teacher_ms")

            report("Stepping")
            optimizer = AdapterOptimizer(
                adapter.parameters,
                parent.optimizer,
                rank=parent.config["r"],
                target_modules=_target_modules(parent.config),
            )
            numbers = self._train(items, adapter, optimizer, training)
            tensors = adapter.tensors()
            templates = ",".join(sorted({one.template_id for one in rendered}))[:64]
            metadata = Metadata(
                **{name: _seven_digits(value) for name, value in numbers.items()},
                update_norm=_seven_digits(_distance(tensors, parent.tensors)),
                effective_learning_rate=_seven_digits(optimizer.learning_rate),
                optimizer_step=optimizer.step,
                optimizer_state=optimizer.origin[:128],
                old_logprobs_source=_ratio_source(items),
                teacher_id=teacher_id[:253] or None,
                teacher_mode=job.spec.teacher.mode,
                truncated=any(one.truncated for one in rendered),
                template_id=templates,
            )
            clock.lap("step_ms")

            if not optimizer.learning_rate:  # no update was made
                return _result(job, Outcome.NO_SIGNAL, Reason.NO_SIGNAL, parent.uri, metadata, clock.timings())
            report("Saving")
            manifest = Manifest(
                base_model=student.base_model or parent.manifest.base_model,
                parent=ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256),
                request_uid=job.uid,
                attempt=job.attempt,
                training=training.model_dump(by_alias=True, mode="json"),
                metadata=metadata,
                teacher=TeacherUsed(id=teacher_id, mode=job.spec.teacher.mode),
                template_id=templates,
            )
            version = write_version(_new_uri(job), parent.config, tensors, optimizer.state(), manifest)
            clock.lap("save_ms")
            return _result(job, Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri, metadata, clock.timings())

    def _score(self, job: Job, samples: Sequence[Sample], rendered: Sequence[Rendered]) -> tuple[list[Scored], str]:
        """The teacher's view of each response, and who it was."""
        questions = [
            Question(
                Context(one.prefix_student_ids, one.response_ids), Context(one.prefix_teacher_ids, one.response_ids)
            )
            for one in rendered
        ]
        teacher, k = job.spec.teacher, job.spec.training.teacher_top_k
        if teacher.mode == "Provided":
            dropped = [one.dropped_response_tokens for one in rendered]
            return self._scorer.provided(questions, samples, dropped)
        if teacher.mode == "Self":
            return self._scorer.self(questions, k)
        if teacher.support == "student":
            raise InvalidSpec("spec.teacher.support student: this teacher cannot score chosen ids; leave support out")
        return self._scorer.server(questions, k)

    def _train(
        self, items: Sequence[Item], adapter: Adapter, optimizer: AdapterOptimizer, training: Training
    ) -> dict[str, float]:
        """The inner steps; gives the numbers of the first. No update at all where there is nothing to learn."""
        total_tokens = sum(len(item.response_ids) for item in items)
        old = [item.rollout_logprobs for item in items]
        numbers, snapshot = self._backward(items, old, adapter, training, total_tokens)
        numbers["grad_norm"] = optimizer.grad_norm()
        if numbers["jsd"] < NO_SIGNAL_JSD:
            return numbers
        optimizer.update(training.learning_rate, training.max_grad_norm)
        # mu stays the policy before the first inner step.
        old = [known if known is not None else taken for known, taken in zip(old, snapshot, strict=True)]
        for _ in range(training.inner_steps - 1):
            self._backward(items, old, adapter, training, total_tokens)
            optimizer.update(training.learning_rate, training.max_grad_norm)
        return numbers

    def _backward(
        self,
        items: Sequence[Item],
        old_logprobs: Sequence[Tensor | None],
        adapter: Adapter,
        training: Training,
        total_tokens: int,
    ) -> tuple[dict[str, Any], list[Tensor]]:
        """Adds the gradients of the whole request; gives its numbers and log p of the response tokens, (N,) each.

        One micro-batch after another, each with its share of 1/N: the sum does not depend on how they are cut.
        """
        student = self._student
        pg_weight, jsd_reg_weight = training.weights(chosen_only=any(item.scored.chosen_only for item in items))
        numbers: list[Mapping[str, float]] = []
        snapshot: dict[int, Tensor] = {}
        for group in student.micro_batches([item.context for item in items]):
            contexts = [items[index].context for index in group]
            base_hidden: Sequence[Tensor | None] = [None] * len(group)
            if training.anchor_kl_weight:
                with torch.no_grad(), adapter.off():
                    base_hidden = student.hidden(contexts)
            losses = []
            for index, hidden, base in zip(group, student.hidden(contexts), base_hidden, strict=True):
                item = items[index]
                result = sdpo_loss_from_hidden(
                    hidden,  # (N, d)
                    student.head,
                    item.response_ids,
                    item.scored.support_ids,
                    item.scored.logprobs,
                    old_logprobs[index],
                    alpha=training.alpha,
                    clip_eps=training.clip_eps,
                    jsd_reg_weight=jsd_reg_weight,
                    pg_weight=pg_weight,
                    advantage_clip=training.advantage_clip,
                    total_tokens=total_tokens,
                )
                losses.append(result.loss)
                numbers.append(result.metrics)
                if base is not None:
                    anchor = training.anchor_kl_weight * anchor_kl(
                        hidden, base, lm_head_weight=student.head, total_tokens=total_tokens
                    )
                    losses.append(anchor)
                    value = float(anchor.detach())
                    numbers.append({"anchor": value, "total_loss": value})
                if training.inner_steps > 1:
                    snapshot[index] = logprobs_from_hidden(hidden.detach(), student.head, item.response_ids)
            torch.stack(losses).sum().backward()
        return combine(numbers), [snapshot.get(index, torch.empty(0)) for index in range(len(items))]


class Clock:
    """Milliseconds by phase."""

    def __init__(self) -> None:
        self._since = monotonic()
        self._laps: dict[str, int] = {}

    def lap(self, name: str) -> None:
        """Ends a phase."""
        at = monotonic()
        self._laps[name] = round(1000 * (at - self._since))
        self._since = at

    def timings(self) -> Timings:
        """The phases so far."""
        return Timings(**self._laps)


def _adopt(job: Job) -> Result | None:
    """The result of an earlier attempt that died between its manifest and its report: its version is whole."""
    for attempt in range(1, job.attempt):
        uri = uris.next_version_uri(job.parent.uri, job.created, job.uid, attempt)
        manifest = find_manifest(uri)
        if manifest is None or manifest.request_uid != job.uid or manifest.parent is None:
            continue
        if uris.normalise(manifest.parent.uri) != uris.normalise(job.parent.uri):
            continue
        clock = Clock()
        version = read_version(uri)  # every file against its digest
        clock.lap("load_ms")
        log.info("adopted", extra={"uid": job.uid, "attempt": attempt})
        return _result(job, Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri, manifest.metadata, clock.timings())
    return None


def _samples(job: Job) -> Sequence[Sample]:
    """The request's samples, inline or from the object that payloadRef names.

    Raises:
        PayloadInvalid: the object is missing, too large, another one, or does not fit the schema.
    """
    if job.spec.samples is not None:
        return job.spec.samples
    reference = job.spec.payload_ref
    if reference is None:
        raise InvalidSpec("set one of spec.samples and spec.payloadRef")
    try:
        content = open_store(reference.uri).get(reference.uri, max_bytes=MAX_PAYLOAD_BYTES)
    except (NotFound, TooLarge) as error:
        raise PayloadInvalid(f"spec.payloadRef.uri: {error}") from error
    if hashlib.sha256(content).hexdigest() != reference.sha256:
        raise PayloadInvalid("spec.payloadRef.sha256 is not the digest of the object at spec.payloadRef.uri")
    try:
        return Payload.model_validate(json.loads(content)).samples
    except ValidationError as error:
        raise PayloadInvalid(f"spec.payloadRef's object: {explain(error, 'payload')}") from None
    except (ValueError, RecursionError) as error:
        raise PayloadInvalid(f"spec.payloadRef's object is not JSON ({type(error).__name__})") from None


def _item(index: int, sample: Sample, rendered: Rendered, scored: Scored) -> Item:
    rollout = None
    if sample.rollout_logprobs is not None:
        kept = len(rendered.response_ids)
        rollout = torch.tensor(sample.rollout_logprobs[:kept])
        if (given := len(sample.rollout_logprobs)) != (n := kept + rendered.dropped_response_tokens):
            hint = "; the last is the end-of-turn token, or set finishReason: length" if given == n - 1 else ""
            raise LogprobLengthMismatch(
                f"samples[{index}].rolloutLogprobs holds {given} values, the response has {n} tokens{hint}"
            )
    return Item(
        Context(rendered.prefix_student_ids, rendered.response_ids),
        torch.tensor(rendered.response_ids),
        scored,
        rollout,
    )


def _seven_digits(value: float) -> float:
    """What fp32 resolves; more digits in a status would only be noise to read past."""
    return value if isinstance(value, int) else float(f"{value:.7g}")


def _ratio_source(items: Sequence[Item]) -> str:
    """Where log mu came from."""
    given = {item.rollout_logprobs is not None for item in items}
    return "rollout and snapshot" if len(given) > 1 else "rollout" if given == {True} else "snapshot"


def _new_uri(job: Job) -> str:
    return job.out_uri or uris.next_version_uri(job.parent.uri, job.created, job.uid, job.attempt)


def _target_modules(config: Mapping[str, Any]) -> list[str]:
    """adapter_config.json has a list of names, or one pattern."""
    targets = config["target_modules"]
    return [targets] if isinstance(targets, str) else list(targets)


def _distance(new: Mapping[str, NDArray[np.float32]], old: Mapping[str, NDArray[np.float32]]) -> float:
    """L2 norm of the change of all weights together."""
    return math.sqrt(sum(float(np.square(new[key] - old[key], dtype=np.float64).sum()) for key in new))


def _result(
    job: Job, outcome: Outcome, reason: Reason, lora_uri: str, metadata: Metadata | None, timings: Timings
) -> Result:
    message = ""
    if metadata is not None and abs(metadata.mean_is_ratio - 1) > STALE_RATIO:
        message = f"stale or misaligned rollout: the mean importance ratio is {metadata.mean_is_ratio:.3g}"
    return Result(
        attempt=job.attempt,
        outcome=outcome,
        reason=reason,
        message=message,
        at=now(),
        lora_uri=lora_uri,
        metadata=metadata,
        timings=timings,
    )
