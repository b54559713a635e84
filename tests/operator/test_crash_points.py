"""The operator killed at every write of a rollback, a fork, a deletion and a collection: the next one goes on, nothing
is lost, and the end is the same.

Each turn is a fresh operator: it lists everything, plans once, and acts. One that is mortal dies at its n-th write,
just before it or just after it (then the API server has it, and nobody knows). In memory every n is tried; on the real
API server an operator lives for one write.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

import pytest
from kubernetes.aio import client, config

from claas_crds import names
from claas_operator.api import Api
from claas_operator.apply import Apply, Lost
from claas_operator.plan import plan
from claas_operator.references import beside
from claas_operator.settings import Settings, load
from claas_operator.snapshot import Kind, Snapshot, format_time
from cluster.controlplane import ControlPlane
from operatorkit import HOME, NOW, PREFIX, MemoryApi, Raw, adapter, answer_pod, settings
from operatorstage import OPERATOR, Stage

TURNS = 60
When = Literal["before", "after"]


class Killed(Exception):
    """The operator's process ended here."""


class Mortal:
    """An API whose caller dies at its `at`-th write; 0: never."""

    def __init__(self, api: Any, at: int, when: When) -> None:
        self._api, self._at, self._when, self.writes = api, at, when, 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._api, name)

    async def _write(self, call: Callable[[], Any]) -> Any:
        self.writes += 1
        if self.writes == self._at and self._when == "before":
            raise Killed
        answer = await call()
        if self.writes == self._at:
            raise Killed
        return answer

    async def create(self, *given: Any) -> Any:
        return await self._write(lambda: self._api.create(*given))

    async def patch_status(self, *given: Any) -> Any:
        return await self._write(lambda: self._api.patch_status(*given))

    async def patch_metadata(self, *given: Any) -> Any:
        return await self._write(lambda: self._api.patch_metadata(*given))

    async def delete(self, *given: Any, **more: Any) -> Any:
        return await self._write(lambda: self._api.delete(*given, **more))


async def turn(api: Any, using: Settings, now: datetime) -> None:
    """A fresh operator: it lists, plans, acts, and forgets.

    Raises:
        Killed: it died.
    """
    seen = Snapshot()
    for kind in Kind:
        async for raw in api.list(kind):
            seen.put(kind, raw, now)
    apply = Apply(api, seen, using, lambda: True, lambda: now)
    done = set[str]()
    for action in plan(seen, using, now).actions:
        if action.key not in done:
            done.add(action.key)
            try:
                await apply(action)
            except Lost:
                continue


@dataclass
class Shelf:
    """The object store, as the operations see it: versions by uri, there or with a tombstone."""

    there: set[str] = field(default_factory=set)
    dead: set[str] = field(default_factory=set)

    def run(self, arguments: list[str]) -> Raw:
        """What `claas_store` does and answers."""
        command, given = arguments[0], dict(zip(arguments[1::2], arguments[2::2], strict=True))
        if command == "create":
            source = given.get("--init-from", given["--uri"])
            if source != given["--uri"] and (source not in self.there or source in self.dead):
                return {"ok": False, "reason": "AdapterInvalid", "message": "no such version", "retryable": False}
            self.there.add(given["--uri"])
            return {"ok": True, "uri": given["--uri"], "version": given["--uri"].split("/")[-2]}
        root = given["--root"]
        if command == "destroy":
            own = {uri for uri in self.there if uri.startswith(root[:-1])}
            self.there -= own
            return {"ok": True}
        versions = [
            value for option, value in zip(arguments[1::2], arguments[2::2], strict=True) if option == "--version"
        ]
        uris = {beside(root, version) for version in versions}
        if command == "tombstone":
            self.dead |= uris
        elif command == "restore":
            self.dead -= uris
        else:
            assert command == "delete"
            assert uris <= self.dead, "deleted without a tombstone"
            self.there -= uris
        return {"ok": True, "done": versions, "collection": int(given["--collection"])}


