"""Bodies of the REST API: what is sent and what is answered, field by field, in snake_case.

Routes (every one but health, and the documents, needs `Authorization: Bearer <token>`):

| route | takes | answers |
|---|---|---|
| `POST /v1/distill` | `DistillBody` | 200 `Distilled`; 202 `Request` with `Location` |
| `POST /v1/distill/lite` | `LiteBody` | the same |
| `POST /v1/lora/init` | `InitBody` | 200 `Initialised`; 202 `Adapter` with `Location` |
| `GET /v1/health` | | 200 or 503 `Health` |
| `GET /v1/whoami` | | 200 `Caller`: namespace, storage prefixes, limits |
| `GET /v1/reasons` | | 200 `Reasons`: every reason and what it means |
| `GET /v1/requests` | `?limit=&continue=` | 200 `RequestList` |
| `GET /v1/requests/{id}` | `?wait=` | 200 `Request`; with `wait`, when it has ended or so many seconds have passed |
| `DELETE /v1/requests/{id}` | | 202 `Request`: cancelled, unless it ended before |
| `GET /v1/requests/{id}/events` | | 200 `text/event-stream` of `Request`s: event `phase`, at last `end` |
| `GET /v1/adapters` | `?limit=&continue=` | 200 `AdapterList` |
| `GET /v1/adapters/{name}` | | 200 `Adapter` |
| `GET /v1/adapters/{name}/versions` | `?limit=&continue=` | 200 `VersionList`, newest first |
| `GET /v1/adapters/{name}/lineage` | `?version=` | 200 `Lineage`, from the version back to its first ancestor |
| `POST /v1/adapters/{name}/rollback` | `RollbackBody` | 200 `Adapter`; 202 `Adapter` with `Location` |
| `GET /openapi.json`, `GET /docs` | | this API, and a page to try it |

Everywhere: `?namespace=` (or the header `Claas-Namespace`) where the caller's own namespace is not meant. On the POSTs:
`?wait=SECONDS` (0: answer 202 at once) or `Prefer: respond-async` or `Prefer: wait=SECONDS`; without them the answer
waits for as long as the installation says, and is a 202 then. On the two distill routes: `Idempotency-Key`.
A request's `id` is its object's name in the namespace. Every error is a `Problem` (RFC 9457); every answer carries
`X-Request-Id`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal, Self, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from pydantic.config import JsonDict
from pydantic.fields import FieldInfo
from pydantic_core import PydanticCustomError

from claas_crds import request as contract
from claas_crds.adapter import ModuleName
from claas_crds.model import URI_PATTERN, ModelId, ObjectName
from claas_crds.request import MAX_PAYLOAD_SAMPLES, MAX_PAYLOAD_TEXT, Logprob, TokenId

Text = Annotated[str, Field(max_length=MAX_PAYLOAD_TEXT)]
Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024, pattern=URI_PATTERN)]
# Of a version that is to be trained: the next one's suffix must have room.
ParentUri = Annotated[str, StringConstraints(min_length=1, max_length=990, pattern=URI_PATTERN)]
AdapterName = Annotated[
    str,
    StringConstraints(max_length=253, pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$"),
]

EXAMPLE_URI: Final = "s3://my-bucket/loras/user123/coder-v1/"
NEXT_URI: Final = "s3://my-bucket/loras/user123/coder-v1-20261123-123456-0a1b2c3d/"
EXAMPLE_RESPONSE: Final = "def factorial(n):\n    if n <= 1:\n        return 1\n    return n * factorial(n-1)"


@dataclass(frozen=True)
class Rule:
    """What must hold between fields. `field` and `message` go into the problem document."""

    field: str
    message: str
    holds: Callable[[Any], bool]


class Body(BaseModel):
    """A part of what is sent. Unknown fields and wrong types are errors; null is the same as absent."""

    # hide_input: bodies hold people's text, and errors are logged.
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)
    rules: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.rules:
            if not rule.holds(self):
                raise PydanticCustomError("rule", "{message}", {"message": rule.message, "field": rule.field})
        return self


Model = TypeVar("Model", bound=BaseModel)


def _in_words_of_rest(of: FieldInfo) -> str:
    """A field's description with snake_case names and, for a number, its default."""
    text = re.sub("(?<=[a-z])[A-Z]+", lambda letters: f"_{letters[0].lower()}", of.description or "")
    number = isinstance(of.default, int | float) and not isinstance(of.default, bool)
    return f"{text.removesuffix('.')} ({of.default:g})." if number else text


