"""One event loop in a thread of its own: proxies, kubelets and witnesses run there, tests call in."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, Self, TypeVar

T = TypeVar("T")


def _handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Connections that are cut leave their handlers behind: that is no news here."""
    if "was destroyed but it is pending" not in context["message"]:
        loop.default_exception_handler(context)


class Background:
    """A running loop; `call` waits for an answer, `start` does not."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self.loop.set_exception_handler(_handle)
        self._thread = threading.Thread(target=self.loop.run_forever, name="background", daemon=True)

    def call(self, what: Coroutine[Any, Any, T], seconds: float = 60) -> T:
        """The result of a coroutine that runs there."""
        return self.start(what).result(seconds)

    def start(self, what: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """It runs there, beside the caller."""
        return asyncio.run_coroutine_threadsafe(what, self.loop)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        async def end() -> None:
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)

        self.call(end())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join(timeout=10)
        self.loop.close()
