"""Worker and operation Jobs as pure functions: the chart's Pod templates, with what only the operator knows added."""

from __future__ import annotations

import copy
from typing import Any, Final

from claas_crds import names
from claas_operator.settings import OPERATION_CONTAINER, WORKER_CONTAINER, Pool, Settings
from claas_operator.snapshot import Adapter

Manifest = dict[str, Any]

# The workers that `minWorkers` keeps never leave for want of work: a year, as good as for ever.
NEVER_SECONDS: Final = 31_536_000


def worker_stem(settings: Settings, pool: Pool) -> str:
    """What the names of a pool's worker Jobs begin with; a counter follows."""
    return f"{settings.instance}-{pool.name}"


# The operations, and what each adds to its Jobs' names: no longer, or a long release's name leaves the counter no room.
OPERATION_STEMS: Final = {
    "create": "create",
    "tombstone": "mark",
    "restore": "restore",
    "delete": "delete",
    "destroy": "destroy",
    "sweep": "sweep",
}


def operation_stem(settings: Settings, operation: str, adapter_uid: str) -> str:
    """What the names of an operation's Jobs for an adapter begin with; a counter follows. 64 random bits are unique."""
    return f"{settings.instance}-{OPERATION_STEMS[operation]}-{adapter_uid.replace('-', '')[:16]}"


def selector(settings: Settings, component: str) -> dict[str, str]:
    """Labels of everything of ours with that component."""
    return {names.INSTANCE_LABEL: settings.instance, names.COMPONENT_LABEL: component}


def build_worker_job(
    settings: Settings, pool: Pool, namespace: str, counter: int, owner_uid: str | None, *, stays: bool = False
) -> Manifest:
    """A lease on one GPU: a Job whose one Pod serves requests until it is idle, full or told to drain.

    Args:
        namespace: where it runs: the release's, or a tenant's with isolation Namespace.
        owner_uid: of the operator's Deployment; an owner in another namespace would have the Job collected at once.
        stays: one of the pool's `minWorkers`, which do not leave when idle.
    """
    labels = selector(settings, names.COMPONENT_WORKER) | {names.POOL_LABEL: pool.name}
    watched = "" if pool.isolation == "Shared" else namespace
    linger = number(NEVER_SECONDS if stays else pool.linger_seconds)
    annotations = {names.LINGER_SECONDS: linger, names.EDITION: pool.edition}
    environment = [
        {"name": names.ENV_INSTANCE, "value": settings.instance},
        {"name": names.ENV_POOL, "value": pool.name},
        {"name": names.ENV_BASE_MODEL, "value": pool.base_model},
        {"name": names.ENV_LINGER_SECONDS, "value": linger},
        {"name": names.ENV_MAX_REQUESTS, "value": str(pool.max_requests)},
        {"name": names.ENV_BATCH, "value": str(pool.batch)},
        {"name": names.ENV_WATCH_NAMESPACE, "value": watched},
        {"name": names.ENV_LEASE_SECONDS, "value": number(settings.timings.lease_seconds)},
        _from_field(names.ENV_POD_NAME, "metadata.name"),
        _from_field(names.ENV_POD_NAMESPACE, "metadata.namespace"),
        _from_field(names.ENV_POD_UID, "metadata.uid"),
    ]
    template = _stamp(pool.template, labels, WORKER_CONTAINER, environment, annotations)
    spec = {
        "backoffLimit": 0,  # the operator starts another one, under another name, when there is work
        "ttlSecondsAfterFinished": settings.timings.worker_ttl_seconds,
        "template": template,
    }
    name = f"{worker_stem(settings, pool)}-{counter}"
    # Of the Job alone: Kueue's own webhook then suspends it, and lets it go when its quota allows.
    queue = {names.KUEUE_QUEUE_LABEL: pool.queue_name} if pool.queue_name else {}
    return _job(settings, name, namespace, labels | queue, spec, owner_uid, annotations)


