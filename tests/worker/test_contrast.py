"""What the contrast of mode Self aims at: the student, moved by what the words of the feedback add."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from claas_crds.request import SELF_CONTRAST, DistillRequestSpec, Sample
from claas_store.version import read_version
from claas_worker import render as rendering
from claas_worker.render import NEUTRAL_WORDS, Limits, render
from claas_worker.score import Scorer, contrasted
from claas_worker.sdpo import TAIL_FLOOR
from claas_worker.student import Student
from trainee import SAMPLE, SHORT, Trainee, tiny_student

LIMITS = Limits(1024, 512)


@pytest.fixture(scope="module")
def student() -> Student:
    return tiny_student()


@pytest.fixture
def trainee(student: Student, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainee:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    return Trainee(student, tmp_path)


@st.composite
def views(draw: st.DrawFn) -> list[torch.Tensor]:
    """Logprobs (N, K) of student, teacher and one to three neutral views, some with a tail and some all but without."""
    n, k, neutral = draw(st.integers(1, 4)), draw(st.integers(1, 9)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rest = draw(st.sampled_from([-20.0, -2.0, 3.0]))  # the logit of what is not listed
    logits = 3 * torch.randn(2 + neutral, n, k + 1, generator=generator, dtype=torch.float64)
    logits[..., -1] += rest
    return list(logits.log_softmax(-1)[..., :-1])


@given(views(), st.floats(0, 8))
@settings(max_examples=100, deadline=None)
def test_the_target_is_the_formula(logs: list[torch.Tensor], weight: float) -> None:
    p, q, *neutral = logs
    found = contrasted(p, q, neutral, weight)
    for row in range(p.shape[0]):

        def column(view: torch.Tensor, row: int = row) -> list[float]:
            listed = [float(x) for x in view[row].exp()]
            return [*listed, max(1 - math.fsum(listed), TAIL_FLOOR)]

        own, shown, *others = map(column, (p, q, *neutral))
        mean = [math.exp(math.fsum(map(math.log, masses)) / len(others)) for masses in zip(*others, strict=True)]
        raw = [a * (b / c) ** weight for a, b, c in zip(own, shown, mean, strict=True)]
        expected = [math.log(x / math.fsum(raw)) for x in raw[:-1]]
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-9, atol=1e-9)


@given(views(), st.floats(0, 8))
@settings(max_examples=50, deadline=None)
def test_words_that_add_nothing_teach_nothing(logs: list[torch.Tensor], weight: float) -> None:
    """Whatever the block itself does to the teacher: the target is the student."""
    p, q, *_ = logs
    torch.testing.assert_close(contrasted(p, q, [q, q], weight), p, rtol=0, atol=2 * TAIL_FLOOR)


def test_what_the_block_does_by_itself_is_not_learned() -> None:
    """q is p bent by the block and by the words, q0 by the block alone: the words' bend is what is left."""
    generator = torch.Generator().manual_seed(0)
    p, block, words = (torch.randn(3, 12, generator=generator, dtype=torch.float64) for _ in range(3))
    p = p.log_softmax(-1)
    found = contrasted(p, (p + block + words).log_softmax(-1), [(p + block).log_softmax(-1)], 1.0)
    torch.testing.assert_close(found, (p + words).log_softmax(-1), rtol=0, atol=1e-5)


def test_half_the_precision_in_half_the_precision_out() -> None:
    p, q, q0 = torch.randn(3, 2, 5).log_softmax(-1)
    assert contrasted(p, q, [q0], 2.0).dtype == torch.float32


# The contexts


def test_neutral_contexts_differ_by_the_persons_words_alone(student: Student) -> None:
    sample = {**SAMPLE, "solution": "def f(): ..."}
    rendered = render(Sample.model_validate(sample), student.tokenizer, LIMITS)
    others = [
        render(Sample.model_validate({**sample, "feedback": words}), student.tokenizer, LIMITS).prefix_teacher_ids
        for words in NEUTRAL_WORDS
    ]
    assert list(rendered.prefixes_neutral_ids) == others
    assert len({*others, rendered.prefix_teacher_ids}) == len(NEUTRAL_WORDS) + 1


@pytest.mark.parametrize(
    "fields", [{}, {"solution": "4."}, {"feedback": "NameError", "feedbackSource": "Environment"}, {"feedback": " "}]
)
def test_only_what_a_person_said_is_contrasted(student: Student, fields: dict[str, str]) -> None:
    sample = Sample.model_validate({"prompt": "2+2?", "response": "4", **fields})
    assert render(sample, student.tokenizer, LIMITS).prefixes_neutral_ids == ()


def test_every_context_fits_and_short_feedback_is_not_called_cut(student: Student) -> None:
    sample = Sample.model_validate({**SAMPLE, "feedback": "No."})
    whole = render(sample, student.tokenizer, LIMITS)
    longest = max(map(len, (whole.prefix_teacher_ids, *whole.prefixes_neutral_ids)))
    assert longest > len(whole.prefix_teacher_ids)
    tight = render(sample, student.tokenizer, LIMITS._replace(max_prompt_tokens=longest - 1))
    assert tight.prefix_teacher_ids == whole.prefix_teacher_ids and not tight.truncated
    assert all(len(ids) < longest for ids in tight.prefixes_neutral_ids)


