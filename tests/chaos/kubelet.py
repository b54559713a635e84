"""The kubelet of a node without containers: Pods of worker and operation Jobs become processes, and their ends phases.

It does what the protocol relies on: a Pod that is deleted gets SIGTERM, then SIGKILL after its grace period, and leaves
the API server only when its process has ended; a Pod deleted by force loses its process at once; a container that ends
never starts again. A lost node is one that `lose` was called for: its process lives on and nobody hears of it.
"""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import forks
from chaos.api import Raw, RawApi
from claas_crds import names

Environment = Callable[[Raw, Mapping[str, str]], Awaitable[Mapping[str, str]]]


class Kubelet:
    """Serves the Pods of one namespace.

    Args:
        environment: what a Pod's process gets, from the Pod and the variables that its manifest sets.
        say: told what happens, for the history.
    """

    def __init__(
        self, api: RawApi, namespace: str, folder: Path, environment: Environment, say: Callable[[str], None]
    ) -> None:
        self._api, self._namespace, self._folder = api, namespace, folder
        self._environment, self._say = environment, say
        self._deleted: dict[str, asyncio.Event] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self.processes: dict[str, forks.Forked] = {}  # by Pod name, also those that have ended
        self.logs: list[Path] = []
        self.lost: set[str] = set()
        self._workers: set[str] = set()

    async def run(self) -> None:
        """For ever; when it is cancelled, every process is killed."""
        try:
            async for kind, pod in self._api.watch(f"/api/v1/namespaces/{self._namespace}/pods"):
                self._see(kind, pod)
        finally:
            for task in self._tasks.values():
                task.cancel()
            for process in self.processes.values():
                process.kill()

    def workers(self) -> dict[str, forks.Forked]:
        """Worker processes that live, by Pod name."""
        return {name: p for name, p in list(self.processes.items()) if name in self._workers and p.poll() is None}

    def lose(self, name: str) -> None:
        """The node of this Pod is gone, and its kubelet with it. Its process is not."""
        self.lost.add(name)

    def _see(self, kind: str, pod: Raw) -> None:
        uid, name = pod["metadata"]["uid"], pod["metadata"]["name"]
        deleted = self._deleted.setdefault(uid, asyncio.Event())
        if kind == "DELETED":
            deleted.set()
            process = self.processes.get(name)
            if process is not None and name not in self.lost:
                process.kill()
            return
        if pod["metadata"].get("deletionTimestamp"):
            deleted.set()
        if uid not in self._tasks and pod["status"].get("phase") == "Pending":
            self._tasks[uid] = asyncio.create_task(self._live(pod, deleted))

    async def _live(self, pod: Raw, deleted: asyncio.Event) -> None:
        name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
        component = pod["metadata"].get("labels", {}).get(names.COMPONENT_LABEL, "")
        path = f"/api/v1/namespaces/{self._namespace}/pods/{name}"
        target = {"apiVersion": "v1", "kind": "Node", "name": "node"}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name, "uid": uid}, "target": target}
        code, _ = await self._api("POST", f"{path}/binding", binding)
        if code >= 400:
            return  # it went before it was bound
        (container,) = pod["spec"]["containers"]
        answer = self._folder / f"{name}.json"
        environment = await self._environment(pod, _variables(pod, container))
        process = self._start(name, component, container, environment, answer)
        await self._status(path, uid, "Running", container["name"], None)
        grace = pod["spec"].get("terminationGracePeriodSeconds", 30)
        code = await self._end(process, name, deleted, grace)
        if name in self.lost:
            return
        self._say(f"{component} {name} has ended: {code}")
        message = answer.read_text() if answer.exists() else ""
        await self._status(path, uid, "Failed" if code else "Succeeded", container["name"], (code, message))
        await deleted.wait()
        options = {"gracePeriodSeconds": 0, "preconditions": {"uid": uid}}
        await self._api("DELETE", path, options)

    def _start(
        self, name: str, component: str, container: Raw, environment: Mapping[str, str], answer: Path
    ) -> forks.Forked:
        log = self._folder / f"{component}-{name}.log"
        self.logs.append(log)
        environment = {**environment, "CLAAS_TERMINATION_LOG": str(answer)}
        if component == names.COMPONENT_WORKER:
            self._workers.add(name)
            process = forks.worker(log, environment)
        else:
            process = forks.store(log, environment, container["args"])
        self.processes[name] = process
        self._say(f"{component} {name} runs as {process.pid}")
        return process

    async def _end(self, process: forks.Forked, name: str, deleted: asyncio.Event, grace: float) -> int:
        ended = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_reader(process.sentinel, ended.set)
        try:
            await _first(ended, deleted)
            if not ended.is_set() and name not in self.lost:
                process.send_signal(signal.SIGTERM)
                await _first(ended, seconds=grace)
                process.kill()
            await ended.wait()
        finally:
            loop.remove_reader(process.sentinel)
        return process.wait()

    async def _status(
        self, path: str, uid: str, phase: str, container: str, terminated: tuple[int, str] | None
    ) -> None:
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        state: Raw = {"running": {"startedAt": now}}
        if terminated is not None:
            code, message = terminated
            ended = {"exitCode": code if code >= 0 else 128 - code, "startedAt": now, "finishedAt": now}
            state = {"terminated": ended | {"message": message}}
        one = {"name": container, "ready": terminated is None, "restartCount": 0, "image": "x", "imageID": "x"}
        status: Raw = {"phase": phase, "containerStatuses": [one | {"state": state}]}
        if terminated is None:
            status["startTime"] = now
        await self._api("PATCH", f"{path}/status", {"metadata": {"uid": uid}, "status": status})


def _variables(pod: Raw, container: Raw) -> dict[str, str]:
    """The container's environment, its fields filled in."""
    found = {}
    for variable in container.get("env") or []:
        field = variable.get("valueFrom", {}).get("fieldRef", {}).get("fieldPath", "")
        found[variable["name"]] = pod["metadata"][field.partition(".")[2]] if field else variable.get("value", "")
    return found


async def _first(*events: asyncio.Event, seconds: float | None = None) -> None:
    """Returns when one of them is set, or after so many seconds."""
    waits: list[asyncio.Task[Any]] = [asyncio.create_task(event.wait()) for event in events]
    try:
        await asyncio.wait(waits, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait in waits:
            wait.cancel()
