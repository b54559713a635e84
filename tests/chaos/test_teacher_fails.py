"""The teacher answers 500, or nothing, or is gone: nobody's request fails by it, and all go on when it is back."""

from __future__ import annotations

import pytest

from chaos.release import Release
from claas_crds.reasons import Reason, describe

pytestmark = [pytest.mark.controlplane, pytest.mark.stress]


def test_a_moment_of_500_is_nobodys_business(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    fault = release.fail("teacher", path="/score", status=500)
    release.request("r")
    release.wait_fault(fault)
    assert release.complete("r")["attempt"] == 1
    release.settle()


@pytest.mark.parametrize(
    "how", [{"status": 500}, {"delay_seconds": 1.5, "cut": "before"}, {"cut": "before"}], ids=["500", "silent", "gone"]
)
def test_an_outage_is_waited_for(release: Release, how: dict[str, object]) -> None:
    """Also one that outlasts all attempts: an outage is nobody's fault."""
    release.start_operator()
    release.new_adapter()
    release.request("first")
    release.complete("first")
    release.fail("teacher", times=10**9, **how)
    release.request("r", backoffLimit=0)

    def waits() -> bool:
        told = describe(Reason.TEACHER_UNAVAILABLE)  # the operator has looked itself
        return told in [condition["message"] for condition in release.see("r").get("conditions") or []]

    release.wait("the operator to see it", waits)
    release.request("alone", teacher={"mode": "Self"})
    release.teacher_proxy.heal()
    release.complete("r")
    release.complete("alone")
    release.settle()
