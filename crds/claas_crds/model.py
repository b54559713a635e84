"""What every model of the contract shares: camelCase on the wire, snake_case in Python, CEL rules beside the fields.

A model is the only place where a field, its bounds, its default and its rules are written; `claas_crds.generate` turns
models into CRD schemas, and the worker, the operator and the shim parse with them. A rule is written twice on one line,
for the API server (CEL) and for Python, with one message: a manifest run without a cluster is refused alike.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from claas_crds.reasons import Reason

FORBIDDEN: Final = "FieldValueForbidden"


@dataclass(frozen=True)
class Rule:
    """One rule over several fields, or over a field's old and new value.

    Attributes:
        rule: CEL for x-kubernetes-validations; with `oldSelf` it is checked at updates only. None: where OpenAPI's own
            words in the model's json_schema_extra say it.
        message: names the field and the fix.
        field_path: relative to the model that carries the rule, for the API server's answer.
        holds: the same in Python; None for rules with `oldSelf`, where there is nothing to compare with.
        reason: of the API server's error: FieldValueInvalid (None), FieldValueForbidden, FieldValueRequired.
        outcome: reason of the request whose stored spec breaks the rule; the `type` of the pydantic error.
    """

    rule: str | None
    message: str
    field_path: str
    holds: Callable[[Any], bool] | None = None
    reason: str | None = None
    outcome: Reason = Reason.INVALID_SPEC


class Model(BaseModel):
    """A part of a resource. Unknown fields are errors in specs; status models relax that (`StatusModel`)."""

    # hide_input: specs hold people's text, and errors are logged.
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", allow_inf_nan=False, hide_input_in_errors=True
    )
    cel: ClassVar[tuple[Rule, ...]] = ()

    @model_validator(mode="after")
    def _rules_hold(self) -> Self:
        for rule in self.cel:
            if rule.holds is not None and not rule.holds(self):
                raise PydanticCustomError(rule.outcome.value, "{message}", {"message": rule.message})
        return self


class StatusModel(Model):
    """A part of a status: fields of a later release are ignored, not refused; defaults stay out of the schema."""

    model_config = ConfigDict(extra="ignore")


def explain(error: ValidationError, root: str = "spec") -> str:
    """What is wrong, field by field, in one line that never quotes the input: it may be somebody's text."""

    def path(steps: tuple[int | str, ...]) -> str:
        return root + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in steps)

    return "; ".join(f"{path(problem['loc'])}: {problem['msg']}" for problem in error.errors(include_input=False))


def refusal(error: ValidationError) -> Reason:
    """The reason of a request whose spec does not validate: that of the broken rule, else InvalidSpec."""
    types = {problem["type"] for problem in error.errors(include_input=False)}
    return Reason.PAYLOAD_TOO_LARGE if types == {Reason.PAYLOAD_TOO_LARGE.value} else Reason.INVALID_SPEC


def immutable(field: str, fix: str) -> Rule:
    """`spec.<field>` stays as it was created, absent or present. `fix` says what to do instead."""
    same = f"has(self.{field}) == has(oldSelf.{field}) && (!has(self.{field}) || self.{field} == oldSelf.{field})"
    return Rule(same, f"spec.{field} is immutable: {fix}", f".{field}", reason=FORBIDDEN)


# Segments are compared and become keys: none is empty, `.` or `..`, and none holds what has a meaning in urls.
URI_PATTERN: Final = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]|file://)(/[^/?#\x00-\x20\x7f]+)+/?$"
_DOTS_PATTERN: Final = r"/[.][.]?(/|$)"


def uri_rule(field: str, path: str, form: str) -> Rule:
    """The uri in `field` (camelCase) of the carrying model, `path` in messages, is of the `form` s3://… or file:///…"""
    there = f"self.{field}"
    attribute = re.sub("[A-Z]", lambda letter: f"_{letter[0].lower()}", field)

    def holds(model: object) -> bool:
        uri = getattr(model, attribute)
        return uri is None or bool(re.fullmatch(URI_PATTERN, uri) and not re.search(_DOTS_PATTERN, uri))

    return Rule(
        f"!has({there}) || {there}.matches(r'{URI_PATTERN}') && !{there}.matches(r'{_DOTS_PATTERN}')",
        f"{path} must be s3://BUCKET/{form} or file:///{form}, without space, '?', '#' or empty, '.' or '..' segments",
        f".{field}",
        holds,
    )


MAX_MESSAGE: Final = 1024


def _clip(text: object) -> object:
    """A message is for people: what does not fit is cut, and never makes a status unwritable."""
    return text[: MAX_MESSAGE - 1] + "…" if isinstance(text, str) and len(text) > MAX_MESSAGE else text


Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
ObjectName = Annotated[
    str, StringConstraints(min_length=1, max_length=253, pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$")
]
Uid = Annotated[str, StringConstraints(min_length=1, max_length=64)]
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Timestamp = Annotated[str, StringConstraints(max_length=40)]  # RFC 3339, UTC, microseconds
StatusMessage = Annotated[str, BeforeValidator(_clip), StringConstraints(max_length=MAX_MESSAGE)]


class Condition(StatusModel):
    """A metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=64)] = Field(description="What it is about.")
    status: Annotated[str, StringConstraints(pattern="^(True|False|Unknown)$", max_length=8)] = Field(
        description="True, False or Unknown."
    )
    reason: Annotated[str, StringConstraints(max_length=64)] = Field(description="Why, in one word.")
    message: StatusMessage = Field("", description="Why, in a sentence.")
    last_transition_time: Timestamp = Field(description="When status last changed, in UTC.")
    observed_generation: int = Field(0, description="metadata.generation that it answers.")


# One condition of a type: server-side apply merges by it, and the API server refuses a second one.
Conditions = Annotated[
    list[Condition],
    Field(max_length=16, json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]}),
]
