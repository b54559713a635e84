"""Scoring by frames against the same server's plain prefill and against stock JSON, interleaved in one run.

    python tests/bench/teacher_scoring.py                    a 32B of random weights on a GPU (config only, dummy load)
    python tests/bench/teacher_scoring.py --a100             the same within the memory of an A100-80GB: at most 74 GiB
    python tests/bench/teacher_scoring.py --model DIR --shapes 1x64,4x128 --rounds 3     a real model, any machine
    what follows -- goes to vLLM

Each number is the median over rounds of the time from a client's call to numpy arrays in hand (JSON: to what
`json.loads` gives); every call has ids of its own, so no prefix cache helps. Prints a table for LOG.md. Needs numpy,
httpx, torch, vLLM and this repository; where the distribution is not installed, its entry point is made for the server.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator")]
sys.path[:0] = PACKAGES

import httpx  # noqa: E402
import numpy as np  # noqa: E402

from claas_teacher.client import TeacherClient  # noqa: E402
from claas_teacher.defaults import MAX_NUM_SEQS  # noqa: E402
from claas_teacher.memory import GIB, gpu_memory_utilization  # noqa: E402

K = 100
START_LIMIT_SECONDS = 560
A100_BYTES = int(79.25 * GIB)
A100_LIMIT_BYTES = 74 * GIB
PREFILL_BOUND, STOCK_BOUND = 1.15, 9.0
QWEN_32B = {
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "initializer_range": 0.02,
    "max_position_embeddings": 32768,
    "num_attention_heads": 40,
    "num_hidden_layers": 64,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_sliding_window": False,
    "vocab_size": 152064,
    "bos_token_id": 0,
    "eos_token_id": 1,
}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's folder; without it, random 32B shapes")
    parser.add_argument("--shapes", default="1x256,1x1024,8x1024", help="BATCHxTOKENS, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stock-rounds", type=int, default=3, help="stock JSON takes ten seconds a call")
    parser.add_argument("--a100", action="store_true", help="use no more of the card than an A100-80GB would have")
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    parser.add_argument("flags", nargs="*", help="vLLM's, after --")
    options = parser.parse_args()
    shapes = [(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in options.shapes.split(","))]
    with tempfile.TemporaryDirectory() as scratch:
        flags = list(options.flags)
        model = options.model
        if model is None:
            model = random_model(Path(scratch))
            flags = ["--load-format=dummy", "--max-model-len=8192", *flags]
        if options.a100:
            share = (
                gpu_memory_utilization(A100_BYTES, 2048, MAX_NUM_SEQS, QWEN_32B["vocab_size"], K)
                * A100_BYTES
                / card_bytes()
            )
            flags.append(f"--gpu-memory-utilization={share:.4f}")
        with (
            server(model, flags, Path(scratch), options.log or Path(scratch) / "log") as url,
            TeacherClient(url, in_flight_tokens=1 << 20) as client,
        ):
            info = client.info()
            if not info.frames:
                sys.exit("the teacher has no route for frames")
            print(f"\n{machine()}; vLLM {info.vllm_version}; {' '.join(flags)}\n")
            print("| tokens | plain prefill, ms | frames, ms | x prefill | JSON, ms | JSON / frames |")
            print("|---|---|---|---|---|---|")
            met = True
            for batch, tokens in shapes:
                met &= measure(client, url, batch, tokens, options.rounds, options.stock_rounds)
            used = used_bytes()
        if used is not None:
            print(f"\nmemory of the card in use at the end: {used / GIB:.1f} GiB")
            met &= not options.a100 or used <= A100_LIMIT_BYTES
    if options.model is None and not met:
        sys.exit("a bound is missed")


def measure(client: TeacherClient, url: str, batch: int, tokens: int, rounds: int, stock_rounds: int) -> bool:
    """One row; whether both bounds are met."""
    rng = np.random.default_rng(batch * tokens)
    info = client.info()
    assert info.vocab_size is not None

    def ids() -> list[list[int]]:
        return rng.integers(10, info.vocab_size, (batch, tokens)).tolist()  # type: ignore[no-any-return]

    with httpx.Client(base_url=url, timeout=300) as http:

        def complete(**more: int) -> object:
            body = {"model": info.model, "prompt": ids(), "max_tokens": 1, "temperature": 0, **more}
            answer = http.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()

        def prefill() -> object:
            return complete()

        def stock() -> object:
            return complete(prompt_logprobs=K)

        def frames() -> object:
            return client.score_batch([(row[:1], row[1:]) for row in ids()], K)

        times: dict[Callable[[], object], list[float]] = {prefill: [], frames: [], stock: []}
        for number in range(rounds + 1):  # the first round warms up
            for call, spent in times.items():
                if call is stock and number > stock_rounds:
                    continue
                started = time.perf_counter()
                call()
                if number:
                    spent.append(1000 * (time.perf_counter() - started))
    plain, ours, theirs = (statistics.median(times[call]) for call in (prefill, frames, stock))
    spread = " / ".join(f"{min(times[call]):.1f}-{max(times[call]):.1f}" for call in (prefill, frames, stock))
    row = f"| {batch} x {tokens} | {plain:.1f} | {ours:.1f} | {ours / plain:.3f} | {theirs:.0f} | {theirs / ours:.1f} |"
    print(f"{row}  <!-- {spread} -->", flush=True)
    return ours <= PREFILL_BOUND * plain and theirs >= STOCK_BOUND * ours


@contextmanager
def server(model: Path, flags: list[str], scratch: Path, log: Path) -> Iterator[str]:
    """`python -m claas_teacher` on `model`, ready; its log's end where it fails."""
    port = 18000
    metadata = scratch / "site" / "claas-0.0.0.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: claas\nVersion: 0.0.0\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.endpoint_plugins]\nclaas = claas_teacher.plugin:endpoint_plugin\n"
    )
    found = [*PACKAGES, str(metadata.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, found)), "CLAAS_CACHE_DIR": str(scratch)}
    command = [sys.executable, "-m", "claas_teacher", str(model), "--host=127.0.0.1", f"--port={port}", *flags]
    started = time.monotonic()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, start_new_session=True)
    try:
        while True:
            if process.poll() is not None or time.monotonic() - started > START_LIMIT_SECONDS:
                sys.exit("\n".join(log.read_text(errors="replace").splitlines()[-60:]))
            try:
                if httpx.get(f"http://127.0.0.1:{port}/claas/v1/ready", timeout=5).status_code == httpx.codes.OK:
                    break
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        print(f"ready after {time.monotonic() - started:.0f} s")
        yield f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def random_model(folder: Path) -> Path:
    """A config of Qwen2.5-32B's shapes, and a tokenizer with a word for every id (stock JSON decodes each of them)."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    model = folder / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(QWEN_32B))
    words = {f" word{number}": number for number in range(int(str(QWEN_32B["vocab_size"])))}
    Tokenizer(WordLevel(words, unk_token=" word0")).save(str(model / "tokenizer.json"))
    (model / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
    return model


def machine() -> str:
    """The card, or the processor."""
    asked = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=name --format=csv,noheader"], capture_output=True, text=True, check=False
    )
    return asked.stdout.strip() or f"{platform.machine()}, {os.cpu_count()} cores"


def card_bytes() -> int:
    """The card's whole memory."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


def used_bytes() -> int | None:
    """Memory in use on the card, by everybody; None without a card."""
    asked = subprocess.run(
        ["sh", "-c", "nvidia-smi --query-gpu=memory.used --format=csv,noheader,nounits"],
        capture_output=True,
        text=True,
        check=False,
    )
    return int(asked.stdout.split()[0]) << 20 if asked.stdout.strip() else None


if __name__ == "__main__":
    main()
