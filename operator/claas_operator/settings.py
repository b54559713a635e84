"""The operator's one settings object: read once from YAML, every key checked, unknown keys refused.

The chart renders it into a ConfigMap; an error names the key and is seen at start, never in the middle of a run.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic.alias_generators import to_camel

from claas_store.errors import UriInvalid
from claas_store.uris import parse

# A Job's name becomes a label of its Pods (63 characters at most), and the Pod's name adds a dash and 5 characters.
MAX_JOB_NAME = 57
MAX_COUNTER_DIGITS = 8
WORKER_CONTAINER = "worker"
OPERATION_CONTAINER = "operation"


class SettingsError(ValueError):
    """The configuration file cannot be used; the message names the key and what is wrong."""


class _Part(BaseModel):
    # hide_input: a template's environment may hold what nobody should read in a log.
    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        frozen=True,
        hide_input_in_errors=True,
        allow_inf_nan=False,
    )


class Owner(_Part):
    """What worker and operation Jobs of the release's namespace belong to, so that nothing outlives an uninstall."""

    deployment: str = Field(min_length=1)


class Prefix(_Part):
    """Where a namespace may read and write; `{namespace}` in the uri is replaced."""

    namespace: str = Field("*", description='A namespace, or "*" for each.')
    uri: str = Field(min_length=1)

    @field_validator("uri")
    @classmethod
    def _is_uri(cls, uri: str) -> str:
        try:
            location = parse(uri.replace("{namespace}", "any"))
            fixed = parse(uri.replace("{namespace}", "another"))
        except UriInvalid as error:
            raise ValueError(str(error)) from error
        if location.bucket != fixed.bucket:
            # A namespace's name may be longer than a bucket's, or "..", and one bucket's keys open one bucket.
            raise ValueError(f"{uri!r} has {{namespace}} in its bucket: put it into the path")
        return uri


class Storage(_Part):
    """The prefixes of every namespace; a namespace that no entry names has none.

    `fork_prefixes` are read only: what lies there, another namespace's versions say, may be `spec.initFrom`.
    """

    prefixes: tuple[Prefix, ...] = ()
    fork_prefixes: tuple[Prefix, ...] = ()


class Teacher(_Part):
    """The teacher's Service."""

    url: str = Field(pattern=r"^https?://[^/\s]+")


class Pool(_Part):
    """Workers of one kind: which base model they hold, how many there may be, how long they stay."""

    name: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$")
    isolation: Literal["Shared", "Namespace"] = "Shared"
    base_model: str = Field(min_length=1)
    min_workers: int = Field(0, ge=0, description="Kept even when idle; Shared pools only.")
    max_workers: int = Field(1, ge=1, description="At most so many Jobs; of each namespace, with Namespace isolation.")
    linger_seconds: float = Field(300, ge=0, description="A worker leaves after so long without work.")
    max_requests: int = Field(1000, ge=1, description="A worker leaves after so many requests.")
    start_limit_seconds: float = Field(900, gt=0, description="From the Pod's start to its Lease saying Ready.")
    batch: int = Field(1, ge=1, description="Requests bound to one worker at a time, for one batched step.")
    scale_up_seconds: float = Field(
        15, ge=0, description="Beside workers that are alive, another starts only if these would take longer."
    )
    queue_name: str = Field("", pattern=r"^([a-z0-9]([-a-z0-9.]*[a-z0-9])?)?$", description="Kueue's LocalQueue.")
    template: dict[str, Any] = Field(description="PodTemplateSpec with a container named worker.")
    operation_template: dict[str, Any] | None = Field(
        None, description="operations.template of this pool's adapters: with isolation Namespace, as the tenant."
    )

    @cached_property
    def edition(self) -> str:
        """A hash of what a worker cannot learn of after its start."""
        parts = self.model_dump(include={"isolation", "base_model", "max_requests", "batch", "template"})
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]

    @field_validator("template")
    @classmethod
    def _has_worker(cls, template: dict[str, Any]) -> dict[str, Any]:
        return _with_container(template, WORKER_CONTAINER)

    @field_validator("operation_template")
    @classmethod
    def _has_operation(cls, template: dict[str, Any] | None) -> dict[str, Any] | None:
        return None if template is None else _with_container(template, OPERATION_CONTAINER)

    @model_validator(mode="after")
    def _bounds(self) -> Self:
        if self.min_workers > self.max_workers:
            raise ValueError(f"pool {self.name}: minWorkers {self.min_workers} exceeds maxWorkers {self.max_workers}")
        if self.min_workers and self.isolation == "Namespace":
            raise ValueError(
                f"pool {self.name}: minWorkers needs isolation Shared, or every namespace would hold a GPU"
            )
        return self


class Tenant(_Part):
    """What a namespace may have of the workers; 0: no limit."""

    namespace: str = Field("*", description='A namespace, or "*" for each that has no entry of its own.')
    weight: float = Field(1, gt=0, le=1000, description="Its share of the workers, while others wait as well.")
    max_pending_requests: int = Field(0, ge=0, description="So many unended requests are served, the oldest; 0: all.")
    max_gpu_seconds_per_day: float = Field(0, ge=0, description="Nothing new begins beyond it; 0: no limit.")


class Operations(_Part):
    """The small CPU Jobs that run `claas_store`."""

    template: dict[str, Any] = Field(description="PodTemplateSpec with a container named operation.")
    model_dir: str = Field("/models/student", description="The base model's folder inside that container.")
    backoff_limit: int = Field(2, ge=0)
    ttl_seconds_after_finished: int = Field(600, ge=0)
    active_deadline_seconds: int = Field(600, ge=1)

    @field_validator("template")
    @classmethod
    def _has_operation(cls, template: dict[str, Any]) -> dict[str, Any]:
        return _with_container(template, OPERATION_CONTAINER)


