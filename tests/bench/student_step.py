"""The product's training step on a GPU against plain PEFT doing the same arithmetic, interleaved in one run.

Ours is `TrainingStep.batch` with its own rendering, loss, guards and optimizer; only the store is left out (parents
come from memory and stay there), and the teacher is made up: random top-100, on which no time here depends.
What is timed of it is its training phase, from targets in hand to numbers in hand. Plain PEFT is a wrapped model with
autograd, the same loss on the same hidden states, clipping and torch's AdamW; several adapters are trained one by one.
Weights are random, of the real shapes. Loss and gradient of both sides are compared before anything is timed.

Two bf16 passes of one model differ by what bf16 rounds, PEFT's with itself in a batch of another shape as well; so
`--exact` asks how far either side is from an fp32 base's, over several adapters, and whether ours is as near as PEFT.
`--mixed N` trains N mixed requests over many adapters of several ranks and targets, then the requests of `--alone` of
them by themselves, and once more in plain torch, whose distance from the second way is what rounding does by itself.

`--smoke` runs a tiny model on the CPU: the same code, for correctness alone.

    python tests/bench/student_step.py --rounds 7 --out build/student.json     a GPU with 80 GB; minutes
    python tests/bench/student_step.py --smoke --rounds 1                      any machine

Needs torch, transformers, peft and this repository. Fails where our loss or gradient is not plain PEFT's.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import itertools
import json
import statistics
import sys
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parents[1]))

import numpy as np
import peft
import record
import torch
import transformers
from numpy.typing import NDArray

from claas_crds.reasons import Outcome, Reason
from claas_crds.request import DistillRequestSpec, Parent, Result
from claas_store.version import Manifest, Version
from claas_teacher.client import Scores, TeacherInfo
from claas_worker import logs
from claas_worker.engine import Engine
from claas_worker.job import Job
from claas_worker.render import Limits
from claas_worker.score import Scorer
from claas_worker.sdpo import sdpo_loss_from_hidden
from claas_worker.step import Attempt, TrainingStep
from claas_worker.student import Student

BASE_MODEL = "bench/random"
QWEN_3B = {
    "hidden_size": 2048,
    "intermediate_size": 11008,
    "num_hidden_layers": 36,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "vocab_size": 151_936,
    "max_position_embeddings": 32_768,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}
TINY = QWEN_3B | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = {"prompt": "Tell me a story.", "feedback": "Shorter.", "finishReason": "length"}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA, TOP_K = 16, 32, 100
KINDS: Sequence[tuple[int, Sequence[str]]] = (
    (16, TARGETS),
    (8, TARGETS),
    (4, TARGETS),
    (16, ["q_proj", "v_proj"]),
    (24, ["q_proj", "down_proj"]),
)  # of --mixed: rank and targets
TRIALS = 8  # adapters whose loss and gradient are compared, with --exact
GIB = 2**30


class Case(NamedTuple):
    """So many adapters, each with so many samples of so many tokens that the model is shown."""

    adapters: int
    samples: int
    tokens: int
    target: float  # least speed-up over plain PEFT that is asked for; 0: none
    goal_ms: float | None = None  # of a step, beyond that

    @property
    def name(self) -> str:
        """As in the tables."""
        return f"{self.adapters * self.samples}x{self.tokens}" + (
            f" ({self.adapters} adapters)" if self.adapters > 1 else ""
        )


CASES = (
    Case(1, 1, 256, 10, 12),
    Case(1, 1, 1024, 5, 25),
    Case(8, 1, 128, 0),
    Case(32, 1, 128, 45, 96),
    Case(1, 8, 1024, 2.2, 180),
)
SMOKE = (Case(1, 1, 80, 0), Case(3, 1, 70, 0), Case(1, 2, 90, 0))


class MadeUpTeacher:
    """Answers at once, with random logprobs that depend on the response alone."""

    timeout_s = 60.0

    def __init__(self, fingerprint: str, vocabulary: int) -> None:
        self._fingerprint, self._vocabulary = fingerprint, vocabulary

    def info(self, **_: Any) -> TeacherInfo:
        """Of the student's tokenizer."""
        return TeacherInfo("made-up", self._fingerprint, self._vocabulary, TOP_K, None)

    def score_batch(self, asked: Sequence[tuple[Sequence[int], Sequence[int]]], k: int, **_: Any) -> list[Scores]:
        """(N, K) ids and logprobs of each response; the response token is the first."""
        return [self._score(response, k) for _, response in asked]

    def _score(self, response: Sequence[int], k: int) -> Scores:
        random = np.random.default_rng(sum(response))
        ids = random.integers(0, self._vocabulary, (len(response), k), dtype=np.int64)
        ids[:, 0] = response
        logits = random.normal(size=(len(response), k + 1)).astype(np.float32)
        logprobs = (logits - np.log(np.exp(logits).sum(-1, keepdims=True)))[:, :k]
        tail = 1 - np.exp(logprobs).sum(-1)
        return Scores(ids.astype(np.int32), logprobs, logprobs[:, 0].copy(), tail)


