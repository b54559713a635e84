"""Scoring by frames against the same server's plain prefill and against stock JSON, interleaved in one run.

    python tests/bench/teacher_scoring.py                    a 32B of random weights on a GPU (config only, dummy load)
    python tests/bench/teacher_scoring.py --a100             the same within the memory of an A100-80GB: at most 74 GiB
    python tests/bench/teacher_scoring.py --model DIR --shapes 1x64,4x128 --rounds 3     a real model, any machine
    python tests/bench/teacher_scoring.py --url http://localhost:8000 --shapes 1x64      a teacher that runs already
    what follows -- goes to vLLM

Each number is the median over rounds of the time from a client's call to numpy arrays in hand (JSON: to what
`json.loads` gives); every call has ids of its own, so no prefix cache helps. Only the first call of frames and of JSON,
which is not timed, has the same ids: how far their logprobs are from each other is told, and bf16 rounds. Prints a
table for LOG.md, writes JSON with --out, and judges random 32B shapes by bounds.yaml. Needs numpy, httpx, torch, vLLM
and this repository; where the distribution is not installed, its entry point is made for the server. Minutes on a card.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = [str(ROOT / folder) for folder in ("crds", "worker", "teacher", "operator")]
sys.path[:0] = PACKAGES

import httpx  # noqa: E402
import numpy as np  # noqa: E402
import record  # noqa: E402

from claas_teacher.client import TeacherClient  # noqa: E402
from claas_teacher.defaults import MAX_NUM_SEQS  # noqa: E402
from claas_teacher.memory import GIB, gpu_memory_utilization  # noqa: E402
from claas_teacher.scores import Scores, from_prompt_logprobs  # noqa: E402

K = 100
START_LIMIT_SECONDS = 560
A100_BYTES = int(79.25 * GIB)
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
    """Measure, print, and keep."""
    parser = record.parser(__doc__)
    parser.add_argument("--model", type=Path, help="a model's folder; without it, random 32B shapes")
    parser.add_argument("--url", help="of a teacher that runs, instead of one that is started")
    parser.add_argument("--shapes", default="1x256,1x1024,8x1024", help="BATCHxTOKENS, comma-separated")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--stock-rounds", type=int, default=3, help="stock JSON takes ten seconds a call")
    parser.add_argument("--a100", action="store_true", help="use no more of the card than an A100-80GB would have")
    parser.add_argument("--log", type=Path, help="where the server's log is kept")
    parser.add_argument("flags", nargs="*", help="vLLM's, after --")
    options = parser.parse_args()
    shapes = [(int(batch), int(tokens)) for batch, tokens in (shape.split("x") for shape in options.shapes.split(","))]
    random = options.model is None and options.url is None
    flags = ["--load-format=dummy", "--max-model-len=8192", *options.flags] if random else list(options.flags)
    if options.a100:
        share = gpu_memory_utilization(A100_BYTES, 2048, MAX_NUM_SEQS, QWEN_32B["vocab_size"], K)
        flags.append(f"--gpu-memory-utilization={share * A100_BYTES / card_bytes():.4f}")
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        scratch = Path(folder)
        url = options.url or stack.enter_context(
            server(options.model or random_model(scratch), flags, scratch, options.log or scratch / "log")
        )
        client = stack.enter_context(TeacherClient(url, in_flight_tokens=1 << 20))
        info = client.info()
        if not info.frames:
            sys.exit("the teacher has no route for frames")
        limits = dict(record.bounds("teacher_scoring"))
        if not options.a100:
            del limits["card_used_gib"]
        result = record.circumstances("teacher_scoring") | {
            "bounds": limits,
            "vllm": info.vllm_version,
            "model": "random weights of Qwen2.5-32B's shapes" if random else Path(info.model).name,
            "flags": flags,
            "cases": [],
        }
        print(f"\n{result['machine']}; vLLM {info.vllm_version}; {' '.join(flags)}\n")
        print("| tokens | plain prefill, ms | frames, ms | x prefill | JSON, ms | JSON / frames |")
        print("|---|---|---|---|---|---|")
        for batch, tokens in shapes:
            result["cases"].append(measure(client, url, batch, tokens, options.rounds, options.stock_rounds))
            print(row(result["cases"][-1]), flush=True)
            record.write(options.out, result)
        used = record.used_bytes()
        if used is not None:
            result["card_used_gib"] = round(used / GIB, 2)
            print(f"\nmemory of the card in use at the end: {used / GIB:.1f} GiB")
            record.write(options.out, result)
    if random:
        judged = [one for case in result["cases"] for one in record.judged(case["case"], [case], limits)]
        judged += record.judged("the card", [result], limits)
        print("\n".join(map(str, judged)))
        if not all(one.holds for one in judged):
            sys.exit("a bound is missed")


def measure(client: TeacherClient, url: str, batch: int, tokens: int, rounds: int, stock_rounds: int) -> dict[str, Any]:
    """One case: times of the three, and how far frames and JSON are from each other."""
    rng = np.random.default_rng(batch * tokens)
    info = client.info()
    assert info.vocab_size is not None

    with httpx.Client(base_url=url, timeout=300, trust_env=False) as http:

        def complete(ids: list[list[int]], **more: int) -> Any:
            body = {"model": info.model, "prompt": ids, "max_tokens": 1, "temperature": 0, **more}
            answer = http.post("/v1/completions", json=body)
            answer.raise_for_status()
            return answer.json()

        def prefill(ids: list[list[int]]) -> Any:
            return complete(ids)

        def stock(ids: list[list[int]]) -> Any:
            return complete(ids, prompt_logprobs=K)

        def frames(ids: list[list[int]]) -> list[Scores]:
            return client.score_batch([(row[:1], row[1:]) for row in ids], K)

        def ids() -> list[list[int]]:
            return rng.integers(10, info.vocab_size, (batch, tokens)).tolist()  # type: ignore[no-any-return]

        same = ids()  # this round warms up
        prefill(ids())
        difference = largest_difference(frames(same), stock(same)["choices"], same)
        times: dict[Callable[[list[list[int]]], Any], list[float]] = {prefill: [], frames: [], stock: []}
        for number in range(rounds):
            for call, spent in times.items():
                if call is stock and number >= stock_rounds:
                    continue
                asked = ids()
                started = time.perf_counter()
                call(asked)
                spent.append(1000 * (time.perf_counter() - started))
    plain, ours, theirs = (statistics.median(times[call]) for call in (prefill, frames, stock))
    return {
        "case": f"{batch}x{tokens}",
        "prefill_ms": plain,
        "prefill_all_ms": times[prefill],
        "frames_ms": ours,
        "frames_all_ms": times[frames],
        "json_ms": theirs,
        "json_all_ms": times[stock],
        "frames_of_prefill": ours / plain,
        "json_of_frames": theirs / ours,
        "largest_logprob_difference": difference,
    }


def largest_difference(frames: Sequence[Scores], choices: Sequence[Any], ids: Sequence[Sequence[int]]) -> float:
    """Between the logprobs of one and the other, of the response tokens and of the K most likely by rank."""
    differences = []
    for ours, choice, one in zip(frames, choices, ids, strict=True):
        theirs = from_prompt_logprobs(choice["prompt_logprobs"], 1, np.asarray(one[1:]), K)
        differences.append(np.abs(ours.chosen - theirs.chosen).max())
        differences.append(np.abs(ours.logprobs[:, :K] - theirs.logprobs[:, :K]).max())
    return float(np.max(differences))


def row(case: dict[str, Any]) -> str:
    """Of the table."""
    spread = " / ".join(
        f"{min(case[name]):.1f}-{max(case[name]):.1f}" for name in ("prefill_all_ms", "frames_all_ms", "json_all_ms")
    )
    return (
        f"| {case['case']} | {case['prefill_ms']:.1f} | {case['frames_ms']:.1f} | {case['frames_of_prefill']:.3f} "
        f"| {case['json_ms']:.0f} | {case['json_of_frames']:.1f} |  <!-- {spread} -->"
    )


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


def card_bytes() -> int:
    """The card's whole memory."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory)


if __name__ == "__main__":
    main()
