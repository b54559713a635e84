"""A warm request end to end: from its creation to the head's move, with a real teacher, object store and API server.

    python tests/bench/warm_request.py --out OUT.json      a 32B of random weights on one GPU, a worker on another
    python tests/bench/warm_request.py --small             tiny models, any machine: for correctness alone
    python tests/bench/warm_request.py --small --teacher-url http://localhost:8000 --tokenizer DIR   a running teacher

Everything is the real part: vLLM behind `python -m claas_teacher` and its frames, SeaweedFS, etcd and API server, the
operator and the agent, each a process. Only the kubelet is played: the worker's process is started where the operator's
Job has got its Pod. One adapter, one request after another, each the next step of it. What a client of the API server
sees is timed: created, bound, claimed, reported, Complete. Beside it, in the same run: the teacher alone (the same
client, the same lengths, before the worker is there) and the student alone (the step's own `stepMs`). The bound
is on what remains of bound to Complete without these two (bounds.yaml). Needs this repository's environment, a vLLM for
GPUs in the teacher's process (--teacher-path), an API server and a tokenizer (built and fetched the first time; --kube
and --tokenizer where that cannot be). Minutes, most of them the teacher's start.
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
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator", "tests", "tests/bench")]

import numpy as np  # noqa: E402
import record  # noqa: E402
import torch  # noqa: E402
from cold_start import BASE, SMALL, write_model  # noqa: E402
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
TOP_K = 100
READY_SECONDS, REQUEST_SECONDS, COMPILE_SECONDS = 300.0, 120.0, 240.0
PREFIX_TOKENS = 48  # about what the request's template comes to
IDS = (1000, 50_000)  # of responses; up to the vocabulary where that is smaller
SEEN = ("bound", "claimed", "reported", "complete")
PARTS = ("bound to claimed", "load", "teacher", "step", "save", "step to reported", "reported to complete")


def main() -> None:
    """Measure, print, and keep."""
    parser = record.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="tiny models, for machines without GPUs")
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--rounds", type=int, default=10, help="measured requests")
    parser.add_argument("--tokenizer", type=Path, help="a folder's; by default fetched (tests/models.py)")
    parser.add_argument("--kube", type=Path, help="a folder with the program `kube`, on a machine that cannot build it")
    parser.add_argument("--teacher-url", help="a teacher that runs; --tokenizer has to be its own")
    parser.add_argument("--teacher-path", default="", help="PYTHONPATH of the teacher's process alone")
    parser.add_argument("--logs", type=Path, help="a folder that keeps the processes' logs")
    options = parser.parse_args()
    if options.kube is not None:
        programs.ensure_kube = lambda: options.kube
    with tempfile.TemporaryDirectory(prefix="claas-warm-", dir="/dev/shm") as scratch:
        try:
            result = measure(Path(scratch), options)
        finally:
            if options.logs is not None:
                keep_logs(Path(scratch), options.logs)
    record.write(options.out, result)
    print(table(result))
    judged = record.judged("warm request", [result], result["bounds"])
    if not options.small and not all(one.holds for one in judged):
        sys.exit("the bound is missed")


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """All of it, in one run."""
    tokenizer = options.tokenizer or models.qwen_tokenizer_dir()
    with on_gpu("1"):
        student = write_model(folder / "student", SMALL if options.small else QWEN_3B, tokenizer)
    torch.cuda.empty_cache()
    with ExitStack() as stack:
        url = options.teacher_url
        if url is None:
            model, flags = teacher_model(folder / "teacher", tokenizer, options.small)
            with on_gpu("0", PYTHONPATH=options.teacher_path):
                url = stack.enter_context(server(model, flags, folder / "vllm", folder / "teacher.log"))
        teacher_ms, vocabulary = teacher_alone(url, options.tokens, rounds=2 if options.small else 9)
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

        def ask(name: str) -> Request:
            return Request(stage, watch, name, drawn(options.tokens, vocabulary))

        first = ask("first")  # it makes the operator start a worker
        with on_gpu("1"):
            worker = Worker(stage, student, url)
        cold = first.result(worker) | {
            "ready_s": worker.ready_s,
            "process_to_result_s": first.seen["reported"] - worker.started,
        }
        if not options.small:
            warm_up(ask, worker)
        rounds = [ask(f"warm-{number}").result(worker) for number in range(options.rounds)]
        watch.close()
    median = {name: statistics.median(one[name] for one in rounds) for name in rounds[0]}
    return record.circumstances("warm_request", "torch", "transformers", "peft") | {
        "bounds": record.bounds("warm_request"),
        "tokens": options.tokens,
        "teacher_alone_ms": teacher_ms,
        "student_alone_ms": median["step"],
        "overhead_ms": median["bound to complete"] - teacher_ms - median["step"],
        "median_ms": median,
        "rounds_ms": rounds,
        "first": cold,
    }


def teacher_model(folder: Path, tokenizer: Path, small: bool) -> tuple[Path, list[str]]:
    """What the teacher is to be started on, and vLLM's flags."""
    if small:
        return models.tiny_qwen_dir(), ["--dtype=float32", "--max-model-len=2048"]
    shutil.copytree(tokenizer, folder)
    (folder / "config.json").write_text(json.dumps(QWEN_32B))
    return folder, ["--load-format=dummy", "--max-model-len=8192"]


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

    def __init__(self, stage: Stage, watch: Watch, name: str, ids: list[int]) -> None:
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


def warm_up(ask: Callable[[str], Request], worker: Worker) -> None:
    """Requests, two at least, until the engine has its loss and its graphs for these lengths."""
    end = time.monotonic() + COMPILE_SECONDS
    number = 0
    while number < 2 or len(worker.lines("engine made ready")) < 2:
        if time.monotonic() > end:
            sys.exit(f"the engine is not ready{tails([worker.log], 30)}")
        ask(f"up-{number}").result(worker)
        number += 1


def drawn(tokens: int, vocabulary: int) -> list[int]:
    """Ids that no call before had."""
    return np.random.default_rng().integers(IDS[0], min(IDS[1], vocabulary), tokens).tolist()  # type: ignore[no-any-return]


def teacher_alone(url: str, tokens: int, rounds: int) -> tuple[float, int]:
    """Milliseconds from a call to arrays in hand, median; every call with ids of its own. And the size of its
    vocabulary."""
    times = []
    with TeacherClient(url) as client:
        vocabulary = client.info().vocab_size
        assert vocabulary is not None
        for _ in range(rounds + 2):
            ids = drawn(PREFIX_TOKENS + tokens, vocabulary)
            started = time.perf_counter()
            client.score(ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:], TOP_K)
            times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[2:]), vocabulary


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
    lines.append(
        f"| **bound to complete without teacher and student** | {result['overhead_ms']:.0f} | at most "
        f"{result['bounds']['overhead_ms']['at_most']} |"
    )
    lines.append(f"\nfirst request of the process: {json.dumps({k: round(v, 2) for k, v in result['first'].items()})}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
