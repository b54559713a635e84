"""Processes that die with us, waits that have an end, and errors that show the log of what failed."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

POLL_SECONDS = 0.05


class ClusterError(RuntimeError):
    """Something did not start, end or answer; the message says what, and shows the end of its log."""


def say(message: str) -> None:
    """Tells the person in front of the terminal what happens, on stderr: stdout is for results."""
    print(f"cluster: {message}", file=sys.stderr, flush=True)


def tails(logs: Sequence[Path], lines: int = 8) -> str:
    """The last ``lines`` lines of each log, each under its name; absent and empty logs are left out."""
    parts = []
    for log in logs:
        text = log.read_text(errors="replace").splitlines()[-lines:] if log.is_file() else []
        if text:
            parts += [f"--- {log}", *(line[:400] for line in text)]
    return "".join("\n" + part for part in parts)


def spawn(
    command: Sequence[str | Path],
    log: Path,
    *,
    environment: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
    cwd: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Starts ``command`` with its output appended to ``log``. The kernel kills it when the thread that called ends,
    however it ends: so call from a thread that lives as long as the process must."""
    with log.open("ab") as out:
        return subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, **(environment or {})},
            pass_fds=pass_fds,
            cwd=cwd,
        )


def run(command: Sequence[str | Path], *, seconds: float, environment: Mapping[str, str] | None = None) -> str:
    """Runs ``command`` and gives its stdout.

    Raises:
        ClusterError: it is not there, exits non-zero or takes longer than ``seconds``; with the end of its stderr.
    """
    shown = " ".join(map(str, command))[:300]
    try:
        done = subprocess.run(
            list(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=seconds,
            env={**os.environ, **(environment or {})},
        )
    except FileNotFoundError as error:
        raise ClusterError(f"{error.filename} is not installed (for: {shown})") from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"gave up on `{shown}` after {seconds:.0f} s") from None
    if done.returncode:
        end = "\n".join((done.stderr.strip() or done.stdout.strip()).splitlines()[-12:])
        raise ClusterError(f"`{shown}` failed with {done.returncode}:\n{end}")
    return done.stdout


def run_with_progress(
    what: str,
    command: Sequence[str | Path],
    log: Path,
    *,
    seconds: float,
    environment: Mapping[str, str] | None = None,
    cwd: Path | None = None,
) -> None:
    """Runs a long ``command`` into ``log`` and says every 15 s that, and for how long, it has been at ``what``.

    Raises:
        ClusterError: it exits non-zero or takes longer than ``seconds``; with the end of its log.
    """
    say(f"{what} (log: {log})")
    started, process = time.monotonic(), spawn(command, log, environment=environment, cwd=cwd)
    try:
        while True:
            try:
                code = process.wait(timeout=15)
            except subprocess.TimeoutExpired:
                spent = time.monotonic() - started
                if spent > seconds:
                    raise ClusterError(f"gave up {what} after {minutes(spent)}{tails([log])}") from None
                say(f"{what}: {minutes(spent)}")
                continue
            if code:
                raise ClusterError(f"{what} failed with {code}{tails([log], 15)}")
            return
    finally:
        kill([process])


def minutes(seconds: float) -> str:
    """``130`` -> ``2m10s``."""
    return f"{int(seconds) // 60}m{int(seconds) % 60:02}s" if seconds >= 60 else f"{int(seconds)}s"


def kill(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """SIGKILLs and reaps them all; the dead are fine."""
    for process in processes:
        if process.poll() is None:
            process.kill()
    for process in processes:
        process.wait(timeout=30)


def wait_for(
    what: str,
    happened: Callable[[], bool],
    seconds: float,
    *,
    needs: Mapping[str, subprocess.Popen[bytes]] | None = None,
    logs: Sequence[Path] = (),
) -> None:
    """Returns as soon as ``happened()``, which is asked 20 times a second.

    Args:
        needs: processes without which it cannot happen: the wait ends as soon as one of them does.
        logs: whose last lines the error shows.

    Raises:
        ClusterError: not within ``seconds``, or a needed process exited.
    """
    end = time.monotonic() + seconds
    while not happened():
        for name, process in (needs or {}).items():
            if process.poll() is not None:
                raise ClusterError(f"{name} exited with {process.returncode} (waited for {what}){tails(logs)}")
        if time.monotonic() > end:
            raise ClusterError(f"waited {seconds:.0f} s for {what}, in vain{tails(logs)}")
        time.sleep(POLL_SECONDS)


@contextmanager
def file_lock(path: Path, what: str, seconds: float) -> Iterator[int]:
    """Holds the exclusive lock on ``path`` and gives its file descriptor, which a child may inherit to hold on to it.

    Raises:
        ClusterError: another process has held it for longer than ``seconds``.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        if not try_lock(descriptor):
            say(f"waiting for another process that holds {path} ({what})")
            wait_for(f"the lock {path} ({what})", lambda: try_lock(descriptor), seconds)
        yield descriptor
    finally:
        os.close(descriptor)


def try_lock(descriptor: int, operation: int = fcntl.LOCK_EX) -> bool:
    """Whether the lock could be had at once."""
    try:
        fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