def create_arguments(settings: Settings, adapter: Adapter) -> list[str]:
    """What `claas_store create` needs to know: a fresh, zero-effect version, or one from `spec.initFrom`.

    Raises:
        ValueError: the adapter's spec does not validate.
    """
    if adapter.spec is None:
        raise ValueError(f"adapter {adapter}: {adapter.problem}")
    lora = adapter.spec.lora
    return [
        "create",
        *("--uri", adapter.spec.storage.uri),
        *("--base-model", adapter.spec.base_model),
        *("--model-dir", settings.operations.model_dir),
        *("--r", str(lora.r)),
        *("--alpha", number(lora.alpha)),
        *("--target-modules", ",".join(lora.target_modules)),
        *("--adapter-uid", adapter.uid),
        *(("--init-from", adapter.spec.init_from.uri) if adapter.spec.init_from else ()),
    ]


def build_operation_job(
    settings: Settings,
    operation: str,
    name: str,
    adapter: Adapter,
    namespace: str,
    arguments: list[str],
    owner_uid: str | None,
    template: Manifest | None = None,
) -> Manifest:
    """A small CPU Job that runs `claas_store` with `arguments` for one adapter.

    Args:
        template: of a pool whose operations run as its tenant; None: the release's.
    """
    labels = selector(settings, names.COMPONENT_OPERATION) | {
        names.OPERATION_LABEL: operation,
        names.ADAPTER_UID_LABEL: adapter.uid,
        names.GENERATION_LABEL: str(adapter.generation),
    }
    operations = settings.operations
    template = _stamp(template or operations.template, labels, OPERATION_CONTAINER, [])
    container = next(c for c in template["spec"]["containers"] if c["name"] == OPERATION_CONTAINER)
    container["args"] = [*container.get("args", []), *arguments]
    spec = {
        "backoffLimit": operations.backoff_limit,
        "activeDeadlineSeconds": operations.active_deadline_seconds,
        "ttlSecondsAfterFinished": operations.ttl_seconds_after_finished,
        "template": template,
    }
    return _job(settings, name, namespace, labels, spec, owner_uid)


def number(value: float) -> str:
    """Without an exponent or a needless fraction, and without loss."""
    return str(int(value)) if value == int(value) else repr(value)


def _from_field(name: str, path: str) -> Manifest:
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def _stamp(
    template: Manifest,
    labels: dict[str, str],
    name: str,
    environment: list[Manifest],
    annotations: dict[str, str] | None = None,
) -> Manifest:
    """A copy of the chart's template with our metadata, no restarts, and our environment in the container `name`."""
    stamped = copy.deepcopy(template)
    metadata = stamped.setdefault("metadata", {})
    metadata["labels"] = (metadata.get("labels") or {}) | labels
    if annotations:
        metadata["annotations"] = (metadata.get("annotations") or {}) | annotations
    # A container that restarted inside its Pod would train under the claim of the one before.
    stamped["spec"]["restartPolicy"] = "Never"
    container = next(c for c in stamped["spec"]["containers"] if c["name"] == name)
    ours = {variable["name"] for variable in environment}
    kept = [variable for variable in container.get("env") or [] if variable["name"] not in ours]
    container["env"] = environment + kept
    return stamped


def _job(
    settings: Settings,
    name: str,
    namespace: str,
    labels: dict[str, str],
    spec: Manifest,
    owner_uid: str | None,
    annotations: dict[str, str] | None = None,
) -> Manifest:
    metadata: Manifest = {"name": name, "namespace": namespace, "labels": labels}
    if annotations:
        metadata["annotations"] = annotations
    if namespace == settings.namespace and (owners := owner_references(settings, owner_uid)):
        metadata["ownerReferences"] = owners
    return {"apiVersion": "batch/v1", "kind": "Job", "metadata": metadata, "spec": spec}


def owner_references(settings: Settings, owner_uid: str | None) -> list[Manifest]:
    """What makes an object go with the operator's Deployment, of its namespace; empty while that is unknown."""
    if settings.owner is None or owner_uid is None:
        return []
    return [{"apiVersion": "apps/v1", "kind": "Deployment", "name": settings.owner.deployment, "uid": owner_uid}]
