"""Operation Jobs of one adapter: the small CPU Jobs that run `claas_store`, and what their Pods answered.

A Job may be gone before its answer was used (time to live, another leader): every operation may be run again, and what
was answered once stays true. So the Jobs that are there are the only memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from claas_crds import names
from claas_operator.actions import StartJob, job_key
from claas_operator.jobs import OPERATION_STEMS, build_operation_job, operation_stem
from claas_operator.settings import Pool, Settings
from claas_operator.snapshot import Adapter, Job, Pod, Snapshot
from claas_operator.workers import Wake, backoff, refused


class Answer(BaseModel):
    """The termination message of a `claas_store` container."""

    model_config = ConfigDict(extra="ignore", hide_input_in_errors=True)
    ok: bool
    uri: str = ""
    version: str = ""
    done: list[str] = Field(default_factory=list)  # names of versions that are as asked for
    dead: list[str] = Field(default_factory=list)  # names of versions whose deletion had begun: none comes back
    restored: list[str] = Field(
        default_factory=list
    )  # names of versions that were restored in that collection: they stay
    collection: int = 0  # in which it was done
    interrupted: int = 0  # what a sweep has found and deleted: folders without a manifest,
    orphans: int = 0  # versions that nobody names,
    uploads: int = 0  # and unfinished uploads
    kept: list[str] | int = 0  # names of versions that a deletion left; of a sweep, how many there are
    reason: str = ""
    message: str = ""
    retryable: bool = True


def parse_answer(text: str) -> Answer | None:
    """The answer in a termination message; None when it holds none (the container was killed, say)."""
    try:
        return Answer.model_validate_json(text)
    except ValidationError:
        return None


@dataclass(frozen=True)
class Desk:
    """What decisions about one adapter's operations read, and how they start one."""

    adapter: Adapter
    snapshot: Snapshot
    settings: Settings
    now: datetime
    wake: Wake
    jobs: Mapping[str, list[Job]]  # by operation, in the order of their counters
    pods: Mapping[str, list[Pod]]  # by Job, also by Jobs that are gone

    def answers(self, operation: str) -> dict[str, Answer]:
        """What the Pods of an operation's Jobs answered, by Job; of several, one that is good."""
        found = ((job.name, parse_answer(pod.answer)) for job in self.of(operation) for pod in self.pods_of(job))
        told = [(name, answer) for name, answer in found if answer is not None]
        return dict(sorted(told, key=lambda pair: pair[1].ok))

    def of(self, operation: str) -> list[Job]:
        """The Jobs of an operation, oldest first."""
        return self.jobs.get(operation, [])

    def pods_of(self, job: Job) -> list[Pod]:
        """The Pods of a Job."""
        return self.pods.get(job.name, [])

    def done(self, operation: str) -> set[str]:
        """Names of the versions that an operation was done to, in the adapter's latest collection."""
        return {name for answer in self._in_collection(operation) for name in answer.done}

    def dead(self, operation: str) -> set[str]:
        """Names of the versions that an operation found dead for good, in the adapter's latest collection."""
        return {name for answer in self._in_collection(operation) for name in answer.dead}

    def restored(self) -> set[str]:
        """Names of the versions for which the adapter's latest collection is over, because they were restored."""
        refusals = self._in_collection("tombstone") + self._in_collection("delete")
        return self.done("restore") | {name for answer in refusals for name in answer.restored}

    def _in_collection(self, operation: str) -> list[Answer]:
        """The good answers that were given in the adapter's latest collection. A Job's name may have been another's."""
        number = self.adapter.status.collection
        return [answer for answer in self.answers(operation).values() if answer.ok and answer.collection == number]

    def running(self, operation: str) -> Job | None:
        """The Job of an operation that has not ended yet."""
        latest = self.of(operation)[-1:]
        return latest[0] if latest and latest[0].finished is None else None

    def lingers(self, operation: str) -> bool:
        """Whether a Pod of an operation may still be at it, its Job gone or not."""
        stem = f"{operation_stem(self.settings, operation, self.adapter.uid)}-"
        return any(not pod.over for job, pods in self.pods.items() if job.startswith(stem) for pod in pods)

    def good(self, operation: str) -> Answer | None:
        """An answer that says that an operation has succeeded."""
        return next((answer for answer in self.answers(operation).values() if answer.ok), None)

    def at_work(self, operation: str) -> bool:
        """Whether an operation runs, or a Pod of it may still be at it: what it undoes has to wait."""
        return self.running(operation) is not None or self.lingers(operation)

    def trouble(self, operation: str) -> str:
        """Why the latest Job of an operation does not start, or has failed; empty while all is well."""
        namespace, name = self._next(operation)
        if why := self.snapshot.failing.get(job_key(namespace, name)):
            return f"the {refused(name, why)}"
        latest = self.of(operation)[-1:]
        if not latest:
            return ""
        job, answer = latest[0], self.answers(operation).get(latest[0].name)
        if answer is not None and answer.ok:
            return ""
        if job.finished is None and answer is None:
            waits = next((pod.trouble for pod in self.pods_of(job) if pod.trouble), "")
            return f"the Job {job.name} does not start: {waits}" if waits else ""
        why = f"{answer.reason}: {answer.message}" if answer else job.message or "its answer was lost with its Pod"
        return f"the Job {job.name} failed and is tried again: {why}"

    def may_start(self, operation: str, patience: float = 1.0) -> bool:
        """Whether none runs and it is not too early after one that failed; if it is, think again then.

        Args:
            patience: waits so many times as long after a failure.
        """
        if self.running(operation) is not None:
            return False
        failures = self._failures(operation)
        if failures:
            latest = failures[-1].finished
            retry_at = (latest or self.now) + patience * backoff(self.settings, len(failures))
            if self.now < retry_at:
                self.wake(retry_at)
                return False
        return True

    def start(self, operation: str, arguments: list[str], patience: float = 1.0) -> StartJob | None:
        """The next Job of an operation; None while it may not start."""
        if not self.may_start(operation, patience):
            return None
        namespace, name = self._next(operation)
        pool = pool_of(self.adapter, self.settings)
        manifest = build_operation_job(
            self.settings,
            operation,
            name,
            self.adapter,
            namespace,
            arguments,
            self.snapshot.owner_uid,
            template=pool.operation_template if pool else None,
        )
        return StartJob(manifest=manifest, pool="")

    def collect(self, operation: str, root: str, versions: Sequence[str], patience: float) -> StartJob | None:
        """The next Job of an operation in the adapter's latest collection, as `start`."""
        number = ("--collection", str(self.adapter.status.collection))
        return self.start(operation, [operation, "--root", root, *number, *each("--version", versions)], patience)

    def _next(self, operation: str) -> tuple[str, str]:
        """Namespace and name of the next Job of an operation."""
        namespace = operation_namespace(self.adapter, self.settings)
        stem = operation_stem(self.settings, operation, self.adapter.uid)
        taken = self.snapshot.taken_counters.get((namespace, stem), 0)
        return namespace, f"{stem}-{max([taken, *(job.counter for job in self.of(operation))]) + 1}"

    def _failures(self, operation: str) -> list[Job]:
        """The latest Jobs that ended without a good answer, oldest first."""
        answers, failures = self.answers(operation), list[Job]()
        for job in reversed(self.of(operation)):
            answer = answers.get(job.name)
            if answer is not None and answer.ok:
                break
            failures.insert(0, job)
        return failures


