"""The shim's settings, read once from YAML: the chart renders them into a ConfigMap of its own.

Nothing here is secret, and nothing of the operator's Pod templates is: the shim sees no more than it needs.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel

from claas_crds.request import MAX_PAYLOAD_SAMPLES
from claas_operator.settings import Prefix, Settings, SettingsError, Storage, Teacher, Tenant

# Samples that take more, as JSON, travel by payloadRef: etcd rewrites a whole object at every patch of its status.
INLINE_BYTES: Final = 4096
NAMESPACE_PATTERN: Final = r"^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$"


class _Part(BaseModel):
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, extra="forbid", frozen=True, hide_input_in_errors=True
    )


class Auth(_Part):
    """Who may call."""

    mode: Literal["Kubernetes", "ApiKey", "None"] = Field(
        "Kubernetes",
        description="Kubernetes: bearer tokens of the cluster, and its RBAC. ApiKey: keys, their digests in Secrets. "
        "None: everybody is `namespace`; for one tenant on a trusted network.",
    )
    namespace: str = Field("", description="With mode None: the one tenant's namespace.")
    audiences: tuple[str, ...] = Field((), description="With mode Kubernetes: audiences that a token must be for.")
    keys_namespace: str = Field("", description="With mode ApiKey: where the Secrets lie; the release's namespace.")
    cache_seconds: float = Field(10, ge=0, le=300, description="A token, a right or a key is looked up so often.")

    @model_validator(mode="after")
    def _one_tenant(self) -> Self:
        if (self.mode == "None") != bool(self.namespace):
            raise ValueError("auth.namespace names the one tenant of auth.mode None, and goes with nothing else")
        return self


class Limits(_Part):
    """What one call, and one tenant, may ask."""

    max_body_bytes: int = Field(4 * 2**20, ge=INLINE_BYTES, le=32 * 2**20)
    max_samples: int = Field(MAX_PAYLOAD_SAMPLES, ge=1, le=MAX_PAYLOAD_SAMPLES)
    requests_per_minute: int = Field(600, ge=0, description="Of one tenant, at one replica; 0: unlimited.")
    burst: int = Field(100, ge=1, description="So many at once, of these.")
    max_waiting: int = Field(5000, ge=1, description="Callers that wait at one replica; more are answered 202 at once.")


class ShimSettings(_Part):
    """All of it."""

    instance: str = Field(min_length=1, description="The Helm release.")
    namespace: str = Field(min_length=1, description="Its namespace.")
    watch_namespaces: tuple[str, ...] = Field((), description="The operator's: nobody would serve another; empty: all.")
    default_base_model: str = Field(min_length=1)
    pools: dict[str, str] = Field(
        default_factory=dict, description="Base model of each pool; empty: the operator alone knows them."
    )
    storage: Storage = Field(default_factory=Storage)
    tenants: tuple[Tenant, ...] = Field(
        (), description="The operator's: a place in the queue depends on their weights."
    )
    teacher: Teacher | None = None
    auth: Auth = Field(default_factory=Auth)
    limits: Limits = Field(default_factory=Limits)
    wait_seconds: float = Field(300, ge=0, description="How long an answer waits, unless the caller says otherwise.")
    max_wait_seconds: float = Field(900, ge=0, description="The longest wait that a caller may ask for.")
    request_ttl_seconds: int = Field(
        86400, ge=60, description="Requests made here are deleted so long after their end; so long a key is remembered."
    )
    payload_grace_seconds: float = Field(
        3600, gt=0, description="A payload that no request names is deleted when it is so old."
    )
    sweep_seconds: float = Field(3600, gt=0, description="How often such payloads are looked for.")

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.wait_seconds > self.max_wait_seconds:
            raise ValueError(f"waitSeconds {self.wait_seconds:g} exceeds maxWaitSeconds {self.max_wait_seconds:g}")
        return self

    def prefixes(self, namespace: str) -> list[str]:
        """The storage prefixes of `namespace`."""
        return _of(self.storage.prefixes, namespace)

    def fork_prefixes(self, namespace: str) -> list[str]:
        """Where `namespace` may start adapters from, besides its own prefixes."""
        return _of(self.storage.fork_prefixes, namespace)

    @classmethod
    def of(cls, operator: Settings, **changes: Any) -> ShimSettings:
        """Settings for the release whose operator has these; `changes` are the shim's own fields, such as `auth`."""
        return cls.model_validate(
            {
                "instance": operator.instance,
                "namespace": operator.namespace,
                "watch_namespaces": operator.watch_namespaces,
                "default_base_model": operator.default_base_model,
                "pools": {pool.name: pool.base_model for pool in operator.pools},
                "storage": operator.storage,
                "tenants": operator.tenants,
                "teacher": operator.teacher,
            }
            | changes
        )


def _of(prefixes: Iterable[Prefix], namespace: str) -> list[str]:
    return [prefix.uri.replace("{namespace}", namespace) for prefix in prefixes if prefix.namespace in ("*", namespace)]


def load(path: Path) -> ShimSettings:
    """The settings in the YAML file at `path`.

    Raises:
        SettingsError: it cannot be read, is no mapping, or a key is unknown, missing or out of bounds.
    """
    try:
        return ShimSettings.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except (OSError, yaml.YAMLError) as error:
        raise SettingsError(f"{path}: {error}") from error
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, p['loc'])) or 'the file'}: {p['msg']}" for p in error.errors(include_input=False)
        )
        raise SettingsError(f"{path}: " + "; ".join(problems)) from error