class StepWithoutStore(TrainingStep):
    """The step; its versions live in memory, and its training phase is timed."""

    def __init__(
        self, student: Student, scorer: Scorer, limits: Limits, seeds: dict[str, dict[str, NDArray[Any]]]
    ) -> None:
        super().__init__(student, scorer, limits)
        self.seeds = seeds
        self.kinds: dict[str, tuple[int, Sequence[str]]] = {}  # rank and targets, of adapters that are not as usual
        self.seconds = 0.0
        self.profile: Callable[[], Any] | None = None

    def _read(self, attempt: Attempt) -> None:
        uri = attempt.job.parent.uri
        assert attempt.job.spec.samples is not None
        attempt.samples = attempt.job.spec.samples
        tensors = {} if attempt.resident else self.seeds[uri]
        config = adapter_config(*self.kinds.get(uri.rpartition("+")[0], ()))
        attempt.parent = Version(uri, Manifest(base_model=BASE_MODEL), "", config, tensors, None)

    def _save(self, attempt: Attempt) -> None:
        uri = f"{attempt.job.parent.uri.rpartition('+')[0]}+{uuid.uuid4().hex}/"
        attempt.stands_for = uri
        attempt.succeed(Outcome.SUCCEEDED, Reason.SUCCEEDED, uri)

    def _train(self, attempts: Sequence[Attempt]) -> None:
        engine = self._student.engine
        with engine.lock if engine else contextlib.nullcontext():  # the device may not be waited for in a capture
            synchronize()
            started = perf_counter()
            super()._train(attempts)
            synchronize()
            self.seconds = perf_counter() - started


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed ones, after those that are not")
    parser.add_argument("--tokenizer", type=Path, default=None, help="folder (default: Qwen's, from the tests' cache)")
    parser.add_argument("--compile-cache", type=Path, default=None, help="folder, as the worker's flag")
    parser.add_argument("--cases", help="comma-separated indices of the cases, or nothing (default: all)")
    parser.add_argument("--memory-gib", type=float, default=44.0, help="what our side may take: an L40S's")
    parser.add_argument("--mixed", type=int, default=0, help="so many mixed requests, after the cases")
    parser.add_argument("--adapters", type=int, default=12, help="of --mixed")
    parser.add_argument("--alone", type=int, default=10, help="of these, so many are trained alone too, of every kind")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU: correctness alone")
    parser.add_argument("--no-plain", action="store_true", help="leave plain PEFT's times out (equality stays)")
    parser.add_argument("--exact", action="store_true", help="gradients against fp32 too, and PEFT against itself")
    parser.add_argument("--profile", action="store_true", help="kernels by group, of each case (GPU)")
    arguments = parser.parse_args()
    logs.configure()
    results = run(arguments)
    record.write(arguments.out, results)
    print(table(results))
    if failed := [one["case"] for one in results["cases"] if not one["equal"]]:
        sys.exit(f"not equal to plain PEFT: {failed}")


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases on one model."""
    device = "cpu" if arguments.smoke else "cuda"
    cases: tuple[Case, ...] = SMOKE if arguments.smoke else CASES
    if arguments.cases is not None:
        cases = tuple(cases[int(index)] for index in arguments.cases.split(",") if index)
    started = perf_counter()
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer or qwen_tokenizer())
    model, plain_model = random_models(TINY if arguments.smoke else QWEN_3B, device)
    note(f"models made in {perf_counter() - started:.1f} s")
    student = Student(model, tokenizer, base_model=BASE_MODEL, resident_bytes=40 * GIB)
    student.start_engine(arguments.compile_cache)
    assert student.engine is not None
    share_weights(model, plain_model)
    results = record.circumstances("student_step", "torch", "transformers", "peft") | {"cases": []}
    plain = PlainPeft(plain_model, student)
    for case in cases:
        results["cases"].append(measure(case, student, plain, arguments))
        note(json.dumps(results["cases"][-1]))
        record.write(arguments.out, results)
    if arguments.mixed:
        results["mixed"] = mixed(student, arguments.mixed, arguments.adapters, arguments.alone, arguments.memory_gib)
        note(json.dumps(results["mixed"]))
    return results


def mixed(student: Student, requests: int, adapters: int, sample: int, memory_gib: float) -> dict[str, Any]:
    """Requests of 24 to 700 tokens and 1 to 3 samples, in batches of 1 to 6; what became of base, adapters, memory."""
    random = np.random.default_rng(0)
    engine, cuda = student.engine, student.device.type == "cuda"
    assert engine is not None
    longest = 700 if cuda else 60
    limit_memory(memory_gib)
    kinds = {f"s3://bench/mixed/{number}": KINDS[number % len(KINDS)] for number in range(adapters)}
    seeds = {f"{name}+0/": seed_tensors(student, n, *kind) for n, (name, kind) in enumerate(kinds.items())}
    first = list(seeds)
    teacher = MadeUpTeacher(student.fingerprint, student.head.shape[0])
    step = StepWithoutStore(student, Scorer(student, teacher), Limits(4096, 4096), seeds)  # type: ignore[arg-type]
    step.kinds = kinds
    before = [one.detach().cpu().clone() for one in student.model.parameters()]

    def samples() -> list[dict[str, Any]]:
        count = int(random.integers(1, 4))
        ids = [random.integers(0, 150_000, int(random.integers(24, longest))).tolist() for _ in range(count)]
        return [PROMPT | {"responseTokenIds": one} for one in ids]

    def run(heads: list[str], batch: list[tuple[int, list[dict[str, Any]]]]) -> None:
        outcomes = step.batch([(job(heads[who], asked), silent) for who, asked in batch])
        for (who, _), outcome in zip(batch, outcomes, strict=True):
            if isinstance(outcome, Exception):
                raise outcome
            heads[who] = outcome.lora_uri

    def alone(who: int) -> torch.Tensor:
        heads = list(first)
        for batch in batches:
            for one, asked in batch:
                if one == who:
                    run(heads, [(who, asked)])
        weights = weights_of(student, heads[who])
        student.bank.remove(heads[who])
        return weights

    batches: list[list[tuple[int, list[dict[str, Any]]]]] = []
    while sum(map(len, batches)) < requests:
        several = random.permutation(adapters)[: int(random.integers(1, 7))].tolist()
        batches.append([(one, samples()) for one in several])
    trained = sorted({who for batch in batches for who, _ in batch})
    heads, allocated, reserved, seconds = list(first), [], [], []
    started = perf_counter()
    for number, batch in enumerate(batches):
        run(heads, batch)
        seconds.append(step.seconds)
        if (number + 1) * 8 // len(batches) > number * 8 // len(batches):
            allocated.append(torch.cuda.memory_allocated() / GIB if cuda else 0.0)
            reserved.append(torch.cuda.memory_reserved() / GIB if cuda else 0.0)
    found: dict[str, Any] = {
        "requests": sum(map(len, batches)),
        "adapters": len(trained),
        "seconds": round(perf_counter() - started, 1),
        "median_batch_ms": round(1000 * statistics.median(seconds), 1),
        "base_unchanged": unchanged(student, before),
        "allocated_gib_by_eighth": [round(one, 2) for one in allocated],
        "reserved_gib_by_eighth": [round(one, 2) for one in reserved],
        "largest_reserved_gib": round(torch.cuda.max_memory_reserved() / GIB, 2) if cuda else 0.0,
    }
    note(json.dumps(found))
    # Drawn by chance within each kind, by turns.
    by_kind = [[who for who in random.permutation(trained) if who % len(KINDS) == kind] for kind in range(len(KINDS))]
    drawn = sorted([int(who) for turn in itertools.zip_longest(*by_kind) for who in turn if who is not None][:sample])
    together = {who: weights_of(student, heads[who]) for who in drawn}
    for who in trained:
        student.bank.remove(heads[who])
    apart = {who: alone(who) for who in drawn}
    starts = {who: joined(seeds[first[who]]) for who in drawn}
    found["alone"] = {"adapters": len(drawn), "requests": sum(who in together for b in batches for who, _ in b)}
    found["together_and_apart"] = distances(starts, together, apart)
    note(json.dumps(found))
    engine.settled(240)
    engine.plainly()
    again = {who: alone(who) for who in drawn}
    found["apart_and_plain_torch"] = distances(starts, again, apart)
    found["base_unchanged"] &= unchanged(student, before)
    return found


def distances(
    starts: dict[int, torch.Tensor], some: dict[int, torch.Tensor], others: dict[int, torch.Tensor]
) -> dict[str, float]:
    """How far two ways of training the same adapters end from each other, of how far they went; the worst adapters."""
    ways = [(some[who] - starts[who], others[who] - starts[who]) for who in some]
    cosines = [float(torch.nn.functional.cosine_similarity(one, other, 0)) for one, other in ways]
    shares = [float((one - other).norm() / other.norm()) for one, other in ways]
    return {
        "least_cosine_of_changes": round(min(cosines), 5),
        "median_cosine_of_changes": round(statistics.median(cosines), 5),
        "largest_distance_of_change": round(max(shares), 4),
        "largest_difference": max(float((one - other).abs().max()) for one, other in ways),
        "largest_change": max(float(other.abs().max()) for _, other in ways),
    }


def unchanged(student: Student, before: Sequence[torch.Tensor]) -> bool:
    """Whether every parameter is bit for bit what it was."""
    return all(
        torch.equal(one.detach().cpu().view(torch.uint8), was.view(torch.uint8))
        for one, was in zip(student.model.parameters(), before, strict=True)
    )


def joined(tensors: dict[str, Any]) -> torch.Tensor:
    """All weights, by key, in one."""
    return torch.cat([torch.as_tensor(tensors[key]).float().cpu().reshape(-1) for key in sorted(tensors)])


def weights_of(student: Student, uri: str) -> torch.Tensor:
    """A resident adapter's."""
    adapter = student.bank.get(uri)
    assert adapter is not None
    return joined(adapter.tensors())


