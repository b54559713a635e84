"""The operator's process: kopf watches, the loop decides.

kopf serves for what it does well (list and watch with reconnects, credentials, signals, liveness); of its handlers only
`on.event` is used. See "What kopf does badly" in the operator's design: each setting below closes one of those traps.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from typing import Any, Final

import kopf
from kopf import DiffBaseStorage, ProgressStorage
from pythonjsonlogger.json import JsonFormatter

from claas_crds import names
from claas_operator.api import Api, connect
from claas_operator.loop import Loop, selectors
from claas_operator.settings import Settings
from claas_operator.snapshot import Kind

log = logging.getLogger(__name__)

# Measured against Kubernetes 1.36: 10,000 objects listed and handled in 5.4 s within 118 MB (defaults: 40 s for 1,000).
CHUNK_SIZE: Final = 200
IDLE_TIMEOUT_SECONDS: Final = 0.05
WORKER_LIMIT: Final = 100
# The loop comes round at least once per relist; a process that misses several of them is stuck.
MISSED_RELISTS: Final = 3

_RESOURCES: Final[dict[Kind, tuple[str, str, str]]] = {
    Kind.REQUEST: (names.GROUP, names.VERSION, names.REQUEST_PLURAL),
    Kind.ADAPTER: (names.GROUP, names.VERSION, names.ADAPTER_PLURAL),
    Kind.JOB: ("batch", "v1", "jobs"),
    Kind.POD: ("", "v1", "pods"),
    Kind.LEASE: ("coordination.k8s.io", "v1", "leases"),
}


class Stalled(Exception):
    """The loop has not come round: the liveness probe fails, and the kubelet restarts us."""


class _NoDiffs(DiffBaseStorage):
    """We have no change-detecting handlers: kopf need not copy every object to find out what changed."""

    def build(self, **_: Any) -> Any:
        return {}

    def fetch(self, **_: Any) -> Any:
        return None

    def store(self, **_: Any) -> None:
        pass


class _NoProgress(ProgressStorage):
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
    kopf_settings.queueing.worker_limit = WORKER_LIMIT
    kopf_settings.networking.request_timeout = 30
    kopf_settings.networking.connect_timeout = 10
    # A server-side end now and then: a watch that is dead without saying so is found by that at the latest.
    kopf_settings.watching.server_timeout = 300
    kopf_settings.persistence.diffbase_storage = _NoDiffs()
    kopf_settings.persistence.progress_storage = _NoProgress()
    kopf_settings.process.ultimate_exiting_timeout = 20
    for kind, selector in selectors(settings).items():
        kopf_settings.watching.label_selectors[_RESOURCES[kind]] = selector


def build(settings: Settings, stop: asyncio.Event) -> kopf.OperatorRegistry:
    """All of kopf's handlers. `stop` is set when the loop dies, and ends the process."""
    registry = kopf.OperatorRegistry()
    running: dict[str, Any] = {}

    @kopf.on.startup(registry=registry)
    async def start(settings: kopf.OperatorSettings, **_: Any) -> None:
        configure(settings, claas)
        running["api"] = await connect()
        running["loop"] = Loop(claas, running["api"])
        running["task"] = asyncio.create_task(running["loop"].run(), name="loop")
        running["task"].add_done_callback(ended)

    @kopf.on.cleanup(registry=registry)
    async def clean_up(**_: Any) -> None:
        task: asyncio.Task[None] | None = running.get("task")
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        api: Api | None = running.get("api")
        if api is not None:
            await api.close()

    @kopf.on.probe(registry=registry, id="loop")
    async def alive(**_: Any) -> dict[str, Any]:
        loop: Loop = running["loop"]
        limit = MISSED_RELISTS * claas.timings.relist_seconds
        if running["task"].done() or loop.stalled_seconds > limit:
            raise Stalled(f"the loop has not come round for {loop.stalled_seconds:.0f} s")
        return {"leading": loop.leader.leading(), "identity": loop.leader.identity}

    def watch(kind: Kind) -> None:
        @kopf.on.event(*_RESOURCES[kind], registry=registry, id=f"observe-{kind.value.lower()}")
        async def observe(event: Any, **_: Any) -> None:
            running["loop"].observe(kind, event)

    def ended(task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.critical("the loop has failed", exc_info=error)
        stop.set()

    claas = settings
    for kind in Kind:
        watch(kind)
    return registry


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


def run(settings: Settings, liveness: str | None) -> int:
    """Runs the operator until SIGTERM, or until its loop dies. The process's exit status."""

    async def operator() -> int:
        stop = asyncio.Event()
        told = asyncio.Event()
        registry = build(settings, stop)
        await kopf.operator(
            registry=registry, standalone=True, clusterwide=True, liveness_endpoint=liveness, stop_flag=stop
        )
        return 1 if stop.is_set() and not told.is_set() else 0

    return asyncio.run(operator())
