"""DistillRequest (`dr`): feedback on a few responses, to become one training step on one adapter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, StringConstraints

from claas_crds.adapter import URI_RULE
from claas_crds.model import Condition, Model, ModelId, Name, Rule, StatusModel, Text, Timestamp, Uri
from claas_crds.reasons import Outcome

MAX_SAMPLES = 32
MAX_INLINE_BYTES = 16384
MAX_RESPONSE_TOKENS = 8192

TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
Logprob = Annotated[float, Field(le=1e-4)]


class Message(Model):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


class Sample(Model):
    """One response and what is known about it."""

    prompt: Text | None = Field(None, description="A single user turn. Either this or messages.")
    messages: list[Message] | None = Field(None, min_length=1, max_length=64, description="The conversation up to the response; the last turn is the user's.")
    response: Text | None = Field(None, description="The model's answer as text, without chat markup. Either this or responseTokenIds.")
    response_token_ids: list[TokenId] | None = Field(
        None, min_length=1, max_length=MAX_RESPONSE_TOKENS,
        description="The model's answer as token ids of the base model's tokenizer; never re-encoded.",
    )
    finish_reason: Literal["stop", "length"] | None = Field(
        None, description="How the response ended; stop (or absent) appends the end-of-turn token once to a text response."
    )
    feedback: Text | None = Field(None, description="What was said about the response, by a person or by the environment.")
    feedback_source: Literal["Person", "Environment"] = Field(
        "Person", description="Person: a neutral hindsight block. Environment: output of tests, compilers or tools."
    )
    solution: Text | None = Field(None, description="A better response, shown to the teacher only.")
    rollout_logprobs: list[Logprob] | None = Field(
        None, max_length=MAX_RESPONSE_TOKENS, description="Log-probabilities of the response's tokens when it was sampled, for importance ratios."
    )
    teacher_logprobs: Any | None = Field(
        None,
        description="teacher.mode Provided: logprobs of the response by a teacher of your own. A list of floats, or an OpenAI legacy, Fireworks or vLLM prompt_logprobs payload.",
    )

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.prompt) != has(self.messages)", "a sample needs either prompt or messages, not both: set exactly one", ".prompt"),
        Rule("has(self.response) != has(self.responseTokenIds)", "a sample needs either response or responseTokenIds, not both: set exactly one", ".response"),
        Rule(
            "!has(self.messages) || self.messages[self.messages.size() - 1].role in ['user', 'tool']",
            "messages must end with a user or tool turn: the response follows it", ".messages",
        ),
    )


class Training(Model):
    """Hyper-parameters of the step. Defaults are the published API's."""

    learning_rate: float = Field(1e-4, gt=0, le=1, description="AdamW learning rate of the step, above 0.")
    alpha: float = Field(0.5, ge=0, le=1, description="Divergence: 0 forward KL(q||p), 0.5 Jensen-Shannon, 1 reverse KL(p||q).")
    clip_eps: float = Field(0.2, ge=0, le=10, description="PPO clip range of the importance ratio.")
    max_grad_norm: float = Field(1.0, gt=0, le=1e6, description="Gradients of the adapter are scaled down to this L2 norm.")
    jsd_reg_weight: float | None = Field(None, ge=0, le=1000, description="Weight of the divergence term; 0.5, or 1 with preset paper, or 0 when only chosen tokens' logprobs are Provided.")
    pg_weight: float | None = Field(None, ge=0, le=1000, description="Weight of the policy-gradient term; 1, or 0 with preset paper.")
    teacher_top_k: int = Field(100, alias="teacherTopK", ge=1, le=100, description="Tokens of the vocabulary compared at each position, 1 to 100; the rest is one bucket.")
    inner_steps: int = Field(1, ge=1, le=16, description="Optimizer steps on the same samples.")
    advantage_clip: float = Field(10.0, gt=0, le=1000, description="Advantages are clamped to plus or minus this; clamps are counted.")
    anchor_kl_weight: float = Field(0.0, ge=0, le=1000, description="Weight of KL(adapter || base model), which holds the adapter near its base.")
    preset: Literal["default", "paper"] = Field("default", description="paper: the divergence alone (pgWeight 0, jsdRegWeight 1).")
    truncate_response: Literal["head"] | None = Field(None, description="head: keep a too long response's first tokens instead of refusing it.")

    def weights(self, *, chosen_only: bool = False) -> tuple[float, float]:
        """(pg_weight, jsd_reg_weight) after preset and defaults; `chosen_only`: lite data without a top-K."""
        pg, jsd = (0.0, 1.0) if self.preset == "paper" else (1.0, 0.0 if chosen_only else 0.5)
        return (pg if self.pg_weight is None else self.pg_weight, jsd if self.jsd_reg_weight is None else self.jsd_reg_weight)


