"""What the REST API takes, as typed dicts, and what it answers, as models that ignore what a newer server adds.

Field by field these are the server's own (a test compares them with its OpenAPI document): names are snake_case, times
RFC 3339 in UTC, durations milliseconds.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeAlias, TypedDict, TypeVar

from pydantic import BaseModel, ConfigDict, Field

# What is sent

TeacherLogprobs: TypeAlias = Sequence[Any] | Mapping[str, Any]


class Message(TypedDict):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str


class Sample(TypedDict, total=False):
    """One response and what is known about it: prompt or messages; response or response_token_ids; more if known."""

    prompt: str
    messages: Sequence[Message]
    response: str
    response_token_ids: Sequence[int]
    finish_reason: Literal["stop", "length"]
    feedback: str
    feedback_source: Literal["Person", "Environment"]
    solution: str
    rollout_logprobs: Sequence[float]


class LiteSample(Sample, total=False):
    """A sample whose teacher has been asked already."""

    teacher_logprobs: TeacherLogprobs


class Training(TypedDict, total=False):
    """Hyper-parameters of the step; each has a default at the server."""

    learning_rate: float
    alpha: float
    clip_eps: float
    max_grad_norm: float
    jsd_reg_weight: float
    pg_weight: float
    teacher_top_k: int
    inner_steps: int
    advantage_clip: float
    anchor_kl_weight: float
    preset: Literal["default", "paper"]
    truncate_response: Literal["head"]


class Teacher(TypedDict, total=False):
    """Whose distribution the student is pulled towards."""

    mode: Literal["Server", "Self"]
    support: Literal["teacher", "student"]
    contrast: float


class DistillBody(Sample, total=False):
    """Of `distill`: lora_uri or adapter; a single sample's fields, or samples."""

    lora_uri: str
    adapter: str
    base_model: str
    pool: str
    training: Training
    priority: int
    samples: Sequence[Sample]
    teacher: Teacher


class LiteBody(LiteSample, total=False):
    """Of `distill_lite`: as DistillBody, with the teacher's log-probabilities given."""

    lora_uri: str
    adapter: str
    base_model: str
    pool: str
    training: Training
    priority: int
    samples: Sequence[LiteSample]


class InitOptions(TypedDict, total=False):
    """Of `init_lora`, beside output_uri."""

    base_model: str
    lora_r: int
    lora_alpha: float
    target_modules: Sequence[str]
    init_from: str
    name: str


# What is answered


class Answer(BaseModel):
    """A part of an answer."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Numbers(Answer):
    """The nine numbers of a step. Sums are over the response's tokens; total_loss = pg_loss + jsd_reg (+ anchor)."""

    total_loss: float
    pg_loss: float
    jsd_reg: float
    mean_advantage: float
    frac_positive_advantage: float
    mean_is_ratio: float
    clip_fraction: float
    grad_norm: float
    tokens_processed: int


class Metadata(Numbers):
    """The nine numbers, and what else is known of the step."""

    anchor: float | None = None
    jsd: float | None = None
    mean_abs_advantage: float | None = None
    active_clip_fraction: float | None = None
    teacher_topk_mass: float | None = None
    student_topk_mass: float | None = None
    chosen_in_topk_fraction: float | None = None
    student_entropy: float | None = None
    update_norm: float | None = None
    effective_learning_rate: float | None = None
    optimizer_step: int | None = None
    optimizer_state: str | None = None
    old_logprobs_source: str | None = None
    advantage_clamps: int | None = None
    teacher_id: str | None = None
    teacher_mode: str | None = None
    teacher_contrast: float | None = None
    truncated: bool | None = None
    template_id: str | None = None


class Timings(Answer):
    """Milliseconds by phase."""

    queue_ms: int | None = None
    claim_ms: int | None = None
    load_ms: int | None = None
    teacher_ms: int | None = None
    step_ms: int | None = None
    save_ms: int | None = None


class Distilled(Answer):
    """A step was made. With nothing to learn, lora_uri is the version that was to be trained."""

    lora_uri: str
    metadata: Numbers


