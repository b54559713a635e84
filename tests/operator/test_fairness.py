"""One namespace floods the real control plane, another one asks for a single step: real operator, real worker agent."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from datetime import UTC, datetime

import pytest

from claas_crds import names
from claas_operator.snapshot import parse_time
from cluster.process import kill, spawn
from operatorkit import MODEL, Raw, format_time
from operatorstage import GROUP, Stage
from workerstage import INSTANT

pytestmark = pytest.mark.controlplane

STEP_SECONDS = 0.3


@pytest.fixture
def start_worker(stage: Stage) -> Iterator[Callable[[], str]]:
    """Starts the agent, with a step that takes STEP_SECONDS, in the Pod of the operator's Job."""
    with ExitStack() as stack:

        def start() -> str:
            stage.wait("a worker's Pod", stage.pods)
            metadata = stage.pods()[0]["metadata"]
            stage.pod_status(metadata["name"], {"phase": "Running", "startTime": format_time(datetime.now(UTC))})
            told = {
                names.ENV_POD_NAME: metadata["name"],
                names.ENV_POD_NAMESPACE: stage.home,
                names.ENV_POD_UID: metadata["uid"],
                names.ENV_INSTANCE: stage.instance,
                names.ENV_POOL: "l40s",
                names.ENV_BASE_MODEL: MODEL,
                "CLAAS_MODEL_PATH": str(stage.folder),
                "KUBECONFIG": str(stage.control_plane.kubeconfig),
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            process = spawn(INSTANT, stage.folder / "worker.log", environment=told)
            stack.callback(kill, [process])
            return str(metadata["name"])

        yield start


def ask(stage: Stage, namespace: str, name: str) -> None:
    """A bare request in that namespace."""
    samples = [{"prompt": f"takes {STEP_SECONDS} s", "response": "yes", "feedback": "good"}]
    body = {
        "apiVersion": names.API_VERSION,
        "kind": names.REQUEST_KIND,
        "metadata": {"name": name},
        "spec": {"loraUri": f"s3://adapters/{namespace}/{name}/", "samples": samples},
    }
    stage.api("POST", f"{GROUP}/namespaces/{namespace}/{names.REQUEST_PLURAL}", body)


def assigned(stage: Stage, namespace: str) -> dict[str, datetime]:
    """When each request of the namespace got its worker."""
    found: list[Raw] = stage.api("GET", f"{GROUP}/namespaces/{namespace}/{names.REQUEST_PLURAL}")["items"]
    times = {raw["metadata"]["name"]: parse_time((raw.get("status") or {}).get("assignedAt")) for raw in found}
    return {name: at for name, at in times.items() if at is not None}


@pytest.mark.parametrize("flood", [60, pytest.param(5000, marks=pytest.mark.stress)])
def test_a_flood_delays_another_namespace_by_one_request_s_time(
    stage: Stage, start_worker: Callable[[], str], flood: int, record_property: pytest.RecordProperty
) -> None:
    stage.start_operator(stage.settings(pool={"maxWorkers": 1}, timings={"leaseSeconds": 15}))
    many = f"{stage.team}-many"
    stage.api("POST", "/api/v1/namespaces", {"metadata": {"name": many}})
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda i: ask(stage, many, f"f{i}"), range(flood)))
    start_worker()
    stage.wait("the flood to be served", lambda: len(assigned(stage, many)) >= 4, 120)
    asked = datetime.now(UTC)
    ask(stage, stage.team, "single")
    stage.wait("the single request to get its worker", lambda: assigned(stage, stage.team), 60)
    served = assigned(stage, stage.team)["single"]
    before = [name for name, at in assigned(stage, many).items() if asked < at < served]
    waited = (served - asked).total_seconds()
    record_property("waited_ms", round(waited * 1000))
    print(f"waited {waited:.2f} s behind {len(before)} of {flood}; a step takes {STEP_SECONDS} s")
    assert len(assigned(stage, many)) < flood, "the flood must not be over, or this shows nothing"
    assert len(before) <= 1, "the one that was being given its worker just then"
    stage.api("DELETE", f"/api/v1/namespaces/{many}")
