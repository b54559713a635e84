"""The operator's process: kopf watches, the loop decides.

kopf serves for what it does well (list and watch with reconnects, credentials, signals, liveness); of its handlers only
`on.event` is used. See "What kopf does badly" in the operator's design: each setting below closes one of those traps.
"""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import os
import sys
import urllib.parse
from collections.abc import Collection
from typing import Any, Final

import kopf
from aiohttp import web
from kopf import DiffBaseStorage, ProgressStorage
from prometheus_client.aiohttp import make_aiohttp_handler
from pythonjsonlogger.json import JsonFormatter

from claas_crds import names
from claas_operator.api import Api, connect
from claas_operator.loop import Loop
from claas_operator.metrics import Metrics
from claas_operator.relist import selectors
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind

log = logging.getLogger(__name__)

# An object's own task in kopf waits so long for more news. Their number has no limit: behind one, whole objects are
# listed faster than they are handled, and among 20,000 of them 120 MB lay in that line.
CHUNK_SIZE: Final = 200
IDLE_TIMEOUT_SECONDS: Final = 0.05
# What the snapshot holds has no cycles. By default (700, 10, 10) the collector looked through it over and over while it
# grew: 5 of the 15 seconds of CPU that a start among 20,000 objects took.
GC_THRESHOLD: Final = (20_000, 10, 10)
# An API server that answers 5xx or nothing is asked again soon, for ten minutes; then the process starts anew.
ERROR_BACKOFFS: Final = (0.2, 0.5, 1.0, *[2.0] * 300)
WATCH_SECONDS: Final = 300
# The loop comes round at least once per relist; a process that misses several of them is stuck.
MISSED_RELISTS: Final = 3
# From the end of the first of kopf's tasks to the process': kopf itself waits 5 s for tasks of tasks.
STOP_SECONDS: Final = 12.0

_RESOURCES: Final[dict[Kind, tuple[str, ...]]] = {
    Kind.REQUEST: (names.GROUP, names.VERSION, names.REQUEST_PLURAL),
    Kind.ADAPTER: (names.GROUP, names.VERSION, names.ADAPTER_PLURAL),
    Kind.JOB: ("batch", "v1", "jobs"),
    Kind.POD: ("v1", "pods"),
    Kind.LEASE: ("coordination.k8s.io", "v1", "leases"),
}


class Stalled(Exception):
    """The loop has not come round: the liveness probe fails, and the kubelet restarts us."""


class _NoDiffs(DiffBaseStorage):  # type: ignore[misc]  # kopf is not followed by mypy
    """We have no change-detecting handlers: kopf need not copy every object to find out what changed."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoProgress(ProgressStorage):  # type: ignore[misc]
    """Nor handlers whose progress would go into annotations."""

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass

    def purge(self, **_: Any) -> None:
        pass

    def touch(self, **_: Any) -> None:
        pass

    def clear(self, *, essence: Any) -> Any:
        return essence


def configure(kopf_settings: kopf.OperatorSettings, settings: Settings) -> None:
    """kopf's settings; see the table of traps."""
    kopf_settings.posting.enabled = False  # Events are ours, on transitions only
    kopf_settings.posting.level = logging.WARNING
    kopf_settings.watching.chunk_size = CHUNK_SIZE
    kopf_settings.queueing.idle_timeout = IDLE_TIMEOUT_SECONDS
    kopf_settings.queueing.worker_limit = None
    kopf_settings.networking.request_timeout = 30
    kopf_settings.networking.connect_timeout = 10
    kopf_settings.networking.error_backoffs = ERROR_BACKOFFS
    # An end now and then: a watch that is dead without saying so is found by that at the latest.
    kopf_settings.watching.server_timeout = WATCH_SECONDS
    kopf_settings.watching.client_timeout = WATCH_SECONDS + 30
    kopf_settings.persistence.diffbase_storage = _NoDiffs()
    kopf_settings.persistence.progress_storage = _NoProgress()
    kopf_settings.process.ultimate_exiting_timeout = 20
    for kind, selector in selectors(settings).items():
        kopf_settings.watching.label_selectors[_RESOURCES[kind]] = selector


