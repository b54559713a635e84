"""Why a step refused: one named error per guard, each with its reason of the API.

A guard error ends an attempt as a *result* (`status.result.reason`), never the worker's process. `retryable` says that
the same attempt may do later, because a dependency failed and not the request. Messages name the field and the fix;
they hold counts, positions and limits, and never text, ids or logprobs of a sample.
"""

from __future__ import annotations

from typing import ClassVar

from claas_crds.reasons import Reason


class GuardError(Exception):
    """A step that must not go on. Subclasses set `reason`; nothing of the attempt becomes a version."""

    reason: ClassVar[Reason]
    retryable: ClassVar[bool] = False


class EmptyResponse(GuardError):
    """No response token to learn from."""

    reason = Reason.EMPTY_RESPONSE


class ResponseTooLong(GuardError):
    """A response exceeds its token limit and `truncateResponse` is not set."""

    reason = Reason.RESPONSE_TOO_LONG


class PromptTooLong(GuardError):
    """A prefix exceeds its token limit even with the whole feedback and solution cut out."""

    reason = Reason.PROMPT_TOO_LONG


class LogprobLengthMismatch(GuardError):
    """Logprobs (rollout's or teacher's) do not match the response token by token."""

    reason = Reason.LOGPROB_LENGTH_MISMATCH


class NonFiniteInput(GuardError):
    """NaN, a logprob above zero, teacher mass above one, or logits without a finite log-probability."""

    reason = Reason.NON_FINITE_INPUT


class NonFiniteLoss(GuardError):
    """The loss is not finite."""

    reason = Reason.NON_FINITE_LOSS


class NonFiniteGrad(GuardError):
    """A gradient is not finite."""

    reason = Reason.NON_FINITE_GRAD


class NonFiniteWeights(GuardError):
    """A weight is not finite after the update (checked before the save)."""

    reason = Reason.NON_FINITE_WEIGHTS


class TokenizerMismatch(GuardError):
    """Ids that the student has no row for, or a teacher with another vocabulary, merges or added tokens."""

    reason = Reason.TOKENIZER_MISMATCH


class AdapterInvalid(GuardError):
    """The parent version does not fit: base model, rank, keys, shapes or file format."""

    reason = Reason.ADAPTER_INVALID


class PayloadInvalid(GuardError):
    """The object behind `payloadRef` is missing, has another digest or does not fit the schema."""

    reason = Reason.PAYLOAD_INVALID


class VersionConflict(GuardError):
    """An object of ours already lies at the new version's uri: the next attempt takes another suffix."""

    reason = Reason.VERSION_CONFLICT
    retryable = True


class TeacherUnavailable(GuardError):
    """The teacher does not answer, or answers 401, 429 or 5xx."""

    reason = Reason.TEACHER_UNAVAILABLE
    retryable = True


class StorageUnavailable(GuardError):
    """The object store does not answer or fails."""

    reason = Reason.STORAGE_UNAVAILABLE
    retryable = True


class InternalError(GuardError):
    """An error of our own: the attempt ends as a result and the worker serves on."""

    reason = Reason.INTERNAL_ERROR
