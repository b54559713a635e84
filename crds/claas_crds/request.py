"""DistillRequest (`dr`): feedback on a few responses, to become one training step on one adapter."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, StringConstraints

from claas_crds.model import (
    FORBIDDEN,
    Conditions,
    Model,
    ModelId,
    Name,
    ObjectName,
    Rule,
    StatusMessage,
    StatusModel,
    Timestamp,
    Uri,
    immutable,
    uri_rule,
)
from claas_crds.reasons import Outcome, Reason

MAX_SAMPLES: Final = 32
MAX_RESPONSE_TOKENS: Final = 8192
# Of samples inside the resource: etcd rewrites the whole object at every status patch.
MAX_INLINE_BYTES: Final = 16384
MAX_INLINE_MESSAGES: Final = 40  # more, and the API server reckons that the rule on MAX_INLINE_BYTES may cost too much
TOKEN_ID_BYTES: Final = 8  # what a number counts: about its length in JSON
LOGPROB_BYTES: Final = 20
# Of teacher.mode Self: measured in tests/learning, where 1 learns as far and 2 lowers D more reliably.
SELF_CONTRAST: Final = 2.0
# Of samples in an object that spec.payloadRef names.
MAX_PAYLOAD_SAMPLES: Final = 256
MAX_PAYLOAD_MESSAGES: Final = 1024
MAX_PAYLOAD_TEXT: Final = 1 << 20

# In the resource a text cannot be longer than all samples together may be; in a payload's object it can.
Text = Annotated[str, Field(max_length=MAX_PAYLOAD_TEXT, json_schema_extra={"maxLength": MAX_INLINE_BYTES})]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Logprob = Annotated[float, Field(le=1e-4)]


class Message(Model):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"] = Field(description="Whose turn it is.")
    content: Text = Field(description="What was said, without chat markup.")


class Sample(Model):
    """One response and what is known about it."""

    prompt: Text | None = Field(None, description="A single user turn. Either this or messages.")
    messages: list[Message] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PAYLOAD_MESSAGES,
        json_schema_extra={"maxItems": MAX_INLINE_MESSAGES},
        description="The conversation up to the response; its last turn is a user's or tool's. Either this or prompt.",
    )
    response: Text | None = Field(
        None, description="The model's answer as text, without chat markup. Either this or responseTokenIds."
    )
    response_token_ids: list[TokenId] | None = Field(
        None,
        min_length=1,
        max_length=MAX_RESPONSE_TOKENS,
        description="The model's answer as token ids of the base model's tokenizer; never re-encoded.",
    )
    finish_reason: Literal["stop", "length"] | None = Field(
        None,
        description="How the response ended; stop (or absent) appends the end-of-turn token once to a text response.",
    )
    feedback: Text | None = Field(
        None, description="What was said about the response, by a person or by the environment."
    )
    feedback_source: Literal["Person", "Environment"] = Field(
        "Person", description="Person: a neutral hindsight block. Environment: output of tests, compilers or tools."
    )
    solution: Text | None = Field(None, description="A better response, shown to the teacher only.")
    rollout_logprobs: list[Logprob] | None = Field(
        None,
        max_length=MAX_RESPONSE_TOKENS,
        description="Log-probabilities of the response's tokens when it was sampled, for importance ratios.",
    )
    teacher_logprobs: list[Any] | dict[str, Any] | None = Field(
        None,
        # Of any shape, so CEL cannot see it: its size inside the resource is checked by Python alone.
        json_schema_extra={
            "x-kubernetes-preserve-unknown-fields": True,
            "maxItems": MAX_INLINE_BYTES // len("0,"),
            "maxProperties": 64,
        },
        description="teacher.mode Provided: logprobs of the response by a teacher of your own. A list of floats, or an "
        "OpenAI legacy, Fireworks or vLLM prompt_logprobs payload.",
    )

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.prompt) != has(self.messages)",
            "a sample needs either prompt or messages, not both: set exactly one",
            ".prompt",
            lambda sample: (sample.prompt is None) != (sample.messages is None),
        ),
        Rule(
            "has(self.response) != has(self.responseTokenIds)",
            "a sample needs either response or responseTokenIds, not both: set exactly one",
            ".response",
            lambda sample: (sample.response is None) != (sample.response_token_ids is None),
        ),
        Rule(
            "!has(self.messages) || self.messages.exists(m, m.role == 'user')"
            " && self.messages[size(self.messages) - 1].role in ['user', 'tool']",
            "messages need a user turn, and must end with a user or tool turn: the response follows it",
            ".messages",
            lambda sample: (
                not sample.messages
                or (any(m.role == "user" for m in sample.messages) and sample.messages[-1].role in ("user", "tool"))
            ),
        ),
    )

    def inline_bytes(self) -> int:
        """What it counts towards MAX_INLINE_BYTES: texts in UTF-8, TOKEN_ID_BYTES and LOGPROB_BYTES a number."""
        texts = [self.prompt, self.response, self.feedback, self.solution, *(m.content for m in self.messages or [])]
        return (
            sum(len(text.encode()) for text in texts if text)
            + TOKEN_ID_BYTES * len(self.response_token_ids or [])
            + LOGPROB_BYTES * len(self.rollout_logprobs or [])
            + (0 if self.teacher_logprobs is None else len(json.dumps(self.teacher_logprobs, separators=(",", ":"))))
        )


_TEXT_BYTES_CEL = " + ".join(
    f"(has(s.{text}) ? size(bytes(s.{text})) : 0)" for text in ("prompt", "response", "feedback", "solution")
)
_INLINE_BYTES_CEL = (
    f"self.samples.map(s, {_TEXT_BYTES_CEL}"
    " + (has(s.messages) ? s.messages.map(m, size(bytes(m.content))).sum() : 0)"
    f" + (has(s.responseTokenIds) ? {TOKEN_ID_BYTES} * size(s.responseTokenIds) : 0)"
    f" + (has(s.rolloutLogprobs) ? {LOGPROB_BYTES} * size(s.rolloutLogprobs) : 0)).sum()"
)


class Payload(Model):
    """The object that spec.payloadRef names, as JSON."""

    samples: list[Sample] = Field(min_length=1, max_length=MAX_PAYLOAD_SAMPLES, description="Responses to learn from.")


class Training(Model):
    """Hyper-parameters of the step. Defaults are the published API's."""

    learning_rate: float = Field(1e-4, gt=0, le=1, description="AdamW learning rate of the step.")
    alpha: float = Field(
        0.5, ge=0, le=1, description="Divergence: 0 forward KL(q||p), 0.5 Jensen-Shannon, 1 reverse KL(p||q)."
    )
    clip_eps: float = Field(0.2, ge=0, le=10, description="PPO clip range of the importance ratio.")
    max_grad_norm: float = Field(
        1.0, gt=0, le=1e6, description="Gradients of the adapter are scaled down to this L2 norm."
    )
    jsd_reg_weight: float | None = Field(
        None,
        ge=0,
        le=1000,
        description="Weight of the divergence term; 0.5, or 1 with preset paper, or 0 when only chosen tokens' "
        "logprobs are Provided.",
    )
    pg_weight: float | None = Field(
        None, ge=0, le=1000, description="Weight of the policy-gradient term; 1, or 0 with preset paper."
    )
    teacher_top_k: int = Field(
        100,
        alias="teacherTopK",
        ge=1,
        le=100,
        description="Tokens of the vocabulary compared at each position; the rest is one bucket.",
    )
    inner_steps: int = Field(1, ge=1, le=16, description="Optimizer steps on the same samples.")
    advantage_clip: float = Field(
        10.0, gt=0, le=1000, description="Advantages are clamped to plus or minus this; clamps are counted."
    )
    anchor_kl_weight: float = Field(
        0.0, ge=0, le=1000, description="Weight of KL(adapter || base model), which holds the adapter near its base."
    )
    preset: Literal["default", "paper"] = Field(
        "default", description="paper: the divergence alone (pgWeight 0, jsdRegWeight 1)."
    )
    truncate_response: Literal["head"] | None = Field(
        None, description="head: keep a too long response's first tokens instead of refusing it."
    )

    def weights(self, *, chosen_only: bool = False) -> tuple[float, float]:
        """(pg_weight, jsd_reg_weight) after preset and defaults; `chosen_only`: lite data without a top-K."""
        pg, jsd = (0.0, 1.0) if self.preset == "paper" else (1.0, 0.0 if chosen_only else 0.5)
        return (
            pg if self.pg_weight is None else self.pg_weight,
            jsd if self.jsd_reg_weight is None else self.jsd_reg_weight,
        )


