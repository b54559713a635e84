"""LoraAdapter (`la`): one adapter and its chain of versions in the object store."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, StringConstraints

from claas_crds.model import (
    Conditions,
    Model,
    ModelId,
    Name,
    ObjectName,
    Rule,
    StatusModel,
    Timestamp,
    Uid,
    Uri,
    immutable,
    uri_rule,
)

QWEN_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]

ModuleName = Annotated[str, StringConstraints(min_length=1, max_length=128, pattern=r"^[A-Za-z0-9_.]+$")]


class Lora(Model):
    """Shape of the adapter: rank, scaling and the linear layers that it adapts. Immutable."""

    r: int = Field(16, ge=1, le=512, description="Rank of the low-rank update.")
    alpha: float = Field(32, gt=0, le=4096, description="Scaling numerator: the update is alpha / r * B A.")
    target_modules: list[ModuleName] = Field(
        default_factory=lambda: list(QWEN_LINEARS),
        min_length=1,
        max_length=32,
        description="Last name components of the linear layers to adapt; by default every linear layer of a Llama- or "
        "Qwen-style decoder.",
    )


class AdapterStorage(Model):
    """Where the adapter lives."""

    uri: Uri = Field(
        description="The adapter's own uri, s3://bucket/path/ or file:///path/. Its first version lies exactly there, "
        "later ones beside it."
    )
    cel: ClassVar[tuple[Rule, ...]] = (uri_rule("uri", "spec.storage.uri", "PATH/"),)


class InitFrom(Model):
    """Start from an existing PEFT folder (adopt) or another adapter's version (fork), not a fresh zero-effect one."""

    uri: Uri = Field(description="A folder with adapter_config.json and adapter_model.safetensors.")
    cel: ClassVar[tuple[Rule, ...]] = (uri_rule("uri", "spec.initFrom.uri", "PATH/"),)


class Retention(Model):
    """How many old versions stay."""

    keep_last: int = Field(
        10,
        ge=1,
        le=1000,
        description="Versions kept besides those still referenced; older ones are collected. With very long uris fewer "
        "are kept: as many as one object can name.",
    )


class LoraAdapterSpec(Model):
    """What the user wants the adapter to be."""

    base_model: ModelId = Field(
        description="Model that the adapter belongs to, by its hub id, e.g. Qwen/Qwen2.5-Coder-3B-Instruct. Immutable."
    )
    lora: Lora = Field(default_factory=Lora, description="Rank, scaling and target layers. Immutable.")
    storage: AdapterStorage = Field(description="Where the versions live. Immutable.")
    init_from: InitFrom | None = Field(
        None, description="Adopt or fork an existing adapter instead of creating a fresh one. Immutable."
    )
    pool: ObjectName | None = Field(
        None, description="Worker pool that trains it; the installation's default pool when absent."
    )
    retention: Retention = Field(default_factory=Retention, description="How many old versions stay.")
    deletion_policy: Literal["Retain", "Delete"] = Field(
        "Retain", description="What happens to the versions in the store when this object is deleted."
    )
    rollback_to: Name | None = Field(
        None,
        description="Name of an old version, of status.history, to make the head again; once per change of this field. "
        "To go back to the same version again, remove the field first.",
    )

    cel: ClassVar[tuple[Rule, ...]] = (
        immutable("baseModel", "create another LoraAdapter for another base model"),
        immutable("lora", "create another LoraAdapter for another rank, alpha or other layers"),
        immutable("storage", "create another LoraAdapter there (initFrom this one's uri takes it along)"),
        immutable("initFrom", "create another LoraAdapter to start from elsewhere"),
    )


class ActiveRequest(StatusModel):
    """The lock: the one request that may train the adapter now."""

    request_uid: Uid = Field(description="Its metadata.uid.")
    request_name: Name = Field(description="Its metadata.name.")
    since: Timestamp = Field(description="When it was locked, in UTC.")


class HistoryEntry(StatusModel):
    """One move of the head."""

    seq: int = Field(ge=1, description="headSeq after the move.")
    version: Name = Field(description="Name of the head after the move.")
    uri: Uri = Field(description="The head after the move.")
    request_uid: str = Field(
        "", max_length=64, description="Request that made it; empty for the first version and for rollbacks."
    )
    at: Timestamp = Field(description="When, in UTC.")
    cause: str = Field("", max_length=32, description="What moved it: Created, Adopted, Forked, Trained or RolledBack.")
    origin: str = Field(
        "", max_length=1024, description="Of an adopted or forked adapter's first version: where it came from."
    )


class Totals(StatusModel):
    """Counters over the adapter's life."""

    steps: int = Field(0, description="Committed steps.")
    tokens: int = Field(0, description="Response tokens trained on.")


class LoraAdapterStatus(StatusModel):
    """What the operator knows of the adapter. Only the operator writes it."""

    uri: str = Field("", max_length=1024, description="The head: load this one.")
    version: str = Field("", max_length=253, description="Name of the head, the last segment of its uri.")
    head_seq: int = Field(0, description="Number of moves of the head; only grows.")
    active: ActiveRequest | None = Field(None, description="The request that holds the adapter.")
    history: list[HistoryEntry] = Field(
        default_factory=list, max_length=1100, description="Moves of the head, oldest first, bounded."
    )
    collecting: list[Name] = Field(
        default_factory=list, max_length=1100, description="Versions being collected: no longer valid targets."
    )
    collection: int = Field(
        0, description="Number of the latest collection, which no other has: what was decided in it ends with it."
    )
    rolled_back_generation: int = Field(0, description="metadata.generation of the last rollback that was done.")
    rollback_answered: str = Field(
        "", max_length=253, description="spec.rollbackTo that was answered last: done or refused, see RolledBack."
    )
    totals: Totals = Field(default_factory=Totals, description="Steps and tokens over the adapter's life.")
    sweep_at: str = Field(
        "", max_length=40, description="When interrupted uploads and orphan versions are looked for again, in UTC."
    )
    conditions: Conditions = Field(default_factory=list, description="Ready, Updating, RolledBack and Collected.")
    observed_generation: int = Field(0, description="metadata.generation that this status answers.")