class Teacher(Model):
    """Whose distribution the student is pulled towards."""

    mode: Literal["Server", "Self", "Provided"] = Field(
        "Server", description="Server: the teacher Deployment. Self: the student itself, shown the feedback. Provided: samples[].teacherLogprobs."
    )
    support: Literal["teacher", "student"] = Field(
        "teacher", description="Whose top-K tokens are compared. student needs a teacher that can score chosen ids, and is what mode Self always does."
    )


class AdapterRef(Model):
    """A LoraAdapter in the same namespace."""

    name: Name


class PayloadRef(Model):
    """Samples kept in the object store: larger or private."""

    uri: Uri = Field(description="JSON object {\"samples\": [...]} below a storage prefix of this namespace.")
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$", min_length=64, max_length=64)] = Field(description="Hex digest of the object's bytes.")
    cel: ClassVar[tuple[Rule, ...]] = (
        Rule(URI_RULE.replace("self", "self.uri"), "spec.payloadRef.uri must be s3://BUCKET/PATH or file:///PATH", ".uri"),
    )


class DistillRequestSpec(Model):
    """What to learn from, and how. Immutable but for `cancel`, which may become true."""

    adapter_ref: AdapterRef | None = Field(None, description="The adapter to train. Either this or loraUri.")
    lora_uri: Uri | None = Field(None, description="A bare version to train, without a LoraAdapter; the new version lies beside it.")
    base_model: ModelId | None = Field(None, description="With loraUri: the version's base model; the installation's default when absent.")
    pool: Name | None = Field(None, description="With loraUri: the worker pool; the installation's default when absent.")
    samples: list[Sample] | None = Field(None, min_length=1, max_length=MAX_SAMPLES, description="Responses to learn from, together at most 16 KiB. Either this or payloadRef.")
    payload_ref: PayloadRef | None = Field(None, description="Samples in the object store instead of inline.")
    training: Training = Field(default_factory=Training, description="Hyper-parameters of the step.")
    teacher: Teacher = Field(default_factory=Teacher, description="Whose distribution the student is pulled towards.")
    priority: int = Field(0, ge=-1000, le=1000, description="Higher runs first inside the namespace; requests on one adapter keep their order.")
    backoff_limit: int = Field(3, ge=0, le=10, description="Further attempts after a lost worker or a failed dependency.")
    active_deadline_seconds: int = Field(600, ge=1, le=86400, description="Time limit from the first claim, over all attempts.")
    ttl_seconds_after_finished: int | None = Field(None, ge=0, le=31536000, description="Delete this object so long after its end; absent: never.")
    cancel: bool = Field(False, description="Set to true to stop; loses to a result that was already reported.")

    cel: ClassVar[tuple[Rule, ...]] = (
        Rule("has(self.adapterRef) != has(self.loraUri)", "set exactly one of spec.adapterRef and spec.loraUri: the adapter to train, by name or by uri", ".adapterRef"),
        Rule("has(self.samples) != has(self.payloadRef)", "set exactly one of spec.samples and spec.payloadRef: what to learn from, inline or by uri", ".samples"),
        Rule("!has(self.loraUri) || " + URI_RULE.replace("self", "self.loraUri"), "spec.loraUri must be s3://BUCKET/PATH/ or file:///PATH/", ".loraUri"),
        Rule(
            "!has(self.adapterRef) || (!has(self.baseModel) && !has(self.pool))",
            "spec.baseModel and spec.pool go with spec.loraUri only: an adapter by name has its own", ".baseModel",
        ),
        Rule(
            "!has(self.teacher) || !has(self.teacher.mode) || self.teacher.mode != 'Provided' || !has(self.samples) || self.samples.all(s, has(s.teacherLogprobs))",
            "teacher.mode Provided needs teacherLogprobs in every sample", ".samples",
        ),
    )


