"""One training step, read top to bottom: load the version, render both contexts, score, train, save, report.

Knows nothing of Kubernetes: a `Job` in, a `Result` out, or an error with a `reason`; or several jobs in one batched
step, each with its own end. Nothing of an attempt becomes a version unless everything went well: nothing is written
before the last guard has passed, and the manifest comes last.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import monotonic
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from claas_crds.model import explain
from claas_crds.reasons import Outcome, Reason
from claas_crds.request import Metadata, Payload, Result, Sample, Timings
from claas_store import uris
from claas_store.errors import NotFound, TooLarge
from claas_store.stores import open_store
from claas_store.version import (
    Manifest,
    ParentVersion,
    TeacherUsed,
    Version,
    read_head,
    read_version,
    write_version,
)
from claas_worker.adoption import made_before
from claas_worker.bank import Adapter
from claas_worker.engine import Engine
from claas_worker.engine_adapters import FlatOptimizer
from claas_worker.errors import AdapterInvalid, GuardError, LogprobLengthMismatch, PayloadInvalid
from claas_worker.job import InvalidSpec, Job, Report, Unfit, now
from claas_worker.optim import AdapterOptimizer
from claas_worker.render import NEUTRAL, Limits, Rendered, render
from claas_worker.score import Question, Scored, Scorer
from claas_worker.sdpo import (
    NO_SIGNAL_JSD,
    LossBatch,
    Part,
    anchor_kl,
    combine,
    logprobs_from_hidden,
    sdpo_loss_from_hidden,
)
from claas_worker.student import Context, Student, input_ids

MAX_PAYLOAD_BYTES = 64 * 2**20
MAX_THREADS = 16  # that wait for store and teacher
STALE_RATIO = 0.2  # |mean importance ratio - 1| beyond it: the rollout was another policy's, or is misaligned


class Item(NamedTuple):
    """One sample, ready to be trained on: N response tokens."""

    context: Context  # the student's
    response_ids: Tensor  # (N,)
    scored: Scored
    rollout_logprobs: Tensor | None  # (N,) log mu, where the request knows it


class TrainingStep:
    """Runs jobs on one student: one alone, or several with different adapters in one batched step.

    Jobs in a batch share forward and backward passes and nothing else. Each has its adapter, loss, optimizer and end;
    what one raises ends that one. What another job's rows hold changes no bit of a job's result; how many they are and
    how long may, in the rounding, as it does for any matrix product.

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
        (outcome,) = self.batch([(job, report)])
        if isinstance(outcome, Result):
            return outcome
        try:
            raise outcome
        finally:
            del outcome  # an error that its own traceback refers to would keep a step's tensors alive

    def batch(self, tasks: Sequence[tuple[Job, Report]]) -> list[Result | Exception]:
        """The same for several jobs at once: of each the result, or what it would have raised alone.

        A failure of the forward or backward pass itself is everyone's who was in it.
        """
        attempts = [Attempt(job, report) for job, report in tasks]
        with contextlib.ExitStack() as held:
            self._take_residents(attempts, held)
            _each(attempts, self._adopt)
            _each(attempts, self._read, "Loading")
            for attempt in _alive(attempts):
                with attempt:
                    self._prepare(attempt, held)
            _each([attempt for attempt in attempts if attempt.mode == "Server"], self._ask_teacher, "Scoring")
            for attempt in _announce([attempt for attempt in attempts if attempt.mode == "Provided"], "Scoring"):
                with attempt:
                    self._take_provided(attempt)
            self._ask_students([attempt for attempt in attempts if attempt.mode == "Self"])
            self._train(attempts)
            _each(attempts, self._save, "Saving")
        return [attempt.end() for attempt in attempts]

    def _adopt(self, attempt: Attempt) -> None:
        """Ends it with the version of an earlier attempt that died between manifest and report, if there is one."""
        if version := made_before(attempt.job, self._student.bank.largest_bytes):
            attempt.clock.lap("load_ms")
            end = (Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri, version.manifest.metadata, attempt.clock.timings())
            attempt.outcome = _result(attempt.job, *end)

    def _take_residents(self, attempts: Sequence[Attempt], held: contextlib.ExitStack) -> None:
        """What is still in memory of the versions to train, out of the bank; what is not used goes back."""
        for attempt in attempts:
            key = uris.normalise(attempt.job.parent.uri)
            if not attempt.training.anchor_kl_weight and (adapter := self._student.bank.take(key)) is not None:
                attempt.resident = adapter
                held.callback(self._give_back, attempt, key)

    def _give_back(self, attempt: Attempt, key: str) -> None:
        if attempt.resident is not None:
            self._student.bank.keep(key, attempt.resident)

    def _read(self, attempt: Attempt) -> None:
        """The samples, and the version to train: of one that is in memory, no more than that it still exists."""
        job, base_model = attempt.job, self._student.base_model
        attempt.samples = _samples(job)
        if (resident := attempt.resident) is not None:
            attempt.parent = read_head(job.parent.uri, resident.config)
            if attempt.parent.manifest_sha256 == resident.manifest_sha256:
                return
            attempt.resident = None
        attempt.parent = read_version(
            job.parent.uri,
            adopt=not job.parent.adapter_uid,
            base_model=base_model,
            max_bytes=self._student.bank.largest_bytes,
        )
        if (base := attempt.parent.manifest.base_model) and base_model and base != base_model:
            raise AdapterInvalid(f"the version belongs to the base model {base}, this worker holds {base_model}")

    def _prepare(self, attempt: Attempt, held: contextlib.ExitStack) -> None:
        """The samples in both contexts, and the parent's weights in the bank until `held` ends, with their moments.

        Their key is the version that they are to become. They leave with the step.
        """
        attempt.rendered = [
            render(
                sample,
                self._student.tokenizer,
                self._limits,
                truncate_response=attempt.training.truncate_response,
                where=f"samples[{index}]",
            )
            for index, sample in enumerate(attempt.samples)
        ]
        bank, key = self._student.bank, _new_uri(attempt.job)
        resident, attempt.resident = attempt.resident, None
        attempt.cached = resident is not None
        if resident is None:
            bank.add(
                key, attempt.parent.config, attempt.parent.tensors
            ).manifest_sha256 = attempt.parent.manifest_sha256
        else:
            bank.put(key, resident)
        held.callback(self._leave, attempt, key)
        attempt.adapter = held.enter_context(bank.in_use(key))
        attempt.optimizer = _optimizer(attempt)
        if isinstance(attempt.optimizer, FlatOptimizer):
            attempt.stands_for = uris.normalise(attempt.parent.uri)
        attempt.clock.lap("load_ms")

    def _leave(self, attempt: Attempt, key: str) -> None:
        """The adapter goes; or it stays, as the version whose weights and moments it holds."""
        self._student.bank.remove(key)
        if attempt.stands_for:
            self._student.bank.keep(attempt.stands_for, attempt.adapter)

    def _ask_teacher(self, attempt: Attempt) -> None:
        """Mode Server: the teacher's view of each response, and who it was."""
        adapter = attempt.adapter if attempt.job.spec.teacher.support == "student" else None
        spec, k = attempt.job.spec, attempt.training.teacher_top_k
        within = spec.active_deadline_seconds
        attempt.take(*self._scorer.server(attempt.questions(), k, adapter, within_seconds=within))

    def _take_provided(self, attempt: Attempt) -> None:
        """Mode Provided: what the samples bring along."""
        dropped = [one.dropped_response_tokens for one in attempt.rendered]
        attempt.take(*self._scorer.provided(attempt.questions(), attempt.samples, dropped))

    def _ask_students(self, attempts: Sequence[Attempt]) -> None:
        """Mode Self: all questions in common forward passes, each with its request's adapter."""
        attempts = _announce(attempts, "Scoring")
        asked = [(attempt, question) for attempt in attempts for question in attempt.questions()]
        with _together(attempts):
            scored = self._scorer.self(
                [question for _, question in asked],
                [attempt.adapter for attempt, _ in asked],
                [attempt.training.teacher_top_k for attempt, _ in asked],
                [attempt.contrast for attempt, _ in asked],
            )
        for attempt in _alive(attempts):
            with attempt:
                own = [one for (whose, _), one in zip(asked, scored, strict=True) if whose is attempt]
                attempt.take(own, self._student.base_model)

    def _train(self, attempts: Sequence[Attempt]) -> None:
        """The inner steps, those of all jobs together, and the numbers of the first."""
        attempts = _announce(attempts, "Stepping")
        while training := [attempt for attempt in _alive(attempts) if attempt.inner_steps_left]:
            engine = self._student.engine
            flat = [attempt for attempt in training if isinstance(attempt.optimizer, FlatOptimizer)]
            plain = [attempt for attempt in training if attempt not in flat]
            if engine is not None and flat:
                with _together(flat):
                    self._pass_through(engine, flat)
            if plain:
                with _together(plain):
                    self._backward(plain)
                for attempt in _alive(plain):
                    with attempt:
                        attempt.update()
        for attempt in _alive(attempts):
            with attempt:
                attempt.measure()

    def _backward(self, attempts: Sequence[Attempt]) -> None:
        """Adds the gradients of the whole requests, and their numbers where these are still to come.

        One micro-batch after another, each item with its share of its request's 1/N: the sum does not depend on how
        they are cut. Requests of like length come together, for the padding's sake.
        """
        student, work = self._student, _by_length(attempts)
        for group in student.micro_batches([attempt.items[index].context for attempt, index in work]):
            rows = [work[i] for i in group if work[i][0].outcome is None]
            base_hidden = self._base_hidden(rows)
            contexts = [attempt.items[index].context for attempt, index in rows]
            states = student.hidden(contexts, [attempt.adapter for attempt, _ in rows]) if rows else []
            losses: list[tuple[Attempt, Tensor]] = []
            for (attempt, index), hidden in zip(rows, states, strict=True):
                if attempt.outcome is not None:
                    continue  # its first error is its end
                with attempt:
                    loss = attempt.loss(index, hidden, base_hidden.get((attempt, index)), student.head)
                    losses.append((attempt, loss))
            # Rows of a request that has failed get no gradient: what they hold reaches nobody's weights.
            if sound := [loss for attempt, loss in losses if attempt.outcome is None]:
                torch.stack(sound).sum().backward()

    def _pass_through(self, engine: Engine, attempts: Sequence[Attempt]) -> None:
        """The same by the engine, and the update: all is handed to the device, and waited for once.

        So an update is made before its guards are asked; where one refuses, the adapter goes with the attempt.
        """
        work = _by_length(attempts)
        groups = [
            [work[i] for i in group]
            for group in self._student.micro_batches([attempt.items[index].context for attempt, index in work])
        ]
        last = {id(attempt): number for number, group in enumerate(groups) for attempt, _ in group}
        first = {id(work_item[0]): number for number, group in reversed([*enumerate(groups)]) for work_item in group}
        losses: list[list[tuple[Work, LossBatch]]] = []
        scalars = torch.tensor(
            [
                _flat(attempt).scalars(attempt.training.learning_rate, attempt.training.max_grad_norm)
                for attempt in attempts
            ]
        ).to(self._student.device)
        scalars_of = {id(attempt): row for attempt, row in zip(attempts, scalars, strict=True)}
        sums: list[Tensor] = []
        norms: dict[int, Tensor] = {}
        gradients: dict[int, Tensor] = {}
        with engine.lock:
            mark = engine.mark()
            for number, group in enumerate(groups):
                rows = [(attempt, index) for attempt, index in group if attempt.outcome is None]
                if not rows:
                    continue
                for attempt, _ in rows:
                    attempt.stands_for = ""
                contexts = [attempt.items[index].context for attempt, index in rows]
                states = [_flat(attempt).adapter for attempt, _ in rows]
                done = engine.forward([input_ids(context) for context in contexts], states)
                with engine.beside(mark):
                    losses.append(batches := _loss_batches(rows, self._student.head))
                starts = {
                    (id(attempt), index): done.start(place, len(contexts[place].prefix_ids))
                    for place, (attempt, index) in enumerate(rows)
                }
                for whose, batch in batches:
                    at = [starts[id(attempt), index] for attempt, index in whose]
                    sums.append(batch.enqueue(done.hidden, at, done.gradient, engine.scorer(batch)))
                for attempt, index in rows:  # an unfit one's rows have no gradient, and its adapter goes
                    attempt.take_snapshot(index, done.hidden, starts[id(attempt), index], self._student.head)
                done.backward()
                for attempt in {id(attempt): attempt for attempt, _ in rows}.values():
                    key, state = id(attempt), _flat(attempt).adapter
                    size, whole = state.weights.numel(), first[key] == last[key]
                    if key not in gradients:
                        gradients[key] = engine.scratch(size) if whole else torch.empty_like(state.weights)
                    done.collect(state, gradients[key], add=number > first[key])
                    if number == last[key]:
                        norms[key] = _flat(attempt).enqueue(gradients.pop(key), scalars_of[key], engine.adamw)
        numbers = torch.cat([*(one.flatten() for one in sums), *norms.values()]).tolist()  # the one wait
        read = 0
        for batches in losses:
            for whose, batch in batches:
                for place, (attempt, _) in enumerate(whose):
                    with attempt:
                        attempt.take_numbers(batch.metrics(place, numbers[read : read + batch.width]))
                    read += batch.width
        values = dict(zip(norms, zip(*[iter(numbers[read:])] * 3, strict=True), strict=True))
        for attempt in _alive(attempts):
            with attempt:
                attempt.settle(*values[id(attempt)])

    def _base_hidden(self, rows: Sequence[tuple[Attempt, int]]) -> dict[tuple[Attempt, int], Tensor]:
        """The base model's hidden states (N, d) of the items that are anchored to it."""
        anchored = [(attempt, index) for attempt, index in rows if attempt.training.anchor_kl_weight]
        if not anchored:
            return {}
        with torch.no_grad():
            hidden = self._student.hidden([attempt.items[index].context for attempt, index in anchored])
        return dict(zip(anchored, hidden, strict=True))

    def _save(self, attempt: Attempt) -> None:
        """The new version: its files, then its manifest."""
        job, parent, student = attempt.job, attempt.parent, self._student
        manifest = Manifest(
            base_model=student.base_model or parent.manifest.base_model,
            parent=ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256),
            adapter_uid=job.parent.adapter_uid,  # empty for a bare request's: then no sweep takes it for an orphan
            request_uid=job.uid,
            attempt=job.attempt,
            training=attempt.training.model_dump(by_alias=True, mode="json"),
            metadata=attempt.metadata,
            teacher=TeacherUsed(id=attempt.teacher_id, mode=attempt.mode),
            template_id=attempt.template_id,
        )
        tensors = attempt.adapter.tensors() if attempt.tensors is None else attempt.tensors
        version = write_version(_new_uri(job), parent.config, tensors, attempt.optimizer.state(), manifest)
        if isinstance(attempt.optimizer, FlatOptimizer):
            attempt.adapter.manifest_sha256 = version.manifest_sha256
            attempt.stands_for = uris.normalise(version.uri)
        attempt.clock.lap("save_ms")
        attempt.succeed(Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri)


