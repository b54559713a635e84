"""Reasons and condition types: part of the API, written by the operator and the worker, matched by people's scripts."""

from __future__ import annotations

from enum import StrEnum


class ConditionType(StrEnum):
    """Condition types of both resources."""

    ACCEPTED = "Accepted"  # DistillRequest: the request may run at all
    ASSIGNED = "Assigned"  # DistillRequest: a worker holds it
    COMPLETE = "Complete"  # DistillRequest: ended well (terminal)
    FAILED = "Failed"  # DistillRequest: ended without a step (terminal)
    READY = "Ready"  # LoraAdapter: has a head that requests can train
    UPDATING = "Updating"  # LoraAdapter: a request or an operation holds it
    ROLLED_BACK = "RolledBack"  # LoraAdapter: spec.rollbackTo was done (True), or waits or was refused (False)
    COLLECTED = "Collected"  # LoraAdapter: versions beyond retention are gone (True), or are going (False)


class Outcome(StrEnum):
    """What a worker reports of one attempt (`status.result.outcome`)."""

    SUCCEEDED = "Succeeded"  # a new version is durable
    NO_SIGNAL = "NoSignal"  # nothing to learn: no version written, the parent stands
    FAILED = "Failed"  # bad input; trying again would fail alike
    RETRYABLE = "Retryable"  # a dependency failed; another attempt may do


class Cause(StrEnum):
    """What moved an adapter's head (`status.history[].cause`)."""

    CREATED = "Created"
    ADOPTED = "Adopted"
    FORKED = "Forked"
    TRAINED = "Trained"
    ROLLED_BACK = "RolledBack"


class Reason(StrEnum):
    """Why a condition is what it is. `describe` has the sentence for people."""

    # Waiting
    PENDING = "Pending"
    NO_CAPACITY = "NoCapacity"
    ADAPTER_BUSY = "AdapterBusy"
    ADAPTER_NOT_READY = "AdapterNotReady"
    ADAPTER_NOT_FOUND = "AdapterNotFound"
    TEACHER_UNAVAILABLE = "TeacherUnavailable"
    STORAGE_UNAVAILABLE = "StorageUnavailable"
    QUOTA_EXCEEDED = "QuotaExceeded"
    WORKER_LOST = "WorkerLost"
    # Working
    ACCEPTED = "Accepted"
    BOUND = "Bound"
    CLAIMED = "Claimed"
    # Ended well
    SUCCEEDED = "Succeeded"
    NO_SIGNAL = "NoSignal"
    # Ended without a step: the operator's word
    CANCELLED = "Cancelled"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    BACKOFF_LIMIT_EXCEEDED = "BackoffLimitExceeded"
    ADAPTER_GONE = "AdapterGone"
    STORAGE_DENIED = "StorageDenied"
    UNKNOWN_POOL = "UnknownPool"
    BASE_MODEL_MISMATCH = "BaseModelMismatch"
    PAYLOAD_TOO_LARGE = "PayloadTooLarge"
    INVALID_SPEC = "InvalidSpec"
    # Ended without a step: the worker's word
    EMPTY_RESPONSE = "EmptyResponse"
    RESPONSE_TOO_LONG = "ResponseTooLong"
    PROMPT_TOO_LONG = "PromptTooLong"
    LOGPROB_LENGTH_MISMATCH = "LogprobLengthMismatch"
    NON_FINITE_INPUT = "NonFiniteInput"
    NON_FINITE_LOSS = "NonFiniteLoss"
    NON_FINITE_GRAD = "NonFiniteGrad"
    NON_FINITE_WEIGHTS = "NonFiniteWeights"
    TOKENIZER_MISMATCH = "TokenizerMismatch"
    ADAPTER_INVALID = "AdapterInvalid"
    PAYLOAD_INVALID = "PayloadInvalid"
    VERSION_CONFLICT = "VersionConflict"  # an earlier attempt's object is there: the next takes another suffix
    INTERNAL_ERROR = "InternalError"
    # LoraAdapter
    CREATING = "Creating"
    CREATED = "Created"
    CREATE_FAILED = "CreateFailed"
    TRAINING = "Training"
    IDLE = "Idle"
    DELETING = "Deleting"
    ROLLED_BACK = "RolledBack"
    VERSION_UNKNOWN = "VersionUnknown"
    VERSION_COLLECTED = "VersionCollected"
    COLLECTING = "Collecting"
    COLLECTED = "Collected"
    VERSIONS_LEFT = "VersionsLeft"
    SWEPT = "Swept"


# Dependency failures: the attempt was nobody's fault, so the operator waits for the dependency before the next one.
DEPENDENCY_REASONS = frozenset({Reason.TEACHER_UNAVAILABLE, Reason.STORAGE_UNAVAILABLE})

