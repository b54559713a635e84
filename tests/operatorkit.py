"""For the operator's tests: raw objects as the API server gives them, settings with short times, and an API server in
memory that keeps resourceVersions, merges patches and checks preconditions as the real one does."""

from __future__ import annotations

import copy
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_crds.adapter import LoraAdapterStatus
from claas_crds.request import DistillRequestStatus
from claas_operator.actions import Action
from claas_operator.plan import Plan, plan
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind, Snapshot, TeacherHealth, format_time

NOW = datetime(2026, 5, 1, 12, 0, 0, tzinfo=UTC)
MODEL = "org/base"
PREFIX = "s3://adapters/team/"
HOME = "claas-system"
Raw = dict[str, Any]


def settings(**changes: Any) -> Settings:
    """Settings as the chart would render them, with `changes` (camelCase keys) on top."""
    pool = {"name": "l40s", "baseModel": MODEL, "maxWorkers": 2, "template": template("worker")}
    base: Raw = {
        "instance": "claas",
        "namespace": HOME,
        "owner": {"deployment": "claas-operator"},
        "defaultPool": "l40s",
        "defaultBaseModel": MODEL,
        "storage": {"prefixes": [{"uri": "s3://adapters/{namespace}/"}]},
        "pools": [pool | changes.pop("pool", {})],
        "operations": {"template": template("operation")},
    }
    return Settings.model_validate(base | changes)


def template(container: str) -> Raw:
    """The least Pod template."""
    return {"spec": {"containers": [{"name": container, "image": "example/claas:1"}]}}


def metadata(name: str, namespace: str = "team", *, uid: str = "", version: int = 1, created: datetime = NOW) -> Raw:
    return {
        "name": name,
        "namespace": namespace,
        "uid": uid or f"uid-{name}",
        "resourceVersion": str(version),
        "generation": 1,
        "creationTimestamp": created.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def request(
    name: str, adapter: str = "coder", *, spec: Raw | None = None, status: Raw | None = None, **meta: Any
) -> Raw:
    """A DistillRequest on `adapter`; without one, on a bare uri."""
    on = {"adapterRef": {"name": adapter}} if adapter else {"loraUri": f"{PREFIX}bare/"}
    samples = [{"prompt": "a secret question", "response": "a secret answer", "feedback": "a secret remark"}]
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.REQUEST_KIND,
        "metadata": metadata(name, **meta),
        "spec": on | {"samples": samples} | (spec or {}),
        "status": status or {},
    }


def adapter(
    name: str = "coder", *, head: int = 1, spec: Raw | None = None, status: Raw | None = None, **meta: Any
) -> Raw:
    """A LoraAdapter whose head is the version `head`; 0: it has none yet."""
    has = {
        "uri": f"{PREFIX}{name}/",
        "version": name,
        "headSeq": head,
        "history": [
            {"seq": head, "version": name, "uri": f"{PREFIX}{name}/", "requestUid": "", "at": format_time(NOW)}
        ],
    }
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.ADAPTER_KIND,
        "metadata": metadata(name, **meta),
        "spec": {"baseModel": MODEL, "storage": {"uri": f"{PREFIX}{name}/"}} | (spec or {}),
        "status": (has if head else {}) | (status or {}),
    }


def active(name: str, since: datetime = NOW) -> Raw:
    """The lock, as it lies in an adapter's status."""
    return {"requestUid": f"uid-{name}", "requestName": name, "since": format_time(since)}


def bound(worker: str, attempt: int = 1, *, adapter: str = "coder", head: int = 1, at: datetime = NOW) -> Raw:
    """Status of a request that is bound to `worker`; without an adapter, a bare one."""
    parent: Raw = {"uri": f"{PREFIX}bare/"}
    if adapter:
        parent = {"adapterUid": f"uid-{adapter}", "uri": f"{PREFIX}{adapter}/", "headSeq": head}
    return {"worker": worker, "attempt": attempt, "assignedAt": format_time(at), "parent": parent, "state": "Assigned"}


