"""The teacher's side of a step, by `spec.teacher.mode`: for each response a support and its logprobs.

Server: the teacher Deployment's top-K after the context that holds the feedback. Self: the student itself, with its
adapter, shown that context and asked about its own top-K, as in the paper. Provided: what the request brings along.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claas_crds.request import Sample
from claas_teacher.client import TeacherClient
from claas_worker.bank import Adapter
from claas_worker.errors import TeacherUnavailable, TokenizerMismatch
from claas_worker.job import InvalidSpec
from claas_worker.provided import Scored, TokenTexts, parse
from claas_worker.sdpo import logprobs_from_hidden, topk_from_hidden
from claas_worker.student import Context, Student

__all__ = ["Question", "Scored", "Scorer"]


class Question(NamedTuple):
    """One sample as both sides see it: the same response after the student's and after the teacher's prefix."""

    student: Context
    teacher: Context


class Scorer:
    """Asks the teacher. One per worker.

    Args:
        client: of the teacher Deployment; None where there is none.
    """

    def __init__(self, student: Student, client: TeacherClient | None) -> None:
        self._student, self._client = student, client
        self._texts = TokenTexts(student.tokenizer)
        self._one_forward = threading.Lock()  # requests ask the teacher side by side; the student is one
        self._checked: set[str] = set()  # teachers' tokenizer fingerprints that are ours

    def server(self, questions: Sequence[Question], k: int, adapter: Adapter | None = None) -> tuple[list[Scored], str]:
        """The teacher's view of each response, on its own top-K, and its model's id.

        Args:
            adapter: support: student, on the top-K of the student with this adapter instead.

        Raises:
            InvalidSpec: the student's top-K is wanted, and this teacher cannot score chosen ids.
            TeacherUnavailable: no answer; or this worker knows no teacher.
            TokenizerMismatch: its ids mean other tokens than ours.
            TeacherError: the sample is beyond its limits (its `reason` says which), or its answer is none.
        """
        if self._client is None:
            raise TeacherUnavailable("this worker has no teacher: set teacher.url in the chart, or teacher.mode Self")
        info = self._client.info()
        if info.tokenizer_fingerprint not in self._checked:
            if info.tokenizer_fingerprint != self._student.fingerprint:
                raise TokenizerMismatch(
                    f"the teacher {info.model} has another tokenizer than the student: vocabulary, merges and added "
                    "tokens must be equal; choose a teacher of the student's family, or teacher.mode Self"
                )
            self._checked.add(info.tokenizer_fingerprint)
        chosen = None
        if adapter is not None:
            if not info.chosen_ids:
                raise InvalidSpec(
                    "spec.teacher.support student: this teacher cannot score chosen ids (vLLM from 0.32 on, a GPU and "
                    "its V2 runner can); leave support out"
                )
            with self._one_forward:
                supports = self._student_topk(questions, [adapter] * len(questions), [k] * len(questions))
            chosen = [_known(ids, info.vocab_size) for ids in supports]
        asked = [(question.teacher.prefix_ids, question.teacher.response_ids) for question in questions]
        scores = self._client.score_batch(asked, k, chosen=chosen)
        return [Scored(torch.from_numpy(s.ids).long(), torch.from_numpy(s.logprobs)) for s in scores], info.model

    def self(self, questions: Sequence[Question], adapters: Sequence[Adapter], ks: Sequence[int]) -> list[Scored]:
        """The top-K of each response by the student with that question's adapter, scored after the teacher's prefix.

        The questions may be of several requests: each has its adapter and its K.
        """
        student = self._student
        supports = self._student_topk(questions, adapters, ks)
        scored: dict[int, Scored] = {}

        def take_scores(index: int, hidden: Tensor) -> None:
            scored[index] = Scored(supports[index], logprobs_from_hidden(hidden, student.head, supports[index]))

        student.map_hidden([question.teacher for question in questions], adapters, take_scores)
        return [scored[index] for index in range(len(questions))]

    def _student_topk(
        self, questions: Sequence[Question], adapters: Sequence[Adapter], ks: Sequence[int]
    ) -> list[Tensor]:
        """(N, K) ids of each response: the most likely ones of the student with that question's adapter."""
        supports: dict[int, Tensor] = {}

        def take(index: int, hidden: Tensor) -> None:
            supports[index], _ = topk_from_hidden(hidden, self._student.head, ks[index])  # (N, K)

        self._student.map_hidden([question.student for question in questions], adapters, take)
        return [supports[index] for index in range(len(questions))]

    def provided(
        self, questions: Sequence[Question], samples: Sequence[Sample], dropped: Sequence[int]
    ) -> tuple[list[Scored], str]:
        """What the samples bring along; `dropped` response tokens at the end of each were truncated.

        Raises:
            InvalidSpec: none, or of unknown shape.
            LogprobLengthMismatch, NonFiniteInput: not of this response, or no logprobs.
        """
        scored = []
        for index, (question, sample, rest) in enumerate(zip(questions, samples, dropped, strict=True)):
            where = f"samples[{index}].teacherLogprobs"
            if sample.teacher_logprobs is None:
                raise InvalidSpec(f"{where} is missing: teacher.mode Provided needs it in every sample")
            scored.append(parse(sample.teacher_logprobs, question.teacher.response_ids, rest, self._texts, where))
        return scored, ""


def _known(ids: Tensor, vocab_size: int | None) -> NDArray[np.int64]:
    """The ids with those that the teacher has no row for made padding."""
    kept: NDArray[np.int64] = ids.masked_fill(ids >= (vocab_size or 1 << 31), -1).cpu().numpy()
    return kept
