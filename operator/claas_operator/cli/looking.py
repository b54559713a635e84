"""Commands that change nothing: lists, one object, a worker's log, health, the store's contents."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import click

from claas_operator.cli.command import Command, Entry, Group
from claas_operator.cli.exits import Exit
from claas_operator.cli.options import Target, cluster_in_namespace, connection, output
from claas_operator.cli.output import Format, harmless, say, to_terminal, write_fields, write_json, write_table
from claas_operator.cli.problem import Problem, missing
from claas_operator.cli.teaching import opened

if TYPE_CHECKING:
    from pydantic import BaseModel

    from claas_operator.cli.kube import Kube, Object

_KINDS = {
    "requests": Entry("claas_operator.cli.looking:requests", "the requests, or one (also: request)", "What"),
    "adapters": Entry("claas_operator.cli.looking:adapters", "the adapters, or one (also: adapter)", "What"),
    "versions": Entry("claas_operator.cli.looking:versions", "how an adapter's head moved", "What"),
    "lineage": Entry("claas_operator.cli.looking:lineage", "a version and what it was trained on", "What"),
}
get = Group(
    "get",
    help="Show requests, adapters, an adapter's versions, or where a version comes from.",
    entries=_KINDS,
    aliases={"request": "requests", "adapter": "adapters", "dr": "requests", "la": "adapters"},
    examples=[
        "claas get requests",
        "claas get request coder-1a2b3c4d -o json",
        "claas get requests --adapter coder --limit 20",
        "claas get adapters -n user123",
        "claas get versions coder",
    ],
)
_limit = click.option("--limit", type=click.IntRange(1), metavar="N", help="Show so many at most.")


def _dump(items: Iterable[BaseModel]) -> list[Any]:
    return [item.model_dump(mode="json") for item in items]


@click.command(
    cls=Command, examples=["claas get requests", "claas get request coder-1a2b3c4d", "claas get requests -o json"]
)
@click.argument("id", required=False)
@click.option("--adapter", metavar="NAME", help="Those of one adapter.")
@_limit
@output
@connection
def requests(target: Target, id: str | None, adapter: str | None, limit: int | None, form: Format) -> Exit:
    """The namespace's requests, or the one that is named: its state, why it waits, what its step did."""
    from claas_operator.cli import tables

    with opened(target, "claas get") as door:
        if id is not None:
            request = door.request(id)
            if not request.ended and request.place is None:
                request = request.model_copy(update={"place": door.place(id)})
            if form is Format.JSON:
                write_json(request.model_dump(mode="json"))
            else:
                write_fields(tables.request_fields(request))
            return Exit.OK
        newest_first = sorted(door.requests(adapter), key=lambda each: (each.created_at, each.id), reverse=True)
        found = newest_first[:limit]
    if form is Format.JSON:
        write_json(_dump(found))
    else:
        write_table(tables.REQUEST_COLUMNS, map(tables.request_row, found), empty="no requests here")
    return Exit.OK


@click.command(
    cls=Command, examples=["claas get adapters", "claas get adapter coder", "claas get adapter coder -o json"]
)
@click.argument("name", required=False)
@_limit
@output
@connection
def adapters(target: Target, name: str | None, limit: int | None, form: Format) -> Exit:
    """The namespace's adapters, or the one that is named: its head, and whether it is ready."""
    from claas_operator.cli import tables

    with opened(target, "claas get") as door:
        if name is not None:
            adapter = door.adapter(name)
            if form is Format.JSON:
                write_json(adapter.model_dump(mode="json"))
            else:
                write_fields(tables.adapter_fields(adapter))
            return Exit.OK
        found = list(islice(door.adapters(), limit))
    if form is Format.JSON:
        write_json(_dump(found))
    else:
        write_table(tables.ADAPTER_COLUMNS, map(tables.adapter_row, found), empty="no adapters here: claas init-lora")
    return Exit.OK