def each(option: str, versions: Iterable[str]) -> list[str]:
    """`option` once for every name: a name may hold a comma."""
    return [word for name in versions for word in (option, name)]


def operation_namespace(adapter: Adapter, settings: Settings) -> str:
    """Where the adapter's operation Jobs run. Jobs anywhere else are not ours, whatever their labels say."""
    pool = pool_of(adapter, settings)
    return adapter.namespace if pool is not None and pool.isolation == "Namespace" else settings.namespace


def pool_of(adapter: Adapter, settings: Settings) -> Pool | None:
    """The pool that trains the adapter."""
    return settings.pool(adapter.spec.pool or settings.default_pool) if adapter.spec else None


class Registry:
    """Every operation Job and Pod of a snapshot, found by the adapter that it is for."""

    def __init__(self, jobs: Iterable[Job], pods: Iterable[Pod]) -> None:
        self._jobs: dict[tuple[str, str], list[Job]] = {}
        self._pods: dict[str, dict[str, list[Pod]]] = {}
        for job in jobs:
            if job.component == names.COMPONENT_OPERATION and job.operation in OPERATION_STEMS:
                self._jobs.setdefault((job.namespace, job.adapter_uid), []).append(job)
        for pod in pods:
            if pod.component == names.COMPONENT_OPERATION:
                self._pods.setdefault(pod.namespace, {}).setdefault(pod.job, []).append(pod)

    def desk(self, adapter: Adapter, snapshot: Snapshot, settings: Settings, now: datetime, wake: Wake) -> Desk:
        """What there is of one adapter's operations, in the one namespace where they run."""
        home = operation_namespace(adapter, settings)
        jobs: dict[str, list[Job]] = {}
        for job in sorted(self._jobs.get((home, adapter.uid), []), key=lambda job: job.counter):
            jobs.setdefault(job.operation, []).append(job)
        return Desk(adapter, snapshot, settings, now, wake, jobs, self._pods.get(home, {}))
