"""The API server answers 409, 429, 5xx or nothing, cuts connections and watches, forgets, and dies."""

from __future__ import annotations

from typing import Any

import pytest

from chaos.release import WORKER, Release

pytestmark = pytest.mark.controlplane

FAULTS: dict[str, dict[str, Any]] = {
    "409": {"status": 409},
    "429": {"status": 429, "headers": {"Retry-After": "1"}},
    "500": {"status": 500},
    "503": {"status": 503},
    "cut": {"cut": "before"},
    "lost": {"cut": "after"},
}


QUICK = {("operator", "lost"), ("worker", "409")}
CASES = [
    pytest.param(who, how, marks=[] if (who, how) in QUICK else pytest.mark.stress)
    for who in ("operator", "worker")
    for how in FAULTS
]


@pytest.mark.parametrize(("who", "how"), CASES)
def test_every_write_fails_once(release: Release, who: str, how: str) -> None:
    """The first of each kind, of each writer; and what they do next is right."""
    release.start_operator()
    release.new_adapter()
    paths = ["/loraadapters/", "/distillrequests/", "/leases", "/jobs", "/events"]
    for path in paths:
        for body in ('"active": ', '"worker"', '"headSeq"', "/status/claim", "/status/result", "running", "Complete"):
            release.fail(
                "api",
                who=WORKER if who == "worker" else who,
                method="PATCH|POST|PUT",
                path=path,
                body=body,
                **FAULTS[how],
            )
    for name in ("r", "s"):
        release.request(name)
    for name in ("r", "s"):
        release.complete(name)
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 3


@pytest.mark.stress
@pytest.mark.parametrize("how", ["cut", "expired"])
def test_watches_break_off(release: Release, how: str) -> None:
    release.start_operator()
    release.new_adapter()
    for i in range(6):
        release.request(f"r{i}")
        if how == "cut":
            release.world.background.loop.call_soon_threadsafe(release.api_proxy.cut)
        else:
            release.world.background.call(release.api_proxy.expire())
    for i in range(6):
        release.complete(f"r{i}")
    release.settle()


@pytest.mark.stress
def test_the_leader_is_cut_off_and_the_other_takes_over(release: Release) -> None:
    release.start_operator()
    release.wait_to_lead(0)
    release.start_operator()
    release.wait_to_stand_by(1)
    release.new_adapter()
    release.api_proxy.refusing.add("operator-0")
    release.api_proxy.cut("operator-0")
    release.request("r")
    release.complete("r")
    release.wait_to_lead(1)
    release.settle()


@pytest.mark.stress
def test_killed_and_started_again(release: Release) -> None:
    """etcd and the API server, by SIGKILL, while a request runs. What they had acknowledged is there afterwards."""
    release.start_operator()
    release.new_adapter()
    for name in ("r", "s", "t"):
        release.request(name)
    release.wait("a claim", lambda: "claim" in release.see("r"))
    release.control_plane.stop()
    release.control_plane.start()
    for name in ("r", "s", "t"):
        release.complete(name)
    release.settle()
