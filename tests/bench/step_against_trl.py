"""The product's training step against the SDPO trainer of TRL and plain PEFT, interleaved in one run on a GPU.

TRL's side is `trl.experimental.sdpo.SDPOTrainer` in its own loop, with LoRA by PEFT on the same base weights, the first
adapter's weights and the same token ids. Its settings are those nearest to ours: the live model as teacher, top-100 of
the student with a tail, alpha 0.5, bf16, AdamW, clipping at 1. A callback times it from a step's begin to its end, and
what makes the batch is taken out: completions (given here, never generated), rewards, the teacher's prompt with the
feedback. So timed are forward passes of student and of teacher, loss, backward, clipping, AdamW, schedule. TRL trains
one adapter at a time: where there are several, its step is counted once for each.

Ours is timed as in `student_step.py`, which has no teacher's pass in it: a server has made that. So TRL's teacher's
pass is timed by itself as well, and the ratio is given without it too. TRL recomputes activations by default, which is
slower: here it does so only where the card has no room for them (`recomputes`), in as few parts as there is room for.

TRL is no dependency of this project: its packages are installed into a folder of the cache, beside the environment
that runs this, or taken from `--trl-path`. `--smoke` runs a tiny model on the CPU, for correctness alone.

    python tests/bench/step_against_trl.py --rounds 7 --out build/trl.json     a GPU with 80 GB; minutes
    python tests/bench/step_against_trl.py --smoke --rounds 1 --cases 0        any machine
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import json
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import record
import torch
import transformers
from student_step import (
    BASE_MODEL,
    CASES,
    GIB,
    PROMPT,
    QWEN_3B,
    SMOKE,
    TINY,
    TOP_K,
    Case,
    PlainPeft,
    Rounds,
    limit_memory,
    note,
    prepared,
    qwen_tokenizer,
    random_models,
    share_weights,
    silent,
    step_items,
    synchronize,
)

from claas_worker import logs
from claas_worker.student import Student

TRL = ("trl==1.16.0", "datasets==5.2.0", "dill==0.4.1", "multiprocess==0.70.19", "xxhash==4.1.0")
TRL += ("pandas==3.1.1", "pyarrow==26.0.1")
WARM_UP = 2  # steps of a trainer that are not timed
COMPILE_SECONDS = 240
KINDS = [CASES[index] for index in (0, 1, 3, 4)]


def main() -> None:
    """Runs the cases, prints the table and writes the JSON."""
    parser = record.parser(__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="timed ones, after those that are not")
    parser.add_argument("--trl-path", type=Path, help="a folder with TRL's packages (default: one of the cache's)")
    parser.add_argument("--tokenizer", type=Path, help="folder (default: Qwen's, from the tests' cache)")
    parser.add_argument("--compile-cache", type=Path, help="folder, as the worker's flag")
    parser.add_argument("--memory-gib", type=float, default=44.0, help="what our side may take: an L40S's")
    parser.add_argument("--cases", help="comma-separated indices of the cases (default: all)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model on the CPU: correctness alone")
    arguments = parser.parse_args()
    logs.configure()
    sys.path.append(str(arguments.trl_path or trl_packages()))  # last: what this environment has comes first
    results = run(arguments)
    print(table(results))


def run(arguments: argparse.Namespace) -> dict[str, Any]:
    """All cases on one model."""
    cases: Sequence[Case] = SMOKE if arguments.smoke else KINDS
    if arguments.cases is not None:
        cases = [cases[int(index)] for index in arguments.cases.split(",")]
    device = "cpu" if arguments.smoke else "cuda"
    tokenizer = transformers.AutoTokenizer.from_pretrained(arguments.tokenizer or qwen_tokenizer())
    model, other_model = random_models(TINY if arguments.smoke else QWEN_3B, device)
    student = Student(model, tokenizer, base_model=BASE_MODEL, resident_bytes=40 * GIB)
    student.start_engine(arguments.compile_cache)
    assert student.engine is not None
    share_weights(model, other_model)
    plain = PlainPeft(other_model, student)
    results = record.circumstances("step_against_trl", "torch", "transformers", "peft", "trl") | {"cases": []}
    for case in cases:
        results["cases"].append(measure(case, student, plain, arguments))
        note(json.dumps(results["cases"][-1]))
        record.write(arguments.out, results)
    return results


def measure(case: Case, student: Student, plain: PlainPeft, arguments: argparse.Namespace) -> dict[str, Any]:
    """The times of a case, all sides' in turn."""
    engine = student.engine
    assert engine is not None
    step, samples, jobs = prepared(case, student)
    seed = next(iter(step.seeds.values()))
    items = step_items(step, jobs[0])
    limit_memory(arguments.memory_gib)
    ours = Rounds(
        step, [one.lora_uri for one in step.batch([(one, silent) for one in jobs])], samples, arguments.memory_gib
    )
    for _ in range(3):  # compiled, captured, and once more
        engine.settled(COMPILE_SECONDS)
        ours()
    plain.start(seed, items)
    times: dict[str, list[float]] = {"ours": [], "plain": []}

    def others() -> None:
        times["ours"].append(ours())
        limit_memory(None)
        plain.model.eval()
        times["plain"].append(plain.step())

    trainer = fitting(case, plain, student, items, others, arguments)
    ms = {side: [round(1000 * one, 2) for one in each[-arguments.rounds :]] for side, each in times.items()}
    ms["trl"] = [round(1000 * one, 2) for one in trainer.seconds[-arguments.rounds :]]
    median = {side: round(statistics.median(each), 2) for side, each in ms.items()}
    teacher_ms = round(1000 * trainer.teacher_seconds(), 2)
    found = {
        "case": case.name,
        "adapters": case.adapters,
        "target": case.target,
        "goal_ms": case.goal_ms,
        "ms": median["ours"],
        "all_ms": ms["ours"],
        "plain_ms": median["plain"],
        "plain_all_ms": ms["plain"],
        "plain_passes": plain.passes,
        "trl_ms": median["trl"],
        "trl_all_ms": ms["trl"],
        "trl_teacher_ms": teacher_ms,
        "trl_batch_ms": round(1000 * statistics.median(trainer.batch_seconds[-arguments.rounds :]), 2),
        "trl_recomputes": trainer.recomputes,
        "trl_parts": trainer.parts,
        "trl_memory_gib": round(trainer.memory_gib, 1),
        "trl_loss": trainer.loss,
        "trl_gradient_norm": trainer.gradient_norm,
        "trl_largest_change": trainer.largest_change,
        "faster_than_plain": round(median["plain"] * case.adapters / median["ours"], 2),
        "faster_than_trl": round(median["trl"] * case.adapters / median["ours"], 2),
        "faster_than_trl_without_teacher": round((median["trl"] - teacher_ms) * case.adapters / median["ours"], 2),
    }
    trainer.close()
    plain.stop()
    for uri in ours.heads:
        student.bank.remove(uri)
    return found


