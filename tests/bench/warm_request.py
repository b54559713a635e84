"""A warm request end to end: from its creation to the head's move, with a real teacher, object store and API server.

    python tests/bench/warm_request.py --json OUT.json     a 32B of random weights on one GPU, a worker on another
    python tests/bench/warm_request.py --small             tiny models, any machine: for correctness alone

Everything is the real part: vLLM behind `python -m claas_teacher` and its frames, SeaweedFS, etcd and API server, the
operator and the agent, each a process. Only the kubelet is played: the worker's process is started where the operator's
Job has got its Pod. One adapter, one request after another, each the next step of it. What a client of the API server
sees is timed: created, bound, claimed, reported, Complete. Beside it, in the same run: the teacher alone (the same
client, the same lengths, before the worker is there) and the student alone (the step's own `stepMs`). The bound
is on what remains of bound to Complete without these two.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import queue
import shutil
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator", "tests", "tests/bench")]

import numpy as np  # noqa: E402
import torch  # noqa: E402
from cold_start import BASE, SMALL, machine, write_model  # noqa: E402
from student_step import QWEN_3B  # noqa: E402
from teacher_scoring import QWEN_32B, server  # noqa: E402

import models  # noqa: E402
import objectstore  # noqa: E402
from claas_crds import names  # noqa: E402
from claas_crds.adapter import Lora  # noqa: E402
from claas_store.create import create_adapter  # noqa: E402
from claas_teacher.client import TeacherClient  # noqa: E402
from cluster import programs  # noqa: E402
from cluster.controlplane import ControlPlane  # noqa: E402
from cluster.process import spawn, tails  # noqa: E402
from operatorstage import GROUP, Stage, apply_crds  # noqa: E402

ADAPTER = "coder"
OVERHEAD_BOUND_MS = 150.0
TOP_K = 100
READY_SECONDS, REQUEST_SECONDS, COMPILE_SECONDS = 300.0, 120.0, 240.0
PREFIX_TOKENS = 48  # about what the request's template comes to
SEEN = ("bound", "claimed", "reported", "complete")
PARTS = ("bound to claimed", "load", "teacher", "step", "save", "step to reported", "reported to complete")


def main() -> None:
    """Measure, print, and keep."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="tiny models, for machines without GPUs")
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--rounds", type=int, default=10, help="measured requests")
    parser.add_argument("--tokenizer", type=Path, help="a folder's; by default fetched (tests/models.py)")
    parser.add_argument("--kube", type=Path, help="a folder with the program `kube`, on a machine that cannot build it")
    parser.add_argument("--teacher-path", default="", help="PYTHONPATH of the teacher's process alone")
    parser.add_argument("--logs", type=Path, help="a folder that keeps the processes' logs")
    parser.add_argument("--json", type=Path, help="where the result goes")
    options = parser.parse_args()
    if options.kube is not None:
        programs.ensure_kube = lambda: options.kube
    with tempfile.TemporaryDirectory(prefix="claas-warm-", dir="/dev/shm") as scratch:
        try:
            result = measure(Path(scratch), options)
        finally:
            if options.logs is not None:
                keep_logs(Path(scratch), options.logs)
    print(table(result))
    if options.json is not None:
        options.json.write_text(json.dumps(result, indent=1))
    if not options.small and result["overhead_ms"] > OVERHEAD_BOUND_MS:
        sys.exit("the bound is missed")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, in one run."""
    tokenizer = options.tokenizer or models.qwen_tokenizer_dir()
    with on_gpu("1"):
        student = write_model(folder / "student", SMALL if options.small else QWEN_3B, tokenizer)
    torch.cuda.empty_cache()
    if options.small:
        teacher, flags = models.tiny_qwen_dir(), ["--dtype=float32", "--max-model-len=2048"]
    else:
        teacher, flags = folder / "teacher", ["--load-format=dummy", "--max-model-len=8192"]
        shutil.copytree(tokenizer, teacher)
        (teacher / "config.json").write_text(json.dumps(QWEN_32B))
    with ExitStack() as stack:
        with on_gpu("0", PYTHONPATH=options.teacher_path):
            url = stack.enter_context(server(teacher, flags, folder / "vllm", folder / "teacher.log"))
        teacher_ms = teacher_alone(url, options.tokens)
        (folder / "store").mkdir()
        store = stack.enter_context(objectstore.running(folder / "store"))
        os.environ.update(store.environment)
        control_plane = stack.enter_context(ControlPlane(folder / "plane"))
        apply_crds(control_plane)
        stage = stack.enter_context(Stage(control_plane, folder, "warm"))
        pool = {"baseModel": BASE, "maxWorkers": 1, "startLimitSeconds": READY_SECONDS, "lingerSeconds": 3600}
        stage.start_operator(stage.settings(pool=pool, defaultBaseModel=BASE, timings=PRODUCTION))
        stage.wait_to_lead()
        adapter = stage.adapter(ADAPTER, baseModel=BASE)
        create_adapter(
            f"s3://{store.bucket}/{stage.team}/{ADAPTER}/", BASE, student, Lora(), adapter["metadata"]["uid"]
        )
        watch = Watch(stage)
        first = Request(stage, watch, "first", options.tokens)  # it makes the operator start a worker
        with on_gpu("1"):
            worker = Worker(stage, student, url)
        cold = first.result(worker) | {
            "ready_s": worker.ready_s,
            "process_to_result_s": first.seen["reported"] - worker.started,
        }
        warm_up(stage, watch, worker, options)
        rounds = [
            Request(stage, watch, f"warm-{number}", options.tokens).result(worker) for number in range(options.rounds)
        ]
        watch.close()
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return {
        "machine": machine(),
        "tokens": options.tokens,
        "teacher_alone_ms": teacher_ms,
        "student_alone_ms": median["step"],
        "overhead_ms": median["bound to complete"] - teacher_ms - median["step"],
        "median_ms": median,
        "rounds_ms": rounds,
        "first": cold,
    }


# Times of an installation, where the stage's own are those of hurried tests.
PRODUCTION = {
    "leaseSeconds": 15,
    "claimGraceSeconds": 30,
    "relistSeconds": 60,
    "leaderLeaseSeconds": 15,
    "teacherProbeSeconds": 2,
    "fenceGraceSeconds": 30,
    "reasonDelaySeconds": 2,
}


class Watch:
    """What a client sees of the requests: each change with the moment at which it came."""

    def __init__(self, stage: Stage) -> None:
        self.changes: queue.SimpleQueue[tuple[float, dict[str, Any]]] = queue.SimpleQueue()
        path = f"{GROUP}/namespaces/{stage.team}/{names.REQUEST_PLURAL}"
        version = stage.api("GET", path)["metadata"]["resourceVersion"]
        self._connection = http.client.HTTPSConnection(stage.api._host, timeout=600, context=stage.api._tls)
        self._connection.request("GET", f"{path}?watch=1&resourceVersion={version}")
        self._answer = self._connection.getresponse()
        threading.Thread(target=self._read, name="watch", daemon=True).start()

    def _read(self) -> None:
        for line in self._answer:
            self.changes.put((time.monotonic(), json.loads(line)["object"]))

    def close(self) -> None:
        """No more."""
        assert self._connection.sock is not None
        self._connection.sock.shutdown(2)


class Request:
    """One on the adapter, created now.

    Attributes:
        seen: when (monotonic) what of SEEN was seen first.
    """

    def __init__(self, stage: Stage, watch: Watch, name: str, tokens: int) -> None:
        ids = np.random.default_rng(abs(hash(name)) % 2**32).integers(1000, 50_000, tokens).tolist()
        sample = {"prompt": "Say something.", "responseTokenIds": ids, "finishReason": "length", "feedback": "Shorter."}
        self._watch, self._name, self.seen = watch, name, dict[str, float]()
        self._created = time.monotonic()
        stage.request(name, ADAPTER, samples=[sample], teacher={"mode": "Server"}, training={"teacherTopK": TOP_K})

    def result(self, worker: Worker) -> dict[str, float]:
        """Milliseconds by part, once it is Complete."""
        status = self._await(worker)
        if status["reason"]:
            sys.exit(f"{self._name} made no version: {status['reason']}")
        timings, seen = status["timings"], self.seen
        ms = {name: 1000 * (seen[name] - self._created) for name in SEEN}
        parts = {name.removesuffix("Ms"): float(timings[name]) for name in ("loadMs", "teacherMs", "stepMs", "saveMs")}
        return {
            "created to bound": ms["bound"],
            "bound to claimed": ms["claimed"] - ms["bound"],
            **parts,
            "step to reported": ms["reported"] - ms["claimed"] - sum(parts.values()),
            "reported to complete": ms["complete"] - ms["reported"],
            "bound to complete": ms["complete"] - ms["bound"],
        }

    def _await(self, worker: Worker) -> dict[str, Any]:
        end = time.monotonic() + READY_SECONDS
        while time.monotonic() < end:
            at, found = self._watch.changes.get(timeout=REQUEST_SECONDS)
            status: dict[str, Any] = found.get("status") or {}
            if found["metadata"]["name"] != self._name:
                continue
            reached = (
                status.get("worker"),
                status.get("claim"),
                status.get("result"),
                status.get("state") == "Complete",
            )
            for name, there in zip(SEEN, reached, strict=True):
                if there:
                    self.seen.setdefault(name, at)
            if "complete" in self.seen:
                return status
            if status.get("state") == "Failed":
                break
        sys.exit(f"{self._name} did not complete: {self.seen}{tails([worker.log], 30)}")


class Worker:
    """The real agent, for the Pod that the operator's Job has got; ready when this returns."""

    def __init__(self, stage: Stage, model: Path, teacher_url: str) -> None:
        stage.wait("a worker's Pod", stage.pods, READY_SECONDS)
        (pod,) = stage.pods()
        name = pod["metadata"]["name"]
        self.log = stage.folder / "worker.log"
        told = {
            names.ENV_POD_NAME: name,
            names.ENV_POD_NAMESPACE: stage.home,
            names.ENV_POD_UID: pod["metadata"]["uid"],
            names.ENV_POOL: "l40s",
            names.ENV_INSTANCE: stage.instance,
            names.ENV_BASE_MODEL: BASE,
            names.ENV_LINGER_SECONDS: "3600",
            "CLAAS_MODEL_PATH": str(model),
            "CLAAS_TEACHER_URL": teacher_url,
            "CLAAS_FIRST_REQUEST_SECONDS": "3600",
            "KUBECONFIG": str(stage.control_plane.kubeconfig),
            "PYTHONPATH": os.pathsep.join(sys.path),
        }
        self.started = time.monotonic()
        self.process = spawn([sys.executable, "-m", "claas_worker"], self.log, environment=told)
        stage.pod_status(name, {"phase": "Running"})
        stage.wait("the worker to be ready", lambda: self.lines("ready") or self.process.poll(), READY_SECONDS)
        if self.process.poll() is not None:
            sys.exit(f"the worker ended{tails([self.log], 30)}")
        self.ready_s = time.monotonic() - self.started

    def lines(self, message: str) -> list[dict[str, Any]]:
        """Of its log, those that say this."""
        found = [json.loads(line) for line in self.log.read_text().splitlines() if line.startswith("{")]
        return [line for line in found if line["message"] == message]


