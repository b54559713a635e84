"""The invariants of the control plane, checked from the object store and the API server alone.

`Evidence` is what these two showed: every version of every object, in the API server's order, and every object of the
store at the end; besides, all text that anybody wrote. Nothing here knows what was killed when.

Invariant 4 (the base model, and one adapter's tensors against another's) is the step's, and its tests'; here the
weights show that a version was made of its parent and of nothing else: each is its parent plus one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import safetensors.numpy

from chaos.witness import Seen, ended, lives, terminal

Raw = dict[str, Any]
MANIFEST, ADAPTER, TOMBSTONE = "claas.json", "adapter_model.safetensors", "claas.tombstone.json"


@dataclass(frozen=True)
class Stored:
    """A version in the store."""

    manifest: Raw
    sha256: str  # of the manifest
    weights: Mapping[str, np.ndarray[Any, Any]]


@dataclass(frozen=True)
class Evidence:
    """What is judged.

    Attributes:
        keys: of every object in the bucket below `home`, which holds one folder a namespace.
        versions: by uri, those with a manifest.
        texts: (where, text) of logs, Events and whatever else people may read.
        marker: is in every prompt, response and feedback, and may be nowhere else.
    """

    history: Sequence[Seen]
    keys: Sequence[str]
    versions: Mapping[str, Stored]
    namespaces: Sequence[str]
    texts: Sequence[tuple[str, str]] = ()
    marker: str = "SECRET"
    broken: Sequence[str] = field(default_factory=list)


def _gather(
    history: Sequence[Seen], s3: Any, bucket: str, namespaces: Sequence[str], texts: Sequence[tuple[str, str]]
) -> Evidence:
    keys, versions, broken = list[str](), dict[str, Stored](), list[str]()
    for namespace in namespaces:
        pages = s3.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=f"{namespace}/")
        keys += [item["Key"] for page in pages for item in page.get("Contents", [])]
    here = set(keys)
    for key in keys:
        folder, _, name = key.rpartition("/")
        if name != MANIFEST or f"{folder}/{TOMBSTONE}" in here:
            continue  # what is being collected is no version any more
        data = s3.get_object(Bucket=bucket, Key=key)["Body"].read()
        manifest = json.loads(data)
        for file, known in manifest["files"].items():
            if f"{folder}/{file}" not in here:
                broken.append(f"{folder}: {file} is missing beside its manifest")
                continue
            content = s3.get_object(Bucket=bucket, Key=f"{folder}/{file}")["Body"].read()
            if hashlib.sha256(content).hexdigest() != known["sha256"]:
                broken.append(f"{folder}: {file} is not what its manifest says")
            if file == ADAPTER:
                weights = safetensors.numpy.load(content)
                versions[f"s3://{bucket}/{folder}/"] = Stored(manifest, hashlib.sha256(data).hexdigest(), weights)
    return Evidence(history, keys, versions, namespaces, texts, broken=broken)


def gather(
    history: Callable[[], Sequence[Seen]],
    s3: Any,
    bucket: str,
    namespaces: Sequence[str],
    texts: Sequence[tuple[str, str]],
) -> Evidence:
    """Reads the store; again, where a version was collected while it was read."""
    for _ in range(5):
        with suppress(s3.exceptions.NoSuchKey):
            return _gather(history(), s3, bucket, namespaces, texts)
    raise AssertionError("versions go faster than they are read")


def violations(evidence: Evidence, *, at_rest: bool = True) -> list[str]:
    """What is wrong, in words; empty when all invariants hold.

    Args:
        at_rest: nothing is killed any more and everything had time to end.
    """
    found = [f"store: {what}" for what in evidence.broken]
    for check in CHECKS:
        found += [f"{check.__name__}: {what}" for what in check(evidence)]
    if at_rest:
        found += [f"every_request_ends: {what}" for what in every_request_ends(evidence)]
        found += [f"what_was_committed_is_there: {what}" for what in what_was_committed_is_there(evidence)]
    return found


def entries(seen: Seen) -> dict[int, Raw]:
    """An adapter's history by seq."""
    return {entry["seq"]: entry for entry in seen.status.get("history") or []}


