"""The worker's agent with a step that takes no time and obeys its prompt: for tests of the protocol and benchmarks.

"hold" waits at the pipe `gate` in CLAAS_MODEL_PATH, "unavailable" fails as a teacher does that does not answer, "bad"
as bad input does, "crash" raises an error that quotes the prompt, "memory" runs out of it, "phases" shows them all,
"takes 0.5 s" takes that.
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from claas_crds.reasons import Outcome, Reason
from claas_crds.request import Metadata, Payload, Result, Sample, Timings
from claas_store import uris
from claas_store.stores import open_store
from claas_worker import __main__ as worker
from claas_worker.config import StepSettings
from claas_worker.errors import EmptyResponse, TeacherUnavailable
from claas_worker.job import PHASES, Job, Report, Step, now

NUMBERS = Metadata(
    total_loss=0.1,
    pg_loss=0.05,
    jsd_reg=0.05,
    mean_advantage=-0.05,
    frac_positive_advantage=0.4,
    mean_is_ratio=1.0,
    clip_fraction=0.0,
    grad_norm=0.5,
    tokens_processed=7,
)


def _samples(job: Job) -> Sequence[Sample]:
    """As the real step reads them; without torch."""
    if (reference := job.spec.payload_ref) is None:
        return job.spec.samples or []
    content = open_store(reference.uri).get(reference.uri)
    assert hashlib.sha256(content).hexdigest() == reference.sha256
    return Payload.model_validate_json(content).samples


def load(settings: StepSettings) -> Step:
    """In place of the model."""

    def step(job: Job, report: Report) -> Result:
        prompt = _samples(job)[0].prompt or ""
        if "hold" in prompt:
            report(PHASES[2])
            (Path(settings.model_path) / "gate").read_bytes()
        if took := re.search(r"takes ([0-9.]+) s", prompt):
            time.sleep(float(took[1]))  # the work itself
        if "unavailable" in prompt:
            raise TeacherUnavailable("http://teacher: ConnectError, given up after 4 tries")
        if "bad" in prompt:
            raise EmptyResponse("samples[0].response is empty")
        if "crash" in prompt:
            raise KeyError(prompt)
        if "memory" in prompt:
            raise MemoryError
        for phase in PHASES:
            report(phase)
        return Result(
            attempt=job.attempt,
            outcome=Outcome.SUCCEEDED,
            reason=Reason.SUCCEEDED,
            at=now(),
            lora_uri=uris.next_version_uri(job.parent.uri, job.created, job.uid, job.attempt),
            metadata=NUMBERS,
            timings=Timings(step_ms=0),
        )

    return Instant(step)


class Instant:
    """A step that can run a batch: in as long as all of them take."""

    def __init__(self, step: Step) -> None:
        self._step = step

    def __call__(self, job: Job, report: Report) -> Result:
        return self._step(job, report)

    def batch(self, tasks: Sequence[tuple[Job, Report]]) -> list[Result | Exception]:
        ends: list[Result | Exception] = []
        for job, report in tasks:
            try:
                ends.append(self._step(job, report))
            except Exception as error:  # noqa: BLE001 (its own end)
                ends.append(error)
        return ends


if __name__ == "__main__":
    worker.load_step = load
    sys.exit(worker.main())