class Attempt:
    """A job on its way through the step: what each phase leaves for the next, and its end.

    As a context manager it takes an error as its own end, so that other jobs go on.
    """

    samples: Sequence[Sample]
    rendered: Sequence[Rendered]
    parent: Version
    adapter: Adapter
    teacher_id: str
    items: Sequence[Item]
    optimizer: AdapterOptimizer | FlatOptimizer
    metadata: Metadata

    def __init__(self, job: Job, report: Report) -> None:
        self.job, self.report, self.training, self.mode = job, report, job.spec.training, job.spec.teacher.mode
        self.contrast = job.spec.teacher.contrast_weight()
        self.clock = Clock()
        self.outcome: Result | Exception | None = None
        self.inner_steps_left = self.training.inner_steps
        self.resident: Adapter | None = None  # the version to train, as it was left in memory; until it is prepared
        self.cached = False  # whether it was
        self.stands_for = ""  # the version whose weights and moments the adapter holds, where the engine keeps it
        self.tensors: Mapping[str, NDArray[np.float32]] | None = None  # the new weights, if they are at hand already
        self._update_norm = 0.0
        self._parts: list[Mapping[str, float]] = []  # numbers of the items, in the first inner step
        self._numbers: dict[str, Any] = {}
        self._snapshot: dict[int, Tensor] = {}  # log p of the response tokens (N,) before the first inner step

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception):
            self.outcome = _named(error)
            return True
        return False

    def end(self) -> Result | Exception:
        """The outcome, which the attempt then holds no more."""
        outcome, self.outcome = self.outcome, None
        assert outcome is not None
        return outcome

    def succeed(self, outcome: Outcome, reason: Reason, lora_uri: str) -> None:
        """Ends well."""
        result = _result(self.job, outcome, reason, lora_uri, self.metadata, self.clock.timings())
        self.outcome = result.model_copy(update={"adapter_cached": self.cached})

    def questions(self) -> list[Question]:
        """Each sample as both sides see it."""
        return [
            Question(
                Context(one.prefix_student_ids, one.response_ids),
                Context(one.prefix_teacher_ids, one.response_ids),
                tuple(Context(ids, one.response_ids) for ids in one.prefixes_neutral_ids),
            )
            for one in self.rendered
        ]

    def take(self, scored: Sequence[Scored], teacher_id: str) -> None:
        """The teacher's answers, and who it was: all is there to train on."""
        self.teacher_id = teacher_id
        parts = zip(self.samples, self.rendered, scored, strict=True)
        self.items = [_item(index, *part) for index, part in enumerate(parts)]
        self.clock.lap("teacher_ms")

    def loss(self, index: int, hidden: Tensor, base: Tensor | None, head: Tensor) -> Tensor:
        """An item's share of the request's loss, from hidden states (N, d) of the student and, anchored, of the base.

        Raises:
            GuardError: it is not finite, or cannot be.
        """
        item, training = self.items[index], self.training
        total_tokens = sum(len(item.response_ids) for item in self.items)
        pg_weight, jsd_reg_weight = training.weights(chosen_only=any(item.scored.chosen_only for item in self.items))
        result = sdpo_loss_from_hidden(
            hidden,
            head,
            item.response_ids,
            item.scored.support_ids,
            item.scored.logprobs,
            # mu stays the policy before the first inner step.
            self._snapshot.get(index) if item.rollout_logprobs is None else item.rollout_logprobs,
            alpha=training.alpha,
            clip_eps=training.clip_eps,
            jsd_reg_weight=jsd_reg_weight,
            pg_weight=pg_weight,
            advantage_clip=training.advantage_clip,
            total_tokens=total_tokens,
        )
        loss, numbers = result.loss, [result.metrics]
        if base is not None:
            anchor = training.anchor_kl_weight * anchor_kl(hidden, base, lm_head_weight=head, total_tokens=total_tokens)
            loss = loss + anchor
            value = float(anchor.detach())
            numbers.append({"anchor": value, "total_loss": value})
        if not self._numbers:
            self._parts += numbers
            if training.inner_steps > 1 and item.rollout_logprobs is None:
                self._snapshot[index] = logprobs_from_hidden(hidden.detach(), head, item.response_ids)
        return loss

    def update(self) -> None:
        """One inner step with the gradients that are there; none at all where there is nothing to learn."""
        assert isinstance(self.optimizer, AdapterOptimizer)
        self.inner_steps_left -= 1
        grad_norm = self.optimizer.grad_norm()
        if not self._numbers:
            self._numbers = combine(self._parts) | {"grad_norm": grad_norm}
            if self._numbers["jsd"] < NO_SIGNAL_JSD:
                self.inner_steps_left = 0
                return
        self.optimizer.update(self.training.learning_rate, self.training.max_grad_norm, grad_norm)

    def part(self, index: int) -> tuple[Part, Mapping[str, float]]:
        """An item's share of the request's loss, for `LossBatch`, and its options."""
        item, training = self.items[index], self.training
        pg_weight, jsd_reg_weight = training.weights(chosen_only=any(item.scored.chosen_only for item in self.items))
        old = self._snapshot.get(index) if item.rollout_logprobs is None else item.rollout_logprobs
        total_tokens = sum(len(item.response_ids) for item in self.items)
        options = {
            "alpha": training.alpha,
            "clip_eps": training.clip_eps,
            "jsd_reg_weight": jsd_reg_weight,
            "pg_weight": pg_weight,
            "advantage_clip": training.advantage_clip,
        }
        return Part(item.response_ids, item.scored.support_ids, item.scored.logprobs, old, total_tokens), options

    def take_snapshot(self, index: int, hidden: Tensor, start: int, head: Tensor) -> None:
        """log p of an item's response before the first of several inner steps; `start`: its first row of `hidden`."""
        item = self.items[index]
        if self.training.inner_steps > 1 and item.rollout_logprobs is None and index not in self._snapshot:
            rows = hidden[start : start + len(item.response_ids)]
            self._snapshot[index] = logprobs_from_hidden(rows, head, item.response_ids)

    def take_numbers(self, metrics: Mapping[str, float]) -> None:
        """An item's share of the numbers."""
        if not self._numbers:
            self._parts.append(metrics)

    def settle(self, grad_norm: float, update_norm: float, weights_norm: float) -> None:
        """An inner step that the engine has made: whether it counts."""
        optimizer = _flat(self)
        self.inner_steps_left -= 1
        optimizer.check_gradient(grad_norm)
        if not self._numbers:
            self._numbers = combine(self._parts) | {"grad_norm": grad_norm}
            if self._numbers["jsd"] < NO_SIGNAL_JSD:
                self.inner_steps_left = 0
                return
        optimizer.settle(self.training.learning_rate, weights_norm)
        self._update_norm = update_norm

    def measure(self) -> None:
        """The step's numbers; the end, where nothing was learnt."""
        if isinstance(self.optimizer, AdapterOptimizer):
            self.tensors = self.adapter.tensors()
            self._update_norm = _distance(self.tensors, self.parent.tensors)
        self.metadata = Metadata(
            **{name: _seven_digits(value) for name, value in self._numbers.items()},
            update_norm=_seven_digits(self._update_norm),
            effective_learning_rate=_seven_digits(self.optimizer.learning_rate),
            optimizer_step=self.optimizer.step,
            optimizer_state=self.optimizer.origin[:128],
            old_logprobs_source=_ratio_source(self.items),
            teacher_id=self.teacher_id[:253] or None,
            teacher_mode=self.mode,
            teacher_contrast=self.contrast if self._contrasted else None,
            truncated=any(one.truncated for one in self.rendered),
            template_id=self.template_id,
        )
        self.clock.lap("step_ms")
        if not self.optimizer.learning_rate:  # no update was made
            self.succeed(Outcome.NO_SIGNAL, Reason.NO_SIGNAL, self.parent.uri)

    @property
    def template_id(self) -> str:
        """Of all templates that its samples were rendered with, and of the words they were contrasted with."""
        ids = ",".join(sorted({one.template_id for one in self.rendered}))
        return (f"{ids}/{NEUTRAL}" if self._contrasted else ids)[:64]

    @property
    def _contrasted(self) -> bool:
        return self.contrast > 0 and any(one.prefixes_neutral_ids for one in self.rendered)


