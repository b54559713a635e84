"""Answers on stdout, everything else on stderr. For a person a table; for a pipe tabs, no colour and no progress.

rich is imported only where a terminal is looked at.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Sequence
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from rich.console import Console


class Format(StrEnum):
    """Of the answer."""

    TABLE = "table"
    JSON = "json"


# How a word of a status looks on a terminal.
STYLES = {
    "Complete": "green",
    "Ready": "green",
    "ok": "green",
    "Running": "cyan",
    "Assigned": "cyan",
    "Pending": "yellow",
    "warning": "yellow",
    "Failed": "red",
    "Cancelled": "magenta",
    "wrong": "red",
}


def say(message: str) -> None:
    """A line for people, on stderr."""
    click.echo(message, err=True)


def to_terminal() -> bool:
    """Whether a person reads stdout."""
    return sys.stdout.isatty()


def person_watches() -> bool:
    """Whether a person reads stderr, so that progress makes sense."""
    return sys.stderr.isatty()


def console(*, err: bool = False) -> Console:
    """rich's console on stdout or stderr."""
    from rich.console import Console

    return Console(stderr=err, highlight=False)


def write_json(value: Any) -> None:
    """One JSON document on stdout; indented for a person, one line for a pipe."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=2 if to_terminal() else None, allow_nan=False))


def write_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "") -> None:
    """A table on stdout: rich's on a terminal, tab-separated values with a header line for a pipe.

    Args:
        empty: said on stderr to a person when there is no row.
    """
    listed = [[text(cell) for cell in row] for row in rows]
    if not to_terminal():
        click.echo("\t".join(columns))
        for row in listed:
            click.echo("\t".join(row))
        return
    if not listed and empty:
        say(empty)
        return
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for number, column in enumerate(columns):
        table.add_column(column, no_wrap=number == 0, overflow="fold")
    for row in listed:
        table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
    console().print(table)


def write_fields(pairs: Iterable[tuple[str, object]]) -> None:
    """Names and values, one pair a line; those without a value are left out."""
    write_table(("FIELD", "VALUE"), [pair for pair in pairs if pair[1] not in (None, "", [], {})])


def text(value: object) -> str:
    """A cell. Numbers as people read them: six digits that count."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else harmless(str(value))


def harmless(words: str) -> str:
    """One line without control characters: what a server says cannot end a cell, nor move a terminal's cursor."""
    return "".join(c if c.isprintable() else " " for c in words)
