"""`python -m claas_store`: the operations that need no GPU, as Jobs and init containers run them.

The last act of every command is its answer, one JSON object of at most 4 KiB, on stdout and, where there is one, in the
container's termination log, from which the operator reads it. Exit code 0 says that it is ok, 1 that it is not.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NoReturn

from pydantic import ValidationError

from claas_crds.adapter import Lora
from claas_crds.reasons import Reason
from claas_store import collect, models, uris
from claas_store.create import create_adapter, init_adapter
from claas_store.errors import ArgumentInvalid, StoreError
from claas_store.fsck import BAD, fsck
from claas_store.stores import open_store
from claas_store.version import Version, read_version

TERMINATION_LOG: Final = "/dev/termination-log"
ANSWER_BYTES: Final = 4096  # what Kubernetes keeps
MESSAGE_CHARACTERS: Final = 1024  # what a condition takes

# Options whose values are names of versions, or lists of such.
_NAME_OPTIONS: Final = frozenset({"--versions", "--version", "--keep", "--keep-version", "--known", "--known-version"})

log = logging.getLogger("claas_store")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and answers; the exit code."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    try:
        answer = {"ok": True, **_run(_parsed(sys.argv[1:] if arguments is None else arguments))}
    except StoreError as error:
        answer = failure(error.reason, str(error), error.retryable)
    except Exception as error:
        # Nobody foresaw it, so the log gets all of it, and the operator the fact.
        _answer(failure(Reason.INTERNAL_ERROR, f"{type(error).__name__}; the log of the Job says more", True))
        raise
    _answer(answer)
    return 0 if answer["ok"] else 1


def failure(reason: Reason, message: str, retryable: bool) -> dict[str, Any]:
    """The answer of a command that failed."""
    return {"ok": False, "reason": reason.value, "message": message[:MESSAGE_CHARACTERS], "retryable": retryable}


def _run(options: argparse.Namespace) -> dict[str, Any]:
    match options.command:
        case "create":
            return _outcome(_create(options))
        case "show":
            version = read_version(options.uri)
            print(version.manifest.model_dump_json(by_alias=True, exclude_none=True, indent=2))
            return _outcome(version)
        case "list":
            uri = uris.parse(options.uri).folder_uri
            for found, size in open_store(uri).list(uri):
                print(f"{size:>14} {found}")
            return {"uri": uri}
        case "tombstone":
            return _collected(
                collect.tombstone(options.root, options.versions, options.why, options.collection), options
            )
        case "restore":
            return _collected(collect.restore(options.root, options.versions, options.collection), options)
        case "delete":
            return _collected(collect.delete(options.root, options.versions, options.collection), options)
        case "destroy":
            destroyed = collect.destroy(
                options.root, options.keep, adapter_uid=options.adapter_uid, grace_seconds=options.grace_seconds
            )
            return {"deleted": len(destroyed.deleted), "kept": destroyed.kept}
        case "sweep":
            swept = collect.sweep(
                options.root,
                options.known,
                options.grace_seconds,
                adapter_uid=options.adapter_uid,
                unended=options.unended,
            )
            return swept._asdict()
        case "fsck":
            return _fsck(options)
        case "fetch-model":
            models.fetch_model(options.source, options.target)
            return {"target": str(options.target)}
        case "wait-model":
            models.wait_model(options.target, options.timeout)
            return {"target": str(options.target)}
    raise AssertionError(options.command)


def _collected(answer: collect.Collected | collect.Restored, options: argparse.Namespace) -> dict[str, Any]:
    return answer._asdict() | {"collection": options.collection}


def _create(options: argparse.Namespace) -> Version:
    try:
        lora = Lora(r=options.r, alpha=options.alpha, target_modules=options.target_modules.split(","))
    except ValidationError as error:
        fields = ", ".join(str(problem["loc"][0]) for problem in error.errors())
        raise ArgumentInvalid(f"spec.lora is out of bounds: {fields}") from None
    if options.init_from:
        return init_adapter(
            options.uri, options.base_model, options.model_dir, options.init_from, lora, options.adapter_uid
        )
    return create_adapter(options.uri, options.base_model, options.model_dir, lora, options.adapter_uid)


def _fsck(options: argparse.Namespace) -> dict[str, Any]:
    report = fsck(options.uri, everything=options.all or None, known=options.known)
    if options.json:
        print(report.model_dump_json(by_alias=True, indent=2))
    else:
        print("\n".join(report.lines()))
    counts = Counter(finding.kind.value for finding in report.findings)
    answer = {"uri": report.uri, "versions": report.versions, "sizeBytes": report.size_bytes, "findings": counts}
    if report.ok:
        return answer
    worst = next(finding for finding in report.findings if finding.kind in BAD)
    return answer | failure(Reason.ADAPTER_INVALID, str(worst), False)


def _outcome(version: Version) -> dict[str, Any]:
    return {"uri": version.uri, "version": uris.version_name(version.uri), "sha256": version.manifest_sha256}


def _answer(answer: dict[str, Any]) -> None:
    """At most ANSWER_BYTES of UTF-8: the message or the longest list is cut until it fits, since half a JSON object
    would be none. Everything else is whole or not there: a uri that was cut would be another's.

    A list of names that was cut says only what is certain: the operator asks again for what is not in it.
    """
    data = _encoded(answer)
    while len(data) > ANSWER_BYTES:
        long = [key for key, value in answer.items() if value and (key == "message" or isinstance(value, list))]
        if not long:  # a path of a folder, perhaps; uris have their bound
            answer = {key: value for key, value in answer.items() if not isinstance(value, str)}
            answer["message"] = f"the answer has more than {ANSWER_BYTES} bytes; the log of the Job has it"
            log.warning("the whole answer: %s", data.decode())
        else:
            name = max(long, key=lambda key: len(_encoded(answer[key])))
            answer = {**answer, name: answer[name][: len(answer[name]) // 2]}
        data = _encoded(answer)
    print(data.decode(), flush=True)
    path = os.environ.get("CLAAS_TERMINATION_LOG") or TERMINATION_LOG
    if os.environ.get("CLAAS_TERMINATION_LOG") or os.path.exists(path):
        Path(path).write_bytes(data)


def _encoded(value: Any) -> bytes:
    """JSON as UTF-8. Half a surrogate pair, which no file and no argument may smuggle in, becomes a question mark."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def _names(text: str) -> list[str]:
    """Names of versions: comma-separated, none of them twice."""
    return list(dict.fromkeys(name for name in text.split(",") if name))


