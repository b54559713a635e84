"""The life of an adapter on the real cluster, as a user with kubectl lives it: back, fork, fewer versions, the end."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from claas_store.stores import open_store
from claas_store.version import find_manifest, read_version
from deployment import BASE_MODEL, USER, Deployment
from e2e import story
from kubectl import CommandFailed, Object, condition

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

COLLECT_SECONDS = 240  # a minute of rest, and two small Jobs


def patch(where: Deployment, name: str, **spec: object) -> None:
    """`kubectl patch la`."""
    where.kubectl("patch", "la", name, "-n", USER, "--type=merge", "-p", json.dumps({"spec": spec}))


def until(where: Deployment, name: str, happened: Callable[[Object], bool], seconds: float) -> Object:
    """Watch an adapter until something holds of it; returns it."""
    for seen in where.kubectl.follow(f"la/{name}", namespace=USER, seconds=seconds):
        if happened(seen):
            return seen
    raise AssertionError("the watch ended")


def train(where: Deployment, name: str, i: int) -> str:
    """One step on an adapter. The new version's uri."""
    request = story.request(where, f"{name}-{i}", adapterRef={"name": name}, samples=[story.sample("Paris.")])
    return str(story.complete(where, request)["status"]["loraUri"])


def create(where: Deployment, name: str, **spec: object) -> None:
    """A LoraAdapter, Ready."""
    given = {"baseModel": BASE_MODEL, "storage": {"uri": f"s3://adapters/{USER}/{name}/"}}
    where.kubectl.apply(
        {
            "apiVersion": "claas.dev/v1alpha1",
            "kind": "LoraAdapter",
            "metadata": {"name": name, "namespace": USER},
            "spec": given | spec,
        }
    )
    where.kubectl.wait(f"la/{name}", "condition=Ready", namespace=USER, seconds=story.LIMIT_SECONDS)


def test_user_rolls_back_and_trains_on(installed: Deployment) -> None:
    name = story.unique("back")
    create(installed, name)
    first, _ = train(installed, name, 1), train(installed, name, 2)
    patch(installed, name, rollbackTo=first.rstrip("/").rpartition("/")[2])
    back = until(installed, name, lambda la: la["status"]["headSeq"] == 4, story.LIMIT_SECONDS)["status"]
    assert back["uri"] == first
    third = train(installed, name, 3)
    with installed.store():
        manifest = read_version(third).manifest
    assert manifest.parent is not None
    assert manifest.parent.uri == first
    assert [entry["cause"] for entry in story.adapter(installed, name)["status"]["history"]] == [
        *("Created", "Trained", "Trained", "RolledBack", "Trained")
    ]


def test_user_forks_keeps_few_versions_and_deletes_with_all_of_them(installed: Deployment) -> None:
    name, fork = story.unique("many"), story.unique("fork")
    create(installed, name, retention={"keepLast": 2}, deletionPolicy="Delete")
    made = [train(installed, name, 1)]
    create(installed, fork, initFrom={"uri": made[0]})
    made += [train(installed, name, i) for i in (2, 3, 4)]

    def collected(la: Object) -> bool:
        return condition(la, "Collected").get("status") == "True"

    history = until(installed, name, collected, COLLECT_SECONDS)["status"]["history"]
    assert [entry["uri"] for entry in history] == [made[0], *made[2:]]
    with installed.store():
        assert [find_manifest(uri) is not None for uri in made] == [True, False, True, True]

    installed.kubectl("delete", "la", name, "-n", USER, "--timeout=120s", seconds=150)
    with pytest.raises(CommandFailed, match="NotFound"):
        installed.kubectl("get", "la", name, "-n", USER)
    with installed.store():
        assert find_manifest(made[0]) is not None, "the fork began as it"
        assert find_manifest(made[3]) is None
        left = [uri for uri, _ in open_store(made[0]).list(f"s3://adapters/{USER}/") if f"/{name}" in uri]
        assert {uri for uri in left if "tombstone" not in uri} == {
            uri for uri in left if uri.startswith(made[0]) and "tombstone" not in uri
        }
    train(installed, fork, 1)
