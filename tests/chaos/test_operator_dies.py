"""The operator is killed at each of its writes, before the API server hears it and after it has done it."""

from __future__ import annotations

import pytest

from chaos.release import Release

pytestmark = pytest.mark.controlplane

ADAPTER, REQUEST, JOBS = "/loraadapters/[^/]+/status", "/distillrequests/[^/]+/status", "/jobs$"
WRITES = {
    "job": {"method": "POST", "path": JOBS},
    "lock": {"method": "PATCH", "path": ADAPTER, "body": '"active": {'},
    "bind": {"method": "PATCH", "path": REQUEST, "body": '"worker": "'},
    "commit": {"method": "PATCH", "path": ADAPTER, "body": '"headSeq"'},
    "complete": {"method": "PATCH", "path": REQUEST, "body": '"Complete"'},
}
CASES = [
    pytest.param(write, when, marks=[] if (write, when) == ("commit", "after") else pytest.mark.stress)
    for write in WRITES
    for when in ("before", "after")
]


@pytest.mark.parametrize(("write", "when"), CASES)
def test_at(release: Release, write: str, when: str) -> None:
    release.start_operator()
    release.new_adapter()
    death = release.kill_operator_at(when, **WRITES[write])
    release.request("r")
    release.request("s")
    release.wait_fault(death)
    release.dead()
    release.start_operator()
    release.complete("r")
    release.complete("s")
    release.settle()
    assert [release.see(name)["attempt"] for name in ("r", "s")] == [1, 1]
    assert release.see_adapter()["status"]["headSeq"] == 3


@pytest.mark.stress
@pytest.mark.parametrize("when", ["before", "after"])
def test_at_the_creation_of_an_adapter(release: Release, when: str) -> None:
    release.start_operator()
    death = release.kill_operator_at(when, method="PATCH", path=ADAPTER, body='"headSeq"')
    release.adapter(ready=False, lora={"r": 4, "alpha": 8, "targetModules": ["q_proj", "down_proj"]})
    release.request("r")
    release.wait_fault(death)
    release.dead()
    release.start_operator()
    release.complete("r")
    release.settle()


@pytest.mark.stress
def test_and_both_replicas_at_once(release: Release) -> None:
    release.start_operator()
    release.start_operator()
    release.new_adapter()
    for name in ("r", "s", "t"):
        release.request(name)
    release.wait("a binding", lambda: release.see("r").get("worker"))
    for index in (0, 1):
        release.sigkill(index)
    release.start_operator()
    for name in ("r", "s", "t"):
        release.complete(name)
    release.settle()
