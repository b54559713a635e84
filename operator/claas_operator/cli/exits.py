"""The command's exit codes: one table, which `claas --help` and docs/cli.md show and scripts may rely on."""

from __future__ import annotations

from enum import IntEnum


class Exit(IntEnum):
    """How a command ended; `MEANINGS` has the sentences."""

    OK = 0
    FAILED = 1
    USAGE = 2
    REQUEST_FAILED = 3
    NOT_FOUND = 4
    DENIED = 5
    UNREACHABLE = 6
    WAIT_ENDED = 7
    CONFLICT = 8
    INTERRUPTED = 130


MEANINGS: dict[Exit, str] = {
    Exit.OK: "done; what was asked about is well",
    Exit.FAILED: "not done, or a check found something wrong; stderr says what and how to mend it",
    Exit.USAGE: "the command line, or a field of the request, is wrong; stderr names it",
    Exit.REQUEST_FAILED: "the request was accepted and ended without a step (its reason is on stderr)",
    Exit.NOT_FOUND: "there is no such request, adapter, version or namespace",
    Exit.DENIED: "the credentials are missing, not valid, or may not do this",
    Exit.UNREACHABLE: "no answer: the API server, the url or the store cannot be reached, or is too busy",
    Exit.WAIT_ENDED: "the wait ended (--timeout); the request goes on",
    Exit.CONFLICT: "it contradicts what is there: a name or a uri that is taken, a key used for another request",
    Exit.INTERRUPTED: "interrupted (Ctrl-C); a request that was sent goes on",
}


def rows() -> list[tuple[str, str]]:
    """(code, meaning) of each."""
    return [(str(code.value), meaning) for code, meaning in MEANINGS.items()]