def a_request_moves_its_head_once(evidence: Evidence) -> Iterator[str]:
    """Invariant 1."""
    moved: dict[str, set[tuple[str, int, str]]] = {}
    for uid, life in lives(evidence.history, "LoraAdapter").items():
        for seen in life:
            for entry in entries(seen).values():
                if entry.get("requestUid"):
                    moved.setdefault(entry["requestUid"], set()).add((uid, entry["seq"], entry["uri"]))
    for request, moves in moved.items():
        if len(moves) > 1:
            yield f"request {request} moved {sorted(moves)}"


def heads_follow_one_another(evidence: Evidence) -> Iterator[str]:
    """Invariant 2, of the adapters: one step at a time, each from the head before."""
    for life in lives(evidence.history, "LoraAdapter").values():
        for before, after in pairwise(life):
            old, new = before.status, after.status
            if after.type == "DELETED" and not new:
                continue
            was, now = old.get("headSeq") or 0, new.get("headSeq") or 0
            if now not in (was, was + 1):
                yield f"{after.name}: headSeq went from {was} to {now}"
            if now == was and new.get("uri") != old.get("uri"):
                yield f"{after.name}: the head changed at headSeq {now}"
            if now == was + 1:
                yield from _move(evidence, before, after)
            for seq, entry in entries(after).items():
                known = entries(before).get(seq)
                if known and (known["uri"], known.get("requestUid")) != (entry["uri"], entry.get("requestUid")):
                    yield f"{after.name}: entry {seq} of the history was rewritten"


def _move(evidence: Evidence, before: Seen, after: Seen) -> Iterator[str]:
    """One move of a head."""
    seq, uri = after.status["headSeq"], after.status["uri"]
    entry = entries(after).get(seq)
    if entry is None or entry["uri"] != uri:
        yield f"{after.name}: no entry {seq} of the history for the head {uri}"
        return
    if not entry.get("requestUid"):
        known = {old["uri"] for old in entries(before).values()}
        if seq > 1 and uri not in known:
            yield f"{after.name}: rolled back to {uri}, which was never its head"
        return
    bound = next(
        (s for s in reversed(evidence.history) if s.uid == entry["requestUid"] and s.version < after.version), None
    )
    parent = (bound.status.get("parent") or {}) if bound else {}
    if parent.get("adapterUid") != after.uid or parent.get("headSeq") != seq - 1:
        yield f"{after.name}: head {seq} is by request {entry['requestUid']}, which was bound to {parent}"
    if parent.get("uri") != before.status.get("uri"):
        yield f"{after.name}: head {seq} was made of {parent.get('uri')}, not of {before.status.get('uri')}"


def versions_name_their_parents(evidence: Evidence) -> Iterator[str]:
    """Invariant 2, of the store: the manifest of a head names the head before it, byte for byte, and is made of it."""
    for life in lives(evidence.history, "LoraAdapter").values():
        known = {seq: entry for seen in life for seq, entry in entries(seen).items()}
        for seq, entry in known.items():
            stored = evidence.versions.get(entry["uri"])
            if stored is None or not entry.get("requestUid"):
                continue  # collected: `what_was_committed_is_there` looks
            manifest, before = stored.manifest, known.get(seq - 1)
            if manifest.get("requestUid") != entry["requestUid"]:
                yield f"{entry['uri']} is of request {manifest.get('requestUid')}, not {entry['requestUid']}"
            named = manifest.get("parent") or {}
            if before and named.get("uri") != before["uri"]:
                yield f"{entry['uri']} names {named.get('uri')} as its parent, the head before was {before['uri']}"
            parent = evidence.versions.get(named.get("uri", ""))
            if parent is None:
                continue
            if named["sha256"] != parent.sha256:
                yield f"{entry['uri']} names another manifest of its parent"
            for name, value in parent.weights.items():
                if not np.array_equal(stored.weights.get(name, np.zeros(0)), value + 1):
                    yield f"{entry['uri']}: {name} is not its parent's plus one"
                    break


