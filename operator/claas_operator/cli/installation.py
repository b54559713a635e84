"""Releases of CLaaS in a cluster, and how their parts are: read from what the chart and the operator keep."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final

import yaml

from claas_client.models import Health, Part, Workers
from claas_crds import names
from claas_operator.cli.exits import Exit
from claas_operator.cli.kube import Kube, Object
from claas_operator.cli.problem import Problem

DEFAULT_NAMESPACE: Final = "claas-system"
DEFAULT_RELEASE: Final = "claas"
NAME_LABEL: Final = "app.kubernetes.io/name"
LEASE_SECONDS: Final = 15  # of the leader's and of a worker's Lease, where the settings do not say
APPS, CORE, BATCH = "/apis/apps/v1", "/api/v1", "/apis/batch/v1"
LEASES: Final = "/apis/coordination.k8s.io/v1"


@dataclass(frozen=True)
class Release:
    """A Helm release of the chart."""

    name: str
    namespace: str

    def __str__(self) -> str:
        return f"release {self.name} in namespace {self.namespace}"

    @property
    def selector(self) -> str:
        """Of everything that belongs to it."""
        return f"{names.INSTANCE_LABEL}={self.name}"


def releases(kube: Kube) -> list[Release]:
    """The releases in the cluster, as far as they may be seen.

    Raises:
        Problem: the API server does not answer.
    """
    selector = f"{NAME_LABEL}=claas,{names.COMPONENT_LABEL}=operator"
    try:
        found = list(kube.list(f"{APPS}/deployments", labelSelector=selector))
    except Problem as problem:
        if problem.code is not Exit.DENIED:
            raise
        return []
    return [Release(item["metadata"]["labels"][names.INSTANCE_LABEL], item["metadata"]["namespace"]) for item in found]


def the_release(kube: Kube, name: str | None = None, namespace: str | None = None) -> Release:
    """The one that is meant: the named one, the only one there is, or the usual one."""
    if name or namespace:
        return Release(name or DEFAULT_RELEASE, namespace or DEFAULT_NAMESPACE)
    found = releases(kube)
    return found[0] if len(found) == 1 else Release(DEFAULT_RELEASE, DEFAULT_NAMESPACE)


def settings(kube: Kube, release: Release) -> Object:
    """The operator's settings, as the chart wrote them.

    Raises:
        Problem: they are not there, or may not be read.
    """
    found = kube.get(f"{CORE}/namespaces/{release.namespace}/configmaps/{release.name}-operator")
    try:
        content = yaml.safe_load((found.get("data") or {})["config.yaml"])
    except (KeyError, yaml.YAMLError):
        content = None
    if not isinstance(content, dict):
        raise Problem(f"ConfigMap {release.name}-operator holds no settings", "install the chart again: claas deploy")
    return content


def lease_age(lease: Object) -> timedelta | None:
    """Since it was renewed, by this machine's clock; None: never."""
    renewed = (lease.get("spec") or {}).get("renewTime")
    return datetime.now(UTC) - datetime.fromisoformat(renewed) if renewed else None


def fresh(lease: Object) -> bool:
    """Whether its holder is alive, with twice its duration for clocks that differ."""
    age = lease_age(lease)
    duration = (lease.get("spec") or {}).get("leaseDurationSeconds") or LEASE_SECONDS
    return age is not None and age < timedelta(seconds=2 * duration)


def operator_part(kube: Kube, release: Release) -> Part:
    """Whether an operator acts: the holder of the leader's Lease."""
    lease = kube.find(f"{LEASES}/namespaces/{release.namespace}/leases/{release.name}-operator")
    if lease is None:
        return Part(status="unhealthy", message=f"no operator has ever led {release}")
    holder = (lease.get("spec") or {}).get("holderIdentity") or ""
    if not holder or not fresh(lease):
        return Part(status="unhealthy", message="no operator leads: its Lease is not renewed")
    return Part(status="healthy", message=f"{holder} leads")


def worker_leases(kube: Kube, release: Release) -> Iterator[Object]:
    """The Leases of its workers, in the release's namespace."""
    selector = f"{release.selector},{names.COMPONENT_LABEL}={names.COMPONENT_WORKER}"
    return kube.list(f"{LEASES}/namespaces/{release.namespace}/leases", labelSelector=selector)


def workers_part(kube: Kube, release: Release) -> Workers:
    """The workers that renew their Leases, by state."""
    states = [
        ((lease["metadata"].get("annotations") or {}).get(names.LEASE_STATE) or "")
        for lease in worker_leases(kube, release)
        if fresh(lease)
    ]
    ready, starting, draining = (
        states.count(state) for state in (names.STATE_READY, names.STATE_STARTING, names.STATE_DRAINING)
    )
    said = "" if states else "none runs; one is started when there is work"
    return Workers(status="healthy", message=said, ready=ready, starting=starting, draining=draining)


def teacher_part(kube: Kube, release: Release, configured: Object) -> Part:
    """Whether the teacher's Deployment is ready; one elsewhere cannot be seen from here."""
    url = (configured.get("teacher") or {}).get("url")
    if not url:
        return Part(status="unknown", message="there is none: requests need teacher.mode Self or Provided")
    deployment = kube.find(f"{APPS}/namespaces/{release.namespace}/deployments/{release.name}-teacher")
    if deployment is None:
        return Part(status="unknown", message=f"it is elsewhere ({url}), and not seen from here")
    wanted, ready = (deployment.get("spec") or {}).get("replicas", 1), ready_replicas(deployment)
    status = "healthy" if ready else "unhealthy"
    return Part(status=status, message=f"{ready} of {wanted} ready")


def ready_replicas(deployment: Object) -> int:
    """Of a Deployment."""
    return int((deployment.get("status") or {}).get("readyReplicas") or 0)


def health(kube: Kube, release: Release) -> Health:
    """Each part's state, as the API server's objects tell it; what may not be read is unknown."""

    def seen(part: Any, *arguments: Any, workers: bool = False) -> Any:
        try:
            return part(kube, release, *arguments)
        except Problem as problem:
            if problem.code not in (Exit.DENIED, Exit.NOT_FOUND):
                raise
            return (Workers if workers else Part)(status="unknown", message=f"not seen: {problem.message}")

    configured: Object = {}
    try:
        configured = settings(kube, release)
        teacher = seen(teacher_part, configured)
    except Problem as problem:
        if problem.code not in (Exit.DENIED, Exit.NOT_FOUND):
            raise
        teacher = Part(status="unknown", message=f"not seen: {problem.message}")
    parts = {
        "operator": seen(operator_part),
        "workers": seen(workers_part, workers=True),
        "teacher": teacher,
        "object_store": Part(status="unknown", message="not looked at by kubeconfig; `claas doctor` does"),
        "api_server": Part(status="healthy", message=kube.where),
    }
    bad = any(part.status == "unhealthy" for part in parts.values())
    return Health(status="unhealthy" if bad else parts["operator"].status, **parts)