def prepared(case: Case, student: Student) -> tuple[StepWithoutStore, list[list[dict[str, Any]]], list[Job]]:
    """A case's step with its adapters' first weights; by adapter, its samples and its first request."""
    torch.manual_seed(0)
    seeds = {
        f"s3://bench/{case.samples}x{case.tokens}/{number}+0/": seed_tensors(student, number)
        for number in range(case.adapters)
    }
    teacher = MadeUpTeacher(student.fingerprint, student.head.shape[0])
    step = StepWithoutStore(student, Scorer(student, teacher), Limits(4096, 4096), seeds)  # type: ignore[arg-type]
    samples = made_up_samples(case, student)
    return step, samples, [job(uri, samples[number]) for number, uri in enumerate(seeds)]


class Rounds:
    """Steps of a case, each the next one of the same adapters, whose versions are `heads`."""

    def __init__(
        self, step: StepWithoutStore, heads: Sequence[str], samples: list[list[dict[str, Any]]], memory_gib: float
    ) -> None:
        self._step, self.heads, self._samples, self._memory_gib = step, list(heads), samples, memory_gib

    def __call__(self) -> float:
        """Seconds of one, of all adapters together."""
        again = [job(uri, self._samples[number]) for number, uri in enumerate(self.heads)]
        limit_memory(self._memory_gib)
        outcomes = self._step.batch([(one, silent) for one in again])
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome
        self.heads = [outcome.lora_uri for outcome in outcomes if isinstance(outcome, Result)]
        return self._step.seconds


