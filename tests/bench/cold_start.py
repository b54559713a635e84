"""From a worker's process to its first step, on random weights of the real shapes; plain PEFT's beside it.

    python tests/bench/cold_start.py                       Qwen2.5-Coder-3B's shapes on a GPU; 1,024 response tokens
    python tests/bench/cold_start.py --agent               the agent with its engine, against a real API server
    python tests/bench/cold_start.py --small --tokens 32   a model of two small layers, any machine

Without --agent the process is `run-request`. The agent finds a request that is bound to it; its first process fills the
compile cache that the others read. The model lies in /dev/shm, as it would in a page cache; the adapter is a folder.
Runs the process several times: the first has Python's own files cold. After each comes a process of plain transformers
and PEFT up to its first step on the same files (`plain_peft_process.py`; no service, no checks, no version). Prints a
table for LOG.md with the parts that the worker's own log and timings give, writes JSON with --out, and judges all but
the first by bounds.yaml: the first step is made when the result is there, less its save.

The worker's image holds compiled bytecode of all it imports; where an installation does not, PYTHONPYCACHEPREFIX=DIR
gives it a place (and the first process writes it). Needs torch, transformers, peft and this repository, --agent etcd
and an API server as well (built with Go the first time, or --kube). A minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator")]
sys.path[:0] = PACKAGES

import record  # noqa: E402
import torch  # noqa: E402
import yaml  # noqa: E402
from student_step import QWEN_3B  # noqa: E402
from tokenizers.pre_tokenizers import ByteLevel  # noqa: E402
from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen2Tokenizer  # noqa: E402

from claas_crds.adapter import Lora  # noqa: E402
from claas_store.create import create_adapter  # noqa: E402

BASE = "random"
SMALL = {**QWEN_3B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 151_936}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }}<|im_end|>{% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def main() -> None:
    """Measure, print, and keep."""
    parser = record.parser(__doc__)
    parser.add_argument("--small", action="store_true", help="a model of two small layers: correctness alone")
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a folder's (python tests/models.py qwen); else one of bytes")
    parser.add_argument("--agent", action="store_true", help="the agent instead of run-request")
    parser.add_argument("--kube", type=Path, help="a folder with the program `kube`, on a machine that cannot build it")
    options = parser.parse_args()
    limits = record.bounds("cold_start")
    result = record.circumstances("cold_start", "torch", "transformers", "peft") | {
        "bounds": limits,
        "process": "agent" if options.agent else "run-request",
        "shape": "small" if options.small else "Qwen2.5-Coder-3B",
        "tokens": options.tokens,
        "processes": [],
    }
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model", SMALL if options.small else QWEN_3B, options.tokenizer)
        os.environ["CLAAS_FILE_ROOTS"] = str(scratch)
        uri = create_adapter(f"file://{scratch}/adapter/", BASE, model, Lora(), "0b6c7d6e").uri
        asked = manifest(uri, options.tokens)
        print(f"\n{result['machine']}; {options.tokens} response tokens, mode Provided, {result['process']}\n")
        print(
            "| process | ready, s | result | first step | plain PEFT's | exit | model loaded | `load_step` "
            "| its imports | step, ms |"
        )
        print("|---|---|---|---|---|---|---|---|---|---|")
        make = agents if options.agent else requests
        for one in make(scratch, model, asked, options):
            one["plain"] = plain_peft(model, uri.removeprefix("file://"), options.tokens)
            result["processes"].append(one)
            print(row(len(result["processes"]), one), flush=True)
            record.write(options.out, result)
    if not options.small:
        judged = record.judged(f"{result['process']}, warm", result["processes"][1:], limits)
        print("\n".join(map(str, judged)))
        if not all(one.holds for one in judged):
            sys.exit("the bound is missed")


def row(number: int, one: dict[str, Any]) -> str:
    """Of the table; what a kind of process does not tell stays empty."""
    seconds = one | {"plain_seconds": one["plain"]["first_step_seconds"]}
    names = ("ready", "result", "first_step", "plain", "exit", "loaded", "load_step", "imports")
    times = [f"{seconds[f'{name}_seconds']:.2f}" if f"{name}_seconds" in seconds else "" for name in names]
    return " | ".join([f"| {number}", *times, f"{json.dumps(one['timings'])} |"])


def plain_peft(model: Path, adapter: str, tokens: int) -> dict[str, Any]:
    """The other side: seconds from the start of its process to its step, and what it says of them itself."""
    command = [sys.executable, str(Path(__file__).with_name("plain_peft_process.py")), str(model), adapter, str(tokens)]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        answer = process.stdout.readline()
        first = time.monotonic() - started
        _, log = process.communicate()
    if process.returncode:
        sys.exit(f"plain PEFT's process failed: {log[-4000:]}")
    return {"first_step_seconds": round(first, 3)} | json.loads(answer)


def requests(
    scratch: Path, model: Path, asked: dict[str, Any], options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """Each of several `run-request`, one after another."""
    request = scratch / "request.yaml"
    request.write_text(yaml.safe_dump(asked))
    for number in range(options.rounds):
        yield run_request(model, request, scratch / f"out-{number}")


def run_request(model: Path, request: Path, out: Path) -> dict[str, Any]:
    """One process from start to exit: seconds since its start, those of `load_step` and its imports, its timings."""
    command = [sys.executable, "-m", "claas_worker", "run-request", str(request), "--out-uri", f"file://{out}/"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [*PACKAGES, os.environ.get("PYTHONPATH", "")])),
        "CLAAS_MODEL_PATH": str(model),
        "CLAAS_BASE_MODEL": BASE,
    }
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None and process.stdout is not None
    log: list[str] = []
    loaded: dict[str, Any] = {}

    def read_log() -> None:
        for line in process.stderr:
            log.append(line)
            if '"model loaded"' in line:
                loaded.update(json.loads(line), reached=time.monotonic() - started)

    reader = threading.Thread(target=read_log)
    reader.start()
    answer = process.stdout.readline()
    answered = time.monotonic() - started
    answer += process.stdout.read()
    failed = process.wait()
    whole = time.monotonic() - started
    reader.join()
    if failed:
        sys.exit(f"{''.join(log)[-4000:]}{answer}")
    status = json.loads(answer)
    if status["result"]["outcome"] != "Succeeded":
        sys.exit(f"no step: {status}")
    return {
        "loaded_seconds": round(loaded["reached"], 3),
        "load_step_seconds": loaded["seconds"],
        "imports_seconds": loaded.get("imports", 0.0),
        "first_step_seconds": round(answered - status["timings"]["saveMs"] / 1000, 3),
        "result_seconds": round(answered, 3),
        "exit_seconds": round(whole, 3),
        "timings": status["timings"],
    }


def agents(scratch: Path, model: Path, asked: dict[str, Any], options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Each of several agents, one after another, with a request that waits for it."""
    sys.path.append(str(ROOT / "tests"))
    from cluster import programs
    from cluster.controlplane import ControlPlane
    from operatorstage import apply_crds
    from workerstage import REAL, WorkerStage

    if options.kube is not None:
        programs.ensure_kube = lambda: options.kube
    (scratch / "compiled").mkdir()
    told = {"MODEL_PATH": model, "BASE_MODEL": BASE, "FILE_ROOTS": scratch, "COMPILE_CACHE": scratch / "compiled"}
    with ControlPlane(scratch / "plane") as control_plane:
        apply_crds(control_plane)
        for number in range(options.rounds):
            (scratch / str(number)).mkdir()
            with WorkerStage(control_plane, scratch / str(number), "cold") as stage:
                name = stage.bound(**asked["spec"])
                started = datetime.now(UTC)
                stage.start(REAL, THREADS="0", **{key: str(value) for key, value in told.items()})
                result = stage.wait_result(name, 180)
                if result["outcome"] != "Succeeded":
                    sys.exit(f"no step: {result}")
                stage.wait("its log", lambda stage=stage: lines(stage, "reported"))
                (loaded,), (ready,), (reported,) = (
                    lines(stage, what) for what in ("model loaded", "ready", "reported")
                )
                at = {line["message"]: datetime.fromisoformat(line["at"]) for line in (loaded, ready, reported)}
                seconds = {message: (moment - started).total_seconds() for message, moment in at.items()}
                found = {
                    "loaded_seconds": seconds["model loaded"],
                    "load_step_seconds": loaded["seconds"],
                    "imports_seconds": loaded["imports"],
                    "ready_seconds": seconds["ready"],
                    "first_step_seconds": round(seconds["reported"] - result["timings"]["saveMs"] / 1000, 3),
                    "result_seconds": seconds["reported"],
                    "timings": result["timings"],
                }
                if not number and loaded["device"] != "cpu":  # loss and graphs
                    stage.wait("the engine", lambda stage=stage: len(lines(stage, "engine made ready")) == 2, 180)
                    stage.wait("its cache", lambda stage=stage: stage.lines()[-1]["message"] == "compile cache written")
            yield found