def _as_in(contract: type[BaseModel]) -> Callable[[type[Model]], type[Model]]:
    """Says of each field what the resource's says, where nothing else is said here: text, bounds, default."""

    def fill(model: type[Model]) -> type[Model]:
        for name, field in model.model_fields.items():
            of = contract.model_fields.get(name)
            if of is None:
                continue
            if issubclass(model, Body):
                field.metadata = field.metadata or of.metadata
            field.description = field.description or _in_words_of_rest(of)
        model.model_rebuild(force=True)
        return model

    return fill


class Answer(BaseModel):
    """A part of what is answered."""

    model_config = ConfigDict(extra="ignore")


# What is sent


@_as_in(contract.Message)
class Message(Body):
    """One turn of a chat."""

    role: Literal["system", "user", "assistant", "tool"]
    content: Text


def _one_of(*names: str) -> Callable[[Any], bool]:
    return lambda body: sum(getattr(body, name) is not None for name in names) == 1


def _given(*names: str) -> dict[str, Any]:
    return {name: {"not": {"type": "null"}} for name in names}


def _absent(*names: str) -> dict[str, Any]:
    return {name: {"type": "null"} for name in names}


def _either(one: str, other: str, *not_with_other: str) -> dict[str, Any]:
    """`_one_of` in JSON schema's words; null is absent."""
    return {
        "oneOf": [
            {"required": [one], "properties": _given(one) | _absent(other)},
            {"required": [other], "properties": _given(other) | _absent(one, *not_with_other)},
        ]
    }


_SAMPLE_FORM: Final[list[Any]] = [_either("prompt", "messages"), _either("response", "response_token_ids")]
_BY_USER: Final[JsonDict] = {"type": "object", "properties": {"role": {"const": "user"}}, "required": ["role"]}
# Which turn is the last, JSON schema cannot say but of a single one.
_CONVERSATION: Final[JsonDict] = {
    "anyOf": [{"type": "null"}, {"maxItems": 1, "items": _BY_USER}, {"minItems": 2, "contains": _BY_USER}]
}


@_as_in(contract.Sample)
class Sample(Body):
    """One response and what is known about it."""

    prompt: Text | None = None
    messages: list[Message] | None = Field(None, json_schema_extra={"allOf": [_CONVERSATION]})
    response: Text | None = None
    response_token_ids: list[TokenId] | None = None
    finish_reason: Literal["stop", "length"] | None = None
    feedback: Text | None = None
    feedback_source: Literal["Person", "Environment"] | None = Field(
        None, description="Person (default): somebody's opinion. Environment: output of tests, compilers or tools."
    )
    solution: Text | None = None
    rollout_logprobs: list[Logprob] | None = None

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule("prompt", "set exactly one of prompt and messages", _one_of("prompt", "messages")),
        Rule(
            "response",
            "set exactly one of response and response_token_ids",
            _one_of("response", "response_token_ids"),
        ),
        Rule(
            "messages",
            "messages need a user turn, and must end with a user or tool turn: the response follows it",
            lambda sample: (
                not sample.messages
                or (any(m.role == "user" for m in sample.messages) and sample.messages[-1].role in ("user", "tool"))
            ),
        ),
    )
    model_config = ConfigDict(json_schema_extra={"allOf": _SAMPLE_FORM})


TeacherLogprobs = list[Any] | dict[str, Any]
_TEACHER_LOGPROBS: Final = (
    "Log-probabilities of the response by a teacher of your own: a list of floats, one a token, or an OpenAI legacy, "
    "Fireworks or vLLM prompt_logprobs payload."
)


class LiteSample(Sample):
    """A sample whose teacher has been asked already."""

    teacher_logprobs: TeacherLogprobs = Field(description=_TEACHER_LOGPROBS)


@_as_in(contract.Training)
class Training(Body):
    """Hyper-parameters of the step; every one has a default."""

    learning_rate: float | None = None
    alpha: float | None = None
    clip_eps: float | None = None
    max_grad_norm: float | None = None
    jsd_reg_weight: float | None = None
    pg_weight: float | None = None
    teacher_top_k: int | None = None
    inner_steps: int | None = None
    advantage_clip: float | None = None
    anchor_kl_weight: float | None = None
    preset: Literal["default", "paper"] | None = None
    truncate_response: Literal["head"] | None = None


