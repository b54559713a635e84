"""One attempt at one request, as the step sees it, and its end when it raised. No Kubernetes, no torch."""

from __future__ import annotations

import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from pydantic import ValidationError

from claas_crds.model import explain, refusal
from claas_crds.reasons import Outcome, Reason, describe
from claas_crds.request import DistillRequestSpec, DistillRequestStatus, Parent, Result

Report = Callable[[str], None]  # told the phase: one of PHASES
PHASES = ("Loading", "Scoring", "Stepping", "Saving")


class Unfit(Exception):
    """This process can no longer be trusted with a step (out of memory, device lost): report, drain, end."""

    reason = Reason.INTERNAL_ERROR
    retryable = True


class InvalidSpec(Exception):
    """The spec asks for what no worker of this release can do; the message names the field."""

    retryable = False

    def __init__(self, message: str, reason: Reason = Reason.INVALID_SPEC) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Job:
    """One attempt at a DistillRequest that is bound to this worker.

    Attributes:
        created: metadata.creationTimestamp, part of the new version's name.
        parent: the version to train.
        out_uri: where the new version goes; empty (always, in a cluster): beside the parent.
    """

    uid: str
    name: str
    namespace: str
    created: str
    attempt: int
    parent: Parent
    spec: DistillRequestSpec
    out_uri: str = ""


Step = Callable[[Job, Report], Result]


@runtime_checkable
class BatchStep(Protocol):
    """A step that runs several jobs, each on an adapter of its own, in the time of little more than one."""

    def __call__(self, job: Job, report: Report) -> Result:
        """Runs one."""

    def batch(self, tasks: Sequence[tuple[Job, Report]]) -> list[Result | Exception]:
        """Of each its result, or what it would have raised alone."""


@dataclass(frozen=True)
class Bound:
    """A DistillRequest as the API server gave it, read no further than scheduling needs."""

    uid: str
    name: str
    namespace: str
    resource_version: str
    worker: str
    attempt: int
    ended: bool  # a terminal condition
    claimed_by: str  # worker of a claim of this attempt, or empty
    reported: bool  # a result of this attempt is there
    manifest: Mapping[str, Any]

    @classmethod
    def of(cls, manifest: Mapping[str, Any]) -> Bound:
        """Reads the object of a list or a watch event."""
        metadata, status = manifest["metadata"], manifest.get("status") or {}
        attempt = status.get("attempt") or 0
        claim, result = status.get("claim") or {}, status.get("result") or {}
        ended = any(
            condition["status"] == "True" and condition["type"] in ("Complete", "Failed")
            for condition in status.get("conditions") or []
        )
        return cls(
            uid=metadata["uid"],
            name=metadata["name"],
            namespace=metadata["namespace"],
            resource_version=metadata["resourceVersion"],
            worker=status.get("worker") or "",
            attempt=attempt,
            ended=ended,
            claimed_by=claim.get("worker", "") if claim.get("attempt") == attempt else "",
            reported=result.get("attempt") == attempt,
            manifest=manifest,
        )

    @property
    def key(self) -> tuple[str, int]:
        """What is run at most once by one worker."""
        return self.uid, self.attempt

    @property
    def pool(self) -> str:
        """The pool that it names; empty: its adapter's, or the installation's default."""
        return str((self.manifest.get("spec") or {}).get("pool") or "")

    def claimable(self, worker: str) -> bool:
        """Whether `worker` may claim it: bound here, not ended, no result of this attempt."""
        return self.worker == worker and self.attempt > 0 and not self.ended and not self.reported

    def job(self) -> Job:
        """The whole request, validated.

        Raises:
            InvalidSpec: the stored spec or parent does not fit this release's schema.
        """
        status = self.manifest.get("status") or {}
        try:
            spec = DistillRequestSpec.model_validate(self.manifest["spec"])
        except ValidationError as error:
            raise InvalidSpec(explain(error), refusal(error)) from None
        try:
            parent = Parent.model_validate(status.get("parent") or {})
        except ValidationError as error:
            raise InvalidSpec(explain(error, "status.parent")) from None
        return Job(
            uid=self.uid,
            name=self.name,
            namespace=self.namespace,
            created=self.manifest["metadata"]["creationTimestamp"],
            attempt=self.attempt,
            parent=parent,
            spec=spec,
        )


def now() -> str:
    """RFC 3339, UTC, microseconds."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def failure(error: BaseException, attempt: int) -> Result:
    """The result of an attempt that raised. Errors with a `reason` are ours, and their messages are safe to show; all
    others become InternalError by type and place alone, because their messages may quote a sample."""
    if (known := getattr(error, "reason", None)) is not None and str(known) in set(Reason):
        reason, message, retryable = Reason(str(known)), str(error), bool(getattr(error, "retryable", False))
    else:
        reason, message, retryable = Reason.INTERNAL_ERROR, f"{describe(Reason.INTERNAL_ERROR)} ({place(error)})", False
    outcome = Outcome.RETRYABLE if retryable else Outcome.FAILED
    return Result(attempt=attempt, outcome=outcome, reason=reason, message=message, at=now())


def place(error: BaseException) -> str:
    """`ValueError at step.py:93 in _render`: where it was raised, in our own code if it passed there; no message."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if Path(frame.filename).parent.name.startswith("claas_")]
    if not frames:
        return type(error).__name__
    frame = (ours or frames)[-1]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno} in {frame.name}"


def status_of(job: Job, worker: str, result: Result) -> DistillRequestStatus:
    """The status that a request would show after `result`, for runs without a cluster."""
    ended_well = result.outcome in (Outcome.SUCCEEDED, Outcome.NO_SIGNAL)
    return DistillRequestStatus(
        state="Complete" if ended_well else "Failed",
        reason="" if result.outcome is Outcome.SUCCEEDED else result.reason,
        worker=worker,
        attempt=job.attempt,
        parent=job.parent,
        lora_uri=result.lora_uri,
        version=result.lora_uri.rstrip("/").rpartition("/")[2],
        metadata=result.metadata,
        timings=result.timings,
        result=result,
    )