def claim(worker: str, attempt: int = 1, at: datetime = NOW) -> Raw:
    return {"claim": {"worker": worker, "attempt": attempt, "at": format_time(at)}}


NUMBERS: Raw = {
    "totalLoss": 1.0,
    "pgLoss": 0.5,
    "jsdReg": 0.5,
    "meanAdvantage": -0.1,
    "fracPositiveAdvantage": 0.2,
    "meanIsRatio": 1.0,
    "clipFraction": 0.0,
    "gradNorm": 0.3,
    "tokensProcessed": 64,
}


def result(outcome: str = "Succeeded", attempt: int = 1, *, reason: str = "", at: datetime = NOW, uri: str = "") -> Raw:
    """A worker's report."""
    body: Raw = {"attempt": attempt, "outcome": outcome, "reason": reason or outcome, "at": format_time(at)}
    if outcome == "Succeeded":
        body |= {
            "loraUri": uri or f"{PREFIX}coder-20260501-120000-0badcafe/",
            "metadata": NUMBERS,
            "timings": {"stepMs": 7},
        }
    return {"result": body}


def ended(kind: str, reason: str, at: datetime = NOW) -> Raw:
    condition = {"type": kind, "status": "True", "reason": reason, "message": "", "lastTransitionTime": format_time(at)}
    return {"conditions": [condition]}


def worker_labels(pool: str = "l40s", job: str = "") -> Raw:
    labels = {names.INSTANCE_LABEL: "claas", names.COMPONENT_LABEL: "worker", names.POOL_LABEL: pool}
    return labels | ({"batch.kubernetes.io/job-name": job} if job else {})


def pod(name: str, *, job: str = "claas-l40s-1", phase: str = "Running", status: Raw | None = None, **meta: Any) -> Raw:
    """A worker's Pod, which a kubelet has taken."""
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata(name, meta.pop("namespace", HOME), **meta) | {"labels": worker_labels(job=job)},
        "status": {"phase": phase, "startTime": format_time(NOW)} | (status or {}),
    }


def lease(name: str, state: str = "Ready", running: str = "", *, renewed: datetime = NOW, **meta: Any) -> Raw:
    """The Lease of the Pod `name`."""
    annotations = {names.LEASE_STATE: state, names.LEASE_RUNNING: running}
    uid = meta.pop("uid", f"uid-lease-{name}")
    raw = metadata(name, meta.pop("namespace", HOME), uid=uid, **meta)
    return {
        "apiVersion": "coordination.k8s.io/v1",
        "kind": "Lease",
        "metadata": raw | {"labels": worker_labels(), "annotations": annotations},
        "spec": {"holderIdentity": f"uid-{name}", "renewTime": format_time(renewed), "leaseDurationSeconds": 15},
    }


def job(name: str, *, end: str = "", at: datetime = NOW, labels: Raw | None = None, **meta: Any) -> Raw:
    """A worker Job; `end`: Complete or Failed."""
    conditions = [
        {"type": end, "status": "True", "reason": "Some", "message": "why", "lastTransitionTime": format_time(at)}
    ]
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": metadata(name, meta.pop("namespace", HOME), **meta) | {"labels": labels or worker_labels()},
        "status": {"conditions": conditions} if end else {},
    }


def operation_labels(adapter_uid: str, operation: str = "create") -> Raw:
    return {
        names.INSTANCE_LABEL: "claas",
        names.COMPONENT_LABEL: "operation",
        names.OPERATION_LABEL: operation,
        names.ADAPTER_UID_LABEL: adapter_uid,
    }


def answer_pod(job_name: str, answer: Raw | str, phase: str = "Succeeded") -> Raw:
    """The Pod of an operation Job, with its termination message."""
    text = answer if isinstance(answer, str) else json.dumps(answer)
    raw = pod(f"{job_name}-x", job=job_name, phase=phase)
    raw["metadata"]["labels"] = operation_labels("") | {"batch.kubernetes.io/job-name": job_name}
    raw["status"]["containerStatuses"] = [{"name": "operation", "state": {"terminated": {"message": text}}}]
    return raw