def fitting(
    case: Case,
    plain: PlainPeft,
    student: Student,
    items: Sequence[Any],
    others: Callable[[], None],
    arguments: argparse.Namespace,
) -> TrlStep:
    """A trainer that has trained: the fastest way for which the card has room."""
    parts = [2**power for power in range(case.samples.bit_length())]
    for recomputes, count in [(False, 1), *((True, count) for count in parts)]:
        trainer = TrlStep(plain.model, student.tokenizer, items, others, recomputes, count, arguments.smoke)
        try:
            trainer.train(WARM_UP + arguments.rounds)
        except torch.OutOfMemoryError as error:
            note(f"{case.name}, recomputes {recomputes}, {count} parts: {error}")
        else:
            return trainer
        trainer.close()
        for parameter in plain.parameters:
            parameter.grad = None
        gc.collect()
        torch.cuda.empty_cache()
    sys.exit(f"TRL has no room for {case.name}")


class TrlStep:
    """An SDPOTrainer on completions that are given, timed step by step; `others` run before each step.

    Attributes:
        seconds: of each step, without what makes its batch (`batch_seconds`).
        loss: mean over all steps.
        gradient_norm: of the first step, before clipping.
        largest_change: of a weight, by all steps.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        items: Sequence[Any],
        others: Callable[[], None],
        recomputes: bool,
        parts: int,
        smoke: bool,
    ) -> None:
        from trl.experimental.sdpo import SDPOConfig, SDPOTrainer

        self.recomputes, self.parts = recomputes, parts
        self.seconds: list[float] = []
        self.batch_seconds: list[float] = []
        self.loss = self.gradient_norm = self.largest_change = self.memory_gib = 0.0
        self._model, self._folder = model, tempfile.mkdtemp()
        settings = SDPOConfig(
            output_dir=self._folder,
            per_device_train_batch_size=len(items) // parts,
            gradient_accumulation_steps=parts,
            num_generations=len(items),
            gradient_checkpointing=recomputes,
            max_completion_length=max(len(item.response_ids) for item in items),
            bf16=not smoke,
            use_cpu=smoke,
            learning_rate=1e-4,
            weight_decay=0.01,
            max_grad_norm=1.0,
            lr_scheduler_type="constant",
            teacher_model_kind="live",
            distillation_mode="topk_logits",
            distillation_topk=TOP_K,
            distillation_add_tail=True,
            distillation_alpha=0.5,
            include_environment_feedback=True,
            use_successful_as_teacher=False,
            diagnostics_warning_interval=0,
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        row = {"prompt": [{"role": "user", "content": PROMPT["prompt"]}], "privileged_context": PROMPT["feedback"]}
        self.trainer = SDPOTrainer(
            model,
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=settings,
            train_dataset=[row],
            processing_class=tokenizer,
            callbacks=[self._clock(others)],
        )
        self.trainer.remove_callback(transformers.PrinterCallback)
        prefix, responses = items[0].context.prefix_ids, [item.context.response_ids for item in items]
        make_batch = self.trainer._prepare_training_batch

        def given(prompt_ids: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
            assert prompt_ids == [list(prefix)] * len(items), "other tokens than ours"
            return prompt_ids, [list(one) for one in responses]

        def timed(inputs: Any) -> Any:
            started = perf_counter()
            self._batch = make_batch(inputs)
            synchronize()
            self.batch_seconds.append(perf_counter() - started)
            return self._batch

        self.trainer._generate, self.trainer._prepare_training_batch = given, timed

    def train(self, steps: int) -> None:
        """So many, in TRL's own loop."""
        before = [one.detach().clone() for one in self._model.parameters() if one.requires_grad]
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        self.trainer.args.max_steps = steps
        self.loss = self.trainer.train().training_loss
        after = [one.detach() for one in self._model.parameters() if one.requires_grad]
        self.largest_change = max(float((one - was).abs().max()) for one, was in zip(after, before, strict=True))
        assert math.isfinite(self.loss), "TRL's loss is not finite"
        assert self.gradient_norm > 0 and self.largest_change > 0, "TRL's step has changed nothing"

    def teacher_seconds(self, rounds: int = 5) -> float:
        """Of the teacher's pass alone, with nothing else of a step; all parts together."""
        size, keep = len(self._batch["completion_ids"]) // self.parts, self._batch["completion_ids"].shape[1]
        ids, mask = self._batch["teacher_input_ids"], self._batch["teacher_attention_mask"]
        seconds = []
        for _ in range(1 + rounds):
            synchronize()
            started = perf_counter()
            for at in range(0, len(ids), size):
                with torch.no_grad(), self.trainer.compute_loss_context_manager():
                    self.trainer._forward_logits(self._model, ids[at : at + size], mask[at : at + size], keep)
            synchronize()
            seconds.append(perf_counter() - started)
        return statistics.median(seconds[1:])

    def close(self) -> None:
        """The model is as it was, but for its weights."""
        self.trainer.accelerator.unwrap_model(self._model, keep_fp32_wrapper=False)
        self.trainer.accelerator.free_memory()
        del self.trainer
        shutil.rmtree(self._folder)

    def _clock(self, others: Callable[[], None]) -> transformers.TrainerCallback:
        step = self

        class Clock(transformers.TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                others()
                synchronize()
                self.started = perf_counter()

            def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
                if not step.seconds:  # the first step is not one of those that count; clipped, but not to nothing
                    gradients = [one.grad for one in step._model.parameters() if one.grad is not None]
                    step.gradient_norm = float(torch.nn.utils.get_total_norm(gradients))

            def on_step_end(self, *_: Any, **__: Any) -> None:
                synchronize()
                step.seconds.append(perf_counter() - self.started - step.batch_seconds[-1])
                if torch.cuda.is_available():
                    step.memory_gib = torch.cuda.max_memory_allocated() / GIB

        return Clock()


def trl_packages() -> Path:
    """TRL and what it needs beyond this environment; installed when absent."""
    from bootstrap import cache_dir, exclusive
    from bootstrap import run as run_command

    folder = cache_dir() / f"trl-{hashlib.sha256(repr((TRL, sys.version)).encode()).hexdigest()[:12]}"
    with exclusive(folder.with_suffix(".lock")):
        if not folder.exists():
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
                command = [sys.executable, "-m", "uv", "pip", "install", "-q", "--python", sys.executable, "--no-deps"]
                run_command(*command, "--target", f"{scratch}/trl", *TRL)
                Path(scratch, "trl").rename(folder)
    return folder


def table(results: dict[str, Any]) -> str:
    """Markdown."""
    lines = [
        ", ".join([results["machine"], *(f"{name} {version}" for name, version in results["packages"].items())]),
        "| case | step ms | plain PEFT ms | TRL ms | of it its teacher | recomputes, parts | faster than plain PEFT | "
        "than TRL | than TRL without its teacher |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in results["cases"]:
        how = f"{'yes' if one['trl_recomputes'] else 'no'}, {one['trl_parts']}"
        lines.append(
            f"| {one['case']} | {one['ms']} | {one['plain_ms']} | {one['trl_ms']} | {one['trl_teacher_ms']} | {how} | "
            f"{one['faster_than_plain']} | {one['faster_than_trl']} | {one['faster_than_trl_without_teacher']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