class Initialised(Answer):
    """The adapter has its first version."""

    lora_uri: str


FINAL_STATES = frozenset({"Complete", "Failed", "Cancelled"})


class Place(Answer):
    """Where a request stands among those of all tenants; true for a moment.

    Attributes:
        position: 1 is the next to be given to a worker; 0: a worker has it.
        ahead: requests that begin before it and have not ended, the running ones included.
        starts_in_seconds: at the earliest; None: nothing is known to judge by.
        ends_in_seconds: the same of its end.
        note: what the numbers leave out.
    """

    position: int
    ahead: int = 0
    starts_in_seconds: float | None = None
    ends_in_seconds: float | None = None
    note: str = ""


class Request(Answer):
    """A request: where it is, and how it ended. Never what it holds."""

    id: str
    namespace: str = ""
    state: str = "Pending"
    reason: str = ""
    message: str = ""
    phase: str = ""
    created_at: str = ""
    ended_at: str | None = None
    adapter: str | None = None
    parent_uri: str | None = None
    lora_uri: str | None = None
    version: str | None = None
    worker: str | None = None
    attempt: int = 0
    priority: int = 0
    cancelled: bool = False
    metadata: Metadata | None = None
    timings: Timings | None = None
    place: Place | None = None

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen to it."""
        return self.state in FINAL_STATES


class Adapter(Answer):
    """An adapter and its head."""

    name: str
    namespace: str = ""
    base_model: str = ""
    lora_r: int = 0
    lora_alpha: float = 0.0
    target_modules: list[str] = Field(default_factory=list)
    storage_uri: str = ""
    init_from: str | None = None
    lora_uri: str | None = None
    version: str | None = None
    head_seq: int = 0
    ready: bool = False
    reason: str = ""
    message: str = ""
    active_request: str | None = None
    steps: int = 0
    tokens: int = 0
    created_at: str = ""


class Version(Answer):
    """One move of an adapter's head."""

    seq: int
    version: str
    lora_uri: str
    request_uid: str | None = None
    at: str = ""
    head: bool = False


class Lineage(Answer):
    """A version and its ancestors, each trained on the next.

    Attributes:
        complete: whether the last one is the adapter's first; older history may be forgotten.
        init_from: what the adapter's first version was made from, if anything.
    """

    items: list[Version]
    complete: bool = False
    init_from: str | None = None


class Part(Answer):
    """A part of the installation: healthy, unhealthy, or unknown (there is none, or nobody needs it)."""

    status: str
    message: str = ""


class Workers(Part):
    """The workers. None is fine: one is started when there is work."""

    ready: int = 0
    starting: int = 0
    draining: int = 0


class Health(Answer):
    """Whether a request would be served now; unhealthy: it would wait."""

    status: str
    operator: Part
    workers: Workers
    teacher: Part
    object_store: Part
    api_server: Part

    @property
    def healthy(self) -> bool:
        """Whether a request would be served now."""
        return self.status == "healthy"


class Limits(Answer):
    """What one call may ask."""

    max_body_bytes: int = 0
    max_samples: int = 0
    max_wait_seconds: float = 0.0
    requests_per_minute: int = 0


class Caller(Answer):
    """Who is asking, as far as the server tells."""

    namespace: str
    storage_prefixes: list[str] = Field(default_factory=list)
    default_base_model: str = ""
    teacher: bool = False
    limits: Limits = Field(default_factory=Limits)


class ReasonMeaning(Answer):
    """One reason of a request's or an adapter's status."""

    reason: str
    meaning: str
    http_status: int | None = None


class FieldProblem(Answer):
    """What is wrong with one field; never quotes the input."""

    field: str
    detail: str


class Event(Answer):
    """One event of a request's stream: its type (phase, or at last end), and the request as it is then."""

    type: str
    request: Request


Item = TypeVar("Item", bound=Answer)


class Page(Answer, Generic[Item]):
    """A page of a list; `following` is the next one's token."""

    items: list[Item]
    following: str | None = Field(None, alias="continue")