class World:
    """An API server with a kubelet that runs operations, and the one user's namespace."""

    shelf: Shelf
    prefix: str

    def user(self, what: str, name: str = "coder", **given: Any) -> None:
        raise NotImplementedError

    def see(self, name: str = "coder") -> Raw:
        raise NotImplementedError

    def kubelet(self) -> None:
        raise NotImplementedError

    def operate(self, at: int = 0, when: When = "after") -> int:
        """One turn of an operator that dies at its `at`-th write; how many it has made."""
        raise NotImplementedError

    def uri(self, version: str) -> str:
        return f"{self.prefix}{version}/"

    def nothing_is_lost(self) -> None:
        """What an adapter has as its head, and what it may still be made from, is in the store and has no tombstone."""
        for raw in self.adapters():
            status = raw.get("status") or {}
            if "deletionTimestamp" not in raw["metadata"] and status.get("uri"):
                assert status["uri"] in self.shelf.there - self.shelf.dead, f"the head {status['uri']} is gone"
            history = status.get("history") or []
            assert [e["seq"] for e in history] == sorted({e["seq"] for e in history})
            assert len(history) <= status.get("headSeq", 0)
            if source := (raw["spec"].get("initFrom") or {}).get("uri"):
                assert source in self.shelf.there, f"{source}, which an adapter began as, is gone"

    def adapters(self) -> list[Raw]:
        raise NotImplementedError


class Memory(World):
    """All in memory, with a clock of its own."""

    def __init__(self) -> None:
        self.now, self.shelf, self.prefix = NOW, Shelf(), PREFIX
        self.api = MemoryApi(clock=lambda: self.now)

    def user(self, what: str, name: str = "coder", **given: Any) -> None:
        key = (Kind.ADAPTER, "team", name)
        if what == "create":
            self.api.add(adapter(name, **given))
        elif what == "change":
            generation = self.api.objects[key]["metadata"]["generation"] + 1
            self.api.change(*key, {"spec": given, "metadata": {"generation": generation}})
        else:
            self.api.ask_to_delete(*key)

    def see(self, name: str = "coder") -> Raw:
        return self.api.objects.get((Kind.ADAPTER, "team", name)) or {}

    def adapters(self) -> list[Raw]:
        return [raw for key, raw in self.api.objects.items() if key[0] is Kind.ADAPTER]

    def kubelet(self) -> None:
        for (kind, _, name), raw in list(self.api.objects.items()):
            if kind is Kind.JOB and not (raw.get("status") or {}).get("conditions"):
                answer = self.shelf.run(raw["spec"]["template"]["spec"]["containers"][0]["args"])
                self.api.add(answer_pod(name, answer, "Succeeded" if answer["ok"] else "Failed"))
                end = {"type": "Complete", "status": "True", "lastTransitionTime": format_time(self.now)}
                self.api.change(Kind.JOB, HOME, name, {"status": {"conditions": [end]}})

    def operate(self, at: int = 0, when: When = "after") -> int:
        mortal = Mortal(self.api, at, when)
        self.now += timedelta(seconds=30)
        with contextlib.suppress(Killed):
            asyncio.run(turn(mortal, settings(), self.now))
        return mortal.writes


class Server(World):
    """The real API server and Job controller; the test plays the kubelet."""

    def __init__(self, stage: Stage, kubeconfig: Path) -> None:
        self.kubeconfig, self.stage, self.shelf = kubeconfig, stage, Shelf()
        self.prefix = f"s3://adapters/{stage.team}/"
        self.settings = load(stage.settings(timings={"collectDelaySeconds": 0}))
        self._served = set[str]()

    def user(self, what: str, name: str = "coder", **given: Any) -> None:
        if what == "create":
            head, status = given.get("head", 1), given.get("status") or {}
            self.stage.adapter(name, ready=bool(head), **(given.get("spec") or {}))
            if status:
                self.stage.api("PATCH", f"{self.stage.adapter_path(name)}/status", {"status": status})
        elif what == "change":
            self.stage.change_adapter(name, **given)
        else:
            self.stage.delete_adapter(name)

    def see(self, name: str = "coder") -> Raw:
        return self.stage.see_adapter(name)

    def adapters(self) -> list[Raw]:
        items: list[Raw] = self.stage.api("GET", self.stage.adapter_path(""))["items"]
        return items

    def kubelet(self) -> None:
        """Whatever Job there is gets its Pod from the controller, then its answer from us, then its end."""
        jobs = self.stage.jobs()
        self.stage.wait("Pods", lambda: len(self.stage.pods("operation")) >= len(jobs))
        for pod in self.stage.pods("operation"):
            name = pod["metadata"]["name"]
            if name not in self._served:
                self._served.add(name)
                self.stage.run_pod(name, self.shelf.run(pod["spec"]["containers"][0]["args"]))

    def operate(self, at: int = 0, when: When = "after") -> int:
        async def live() -> int:
            configuration = client.Configuration()
            await config.load_kube_config(str(self.kubeconfig), client_configuration=configuration)
            api = Api(configuration)
            mortal = Mortal(api, at, when)
            try:
                with contextlib.suppress(Killed):
                    await turn(mortal, self.settings, datetime.now(UTC))
            finally:
                await api.close()
            return mortal.writes

        return asyncio.run(live())


