"""What kopf does badly, seen from outside: none of it happens here."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import kopf
import pytest

import forks
from chaos.proxy import FOREVER
from chaos.release import Release
from claas_crds import names
from claas_operator.main import Process, comes_to_its_end, configure, handlers
from objectstore import free_port
from operatorkit import settings

BACKLOG = 300


def test_kopf_only_tells_what_it_sees() -> None:
    """No handler that diffs, no timer, no daemon, no index, no webhook: nothing that writes, and nothing per object."""
    registry = handlers(Process(settings(), None))
    assert list(registry._watching.get_all_handlers()), "the five kinds"
    for other in (registry._changing, registry._spawning, registry._indexing, registry._webhooks):
        assert not list(other.get_all_handlers())


def test_kopf_holds_no_slot_and_posts_nothing() -> None:
    tuned = kopf.OperatorSettings()
    configure(tuned, settings())
    assert (tuned.queueing.worker_limit, tuned.queueing.idle_timeout) == (None, 0.05)
    assert tuned.watching.chunk_size == 200
    assert not tuned.posting.enabled
    ends = (tuned.watching.server_timeout, tuned.watching.client_timeout)
    assert ends == (300, 330), "a watch whose line is dead ends, too"
    assert tuned.persistence.diffbase_storage.build() == {}


@pytest.mark.controlplane
def test_an_operator_that_cannot_start_ends(release: Release, tmp_path: Path) -> None:
    broken = tmp_path / "broken.kubeconfig"
    broken.write_text("{}")
    process = forks.operator(tmp_path / "log", {"KUBECONFIG": str(broken)}, ["--config", str(release.config)])
    assert process.wait(timeout=30) == 1


@pytest.mark.controlplane
def test_a_start_lists_everything_for_the_watches_and_once_to_compare(releases: Callable[..., Release]) -> None:
    """A list that began before leadership was won would have to be made again: of 20,000 objects it takes seconds."""
    release = releases(timings={"relistSeconds": 60})
    release.start_operator()
    release.wait_to_lead(0)
    kinds = ("distillrequests", "loraadapters", "jobs", "pods", "leases")
    paths = [call.path for call in release.api_proxy.calls if call.method == "GET" and not call.is_watch]
    firsts = [path for path in paths if "limit=" in path and "continue=" not in path]
    lists = [path.partition("?")[0].rpartition("/")[2] for path in firsts]
    assert {kind: lists.count(kind) for kind in kinds} == dict.fromkeys(kinds, 2)


@pytest.mark.controlplane
def test_a_run_leaves_nothing_behind_but_status_and_the_standby_only_looks(release: Release) -> None:
    """Annotations, finalizers, Events, writes of the replica that does not lead, peering, text at level DEBUG."""
    release.start_operator(None, "--log-level", "DEBUG")
    release.wait_to_lead(0)
    release.start_operator(None, "--log-level", "DEBUG")
    release.wait_to_stand_by(1)
    release.new_adapter()
    release.new_adapter("deleted", deletionPolicy="Delete")
    good, bad = [f"r{i}" for i in range(6)], ["b0", "b1"]
    for name in good:
        release.request(name)
    for name in bad:
        release.request(name, samples=[{"prompt": "bad SECRET", "response": "SECRET", "feedback": "SECRET"}])
    for name in good:
        release.complete(name)
    for name in bad:
        release.wait(f"{name} to fail", lambda name=name: release.see(name).get("state") == "Failed")
    release.delete_adapter("deleted")
    release.wait("its deletion", lambda: not release.see_adapter("deleted"))
    release.settle()
    told = [
        event["regarding"]["name"] for event in release.events() if event["regarding"]["kind"] == names.REQUEST_KIND
    ]
    assert sorted(told) == bad, "one Event for what is out of the ordinary, and none else"
    for seen in release.witness.history():
        if seen.kind in ("DistillRequest", "LoraAdapter"):
            metadata = seen.raw["metadata"]
            assert not metadata.get("annotations"), seen.name
            allowed = [names.FINALIZER] if seen.name.endswith("/deleted") else []
            assert metadata.get("finalizers", []) in ([], allowed), seen.name
    calls = release.api_proxy.calls
    assert not [call for call in calls if "peering" in call.path]
    assert {call.method for call in calls if call.who == "operator-1"} == {"GET"}
    assert not [line for log in (0, 1) for line in release.lines(log) if line["logger"].startswith("kopf")]


@pytest.mark.controlplane
@pytest.mark.stress
def test_deletions_that_fall_into_a_gap_are_found(release: Release) -> None:
    """kopf lists anew after a 410 and never says what is not there any more: the relist does."""
    release.start_operator()
    release.new_adapter()
    hold = [{"prompt": "hold SECRET", "response": "SECRET", "feedback": "SECRET"}]
    release.request("r", samples=hold)
    release.wait("the claim", lambda: "claim" in release.see("r"))
    release.request("s", samples=hold)
    gone = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": 410, "reason": "Expired"}
    event = json.dumps({"type": "ERROR", "object": gone}) + "\n"
    gap = release.fail("api", who="operator", path="watch=true", status=200, text=event, times=FOREVER)
    release.world.background.call(release.api_proxy.expire("operator"))
    release.wait_fault(gap)
    for name in ("r", "s"):
        release.api("DELETE", release.request_path(name))
    release.go.touch()
    release.request("t")
    gap.times = 0
    release.complete("t")
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 2


@pytest.mark.controlplane
@pytest.mark.parametrize("status", [404, pytest.param(409, marks=pytest.mark.stress)])
def test_a_watch_that_kopf_gives_up_ends_the_process_and_the_next_one_hears(release: Release, status: int) -> None:
    """kopf does not try again after these: better no process than one that is alive, leads, and is deaf."""
    release.start_operator()
    release.new_adapter()
    refused = release.fail("api", who="operator-0", path="/distillrequests.*watch=true", status=status)
    release.world.background.call(release.api_proxy.expire("operator-0"))
    release.wait_fault(refused)
    release.wait("the operator to end", lambda: release.operators[0].poll() == 1)
    release.replicas = 1
    release.supervise()
    release.request("r")
    release.complete("r")
    release.settle()


@pytest.mark.controlplane
@pytest.mark.stress
def test_a_watch_that_is_dead_without_saying_so_is_noticed(release: Release) -> None:
    """Its line is held, not cut: what it does not tell is found by the relist, changes included."""
    release.start_operator()
    release.new_adapter()
    release.fail("api", who="operator", path="/distillrequests.*watch=true", delay_seconds=60, times=FOREVER)
    release.world.background.call(release.api_proxy.expire("operator"))
    release.request("r")
    release.complete("r")
    assert release.see_adapter()["status"]["headSeq"] == 2
    release.settle()


@pytest.mark.controlplane
@pytest.mark.stress
def test_what_is_slow_stops_nobody_else(release: Release) -> None:
    """A teacher that does not answer, and a write that takes five seconds: the loop goes on, and the probe answers."""
    url = f"http://127.0.0.1:{free_port()}/healthz"
    release.start_operator(None, "--liveness", url)
    for name in ("slow", "taught", "quick"):
        release.new_adapter(name)
    release.request("warm", "quick", teacher={"mode": "Self"})
    release.complete("warm")
    release.fail("teacher", times=FOREVER, delay_seconds=2.5, cut="before")
    path = "/loraadapters/slow/status"
    late = release.fail("api", who="operator", method="PATCH", path=path, body='"headSeq"', delay_seconds=5)
    release.request("s", "slow", teacher={"mode": "Self"})
    release.request("t", "taught")
    release.wait_fault(late)
    began = time.monotonic()
    release.request("q", "quick", teacher={"mode": "Self"})
    release.complete("q")
    assert time.monotonic() - began < 4, "the slow write alone takes five seconds"
    asked = time.monotonic()
    assert httpx.get(url, trust_env=False).status_code == 200
    assert time.monotonic() - asked < 1
    release.settle()


@pytest.mark.controlplane
@pytest.mark.stress
def test_a_backlog_comes_by_the_watches_at_once(release: Release) -> None:
    """A slot that is held for five seconds an object would make this three rounds of it; then each would be fetched."""
    for i in range(BACKLOG):
        release.request(f"r{i}", "absent")
    began = time.monotonic()
    release.start_operator()
    release.wait_to_lead()
    took = time.monotonic() - began
    print(f"{BACKLOG} objects known {took:.1f} s after the start")
    assert took < 10
    singly = f"/{names.REQUEST_PLURAL}/r"
    assert not [call for call in release.api_proxy.calls if call.method == "GET" and singly in call.path]


@pytest.mark.controlplane
@pytest.mark.stress
def test_no_finalizer_holds_anything_when_the_operator_is_gone(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    release.new_adapter("kept", deletionPolicy="Delete")
    release.request("r")
    release.complete("r")
    release.sigkill()
    release.api("DELETE", release.request_path("r"))
    release.delete_adapter()
    assert release.api.get(release.request_path("r")) is None
    assert not release.see_adapter()
    release.delete_adapter("kept")
    assert release.see_adapter("kept")["metadata"]["finalizers"] == [names.FINALIZER]
    release.api("PATCH", release.adapter_path("kept"), {"metadata": {"finalizers": None}})  # as the README says
    assert not release.see_adapter("kept")


async def test_a_watch_that_nobody_can_cancel_does_not_keep_the_process() -> None:
    """kopf itself waits for it for ever. Here with kopf's own end, and a task that takes no cancellation."""
    may_go = asyncio.Event()

    async def fails() -> None:
        raise ConnectionError("given up")

    async def stays() -> None:
        while not may_go.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await may_go.wait()

    before = asyncio.all_tasks()
    tasks = [asyncio.create_task(fails()), asyncio.create_task(stays())]
    end = asyncio.create_task(kopf.run_tasks(tasks, ignored=before))
    assert not await comes_to_its_end(tasks, end, 0.2)
    assert not end.done(), "kopf still waits"
    may_go.set()
    with pytest.raises(ConnectionError):
        await comes_to_its_end(tasks, end, 5)
