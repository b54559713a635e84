"""The `claas` command as a user runs it: a process of its own, piped or on a terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import forks

COMMAND = [sys.executable, "-m", "claas_operator.cli"]
SECONDS = 60.0
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@dataclass(frozen=True)
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        """stdout, as the one JSON document that it is."""
        return json.loads(self.out)

    @property
    def rows(self) -> list[list[str]]:
        """stdout, as a piped table: its lines' cells, without the header."""
        return [line.split("\t") for line in self.out.splitlines()[1:]]


@dataclass
class Claas:
    """`claas`, with an environment that holds no more than it needs.

    Run to its end and piped it is forked (`forks`); beside the test, on a terminal, or by another `command` it is not.

    Attributes:
        options: after every command.
    """

    environment: dict[str, str] = field(default_factory=dict)
    options: tuple[str, ...] = ()
    command: list[str] = field(default_factory=lambda: list(COMMAND))
    seconds: float = SECONDS

    def _environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in ("PATH", "HOME", "LANG") if name in os.environ}
        return kept | {"PYTHONPATH": os.pathsep.join(sys.path), "COLUMNS": "120"} | self.environment

    def __call__(self, *words: str, stdin: str = "") -> Done:
        """Runs it to its end, piped."""
        if self.command == COMMAND:
            return self._forked([*words, *self.options], stdin)
        done = subprocess.run(
            [*self.command, *words, *self.options],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=self.seconds,
            env=self._environment(),
            check=False,
        )
        assert "Traceback" not in done.stderr, done.stderr
        return Done(done.returncode, done.stdout, done.stderr)

    def _forked(self, words: Sequence[str], stdin: str) -> Done:
        with tempfile.TemporaryDirectory(prefix="claas-cli-") as folder:
            said, out, err = (Path(folder) / name for name in ("in", "out", "err"))
            said.write_text(stdin)
            process = forks.claas(words, self._environment(), out, err, said)
            try:
                code = process.wait(self.seconds)
            finally:
                process.kill()
            assert "Traceback" not in err.read_text(), err.read_text()
            return Done(code, out.read_text(), err.read_text())

    def start(self, *words: str) -> Running:
        """Runs it beside the test, piped."""
        process = subprocess.Popen(
            [*self.command, *words, *self.options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self._environment(),
            # A shell's background jobs, and so their children, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        return Running(process)

    def on_terminal(self, *words: str, meanwhile: Callable[[], None] = lambda: None) -> Done:
        """Runs it with stdout and stderr on one terminal: `out` is what a person has seen, escapes and all."""
        main, other = pty.openpty()
        process = subprocess.Popen(
            [*self.command, *words, *self.options],
            stdin=other,
            stdout=other,
            stderr=other,
            env=self._environment() | {"TERM": "xterm-256color"},
            start_new_session=True,
        )
        os.close(other)
        try:
            meanwhile()
            seen = _read_terminal(main)
            code = process.wait(timeout=SECONDS)
        finally:
            process.kill()
            process.wait()
            os.close(main)
        return Done(code, seen, "")


class Running:
    """A command that has not ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def end(self, sent: int | None = None) -> Done:
        """Sends a signal, if one is given, and waits for the end."""
        try:
            if sent is not None:
                self.process.send_signal(sent)
            out, err = self.process.communicate(timeout=SECONDS)
        finally:
            self.process.kill()
        assert "Traceback" not in err, err
        return Done(self.process.returncode, out, err)


def _read_terminal(main: int) -> str:
    seen, end = b"", time.monotonic() + SECONDS
    while time.monotonic() < end:
        ready, _, _ = select.select([main], [], [], 1.0)
        if not ready:
            continue
        with contextlib.suppress(OSError):  # EIO: the last process on the terminal has ended
            if piece := os.read(main, 65536):
                seen += piece
                continue
        break
    return seen.decode(errors="replace")


def plain(text: str) -> str:
    """What a terminal shows, without colours and movements."""
    return ESCAPES.sub("", text).replace("\r\n", "\n")


ROOT = Path(__file__).resolve().parents[1]
