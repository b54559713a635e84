"""What a worker is told: flags, whose defaults are environment variables that the chart and the operator set.

Imports nothing heavy: the agent shows its Lease before it loads torch.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from claas_crds import names

DESCRIPTION = """\
Runs the training steps (DistillRequests) that the operator bound to this Pod, on one base model that stays in memory.

Without a command it is the agent of a worker Pod: it shows a Lease, watches its requests, and exits 0 when it has been
idle for --linger-seconds, has served --max-requests or gets SIGTERM. `run-request FILE` runs one step from a manifest,
without a cluster.
"""
EPILOG = """\
The object store is set by boto3's own variables (AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY,
AWS_REGION); file:// uris are refused unless they lie below one of CLAAS_FILE_ROOTS (colon-separated).
"""


@dataclass(frozen=True)
class StepSettings:
    """What a step needs besides its request."""

    model_path: Path
    base_model: str  # id that manifests and adapters name; empty: taken as it comes
    teacher_url: str  # empty: no teacher here, mode Server fails
    device: str  # auto, cpu or cuda
    threads: int  # of torch; 0: its own choice
    max_prompt_tokens: int
    max_response_tokens: int
    micro_batch_tokens: int  # padded tokens in one forward pass
    engine: str = "auto"  # auto: CUDA graphs on a GPU; plain: never
    resident_mib: int = 4096  # of idle adapters that the engine keeps on the GPU
    compile_cache: str = ""  # folder of compiled code that outlives the process; empty: none


@dataclass(frozen=True)
class AgentSettings:
    """Who this worker is, and how long it stays."""

    pod_name: str
    pod_namespace: str
    pod_uid: str
    watch_namespace: str  # empty: all
    pool: str
    instance: str
    linger_seconds: float
    max_requests: int
    batch: int  # requests in one batched step
    first_request_seconds: float
    lease_seconds: float


@dataclass(frozen=True)
class RunRequest:
    """`run-request`: one step from a file."""

    file: Path
    out_uri: str  # empty: beside the parent


@dataclass(frozen=True)
class Arguments:
    """A parsed command line: an agent's, or that of `run-request`."""

    step: StepSettings
    agent: AgentSettings | None
    run_request: RunRequest | None


