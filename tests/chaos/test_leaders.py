"""Two leaders for a moment: preconditions protect, whatever a stale one sends."""

from __future__ import annotations

import time
from collections.abc import Callable

import pytest

from chaos.release import Release
from chaos.test_operator_dies import WRITES

pytestmark = pytest.mark.controlplane


def replicas(release: Release) -> None:
    release.start_operator()
    release.wait_to_lead(0)
    release.start_operator()
    release.wait_to_stand_by(1)
    release.new_adapter()


@pytest.mark.stress
@pytest.mark.parametrize("write", WRITES)
def test_a_write_of_the_old_leader_arrives_when_the_new_one_has_acted(release: Release, write: str) -> None:
    replicas(release)
    late = release.fail("api", who="^operator-0$", delay_seconds=5, **WRITES[write])
    release.request("r")
    release.request("s")
    release.wait_fault(late)
    release.stop_process(release.operators[0])
    release.complete("r")
    release.complete("s")
    release.wait("the late write", lambda: late.answered)
    release.go_on(release.operators[0])
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 3
    assert [release.see(name)["attempt"] for name in ("r", "s")] == [1, 1]


@pytest.mark.stress
def test_a_leader_that_was_stopped_past_its_lease_goes_on(release: Release) -> None:
    """SIGSTOP and SIGCONT, of whoever leads, while requests flow."""
    replicas(release)
    for turn in range(3):
        release.request(f"r{turn}")
        leading = release.operators[turn % 2]
        release.stop_process(leading)
        release.complete(f"r{turn}")
        release.request(f"s{turn}")
        release.go_on(leading)
        release.complete(f"s{turn}")
        release.wait("the other to lead", lambda index=turn: leads(release, (index + 1) % 2))
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 7


def leads(release: Release, index: int) -> bool:
    """By its own word."""
    words = [line["leading"] for line in release.lines(index) if line["message"] == "leadership"]
    return bool(words and words[-1])


@pytest.mark.stress
def test_with_production_times_the_other_takes_over_within_20_seconds(
    releases: Callable[..., Release], record_property: pytest.RecordProperty
) -> None:
    release = releases(timings={"leaderLeaseSeconds": 15, "relistSeconds": 60, "leaseSeconds": 15})
    replicas(release)
    release.request("warm")
    release.complete("warm")
    release.sigkill(0)
    died = time.monotonic()
    release.request("r")
    release.wait("a binding", lambda: release.see("r").get("worker"), 40)
    took = time.monotonic() - died
    record_property("take_over_seconds", round(took, 1))
    print(f"take-over: {took:.1f} s from the leader's death to the next binding")
    assert took <= 20
    release.complete("r")
    release.settle()
