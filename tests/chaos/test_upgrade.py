"""Both replicas are replaced, one after the other, while requests flow: no request fails, none is tried twice."""

from __future__ import annotations

import time

import pytest

from chaos.release import Release

pytestmark = [pytest.mark.controlplane, pytest.mark.stress]

ADAPTERS, UPGRADES = 4, 2


def test_rolling_upgrade_under_load(release: Release, record_property: pytest.RecordProperty) -> None:
    release.start_operator()
    release.wait_to_lead(0)
    release.start_operator()
    release.wait_to_stand_by(1)
    for number in range(ADAPTERS):
        release.new_adapter(f"a{number}")
    sent: list[str] = []

    def flow(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            name = f"r{len(sent)}"
            release.request(name, f"a{len(sent) % ADAPTERS}")
            sent.append(name)
            time.sleep(0.1)

    flow(1)
    for old in range(2 * UPGRADES):  # operator-0, then 1, then the two that came for them
        release.start_operator()
        release.wait_to_stand_by(-1)
        flow(0.5)
        release.operators[old].terminate()
        flow(1)
        assert release.operators[old].wait(10) == 0
    flow(1)
    for name in sent:
        release.complete(name)
    release.settle()
    statuses = [release.see(name) for name in sent]
    assert {status["attempt"] for status in statuses} == {1}
    longest = max(status["timings"]["queueMs"] for status in statuses)
    record_property("requests", len(sent))
    record_property("longest_queue_ms", longest)
    print(f"{len(sent)} requests through {2 * UPGRADES} replacements; the longest wait was {longest} ms")
