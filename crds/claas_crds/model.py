"""What every model of the contract shares: camelCase on the wire, snake_case in Python and REST, CEL rules beside the fields.

A model is the only place where a field, its bounds, its default and its rules are written; `claas_crds.generate` turns
models into CRD schemas, and the worker, the operator and the shim parse with them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import BaseModel, ConfigDict, StringConstraints
from pydantic.alias_generators import to_camel


@dataclass(frozen=True)
class Rule:
    """One x-kubernetes-validations rule. `message` names the field and the fix; `field_path` as Kubernetes reports it."""

    rule: str
    message: str
    field_path: str | None = None
    reason: str | None = None  # FieldValueInvalid, FieldValueForbidden, FieldValueRequired, FieldValueDuplicate


class Model(BaseModel):
    """A part of a resource. Unknown fields are errors in specs; status models relax that (`StatusModel`)."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid", allow_inf_nan=False)
    cel: ClassVar[tuple[Rule, ...]] = ()


class StatusModel(Model):
    """A part of a status: fields that a later release added are ignored, not refused."""

    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", allow_inf_nan=False)


URI_PATTERN = r"^(s3://[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]/.+|file:///.+)$"
Uri = Annotated[str, StringConstraints(min_length=1, max_length=1024)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Uid = Annotated[str, StringConstraints(min_length=1, max_length=64)]
ModelId = Annotated[str, StringConstraints(min_length=1, max_length=253)]
Text = Annotated[str, StringConstraints(max_length=16384)]
Timestamp = Annotated[str, StringConstraints(max_length=40)]  # RFC 3339, UTC, microseconds


class Condition(StatusModel):
    """A metav1.Condition."""

    type: Annotated[str, StringConstraints(max_length=64)]
    status: Annotated[str, StringConstraints(pattern="^(True|False|Unknown)$", max_length=8)]
    reason: Annotated[str, StringConstraints(max_length=64)]
    message: Annotated[str, StringConstraints(max_length=1024)] = ""
    last_transition_time: Timestamp
    observed_generation: int = 0