class Teacher(Model):
    """Whose distribution the student is pulled towards."""

    mode: Literal["Server", "Self", "Provided"] = Field(
        "Server",
        description="Server: the teacher Deployment. Self: the student itself, shown the feedback. Provided: "
        "samples[].teacherLogprobs.",
    )
    support: Literal["teacher", "student"] = Field(
        "teacher",
        description="Whose top-K tokens are compared. student needs a teacher that can score chosen ids, and is what "
        "mode Self always does.",
    )
    contrast: float | None = Field(
        None,
        ge=0,
        le=16,
        description="Mode Self, samples with a person's feedback: learn only what the words add. The target is "
        "p (q / q0)^contrast, with q0 the teacher shown words that say nothing. 2 when absent; 0: the target is q, as "
        "in the paper.",
    )

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "!has(self.contrast) || self.contrast == 0.0 || self.mode == 'Self'",
            "spec.teacher.contrast needs spec.teacher.mode Self: leave it out",
            ".contrast",
            lambda teacher: not teacher.contrast or teacher.mode == "Self",
        ),
    )

    def contrast_weight(self) -> float:
        """The contrast in effect; 0 when off."""
        if self.mode != "Self":
            return 0.0
        return SELF_CONTRAST if self.contrast is None else self.contrast


class AdapterRef(Model):
    """A LoraAdapter in the same namespace."""

    name: ObjectName = Field(description="Its metadata.name.")