def test_changed_neutral_words_are_a_new_version() -> None:
    assert (rendering.NEUTRAL, NEUTRAL_WORDS) == (
        "neutral-1",
        ("I have read it.", "I do not like it. Change it.", "Good. Always do that."),
    )


# The step


def scored(trainee: Trainee, sample: dict[str, Any], contrast: float, monkeypatch: pytest.MonkeyPatch) -> Any:
    """What the teacher said in a step on a fresh adapter, with the step's metadata."""
    seen: list[Any] = []
    original = Scorer.self

    def remember(self: Scorer, *arguments: Any) -> Any:
        seen.extend(answer := original(self, *arguments))
        return answer

    with monkeypatch.context() as patch:
        patch.setattr(Scorer, "self", remember)
        result = trainee.run(trainee.adapter(f"a{contrast}"), [sample], teacher={"mode": "Self", "contrast": contrast})
    (one,) = seen
    return one, result.metadata


def test_a_step_in_mode_self_aims_at_the_contrast(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    """The weight bends the target further and further from the student, along what the words add."""
    (paper, numbers), (once, _), (thrice, bent) = (
        scored(trainee, SAMPLE, weight, monkeypatch) for weight in (0.0, 1.0, 3.0)
    )
    assert torch.equal(paper.support_ids, once.support_ids) and torch.equal(once.support_ids, thrice.support_ids)
    assert numbers.teacher_contrast is None and bent.teacher_contrast == 3.0
    assert (numbers.template_id, bent.template_id) == ("person-1", "person-1/neutral-1")
    with torch.no_grad():
        rendered = render(Sample.model_validate(SAMPLE), trainee.student.tokenizer, LIMITS)
        view = {}
        for name, prefix in [
            ("p", rendered.prefix_student_ids),
            ("q", rendered.prefix_teacher_ids),
            *((f"n{i}", prefix) for i, prefix in enumerate(rendered.prefixes_neutral_ids)),
        ]:
            ids = torch.tensor([[*prefix, *rendered.response_ids][:-1]])
            logits = trainee.student.model(input_ids=ids, use_cache=False).logits[0, len(prefix) - 1 :]
            view[name] = logits.log_softmax(-1).gather(1, once.support_ids)
    torch.testing.assert_close(paper.logprobs, view["q"], rtol=1e-4, atol=1e-4)
    neutral = [view[f"n{i}"] for i in range(len(NEUTRAL_WORDS))]
    for found, weight in ((once, 1.0), (thrice, 3.0)):
        expected = contrasted(view["p"], view["q"], neutral, weight)
        torch.testing.assert_close(found.logprobs, expected, rtol=1e-3, atol=1e-3)


def test_without_a_persons_words_it_is_the_papers_teacher(trainee: Trainee, monkeypatch: pytest.MonkeyPatch) -> None:
    sample = SHORT | {"feedbackSource": "Environment"}
    (paper, _), (same, numbers) = (scored(trainee, sample, weight, monkeypatch) for weight in (0.0, 2.0))
    assert torch.equal(paper.logprobs, same.logprobs)
    assert numbers.teacher_contrast is None and numbers.template_id == "environment-1"


def test_requests_in_a_batch_keep_their_own_contrast(trainee: Trainee) -> None:
    weights: Sequence[float] = (0.0, 2.0, 5.0)

    def jobs(name: str) -> list[Any]:
        return [
            trainee.job(trainee.adapter(f"{name}-{w}"), [SAMPLE, SHORT], teacher={"mode": "Self", "contrast": w})
            for w in weights
        ]

    together = trainee.step.batch([(job, trainee.phases.append) for job in jobs("together")])
    alone = [trainee.step(job, trainee.phases.append) for job in jobs("alone")]
    divergences = []
    for one, other in zip(together, alone, strict=True):
        assert not isinstance(one, Exception) and one.metadata is not None and other.metadata is not None
        assert one.metadata.jsd == pytest.approx(other.metadata.jsd, rel=1e-4)
        divergences.append(one.metadata.jsd)
        for key, tensor in read_version(other.lora_uri).tensors.items():
            np.testing.assert_allclose(read_version(one.lora_uri).tensors[key], tensor, rtol=0, atol=3e-5)
    assert len(set(divergences)) == len(weights)


def test_the_default_is_on_in_mode_self_alone() -> None:
    def weight(**teacher: Any) -> float:
        content = {"loraUri": "s3://bucket/a/", "samples": [SAMPLE], "teacher": teacher}
        return DistillRequestSpec.model_validate(content).teacher.contrast_weight()

    assert (weight(mode="Self"), weight(mode="Self", contrast=0), weight(mode="Self", contrast=0.5)) == (
        SELF_CONTRAST,
        0,
        0.5,
    )
    assert weight() == weight(mode="Server", contrast=0) == 0
    with pytest.raises(ValidationError, match=r"spec\.teacher\.contrast needs spec\.teacher\.mode Self"):
        weight(mode="Server", contrast=1)