def one_at_a_time(evidence: Evidence) -> Iterator[str]:
    """Invariant 3: when a request is claimed, no other one of its adapter is run by a worker that could report it."""
    last: dict[str, Seen] = {}  # requests
    claims: dict[str, tuple[str, int, str]] = {}  # uid -> worker, attempt, adapter
    running: dict[str, set[str]] = {}  # by Pod name
    alive: set[str] = set()
    for seen in evidence.history:
        name = seen.name.partition("/")[2]
        if seen.kind == "Pod":
            over = seen.type == "DELETED" or seen.status.get("phase") in ("Succeeded", "Failed")
            (alive.discard if over else alive.add)(name)
        elif seen.kind == "Lease":
            annotation = (seen.raw["metadata"].get("annotations") or {}).get("claas.dev/running", "")
            running[name] = set() if seen.type == "DELETED" else set(filter(None, annotation.split(",")))
        elif seen.kind == "DistillRequest":
            yield from _claim(seen, last, claims, running, alive)
            last[seen.uid] = seen


def _claim(
    seen: Seen,
    last: dict[str, Seen],
    claims: dict[str, tuple[str, int, str]],
    running: Mapping[str, set[str]],
    alive: set[str],
) -> Iterator[str]:
    status, claim = seen.status, seen.status.get("claim") or {}
    adapter = (status.get("parent") or {}).get("adapterUid", "")
    before = claims.get(seen.uid)
    if not claim or not adapter or before == (claim["worker"], claim["attempt"], adapter):
        return
    claims[seen.uid] = (claim["worker"], claim["attempt"], adapter)
    for uid, (worker, attempt, on) in claims.items():
        if uid == seen.uid or on != adapter or worker not in alive or uid not in running.get(worker, set()):
            continue
        result = last[uid].status.get("result") or {}
        if result.get("attempt") != attempt:
            yield f"{seen.name} was claimed while {worker} ran {last[uid].name} on the same adapter"


def complete_comes_after_the_head(evidence: Evidence) -> Iterator[str]:
    """Nobody sees Complete before the head moved, an end never changes, an attempt never falls."""
    committed: set[str] = set()
    last: dict[str, Seen] = {}
    for seen in evidence.history:
        if seen.kind == "LoraAdapter":
            committed |= {entry.get("requestUid", "") for entry in entries(seen).values()}
        if seen.kind != "DistillRequest":
            continue
        end = terminal(seen.status)
        on_adapter = seen.raw["spec"].get("adapterRef")
        if end and end["type"] == "Complete" and end["reason"] != "NoSignal" and on_adapter:
            yield from [] if seen.uid in committed else [f"{seen.name} is Complete, and no head has its uid"]
        before = last.get(seen.uid)
        if before is not None:
            was = terminal(before.status)
            if was and (end is None or (was["type"], was["reason"]) != (end["type"], end["reason"])):
                yield f"{seen.name} had ended ({was['reason']}), and then {end['reason'] if end else 'had not'}"
            if (before.status.get("attempt") or 0) > (seen.status.get("attempt") or 0):
                yield f"{seen.name}: attempt fell"
        last[seen.uid] = seen


def no_text_is_told(evidence: Evidence) -> Iterator[str]:
    """Invariant 6. A spec may hold it, of course; nothing else of an object may."""
    for where, text in evidence.texts:
        if evidence.marker in text:
            yield f"text of a sample in {where}"
    for seen in evidence.history:
        rest = {"metadata": seen.raw["metadata"], "status": seen.status}
        if evidence.marker in json.dumps(rest):
            yield f"text of a sample in {seen.kind} {seen.name}"
            return