class Metadata(StatusModel):
    """What the step did: the nine numbers of the published API, then extras. Sums are over all unmasked response tokens."""

    total_loss: float = Field(description="pgLoss + jsdReg + anchor.")
    pg_loss: float = Field(description="Policy-gradient term, weighted.")
    jsd_reg: float = Field(description="Divergence term, weighted.")
    mean_advantage: float = Field(description="Mean signed advantage; at most 0 on-policy.")
    frac_positive_advantage: float = Field(description="Share of tokens that the teacher likes better than the student.")
    mean_is_ratio: float = Field(description="Mean importance ratio, unclipped.")
    clip_fraction: float = Field(description="Share of ratios beyond the clip range.")
    grad_norm: float = Field(description="L2 norm of the adapter's gradients before clipping.")
    tokens_processed: int = Field(description="Unmasked response tokens.")
    anchor: float | None = Field(None, description="Anchor term, weighted; absent when off.")
    jsd: float | None = Field(None, description="Mean divergence, unweighted, in nats.")
    mean_abs_advantage: float | None = None
    active_clip_fraction: float | None = Field(None, description="Share of tokens whose policy gradient the clip zeroed.")
    teacher_topk_mass: float | None = Field(None, description="Mean teacher mass on the compared tokens.")
    student_topk_mass: float | None = Field(None, description="Mean student mass on the compared tokens.")
    chosen_in_topk_fraction: float | None = Field(None, description="Share of response tokens among the compared ones.")
    student_entropy: float | None = Field(None, description="Mean entropy of the student in nats.")
    update_norm: float | None = Field(None, description="L2 norm of the change of the adapter's weights.")
    effective_learning_rate: float | None = Field(None, description="After warm-up.")
    optimizer_step: int | None = Field(None, description="Optimizer steps so far in this adapter's life.")
    optimizer_state: str | None = Field(None, max_length=128, description="resumed, fresh, or fresh with the reason why.")
    old_logprobs_source: str | None = Field(None, max_length=32, description="rollout or snapshot.")
    advantage_clamps: int | None = None
    teacher_id: str | None = Field(None, max_length=253)
    teacher_mode: str | None = Field(None, max_length=32)
    truncated: bool | None = None
    template_id: str | None = Field(None, max_length=64)


class Timings(StatusModel):
    """Milliseconds by phase. queueMs counts from creation, which Kubernetes keeps to the second."""

    queue_ms: int | None = Field(None, description="Created to bound (within a second: creation times have no fractions).")
    claim_ms: int | None = Field(None, description="Bound to claimed.")
    load_ms: int | None = Field(None, description="Adapter read from the store.")
    teacher_ms: int | None = Field(None, description="Teacher's scores.")
    step_ms: int | None = Field(None, description="Forward, backward, update.")
    save_ms: int | None = Field(None, description="New version written.")


class Parent(StatusModel):
    """The head that the request trains, as it was when bound."""

    adapter_uid: str = Field("", max_length=64, description="Empty for a bare loraUri.")
    uri: str = Field(max_length=1024)
    head_seq: int = 0


class Claim(StatusModel):
    """Written by the worker before anything is trained."""

    worker: Name
    attempt: int = Field(ge=1)
    at: Timestamp


class Progress(StatusModel):
    """Where the attempt is: Loading, Scoring, Stepping, Saving; written by the worker at most once a second."""

    phase: Annotated[str, StringConstraints(max_length=32)]
    at: Timestamp


class Result(StatusModel):
    """The worker's report of one attempt."""

    attempt: int = Field(ge=1)
    outcome: Outcome
    reason: Annotated[str, StringConstraints(max_length=64)]
    message: Annotated[str, StringConstraints(max_length=1024)] = ""
    at: Timestamp
    lora_uri: str = Field("", max_length=1024)
    metadata: Metadata | None = None
    timings: Timings | None = None


class DistillRequestStatus(StatusModel):
    """The operator writes everything but claim, progress and result, which are the bound worker's."""

    state: str = Field("", max_length=32, description="One word for people, derived from the conditions: Pending, Assigned, Running, Complete, Failed, Cancelled.")
    reason: str = Field("", max_length=64, description="Why it waits or has failed; empty while all is well.")
    worker: str = Field("", max_length=253, description="Pod that the request is bound to.")
    attempt: int = Field(0, description="Counts from 1; grows when an attempt was lost.")
    assigned_at: str = Field("", max_length=40, description="When this attempt was bound.")
    first_claim_at: str = Field("", max_length=40, description="activeDeadlineSeconds counts from here.")
    parent: Parent | None = Field(None, description="The version that this request trains.")
    conditions: list[Condition] = Field(default_factory=list, max_length=16, description="Accepted, Assigned, Complete, Failed.")
    observed_generation: int = 0
    lora_uri: str = Field("", max_length=1024, description="The new version, once committed (with NoSignal: the parent).")
    version: str = Field("", max_length=253, description="Name of the new version.")
    metadata: Metadata | None = None
    timings: Timings | None = None
    claim: Claim | None = None
    progress: Progress | None = None
    result: Result | None = None


# On the resource as a whole: transition rules compare with the object before.
IMMUTABLE_SPEC: tuple[Rule, ...] = (
    Rule(
        "self.cancel == oldSelf.cancel || self.cancel",
        "spec.cancel cannot be taken back: create another DistillRequest", ".cancel",
    ),
)
FROZEN_FIELDS = ("adapterRef", "loraUri", "baseModel", "pool", "samples", "payloadRef", "training", "teacher", "priority",
                 "backoffLimit", "activeDeadlineSeconds", "ttlSecondsAfterFinished")


@dataclass(frozen=True)
class PrinterColumn:
    """A column of `kubectl get`."""

    name: str
    json_path: str
    type: str = "string"
    wide: bool = False