def measure(case: Case, student: Student, plain: PlainPeft, arguments: argparse.Namespace) -> dict[str, Any]:
    """Equality, times, memory and profile of a case."""
    engine, cuda = student.engine, student.device.type == "cuda"
    assert engine is not None
    step, samples, jobs = prepared(case, student)
    seeds = step.seeds
    found: dict[str, Any] = {
        "case": case.name,
        "adapters": case.adapters,
        "target": case.target,
        "goal_ms": case.goal_ms,
    }

    first, gradients = recorded(step, jobs, arguments.memory_gib, engine)
    found["first_uncompiled_ms"] = round(1000 * step.seconds, 1)
    heads = [outcome.lora_uri for outcome in first]
    layout = student.bank.get(heads[0])
    assert layout is not None and layout.flat is not None
    split = layout.flat.layout.split
    limit_memory(None)
    exact = arguments.exact
    numbers = range(min(case.adapters, TRIALS)) if exact else sorted({0, case.adapters - 1})
    sides = {n: plain.both(seeds[list(seeds)[n]], step_items(step, jobs[n]), exact=exact) for n in numbers}
    if exact:
        _, beside = plain.gradient(seeds[next(iter(seeds))], step_items(step, jobs[0]), companions=1)
        found["plain_against_itself_padded"] = cosine(sides[0].gradient, beside)
    found |= compared([(loss_of(first[n]), split(gradients[n]), side) for n, side in sides.items()])
    gradients.clear()

    one_round = Rounds(step, heads, samples, arguments.memory_gib)
    if cuda:
        started = perf_counter()
        one_round()
        engine.settled(240)
        found["compile_and_capture_s"] = round(perf_counter() - started, 1)
        for uri in one_round.heads:
            student.bank.remove(uri)
        afresh = [job(uri, samples[number]) for number, uri in enumerate(seeds)]
        captured, gradients = recorded(step, afresh, arguments.memory_gib, engine)
        one_round.heads = [outcome.lora_uri for outcome in captured]
        rows = [(loss_of(captured[n]), split(gradients[n]), side) for n, side in sides.items()]
        if exact and case.adapters * case.samples == 1:
            rows += trials(case, student, plain, step, arguments.memory_gib)
        found["captured"] = compared(rows)
        found["equal"] &= found["captured"]["equal"]
        gradients.clear()
        rows.clear()
    items = step_items(step, jobs[0])
    for _ in range(2):
        one_round()
        engine.settled(240)
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    times, theirs = [], []
    one_round()
    found["memory_gib"] = round(torch.cuda.max_memory_reserved() / GIB, 1) if cuda else 0.0
    if not arguments.no_plain:
        plain.start(seeds[next(iter(seeds))], items)
        limit_memory(None)
        plain.step()
    for _ in range(arguments.rounds):
        times.append(one_round())
        if not arguments.no_plain:
            limit_memory(None)
            theirs.append(plain.step())
    found |= {"ms": round(1000 * statistics.median(times), 2), "all_ms": [round(1000 * one, 2) for one in times]}
    if theirs:
        one = statistics.median(theirs) * 1000
        found |= {"plain_ms": round(one, 2), "plain_all_ms": [round(1000 * each, 2) for each in theirs]}
        found["plain_passes"] = plain.passes
        found["speed_up"] = round(one * case.adapters / found["ms"], 2)
    found["ms_an_adapter"] = round(found["ms"] / case.adapters, 2)
    if arguments.profile and cuda:
        found["profile"] = profiled(one_round) | {"alone_ms": frozen_products_ms(student, case)}
    plain.stop()
    for uri in one_round.heads:
        student.bank.remove(uri)
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
    return found