@click.command(
    cls=Command, examples=["claas get versions coder", "claas get versions coder -o json | jq -r .[].version"]
)
@click.argument("adapter")
@_limit
@output
@connection
def versions(target: Target, adapter: str, limit: int | None, form: Format) -> Exit:
    """How the head of ADAPTER moved, newest first: what `claas rollback` can go back to."""
    from claas_operator.cli import tables

    with opened(target, "claas get") as door:
        found = list(islice(door.versions(adapter), limit))
    if form is Format.JSON:
        write_json(_dump(found))
    else:
        write_table(tables.VERSION_COLUMNS, map(tables.version_row, found), empty="no version yet")
    return Exit.OK


@click.command(cls=Command, examples=["claas get lineage coder", "claas get lineage coder coder-v1"])
@click.argument("adapter")
@click.argument("version", required=False)
@output
@connection
def lineage(target: Target, adapter: str, version: str | None, form: Format) -> Exit:
    """A version of ADAPTER (its head, unless one is named), what it was trained on, and so on, back to the first."""
    from claas_operator.cli import tables

    with opened(target, "claas get") as door:
        found = door.lineage(adapter, version)
    if form is Format.JSON:
        write_json(found.model_dump(mode="json"))
        return Exit.OK
    write_table(tables.VERSION_COLUMNS, map(tables.version_row, found.items), empty="no version yet")
    if found.init_from:
        say(f"the first was made from {found.init_from}")
    if not found.complete:
        say("older history is no longer listed")
    return Exit.OK


@click.command(
    cls=Command,
    examples=[
        "claas health",
        "claas health --url https://claas.example.com --key $KEY -o json | jq .teacher.status",
        "claas health >/dev/null && echo fit",
    ],
)
@output
@connection
def health(target: Target, form: Format) -> Exit:
    """Would a request be served now? Each part's state; exit code 1 when one would have to wait."""
    from claas_operator.cli import tables

    with opened(target, "claas health") as door:
        found = door.health()
    if form is Format.JSON:
        write_json(found.model_dump(mode="json"))
    else:
        parts = [
            (name, getattr(found, name)) for name in ("operator", "workers", "teacher", "object_store", "api_server")
        ]
        write_table(tables.PART_COLUMNS, tables.part_rows(parts))
    if found.status == "unknown":
        fix = "ask the REST API (--url), or whoever runs the cluster"
        raise Problem("this kubeconfig may not see how the installation is", fix)
    if not found.healthy:
        bad = [name for name, part in found if getattr(part, "status", "") == "unhealthy"]
        raise Problem(f"unhealthy: {', '.join(bad) or 'see above'}", "`claas doctor` says how to mend it")
    return Exit.OK