def _optimizer(attempt: Attempt) -> AdapterOptimizer | FlatOptimizer:
    """With the parent's moments, if they fit. The engine has its own, for requests that it can run."""
    adapter, parent = attempt.adapter, attempt.parent
    rank, targets = parent.config["r"], _target_modules(parent.config)
    if adapter.flat is None or attempt.training.anchor_kl_weight:
        return AdapterOptimizer(adapter.parameters, parent.optimizer, rank=rank, target_modules=targets)
    inner_steps = attempt.inner_steps_left
    return FlatOptimizer(adapter.flat, parent.optimizer, rank=rank, target_modules=targets, inner_steps=inner_steps)


def _flat(attempt: Attempt) -> FlatOptimizer:
    assert isinstance(attempt.optimizer, FlatOptimizer)
    return attempt.optimizer


def _by_length(attempts: Sequence[Attempt]) -> list[tuple[Attempt, int]]:
    """Every item of all of them; requests of like length come together, for the padding's sake."""
    return [
        (attempt, index)
        for attempt in sorted(attempts, key=lambda one: max(item.context.tokens for item in one.items))
        for index in range(len(attempt.items))
    ]


Work = list[tuple["Attempt", int]]


def _loss_batches(group: Work, head: Tensor) -> list[tuple[Work, LossBatch]]:
    """The losses of items that share their options; an item that is unfit ends its request."""
    alike: dict[object, Work] = {}
    parts = {(id(attempt), index): attempt.part(index) for attempt, index in group}
    for attempt, index in group:
        part, options = parts[id(attempt), index]
        key = (*options.values(), part.old_logprobs is None, part.teacher_logprobs.dtype)
        alike.setdefault(key, []).append((attempt, index))
    batches = []
    for whose in alike.values():
        _, options = parts[id(whose[0][0]), whose[0][1]]
        try:
            batches.append((whose, LossBatch([parts[id(one), index][0] for one, index in whose], head, options)))
            continue
        except (GuardError, RuntimeError):  # somebody's shapes or values
            for attempt, index in whose:
                with attempt:
                    LossBatch.check(parts[id(attempt), index][0], head, options["alpha"])
        fit = [(attempt, index) for attempt, index in whose if attempt.outcome is None]
        if fit:
            batches.append((fit, LossBatch([parts[id(one), index][0] for one, index in fit], head, options)))
    return batches