def _name(text: str) -> list[str]:
    return [text] if text else []


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value < float("inf"):
        raise ValueError(text)
    return value


def _parsed(arguments: Sequence[str]) -> argparse.Namespace:
    """The options; a name may begin with a dash, and by `--version NAME` hold a comma."""
    words: list[str] = []
    rest = iter(arguments)
    for word in rest:
        follows = next(rest, None) if word in _NAME_OPTIONS else None
        words.append(word if follows is None else f"{word}={follows}")  # apart, argparse takes -coder for an option
    options = _parser().parse_args(words)
    if (needed := getattr(options, "needed", None)) and getattr(options, needed) is None:
        raise ArgumentInvalid(f"claas_store {options.command}: --{needed} is required")
    return options


class _Parser(argparse.ArgumentParser):
    """Bad arguments are an answer too: whoever made the Job must learn of them."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        raise ArgumentInvalid(f"{self.prog}: {message}")


class _Extend(argparse.Action):
    """Names add up, however often and in whichever form they are given; none of them twice."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option: str | None = None
    ) -> None:
        setattr(namespace, self.dest, list(dict.fromkeys([*(getattr(namespace, self.dest) or ()), *values])))


def _add_names(
    command: argparse.ArgumentParser, many: str, one: str, what: str, *, required: bool = False, default: Any = None
) -> None:
    """`--versions A,B` and `--version A --version B`, which also takes names with a comma, for the same list."""
    dest = many.removeprefix("--")
    command.add_argument(
        many, type=_names, action=_Extend, dest=dest, default=default, help=f"names {what}, comma-separated"
    )
    command.add_argument(
        one, type=_name, action=_Extend, dest=dest, default=default, metavar="NAME", help="one of these; again for each"
    )
    if required:
        command.set_defaults(needed=dest)  # in one of its forms


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="claas_store", description="Adapter versions in an object store or a folder, and model folders."
    )
    commands = parser.add_subparsers(dest="command", required=True)

    create = commands.add_parser("create", help="write an adapter's first version")
    create.add_argument("--uri", required=True, help="spec.storage.uri")
    create.add_argument("--base-model", required=True, help="hub id of the base model")
    create.add_argument("--model-dir", type=Path, required=True, help="folder of the base model")
    create.add_argument("--r", type=int, required=True, help="rank")
    create.add_argument("--alpha", type=float, required=True, help="scaling numerator")
    create.add_argument("--target-modules", required=True, help="comma-separated")
    create.add_argument("--adapter-uid", required=True, help="uid of the LoraAdapter; seeds the weights")
    create.add_argument("--init-from", default="", help="spec.initFrom.uri: adopt or fork instead")

    show = commands.add_parser("show", help="verify a version and print its manifest")
    show.add_argument("uri")
    listing = commands.add_parser("list", help="objects below a folder, with their sizes")
    listing.add_argument("uri")

    dead = commands.add_parser("tombstone", help="declare versions dead: readers refuse them from then on")
    dead.add_argument("--why", default="retention", help="for people who read the tombstone")
    back = commands.add_parser("restore", help="take tombstones back of versions that are still there")
    delete = commands.add_parser("delete", help="delete versions that bear a tombstone, which stays")
    destroy = commands.add_parser("destroy", help="delete every version of an adapter")
    sweep = commands.add_parser("sweep", help="remove what killed processes left beside an adapter")
    for one in (dead, back, delete, destroy, sweep):
        one.add_argument("--root", required=True, help="the adapter's own uri")
    for one in (dead, back, delete):
        _add_names(one, "--versions", "--version", "beside it", required=True)
        one.add_argument(
            "--collection",
            type=int,
            default=0,
            help="number of the collection: once a version is restored in it, nothing of it comes into effect any more",
        )
    _add_names(destroy, "--keep", "--keep-version", "of versions that stay", default=[])
    destroy.add_argument("--adapter-uid", default="", help="the LoraAdapter's: what was not made for it stays")
    destroy.add_argument(
        "--grace-seconds",
        type=_seconds,
        default=collect.GRACE_SECONDS,
        help="what has no manifest and is younger stays",
    )
    _add_names(sweep, "--known", "--known-version", "of the versions that the adapter names", required=True)
    sweep.add_argument("--grace-seconds", type=_seconds, required=True, help="what is younger stays")
    sweep.add_argument("--adapter-uid", default="", help="whose orphans; by default as the known versions say")
    sweep.add_argument(
        "--unended", type=_names, default=[], help="uids of requests that have not ended, comma-separated: theirs stays"
    )

    check = commands.add_parser("fsck", help="check every digest of a version and its parents; exit code 1 if broken")
    check.add_argument("uri", help="a version, or an adapter's own uri: then all versions beside it")
    check.add_argument("--all", action="store_true", help="all versions beside it, whatever its name")
    _add_names(
        check, "--known", "--known-version", "of the versions that the adapter names; others are reported as orphaned"
    )
    check.add_argument("--json", action="store_true", help="the whole report as JSON, in place of the lines")

    fetch = commands.add_parser("fetch-model", help="fill a model folder, once")
    fetch.add_argument("--source", required=True, help="hub:ID[@REVISION], s3://BUCKET/PATH/ or file:///PATH/")
    fetch.add_argument("--target", type=Path, required=True)
    wait = commands.add_parser("wait-model", help="wait until a model folder is complete")
    wait.add_argument("--target", type=Path, required=True)
    wait.add_argument("--timeout", type=float, default=3600, help="seconds")
    return parser


if __name__ == "__main__":
    sys.exit(main())
