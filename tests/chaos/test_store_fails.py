"""The object store refuses, is slow, loses answers, or is killed: nothing is lost, and what was written is used."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import objectstore
from chaos.background import Background
from chaos.release import Release, World
from claas_crds.reasons import Reason

pytestmark = pytest.mark.controlplane

VERSIONS = "-[0-9a-f]{8}(-a[0-9]+)?/"


@pytest.mark.stress
def test_403_ends_the_request_and_says_so(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    release.fail("store", method="PUT", path=VERSIONS, status=403, times=10**9)
    release.request("r")
    release.wait("the end", lambda: release.see("r").get("state") in ("Failed", "Complete"))
    assert (release.see("r")["state"], release.see("r")["reason"]) == ("Failed", Reason.STORAGE_DENIED)
    release.store_proxy.heal()
    release.request("s")
    release.complete("s")
    release.settle()
    assert release.see_adapter()["status"]["headSeq"] == 2


def test_503_is_waited_for(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    fault = release.fail("store", path=VERSIONS, status=503, times=4)
    release.request("r")
    release.wait_fault(fault)
    release.complete("r")
    release.settle()


@pytest.mark.stress
def test_slow(release: Release) -> None:
    release.start_operator()
    release.new_adapter()
    release.fail("store", path=VERSIONS, delay_seconds=0.7, times=10**9)
    release.request("r")
    assert release.complete("r")["attempt"] == 1
    release.settle()


@pytest.mark.stress
@pytest.mark.parametrize("file", ["adapter_config.json", "adapter_model.safetensors", "claas.json"])
def test_an_answer_is_lost(release: Release, file: str) -> None:
    """The write was done, and nobody knows: it is recognised as one's own."""
    release.start_operator()
    release.new_adapter()
    fault = release.fail("store", method="PUT", path=VERSIONS + file, cut="after")
    release.request("r")
    release.wait_fault(fault)
    assert release.complete("r")["attempt"] == 1
    release.settle()


@pytest.fixture
def mortal(world: World, tmp_path: Path) -> Iterator[World]:
    """The same world with an object store of its own."""
    (tmp_path / "store").mkdir()
    with objectstore.running(tmp_path / "store") as store, Background() as background:
        made = World(world.control_plane, store, background, tmp_path)
        yield made
        made.close()


@pytest.mark.stress
def test_killed_and_started_again(mortal: World, tmp_path: Path) -> None:
    with Release(mortal, tmp_path, "store-killed") as release:
        release.start_operator()
        release.new_adapter()
        release.request("r")
        release.complete("r")
        port = int(mortal.store.endpoint.rpartition(":")[2])
        mortal.store.stop()
        release.request("s", backoffLimit=10)
        release.wait("a failed attempt", lambda: "result" in release.see("s"), 30)
        assert release.see("s")["result"]["reason"] == Reason.STORAGE_UNAVAILABLE
        keys = {"access_key": mortal.store.access_key, "secret_key": mortal.store.secret_key}
        with objectstore.running(tmp_path / "store", port=port, **keys):
            release.complete("s")
            release.settle()