class Side(NamedTuple):
    """Plain PEFT's loss and gradient by key; with --exact, the same of an fp32 base."""

    loss: float
    gradient: dict[str, torch.Tensor]
    true_loss: float | None
    true_gradient: dict[str, torch.Tensor]


def loss_of(outcome: Result) -> float:
    """A step's loss."""
    assert outcome.metadata is not None
    return outcome.metadata.total_loss


def compared(rows: Sequence[tuple[float, dict[str, torch.Tensor], Side]]) -> dict[str, Any]:
    """Our losses and gradients with plain PEFT's: the worst; and how far either's are from fp32's.

    Equal: within the bars; or the gradients on average as near fp32's as plain PEFT's are, and the losses within the
    bar of fp32's, or as near as plain PEFT's, in the root mean square.
    """
    found: dict[str, Any] = {
        "loss_error": max(abs(loss - side.loss) / abs(side.loss) for loss, _, side in rows),
        "gradient_cosine": min(cosine(gradient, side.gradient) for _, gradient, side in rows),
    }
    found["equal"] = found["loss_error"] <= 1e-3 and found["gradient_cosine"] >= 0.999
    exact = [(loss, gradient, side, side.true_loss) for loss, gradient, side in rows if side.true_loss is not None]
    if exact:
        errors = np.array([[loss / true - 1, side.loss / true - 1] for loss, _, side, true in exact])
        cosines = np.array(
            [[cosine(one, side.true_gradient) for one in (own, side.gradient)] for _, own, side, _ in exact]
        )
        rms, mean = np.sqrt((errors**2).mean(0)), errors.mean(0)
        found |= {"compared": len(exact), "loss_error_to_fp32_rms": rms[0], "loss_error_to_fp32_mean": mean[0]}
        found |= {"plain_loss_error_to_fp32_rms": rms[1], "plain_loss_error_to_fp32_mean": mean[1]}
        near = cosines.mean(0)
        found |= {"cosine_to_fp32": near[0], "plain_cosine_to_fp32": near[1]}
        found["as_near_as_plain"] = bool(rms[0] <= max(1e-3, rms[1]) and near[0] >= near[1])
    return {name: float(value) if isinstance(value, np.floating) else value for name, value in found.items()}


