"""A worker is killed, or stopped, at each of its steps: the request runs again, and its version is made once."""

from __future__ import annotations

import pytest

from chaos.release import WORKER, Release
from claas_crds.reasons import Reason

pytestmark = pytest.mark.controlplane

CLAIM = {"where": "api", "method": "PATCH", "body": '"/status/claim"'}
REPORT = {"where": "api", "method": "PATCH", "body": '"/status/result"'}
CONFIG = {"where": "store", "method": "PUT", "path": "-[0-9a-f]{8}/adapter_config.json"}
WEIGHTS = {"where": "store", "method": "PUT", "path": "-[0-9a-f]{8}/adapter_model.safetensors"}
MANIFEST = {"where": "store", "method": "PUT", "path": "-[0-9a-f]{8}/claas.json"}
DEATHS = {
    "before_the_claim": (CLAIM, "before"),
    "after_the_claim": (CLAIM, "after"),
    "before_the_upload": (CONFIG, "before"),
    "in_the_middle_of_the_upload": (WEIGHTS, "before"),
    "after_the_upload": (MANIFEST, "before"),
    "after_the_manifest": (MANIFEST, "after"),
    "before_the_report": (REPORT, "before"),
    "after_the_report": (REPORT, "after"),
}
BURNT = ("after_the_claim", "before_the_upload", "in_the_middle_of_the_upload", "after_the_upload")
ADOPTED = ("after_the_manifest", "before_the_report")
QUICK = ("after_the_upload", "after_the_manifest")
ALL = [pytest.param(name, marks=[] if name in QUICK else pytest.mark.stress) for name in DEATHS]


@pytest.mark.parametrize("moment", ALL)
def test_killed(release: Release, moment: str) -> None:
    release.start_operator()
    release.new_adapter()
    call, when = DEATHS[moment]
    death = release.kill_worker_at(call["where"], when, **{k: v for k, v in call.items() if k != "where"})
    release.request("r")
    release.wait_fault(death)
    status = release.complete("r")
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 2
    assert status["attempt"] == (2 if moment in BURNT + ADOPTED else 1)
    # What was whole is used; a second attempt that trained wrote beside it.
    assert status["loraUri"].endswith("-a2/") is (moment in BURNT)


def test_a_stale_worker_that_reports_late_changes_nothing(release: Release) -> None:
    """Its node is gone, its Pod was removed by force; then its process goes on where it was, at its report."""
    release.start_operator()
    release.new_adapter()
    stopped: list[str] = []

    def stop(*_: object) -> None:
        for name, process in release.kubelet.workers().items():
            release.kubelet.lose(name)
            release.stop_process(process)
            stopped.append(name)

    # Its writes reach the API server in its own order: the report that the proxy holds back is sent by the process
    # that goes on, because the connection was cut.
    late = release.fail("api", who=WORKER, method="PATCH", body='"/status/result"', cut="before", then=stop)
    release.request("r")
    release.wait_fault(late)
    lost = release.kubelet.processes[stopped[0]]
    status = release.complete("r")
    assert (status["attempt"], status["worker"] == stopped[0]) == (2, False)
    refused = len(release.api_proxy.calls)
    release.go_on(lost)
    release.wait(
        "the late report",
        lambda: any('"/status/result"' in call.body.decode() for call in release.api_proxy.calls[refused:]),
    )
    release.settle()
    assert release.see("r")["result"]["attempt"] == 2


@pytest.mark.stress
def test_wedged(release: Release) -> None:
    """SIGSTOP for longer than its Lease: its Pod is deleted, and only when it is gone the request runs again."""
    release.start_operator()
    release.new_adapter()
    release.request("r", samples=[{"prompt": "hold SECRET", "response": "SECRET", "feedback": "SECRET"}])
    release.wait("the claim", lambda: "claim" in release.see("r"))
    (process,) = release.kubelet.workers().values()
    release.stop_process(process)
    release.go.touch()
    assert release.complete("r")["attempt"] == 2
    assert process.wait() < 0
    release.settle()
    assert "Fenced" in [event["reason"] for event in release.events(release.home)]


@pytest.mark.stress
def test_its_job_is_deleted_by_hand(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    release.request("r", samples=[{"prompt": "hold SECRET", "response": "SECRET", "feedback": "SECRET"}])
    release.wait("the claim", lambda: "claim" in release.see("r"))
    (job,) = [name for name in release.jobs() if "-l40s-" in name]
    path = f"/apis/batch/v1/namespaces/{release.home}/jobs/{job}"
    release.api("DELETE", path, {"propagationPolicy": "Background"})
    release.wait("the worker to go", lambda: not release.kubelet.workers())
    before = release.see("r")["worker"]
    release.go.touch()
    assert release.complete("r")["worker"] != before
    release.settle()


@pytest.mark.stress
def test_again_and_again(release: Release) -> None:
    """Until the last attempt is spent: the request ends, and the next one on the adapter runs."""
    release.start_operator()
    release.new_adapter()
    call = {k: v for k, v in MANIFEST.items() if k != "where"}
    death = release.kill_worker_at("store", "before", times=2, **(call | {"path": "-[0-9a-f]{8}(-a2)?/claas.json"}))
    release.request("r", backoffLimit=1)
    release.wait("the end", lambda: release.see("r").get("state") == "Failed", 40)
    assert death.hits == 2
    assert release.see("r")["reason"] == Reason.BACKOFF_LIMIT_EXCEEDED
    release.request("s")
    release.complete("s")
    release.settle()