@click.command(
    cls=Command,
    examples=[
        "claas logs coder-1a2b3c4d",
        "claas logs coder-1a2b3c4d --follow",
        "claas logs coder-1a2b3c4d --all | jq .message     # everything that its worker says",
    ],
)
@click.argument("id", metavar="REQUEST")
@click.option("--follow", is_flag=True, help="Go on as the log grows, until the worker ends.")
@click.option("--all", "everything", is_flag=True, help="Lines about other requests of the same worker too.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="The worker's last N lines only.")
@cluster_in_namespace
def logs(target: Target, id: str, follow: bool, everything: bool, tail: int | None) -> Exit:
    """What the worker that runs (or ran) a request says about it: JSON, a line each. Never a sample's text.

    By kubeconfig only. A worker's Pod, and with it its log, is kept for some minutes after it has ended.
    """
    from claas_operator.cli.bycluster import ClusterDoor

    kube = target.kube("claas logs")
    try:
        request = ClusterDoor(kube).request(id)
        if not request.worker:
            fix = f"it waits: claas get request {id}" if not request.ended else "no worker ever had it"
            raise Problem(f"request {id} has no worker", fix, Exit.NOT_FOUND)
        uid = ClusterDoor(kube).uid_of(id)
        path, pod = _pod(kube, request.worker)
        query = {"container": _container(pod), **({"tailLines": str(tail)} if tail is not None else {})}
        query |= {"follow": "true"} if follow else {}
        said = 0
        for line in kube.lines(f"{path}/log", query, 3600.0 if follow else 30.0):
            if everything or _about(line, id, uid):
                click.echo(harmless(line) if to_terminal() else line)
                said += 1
    finally:
        kube.close()
    if not said and not everything:
        say(f"worker {request.worker} has said nothing about it; --all shows all of its log")
    return Exit.OK


def _pod(kube: Kube, name: str) -> tuple[str, Object]:
    """Path and object of a worker's Pod: in the release's namespace, or (isolation Namespace) in the tenant's."""
    from claas_operator.cli import installation

    release = installation.the_release(kube)
    for namespace in dict.fromkeys((release.namespace, kube.namespace)):
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        try:
            found = kube.find(path)
        except Problem as problem:
            if problem.code is not Exit.DENIED or namespace == kube.namespace:
                raise
            continue
        if found is not None:
            return path, found
    fix = "its Job is deleted some minutes after it ends; a log collector of yours may have it"
    raise Problem(f"the worker's Pod {name} is gone, or may not be seen", fix, Exit.NOT_FOUND)


def _container(pod: Object) -> str:
    containers = [container["name"] for container in (pod.get("spec") or {}).get("containers") or []]
    return "worker" if "worker" in containers else containers[0]


def _about(line: str, id: str, uid: str) -> bool:
    """Whether a line of the worker's log names the request."""
    try:
        fields = json.loads(line)
    except ValueError:
        return True  # no line of ours: something went wrong before the log was set up
    return isinstance(fields, dict) and any(value in (id, uid) for value in _flat(fields))


def _flat(fields: dict[str, Any]) -> Iterator[str]:
    for value in fields.values():
        if isinstance(value, str):
            yield value
            yield value.rpartition("/")[2]  # namespace/name
        elif isinstance(value, list):
            yield from (item for item in value if isinstance(item, str))


@click.command(
    cls=Command,
    examples=[
        "claas fsck s3://my-bucket/loras/user123/coder-v1/",
        "# an adapter by its name: also what its status does not name",
        "claas fsck coder -n user123",
        "AWS_ENDPOINT_URL_S3=https://minio.example.com claas fsck s3://adapters/user123/coder/ -o json",
    ],
)
@click.argument("what", metavar="ADAPTER|URI")
@click.option("--all", "everything", is_flag=True, help="All versions beside the URI, whatever its name.")
@output
@connection
def fsck(target: Target, what: str, everything: bool, form: Format) -> Exit:
    """Check what lies in the store: every file's digest, of a version and of its parents, back to the first.

    URI is a version, or an adapter's own uri: then all versions beside it. Reads the store itself, with
    AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_REGION and AWS_ENDPOINT_URL_S3 as boto3 knows them. Exit code 1 when
    something is broken or missing.
    """
    try:
        from claas_store.errors import StorageDenied, StorageUnavailable, StoreError
        from claas_store.fsck import fsck as check
    except ModuleNotFoundError as error:
        raise missing(error.name, "store", "claas fsck") from None
    known: list[str] | None = None
    uri = what
    if "://" not in what:
        with opened(target, "claas fsck ADAPTER") as door:
            uri, known = door.adapter(what).storage_uri, [version.version for version in door.versions(what)]
    try:
        report = check(uri, everything=everything or None, known=known)
    except StorageUnavailable as error:
        raise Problem(str(error), "is AWS_ENDPOINT_URL_S3 right, and reachable from here?", Exit.UNREACHABLE) from None
    except StorageDenied as error:
        local = uri.startswith("file://")
        fix = "name its root in CLAAS_FILE_ROOTS" if local else "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY"
        raise Problem(str(error), fix, Exit.DENIED) from None
    except StoreError as error:
        raise Problem(str(error), "", Exit.USAGE) from None
    if form is Format.JSON:
        write_json(report.model_dump(mode="json") | {"ok": report.ok})
    else:
        rows = [(finding.kind.value, finding.uri, finding.message) for finding in report.findings]
        write_table(("FOUND", "WHERE", "WHAT"), rows, empty="nothing to tell")
        say(f"{report.versions} version(s), {report.size_bytes} bytes read")
    if not report.ok:
        fix = "restore what is broken or missing from a copy; go back with `claas rollback` where the head is at fault"
        raise Problem(f"{report.uri} is broken", fix)
    return Exit.OK
