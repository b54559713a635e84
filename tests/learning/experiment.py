"""One trial: an adapter, a person with one preference, twenty requests, and what a program sees on held-out prompts.

A request is sampled on-policy from the current adapter, judged in words, and trained by production's own `TrainingStep`
through a real folder store, as the worker does it; nothing is replaced. Arms:

    feedback   the words are about the preference
    shuffled   the words are another preference's, drawn anew for every request: as much training, no bearing
    empty      no words at all: mode Self has nothing to learn from
"""

from __future__ import annotations

import dataclasses
import random
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlparse

import torch

import models
from claas_crds.adapter import Lora
from claas_crds.request import DistillRequestSpec, Parent, Result, Training
from claas_store.create import create_adapter
from claas_store.version import Version, read_version
from claas_worker.bank import Adapter
from claas_worker.job import Job
from claas_worker.provided import Scored
from claas_worker.render import Limits
from claas_worker.score import Question, Scorer
from claas_worker.sdpo import sdpo_loss_from_hidden
from claas_worker.step import TrainingStep
from claas_worker.student import Student
from learning import probes
from learning.preferences import BY_NAME, Answer, Preference
from learning.prompts import HELD_OUT, TRAINED
from learning.speaker import Speaker

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
CREATED = "2026-11-24T00:00:00Z"
LIMITS = Limits(max_prompt_tokens=1024, max_response_tokens=512)
KEPT_ANSWERS = 3  # in a record, to be read by people
JUDGED_SEED = 7  # of the noise on held-out prompts: the same in every arm, at every step, in every trial

