"""From a worker's process to its first step: `python -m claas_worker run-request` on random weights of the real shapes.

    python tests/bench/cold_start.py                       Qwen2.5-Coder-3B's shapes on a GPU; 1,024 response tokens
    python tests/bench/cold_start.py --small --tokens 32   a model of two small layers, any machine

The model lies in /dev/shm, as it would in a page cache; the adapter is a folder. Runs the process several times: the
first has Python's own files cold. Prints a table for LOG.md with the parts that the worker's own log and timings give.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator")]
sys.path[:0] = PACKAGES

import torch  # noqa: E402
import yaml  # noqa: E402
from student_step import QWEN_3B  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from tokenizers.models import WordLevel  # noqa: E402
from tokenizers.pre_tokenizers import Whitespace  # noqa: E402
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM  # noqa: E402

from claas_crds.adapter import Lora  # noqa: E402
from claas_store.create import create_adapter  # noqa: E402

BASE = "random"
SMALL = {**QWEN_3B, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 1000}
TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }} {{ message['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="a model of two small layers")
    parser.add_argument("--tokens", type=int, default=1024, help="of the response")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        scratch = Path(folder)
        model = write_model(scratch / "model", SMALL if options.small else QWEN_3B)
        os.environ["CLAAS_FILE_ROOTS"] = str(scratch)
        uri = create_adapter(f"file://{scratch}/adapter/", BASE, model, Lora(), "0b6c7d6e").uri
        request = scratch / "request.yaml"
        request.write_text(yaml.safe_dump(manifest(uri, options.tokens)))
        print(f"\n{machine()}; {options.tokens} response tokens, mode Self\n")
        print("| process | whole, s | to the model loaded, s | of it load, s | step's own timings, ms |")
        print("|---|---|---|---|---|")
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
    loaded, load_seconds, log = 0.0, 0.0, []
    for line in process.stderr:
        log.append(line)
        if '"model loaded"' in line:
            loaded, load_seconds = time.monotonic() - started, json.loads(line)["seconds"]
    answer = process.stdout.read()
    if process.wait():
        sys.exit(f"{''.join(log)[-4000:]}{answer}")
    whole = time.monotonic() - started
    timings = json.loads(answer)["timings"]
    return f"| {number + 1} | {whole:.2f} | {loaded:.2f} | {load_seconds:.2f} | {json.dumps(timings)} |"


def manifest(uri: str, tokens: int) -> dict[str, Any]:
    """A request whose teacher is the student itself, so that no other process is waited for."""
    sample = {
        "prompt": "w1 w2 w3",
        "responseTokenIds": [10 + number % 900 for number in range(tokens)],
        "finishReason": "length",
        "feedback": "w4 w5",
    }
    return {
        "apiVersion": "claas.dev/v1alpha1",
        "kind": "DistillRequest",
        "metadata": {"name": "cold", "namespace": "team"},
        "spec": {"loraUri": uri, "samples": [sample], "teacher": {"mode": "Self", "contrast": 0}},
    }


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """Random weights in bf16 and a tokenizer of words."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    words = {f"w{number}": number for number in range(shape["vocab_size"] - 4)}
    for word in ("user", "assistant", "<end>", "<unk>"):
        words[word] = len(words)
    bare = Tokenizer(WordLevel(words, unk_token="<unk>"))
    bare.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, eos_token="<end>", unk_token="<unk>")
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
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
