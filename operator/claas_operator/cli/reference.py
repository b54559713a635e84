"""docs/cli.md, made from the commands: `python -m claas_operator.cli.reference` writes it, a test compares."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import click

from claas_operator.cli import claas, exits
from claas_operator.cli.command import Command, Group

PATH = Path(__file__).resolve().parents[3] / "docs" / "cli.md"
WIDTH = 100

INTRODUCTION = """# The command line

`claas` is one of three ways to use CLaaS, beside `kubectl` and the REST API, and does the same things. It is in the
base install (`pip install claas`), which needs neither torch nor the Kubernetes client; commands that talk to a cluster
say so when `pip install 'claas[operator]'` is missing.

This page is made from the commands (`make docs`); `claas COMMAND --help` says the same.

## Which installation, as whom

| by | give | it |
|---|---|---|
| kubeconfig | nothing, or `--kubeconfig`, `--context`, `-n` | reads and writes the resources, with your rights |
| url | `--url` with `--key` or `--token` | asks the REST API, for people outside the cluster |

Keys and tokens are better given by the environment (`CLAAS_URL`, `CLAAS_API_KEY`, `CLAAS_TOKEN`): other users of a
machine can read a command line.

## What goes where

- Answers go to stdout, everything else to stderr. On a terminal an answer is a table; piped, it is tab-separated with
  a header line, without colours, and nothing is said about progress. `-o json` is one JSON document, with the REST
  API's names.
- An error is one line that names the field or the object, and one that says what to do. There is no traceback for what
  was foreseen, and no error quotes a prompt, a response or feedback.
- Ctrl-C stops the waiting, never the request: it says how to look at it and how to cancel it.

## Exit codes
"""


def markdown() -> str:
    """The whole page."""
    codes = "\n".join(f"| {code} | {meaning} |" for code, meaning in exits.rows())
    parts = [INTRODUCTION, f"| code | means |\n|---|---|\n{codes}\n"]
    parts += _sections(claas, "claas")
    return "\n".join(parts).rstrip() + "\n"


def _sections(group: Group, path: str) -> Iterator[str]:
    context = _context(group, path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None
        yield from _section(command, f"{path} {name}")
        if isinstance(command, Group):
            yield from _sections(command, f"{path} {name}")


def _section(command: click.Command, path: str) -> Iterator[str]:
    context = _context(command, path)
    usage = " ".join(command.collect_usage_pieces(context))
    yield f"## {path}\n\n```\n{path} {usage}\n```\n"
    yield _prose(command.help or "") + "\n"
    rows = [record for parameter in command.get_params(context) if (record := parameter.get_help_record(context))]
    if rows := [row for row in rows if row[0] not in ("--help", "-h, --help")]:
        listed = "\n".join(f"| `{_cell(option)}` | {_cell(words)} |" for option, words in rows)
        yield f"| option | |\n|---|---|\n{listed}\n"
    examples = command.examples if isinstance(command, Command | Group) else ()
    if examples:
        yield "```sh\n" + "\n".join(examples) + "\n```\n"


def _context(command: click.Command, path: str) -> click.Context:
    return click.Context(command, info_name=path, max_content_width=WIDTH, terminal_width=WIDTH)


def _prose(text: str) -> str:
    import inspect

    return inspect.cleandoc(text)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def main() -> int:
    """Writes the page."""
    PATH.write_text(markdown(), encoding="utf-8")
    print(f"wrote {PATH}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
