"""What a release needs of a cluster, read from the objects that Helm renders or that are installed already: pure.

`Needs.of(objects)` collects; `checks` compares it with a cluster's nodes, storage classes and quotas.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from typing import Any, Final

import yaml

Object = dict[str, Any]

GPU: Final = "nvidia.com/gpu"
# What the scheduler looks at, as people name it.
RESOURCES: Final = {GPU: "GPUs", "cpu": "cores", "memory": "memory"}
_SUFFIXES: Final = {
    **{f"{letter}i": Decimal(1024) ** power for power, letter in enumerate("KMGTPE", 1)},
    **{letter: Decimal(1000) ** power for power, letter in enumerate("kMGTPE", 1)},
    "m": Decimal("0.001"),
    "u": Decimal("0.000001"),
    "n": Decimal("0.000000001"),
}


def quantity(text: object) -> Decimal:
    """A Kubernetes quantity as a number; 0 for what is none."""
    words = str(text).strip()
    for suffix in sorted(_SUFFIXES, key=len, reverse=True):
        if words.endswith(suffix):
            words, factor = words.removesuffix(suffix), _SUFFIXES[suffix]
            break
    else:
        factor = Decimal(1)
    try:
        return Decimal(words) * factor
    except InvalidOperation:
        return Decimal(0)


@dataclass(frozen=True)
class Workload:
    """Pods of one kind.

    Attributes:
        name: for people: `pool l40s`, `teacher`.
        setting: the chart's value that says where it runs.
        count: how many at once, at most.
        wants: of one Pod: nvidia.com/gpu, cpu, memory.
    """

    name: str
    setting: str
    count: int
    node_selector: Mapping[str, str]
    tolerations: Sequence[Mapping[str, Any]]
    wants: Mapping[str, Decimal]

    @classmethod
    def of(cls, name: str, setting: str, count: int, template: Mapping[str, Any]) -> Workload:
        """From a Pod template."""
        spec = template.get("spec") or {}
        wants = {resource: _wanted(spec.get("containers") or [], resource) for resource in RESOURCES}
        return cls(name, setting, count, spec.get("nodeSelector") or {}, spec.get("tolerations") or [], wants)

    def runs_on(self, node: Mapping[str, Any]) -> bool:
        """Whether its selector and its tolerations let it run there at all."""
        labels = node["metadata"].get("labels") or {}
        if any(labels.get(key) != value for key, value in self.node_selector.items()):
            return False
        taints = (node.get("spec") or {}).get("taints") or []
        return all(self._tolerates(taint) for taint in taints if taint.get("effect") in ("NoSchedule", "NoExecute"))

    def _tolerates(self, taint: Mapping[str, Any]) -> bool:
        return any(
            tolerated.get("effect") in (None, "", taint.get("effect"))
            and (
                (tolerated.get("operator") == "Exists" and tolerated.get("key") in (None, "", taint["key"]))
                or (tolerated.get("key") == taint["key"] and tolerated.get("value", "") == taint.get("value", ""))
            )
            for tolerated in self.tolerations
        )

    def fits(self, node: Mapping[str, Any]) -> bool:
        """Whether one of its Pods fits into the node when that is empty."""
        allocatable = (node.get("status") or {}).get("allocatable") or {}
        return all(quantity(allocatable.get(resource, 0)) >= amount for resource, amount in self.wants.items())


def _wanted(containers: Iterable[Mapping[str, Any]], resource: str) -> Decimal:
    total = Decimal(0)
    for container in containers:
        resources = container.get("resources") or {}
        requests, limits = resources.get("requests") or {}, resources.get("limits") or {}
        total += quantity(requests.get(resource, limits.get(resource, 0)))
    return total


@dataclass(frozen=True)
class Claim:
    """A volume that the release asks for."""

    name: str
    storage_class: str  # empty: the cluster's default
    modes: Sequence[str]


@dataclass
class Needs:
    """All of it.

    Attributes:
        settings: the operator's, as in its ConfigMap; empty when there is none.
        secrets: names with the keys that containers read from them, without those that the release brings itself.
        endpoint: of the object store; empty: AWS.
        ours: the endpoint is in the release itself (SeaweedFS).
    """

    workloads: list[Workload] = field(default_factory=list)
    claims: list[Claim] = field(default_factory=list)
    secrets: dict[str, set[str]] = field(default_factory=dict)
    crds: dict[str, Object] = field(default_factory=dict)
    settings: Object = field(default_factory=dict)
    endpoint: str = ""
    region: str = ""
    ours: bool = False

    @classmethod
    def of(cls, objects: Iterable[Object], release: str) -> Needs:
        """What these objects of a release need."""
        found, own = cls(), set[str]()
        for item in objects:
            name = item["metadata"]["name"]
            match item["kind"]:
                case "Deployment":
                    found._deployment(name, release, item["spec"])
                case "PersistentVolumeClaim":
                    spec = item["spec"]
                    found.claims.append(Claim(name, spec.get("storageClassName") or "", spec["accessModes"]))
                case "Secret":
                    own.add(name)
                case "CustomResourceDefinition":
                    found.crds[name] = item
                case "ConfigMap" if name == f"{release}-operator":
                    found.add_settings(yaml.safe_load(item["data"]["config.yaml"]))
                case "Job":
                    found._environment(item["spec"]["template"])
        for name in own:
            found.secrets.pop(name, None)
        return found

    def _deployment(self, name: str, release: str, spec: Mapping[str, Any]) -> None:
        part = name.removeprefix(f"{release}-")
        self.workloads.append(Workload.of(part, f"{part}.nodeSelector", spec.get("replicas", 1), spec["template"]))
        self._environment(spec["template"])
        if part == "seaweedfs":
            self.ours = True

    def add_settings(self, settings: Object) -> None:
        """The operator's settings: its pools and its operations."""
        self.settings = settings
        for number, pool in enumerate(settings.get("pools") or []):
            name, most = f"pool {pool['name']}", int(pool.get("maxWorkers", 1))
            self.workloads.append(Workload.of(name, f"pools[{number}].nodeSelector", most, pool["template"]))
            if pool.get("isolation") != "Namespace":  # those lie in the tenants' namespaces
                self._environment(pool["template"])
        self._environment((settings.get("operations") or {}).get("template") or {})

    def _environment(self, template: Mapping[str, Any]) -> None:
        spec = template.get("spec") or {}
        for container in [*(spec.get("initContainers") or []), *(spec.get("containers") or [])]:
            for variable in container.get("env") or []:
                reference = ((variable.get("valueFrom") or {}).get("secretKeyRef")) or {}
                if reference and not reference.get("optional"):
                    self.secrets.setdefault(reference["name"], set()).add(reference["key"])
                if variable["name"] == "AWS_ENDPOINT_URL_S3":
                    self.endpoint = variable.get("value") or ""
                if variable["name"] == "AWS_REGION":
                    self.region = variable.get("value") or ""

    @property
    def prefixes(self) -> list[str]:
        """The storage prefixes, with {namespace} as it is written."""
        return [prefix["uri"] for prefix in (self.settings.get("storage") or {}).get("prefixes") or []]


def label_values(nodes: Iterable[Mapping[str, Any]], key: str) -> Iterator[str]:
    """The values of a label that nodes carry, each once."""
    yield from sorted({value for node in nodes if (value := (node["metadata"].get("labels") or {}).get(key))})
