"""From a worker's process to its first step, on random weights of the real shapes.

    python tests/bench/cold_start.py                       Qwen2.5-Coder-3B's shapes on a GPU; 1,024 response tokens
    python tests/bench/cold_start.py --agent               the agent with its engine, against a real API server
    python tests/bench/cold_start.py --small --tokens 32   a model of two small layers, any machine

Without --agent the process is `run-request`. The agent finds a request that is bound to it; its first process fills the
compile cache that the others read. The model lies in /dev/shm, as it would in a page cache; the adapter is a folder.
Runs the process several times: the first has Python's own files cold. Prints a table for LOG.md with the parts that the
worker's own log and timings give. The worker's image holds compiled bytecode of all it imports; where an installation
does not, PYTHONPYCACHEPREFIX=DIR gives it a place (and the first process writes it).
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
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator")]
sys.path[:0] = PACKAGES

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
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of two small layers")
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokenizer", type=Path, help="a folder's (python tests/models.py qwen); else one of bytes")
    parser.add_argument("--agent", action="store_true", help="the agent instead of run-request")
    parser.add_argument("--kube", type=Path, help="a folder with the program `kube`, on a machine that cannot build it")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model", SMALL if options.small else QWEN_3B, options.tokenizer)
        os.environ["CLAAS_FILE_ROOTS"] = str(scratch)
        uri = create_adapter(f"file://{scratch}/adapter/", BASE, model, Lora(), "0b6c7d6e").uri
        request = scratch / "request.yaml"
        request.write_text(yaml.safe_dump(manifest(uri, options.tokens)))
        print(f"\n{machine()}; {options.tokens} response tokens, mode Provided\n")
        if options.agent:
            return run_agents(scratch, model, manifest(uri, options.tokens)["spec"], options)
        print(
            "| process | to its result, s | to its exit | to the model loaded | `load_step` | its imports | step, ms |"
        )
        print("|---|---|---|---|---|---|---|")
        for number in range(options.rounds):
            print(row(number, model, request, scratch / f"out-{number}"), flush=True)


def row(number: int, model: Path, request: Path, out: Path) -> str:
    """One process from start to exit, as a row."""
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
    timings = status["timings"]
    times = (answered, whole, loaded["reached"], loaded["seconds"], loaded.get("imports", 0.0))
    return " | ".join([f"| {number + 1}", *(f"{seconds:.2f}" for seconds in times), f"{json.dumps(timings)} |"])


def run_agents(scratch: Path, model: Path, spec: dict[str, Any], options: argparse.Namespace) -> None:
    """A row for each of several agents, one after another, with a request that waits for it."""
    sys.path.append(str(ROOT / "tests"))
    from cluster import programs
    from cluster.controlplane import ControlPlane
    from operatorstage import apply_crds
    from workerstage import REAL, WorkerStage

    if options.kube is not None:
        programs.ensure_kube = lambda: options.kube
    print("| process | ready, s | result reported, s | `load_step` | its imports | step, ms |")
    print("|---|---|---|---|---|---|")
    (scratch / "compiled").mkdir()
    told = {"MODEL_PATH": model, "BASE_MODEL": BASE, "FILE_ROOTS": scratch, "COMPILE_CACHE": scratch / "compiled"}
    with ControlPlane(scratch / "plane") as control_plane:
        apply_crds(control_plane)
        for number in range(options.rounds):
            (scratch / str(number)).mkdir()
            with WorkerStage(control_plane, scratch / str(number), "cold") as stage:
                name = stage.bound(**spec)
                started = datetime.now(UTC)
                stage.start(REAL, THREADS="0", **{key: str(value) for key, value in told.items()})
                result = stage.wait_result(name, 180)
                if result["outcome"] != "Succeeded":
                    sys.exit(f"no step: {result}")
                stage.wait("its log", lambda stage=stage: lines(stage, "reported"))
                (loaded,), (ready,), (reported,) = (
                    lines(stage, what) for what in ("model loaded", "ready", "reported")
                )
                at = [(datetime.fromisoformat(line["at"]) - started).total_seconds() for line in (ready, reported)]
                seconds = (*at, loaded["seconds"], loaded["imports"])
                row = " | ".join(f"{one:.2f}" for one in seconds)
                print(f"| {number + 1} | {row} | {json.dumps(result['timings'])} |", flush=True)
                if not number and loaded["device"] != "cpu":  # loss and graphs
                    stage.wait("the engine", lambda stage=stage: len(lines(stage, "engine made ready")) == 2, 180)
                    stage.wait("its cache", lambda stage=stage: stage.lines()[-1]["message"] == "compile cache written")


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
        shutil.copytree(tokenizer, folder)
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM(Qwen2Config(**shape, dtype="bfloat16")).to(torch.bfloat16)
    model.save_pretrained(folder)
    return folder


def machine() -> str:
    """The card, or the processor."""
    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} processor cores"


if __name__ == "__main__":
    main()
