"""Server-sent events (WHATWG HTML, section 9.2), line by line."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class ServerEvent:
    """One event of a stream."""

    type: str
    data: str
    id: str


@dataclass
class Decoder:
    """Takes lines without their ends; gives the event that an empty one completes."""

    last_id: str = ""
    retry_seconds: float | None = None
    _type: str = ""
    _data: list[str] = field(default_factory=list)

    def feed(self, line: str) -> ServerEvent | None:
        """The event that this line completes, if it does."""
        if not line:
            return self._complete()
        name, _, value = line.partition(":")
        value = value.removeprefix(" ")
        match name:
            case "event":
                self._type = value
            case "data":
                self._data.append(value)
            case "id" if "\0" not in value:
                self.last_id = value
            case "retry" if value.isdecimal():
                self.retry_seconds = int(value) / 1000
        return None  # a comment (an empty name) keeps the connection open, and says nothing

    def _complete(self) -> ServerEvent | None:
        made = ServerEvent(self._type or "message", "\n".join(self._data), self.last_id) if self._data else None
        self._type, self._data = "", []
        return made