_SENTENCES: dict[Reason, str] = {
    Reason.PENDING: "waits for the operator's next decision",
    Reason.NO_CAPACITY: "every worker of the pool is busy or still starting",
    Reason.ADAPTER_BUSY: "an earlier request on the same adapter has not ended",
    Reason.ADAPTER_NOT_READY: "the adapter has no version yet",
    Reason.ADAPTER_NOT_FOUND: "spec.adapterRef.name names no LoraAdapter in this namespace; the request waits for it",
    Reason.TEACHER_UNAVAILABLE: "the teacher does not answer; the request goes on when it does",
    Reason.STORAGE_UNAVAILABLE: "the object store does not answer; the request goes on when it does",
    Reason.QUOTA_EXCEEDED: "the namespace has used up its quota",
    Reason.WORKER_LOST: "the worker that held the request is gone; the request runs again",
    Reason.ACCEPTED: "the request is valid and queued",
    Reason.BOUND: "a worker was chosen",
    Reason.CLAIMED: "the worker runs it",
    Reason.SUCCEEDED: "a new version was committed",
    Reason.NO_SIGNAL: "student and teacher agree: nothing to learn, the parent version stands",
    Reason.CANCELLED: "spec.cancel was set",
    Reason.DEADLINE_EXCEEDED: "spec.activeDeadlineSeconds passed since the first claim",
    Reason.BACKOFF_LIMIT_EXCEEDED: "spec.backoffLimit attempts failed",
    Reason.ADAPTER_GONE: "the adapter that the request was bound to was deleted",
    Reason.STORAGE_DENIED: "the uri lies outside the storage prefixes of this namespace",
    Reason.UNKNOWN_POOL: "spec.pool names no pool of this installation",
    Reason.BASE_MODEL_MISMATCH: "the pool's workers hold another base model than the adapter needs",
    Reason.PAYLOAD_TOO_LARGE: "the samples exceed the inline bound; put them into an object, named in spec.payloadRef",
    Reason.INVALID_SPEC: "the stored object does not fit this release's schema; the message names the field",
    Reason.EMPTY_RESPONSE: "a sample's response has no tokens",
    Reason.RESPONSE_TOO_LONG: "a response exceeds the worker's token limit; shorten it or set truncateResponse: head",
    Reason.PROMPT_TOO_LONG: "a prompt exceeds the worker's token limit even without its feedback",
    Reason.LOGPROB_LENGTH_MISMATCH: "given logprobs do not match the response token by token",
    Reason.NON_FINITE_INPUT: "given or scored logprobs hold NaN or values above zero",
    Reason.NON_FINITE_LOSS: "the loss was not finite; nothing was saved",
    Reason.NON_FINITE_GRAD: "a gradient was not finite; nothing was saved",
    Reason.NON_FINITE_WEIGHTS: "the step made weights that are not finite; nothing was saved",
    Reason.TOKENIZER_MISMATCH: "teacher and student do not share a tokenizer",
    Reason.ADAPTER_INVALID: "the version in the store does not fit the base model (keys, shapes, rank or format)",
    Reason.PAYLOAD_INVALID: "spec.payloadRef's object is missing, has another sha256 or does not fit the schema",
    Reason.VERSION_CONFLICT: "an earlier attempt's objects lie at the new version's uri; the next takes another",
    Reason.INTERNAL_ERROR: "the worker met an error of its own; its log says more",
    Reason.CREATING: "the first version is being written",
    Reason.CREATED: "the adapter has a version",
    Reason.CREATE_FAILED: "the first version could not be written; the message says why",
    Reason.TRAINING: "a request holds the adapter",
    Reason.IDLE: "nothing holds the adapter",
    Reason.DELETING: "the adapter is being deleted",
    Reason.ROLLED_BACK: "spec.rollbackTo is the head again, or was when it was set",
    Reason.VERSION_UNKNOWN: "spec.rollbackTo names no version of status.history; nothing was moved",
    Reason.VERSION_COLLECTED: "the version that is named (rollbackTo, initFrom, loraUri) was collected, or is being",
    Reason.COLLECTING: "versions beyond spec.retention are being deleted from the store",
    Reason.COLLECTED: "the versions beyond spec.retention were deleted from the store",
    Reason.VERSIONS_LEFT: "the adapter was deleted, but its versions stay in the store; the message says why and where",
    Reason.SWEPT: "interrupted uploads and orphan versions were deleted from the store",
}


def describe(reason: Reason) -> str:
    """The sentence that explains `reason` to a user; every reason has one."""
    return _SENTENCES[reason]


def table() -> str:
    """Every reason and its sentence, as markdown."""
    rows = [f"| `{reason}` | {describe(reason)} |" for reason in Reason]
    return "\n".join(["| reason | means |", "|---|---|", *rows])
