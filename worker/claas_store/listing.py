"""What a store finds below a folder."""

from __future__ import annotations

from datetime import datetime
from typing import NamedTuple


class Entry(NamedTuple):
    """An object as a listing shows it."""

    uri: str
    size: int  # bytes
    modified: datetime  # aware; the store's clock


class Upload(NamedTuple):
    """An object that somebody began to write: invisible, and it takes room."""

    uri: str  # what a folder calls it, or the object that it was to become
    token: str  # by which the store knows it
    started: datetime  # aware; the store's clock
