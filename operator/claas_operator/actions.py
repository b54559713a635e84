"""What `plan` may decide: one dataclass for each write of the protocol, with all that its precondition needs.

The records inside are those the decision was made on; their resourceVersion goes into the write. `apply` adds what the
protocol wants read live. A `status` is the merge patch of the status subresource, whole.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from claas_operator.snapshot import Adapter, Entry, Job, Lease, Pod, Request

Patch = dict[str, Any]


@dataclass(frozen=True)
class Note:
    """A Kubernetes Event about an object, posted after the write. Only for what is out of the ordinary."""

    regarding: Entry
    reason: str
    message: str
    warning: bool = True


@dataclass(frozen=True, kw_only=True)
class Action:
    """A decision. Two actions with the same key are never applied at the same time."""

    note: Note | None = None

    @property
    def key(self) -> str:
        """What it writes: an object's uid, or a name where there is no object yet."""
        raise NotImplementedError

    @property
    def about(self) -> str:
        """namespace/name, for the log."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class OnRequest(Action):
    """A write to one request's status."""

    request: Request
    status: Patch

    @property
    def key(self) -> str:
        return self.request.uid

    @property
    def about(self) -> str:
        return str(self.request)


@dataclass(frozen=True, kw_only=True)
class OnAdapter(Action):
    """A write to one adapter's status."""

    adapter: Adapter
    status: Patch

    @property
    def key(self) -> str:
        return self.adapter.uid

    @property
    def about(self) -> str:
        return str(self.adapter)


@dataclass(frozen=True, kw_only=True)
class Lock(OnAdapter):
    """The adapter is `request`'s."""

    request: Request
    worker: str  # kept free for it: the Bind follows when the lock is had


@dataclass(frozen=True, kw_only=True)
class Bind(OnRequest):
    """The request is `worker`'s. The first time, or a Move: the one before has not claimed it."""

    worker: str
    attempt: int


@dataclass(frozen=True, kw_only=True)
class Retry(Bind):
    """Bound again, as a further attempt.

    Attributes:
        lost: the claiming worker's Pod has gone without a report; both are read live first. Else one was reported.
    """

    lost: bool


@dataclass(frozen=True, kw_only=True)
class Commit(OnAdapter):
    """The head moves to what `request` reported; the lock goes to `heir`, or is cleared."""

    request: Request
    heir: Request | None


@dataclass(frozen=True, kw_only=True)
class Complete(OnRequest):
    """The request has ended well."""


@dataclass(frozen=True, kw_only=True)
class End(OnRequest):
    """The request has ended without a step.

    Attributes:
        lost: decided because the claiming worker's Pod has gone without a report; both are read live first.
        adapter_gone: decided because the adapter that it was bound to is gone; that is read live first.
    """

    reason: str
    lost: bool = False
    adapter_gone: bool = False


@dataclass(frozen=True, kw_only=True)
class Say(OnRequest):
    """The request waits, and says why; or runs, and says so."""


@dataclass(frozen=True, kw_only=True)
class Free(OnAdapter):
    """The adapter is nobody's: `holder`, the uid of the request that held it, has ended without commit or is gone."""

    holder: str
    holder_name: str


@dataclass(frozen=True, kw_only=True)
class Describe(OnAdapter):
    """The adapter says what it waits for, or what was made of its spec; nothing else changes."""


@dataclass(frozen=True, kw_only=True)
class Rollback(OnAdapter):
    """The head goes back to the version `to`, by one more move."""

    to: str


@dataclass(frozen=True, kw_only=True)
class Collect(OnAdapter):
    """Versions beyond retention begin to go: nothing may name them from now on."""

    versions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Forget(OnAdapter):
    """Versions are gone from the store, and go from the history."""

    versions: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Finalize(Action):
    """The adapter's finalizers become these. Without ours, a deleted adapter goes.

    Attributes:
        left: the head, if its versions stay in the store although they were to go.
    """

    adapter: Adapter
    finalizers: tuple[str, ...]
    left: str = ""

    @property
    def key(self) -> str:
        return self.adapter.uid

    @property
    def about(self) -> str:
        return str(self.adapter)


@dataclass(frozen=True, kw_only=True)
class Fold(OnAdapter):
    """The create Job's answer becomes the adapter's first version."""


def job_key(namespace: str, name: str) -> str:
    """The key of what starts a Job."""
    return f"job/{namespace}/{name}"


@dataclass(frozen=True, kw_only=True)
class StartJob(Action):
    """A worker Job or an operation Job."""

    manifest: Patch
    pool: str  # of a worker Job; empty otherwise

    @property
    def namespace(self) -> str:
        """Where it starts."""
        return str(self.manifest["metadata"]["namespace"])

    @property
    def name(self) -> str:
        """Its name, without which two leaders could start two."""
        return str(self.manifest["metadata"]["name"])

    @property
    def key(self) -> str:
        return job_key(self.namespace, self.name)

    @property
    def about(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, kw_only=True)
class StartDeletion(StartJob):
    """A Job that deletes versions for good; who needs which is read live first.

    Attributes:
        root: the adapter's own uri.
        versions: names of what goes; empty: all that is the adapter's, but for `kept`.
        kept: names of what others need, beside `root`.
    """

    adapter: Adapter
    root: str
    versions: frozenset[str]
    kept: frozenset[str]


@dataclass(frozen=True, kw_only=True)
class StopJob(Action):
    """What must not go on, an operation or a worker that is not Ready: its Job is deleted, and its Pod with it.

    Attributes:
        pod: of a worker; its Lease is read live, and must not say that it was ever Ready.
    """

    job: Job
    pod: Pod | None = None

    @property
    def key(self) -> str:
        return self.job.uid

    @property
    def about(self) -> str:
        return str(self.job)


@dataclass(frozen=True, kw_only=True)
class Tell(Action):
    """A Ready worker learns how long it may stay without work from now on. Whatever is bound to it, it runs."""

    pod: Pod
    lease: Lease
    linger_seconds: float

    @property
    def key(self) -> str:
        return self.pod.uid

    @property
    def about(self) -> str:
        return str(self.pod)


class Fault(StrEnum):
    """Why a worker loses its Pod."""

    STALE = "its Lease was not renewed in time"
    NO_LEASE = "it made no Lease within the pool's start limit"
    SLOW_START = "it was not Ready within the pool's start limit"
    OVERRUN = "it still runs a request that ended long ago"
    STUCK = "it was told to go long ago and its Pod is still there"


@dataclass(frozen=True, kw_only=True)
class Fence(Action):
    """A worker loses its Pod. Only the Pod seen gone frees what it held.

    Attributes:
        lease: the Lease that was judged, None when there was none: it is read live, and must still say the same.
        overrun: with Fault.OVERRUN, the uid that it should have dropped.
    """

    pod: Pod
    lease: Lease | None
    fault: Fault
    overrun: str = ""

    @property
    def key(self) -> str:
        return self.pod.uid

    @property
    def about(self) -> str:
        return str(self.pod)


@dataclass(frozen=True, kw_only=True)
class DeleteRequest(Action):
    """An ended request's time to live has passed."""

    request: Request

    @property
    def key(self) -> str:
        return self.request.uid

    @property
    def about(self) -> str:
        return str(self.request)