class PayloadRef(Model):
    """Samples kept in the object store: larger or private."""

    uri: Uri = Field(description='JSON object {"samples": [...]} below a storage prefix of this namespace.')
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$", min_length=64, max_length=64)] = Field(
        description="Hex digest of the object's bytes."
    )
    cel: ClassVar[tuple[Rule, ...]] = (uri_rule("uri", "spec.payloadRef.uri", "PATH"),)


_ANOTHER = "create another DistillRequest"


class DistillRequestSpec(Model):
    """What to learn from, and how. Immutable but for `cancel`, which may become true."""

    adapter_ref: AdapterRef | None = Field(None, description="The adapter to train. Either this or loraUri.")
    lora_uri: Uri | None = Field(
        None, description="A bare version to train, without a LoraAdapter; the new version lies beside it."
    )
    base_model: ModelId | None = Field(
        None, description="With loraUri: the version's base model; the installation's default when absent."
    )
    pool: ObjectName | None = Field(
        None, description="With loraUri: the worker pool; the installation's default when absent."
    )
    samples: list[Sample] | None = Field(
        None,
        min_length=1,
        max_length=MAX_SAMPLES,
        description="Responses to learn from, together at most 16 KiB. Either this or payloadRef.",
    )
    payload_ref: PayloadRef | None = Field(
        None, description="Samples in the object store instead of inline. Either this or samples."
    )
    training: Training = Field(default_factory=Training, description="Hyper-parameters of the step.")
    teacher: Teacher = Field(default_factory=Teacher, description="Whose distribution the student is pulled towards.")
    priority: int = Field(
        0,
        ge=-1000,
        le=1000,
        description="Higher runs first inside the namespace; requests on one adapter keep their order.",
    )
    backoff_limit: int = Field(
        3, ge=0, le=10, description="Further attempts after a lost worker or a failed dependency."
    )
    active_deadline_seconds: int = Field(
        600, ge=1, le=86400, description="Time limit from the first claim, over all attempts."
    )
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, le=31536000, description="Delete this object so long after its end; absent: never."
    )
    cancel: bool = Field(False, description="Set to true to stop; loses to a result that was already reported.")

    # CEL cannot see a field of any shape, hence OpenAPI's own words for the rule without CEL below.
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"teacher": {"properties": {"mode": {"enum": ["Server", "Self"]}}}}},
                {"properties": {"samples": {"items": {"required": ["teacherLogprobs"]}}}},
            ]
        }
    )
    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "has(self.adapterRef) != has(self.loraUri)",
            "set exactly one of spec.adapterRef and spec.loraUri: the adapter to train, by name or by uri",
            ".adapterRef",
            lambda spec: (spec.adapter_ref is None) != (spec.lora_uri is None),
        ),
        Rule(
            "has(self.samples) != has(self.payloadRef)",
            "set exactly one of spec.samples and spec.payloadRef: what to learn from, inline or by uri",
            ".samples",
            lambda spec: (spec.samples is None) != (spec.payload_ref is None),
        ),
        uri_rule("loraUri", "spec.loraUri", "PATH/"),
        Rule(
            "!has(self.adapterRef) || !has(self.baseModel) && !has(self.pool)",
            "spec.baseModel and spec.pool go with spec.loraUri only: an adapter by name has its own",
            ".adapterRef",
            lambda spec: spec.adapter_ref is None or (spec.base_model is None and spec.pool is None),
        ),
        Rule(
            f"!has(self.samples) || {_INLINE_BYTES_CEL} <= {MAX_INLINE_BYTES}",
            f"spec.samples exceed {MAX_INLINE_BYTES} bytes together: put them into an object, named in spec.payloadRef",
            ".samples",
            lambda spec: inline_bytes(spec.samples or []) <= MAX_INLINE_BYTES,
            outcome=Reason.PAYLOAD_TOO_LARGE,
        ),
        Rule(
            None,
            "spec.teacher.mode Provided needs teacherLogprobs in every one of spec.samples",
            ".samples",
            lambda spec: (
                spec.teacher.mode != "Provided" or all(s.teacher_logprobs is not None for s in spec.samples or [])
            ),
        ),
        *(
            immutable(field, _ANOTHER)
            for field in (
                "adapterRef",
                "loraUri",
                "baseModel",
                "pool",
                "samples",
                "payloadRef",
                "training",
                "teacher",
                "priority",
                "backoffLimit",
                "activeDeadlineSeconds",
                "ttlSecondsAfterFinished",
            )
        ),
        Rule(
            "self.cancel || !oldSelf.cancel",
            f"spec.cancel cannot be taken back: {_ANOTHER}",
            ".cancel",
            reason=FORBIDDEN,
        ),
    )