def warm_up(stage: Stage, watch: Watch, worker: Worker, options: argparse.Namespace) -> None:
    """Requests until the engine has its loss and its graphs for these lengths; two where there is no engine."""
    end = time.monotonic() + COMPILE_SECONDS
    number, still = 0, 0 if options.small else 2
    while number < 2 or len(worker.lines("engine made ready")) < still:
        if time.monotonic() > end:
            sys.exit(f"the engine is not ready{tails([worker.log], 30)}")
        Request(stage, watch, f"up-{number}", options.tokens).result(worker)
        number += 1


def teacher_alone(url: str, tokens: int, rounds: int = 9) -> float:
    """Milliseconds from a call to arrays in hand, median; every call with ids of its own."""
    rng = np.random.default_rng(0)
    times = []
    with TeacherClient(url) as client:
        for _ in range(rounds + 2):
            ids = rng.integers(1000, 50_000, PREFIX_TOKENS + tokens)
            started = time.perf_counter()
            client.score(ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:], TOP_K)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:])


def on_gpu(number: str, **variables: str) -> AbstractContextManager[object]:
    """Processes started in it see that card alone, and these variables where they are not empty."""
    given = {"CUDA_VISIBLE_DEVICES": number, **{key: value for key, value in variables.items() if value}}
    return mock.patch.dict(os.environ, given)


def keep_logs(folder: Path, out: Path) -> None:
    """The logs of all processes, for a look afterwards."""
    out.mkdir(parents=True, exist_ok=True)
    for log in folder.glob("*.log"):
        shutil.copy(log, out / log.name)


def table(result: Mapping[str, Any]) -> str:
    """For LOG.md."""
    median, rounds = result["median_ms"], result["rounds_ms"]
    lines = [f"\n{result['machine']}; {result['tokens']} response tokens, medians of {len(rounds)}\n"]
    lines += ["| part | ms | least to most |", "|---|---|---|"]
    for name, value in median.items():
        each = [one[name] for one in rounds]
        lines.append(f"| {name} | {value:.0f} | {min(each):.0f}-{max(each):.0f} |")
    lines.append(f"| teacher alone | {result['teacher_alone_ms']:.0f} | |")
    lines.append(f"| **bound to complete without teacher and student** | {result['overhead_ms']:.0f} | bound 150 |")
    lines.append(f"\nfirst request of the process: {json.dumps({k: round(v, 2) for k, v in result['first'].items()})}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
