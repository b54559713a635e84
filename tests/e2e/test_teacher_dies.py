"""The teacher's process is killed in the middle of a scoring: the kubelet starts it again, nobody does anything."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from deployment import NAMESPACE, Deployment
from e2e import story
from kubectl import Object, condition

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.stress,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(os.environ.get("KUBECONFIG")), reason="the nodes' processes must be on this machine"),
]
LONG = " ".join(f"{word} is a city in France, and a fine one." for word in ["Paris", "Lyon", "Nice", "Lille"] * 16)


def pod(where: Deployment) -> Object:
    """The teacher's one Pod."""
    (found,) = where.kubectl.get("pod", "-n", NAMESPACE, "-l", "app.kubernetes.io/component=teacher")
    return dict(found)


def processes(uid: str) -> list[int]:
    """The teacher's processes in a Pod, as this machine numbers them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            inside = uid in (folder / "cgroup").read_text().replace("_", "-")
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        if inside and b"claas_teacher" in command:
            found.append(int(folder.name))
    return found


def test_killed_in_mid_scoring_it_comes_back_by_itself(installed: Deployment) -> None:
    name = story.unique("bereft")
    head = story.create_adapter(installed, name)["status"]["headSeq"]
    before = pod(installed)
    restarts = before["status"]["containerStatuses"][0]["restartCount"]
    request = story.request(
        installed, story.unique("orphan"), adapterRef={"name": name}, samples=[story.sample(LONG, finishReason="stop")]
    )
    story.until(installed, request, lambda status: status.get("progress", {}).get("phase") == "Scoring")
    for process in processes(before["metadata"]["uid"]):
        os.kill(process, signal.SIGKILL)

    status = story.complete(installed, request, seconds=600)["status"]

    assert condition({"status": status}, "Complete")["reason"] == "Succeeded"
    assert story.adapter(installed, name)["status"]["headSeq"] == head + 1
    after = pod(installed)
    assert after["metadata"]["uid"] == before["metadata"]["uid"], "the same Pod"
    assert after["status"]["containerStatuses"][0]["restartCount"] == restarts + 1
    installed.kubectl.wait("deploy/claas-teacher", "condition=Available", namespace=NAMESPACE, seconds=120)
