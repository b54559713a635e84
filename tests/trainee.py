"""A worker's step without a cluster: a small random Qwen2 with production's tokenizer, and adapters in a folder."""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import models
from claas_crds.adapter import Lora
from claas_crds.request import DistillRequestSpec, Parent, Result
from claas_store.create import create_adapter
from claas_store.version import Version, read_version
from claas_worker.job import Job
from claas_worker.render import Limits
from claas_worker.score import Scorer
from claas_worker.step import TrainingStep
from claas_worker.student import Student

BASE_MODEL = "tests/tiny"
CREATED = "2026-11-23T19:10:00Z"
SAMPLE = {
    "prompt": "Write a function to calculate factorial",
    "response": "def factorial(n):\n    return 1 if n <= 1 else n * factorial(n - 1)",
    "feedback": "Good recursive solution",
}
FRENCH = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Bonjour ! Ça va ?"},
        {"role": "assistant", "content": "Très bien."},
        {"role": "user", "content": "Et toi, où vas-tu ?"},
    ],
    "response": "Je vais à l'école 🎒 — 学校へ行きます。",
    "feedback": "Answer in French only.",
}
SHORT = {"prompt": "2+2?", "response": "4", "feedback": "Say it in a sentence."}


def tiny_student(micro_batch_tokens: int = 4096, resident_bytes: int = 0) -> Student:
    """Random, in fp32 on the CPU; its weights are scaled up: its distributions are not flat, and contexts matter."""
    student = Student.load(
        models.tiny_qwen_dir(),
        base_model=BASE_MODEL,
        device="cpu",
        threads=2,
        micro_batch_tokens=micro_batch_tokens,
        resident_bytes=resident_bytes,
    )
    with torch.no_grad():
        for module in student.model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(1 if module.weight is student.head else 5)
        student.head.mul_(10)
    return student


def base_digest(student: Student) -> str:
    """Of every parameter and buffer with its name, place and dtype: what bit-identical means."""
    digest = hashlib.sha256()
    for name, tensor in [*student.model.named_parameters(), *student.model.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor.requires_grad}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    digest.update("\n".join(f"{name} {type(module)}" for name, module in student.model.named_modules()).encode())
    return digest.hexdigest()


class Trainee:
    """One student and its step; adapters lie below `folder`, which must be a file root."""

    def __init__(self, student: Student, folder: Path, client: Any = None, limits: Limits | None = None) -> None:
        self.student, self.folder = student, folder
        limits = limits or Limits(1024, 512, student.head.shape[0])
        self.step = TrainingStep(student, Scorer(student, client), limits)
        self.phases: list[str] = []

    def adapter(self, name: str, *, seed: str = "seed", **lora: Any) -> str:
        """A new, zero-effect adapter; gives its uri."""
        return create_adapter(
            f"file://{self.folder}/{name}/", BASE_MODEL, models.tiny_qwen_dir(), Lora(**lora), seed
        ).uri

    def job(
        self,
        parent_uri: str,
        samples: Sequence[dict[str, Any]] | None = (SAMPLE,),
        *,
        uid: str = "",
        attempt: int = 1,
        **spec: Any,
    ) -> Job:
        """A job in mode Self, unless `spec` says otherwise."""
        content = {"loraUri": parent_uri, "samples": samples and list(samples), "teacher": {"mode": "Self"}} | spec
        uid = uid or str(uuid.uuid4())
        parsed = DistillRequestSpec.model_validate({key: value for key, value in content.items() if value is not None})
        return Job(uid, "dr", "team", CREATED, attempt, Parent(uri=parent_uri, adapter_uid="a"), parsed)

    def run(self, parent_uri: str, samples: Sequence[dict[str, Any]] | None = (SAMPLE,), **more: Any) -> Result:
        """The result of such a job."""
        return self.step(self.job(parent_uri, samples, **more), self.phases.append)

    def train(self, parent_uri: str, samples: Sequence[dict[str, Any]] | None = (SAMPLE,), **more: Any) -> Version:
        """The version that such a job writes."""
        result = self.run(parent_uri, samples, **more)
        assert result.outcome == "Succeeded", result
        return read_version(result.lora_uri)

    def versions(self) -> list[str]:
        """Folders below the root that have a manifest."""
        return sorted(str(path.parent.name) for path in self.folder.glob("*/claas.json"))
