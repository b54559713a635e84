"""Two releases in one cluster: each decides about its own namespaces, and nobody about another's."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import pytest

from claas_crds import names
from claas_operator.plan import plan
from claas_operator.snapshot import Snapshot, format_time
from claas_operator.territory import Territory, territory
from cluster.controlplane import ControlPlane
from operatorkit import NOW, PREFIX, Raw, adapter, ended, later, request, settings, snapshot
from operatorstage import OPERATOR, RBAC, Stage

OURS = "claas-system-claas-operator"


def role(name: str, age: int, namespaces: str | None) -> Raw:
    """An operator's ClusterRole, of which the larger age is the older."""
    annotations = {} if namespaces is None else {names.OPERATOR_NAMESPACES: namespaces}
    made = format_time(NOW - timedelta(seconds=age))[:19] + "Z"
    return {"metadata": {"name": name, "creationTimestamp": made, "annotations": annotations}}


@pytest.mark.parametrize(
    ("own", "roles", "serves", "taken"),
    [
        ("", [role(OURS, 1, "*")], "abc", {}),
        ("", [], "abc", {}),
        ("ab", [role(OURS, 1, "a,b")], "ab", {}),
        ("", [role(OURS, 1, "*"), role("theirs", 2, "*")], "", {"*": "theirs"}),
        ("", [role(OURS, 2, "*"), role("theirs", 1, "*")], "abc", {}),
        ("", [role(OURS, 1, "*"), role("theirs", 2, "a")], "bc", {"a": "theirs"}),
        ("ab", [role(OURS, 1, "a,b"), role("theirs", 2, "*")], "", {"a": "theirs", "b": "theirs"}),
        ("ab", [role(OURS, 1, "a,b"), role("theirs", 2, "b,c")], "a", {"b": "theirs"}),
        ("a", [role(OURS, 1, "a"), role("theirs", 2, "b")], "a", {}),
        ("", [role(OURS, 1, "*"), role("zoo", 1, "*")], "abc", {}),  # made in one second: by name
        ("", [role(OURS, 1, "*"), role("a", 1, "*")], "", {"*": "a"}),
        ("", [role(OURS, 1, "*"), role("a", 9, "a"), role("b", 9, "a,b")], "c", {"a": "a", "b": "b"}),
        ("", [role("theirs", 1, "b")], "ac", {"b": "theirs"}),  # ours runs on somebody's machine
        ("", [role(OURS, 1, "*"), role("edit", 9, None)], "abc", {}),
    ],
)
def test_of_two_the_older_has_what_both_name(
    own: Sequence[str], roles: list[Raw], serves: str, taken: dict[str, str]
) -> None:
    found = territory(frozenset(own), OURS, roles)
    assert "".join(namespace for namespace in "abc" if found.serves(namespace)) == serves
    assert found.taken == taken


def known(*objects: Raw, serves: str) -> Snapshot:
    """A snapshot in which one namespace is ours."""
    seen = snapshot(*objects)
    seen.serves = Territory(frozenset([serves])).serves
    return seen


def test_nothing_is_decided_about_what_another_release_serves() -> None:
    objects = (
        adapter("new", head=0),
        adapter("going", spec={"deletionPolicy": "Delete"}),
        adapter(spec={"rollbackTo": "nothing"}),
        request("r"),
        request("bare", ""),
        request("cancelled", spec={"cancel": True}),
        request("old", spec={"ttlSecondsAfterFinished": 1}, status=ended("Failed", "Cancelled")),
    )
    assert plan(known(*objects, serves="another"), settings(), later(60)).actions == []
    ours = plan(known(*objects, serves="team"), settings(), later(60)).actions
    assert {type(action).__name__ for action in ours} >= {"Describe", "Finalize", "StartJob", "End", "DeleteRequest"}