Arm = Literal["feedback", "shuffled", "empty"]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How a trial is run."""

    training: dict[str, Any] = dataclasses.field(default_factory=dict)  # spec.training, in camel case
    requests: int = 20
    samples: int = 1  # per request, each on another prompt
    judge_every: int = 5
    held_out: int = len(HELD_OUT)  # prompts
    draws: int = 2  # answers to each of them
    temperature: float = 0.7
    max_tokens: int = 64
    wording: str = "person-1"  # of the hindsight block; see `learning.survey`
    contrast: float | None = None  # spec.teacher.contrast; None: its default


class RememberingScorer(Scorer):
    """Keeps what it answered, so that D can be asked again after the step, against the very same teacher."""

    questions: Sequence[Question]
    scored: Sequence[Scored]

    def self(
        self, questions: Sequence[Question], adapters: Sequence[Adapter], ks: Sequence[int], contrasts: Sequence[float]
    ) -> list[Scored]:
        """See `Scorer.self`."""
        scored = super().self(questions, adapters, ks, contrasts)
        self.questions, self.scored = questions, scored
        return scored


class World:
    """The base model in memory, and a folder for versions. One per process; trials leave nothing behind in it."""

    def __init__(self, folder: Path, *, device: str = "cpu", threads: int = 0) -> None:
        self.student = load_student(device, threads)
        self.scorer = RememberingScorer(self.student, None)
        self.step = TrainingStep(self.student, self.scorer, LIMITS)
        self.speaker = Speaker(self.student)
        self.folder = folder
        self._base: dict[Any, Any] = {}

    def adapter(self, seed: int) -> Version:
        """A new adapter without effect; its random half depends on the seed alone."""
        uri = f"file://{self.folder}/{uuid.uuid4().hex}/a/"
        return create_adapter(uri, BASE_MODEL, models.smollm2_dir(), Lora(), f"learning {seed}")

    def request(
        self, parent: Version, samples: Sequence[dict[str, Any]], training: dict[str, Any], contrast: float | None
    ) -> Result:
        """One request in mode Self."""
        teacher = {"mode": "Self", "contrast": contrast}
        content = {"loraUri": parent.uri, "samples": samples, "training": training, "teacher": teacher}
        spec = DistillRequestSpec.model_validate(content)
        job = Job(str(uuid.uuid4()), "dr", "team", CREATED, 1, Parent(uri=parent.uri, adapter_uid="a"), spec)
        return self.step(job, lambda phase: None)

    def divergence(self, version: Version, training: Training) -> float:
        """Mean D of the last request's responses with `version`, against the teacher's scores of then."""
        bank, total, tokens = self.student.bank, 0.0, 0
        bank.add(version.uri, version.config, version.tensors)
        with bank.in_use(version.uri) as adapter, torch.no_grad():
            contexts = [question.student for question in self.scorer.questions]
            states = self.student.hidden(contexts, [adapter] * len(contexts))
            for context, hidden, scored in zip(contexts, states, self.scorer.scored, strict=True):
                ids = torch.tensor(context.response_ids)
                result = sdpo_loss_from_hidden(
                    hidden, self.student.head, ids, scored.support_ids, scored.logprobs, alpha=training.alpha
                )
                total += result.metrics["jsd"] * len(ids)
                tokens += len(ids)
        bank.remove(version.uri)
        return total / tokens

    def answers(self, settings: Settings) -> list[Answer]:
        """To the held-out prompts, by the adapter that the speaker wears."""
        prefixes = [self.speaker.prefix(prompt) for prompt in HELD_OUT[: settings.held_out]] * settings.draws
        return self.speaker.respond(
            prefixes, temperature=settings.temperature, max_tokens=settings.max_tokens, seed=JUDGED_SEED
        )

    def start(self, settings: Settings) -> tuple[list[Answer], probes.Capability]:
        """Of an adapter without effect, which the speaker must wear: the same for every trial, so done once."""
        key = (settings.held_out, settings.draws, settings.temperature, settings.max_tokens)
        if key not in self._base:
            self._base[key] = (self.answers(settings), probes.measure(self.speaker.model, self.speaker.tokenizer))
        answers, capability = self._base[key]
        return answers, capability


def load_student(device: str, threads: int = 0) -> Student:
    """SmolLM2 in fp32 everywhere, so that machines can be compared. (`Student.load` takes bf16 on a GPU.)"""
    student = Student.load(models.smollm2_dir(), base_model=BASE_MODEL, device="cpu", threads=threads)
    return student if device == "cpu" else Student(student.model.to(device), student.tokenizer, base_model=BASE_MODEL)


def run_trial(world: World, preference: Preference, arm: Arm, seed: int, settings: Settings) -> dict[str, Any]:
    """The whole story of one adapter, as plain data."""
    choice = random.Random(f"{preference.name} {seed}")
    prompts: list[str] = []
    while len(prompts) < settings.requests * settings.samples:
        prompts += choice.sample(TRAINED, len(TRAINED))
    training = Training.model_validate(settings.training)
    head = world.adapter(seed)
    root = Path(urlparse(head.uri).path).parent
    world.speaker.wear(head.config, head.tensors)
    answers, capability = world.start(settings)
    record: dict[str, Any] = {
        "preference": preference.name,
        "arm": arm,
        "seed": seed,
        "settings": dataclasses.asdict(settings),
        "compliance": {0: share(preference, answers)},
        "answers": {0: [answer.text for answer in answers[:KEPT_ANSWERS]]},
        "probes": {0: capability._asdict()},
        "requests": [],
    }
    for number in range(1, settings.requests + 1):
        asked = prompts[(number - 1) * settings.samples : number * settings.samples]
        said = world.speaker.respond(
            [world.speaker.prefix(prompt) for prompt in asked],
            temperature=settings.temperature,
            max_tokens=settings.max_tokens,
            seed=1000 * (seed + 1) + number,
        )
        samples = [
            sample(prompt, answer, words(preference, arm, answer, choice))
            for prompt, answer in zip(asked, said, strict=True)
        ]
        result = world.request(head, samples, settings.training, settings.contrast)
        step: dict[str, Any] = {
            "reason": str(result.reason),
            "compliant": [preference.complies(answer) for answer in said],
            "metadata": result.metadata.model_dump(exclude_none=True) if result.metadata else None,
        }
        if result.lora_uri != head.uri:
            shutil.rmtree(urlparse(head.uri).path)  # only the head is needed; it holds the optimizer's state
            head = read_version(result.lora_uri)
            world.speaker.wear(head.config, head.tensors)
            step["jsd_after"] = world.divergence(head, training)
        record["requests"].append(step)
        if number % settings.judge_every == 0:
            answers = world.answers(settings)
            record["compliance"][number] = share(preference, answers)
            record["answers"][number] = [answer.text for answer in answers[:KEPT_ANSWERS]]
    record["probes"][settings.requests] = probes.measure(world.speaker.model, world.speaker.tokenizer)._asdict()
    shutil.rmtree(root)
    return record


def words(preference: Preference, arm: Arm, answer: Answer, choice: random.Random) -> str | None:
    """What the person of this arm says of the answer."""
    if arm == "empty":
        return None
    if arm == "shuffled":
        preference = choice.choice([BY_NAME[name] for name in preference.unrelated])
    return preference.feedback(answer, choice)


def sample(prompt: str, answer: Answer, feedback: str | None) -> dict[str, Any]:
    """As a client that has the ids sends it."""
    return {
        "prompt": prompt,
        "responseTokenIds": answer.token_ids,
        "finishReason": "stop" if answer.finished else "length",
        "feedback": feedback,
    }


def share(preference: Preference, answers: Sequence[Answer]) -> float:
    """Of compliant answers."""
    return sum(map(preference.complies, answers)) / len(answers)


def falls(record: dict[str, Any]) -> tuple[int, int]:
    """In how many requests D of the trained response fell, and of how many that trained."""
    trained = [step for step in record["requests"] if "jsd_after" in step]
    return sum(step["jsd_after"] < step["metadata"]["jsd"] for step in trained), len(trained)