def parse(argv: Sequence[str] | None = None) -> Arguments:
    """Arguments of the command line; exits with a message (argparse) where one is missing or makes no sense."""
    parser = argparse.ArgumentParser(
        "python -m claas_worker", description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawTextHelpFormatter
    )
    _step_flags(parser)
    _agent_flags(parser)
    commands = parser.add_subparsers(dest="command", title="commands", metavar="")
    run = commands.add_parser(
        "run-request",
        help="one step from a DistillRequest manifest with spec.loraUri; prints its status as JSON",
        description="Runs one step from a DistillRequest manifest with spec.loraUri, without a cluster, and prints its "
        "status as JSON.\nExit code 0: a new version, or NoSignal. 1: anything else; status.result says what.",
        epilog=EPILOG,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    _step_flags(run)
    run.add_argument("file", type=Path, metavar="FILE", help="YAML manifest; `-` is stdin")
    run.add_argument("--out-uri", default="", metavar="URI", help="of the new version (default: beside spec.loraUri)")

    given = parser.parse_args(argv)
    of = run if given.command else parser
    if not given.model_path:
        of.error("--model-path (CLAAS_MODEL_PATH) is needed: the folder of the base model")
    step = StepSettings(
        model_path=Path(given.model_path),
        base_model=given.base_model,
        teacher_url=given.teacher_url,
        device=given.device,
        threads=given.threads,
        max_prompt_tokens=given.max_prompt_tokens,
        max_response_tokens=given.max_response_tokens,
        micro_batch_tokens=given.micro_batch_tokens,
        engine=given.engine,
        resident_mib=given.resident_mib,
        compile_cache=given.compile_cache,
    )
    if given.command:
        return Arguments(step, None, RunRequest(given.file, given.out_uri))
    for flag in ("pod_name", "pod_namespace", "pod_uid", "base_model"):
        if not getattr(given, flag):
            variable = f"CLAAS_{flag.upper()}"
            of.error(f"--{flag.replace('_', '-')} ({variable}) is needed: the operator sets it on worker Pods")
    agent = AgentSettings(
        pod_name=given.pod_name,
        pod_namespace=given.pod_namespace,
        pod_uid=given.pod_uid,
        watch_namespace=given.watch_namespace,
        pool=given.pool,
        instance=given.instance,
        linger_seconds=given.linger_seconds,
        max_requests=given.max_requests,
        batch=given.batch,
        first_request_seconds=given.first_request_seconds,
        lease_seconds=given.lease_seconds,
    )
    return Arguments(step, agent, None)


def _step_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the step")
    _flag(group, "--model-path", "CLAAS_MODEL_PATH", "", "DIR", "base model: a Hugging Face folder with safetensors")
    _flag(
        group, "--base-model", names.ENV_BASE_MODEL, "", "ID", "its id, as adapters name it, e.g. Qwen/Qwen2.5-Coder-3B"
    )
    _flag(group, "--teacher-url", "CLAAS_TEACHER_URL", "", "URL", "teacher of mode Server, http://HOST:PORT")
    _flag(
        group,
        "--device",
        "CLAAS_DEVICE",
        "auto",
        "auto|cpu|cuda",
        "where the student runs",
        choices=("auto", "cpu", "cuda"),
    )
    _flag(
        group,
        "--threads",
        "CLAAS_THREADS",
        "0",
        "N",
        "CPU threads of torch; 0: torch's choice (OMP_NUM_THREADS)",
        _count,
    )
    _flag(
        group,
        "--max-prompt-tokens",
        "CLAAS_MAX_PROMPT_TOKENS",
        "4096",
        "N",
        "longest context before a response",
        _positive,
    )
    _flag(group, "--max-response-tokens", "CLAAS_MAX_RESPONSE_TOKENS", "4096", "N", "longest response", _positive)
    _flag(
        *(group, "--micro-batch-tokens", "CLAAS_MICRO_BATCH_TOKENS", "4096", "N"),
        "padded tokens in one forward pass: more is faster and needs more memory; one sample may exceed it",
        _positive,
    )
    _flag(
        *(group, "--engine", "CLAAS_ENGINE", "auto", "auto|plain"),
        "auto: on a GPU, compiled passes in CUDA graphs, where the model is one that these can run; plain: never",
        choices=("auto", "plain"),
    )
    _flag(
        *(group, "--resident-mib", "CLAAS_RESIDENT_MIB", "4096", "N"),
        "GPU memory for adapters that are idle, so that their next step reads nothing from the store",
        _count,
    )
    _flag(
        *(group, "--compile-cache", "CLAAS_COMPILE_CACHE", "", "DIR"),
        "folder for compiled code, read at the start and trusted like code; empty: compile in every process",
    )


def _agent_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("the agent (the operator sets these)")
    _flag(group, "--pod-name", names.ENV_POD_NAME, "", "NAME", "this Pod: requests with this status.worker are ours")
    _flag(group, "--pod-namespace", names.ENV_POD_NAMESPACE, "", "NS", "its namespace, where its Lease lies")
    _flag(group, "--pod-uid", names.ENV_POD_UID, "", "UID", "its uid: owner and holder of the Lease")
    _flag(
        group,
        "--watch-namespace",
        names.ENV_WATCH_NAMESPACE,
        "",
        "NS",
        "watch this namespace's requests only; empty: all",
    )
    _flag(group, "--pool", names.ENV_POOL, "", "NAME", "its pool, a label of the Lease")
    _flag(group, "--instance", names.ENV_INSTANCE, "", "NAME", "its Helm release, a label of the Lease")
    _flag(group, "--linger-seconds", names.ENV_LINGER_SECONDS, "300", "S", "end after being idle for so long", seconds)
    _flag(
        group,
        "--max-requests",
        names.ENV_MAX_REQUESTS,
        "1000",
        "N",
        "end after so many requests; with 1: one Job each",
        _positive,
    )
    _flag(
        *(group, "--batch", names.ENV_BATCH, "1", "N"),
        "requests of different adapters that are run in one batched step, if they are there at the same time",
        _positive,
    )
    _flag(
        *(group, "--first-request-seconds", "CLAAS_FIRST_REQUEST_SECONDS", "60", "S"),
        "patience for the first request, where --linger-seconds is shorter",
        seconds,
    )
    _flag(
        *(group, "--lease-seconds", names.ENV_LEASE_SECONDS, "15", "S"),
        "a Lease that is not renewed for so long is stale; it is renewed three times as often",
        _above_zero,
    )


def _flag(
    group: Any,
    flag: str,
    variable: str,
    default: str,
    metavar: str,
    text: str,
    kind: Callable[[str], Any] = str,
    **more: Any,
) -> None:
    """A flag whose default is the environment variable; argparse parses that default like a given value."""
    value = os.environ.get(variable) or default
    shown = f"{text}\n[{variable}{f', default {default}' if default else ''}]"
    group.add_argument(flag, default=value, metavar=metavar, help=shown, type=kind, **more)


def _count(text: str) -> int:
    if (value := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{value} is negative")
    return value


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def _above_zero(text: str) -> float:
    if not (value := seconds(text)):
        raise argparse.ArgumentTypeError("0 is too short")
    return value


def seconds(text: str) -> float:
    """A duration.

    Raises:
        ValueError: it is none.
    """
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of seconds, 0 or more")
    return value
