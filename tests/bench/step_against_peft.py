"""The training step on SmolLM2 against plain PEFT doing the same arithmetic, interleaved in one run: a line for LOG.md.

Ours is a whole request in mode Self; what is timed of it is its `stepMs`: optimizer state in, forward, loss, backward,
clipping, AdamW, weights out, update norm. Plain PEFT is a wrapped model and torch's AdamW that stay in memory: forward,
the same chunked loss (or, `--loss naive`, the divergence of full logits traced by autograd), backward, clipping, step.

    python tests/bench/step_against_peft.py --out build/peft.json     two cores, this repository's environment; a minute
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

# As production sets it, before torch is there: where the cores are shared, threads that spin make every time worthless.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
sys.path.insert(0, str(Path(__file__).parents[1]))

import peft
import record
import torch
import transformers

import models
from claas_crds.adapter import Lora
from claas_crds.request import DistillRequestSpec, Parent, Sample
from claas_store.create import create_adapter
from claas_store.version import read_version
from claas_worker.job import Job
from claas_worker.render import Limits, render
from claas_worker.score import Question, Scorer
from claas_worker.sdpo import sdpo_loss_from_hidden
from claas_worker.step import TrainingStep
from claas_worker.student import Context, Student

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TEXT = "The quick brown fox jumps over the lazy dog, and then it sleeps under a tree until the next morning. "


def main() -> None:
    """Runs the rounds and prints the line."""
    parser = record.parser(__doc__)
    parser.add_argument("--tokens", type=int, default=128, help="of prompt and response together")
    parser.add_argument("--rounds", type=int, default=9, help="timed ones, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--loss", choices=["chunked", "naive"], default="chunked", help="of plain PEFT")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CLAAS_FILE_ROOTS"] = folder
        result = compare(arguments, folder)
    record.write(arguments.out, result)
    print(line(result))


def compare(arguments: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Both sides in turn, on the same weights and tokens."""
    student = Student.load(models.smollm2_dir(), base_model=BASE_MODEL, device="cpu", threads=arguments.threads)
    model = transformers.AutoModelForCausalLM.from_pretrained(models.smollm2_dir(), dtype=torch.float32).eval()
    uri = create_adapter(f"file://{folder}/a/", BASE_MODEL, models.smollm2_dir(), Lora(r=arguments.rank), "seed").uri
    sample = {"prompt": "Tell me a story.", "feedback": "Shorter.", "finishReason": "length"}
    prefix = len(render(Sample(**sample, response="x"), student.tokenizer, Limits(1024, 512)).prefix_student_ids)
    sample["responseTokenIds"] = student.tokenizer.encode(TEXT * 20)[: arguments.tokens - prefix]
    step = TrainingStep(student, Scorer(student, None), Limits(1024, 1024))

    def ours() -> float:
        nonlocal uri
        spec = DistillRequestSpec.model_validate({"loraUri": uri, "samples": [sample], "teacher": {"mode": "Self"}})
        parent = Parent(uri=uri, adapter_uid="a")
        result = step(
            Job(str(uuid.uuid4()), "dr", "bench", "2026-01-01T00:00:00Z", 1, parent, spec), lambda phase: None
        )
        assert result.outcome == "Succeeded" and result.timings is not None and result.timings.step_ms is not None
        uri = result.lora_uri
        return result.timings.step_ms / 1000

    theirs = plain_peft(student, model, uri, sample, arguments.loss)
    ours()
    theirs()
    pairs = [(ours(), theirs()) for _ in range(arguments.rounds)]
    (ours_ms, plain_ms) = ([round(1000 * one, 1) for one in times] for times in zip(*pairs, strict=True))
    case = {
        "case": f"{arguments.tokens} tokens, {arguments.loss} loss",
        "adapters": 1,
        "ms": statistics.median(ours_ms),
        "all_ms": ours_ms,
        "plain_ms": statistics.median(plain_ms),
        "plain_all_ms": plain_ms,
        "step_of_plain": statistics.median(one / other for one, other in pairs),
        "step_of_plain_all": [one / other for one, other in pairs],
    }
    return record.circumstances("step_against_peft", "torch", "transformers", "peft") | {
        "bounds": record.bounds("step_against_peft"),
        "rank": arguments.rank,
        "threads": arguments.threads,
        "cases": [case],
    }