def test_what_another_release_s_adapter_began_as_is_not_collected() -> None:
    def entry(seq: int, version: str) -> Raw:
        return {"seq": seq, "version": version, "uri": f"{PREFIX}{version}/", "requestUid": "", "at": format_time(NOW)}

    history = [entry(1, "coder"), entry(2, "coder-v2"), entry(3, "coder-v3")]
    old = adapter(
        spec={"retention": {"keepLast": 1}},
        status={"headSeq": 3, "version": "coder-v3", "uri": f"{PREFIX}coder-v3/", "history": history},
    )
    fork = adapter("fork", namespace="another", spec={"initFrom": {"uri": f"{PREFIX}coder/"}})
    (collect,) = plan(known(old, fork, serves="team"), settings(), later(3600)).actions[:1]
    assert getattr(collect, "versions", ()) == ("coder-v2",)


# On the real API server


class Two:
    """Two releases; `first` is the older."""

    def __init__(self, first: Stage, second: Stage) -> None:
        self.first, self.second = first, second

    def install(self, stage: Stage, *namespaces: str) -> str:
        """The chart's ClusterRole of an operator, and its process. The role's path."""
        name, said = f"{stage.home}-{stage.instance}-operator", ",".join(namespaces) or "*"
        labels = {names.COMPONENT_LABEL: names.COMPONENT_OPERATOR}
        metadata = {"name": name, "labels": labels, "annotations": {names.OPERATOR_NAMESPACES: said}}
        stage.api("POST", f"{RBAC}/clusterroles", {"metadata": metadata})
        stage.start_operator(stage.settings(watchNamespaces=[*namespaces]))
        stage.wait_to_lead()
        return f"{RBAC}/clusterroles/{name}"


@pytest.fixture
def two(claas_api: ControlPlane, tmp_path: Path) -> Iterator[Two]:
    with ExitStack() as stack:
        stages = list[Stage]()
        for which in ("one", "two"):
            (folder := tmp_path / which).mkdir()
            stages.append(stack.enter_context(Stage(claas_api, folder, which)))
        made = Two(*stages)
        yield made
        for stage in stages:
            path = f"{RBAC}/clusterroles/{stage.home}-{stage.instance}-operator"
            if stage.api.get(path) is not None:
                stage.api("DELETE", path)


@pytest.mark.controlplane
def test_two_releases_that_name_their_namespaces_share_a_cluster(two: Two, control_plane: ControlPlane) -> None:
    for stage in (two.first, two.second):
        two.install(stage, stage.team)
        stage.adapter(deletionPolicy="Delete")
        stage.request("r")
    for stage in (two.first, two.second):
        stage.worker()
        stage.run("r")
        stage.complete("r")
        assert len(stage.pods()) == 1, "of either release its own worker alone"
        assert not [line for line in stage.lines() if line["message"] == "namespaces taken"]
    # One of them is uninstalled: its hook lets its own adapters go.
    role = f"{two.second.home}-{two.second.instance}-operator"
    command = [sys.executable, "-m", "claas_operator.release", "--namespace", two.second.home, "--deployment", "none"]
    command += ["--selector", "none", "--cluster-role", role, "--watch-namespaces", two.second.team]
    two.second.sigkill()
    environment = {"KUBECONFIG": str(control_plane.kubeconfig_of(OPERATOR)), "PYTHONPATH": ":".join(sys.path)}
    subprocess.run(command, env=environment, check=True, timeout=60)
    assert two.second.see_adapter()["metadata"].get("finalizers", []) == []
    assert two.first.see_adapter()["metadata"]["finalizers"] == [names.FINALIZER]


@pytest.mark.controlplane
def test_of_two_releases_that_serve_all_the_younger_does_nothing_and_says_so_until_the_older_goes(two: Two) -> None:
    theirs = two.install(two.first)
    two.install(two.second)
    (line,) = [line for line in two.second.lines() if line["message"] == "namespaces taken"]
    assert (line["levelname"] if "levelname" in line else line["level"]) == "ERROR"
    assert theirs.endswith(line["clusterRole"])
    assert "set watchNamespaces of both" in line["why"]
    two.second.adapter()  # in the namespace of the second's user
    two.second.request("r")
    two.second.wait("the older's worker", lambda: two.first.pods())
    assert two.second.jobs() == []
    two.first.sigkill()
    two.second.request("waits", "none")
    two.second.request("s")
    two.first.api("DELETE", theirs)
    two.second.wait("the younger's worker", lambda: two.second.pods())
    two.second.wait("its word", lambda: two.second.see("waits").get("reason") == "AdapterNotFound")
