"""What happens while a command waits, on stderr, for a person at a terminal; nothing for a pipe."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, Self

from claas_operator.cli.output import console, harmless, person_watches

if TYPE_CHECKING:
    from claas_client.models import Request


class Spinner:
    """A line that turns until the block ends."""

    def __init__(self, words: str) -> None:
        self._words, self._stack = words, ExitStack()
        self._say: Callable[[str], None] = lambda words: None
        self._above: Callable[[str], None] = lambda line: None

    def __enter__(self) -> Self:
        if person_watches():
            from rich.text import Text

            screen = console(err=True)
            status = self._stack.enter_context(screen.status(Text(self._words)))
            self._say = lambda words: status.update(Text(words))
            self._above = lambda line: screen.print(Text(line, style="dim"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def say(self, words: str) -> None:
        """Other words on the line."""
        self._say(words)

    def above(self, line: str) -> None:
        """A line that stays, above the one that turns."""
        self._above(line)


class Progress(Spinner):
    """The states of one request: the present one turns, those that are over stay above it with their seconds."""

    def __init__(self, request: Request) -> None:
        super().__init__(f"request {request.id}")
        self._shown, self._since = "", time.monotonic()

    def show(self, request: Request) -> None:
        """The request as it is now."""
        line = describe(request)
        if line == self._shown:
            return
        now = time.monotonic()
        if self._shown:
            self.above(f"{now - self._since:7.1f} s  {self._shown}")
        self._shown, self._since = line, now
        self.say(line)


def describe(request: Request) -> str:
    """One line: the state, why it waits, what its worker does."""
    words = [request.state]
    if request.phase:
        words.append(request.phase)
    if request.reason:
        words.append(f"{request.reason}: {request.message}" if not request.ended else request.reason)
    if request.worker and not request.ended:
        words.append(f"on {request.worker}")
    if request.attempt > 1:
        words.append(f"attempt {request.attempt}")
    return harmless("  ".join(words))