_KINDS = {kind.value: kind for kind in Kind}


def kind_of(raw: Raw) -> Kind:
    return _KINDS[raw["kind"]]


def snapshot(*objects: Raw, now: datetime = NOW) -> Snapshot:
    """A snapshot that holds `objects`, seen at `now`."""
    made = Snapshot()
    for raw in objects:
        made.put(kind_of(raw), raw, now)
    assert not made.broken, made.broken
    return made


def later(seconds: float) -> datetime:
    return NOW + timedelta(seconds=seconds)


def merged(target: Any, patch: Any) -> Any:
    """JSON merge patch, RFC 7386."""
    if not isinstance(patch, dict):
        return copy.deepcopy(patch)
    result = dict(target) if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            result.pop(key, None)
        else:
            result[key] = merged(result.get(key), value)
    return result


class _Pause:
    """Gives control back to whoever drives the coroutine."""

    def __await__(self) -> Iterator[None]:
        yield


async def no_pause() -> None:
    return None


async def pause() -> None:
    await _Pause()


_PLURALS = {
    "distillrequests": Kind.REQUEST,
    "loraadapters": Kind.ADAPTER,
    "jobs": Kind.JOB,
    "pods": Kind.POD,
    "leases": Kind.LEASE,
}


@dataclass
class MemoryApi:
    """An API server in memory with the interface of `claas_operator.api.Api`.

    Attributes:
        objects: each as it is now; a change makes a new object and leaves whoever has the old one alone.
        log: every change, as (kind, type, object): what watches deliver.
        pause: awaited before every call, so that a test can let others act in between.
    """

    objects: dict[tuple[Kind, str, str], Raw] = field(default_factory=dict)
    log: list[tuple[Kind, str, Raw]] = field(default_factory=list)
    events: list[Raw] = field(default_factory=list)
    writes: int = 0
    version: int = 100
    clock: Callable[[], datetime] = lambda: NOW
    pause: Callable[[], Awaitable[None]] = no_pause

    def add(self, raw: Raw) -> Raw:
        """Creates an object, as a user, a kubelet or a worker."""
        kind, meta = kind_of(raw), raw["metadata"]
        key = (kind, meta["namespace"], meta["name"])
        if key in self.objects:
            raise ApiException(status=409, reason="AlreadyExists")
        self.version += 1
        stored = copy.deepcopy(raw)
        stored["metadata"]["resourceVersion"] = str(self.version)
        self.objects[key] = stored
        self.log.append((kind, "ADDED", stored))
        return stored

    def change(self, kind: Kind, namespace: str, name: str, patch: Raw) -> Raw:
        """Merges a patch in, without a precondition."""
        key = (kind, namespace, name)
        self.version += 1
        changed = merged(self.objects[key], patch)
        changed["metadata"] = changed["metadata"] | {"resourceVersion": str(self.version)}
        status = changed.get("status") or {}
        if kind is Kind.REQUEST:
            DistillRequestStatus.model_validate(status)
        elif kind is Kind.ADAPTER:
            LoraAdapterStatus.model_validate(status)
        self.objects[key] = changed
        self.log.append((kind, "MODIFIED", changed))
        return changed

    def drop(self, kind: Kind, namespace: str, name: str) -> None:
        """Deletes an object."""
        self.version += 1
        raw = self.objects.pop((kind, namespace, name))
        self.log.append((kind, "DELETED", raw))

    async def get(self, kind: Kind, namespace: str, name: str) -> Raw | None:
        await self.pause()
        return self.objects.get((kind, namespace, name))

    async def get_path(self, path: str, query: Mapping[str, str] | None = None) -> Raw | None:
        """Of the kinds that are not here there is nothing."""
        await self.pause()
        return None

    async def list(self, kind: Kind, selector: str = "", *, metadata_only: bool = False) -> AsyncIterator[Raw]:
        await self.pause()
        for raw in [raw for key, raw in self.objects.items() if key[0] is kind]:
            yield raw

    async def create(self, path: str, body: Raw) -> Raw:
        await self.pause()
        self.writes += 1
        if path.endswith("/events"):
            if body["metadata"]["name"] in [event["metadata"]["name"] for event in self.events]:
                raise ApiException(status=409, reason="AlreadyExists")
            self.events.append(body)
            return body
        meta = body["metadata"]
        created = metadata(
            meta["name"], meta["namespace"], uid=f"uid-{meta['name']}-{self.version}", created=self.clock()
        )
        return self.add(body | {"metadata": created | meta})

    async def patch_status(self, kind: Kind, namespace: str, name: str, version: int, status: Raw) -> Raw:
        await self.pause()
        self.writes += 1
        raw = self.objects.get((kind, namespace, name))
        if raw is None:
            raise ApiException(status=404, reason="NotFound")
        if raw["metadata"]["resourceVersion"] != str(version):
            raise ApiException(status=409, reason="Conflict")
        return self.change(kind, namespace, name, {"status": status})

    async def patch_metadata(self, kind: Kind, namespace: str, name: str, version: int, metadata: Raw) -> Raw:
        await self.pause()
        self.writes += 1
        raw = self.objects.get((kind, namespace, name))
        if raw is None:
            raise ApiException(status=404, reason="NotFound")
        if (raw["metadata"]["resourceVersion"], raw["metadata"]["uid"]) != (str(version), metadata["uid"]):
            raise ApiException(status=409, reason="Conflict")
        changed = self.change(kind, namespace, name, {"metadata": metadata})
        if "deletionTimestamp" in changed["metadata"] and not changed["metadata"].get("finalizers"):
            self.drop(kind, namespace, name)
        return changed

    def ask_to_delete(self, kind: Kind, namespace: str, name: str) -> None:
        """As a user deletes: what has a finalizer stays, and says since when it should be gone."""
        meta = self.objects[kind, namespace, name]["metadata"]
        if not meta.get("finalizers"):
            self.drop(kind, namespace, name)
        elif "deletionTimestamp" not in meta:
            self.change(kind, namespace, name, {"metadata": {"deletionTimestamp": format_time(self.clock())}})

    async def delete(
        self, kind: Kind, namespace: str, name: str, *, uid: str, grace_seconds: int | None = None
    ) -> None:
        await self.pause()
        self.writes += 1
        raw = self.objects.get((kind, namespace, name))
        if raw is None:
            raise ApiException(status=404, reason="NotFound")
        if raw["metadata"]["uid"] != uid:
            raise ApiException(status=409, reason="Conflict")
        if kind is Kind.POD and grace_seconds != 0:
            self.change(kind, namespace, name, {"metadata": {"deletionTimestamp": format_time(self.clock())}})
        else:
            self.drop(kind, namespace, name)

    def path(self, kind: Kind, namespace: str, name: str = "") -> str:
        return f"/{namespace}/{kind.value}/{name}"


WORKER = "claas-l40s-1-aaaaa"
OTHER = "claas-l40s-2-bbbbb"


def workers(*names: str) -> list[Raw]:
    """Ready, idle workers."""
    return [
        raw
        for i, name in enumerate(names, 1)
        for raw in (job(f"claas-l40s-{i}"), pod(name, job=f"claas-l40s-{i}"), lease(name))
    ]


def about(made: Plan, kind: type[Action]) -> list[Action]:
    return [action for action in made.actions if isinstance(action, kind)]


def decide(*objects: Raw, at: float = 0, using: Settings | None = None, teacher: TeacherHealth | None = None) -> Plan:
    """The plan over `objects`, `at` seconds after NOW, with the workers' Leases just renewed."""
    seen = snapshot(*objects, now=later(at))
    seen.teacher = teacher
    return plan(seen, using or settings(), later(at))


def only(made: Plan, kind: type[Action]) -> Action:
    assert [type(action) for action in made.actions] == [kind], made.actions
    return made.actions[0]