def trials(
    case: Case, student: Student, plain: PlainPeft, step: StepWithoutStore, memory_gib: float
) -> list[tuple[float, dict[str, torch.Tensor], Side]]:
    """Further adapters and samples: a loss over few tokens is off by chance, one alone says little."""
    rows = []
    for trial in range(1, TRIALS):
        uri = f"s3://bench/trial/{trial}+0/"
        step.seeds[uri] = seed_tensors(student, 1000 + trial)
        one = job(uri, made_up_samples(case, student, seed=1 + trial)[0])
        assert student.engine is not None
        (outcome,), (gradient,) = recorded(step, [one], memory_gib, student.engine)
        adapter = student.bank.get(outcome.lora_uri)
        assert adapter is not None and adapter.flat is not None
        limit_memory(None)
        side = plain.both(step.seeds.pop(uri), step_items(step, one), exact=True)
        rows.append((loss_of(outcome), adapter.flat.layout.split(gradient), side))
        student.bank.remove(outcome.lora_uri)
    return rows


def recorded(
    step: StepWithoutStore, jobs: Sequence[Job], memory_gib: float, engine: Engine
) -> tuple[list[Result], list[torch.Tensor]]:
    """A step's results, and each adapter's gradient as its update found it."""
    gradients: list[torch.Tensor] = []
    ours = engine.adamw

    def recorder(*tensors: torch.Tensor) -> torch.Tensor:
        gradients.append(tensors[3].detach().reshape(-1).cpu().clone())
        return ours(*tensors)

    limit_memory(memory_gib)
    engine.adamw = recorder
    outcomes = step.batch([(one, silent) for one in jobs])
    engine.adamw = ours if engine.adamw is recorder else engine.adamw
    for outcome in outcomes:
        if isinstance(outcome, Exception):
            raise outcome
    return [outcome for outcome in outcomes if isinstance(outcome, Result)], gradients