class Teacher(Body):
    """Whose distribution the student is pulled towards."""

    mode: Literal["Server", "Self"] | None = Field(
        None,
        description="Server: the installation's teacher, the default where there is one. Self: the student itself, "
        "shown the feedback.",
    )
    support: Literal["teacher", "student"] | None = Field(
        None, description="Whose top-K tokens are compared; teacher. student needs a teacher that can score chosen ids."
    )
    contrast: float | None = Field(
        None,
        ge=0,
        le=16,
        description="Mode Self, a person's feedback: learn only what the words add, so strongly; 2. 0: as the paper.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        Rule(
            "contrast",
            "contrast needs mode Self: name that, or leave it out",
            lambda teacher: not teacher.contrast or teacher.mode == "Self",
        ),
    )
    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"contrast": {"enum": [None, 0]}}},
                {"required": ["mode"], "properties": {"mode": {"const": "Self"}}},
            ]
        }
    )


def _has_any(*names: str) -> Callable[[Any], bool]:
    return lambda body: any(getattr(body, name) is not None for name in names)


_given_inline = _has_any(*Sample.model_fields)


class _On(Body):
    """What both distill routes share: which adapter, and how."""

    lora_uri: ParentUri | None = Field(
        None,
        description="A version to train, s3://BUCKET/PATH/; the new one lies beside it. Either this or adapter. "
        "Nothing but this uri is read: which version is the newest is the caller's to know.",
    )
    adapter: ObjectName | None = Field(
        None,
        description="Name of a LoraAdapter of the namespace: its head is trained, and moves. Either this or lora_uri.",
    )
    base_model: ModelId | None = Field(None, description="With lora_uri: its base model, where it is not the default.")
    pool: ObjectName | None = Field(None, description="With lora_uri: the worker pool, where it is not the default.")
    training: Training | None = Field(None, description="Hyper-parameters of the step.")
    priority: int | None = Field(
        None, ge=-1000, le=1000, description="Higher runs first inside the namespace; 0. An adapter's order stays."
    )


_ON_RULES: Final = (
    Rule("lora_uri", "set exactly one of lora_uri and adapter: what to train", _one_of("lora_uri", "adapter")),
    Rule(
        "base_model",
        "base_model and pool go with lora_uri only: an adapter by name has its own",
        lambda body: body.adapter is None or (body.base_model is None and body.pool is None),
    ),
)
_EITHER: Final = (
    "give either samples or, for a single one, prompt and response (and what goes with them) beside lora_uri"
)

PUBLISHED_EXAMPLE: Final[JsonDict] = {
    "lora_uri": EXAMPLE_URI,
    "prompt": "Write a function to calculate factorial",
    "response": EXAMPLE_RESPONSE,
    "feedback": "Good recursive solution",
    "training": {
        "learning_rate": 1e-4,
        "alpha": 0.5,
        "clip_eps": 0.2,
        "max_grad_norm": 1.0,
        "jsd_reg_weight": 0.5,
        "teacher_top_k": 100,
    },
}
RICH_EXAMPLE: Final[JsonDict] = {
    "adapter": "coder",
    "samples": [
        {
            "messages": [
                {"role": "system", "content": "You write Python."},
                {"role": "user", "content": "Write a function to calculate factorial"},
            ],
            "response": EXAMPLE_RESPONSE,
            "feedback": "test_negative: RecursionError",
            "feedback_source": "Environment",
        }
    ],
    "priority": 10,
}
LITE_EXAMPLE: Final[JsonDict] = {
    "lora_uri": EXAMPLE_URI,
    "prompt": "What is the capital of France?",
    "response": "Paris.",
    "teacher_logprobs": [-0.1, -0.05, -0.01],
}


def _body_form(*taught: str) -> list[Any]:
    """What a body looks like: a target, and either a single sample's fields or several samples."""
    single = {"required": [*taught], "properties": _given(*taught) | _absent("samples"), "allOf": _SAMPLE_FORM}
    several = {"required": ["samples"], "properties": _given("samples") | _absent(*Sample.model_fields, *taught)}
    return [_either("lora_uri", "adapter", "base_model", "pool"), {"oneOf": [single, several]}]


