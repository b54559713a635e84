"""Whether a cluster is fit for a release: needs from the chart itself, facts as the API server gives them."""

from __future__ import annotations

from decimal import Decimal
from typing import Any

import pytest
import yaml

from claas_operator.cli import checks
from claas_operator.cli.checking import reach_store, trouble
from claas_operator.cli.checks import Level
from claas_operator.cli.needs import Claim, Needs, Workload, quantity
from operatorkit import Raw, template

L40S = {"nvidia.com/gpu.product": "NVIDIA-L40S"}
TAINT = {"key": "nvidia.com/gpu", "value": "present", "effect": "NoSchedule"}
TOLERATION = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}


def node(
    name: str = "a", labels: dict[str, str] | None = None, taints: tuple[Raw, ...] = (), **allocatable: str
) -> Raw:
    resources = {"cpu": "16", "memory": "64Gi", "nvidia.com/gpu": "2"} | {
        key.replace("gpu", "nvidia.com/gpu"): value for key, value in allocatable.items()
    }
    status = {"allocatable": resources, "conditions": [{"type": "Ready", "status": "True"}]}
    return {"metadata": {"name": name, "labels": labels or L40S}, "spec": {"taints": list(taints)}, "status": status}


def workload(count: int = 2, **changes: Any) -> Workload:
    wants = {"nvidia.com/gpu": Decimal(1), "cpu": Decimal(2), "memory": Decimal(16 * 2**30)}
    fields: dict[str, Any] = {"node_selector": L40S, "tolerations": [TOLERATION], "wants": wants}
    return Workload("pool l40s", "pools[0].nodeSelector", count, **(fields | changes))


@pytest.mark.parametrize(
    ("text", "number"),
    [("2", 2), ("250m", 0.25), ("16Gi", 16 * 2**30), ("1k", 1000), ("1e3", 1000), (3, 3), ("many", 0), ("", 0)],
)
def test_quantities(text: object, number: float) -> None:
    assert quantity(text) == Decimal(str(number))


def test_nodes_that_fit() -> None:
    found = checks.nodes(workload(), [node("a", taints=(TAINT,)), node("b"), node("other", {"x": "y"})])
    assert found.level is Level.OK
    assert found.says == "2 node(s) with nvidia.com/gpu.product=NVIDIA-L40S: room for 4, 4 GPUs allocatable"


@pytest.mark.parametrize(
    ("nodes", "says", "fix"),
    [
        ([], "no schedulable node has nvidia.com/gpu.product=NVIDIA-L40S", "on no node"),
        ([node(labels={"nvidia.com/gpu.product": "NVIDIA-T4"})], "no schedulable node has", "NVIDIA-T4"),
        ([node(gpu="0")], "none large enough: 1 GPUs wanted, 0 at most", "NVIDIA device plugin"),
        ([node(memory="8Gi")], "none large enough: 16.0 GiB memory wanted, 8.0 GiB at most", "pools[0].resources"),
        ([node(taints=({"key": "team", "value": "x", "effect": "NoExecute"},))], "all tainted", "pools[0].tolerations"),
    ],
)
def test_nodes_that_do_not_fit(nodes: list[Raw], says: str, fix: str) -> None:
    found = checks.nodes(workload(), nodes)
    assert found.level is Level.WRONG
    assert says in found.says
    assert fix in found.fix


def test_nodes_that_are_cordoned_or_not_ready_do_not_count() -> None:
    cordoned, unready = node(), node()
    cordoned["spec"]["unschedulable"] = True
    unready["status"]["conditions"][0]["status"] = "Unknown"
    assert checks.nodes(workload(), [cordoned, unready]).level is Level.WRONG


def test_room_for_fewer_than_wanted_is_a_warning() -> None:
    found = checks.nodes(workload(count=5), [node()])
    assert (found.level, "room for 2, 2 GPUs allocatable, of 5 wanted" in found.says) == (Level.WARNING, True)


@pytest.mark.parametrize(
    ("major", "minor", "level"), [("1", "36", "ok"), ("1", "32+", "ok"), ("1", "31", "wrong"), ("", "", "wrong")]
)
def test_the_server_s_version(major: str, minor: str, level: str) -> None:
    assert checks.version({"major": major, "minor": minor}).level.value == level


def classes(*names: str, default: str = "", provisioner: str = "nfs.csi.k8s.io") -> list[Raw]:
    key = "storageclass.kubernetes.io/is-default-class"
    return [
        {"metadata": {"name": name, "annotations": {key: str(name == default).lower()}}, "provisioner": provisioner}
        for name in names
    ]


@pytest.mark.parametrize(
    ("claim", "found", "existing", "level", "says"),
    [
        (Claim("m", "", ["ReadWriteOnce"]), classes("a", default="a"), (), Level.OK, "storage class a"),
        (Claim("m", "b", ["ReadWriteOnce"]), classes("a", "b"), (), Level.OK, "storage class b"),
        (Claim("m", "", ["ReadWriteOnce"]), classes("a"), (), Level.WRONG, "no default one"),
        (Claim("m", "", ["ReadWriteOnce"]), [], ("m",), Level.OK, "is there already"),
        (Claim("m", "c", ["ReadWriteOnce"]), classes("a"), (), Level.WRONG, "there is no storage class c"),
        (
            Claim("m", "", ["ReadWriteMany"]),
            classes("a", default="a", provisioner="ebs.csi.aws.com"),
            (),
            Level.WARNING,
            "gives one node alone",
        ),
    ],
)
def test_storage_classes(claim: Claim, found: list[Raw], existing: tuple[str, ...], level: Level, says: str) -> None:
    (check,) = checks.storage_classes(Needs(claims=[claim]), found, existing)
    assert (check.level, says in check.says) == (level, True)