class PlainPeft:
    """PEFT's own LoRA on the same base weights: autograd, clipping, AdamW."""

    def __init__(self, model: Any, student: Student) -> None:
        config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=TARGETS, task_type="CAUSAL_LM")
        self.model = peft.get_peft_model(model, config).eval()
        self.head = student.head
        self.parameters = [one for one in self.model.parameters() if one.requires_grad]
        self.passes = 1
        self.companions = 0
        self.optimizer: torch.optim.Optimizer | None = None

    def _load(self, tensors: dict[str, NDArray[Any]]) -> None:
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.from_numpy(tensors[name.replace(".default", "")]))

    def exact_gradient(
        self, tensors: dict[str, NDArray[Any]], items: Sequence[Any]
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """`gradient` with the base in fp32 too."""
        import copy

        other = copy.copy(self)
        other.model, other.head = copy.deepcopy(self.model).float(), self.head.float()
        other.parameters = [one for one in other.model.parameters() if one.requires_grad]
        return other.gradient(tensors, items)

    def gradient(
        self, tensors: dict[str, NDArray[Any]], items: Sequence[Any], companions: int = 0
    ) -> tuple[float, dict[str, torch.Tensor]]:
        """The loss, and the gradient by key; with so many more rows in the batch, which have no loss."""
        self._load(tensors)
        self.companions = companions
        loss = self._backward(items)
        self.companions = 0
        found = {
            name.replace(".default", ""): parameter.grad.float().cpu()
            for name, parameter in self.model.named_parameters()
            if parameter.grad is not None
        }
        for parameter in self.parameters:
            parameter.grad = None
        return loss, found

    def both(self, tensors: dict[str, NDArray[Any]], items: Sequence[Any], *, exact: bool) -> Side:
        """Loss and gradient; with `exact`, fp32's too."""
        loss, gradient = self.gradient(tensors, items)
        return Side(loss, gradient, *(self.exact_gradient(tensors, items) if exact else (None, {})))

    def start(self, tensors: dict[str, NDArray[Any]], items: Sequence[Any]) -> None:
        """An adapter to take steps with."""
        self._load(tensors)
        self.items = items
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-4, weight_decay=0.01)

    def stop(self) -> None:
        """Lets its memory go."""
        self.optimizer = None

    def step(self) -> float:
        """Seconds of one."""
        assert self.optimizer is not None
        synchronize()
        started = perf_counter()
        self._backward(self.items)
        torch.nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        synchronize()
        return perf_counter() - started

    def _backward(self, items: Sequence[Any]) -> float:
        while True:
            try:
                size = -(-len(items) // self.passes)
                return sum(self._part(items[at : at + size], items) for at in range(0, len(items), size))
            except torch.OutOfMemoryError:
                for parameter in self.parameters:
                    parameter.grad = None
                if self.passes >= len(items):
                    raise
                self.passes *= 2
            gc.collect()
            torch.cuda.empty_cache()

    def _part(self, part: Sequence[Any], items: Sequence[Any]) -> float:
        total = sum(len(item.response_ids) for item in items)
        ids = torch.tensor([[*item.context.prefix_ids, *item.context.response_ids][:-1] for item in part])
        ids = torch.cat([ids, *[ids.flip(1)] * self.companions])
        device = self.head.device
        states = self.model.base_model.model.model(input_ids=ids.to(device), use_cache=False).last_hidden_state
        losses = []
        for row, item in enumerate(part):
            hidden = states[row, len(item.context.prefix_ids) - 1 :]
            scored = item.scored
            losses.append(
                sdpo_loss_from_hidden(
                    hidden, self.head, item.response_ids, scored.support_ids, scored.logprobs, total_tokens=total
                ).loss
            )
        loss = torch.stack(losses).sum()
        loss.backward()
        return float(loss.detach())


def frozen_products_ms(student: Student, case: Case) -> dict[str, float]:
    """Milliseconds of the products with frozen weights, both ways, by themselves: what is left of a profile's matrix
    products is LoRA's. (Kernels of both have the same names, and run beside each other.)"""
    assert student.engine is not None
    decoder = student.engine._decoder
    tokens = case.adapters * case.samples * case.tokens
    passes = -(-tokens // 4096)
    weights = [[stack.weight for stack in layer.stacks] for layer in decoder.layers]
    found = {}
    for name, layers, rows, times in (
        ("base", weights, tokens // passes, passes),
        ("head", [[student.head]], min(tokens, 2048), max(1, tokens // 2048)),
    ):
        x = [one.new_empty(rows, one.shape[1]).normal_() for one in layers[0]]
        dy = [one.new_empty(rows, one.shape[0]).normal_() for one in layers[0]]
        seconds = []
        for _ in range(4):
            synchronize()
            started = perf_counter()
            for layer in layers:
                for weight, inputs, slopes in zip(layer, x, dy, strict=True):
                    torch.mm(inputs, weight.T)
                    torch.mm(slopes, weight)
            synchronize()
            seconds.append(perf_counter() - started)
        found[name] = round(1000 * times * min(seconds[1:]), 2)
    return found


def profiled(one_round: Callable[[], float]) -> dict[str, Any]:
    """Milliseconds of the GPU's time by group of kernels, of a whole round; some run beside others."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        one_round()
        torch.cuda.synchronize()
    events = sorted((e for e in recorded.events() if e.device_time > 0), key=lambda event: event.time_range.start)
    groups: dict[str, float] = {}
    for event in events:
        kind = kernel_kind(event.name)
        groups[kind] = groups.get(kind, 0.0) + event.device_time / 1000
    span = (events[-1].time_range.end - events[0].time_range.start) / 1000
    names: dict[str, list[float]] = {}
    for event in events:
        names.setdefault(event.name[:110], []).append(event.device_time / 1000)
    top = sorted(names.items(), key=lambda item: -sum(item[1]))[:40]
    return {
        "groups_ms": {kind: round(ms, 3) for kind, ms in sorted(groups.items(), key=lambda item: -item[1])},
        "sum_ms": round(sum(groups.values()), 2),
        "span_ms": round(span, 2),
        "kernels": len(events),
        "top": [[name, len(times), round(sum(times), 3)] for name, times in top],
    }


def is_product(name: str) -> bool:
    """Whether a kernel is a matrix product."""
    return (
        any(word in name for word in ("gemm", "nvjet", "cutlass", "xmma"))
        and "fmha" not in name
        and "flash" not in name
    )


def kernel_kind(name: str) -> str:
    """The group of a kernel."""
    if is_product(name):
        return "matrix products"
    lowered = name.lower()
    if any(word in lowered for word in ("flash", "fmha", "attention", "sdpa")):
        return "attention"
    if "memcpy" in lowered or "memset" in lowered:
        return "copies"
    if "splitk" in lowered:
        return "split-K sums"
    if name in ("_sum_row", "_spread_row"):
        return "loss over the vocabulary"
    if name.startswith("triton"):
        return "compiled functions"
    return "other kernels"


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        ", ".join([results["machine"], *(f"{name} {version}" for name, version in results["packages"].items())]),
        "| case | step ms | an adapter | plain PEFT ms | faster | wanted | first | GiB | loss error | cosine |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results["cases"]:
        lines.append(
            f"| {one['case']} | {one['ms']} | {one['ms_an_adapter']} | {one.get('plain_ms', '')} | "
            f"{one.get('speed_up', '')} | {one['target'] or ''} | {one['first_uncompiled_ms']} | {one['memory_gib']} | "
            f"{one['loss_error']:.1e} | {one['gradient_cosine']:.5f} |"
        )
    return "\n".join(lines)


def random_models(config: dict[str, Any], device: str) -> tuple[Any, Any]:
    """Two models of one shape; the second gets the first's weights later."""
    settings = transformers.Qwen2Config(**config)
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    made = []
    for _ in range(2):
        torch.manual_seed(0)
        with torch.device(device):
            model = transformers.AutoModelForCausalLM.from_config(settings, dtype=dtype, attn_implementation="sdpa")
        made.append(model.to(device).eval().requires_grad_(False))
    return made[0], made[1]


def share_weights(model: Any, other: Any) -> None:
    """The other's parameters become this one's."""
    own = dict(model.named_parameters())
    for name, parameter in other.named_parameters():
        parameter.data = own[name].data
    other.tie_weights()


def adapter_config(rank: int = RANK, targets: Sequence[str] = TARGETS) -> dict[str, Any]:
    """adapter_config.json."""
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": ALPHA,
        "target_modules": list(targets),
        "base_model_name_or_path": BASE_MODEL,
    }


def seed_tensors(
    student: Student, number: int, rank: int = RANK, targets: Sequence[str] = TARGETS
) -> dict[str, NDArray[Any]]:
    """A as PEFT begins with, B small but not zero, so that every weight has a gradient."""
    generator = torch.Generator().manual_seed(number)
    found = {}
    for name, module in student.model.named_modules():
        if isinstance(module, torch.nn.Linear) and name.rpartition(".")[2] in targets:
            a = torch.rand(rank, module.in_features, generator=generator).sub_(0.5).mul_(2 / module.in_features**0.5)
            b = torch.rand(module.out_features, rank, generator=generator).sub_(0.5).mul_(0.02)
            key = f"base_model.model.{name}"
            found[f"{key}.lora_A.weight"], found[f"{key}.lora_B.weight"] = a.numpy(), b.numpy()
    return found


def made_up_samples(case: Case, student: Student, seed: int = 1) -> list[list[dict[str, Any]]]:
    """By adapter; each sample with its prompt is `tokens` + 1 tokens long, the last of which is not shown."""
    from claas_crds.request import Sample
    from claas_worker.render import render

    prefix = len(
        render(
            Sample.model_validate(PROMPT | {"response": "x"}), student.tokenizer, Limits(4096, 4096)
        ).prefix_student_ids
    )
    generator = torch.Generator().manual_seed(seed)
    length = case.tokens + 1 - prefix
    return [
        [
            PROMPT | {"responseTokenIds": torch.randint(0, 150_000, (length,), generator=generator).tolist()}
            for _ in range(case.samples)
        ]
        for _ in range(case.adapters)
    ]


def job(uri: str, samples: list[dict[str, Any]]) -> Job:
    """A request in mode Server."""
    spec = DistillRequestSpec.model_construct(
        **DistillRequestSpec.model_validate({"loraUri": "s3://bench/a/", "samples": samples[:1]}).__dict__
    )
    from claas_crds.request import Sample

    spec.samples = [Sample.model_validate(one) for one in samples]
    out = f"{uri.rpartition('+')[0]}+{uuid.uuid4().hex}/"
    return Job(str(uuid.uuid4()), "dr", "bench", "2026-01-01T00:00:00Z", 1, Parent(uri=uri, adapter_uid="a"), spec, out)


def step_items(step: StepWithoutStore, one: Job) -> Sequence[Any]:
    """What a job is trained on, as the step itself prepares it."""
    attempt = Attempt(one, silent)
    attempt.samples = one.spec.samples or ()
    from claas_worker.render import render

    attempt.rendered = [
        render(sample, step._student.tokenizer, step._limits, truncate_response=None, where="")
        for sample in attempt.samples
    ]
    step._ask_teacher(attempt)
    return attempt.items


def cosine(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """Of two gradients by key."""
    assert one.keys() == other.keys()
    dot = sum(float((one[key].double() * other[key].double()).sum()) for key in one)
    norms = [sum(float(t.double().square().sum()) for t in side.values()) ** 0.5 for side in (one, other)]
    return dot / (norms[0] * norms[1])


def limit_memory(gib: float | None) -> None:
    """Of this process on the GPU; None: all of it."""
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(1.0 if gib is None else min(1.0, gib * GIB / total))


def qwen_tokenizer() -> Path:
    """From the tests' cache."""
    import models

    return models.qwen_tokenizer_dir()


def synchronize() -> None:
    """Waits for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def silent(phase: str) -> None:
    """A report that goes nowhere."""


def note(text: str) -> None:
    """To stderr, at once."""
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