def _alive(attempts: Sequence[Attempt]) -> list[Attempt]:
    return [attempt for attempt in attempts if attempt.outcome is None]


def _announce(attempts: Sequence[Attempt], phase: str) -> list[Attempt]:
    """Tells the phase to those that are alive, and gives them."""
    for attempt in _alive(attempts):
        with attempt:
            attempt.report(phase)
    return _alive(attempts)


def _each(attempts: Sequence[Attempt], run: Callable[[Attempt], None], phase: str = "") -> None:
    """`run` on each that is alive, in threads: store and teacher are waited for side by side."""

    def one(attempt: Attempt) -> None:
        with attempt:
            run(attempt)

    attempts = _announce(attempts, phase) if phase else _alive(attempts)
    if len(attempts) > 1:
        with ThreadPoolExecutor(min(len(attempts), MAX_THREADS), "step") as threads:
            list(threads.map(one, attempts))
    else:
        for attempt in attempts:
            one(attempt)


@contextlib.contextmanager
def _together(attempts: Sequence[Attempt]) -> Iterator[None]:
    """What is raised here ends all of them that are alive."""
    try:
        yield
    except Exception as error:  # noqa: BLE001 (it is handed on as the outcome of each)
        for attempt in _alive(attempts):
            attempt.outcome = _named(error)


def _named(error: Exception) -> Exception:
    """The error; Unfit where it says that this process can do no step any more."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError | torch.AcceleratorError):
        unfit = Unfit(f"the device failed or is out of memory ({type(error).__name__})")
    elif isinstance(error, RuntimeError) and "can't allocate memory" in str(error):  # torch's words on a CPU
        unfit = Unfit("out of memory")
    else:
        return error
    unfit.__cause__ = error
    return unfit


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
    return math.sqrt(sum(float(np.vdot(change, change)) for change in (new[key] - old[key] for key in new)))


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