def lines(stage: Any, message: str) -> list[dict[str, Any]]:
    """Of the agent's log, those that say this."""
    return [line for line in stage.lines() if line["message"] == message]


def manifest(uri: str, tokens: int) -> dict[str, Any]:
    """A request with a teacher's logprobs in it: it learns, and waits for no other process."""
    sample = {
        "prompt": "Say something.",
        "responseTokenIds": [10 + number % 200 for number in range(tokens)],
        "teacherLogprobs": [-1 - number % 7 / 10 for number in range(tokens)],
        "finishReason": "length",
        "feedback": "Shorter.",
    }
    return {
        "apiVersion": "claas.dev/v1alpha1",
        "kind": "DistillRequest",
        "metadata": {"name": "cold", "namespace": "team"},
        "spec": {"loraUri": uri, "samples": [sample], "teacher": {"mode": "Provided"}},
    }


def write_model(folder: Path, shape: dict[str, Any], tokenizer: Path | None = None) -> Path:
    """Random weights in bf16, and a tokenizer: a folder's, or one with an id for every byte."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if tokenizer is None:
        bytes_alone = Qwen2Tokenizer(vocab={byte: i for i, byte in enumerate(sorted(ByteLevel.alphabet()))}, merges=[])
        bytes_alone.add_special_tokens({"eos_token": "<|im_end|>"})
        bytes_alone.chat_template = TEMPLATE
        bytes_alone.save_pretrained(folder)
    else:
        shutil.copytree(tokenizer, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
