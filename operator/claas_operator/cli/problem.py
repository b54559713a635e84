"""What goes wrong in a way that was foreseen: one line for people, an exit code for scripts, never a traceback."""

from __future__ import annotations

from claas_operator.cli.exits import Exit


class Problem(Exception):
    """The command cannot do what was asked.

    Attributes:
        message: what is wrong; names the field or the object. Never a sample's text.
        fix: what to do about it; may be empty.
        code: the exit code.
    """

    def __init__(self, message: str, fix: str = "", code: Exit = Exit.FAILED) -> None:
        super().__init__(message)
        self.message, self.fix, self.code = message, fix, code

    def __str__(self) -> str:
        return f"{self.message}\n  {self.fix}" if self.fix else self.message


def missing(package: str | None, extra: str, command: str) -> Problem:
    """A command that needs an extra which is not installed."""
    return Problem(f"{command} needs the package {package or '?'}", f"pip install 'claas[{extra}]'")
