"""The worker's step without a model: it reads its parent, asks its teacher and writes a version, all for real.

The weights of the new version are the parent's plus one, so that a chain of versions can be counted. "hold" in a prompt
waits in Stepping until the file `go` is in CLAAS_MODEL_PATH, "slow" takes its time; "bad" is bad input, "nothing" has
nothing to learn.
"""

from __future__ import annotations

import time
from pathlib import Path

from claas_crds.reasons import Outcome, Reason
from claas_crds.request import Result, Timings
from claas_store import uris
from claas_store.version import Manifest, ParentVersion, TeacherUsed, read_version, write_version
from claas_teacher.client import TeacherClient
from claas_worker.adoption import made_before
from claas_worker.config import StepSettings
from claas_worker.errors import EmptyResponse
from claas_worker.job import PHASES, Job, Report, Step, now
from instant_worker import NUMBERS

GATE_SECONDS, SLOW_SECONDS = 120.0, 0.7


def load(settings: StepSettings) -> Step:
    """In place of the model."""
    teacher = (
        TeacherClient(settings.teacher_url, timeout_s=3.0, read_timeout_s=1.0, attempts=2)
        if settings.teacher_url
        else None
    )

    def step(job: Job, report: Report) -> Result:
        prompt = (job.spec.samples or [])[0].prompt or ""
        if version := made_before(job):
            return _end(job, Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri)
        report(PHASES[0])
        parent = read_version(job.parent.uri, adopt=not job.parent.adapter_uid, base_model=settings.base_model)
        report(PHASES[1])
        if teacher is not None and job.spec.teacher.mode == "Server":
            teacher.score([1, 2, 3], [4, 5], k=2)
        report(PHASES[2])
        if "hold" in prompt:
            _wait_for(Path(settings.model_path) / "go")
        if "slow" in prompt:
            time.sleep(SLOW_SECONDS)
        if "bad" in prompt:
            raise EmptyResponse("samples[0].response is empty")
        if "nothing" in prompt:
            return _end(job, Outcome.NO_SIGNAL, Reason.NO_SIGNAL, parent.uri)
        report(PHASES[3])
        manifest = Manifest(
            base_model=settings.base_model,
            parent=ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256),
            adapter_uid=job.parent.adapter_uid,
            request_uid=job.uid,
            attempt=job.attempt,
            metadata=NUMBERS,
            teacher=TeacherUsed(mode=job.spec.teacher.mode),
        )
        uri = uris.next_version_uri(job.parent.uri, job.created, job.uid, job.attempt)
        tensors = {name: value + 1 for name, value in parent.tensors.items()}
        version = write_version(uri, parent.config, tensors, None, manifest)
        return _end(job, Outcome.SUCCEEDED, Reason.SUCCEEDED, version.uri)

    return step


def _wait_for(path: Path) -> None:
    end = time.monotonic() + GATE_SECONDS
    while not path.exists():
        if time.monotonic() > end:
            raise TimeoutError("nobody opened the gate")
        time.sleep(0.02)


def _end(job: Job, outcome: Outcome, reason: Reason, uri: str) -> Result:
    timings = Timings(step_ms=0)
    return Result(
        attempt=job.attempt, outcome=outcome, reason=reason, at=now(), lora_uri=uri, metadata=NUMBERS, timings=timings
    )
