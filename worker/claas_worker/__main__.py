"""`python -m claas_worker`: the agent of a worker Pod, or one step from a file. `--help` says what it can be told."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import logging
import os
import sys
import threading
import uuid
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from claas_worker import config, logs
from claas_worker.job import Step

if TYPE_CHECKING:
    from claas_teacher.client import TeacherClient

log = logging.getLogger("claas_worker")

GREETING_SECONDS = 5.0


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the process."""
    arguments = config.parse(argv)
    logs.configure()
    # The model is a folder; nothing here may ask a hub about it, nor draw bars into the JSON logs.
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # libgomp's threads spin at barriers, for milliseconds: where others want the cores too, a step then takes 3 to 15 s
    # instead of 1.7 (SmolLM2, two cores and one busy process). Spinning for microseconds costs 5 % on idle cores.
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    if arguments.run_request is not None:
        return _run_request(arguments.step, arguments.run_request)
    assert arguments.agent is not None
    return _run_agent(arguments.step, arguments.agent)


def _run_agent(step: config.StepSettings, agent: config.AgentSettings) -> int:
    """The Lease first, in a second: the operator must see this worker long before torch is imported."""
    from claas_worker.agent import Agent
    from claas_worker.api import Requests, Unreachable, connect
    from claas_worker.lease import WorkerLease

    client = connect()
    requests = Requests(client, agent.pod_name, agent.watch_namespace)
    try:
        Agent(requests, WorkerLease(client, agent), agent).run(lambda: load_step(step))
    except Unreachable as error:
        log.error("the api server is out of reach", extra={"what": str(error)})
        return 1
    return 0


def load_step(settings: config.StepSettings) -> Step:
    """The base model in memory, warm, and the step that trains on it. Imports torch.

    What waits for something else than the interpreter begins before the long imports: the teacher is asked, and the
    weights are on their way to the device.
    """
    with _uncollected():
        return _load_step(settings)


def _load_step(settings: config.StepSettings) -> Step:
    from pathlib import Path
    from time import monotonic

    from claas_teacher.client import TeacherClient

    started = monotonic()
    teacher = TeacherClient(settings.teacher_url) if settings.teacher_url else None
    if teacher is not None:
        threading.Thread(target=_greet, args=(teacher,), name="teacher", daemon=True).start()

    from claas_worker.weights import Weights

    weights = Weights(settings.model_path, settings.device)

    from transformers.utils import logging as transformers_logging

    from claas_worker.render import Limits
    from claas_worker.score import Scorer
    from claas_worker.step import TrainingStep
    from claas_worker.student import Student

    transformers_logging.disable_progress_bar()
    imported = monotonic()
    student = Student.load(
        settings.model_path,
        base_model=settings.base_model,
        device=settings.device,
        threads=settings.threads,
        micro_batch_tokens=settings.micro_batch_tokens,
        resident_bytes=settings.resident_mib * 2**20,
        weights=weights,
    )
    student.warm_up()
    if settings.engine == "auto" and student.device.type == "cuda":
        student.start_engine(Path(settings.compile_cache) if settings.compile_cache else None)
    seconds = {"seconds": round(monotonic() - started, 2), "imports": round(imported - started, 2)}
    log.info("model loaded", extra={"device": str(student.device), **seconds})
    limits = Limits(settings.max_prompt_tokens, settings.max_response_tokens, student.head.shape[0])
    return TrainingStep(student, Scorer(student, teacher), limits)


def _greet(teacher: TeacherClient) -> None:
    """So that the first request finds a connection, and knows the teacher; where it is not there yet, asks itself."""
    from claas_teacher.errors import TeacherError

    try:
        teacher.info(timeout_s=GREETING_SECONDS)
    except TeacherError as error:
        log.info("the teacher does not answer yet", extra={"why": error.reason})


@contextlib.contextmanager
def _uncollected() -> Iterator[None]:
    """Modules and model are a million objects that stay: the collector is not to look at them, now or ever again."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()


def _run_request(settings: config.StepSettings, run: config.RunRequest) -> int:
    """One step by the same code as the agent's, its status on stdout."""
    import yaml
    from pydantic import ValidationError

    from claas_crds import names
    from claas_crds.model import explain
    from claas_crds.reasons import Outcome
    from claas_crds.request import DistillRequestSpec, Parent
    from claas_worker.job import Job, failure, now, status_of

    text = sys.stdin.read() if str(run.file) == "-" else run.file.read_text()
    manifests = [document for document in yaml.safe_load_all(text) if isinstance(document, dict)]
    requests = [document for document in manifests if document.get("kind") == names.REQUEST_KIND]
    if len(requests) != 1:
        print(f"{run.file} holds {len(requests)} manifests of kind {names.REQUEST_KIND}, expected one", file=sys.stderr)
        return 1
    metadata: dict[str, Any] = requests[0].get("metadata") or {}
    try:
        spec = DistillRequestSpec.model_validate(requests[0].get("spec") or {})
    except ValidationError as error:
        print(f"{run.file}: {explain(error)}", file=sys.stderr)
        return 1
    if spec.lora_uri is None:
        print(
            f"{run.file}: spec.loraUri is needed: without a cluster nothing resolves spec.adapterRef", file=sys.stderr
        )
        return 1
    job = Job(
        uid=metadata.get("uid") or str(uuid.uuid4()),
        name=metadata.get("name") or metadata.get("generateName") or "",
        namespace=metadata.get("namespace") or "",
        created=str(metadata.get("creationTimestamp") or now()),
        attempt=1,
        parent=Parent(uri=spec.lora_uri),
        spec=spec,
        out_uri=run.out_uri,
    )
    step = load_step(dataclasses.replace(settings, engine="plain"))  # one step is over before anything is compiled
    try:
        result = step(job, lambda phase: log.info("phase", extra={"phase": phase}))
    except Exception as error:
        log.exception("attempt failed", extra={"uid": job.uid})
        result = failure(error, job.attempt)
    status = status_of(job, os.uname().nodename, result)
    print(json.dumps(status.model_dump(by_alias=True, exclude_none=True, mode="json"), indent=2), flush=True)
    return 0 if result.outcome in (Outcome.SUCCEEDED, Outcome.NO_SIGNAL) else 1


if __name__ == "__main__":
    sys.exit(main())
