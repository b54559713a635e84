"""Whether a cluster is fit for a release: pure comparisons of needs and facts, each with what to do about it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final

from claas_operator.cli.needs import GPU, RESOURCES, Needs, Object, Workload, label_values, quantity

MINIMUM_VERSION: Final = (1, 32)
DEFAULT_CLASS: Final = "storageclass.kubernetes.io/is-default-class"


class Level(StrEnum):
    """How bad it is."""

    OK = "ok"
    WARNING = "warning"
    WRONG = "wrong"


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        what: was looked at, in a word or two.
        says: what was found.
        fix: what to do; empty when all is well.
    """

    what: str
    level: Level
    says: str
    fix: str = ""

    def as_json(self) -> dict[str, str]:
        """For --output json."""
        return asdict(self) | {"level": self.level.value}


def ok(what: str, says: str) -> Check:
    """It is well."""
    return Check(what, Level.OK, says)


def warning(what: str, says: str, fix: str) -> Check:
    """It may be well, or cannot be seen."""
    return Check(what, Level.WARNING, says, fix)


def wrong(what: str, says: str, fix: str) -> Check:
    """It will not work."""
    return Check(what, Level.WRONG, says, fix)


def worst(checks: Sequence[Check]) -> Level:
    """The worst level among them."""
    levels = [check.level for check in checks]
    return next((level for level in (Level.WRONG, Level.WARNING) if level in levels), Level.OK)


def version(answer: Mapping[str, Any]) -> Check:
    """The answer of /version."""
    said = str(answer.get("gitVersion") or f"{answer.get('major')}.{answer.get('minor')}")
    digits = [int(re.sub(r"\D.*", "", str(answer.get(part) or "0")) or 0) for part in ("major", "minor")]
    if (digits[0], digits[1]) < MINIMUM_VERSION:
        need = ".".join(map(str, MINIMUM_VERSION))
        return wrong("server version", said, f"upgrade the cluster: Kubernetes {need} or newer is needed")
    return ok("server version", said)


def crds(
    expected: Mapping[str, Object],
    found: Mapping[str, Object | None],
    *,
    will_install: bool,
    release: tuple[str, str] = ("", ""),
) -> Iterator[Check]:
    """The kinds that the chart or this command knows, against those in the cluster.

    Args:
        release: name and namespace of the release that will install them.
    """
    for name, ours in expected.items():
        theirs = found.get(name)
        if theirs is None:
            if will_install:
                yield ok("kinds", f"{name} will be installed")
            else:
                fix = "claas crds | kubectl apply --server-side -f -, or install the chart with crds.install=true"
                yield wrong("kinds", f"{name} is not installed", fix)
        elif will_install and _owner(theirs) != release:
            fix = "leave them as they are: --set crds.install=false"
            yield wrong("kinds", f"{name} is there already, and not this release's: Helm will not touch it", fix)
        elif not _established(theirs):
            fix = f"kubectl describe crd {name} says why"
            yield wrong("kinds", f"{name} is not Established", fix)
        elif _schemas(theirs) != _schemas(ours):
            fix = "" if will_install else "claas crds | kubectl apply --server-side -f -"
            says = f"{name} is another release's" + (" and will be updated" if will_install else "")
            yield ok("kinds", says) if will_install else warning("kinds", says, fix)
        else:
            yield ok("kinds", f"{name} is this release's")


def _owner(crd: Object) -> tuple[str, str]:
    """The Helm release that it belongs to: name and namespace."""
    annotations = crd["metadata"].get("annotations") or {}
    name, namespace = (annotations.get(f"meta.helm.sh/release-{part}") or "" for part in ("name", "namespace"))
    return name, namespace


def _established(crd: Object) -> bool:
    conditions = (crd.get("status") or {}).get("conditions") or []
    return any(c.get("type") == "Established" and c.get("status") == "True" for c in conditions)


def _schemas(crd: Object) -> dict[str, Any]:
    return {v["name"]: (v.get("schema") or {}).get("openAPIV3Schema") for v in crd["spec"]["versions"]}


def nodes(workload: Workload, found: Sequence[Object]) -> Check:
    """Whether a node of the cluster can take one of the workload's Pods, and how many all of them can."""
    selector = ", ".join(f"{key}={value}" for key, value in workload.node_selector.items()) or "any node"
    usable = [node for node in found if _schedulable(node)]
    labelled = [n for n in usable if _labelled(workload, n)]
    where = f"--set {workload.setting}=…"
    if not labelled:
        known = "; ".join(
            f"{key}: {', '.join(label_values(usable, key)) or 'on no node'}" for key in workload.node_selector
        )
        fix = f"label the nodes or choose others ({where}); there are {known}" if known else "add a node"
        return wrong(workload.name, f"no schedulable node has {selector}", fix)
    allowed = [node for node in labelled if workload.runs_on(node)]
    if not allowed:
        fix = f"tolerate their taints ({where.replace('nodeSelector', 'tolerations')})"
        return wrong(workload.name, f"{len(labelled)} node(s) with {selector}, all tainted", fix)
    fitting = [node for node in allowed if workload.fits(node)]
    if not fitting:
        lacks = ", ".join(_lacks(workload, allowed))
        fix = f"larger nodes, or smaller requests ({where.replace('nodeSelector', 'resources')})"
        if workload.wants.get(GPU) and not any(_allocatable(node, GPU) for node in allowed):
            fix = "install the NVIDIA device plugin: the nodes offer no nvidia.com/gpu"
        return wrong(workload.name, f"{len(allowed)} node(s) with {selector}, none large enough: {lacks}", fix)
    room = sum(_room(workload, node) for node in fitting)
    says = f"{len(fitting)} node(s) with {selector}: room for {room}"
    if workload.wants.get(GPU):
        says += f", {sum(_allocatable(node, GPU) for node in fitting)} GPUs allocatable"
    if room < workload.count:
        return warning(workload.name, f"{says}, of {workload.count} wanted", "add nodes, or fewer will run at once")
    return ok(workload.name, says)