def inline_bytes(samples: Sequence[Sample]) -> int:
    """Size of `samples` inside a resource, at most MAX_INLINE_BYTES: see `Sample.inline_bytes`."""
    return sum(sample.inline_bytes() for sample in samples)


class Metadata(StatusModel):
    """What the step did: the nine numbers of the published API, then extras. Sums are over unmasked response tokens."""

    total_loss: float = Field(description="pgLoss + jsdReg + anchor.")
    pg_loss: float = Field(description="Policy-gradient term, weighted.")
    jsd_reg: float = Field(description="Divergence term, weighted.")
    mean_advantage: float = Field(description="Mean signed advantage; at most 0 on-policy.")
    frac_positive_advantage: float = Field(description="Share of tokens the teacher likes better than the student.")
    mean_is_ratio: float = Field(description="Mean importance ratio, unclipped.")
    clip_fraction: float = Field(description="Share of ratios beyond the clip range.")
    grad_norm: float = Field(description="L2 norm of the adapter's gradients before clipping.")
    tokens_processed: int = Field(description="Unmasked response tokens.")
    anchor: float | None = Field(None, description="Anchor term, weighted; absent when off.")
    jsd: float | None = Field(None, description="Mean divergence, unweighted, in nats.")
    mean_abs_advantage: float | None = Field(None, description="Mean absolute advantage.")
    active_clip_fraction: float | None = Field(
        None, description="Share of tokens whose policy gradient the clip zeroed."
    )
    teacher_topk_mass: float | None = Field(None, description="Mean teacher mass on the compared tokens.")
    student_topk_mass: float | None = Field(None, description="Mean student mass on the compared tokens.")
    chosen_in_topk_fraction: float | None = Field(None, description="Share of response tokens among the compared ones.")
    student_entropy: float | None = Field(None, description="Mean entropy of the student in nats.")
    update_norm: float | None = Field(None, description="L2 norm of the change of the adapter's weights.")
    effective_learning_rate: float | None = Field(None, description="After warm-up.")
    optimizer_step: int | None = Field(None, description="Optimizer steps so far in this adapter's life.")
    optimizer_state: str | None = Field(
        None, max_length=128, description="resumed, fresh, or fresh with the reason why."
    )
    old_logprobs_source: str | None = Field(None, max_length=32, description="rollout or snapshot.")
    advantage_clamps: int | None = Field(None, description="Advantages that advantageClip bounded.")
    teacher_id: str | None = Field(None, max_length=253, description="Model that scored the response.")
    teacher_mode: str | None = Field(None, max_length=32, description="Server, Self or Provided.")
    teacher_contrast: float | None = Field(None, description="teacher.contrast in effect; absent when off.")
    truncated: bool | None = Field(None, description="Whether a response or a prompt was cut.")
    template_id: str | None = Field(None, max_length=64, description="Wording of the teacher's context, with version.")