def _unless_samples(rule: Rule) -> Rule:
    """A sample's rule, for the single one that a body may be."""
    return Rule(rule.field, rule.message, lambda body: body.samples is not None or rule.holds(body))


class DistillBody(_On, Sample):
    """Feedback on one response (prompt and response here) or on several (samples): one training step."""

    samples: list[Sample] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PAYLOAD_SAMPLES,
        description="Several responses to learn from in one step, instead of prompt and response.",
    )
    teacher: Teacher | None = Field(None, description="Whose distribution the student is pulled towards.")

    rules: ClassVar[tuple[Rule, ...]] = (
        *_ON_RULES,
        Rule("samples", _EITHER, lambda body: (body.samples is None) == _given_inline(body)),
        *map(_unless_samples, Sample.rules),
    )
    model_config = ConfigDict(json_schema_extra={"examples": [PUBLISHED_EXAMPLE, RICH_EXAMPLE], "allOf": _body_form()})


class LiteBody(_On, Sample):
    """As DistillBody, with the teacher's log-probabilities given: no teacher is asked."""

    teacher_logprobs: TeacherLogprobs | None = Field(None, description=_TEACHER_LOGPROBS)
    samples: list[LiteSample] | None = Field(
        None,
        min_length=1,
        max_length=MAX_PAYLOAD_SAMPLES,
        description="Several responses to learn from in one step, instead of prompt, response and teacher_logprobs.",
    )

    rules: ClassVar[tuple[Rule, ...]] = (
        *_ON_RULES,
        Rule(
            "samples",
            _EITHER,
            lambda body: (body.samples is None) == (_given_inline(body) or body.teacher_logprobs is not None),
        ),
        *map(_unless_samples, Sample.rules),
        Rule(
            "teacher_logprobs",
            "teacher_logprobs are needed here; /v1/distill asks the teacher itself",
            lambda body: body.samples is not None or body.teacher_logprobs is not None,
        ),
    )
    model_config = ConfigDict(json_schema_extra={"examples": [LITE_EXAMPLE], "allOf": _body_form("teacher_logprobs")})


class InitBody(Body):
    """A new adapter without effect, or one that starts from another."""

    output_uri: ParentUri = Field(
        description="Where its first version goes, s3://BUCKET/PATH/; later ones lie beside it. The same body again is "
        "the same adapter."
    )
    base_model: ModelId | None = Field(None, description="Model that it adapts; the installation's default.")
    lora_r: int | None = Field(None, ge=1, le=512, description="Rank; 16.")
    lora_alpha: float | None = Field(None, gt=0, le=4096, description="Scaling numerator; 32.")
    target_modules: list[ModuleName] | None = Field(
        None, min_length=1, max_length=32, description="Layers to adapt by the end of their names; every linear layer."
    )
    init_from: Uri | None = Field(
        None, description="Start from the version or PEFT folder there (a fork) instead of from nothing."
    )
    name: AdapterName | None = Field(
        None, description="Name of the LoraAdapter, to be used as `adapter`; one made from output_uri when absent."
    )
    model_config = ConfigDict(
        json_schema_extra={"examples": [{"output_uri": EXAMPLE_URI, "lora_r": 16, "lora_alpha": 32}]}
    )


class RollbackBody(Body):
    """Which version becomes the head again."""

    version: Annotated[str, StringConstraints(min_length=1, max_length=253)] = Field(
        description="Its name, of GET …/versions."
    )
    model_config = ConfigDict(json_schema_extra={"examples": [{"version": "coder-v1"}]})


# What is answered


@_as_in(contract.Metadata)
class Numbers(Answer):
    """The nine numbers of the published API. Sums are over the response's tokens; total_loss = pg_loss + jsd_reg."""

    total_loss: float
    pg_loss: float
    jsd_reg: float
    mean_advantage: float
    frac_positive_advantage: float
    mean_is_ratio: float
    clip_fraction: float
    grad_norm: float
    tokens_processed: int


@_as_in(contract.Metadata)
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


@_as_in(contract.Timings)
class Timings(Answer):
    """Milliseconds by phase."""

    queue_ms: int | None = None
    claim_ms: int | None = None
    load_ms: int | None = None
    teacher_ms: int | None = None
    step_ms: int | None = None
    save_ms: int | None = None