class Timings(_Part):
    """Every time that the loop goes by, in seconds, so that tests may scale them down."""

    lease_seconds: float = Field(15, gt=0, description="A worker's Lease that was not renewed for so long is stale.")
    claim_grace_seconds: float = Field(30, gt=0, description="A request not claimed for so long is bound elsewhere.")
    retry_base_seconds: float = Field(5, gt=0, description="Wait before the second attempt; doubles with each.")
    retry_cap_seconds: float = Field(60, gt=0, description="The longest such wait.")
    relist_seconds: float = Field(60, gt=0, description="How often the snapshot's uids are compared with the API's.")
    leader_lease_seconds: float = Field(15, ge=1)
    teacher_probe_seconds: float = Field(2, gt=0, description="Between two looks at the teacher, while it is needed.")
    fence_grace_seconds: float = Field(30, gt=0, description="A worker may run an ended request for so long.")
    reason_delay_seconds: float = Field(2, ge=0, description="Waits shorter than this are not written to status.")
    worker_ttl_seconds: int = Field(600, ge=0, description="A finished worker Job stays for so long.")
    deletion_limit_seconds: float = Field(
        900, gt=0, description="A deleted adapter goes after so long, even if its versions are still in the store."
    )
    collect_delay_seconds: float = Field(
        60, ge=0, description="Versions beyond retention go when the head has not moved for so long, or many wait."
    )
    sweep_seconds: float = Field(
        86_400, ge=0, description="How often an adapter's folder is searched for orphans; 0: never."
    )
    orphan_grace_seconds: int = Field(
        86_400, ge=1, description="An upload without a manifest, or a version nobody names, may be so old."
    )


class Settings(_Part):
    """All of it; see SEAMS in the chart's values for what each part means to a user."""

    instance: str = Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", description="The Helm release.")
    namespace: str = Field(min_length=1, description="Of the release: Shared workers, their Leases, operation Jobs.")
    owner: Owner | None = None
    watch_namespaces: tuple[str, ...] = Field((), description="What it serves; none named: all, but other releases'.")
    default_pool: str
    default_base_model: str
    storage: Storage = Field(default_factory=Storage)
    teacher: Teacher | None = None
    pools: tuple[Pool, ...] = Field(min_length=1)
    tenants: tuple[Tenant, ...] = ()
    operations: Operations
    timings: Timings = Field(default_factory=Timings)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        known = [pool.name for pool in self.pools]
        if len(set(known)) != len(known):
            raise ValueError(f"pools: names must differ, found {', '.join(sorted(known))}")
        if self.default_pool not in known:
            raise ValueError(f"defaultPool {self.default_pool!r} names no entry of pools ({', '.join(known)})")
        room = MAX_JOB_NAME - MAX_COUNTER_DIGITS - len(self.instance) - 2
        if long := [name for name in known if len(name) > room]:
            raise ValueError(
                f"pools: {long[0]!r} is too long for a Job's name: at most {room} with this release's name"
            )
        tenants = [tenant.namespace for tenant in self.tenants]
        if len(set(tenants)) != len(tenants):
            raise ValueError(f"tenants: namespaces must differ, found {', '.join(sorted(tenants))}")
        if len(self.instance) > 25:
            raise ValueError(f"instance {self.instance!r} is too long for a Job's name: at most 25 characters")
        return self

    @property
    def cluster_role(self) -> str:
        """The operator's, as the chart names it."""
        return f"{self.namespace}-{self.instance}-operator"

    def pool(self, name: str) -> Pool | None:
        """The pool of that name."""
        return next((pool for pool in self.pools if pool.name == name), None)

    def tenant(self, namespace: str) -> Tenant:
        """What `namespace` may have: by its own entry, or by the one for all."""
        own = self._tenants
        return own.get(namespace) or own.get("*", _ANYBODY)

    @cached_property
    def _tenants(self) -> dict[str, Tenant]:
        return {tenant.namespace: tenant for tenant in self.tenants}

    def prefixes(self, namespace: str) -> list[str]:
        """The storage prefixes of `namespace`."""
        return _of(self.storage.prefixes, namespace)

    def fork_prefixes(self, namespace: str) -> list[str]:
        """Where `namespace` may start adapters from, besides its own prefixes."""
        return _of(self.storage.fork_prefixes, namespace)


_ANYBODY = Tenant()


def tenant_of(tenants: Iterable[Tenant], namespace: str) -> Tenant:
    """The entry of `namespace`, or the one for all, or none's."""
    own = [tenant for tenant in tenants if tenant.namespace in (namespace, "*")]
    return min(own, key=lambda tenant: tenant.namespace == "*", default=_ANYBODY)


def load(path: Path) -> Settings:
    """The settings in the YAML file at `path`.

    Raises:
        SettingsError: it cannot be read, is no mapping, or a key is unknown, missing or out of bounds.
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        return Settings.model_validate(content)
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors(include_input=False)
        )
        raise SettingsError(f"{path}: " + "; ".join(problems)) from error


def _of(prefixes: Iterable[Prefix], namespace: str) -> list[str]:
    return [prefix.uri.replace("{namespace}", namespace) for prefix in prefixes if prefix.namespace in ("*", namespace)]


def _with_container(template: dict[str, Any], name: str) -> dict[str, Any]:
    spec = template.get("spec")
    containers = spec.get("containers") if isinstance(spec, dict) else None
    if not isinstance(containers, list) or name not in [c.get("name") for c in containers if isinstance(c, dict)]:
        raise ValueError(f"a PodTemplateSpec with spec.containers, one of them named {name!r}, is needed")
    return template
