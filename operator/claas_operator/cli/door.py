"""What both ways to an installation can do: by url (`byurl`) and by kubeconfig (`bycluster`).

Both give the REST API's own models, so that a command prints the same whichever way it goes. What fails is a `Problem`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from claas_client.models import Adapter, Health, Lineage, Place, Request, Version


@dataclass(frozen=True)
class Work:
    """What to learn from: a body of the REST API, or a DistillRequest's manifest.

    Attributes:
        lite: the body is one of /v1/distill/lite.
        manifest: `body` is a whole DistillRequest.
        key: the same key and work again is the same request; empty: a new one each time.
    """

    body: Mapping[str, Any]
    lite: bool = False
    manifest: bool = False
    key: str = ""


@dataclass(frozen=True)
class NewAdapter:
    """An adapter to be made. What is None is the installation's default."""

    output_uri: str
    name: str | None = None
    base_model: str | None = None
    lora_r: int | None = None
    lora_alpha: float | None = None
    target_modules: tuple[str, ...] = ()
    init_from: str | None = None


@dataclass(frozen=True)
class Made:
    """An adapter that has its first version. `name` is unknown where the server does not tell."""

    lora_uri: str
    name: str | None = None


class Door(Protocol):
    """A connection to one installation, in one namespace. Each method raises `Problem` when it cannot do its part."""

    way: str  # for messages: "https://…" or "the cluster at https://…"

    def close(self) -> None:
        """Closes the connections."""

    def submit(self, work: Work) -> Request:
        """Asks for a training step; returns when it is accepted."""

    def watch(self, id: str, timeout: float | None) -> Iterator[Request]:
        """The request now, and after each of its changes, until it has ended, for `timeout` seconds at most."""

    def request(self, id: str) -> Request:
        """The request as it is now."""

    def requests(self, adapter: str | None) -> Iterator[Request]:
        """The namespace's requests, or those of one adapter."""

    def place(self, id: str) -> Place | None:
        """Where a pending request stands; None where `request` tells as much as can be known."""

    def cancel(self, id: str) -> Request:
        """Asks to stop it."""

    def init(self, wanted: NewAdapter, timeout: float | None) -> Made:
        """Makes an adapter, and returns when it has its first version. The same again is the same adapter."""

    def adapter(self, name: str) -> Adapter:
        """The adapter and its head."""

    def adapters(self) -> Iterator[Adapter]:
        """The namespace's adapters."""

    def versions(self, name: str) -> Iterator[Version]:
        """How the adapter's head moved, newest first."""

    def lineage(self, name: str, version: str | None) -> Lineage:
        """A version and its ancestors."""

    def rollback(self, name: str, version: str, timeout: float | None) -> Adapter:
        """Makes an old version the head, and returns when it is."""

    def health(self) -> Health:
        """Whether a request would be served now, part by part."""