@dataclass(frozen=True)
class Story:
    """What a user does, when it is over, and what is there then."""

    begin: Callable[[World], None]
    over: Callable[[World], bool]
    check: Callable[[World], None]


def chain(world: World, *versions: str) -> Raw:
    """The status of an adapter whose head went through `versions`, which are in the store."""
    world.shelf.there |= {world.uri(version) for version in versions}
    old = {"requestUid": "", "at": format_time(NOW), "cause": "Trained"}
    history = [{"seq": i, "version": v, "uri": world.uri(v)} | old for i, v in enumerate(versions, 1)]
    return {"uri": world.uri(versions[-1]), "version": versions[-1], "headSeq": len(versions), "history": history}


def head(world: World, name: str = "coder") -> Raw:
    status: Raw = world.see(name).get("status") or {}
    return status


def begin_rollback(world: World) -> None:
    world.user("create", status=chain(world, "coder", "coder-v2", "coder-v3"))
    world.user("change", rollbackTo="coder")


def rolled_back(world: World) -> None:
    status = head(world)
    assert [e["version"] for e in status["history"]] == ["coder", "coder-v2", "coder-v3", "coder"]
    assert (status["headSeq"], status["uri"]) == (4, world.uri("coder"))
    assert {world.uri(v) for v in ("coder", "coder-v2", "coder-v3")} <= world.shelf.there


def begin_fork(world: World) -> None:
    world.user("create", status=chain(world, "coder", "coder-v2"))
    world.user("create", "fork", head=0, spec={"initFrom": {"uri": world.uri("coder-v2")}})


def forked(world: World) -> None:
    (first,) = head(world, "fork")["history"]
    assert (first["origin"], first["cause"]) == (world.uri("coder-v2"), "Forked")
    assert world.uri("fork") in world.shelf.there


def begin_deletion(world: World) -> None:
    world.user("create", "writer", status=chain(world, "writer"))
    world.user("create", status=chain(world, "coder", "coder-v2"), spec={"deletionPolicy": "Delete"})
    world.operate()
    assert world.see()["metadata"]["finalizers"] == [names.FINALIZER]
    world.user("delete")


def deleted(world: World) -> None:
    assert world.shelf.there == {world.uri("writer")}


def begin_collection(world: World) -> None:
    status = chain(world, *("coder", *(f"coder-v{i}" for i in range(2, 7))))
    world.user("create", status=status, spec={"retention": {"keepLast": 2}})
    world.user("create", "fork", status=chain(world, "fork"), spec={"initFrom": {"uri": world.uri("coder-v2")}})


def collected(world: World) -> None:
    kept = ["coder-v2", "coder-v5", "coder-v6"]
    assert [e["version"] for e in head(world)["history"]] == kept
    assert world.shelf.there == {world.uri(v) for v in (*kept, "fork")}
    assert not world.shelf.dead & world.shelf.there


STORIES = {
    "rollback": Story(begin_rollback, lambda w: head(w)["headSeq"] == 4, rolled_back),
    "fork": Story(begin_fork, lambda w: head(w, "fork").get("headSeq", 0) == 1, forked),
    "deletion": Story(begin_deletion, lambda w: not w.see(), deleted),
    "collection": Story(
        begin_collection,
        lambda w: len(head(w)["history"]) == 3 and not head(w).get("collecting"),
        collected,
    ),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_wherever_the_operator_is_killed_the_next_one_goes_on(story: Story, when: When) -> None:
    deaths = 0
    for at in range(1, 100):
        world = Memory()
        story.begin(world)
        left, killed = at, False
        for _ in range(TURNS):
            written = world.operate(left if not killed else 0, when)
            killed = killed or written >= left
            left -= written
            world.nothing_is_lost()
            world.kubelet()
            world.nothing_is_lost()
            if story.over(world):
                break
        assert story.over(world), f"killed {when} write {at}, it never ended"
        story.check(world)
        if not killed:
            break
        deaths += 1
    assert deaths >= 1, "nobody was killed: nothing is shown"


@pytest.mark.controlplane
@pytest.mark.parametrize("story", STORIES.values(), ids=STORIES)
def test_an_operator_that_dies_at_every_write_gets_there_on_the_real_api_server(
    story: Story, stage: Stage, control_plane: ControlPlane
) -> None:
    world = Server(stage, control_plane.kubeconfig_of(OPERATOR))
    story.begin(world)
    for _ in range(TURNS):
        world.operate(1, "after")
        world.nothing_is_lost()
        world.kubelet()
        world.nothing_is_lost()
        if story.over(world):
            break
    assert story.over(world), f"not there after {TURNS} turns"
    story.check(world)
