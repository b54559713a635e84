"""A pool is lowered or changed while requests come: its GPUs are free soon, and no request is tried twice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from chaos.release import WORKER, Release
from claas_crds import names

pytestmark = pytest.mark.controlplane

KEPT = {"minWorkers": 2, "maxWorkers": 2, "lingerSeconds": 1}
HOLD = [{"prompt": "hold SECRET", "response": "SECRET", "feedback": "SECRET"}]
# How each appears to the second operator.
CHANGES: dict[str, dict[str, Any]] = {
    "lowered": {"pool": {"maxWorkers": 2, "lingerSeconds": 1}},
    "changed": {"pool": {"maxWorkers": 2, "lingerSeconds": 1, "maxRequests": 50}},
}


def ready(release: Release) -> set[str]:
    """Workers whose Leases say so."""
    leases = release.api("GET", f"/apis/coordination.k8s.io/v1/namespaces/{release.home}/leases")["items"]
    states = {raw["metadata"]["name"]: raw["metadata"].get("annotations", {}).get(names.LEASE_STATE) for raw in leases}
    return {name for name in release.kubelet.workers() if states.get(name) == names.STATE_READY}


@pytest.mark.parametrize("change", CHANGES)
def test_workers_leave_and_what_was_bound_to_them_ends(releases: Callable[..., Release], change: str) -> None:
    """One is busy; the other is told, and gets a request while it says that it leaves."""
    release = releases(pool=KEPT)
    release.start_operator()
    for adapter in ("a", "b"):
        release.new_adapter(adapter)
    release.wait("two workers", lambda: len(ready(release)) == 2)
    first = release.kubelet.workers()
    release.request("long", "a", samples=HOLD)
    release.wait("the claim", lambda: "claim" in release.see("long"))
    busy = release.see("long")["worker"]
    drains = release.fail("api", who=WORKER, method="PUT", body=names.STATE_DRAINING, delay_seconds=1.0)

    release.operators[0].terminate()
    assert release.operators[0].wait(10) == 0
    release.start_operator(release.settings(**CHANGES[change]))
    release.wait_fault(drains)
    release.request("short", "b")
    short = release.complete("short")
    assert release.see("long")["worker"] == busy and first[busy].poll() is None, "what it runs keeps a worker"
    release.go.touch()
    release.complete("long")

    if change == "lowered":
        (leaver,) = first.keys() - {busy}
        assert short["worker"] == leaver, "it was bound before the worker's word was heard"
    else:
        assert short["worker"] not in first, "what was started with other settings gets nothing more"
    release.wait("every GPU to be free", lambda: not release.kubelet.workers(), 20)
    assert [process.wait(5) for process in first.values()] == [0, 0]
    assert {release.see(name)["attempt"] for name in ("long", "short")} == {1}
    release.settle()
