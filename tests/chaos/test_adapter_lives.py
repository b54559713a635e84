"""What its user does with an adapter, while an operator lives for one write: every process and the store are real.

Each operator is killed when the API server has carried out its first write and nobody knows; the next one takes over.
So between any two writes of a rollback, a fork, a deletion and a collection stands a death.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest

from chaos.release import LORA, Release
from chaos.seeds import OPERATION
from claas_crds.reasons import Reason
from claas_store.fsck import fsck
from claas_store.stores import open_store
from claas_store.uris import version_name
from claas_store.version import find_manifest
from store.conftest import use_s3

pytestmark = pytest.mark.controlplane

# Of objects and Jobs; not of its own Lease, and no Events, which are a courtesy.
WRITES = {"method": "POST|PATCH|DELETE", "path": "/(loraadapters|jobs)(/|$)"}
KEPT = 2


@pytest.fixture(autouse=True)
def _store(release: Release, monkeypatch: pytest.MonkeyPatch) -> None:
    use_s3(monkeypatch, release.world.store)


def train(release: Release, *requests: str) -> list[str]:
    """The uris of the new heads."""
    for name in requests:
        release.request(name)
        release.complete(name)
    return [release.see(name)["loraUri"] for name in requests]


def gone(release: Release, uri: str) -> Callable[[], bool]:
    return lambda: find_manifest(uri) is None


def test_user_names_a_version_that_was_collected_and_is_told(release: Release) -> None:
    release.start_operator()
    release.new_adapter(retention={"keepLast": 1})
    (head,) = train(release, "r")
    first = release.see_adapter()["spec"]["storage"]["uri"]
    release.wait("the first version to be collected", gone(release, first))
    release.request("bare", "", loraUri=first)
    release.adapter("fork", ready=False, lora=LORA, initFrom={"uri": first})
    release.wait("the request's end", lambda: release.see("bare").get("state") == "Failed")
    release.wait("the fork's", lambda: release.condition("Ready", "fork").get("reason") not in (None, Reason.CREATING))
    failed = next(c for c in release.see("bare")["conditions"] if c["type"] == "Failed")
    for told in (failed, release.condition("Ready", "fork")):
        assert told["reason"] == Reason.VERSION_COLLECTED
        assert told["message"].startswith(f"{first} is collected (since ")
        assert told["message"].endswith("retention): name a later version")
    assert release.see("bare")["reason"] == Reason.VERSION_COLLECTED, "also where `kubectl get` shows it"
    assert release.see("bare")["attempt"] == 1, "trying again would not bring it back"
    release.request("again", "", loraUri=head)
    release.complete("again")
    release.settle()


@dataclass(frozen=True)
class Story:
    """What its user does with an adapter of such a policy, when it is over, and how many must have died by then."""

    begin: Callable[[Release], None]
    over: Callable[[Release], bool]
    deaths: int
    policy: str = "Retain"

    def __str__(self) -> str:
        return self.begin.__name__


def head(release: Release, name: str = "coder") -> str:
    """The name of an adapter's head; empty before it has one."""
    return str((release.see_adapter(name).get("status") or {}).get("version", ""))


def roll_back(release: Release) -> None:
    release.change_adapter(rollbackTo="coder")


def fork(release: Release) -> None:
    source = release.see_adapter()["status"]["history"][1]["uri"]
    release.adapter("fork", ready=False, lora=LORA, initFrom={"uri": source}, deletionPolicy="Delete")


def delete(release: Release) -> None:
    release.delete_adapter()


def collect(release: Release) -> None:
    release.change_adapter(retention={"keepLast": KEPT})


def is_collected(release: Release) -> bool:
    status = release.see_adapter()["status"]
    return len({entry["version"] for entry in status["history"]}) == KEPT and not status.get("collecting")


STORIES = {
    "rollback": Story(roll_back, lambda release: head(release) == "coder", 1),
    "fork": Story(fork, lambda release: head(release, "fork") == "fork", 3),
    "deletion": Story(delete, lambda release: not release.see_adapter(), 2, "Delete"),
    "collection": Story(collect, is_collected, 4),
}


@pytest.mark.stress
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_a_user_s_deed_is_done_by_operators_that_live_for_one_write(release: Release, story: Story) -> None:
    release.start_operator()
    release.new_adapter(deletionPolicy=story.policy)
    uris = [release.see_adapter()["spec"]["storage"]["uri"], *train(release, "r", "s", "t")]
    release.wait("the lock to be free", lambda: not release.see_adapter()["status"].get("active"))
    release.sigkill(0)
    story.begin(release)
    deaths = 0
    while not story.over(release):
        who = len(release.operators)
        release.start_operator()
        death = release.kill_operator_at("after", who=f"operator-{who}", **WRITES)
        release.wait("a death, or the end", lambda fault=death: fault.hits or story.over(release), 60)
        if death.hits:
            release.dead(who)
            deaths += 1
        else:
            break
    assert deaths >= story.deaths, "nobody died between two writes: nothing is shown"
    release.api_proxy.heal()
    release.start_operator()
    check(release, story, uris)


@pytest.mark.stress
@pytest.mark.parametrize("nth", [1, 2, 4])
@pytest.mark.parametrize("story", [STORIES[name] for name in ("fork", "deletion", "collection")], ids=str)
def test_a_user_s_deed_is_done_although_its_operation_is_killed(release: Release, story: Story, nth: int) -> None:
    release.start_operator()
    release.new_adapter(deletionPolicy=story.policy)
    uris = [release.see_adapter()["spec"]["storage"]["uri"], *train(release, "r", "s", "t")]
    release.wait("the lock to be free", lambda: not release.see_adapter()["status"].get("active"))
    death = release.kill_operation_at(OPERATION, nth, "after")
    story.begin(release)
    release.wait_fault(death)
    release.wait("the end", lambda: story.over(release), 60)
    check(release, story, uris)


def check(release: Release, story: Story, uris: list[str]) -> None:
    """What was there before is there as the story says, and can be trained on."""
    here = [uri for uri in uris if find_manifest(uri) is not None]
    if story is STORIES["deletion"]:
        assert here == []
        left = [uri for uri, _ in open_store(uris[0]).list(f"s3://adapters/{release.team}/")]
        assert left == [], "nor anything else"
    elif story is STORIES["collection"]:
        assert here == uris[-KEPT:]
    else:
        assert here == uris, "nothing is lost"
    for name in {"coder", "fork"} & {raw["metadata"]["name"] for _, raw in release.listed()}:
        status = release.see_adapter(name)["status"]
        assert [entry["seq"] for entry in status["history"]][-1] == status["headSeq"]
        known = {entry["version"] for entry in status["history"]}
        report = fsck(release.see_adapter(name)["spec"]["storage"]["uri"], known=known)
        assert report.ok, [*report.lines()]
        if name == "fork":
            manifest = find_manifest(status["uri"])
            assert manifest is not None
            assert manifest.parent is not None
            assert manifest.parent.uri == uris[1]
        release.request(f"on-{name}", name)
        release.complete(f"on-{name}")
        assert version_name(release.see(f"on-{name}")["parent"]["uri"]) == version_name(status["uri"])
    release.settle()
