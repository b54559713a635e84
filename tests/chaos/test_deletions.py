"""What a request needs is deleted while it runs: it ends, nothing is stuck, and nobody else notices."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chaos.release import LORA, Release
from claas_crds.reasons import Reason
from operatorstage import GROUP

pytestmark = [pytest.mark.controlplane, pytest.mark.stress]

HOLD = [{"prompt": "hold SECRET", "response": "SECRET", "feedback": "SECRET"}]


def held(release: Release, **spec: object) -> None:
    """A request whose step waits, on an adapter of its own."""
    release.start_operator()
    release.new_adapter(**spec)
    release.request("r", samples=HOLD)
    release.request("s")
    release.wait("the claim", lambda: "claim" in release.see("r"))


@pytest.mark.parametrize("policy", ["Retain", "Delete"])
def test_the_adapter(release: Release, policy: str) -> None:
    held(release, deletionPolicy=policy)
    release.delete_adapter()
    if policy == "Retain":
        release.wait("the end", lambda: release.see("r").get("reason") == Reason.ADAPTER_GONE)
    release.go.touch()
    release.wait("the adapter to go", lambda: not release.see_adapter(), 40)
    release.wait("r to end", lambda: release.see("r").get("state") in ("Failed", "Complete"))
    release.api("DELETE", release.request_path("s"))  # it waits for an adapter of that name, as it should
    release.settle()


def test_the_adapter_and_another_takes_its_name(release: Release) -> None:
    held(release)
    release.delete_adapter()
    release.adapter(ready=False, lora=LORA, storage={"uri": f"s3://adapters/{release.team}/second/"})
    release.wait("the end", lambda: release.see("r").get("reason") == Reason.ADAPTER_GONE)
    release.go.touch()
    release.complete("s")
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 2


def test_the_request(release: Release) -> None:
    held(release)
    release.api("DELETE", release.request_path("r"))
    release.go.touch()
    release.complete("s")
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 2


def test_the_namespace(releases: Callable[..., Release]) -> None:
    release = releases(teams=2)
    held(release, deletionPolicy="Delete")
    gone, release.team = release.team, release.teams[1]
    release.api("DELETE", f"/api/v1/namespaces/{gone}")
    release.new_adapter("other")
    release.request("other", "other")
    release.go.touch()
    release.complete("other")

    def emptied() -> bool:
        left = [release.api.get(f"{GROUP}/namespaces/{gone}/{kind}") for kind in ("distillrequests", "loraadapters")]
        return not any((listed or {"items": []})["items"] for listed in left)

    release.wait("the namespace to be empty", emptied, 60)
    release.teams = [release.team]
    release.settle()