class Distilled(Answer):
    """A step was made (or there was nothing to learn: then lora_uri is the version that was to be trained)."""

    lora_uri: str = Field(description="The new version. Pass it to the next call.")
    metadata: Numbers = Field(description="What the step did.")
    model_config = ConfigDict(
        json_schema_extra={
            "examples": [
                {
                    "lora_uri": NEXT_URI,
                    "metadata": {
                        "total_loss": 0.234,
                        "pg_loss": 0.156,
                        "jsd_reg": 0.078,
                        "mean_advantage": -0.045,
                        "frac_positive_advantage": 0.62,
                        "mean_is_ratio": 1.0,
                        "clip_fraction": 0.0,
                        "grad_norm": 0.89,
                        "tokens_processed": 128,
                    },
                }
            ]
        }
    )


class Initialised(Answer):
    """The adapter has its first version."""

    lora_uri: str = Field(description="The first version: output_uri.")
    model_config = ConfigDict(json_schema_extra={"examples": [{"lora_uri": EXAMPLE_URI}]})


State = Literal["Pending", "Assigned", "Running", "Complete", "Failed", "Cancelled"]


class Place(Answer):
    """Where a request stands among those of all tenants; true for a moment."""

    position: int = Field(description="1 is the next to be given to a worker; 0: a worker has it.")
    ahead: int = Field(description="Requests that begin before it and have not ended, the running ones included.")
    starts_in_seconds: float | None = Field(
        None, description="At the earliest, by how long the latest steps took; absent: nothing is known to judge by."
    )
    ends_in_seconds: float | None = Field(None, description="The same of its end.")
    note: str = Field("", description="What the numbers leave out.")


class Request(Answer):
    """A DistillRequest: where it is, and how it ended. Never what it holds."""

    id: str = Field(description="Its name in the namespace.")
    namespace: str = Field(description="Its namespace.")
    state: State = Field(description="One word; the last three are final.")
    reason: str = Field(description="Why it waits or has failed; empty while all is well.")
    message: str = Field(description="The same in a sentence.")
    phase: str = Field(description="What its worker is doing: Loading, Scoring, Stepping, Saving; else empty.")
    created_at: str = Field(
        description="When it was asked for, in UTC: to the microsecond of a call here, else to the second."
    )
    ended_at: str | None = Field(None, description="When it ended, in UTC.")
    adapter: str | None = Field(None, description="The LoraAdapter that it trains; absent for a bare lora_uri.")
    parent_uri: str | None = Field(None, description="The version that it trains, as far as that is known by now.")
    lora_uri: str | None = Field(None, description="The new version, once committed.")
    version: str | None = Field(None, description="Name of the new version.")
    worker: str | None = Field(None, description="Pod that it was given to.")
    attempt: int = Field(0, description="Counts from 1; grows when an attempt was lost.")
    priority: int = Field(0, description="Higher runs first inside the namespace.")
    cancelled: bool = Field(False, description="Whether somebody has asked to stop it.")
    metadata: Metadata | None = Field(None, description="What the step did, once committed.")
    timings: Timings | None = Field(None, description="How long it took, once committed.")
    place: Place | None = Field(
        None, description="Where it stands in the queue: in GET /v1/requests/{id}, while it has not ended."
    )


class RequestList(Answer):
    """A page of requests."""

    items: list[Request]
    continue_: str | None = Field(
        None, alias="continue", description="Pass it as ?continue= for the next page; absent on the last one."
    )
    model_config = ConfigDict(populate_by_name=True)


class Adapter(Answer):
    """A LoraAdapter and its head."""

    name: str = Field(description="Its name in the namespace.")
    namespace: str = Field(description="Its namespace.")
    base_model: str = Field(description="Model that it adapts.")
    lora_r: int = Field(description="Rank.")
    lora_alpha: float = Field(description="Scaling numerator.")
    target_modules: list[str] = Field(description="Layers that it adapts.")
    storage_uri: str = Field(description="Where its first version lies; later ones lie beside it.")
    init_from: str | None = Field(None, description="What it started from; absent: from nothing.")
    lora_uri: str | None = Field(None, description="The head: load this one. Absent until there is one.")
    version: str | None = Field(None, description="Name of the head.")
    head_seq: int = Field(description="Moves of the head so far.")
    ready: bool = Field(description="Whether it has a head that requests can train.")
    reason: str = Field(description="Why it is ready or not, in one word.")
    message: str = Field(description="The same in a sentence.")
    active_request: str | None = Field(None, description="Id of the request that trains it now.")
    steps: int = Field(0, description="Committed steps.")
    tokens: int = Field(0, description="Response tokens trained on.")
    created_at: str = Field(description="When it was asked for, in UTC.")