def test_secrets() -> None:
    needs = Needs(secrets={"s3": {"A", "B"}})
    for found, level in (
        ({"data": {"A": "", "B": ""}}, "ok"),
        ({"data": {"A": ""}}, "wrong"),
        (None, "wrong"),
        ("no", "warning"),
    ):
        (check,) = checks.secrets(needs, {"s3": found})
        assert check.level.value == level
        assert bool(check.fix) == (level != "ok")


def test_quotas() -> None:
    needs = Needs(workloads=[workload(), workload()])
    hard = {"requests.nvidia.com/gpu": "2", "requests.memory": "100Gi"}
    for used, level in (("0", "ok"), ("1", "wrong")):
        status = {"hard": hard, "used": {"requests.nvidia.com/gpu": used}}
        (check,) = checks.quotas(needs, [{"metadata": {"name": "q"}, "status": status}])
        assert check.level.value == level
    assert [check.level for check in checks.quotas(needs, [])] == [Level.OK]


def test_kinds_of_another_release_are_told() -> None:
    def crd(description: str, established: str = "True") -> Raw:
        schema = {"openAPIV3Schema": {"description": description}}
        status = {"conditions": [{"type": "Established", "status": established}]}
        owner = {"meta.helm.sh/release-name": "claas", "meta.helm.sh/release-namespace": "home"}
        return {
            "metadata": {"annotations": owner},
            "spec": {"versions": [{"name": "v1alpha1", "schema": schema}]},
            "status": status,
        }

    def level(found: Raw | None, *, will_install: bool = False, namespace: str = "home") -> str:
        release = ("claas", namespace)
        (check,) = checks.crds({"x": crd("ours")}, {"x": found}, will_install=will_install, release=release)
        return check.level.value

    assert level(crd("ours")) == "ok"
    assert level(crd("theirs")) == "warning"
    assert level(crd("theirs"), will_install=True) == "ok"
    assert level(crd("ours", "False")) == "wrong"
    assert level(None) == "wrong"
    assert level(None, will_install=True) == "ok"
    assert level(crd("ours"), will_install=True, namespace="elsewhere") == "wrong", "Helm would refuse it"


def test_needs_are_read_from_rendered_objects() -> None:
    worker: Raw = template("worker")
    reference = {"secretKeyRef": {"name": "s3", "key": "AWS_ACCESS_KEY_ID"}}
    worker["spec"] |= {"nodeSelector": L40S}
    worker["spec"]["containers"][0] |= {
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "48Gi"}, "requests": {"memory": "16Gi"}},
        "env": [
            {"name": "AWS_ACCESS_KEY_ID", "valueFrom": reference},
            {"name": "AWS_ENDPOINT_URL_S3", "value": "https://minio.test"},
        ],
    }
    settings = {
        "storage": {"prefixes": [{"uri": "s3://bucket/{namespace}/"}]},
        "pools": [{"name": "l40s", "maxWorkers": 3, "template": worker}],
    }
    config = {"config.yaml": yaml.safe_dump(settings)}
    objects: list[Raw] = [
        {"kind": "ConfigMap", "metadata": {"name": "claas-operator"}, "data": config},
        {"kind": "Secret", "metadata": {"name": "own"}},
    ]
    needs = Needs.of(objects, "claas")
    (pool,) = needs.workloads
    assert (pool.name, pool.count, pool.wants["nvidia.com/gpu"]) == ("pool l40s", 3, 1)
    assert pool.wants["memory"] == 16 * 2**30
    assert needs.secrets == {"s3": {"AWS_ACCESS_KEY_ID"}}
    assert (needs.endpoint, needs.prefixes) == ("https://minio.test", ["s3://bucket/{namespace}/"])


def test_a_store_that_does_not_answer_is_no_error() -> None:
    prefixes = {"storage": {"prefixes": [{"uri": "s3://bucket/x/"}]}}
    assert reach_store(Needs(settings=prefixes, endpoint="http://127.0.0.1:9")).level is Level.WARNING
    assert reach_store(Needs(settings=prefixes, endpoint="http://x.claas-system.svc:8333")).level is Level.OK
    assert reach_store(Needs(ours=True)).level is Level.OK
    assert reach_store(Needs()).level is Level.OK


@pytest.mark.parametrize(
    ("status", "says"),
    [
        ({"phase": "Running"}, ""),
        (
            {"conditions": [{"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "0/3"}]},
            "Unschedulable: 0/3",
        ),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, ""),
        (
            {"initContainerStatuses": [{"state": {"waiting": {"reason": "ErrImagePull", "message": "x"}}}]},
            "ErrImagePull: x",
        ),
        (
            {
                "containerStatuses": [
                    {
                        "name": "worker",
                        "state": {"waiting": {"reason": "CrashLoopBackOff"}},
                        "lastState": {"terminated": {"reason": "OOMKilled"}},
                    }
                ]
            },
            "OOMKilled: container worker needs more memory",
        ),
        (
            {"phase": "Failed", "containerStatuses": [{"name": "w", "state": {"terminated": {"exitCode": 3}}}]},
            "Error: container w ended with 3",
        ),
    ],
)
def test_a_pod_s_trouble(status: Raw, says: str) -> None:
    assert trouble({"status": status}) == says