def namespaces_stay_apart(evidence: Evidence) -> Iterator[str]:
    """Invariant 7: what lies below a namespace's prefix was made for its objects, of its own versions."""
    where: dict[str, str] = {}
    for seen in evidence.history:
        where[seen.uid] = seen.raw["metadata"]["namespace"]
    for uri, stored in evidence.versions.items():
        namespace = uri.split("/")[3]
        for key in ("requestUid", "adapterUid"):
            uid = stored.manifest.get(key)
            if uid and where.get(uid, namespace) != namespace:
                yield f"{uri} was made for {key} {uid} of {where[uid]}"
        parent = (stored.manifest.get("parent") or {}).get("uri")
        if parent and parent.split("/")[3] != namespace:
            yield f"{uri} was made of {parent}"


def conditions_stay_whole(evidence: Evidence) -> Iterator[str]:
    """A merge patch replaces lists: no write loses a condition, says one twice, or dates one anew that holds on."""
    for kind in ("DistillRequest", "LoraAdapter"):
        for life in lives(evidence.history, kind).values():
            known: dict[str, Raw] = {}
            for seen in life:
                conditions = seen.status.get("conditions") or []
                now = {condition["type"]: condition for condition in conditions}
                if len(now) < len(conditions):
                    yield f"{seen.name}: a condition is there twice"
                for lost in sorted(known.keys() - now.keys()):
                    yield f"{seen.name}: condition {lost} was lost"
                for what in sorted(known.keys() & now.keys()):
                    old, new = known[what], now[what]
                    times = (old.get("lastTransitionTime"), new.get("lastTransitionTime"))
                    if old["status"] == new["status"] and times[0] != times[1]:
                        yield f"{seen.name}: condition {what} holds on, from {times[0]}, then from {times[1]}"
                known = now


CHECKS: Sequence[Callable[[Evidence], Iterator[str]]] = (
    a_request_moves_its_head_once,
    heads_follow_one_another,
    versions_name_their_parents,
    one_at_a_time,
    complete_comes_after_the_head,
    conditions_stay_whole,
    no_text_is_told,
    namespaces_stay_apart,
)


def every_request_ends(evidence: Evidence) -> Iterator[str]:
    """Invariant 5, and that no adapter is left locked."""
    for life in lives(evidence.history, "DistillRequest").values():
        if life[-1].type != "DELETED" and not ended(life[-1].status):
            yield f"{life[-1].name} has not ended: {life[-1].status.get('state')} {life[-1].status.get('reason')}"
    for life in lives(evidence.history, "LoraAdapter").values():
        if life[-1].type != "DELETED" and life[-1].status.get("active"):
            yield f"{life[-1].name} is still locked by {life[-1].status['active']['requestName']}"


def what_was_committed_is_there(evidence: Evidence) -> Iterator[str]:
    """Zero lost: a committed request is Complete, and its version can be read unless it was collected."""
    requests = {uid: life[-1] for uid, life in lives(evidence.history, "DistillRequest").items()}
    for life in lives(evidence.history, "LoraAdapter").values():
        final = life[-1]
        known = {entry["requestUid"] for seen in life for entry in entries(seen).values() if entry.get("requestUid")}
        for uid in known:
            request = requests.get(uid)
            end = terminal(request.status) if request else None
            if request and request.type != "DELETED" and (end is None or end["type"] != "Complete"):
                yield f"{request.name} was committed and is {end['reason'] if end else 'not ended'}"
        if final.type == "DELETED":
            continue
        gone = set(final.status.get("collecting") or [])
        for entry in entries(final).values():
            if entry["version"] not in gone and entry["uri"] not in evidence.versions:
                yield f"{final.name}: version {entry['version']} of its history is not in the store"
    for request in requests.values():
        end = terminal(request.status)
        done = end is not None and end["type"] == "Complete" and end["reason"] == "Succeeded"
        if done and not request.status.get("metadata"):
            yield f"{request.name} is Complete without its numbers"