def _schedulable(node: Object) -> bool:
    ready = [c for c in (node.get("status") or {}).get("conditions") or [] if c.get("type") == "Ready"]
    return not (node.get("spec") or {}).get("unschedulable") and any(c.get("status") == "True" for c in ready)


def _labelled(workload: Workload, node: Object) -> bool:
    labels = node["metadata"].get("labels") or {}
    return all(labels.get(key) == value for key, value in workload.node_selector.items())


def _allocatable(node: Object, resource: str) -> int:
    return int(quantity(((node.get("status") or {}).get("allocatable") or {}).get(resource, 0)))


def _room(workload: Workload, node: Object) -> int:
    rooms = [
        int(quantity(node["status"]["allocatable"].get(resource, 0)) // amount)
        for resource, amount in workload.wants.items()
        if amount
    ]
    return min(rooms, default=workload.count)


def _lacks(workload: Workload, allowed: Sequence[Object]) -> Iterator[str]:
    for resource, amount in workload.wants.items():
        most = max(quantity((node["status"].get("allocatable") or {}).get(resource, 0)) for node in allowed)
        if most < amount:
            yield f"{_readable(amount, resource)} {RESOURCES[resource]} wanted, {_readable(most, resource)} at most"


def _readable(amount: Decimal, resource: str) -> str:
    return f"{amount / 2**30:.1f} GiB" if resource == "memory" else f"{amount.normalize():f}"


def storage_classes(needs: Needs, found: Sequence[Object], existing: Sequence[str]) -> Iterator[Check]:
    """Whether each new volume has a class. `existing`: names of the claims that are there already."""
    names = [item["metadata"]["name"] for item in found]
    default = [i for i in found if (i["metadata"].get("annotations") or {}).get(DEFAULT_CLASS) == "true"]
    for claim in needs.claims:
        what = f"volume {claim.name}"
        if claim.name in existing:
            yield ok(what, "is there already")
        elif claim.storage_class and claim.storage_class not in names:
            fix = f"one of: {', '.join(names) or 'none exists'} (…volume.storageClassName)"
            yield wrong(what, f"there is no storage class {claim.storage_class}", fix)
        elif not claim.storage_class and not default:
            fix = f"set …volume.storageClassName to one of: {', '.join(names) or 'none exists'}; or …existingClaim"
            yield wrong(what, "names no storage class, and the cluster has no default one", fix)
        else:
            name = claim.storage_class or default[0]["metadata"]["name"]
            provisioner = next((str(i.get("provisioner")) for i in found if i["metadata"]["name"] == name), "")
            if "ReadWriteMany" in claim.modes and _one_node(provisioner):
                fix = "choose a class for several nodes (…volume.storageClassName), or accessModes=[ReadWriteOnce]"
                yield warning(what, f"asks for ReadWriteMany, and {name} ({provisioner}) gives one node alone", fix)
            else:
                yield ok(what, f"storage class {name}, {', '.join(claim.modes)}")


def _one_node(provisioner: str) -> bool:
    """Whether a well-known provisioner cannot mount a volume on several nodes."""
    single = ("ebs.csi.aws.com", "pd.csi.storage.gke.io", "disk.csi.azure.com", "local-path", "no-provisioner")
    return any(word in provisioner for word in (*single, "aws-ebs", "gce-pd", "azure-disk", "hostpath"))


def secrets(needs: Needs, found: Mapping[str, Object | str | None]) -> Iterator[Check]:
    """The Secrets that containers read. `found`: the object, None when absent, or text when it may not be read."""
    for name, keys in needs.secrets.items():
        secret, what = found.get(name), f"Secret {name}"
        create = " ".join(f"--from-literal={key}=…" for key in sorted(keys))
        if isinstance(secret, str):
            yield warning(what, f"cannot be seen: {secret}", "make sure that it is there")
        elif secret is None:
            yield wrong(what, "is not there", f"kubectl create secret generic {name} {create} (in that namespace)")
        elif absent := sorted(keys - set(secret.get("data") or {})):
            yield wrong(what, f"lacks {', '.join(absent)}", f"add the key(s): it needs {', '.join(sorted(keys))}")
        else:
            yield ok(what, f"has {', '.join(sorted(keys))}")


def quotas(needs: Needs, found: Sequence[Object]) -> Iterator[Check]:
    """Whether the namespace's ResourceQuotas leave room for one Pod of each workload."""
    if not found:
        yield ok("quota", "none in this namespace")
    for item in found:
        hard, used = (item.get("status") or {}).get("hard") or {}, (item.get("status") or {}).get("used") or {}
        name = item["metadata"]["name"]
        short = []
        for resource in RESOURCES:
            wanted = sum((workload.wants.get(resource, Decimal(0)) for workload in needs.workloads), Decimal(0))
            for key in (f"requests.{resource}", resource):
                if key in hard and wanted > (left := quantity(hard[key]) - quantity(used.get(key, 0))):
                    short.append(f"{key}: {_readable(wanted, resource)} wanted, {_readable(left, resource)} left")
        if short:
            yield wrong("quota", f"{name}: {'; '.join(short)}", f"raise ResourceQuota {name}, or ask for less")
        else:
            yield ok("quota", f"{name} has room for one Pod of each part")