class Process:
    """What the handlers share: the loop, and how it ended."""

    def __init__(self, settings: Settings, metrics_url: str | None) -> None:
        self._settings, self._metrics_url = settings, metrics_url
        self.stop = asyncio.Event()  # kopf ends when it is set
        self.failed = False
        self._api: Api | None = None
        self._loop: Loop | None = None
        self._task: asyncio.Task[None] | None = None
        self._site: web.AppRunner | None = None

    async def start(self, settings: kopf.OperatorSettings, **_: Any) -> None:
        """Connects and starts the loop; kopf's watches start after it."""
        configure(settings, self._settings)
        metrics = Metrics()
        self._api = await connect(metrics.called)
        self._loop = Loop(self._settings, self._api, metrics)
        if self._metrics_url is not None:
            self._site = await serve(metrics, self._metrics_url)
        gc.collect()
        gc.set_threshold(*GC_THRESHOLD)
        gc.freeze()  # modules and models stay: to look through them again would hold up the loop for 60 ms
        self._task = asyncio.create_task(self._loop.run(), name="loop")
        self._task.add_done_callback(self._ended)

    def observe(self, kind: Kind, event: Any) -> None:
        """An event of a watch."""
        if self._loop is not None:
            self._loop.observe(kind, event)

    async def alive(self, **_: Any) -> dict[str, Any]:
        """For the liveness probe.

        Raises:
            Stalled: the loop has ended or does not come round.
        """
        if self._loop is None or self._task is None or self._task.done():
            raise Stalled("the loop does not run")
        if self._loop.stalled_seconds > MISSED_RELISTS * self._settings.timings.relist_seconds:
            raise Stalled(f"the loop has not come round for {self._loop.stalled_seconds:.0f} s")
        return {"leading": self._loop.leader.leading(), "identity": self._loop.leader.identity}

    async def clean_up(self, **_: Any) -> None:
        """Ends the loop, which gives the leader's Lease back."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._api is not None:
            await self._api.close()
        if self._site is not None:
            await self._site.cleanup()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            self.failed = True
            log.critical("the loop has failed", exc_info=error)
        self.stop.set()


async def serve(metrics: Metrics, url: str) -> web.AppRunner:
    """Answers scrapes at `url` (http://ADDRESS:PORT/PATH) from the loop's own thread, where the snapshot is whole."""
    parts = urllib.parse.urlsplit(url)
    application = web.Application()
    application.router.add_get(parts.path or "/metrics", make_aiohttp_handler(metrics.registry))
    runner = web.AppRunner(application, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, parts.hostname, parts.port).start()
    return runner


def handlers(process: Process) -> kopf.OperatorRegistry:
    """All of kopf's handlers."""
    registry = kopf.OperatorRegistry()
    kopf.on.login(registry=registry)(kopf.login_via_client)
    # By default it would be tried again in a minute, and again: a process that cannot start ends, and is seen.
    kopf.on.startup(registry=registry, errors=kopf.ErrorsMode.PERMANENT)(process.start)
    kopf.on.cleanup(registry=registry)(process.clean_up)

    kopf.on.probe(registry=registry, id="loop")(process.alive)
    for kind, resource in _RESOURCES.items():
        observe = functools.partial(_observe, process, kind)
        kopf.on.event(*resource, registry=registry, id=f"observe-{kind.value.lower()}")(observe)
    return registry


async def _observe(process: Process, kind: Kind, event: Any, **_: Any) -> None:
    process.observe(kind, event)


def log_as_json(level: str) -> None:
    """One JSON object a line on stderr. kopf's own lines only where something is wrong: its debug lines hold bodies."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        JsonFormatter(
            "%(asctime)s %(levelname)s %(name)s %(message)s",
            rename_fields={"asctime": "at", "levelname": "level", "name": "logger"},
        )
    )
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("claas_operator").setLevel(level)
    logging.getLogger("kopf").setLevel(logging.WARNING)
    # These two print requests and answers at lower levels.
    for noisy in ("kubernetes", "aiohttp", "httpx", "httpcore", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


async def comes_to_its_end(tasks: Collection[asyncio.Task[Any]], run: asyncio.Task[None], seconds: float) -> bool:
    """Waits until one of kopf's tasks has ended, and then for the rest; False: not all have within so many seconds.

    kopf cancels them and waits without a limit. A watch that is cancelled while its connection is closed may take that
    for a reason to log in again, for which it then waits for ever: the process would live, and be deaf.

    Raises:
        Exception: what ended the first.
    """
    await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    done, _ = await asyncio.wait({run}, timeout=seconds)
    if done:
        await run
    return bool(done)


def run(settings: Settings, liveness: str | None, metrics: str | None = None) -> int:
    """Runs the operator until SIGTERM, or until its loop dies. The process's exit status.

    Args:
        liveness, metrics: urls to serve the liveness probe and Prometheus' scrapes at.
    """

    async def operator() -> int:
        process, before = Process(settings, metrics), asyncio.all_tasks()
        tasks = await kopf.spawn_tasks(
            registry=handlers(process),
            standalone=True,
            clusterwide=True,
            liveness_endpoint=liveness,
            stop_flag=process.stop,
        )
        if not await comes_to_its_end(tasks, asyncio.create_task(kopf.run_tasks(tasks, ignored=before)), STOP_SECONDS):
            log.critical("kopf does not come to its end")
            os._exit(1)  # to leave the event loop would wait for the same tasks
        return 1 if process.failed else 0

    return asyncio.run(operator())
