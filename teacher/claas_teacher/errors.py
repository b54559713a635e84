"""What can go wrong between the worker and the teacher, each with the reason that the API shows for it.

`reason` is a word of `claas_crds.reasons.Reason`, spelled here because the client stands alone; `retryable` says that
the same scoring may do later, because the teacher failed and not the request; `status` is the HTTP status under which
the server says it. Messages hold counts, positions and limits, never ids, text or logprobs of a sample.
"""

from __future__ import annotations


class TeacherError(Exception):
    """A scoring that gave no numbers."""

    reason: str = "InternalError"
    retryable: bool = False
    status: int = 500

    def __init__(self, message: str, reason: str | None = None, status: int | None = None) -> None:
        super().__init__(message)
        if reason is not None:
            self.reason = reason
        if status is not None:
            self.status = status


class TeacherUnavailable(TeacherError):
    """No answer, not yet ready, overloaded, or it does not let us in: waiting or its owner mends that."""

    reason = "TeacherUnavailable"
    retryable = True
    status = 503


class QueueFull(TeacherUnavailable):
    """More tokens wait already than the teacher takes on; `retry_after_seconds` says when there should be room."""

    status = 429

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class TeacherAnswerInvalid(TeacherError):
    """An answer of the wrong shape: cut, no frame, rows that are missing or not of the sample that was sent."""

    reason = "TeacherUnavailable"
    retryable = True


class TeacherRefused(TeacherError):
    """The sample cannot be scored by this teacher, now or later; `reason` says which bound it breaks."""

    status = 422


class FrameInvalid(TeacherRefused):
    """A request that is none: cut, too long, or its counts are not those of its bytes."""

    status = 400


class TeacherNonFinite(TeacherError):
    """The teacher's logprobs hold NaN or values above zero."""

    reason = "NonFiniteInput"