class AdapterList(Answer):
    """A page of adapters."""

    items: list[Adapter]
    continue_: str | None = Field(
        None, alias="continue", description="Pass it as ?continue= for the next page; absent on the last one."
    )
    model_config = ConfigDict(populate_by_name=True)


class Version(Answer):
    """One move of an adapter's head."""

    seq: int = Field(description="Counts the moves of the head.")
    version: str = Field(description="Name of the head after the move.")
    lora_uri: str = Field(description="The head after the move.")
    request_uid: str | None = Field(None, description="Request that made it; absent for the first and for rollbacks.")
    at: str = Field(description="When, in UTC.")
    head: bool = Field(description="Whether it is the head now.")


class VersionList(Answer):
    """A page of an adapter's versions, newest first."""

    items: list[Version]
    continue_: str | None = Field(
        None, alias="continue", description="Pass it as ?continue= for the next page; absent on the last one."
    )
    model_config = ConfigDict(populate_by_name=True)


class Lineage(Answer):
    """A version and its ancestors, each trained on the next."""

    items: list[Version] = Field(description="The version first, its oldest known ancestor last.")
    complete: bool = Field(description="Whether the last one is the adapter's first; older history may be forgotten.")
    init_from: str | None = Field(None, description="What the adapter's first version was made from, if anything.")


Health_ = Literal["healthy", "unhealthy", "unknown"]


class Part(Answer):
    """A part of the installation."""

    status: Health_ = Field(description="unknown: there is none, or nobody needs it.")
    message: str = Field("", description="What was seen.")


class Workers(Part):
    """The workers. None is fine: the operator starts one when there is work."""

    ready: int = Field(0, description="Workers that wait for work or do it.")
    starting: int = Field(0, description="Workers that load their base model.")
    draining: int = Field(0, description="Workers that end.")


class Health(Answer):
    """Whether a request would be served now."""

    status: Literal["healthy", "unhealthy"] = Field(description="unhealthy, with HTTP 503: a request would wait.")
    operator: Part
    workers: Workers
    teacher: Part
    object_store: Part
    api_server: Part


class Limits(Answer):
    """What one call may ask."""

    max_body_bytes: int
    max_samples: int
    max_wait_seconds: float
    requests_per_minute: int = Field(description="Of one namespace, at this replica; 0: unlimited.")


class Caller(Answer):
    """Who is asking, as far as it matters here."""

    namespace: str = Field(description="The namespace meant when none is named.")
    storage_prefixes: list[str] = Field(description="Uris must lie below one of these.")
    default_base_model: str
    teacher: bool = Field(description="Whether the installation has a teacher (mode Server).")
    limits: Limits


class ReasonMeaning(Answer):
    """One reason."""

    reason: str
    meaning: str
    http_status: int | None = Field(None, description="Of the answer to a call whose request failed with it.")


class Reasons(Answer):
    """Every reason that a request or an adapter may show."""

    items: list[ReasonMeaning]


class FieldProblem(Answer):
    """What is wrong with one field."""

    field: str = Field(
        description="Path in the body, such as samples[0].response; or the parameter's or header's name."
    )
    detail: str = Field(description="What is wrong, and what would be right. Never quotes the input.")


class Problem(Answer):
    """An error, after RFC 9457 (application/problem+json)."""

    type: str = Field(description="urn:claas:problem:… One for each kind of error.")
    title: str = Field(description="The kind of error in a few words.")
    status: int = Field(description="The HTTP status, again.")
    detail: str = Field(description="What happened this time.")
    fix: str = Field(description="What to do about it.")
    reason: str | None = Field(None, description="Where a request or an adapter failed: its reason.")
    errors: list[FieldProblem] = Field(default_factory=list, description="The fields at fault, if any.")
    instance: str | None = Field(None, description="The request or adapter that it is about, if any.")
    request_id: str = Field(description="As in X-Request-Id and in the log: quote it when you ask for help.")