def line(result: dict[str, Any]) -> str:
    """For LOG.md."""
    (case,) = result["cases"]
    ratios, packages = case["step_of_plain_all"], result["packages"]
    return (
        f"{result['at'][:10]} step_against_peft: SmolLM2-135M fp32, {case['case']}, r {result['rank']} on all linear "
        f"layers, {result['threads']} threads: step {case['ms'] / 1000:.3f} s, plain PEFT "
        f"{case['plain_ms'] / 1000:.3f} s (medians of {len(ratios)}, interleaved); ratio, median of pairs "
        f"{case['step_of_plain']:.3f} ({min(ratios):.3f} to {max(ratios):.3f}), bound "
        f"{result['bounds']['step_of_plain']['at_most']}; torch {packages['torch']}, peft {packages['peft']}; load "
        f"average {result['load_average'][0]:.1f} on {result['cpus']} cores"
    )


def plain_peft(
    student: Student, model: torch.nn.Module, uri: str, sample: dict[str, Any], loss: str
) -> Callable[[], float]:
    """Seconds of a step by PEFT and torch alone."""
    adapted = peft.PeftModel.from_pretrained(model, uri.removeprefix("file://"), is_trainable=True)
    head = model.get_output_embeddings().weight
    parameters = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, weight_decay=0.01)
    rendered = render(Sample(**sample), student.tokenizer, Limits(1024, 1024))
    context = Context(rendered.prefix_student_ids, rendered.response_ids)
    question = Question(context, Context(rendered.prefix_teacher_ids, rendered.response_ids))
    version = read_version(uri)
    adapter = student.bank.add(uri, version.config, version.tensors)
    (scored,) = Scorer(student, None).self([question], [adapter], [100], [0.0])
    student.bank.remove(uri)
    ids = torch.tensor([[*context.prefix_ids, *context.response_ids][:-1]])
    response = torch.tensor(rendered.response_ids)

    def run() -> float:
        started = perf_counter()
        states = adapted.base_model.model.model(input_ids=ids, use_cache=False).last_hidden_state
        hidden = states[0, len(context.prefix_ids) - 1 :]
        if loss == "chunked":
            value, _ = sdpo_loss_from_hidden(hidden, head, response, scored.support_ids, scored.logprobs)
        else:
            value = naive_loss(hidden @ head.T, response, scored.support_ids, scored.logprobs)
        value.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return perf_counter() - started

    return run


def naive_loss(logits: torch.Tensor, response: torch.Tensor, ids: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    """-A log p(y) and the Jensen-Shannon divergence on support and tail, at the defaults, as one would write it."""
    log_p = logits.log_softmax(-1)
    p, q = log_p.gather(1, ids).exp(), log_q.exp()
    p = torch.cat([p, (1 - p.sum(-1, keepdim=True)).clamp_min(1e-6)], -1)
    q = torch.cat([q, (1 - q.sum(-1, keepdim=True)).clamp_min(1e-6)], -1)
    m = (p + q) / 2
    jsd = 0.5 * (p * (p / m).log() + q * (q / m).log()).sum(-1)
    found = ids == response[:, None]
    bucket = torch.cat([found, ~found.any(-1, keepdim=True)], -1).int().argmax(-1, keepdim=True)
    advantage = (m / p).log().gather(1, bucket).squeeze(1).detach()
    chosen = log_p.gather(1, response[:, None]).squeeze(1)
    return (0.5 * jsd - advantage * (chosen - chosen.detach()).exp()).mean()


if __name__ == "__main__":
    main()
