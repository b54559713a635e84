"""The teacher's side of a step, by `spec.teacher.mode`: for each response a support and its logprobs.

Server: the teacher Deployment's top-K after the context that holds the feedback. Self: the student itself, with its
adapter, shown that context and asked about its own top-K, as in the paper; by default contrasted with what it thinks
when the feedback says nothing (`contrasted`). Provided: what the request brings along.
"""

from __future__ import annotations

import math
import threading
import time
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
from claas_worker.sdpo import TAIL_FLOOR, logprobs_from_hidden, topk_from_hidden
from claas_worker.student import Context, Student

__all__ = ["Question", "Scored", "Scorer", "contrasted"]


class Question(NamedTuple):
    """One sample as both sides see it: the same response after the student's and after the teacher's prefix."""

    student: Context
    teacher: Context
    neutral: tuple[Context, ...] = ()  # the teacher's, with words that say nothing in place of a person's feedback


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

    def server(
        self,
        questions: Sequence[Question],
        k: int,
        adapter: Adapter | None = None,
        *,
        within_seconds: float = math.inf,
    ) -> tuple[list[Scored], str]:
        """The teacher's view of each response, on its own top-K, and its model's id.

        Args:
            adapter: support: student, on the top-K of the student with this adapter instead.
            within_seconds: nobody waits for the request any longer; the client's own limit holds besides.

        Raises:
            InvalidSpec: the student's top-K is wanted, and this teacher cannot score chosen ids.
            TeacherUnavailable: no answer; or this worker knows no teacher.
            TokenizerMismatch: its ids mean other tokens than ours.
            TeacherError: the sample is beyond its limits (its `reason` says which), or its answer is none.
        """
        if self._client is None:
            raise TeacherUnavailable("this worker has no teacher: set teacher.url in the chart, or teacher.mode Self")
        end = time.monotonic() + min(self._client.timeout_s, within_seconds)
        info = self._client.info(timeout_s=end - time.monotonic())
        if info.tokenizer_fingerprint not in self._checked:
            if info.tokenizer_fingerprint is None:
                raise TokenizerMismatch(
                    f"the teacher {info.model} does not say which tokenizer it has: run it as python -m claas_teacher, "
                    "on a model with a fast tokenizer"
                )
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
                own = self._student_topk(questions, [adapter] * len(questions), [k] * len(questions))
            chosen = [_known(one.support_ids, info.vocab_size) for one in own]
        asked = [(question.teacher.prefix_ids, question.teacher.response_ids) for question in questions]
        scores = self._client.score_batch(asked, k, chosen=chosen, timeout_s=end - time.monotonic())
        return [Scored(torch.from_numpy(s.ids).long(), torch.from_numpy(s.logprobs)) for s in scores], info.model

    def self(
        self, questions: Sequence[Question], adapters: Sequence[Adapter], ks: Sequence[int], contrasts: Sequence[float]
    ) -> list[Scored]:
        """The top-K of each response by the student with that question's adapter, scored after the teacher's prefix.

        The questions may be of several requests: each has its adapter, its K and its contrast (0: none).
        """
        student = self._student
        own = self._student_topk(questions, adapters, ks)
        asked = [
            (index, context)
            for index, (question, contrast) in enumerate(zip(questions, contrasts, strict=True))
            for context in (question.teacher, *(question.neutral if contrast else ()))
        ]
        views: dict[int, Tensor] = {}  # (N, K) by place in `asked`

        def take(place: int, hidden: Tensor) -> None:
            views[place] = logprobs_from_hidden(hidden, student.head, own[asked[place][0]].support_ids)

        student.map_hidden([context for _, context in asked], [adapters[index] for index, _ in asked], take)
        scored = []
        for index, (support, log_p, _) in enumerate(own):
            shown, *neutral = (views[place] for place, (whose, _) in enumerate(asked) if whose == index)
            target = contrasted(log_p, shown, neutral, contrasts[index]) if neutral else shown
            scored.append(Scored(support, target))
        return scored

    def _student_topk(
        self, questions: Sequence[Question], adapters: Sequence[Adapter], ks: Sequence[int]
    ) -> list[Scored]:
        """Of each response the likeliest ids (N, K) of the student with that question's adapter, and their log p."""
        own: dict[int, Scored] = {}

        def take(index: int, hidden: Tensor) -> None:
            own[index] = Scored(*topk_from_hidden(hidden, self._student.head, ks[index]))

        self._student.map_hidden([question.student for question in questions], adapters, take)
        return [own[index] for index in range(len(questions))]

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


def contrasted(log_p: Tensor, shown: Tensor, neutral: Sequence[Tensor], weight: float) -> Tensor:
    """log of p (q / q0)^weight, normalised: the student, moved by what the feedback's words add to the teacher's view.

    q0 is the geometric mean of the teacher's views under words that say nothing. So what any hindsight block does to
    the model, whatever is said in it, is not learned; where feedback adds nothing, the target is the student itself.

    Args:
        log_p, shown, each of neutral: (N, K) logprobs of the same ids by student and teacher; what they lack to 1 is
            the tail, which is a bucket like the others.
    """
    p, q, *others = (_with_tail(view) for view in (log_p, shown, *neutral))  # (N, K+1)
    q0 = torch.stack(others).mean(0)
    return (p + weight * (q - q0)).log_softmax(-1)[:, :-1].to(log_p.dtype)


def _with_tail(logprobs: Tensor) -> Tensor:
    """(N, K+1) in float64: the tail is one more column."""
    ids = logprobs.double()
    return torch.cat([ids, (1 - ids.exp().sum(-1, keepdim=True)).clamp_min(TAIL_FLOOR).log()], -1)


def _known(ids: Tensor, vocab_size: int | None) -> NDArray[np.int64]:
    """The ids with those that the teacher has no row for made padding."""
    kept: NDArray[np.int64] = ids.masked_fill(ids >= (vocab_size or 1 << 31), -1).cpu().numpy()
    return kept