class Timings(StatusModel):
    """Milliseconds by phase. queueMs counts from creation, which Kubernetes keeps to the second."""

    queue_ms: int | None = Field(
        None, description="Created to bound (within a second: creation times have no fractions)."
    )
    claim_ms: int | None = Field(None, description="Bound to claimed.")
    load_ms: int | None = Field(None, description="Adapter read from the store.")
    teacher_ms: int | None = Field(None, description="Teacher's scores.")
    step_ms: int | None = Field(None, description="Forward, backward, update.")
    save_ms: int | None = Field(None, description="New version written.")


class Parent(StatusModel):
    """The head that the request trains, as it was when bound."""

    adapter_uid: str = Field("", max_length=64, description="Empty for a bare loraUri.")
    uri: str = Field(max_length=1024, description="The version.")
    head_seq: int = Field(0, description="The adapter's headSeq.")


class Claim(StatusModel):
    """Written by the worker before anything is trained."""

    worker: Name = Field(description="Its Pod.")
    attempt: int = Field(ge=1, description="The attempt that it claims.")
    at: Timestamp = Field(description="When, in UTC.")


class Progress(StatusModel):
    """Where the attempt is: Loading, Scoring, Stepping, Saving; written by the worker at most once a second."""

    phase: Annotated[str, StringConstraints(max_length=32)] = Field(description="What is going on.")
    at: Timestamp = Field(description="Since when, in UTC.")


class Result(StatusModel):
    """The worker's report of one attempt."""

    attempt: int = Field(ge=1, description="The attempt that it ends.")
    outcome: Outcome = Field(description="How it ended.")
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Why, in one word.")
    message: StatusMessage = Field("", description="Why, in a sentence.")
    at: Timestamp = Field(description="When, in UTC.")
    lora_uri: str = Field("", max_length=1024, description="The version that it wrote (with NoSignal: the parent).")
    metadata: Metadata | None = Field(None, description="What the step did.")
    timings: Timings | None = Field(None, description="The worker's phases.")
    adapter_cached: bool | None = Field(
        None,
        description="Whether the worker still had the parent in memory, and did not read it from the store.",
    )
    gpu_ms: int | None = Field(
        None, description="Its share of the worker's time: claimed to reported, divided by all in one batched step."
    )


class DistillRequestStatus(StatusModel):
    """The operator writes everything but claim, progress and result, which are the bound worker's."""

    state: str = Field(
        "",
        max_length=32,
        description="One word for people, derived from the conditions: Pending, Assigned, Running, Complete, Failed, "
        "Cancelled.",
    )
    reason: str = Field("", max_length=64, description="Why it waits or has failed; empty while all is well.")
    worker: str = Field("", max_length=253, description="Pod that the request is bound to.")
    attempt: int = Field(0, description="Counts from 1; grows when an attempt was lost.")
    assigned_at: str = Field("", max_length=40, description="When this attempt was bound.")
    first_claim_at: str = Field("", max_length=40, description="activeDeadlineSeconds counts from here.")
    gpu_ms: int = Field(
        0, description="Worker time used, in ms, over all attempts that are over: fair shares and quotas go by it."
    )
    parent: Parent | None = Field(None, description="The version that this request trains.")
    conditions: Conditions = Field(default_factory=list, description="Accepted, Assigned, Complete, Failed.")
    observed_generation: int = Field(0, description="metadata.generation that this status answers.")
    lora_uri: str = Field(
        "", max_length=1024, description="The new version, once committed (with NoSignal: the parent)."
    )
    version: str = Field("", max_length=253, description="Name of the new version.")
    metadata: Metadata | None = Field(None, description="What the step did, once committed.")
    timings: Timings | None = Field(None, description="How long it took, once committed.")
    claim: Claim | None = Field(None, description="The worker runs this attempt.")
    progress: Progress | None = Field(None, description="Where the attempt is.")
    result: Result | None = Field(None, description="The worker's report of the attempt.")
