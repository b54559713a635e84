"""The judge is judged: a sound history passes, and each invariant that is broken is seen."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from chaos.invariants import Evidence, Stored, violations
from chaos.witness import Seen

Raw = dict[str, Any]
HOME, NEW = "s3://adapters/team/coder/", "s3://adapters/team/coder-2/"
OTHER = "s3://adapters/other/coder-2/"


def thing(kind: str, name: str, status: Raw, **more: Any) -> Raw:
    meta = {"uid": f"uid-{name}", "name": name, "namespace": "team", **more.pop("metadata", {})}
    return {"kind": kind, "metadata": meta, "status": status, "spec": {"adapterRef": {"name": "coder"}}, **more}


def head(*moves: tuple[str, str], **more: Any) -> Raw:
    """An adapter that moved to these (uri, request uid)."""
    history = [
        {"seq": i, "uri": uri, "version": uri.split("/")[-2], "requestUid": by} for i, (uri, by) in enumerate(moves, 1)
    ]
    return thing("LoraAdapter", "coder", {"headSeq": len(moves), "uri": moves[-1][0], "history": history} | more)


def request(name: str = "r", **status: Any) -> Raw:
    parent = {"adapterUid": "uid-coder", "headSeq": 1, "uri": HOME}
    claim = {"worker": "w", "attempt": 1}
    return thing("DistillRequest", name, {"worker": "w", "attempt": 1, "parent": parent, "claim": claim} | status)


def end(kind: str, reason: str) -> Raw:
    return {"conditions": [{"type": kind, "status": "True", "reason": reason}], "metadata": {"totalLoss": 1.0}}


def sound() -> list[Raw]:
    return [
        head((HOME, "")),
        thing("Pod", "w", {"phase": "Running"}),
        thing("Lease", "w", {}, metadata={"annotations": {"claas.dev/running": "uid-r"}}),
        request(),
        request(result={"attempt": 1, "outcome": "Succeeded"}),
        head((HOME, ""), (NEW, "uid-r")),
        request(result={"attempt": 1, "outcome": "Succeeded"}, **end("Complete", "Succeeded")),
    ]


def versions() -> dict[str, Stored]:
    manifest = {"requestUid": "uid-r", "adapterUid": "uid-coder", "parent": {"uri": HOME, "sha256": "one"}}
    return {
        HOME: Stored({}, "one", {"a": np.zeros(2)}),
        NEW: Stored(manifest, "two", {"a": np.ones(2)}),
    }


def judge(history: list[Raw], stored: dict[str, Stored], texts: list[tuple[str, str]] | None = None) -> list[str]:
    seen = [Seen(i, raw["kind"], raw.get("type", "MODIFIED"), raw) for i, raw in enumerate(history, 1)]
    return violations(Evidence(seen, [], stored, ["team"], texts or []))


def test_a_sound_history_passes() -> None:
    assert judge(sound(), versions()) == []


def twice(history: list[Raw], _: dict[str, Stored]) -> None:
    history.append(head((HOME, ""), (NEW, "uid-r"), (HOME, "uid-r")))


def gap(history: list[Raw], _: dict[str, Stored]) -> None:
    history[5]["status"]["headSeq"] = 3


def silent_move(history: list[Raw], _: dict[str, Stored]) -> None:
    history.append(head((HOME, ""), (HOME, "uid-r")))


def another_parent(history: list[Raw], _: dict[str, Stored]) -> None:
    history[4]["status"]["parent"] = {"adapterUid": "uid-coder", "headSeq": 0, "uri": OTHER}


def another_manifest(_: list[Raw], stored: dict[str, Stored]) -> None:
    stored[HOME] = Stored({}, "changed", stored[HOME].weights)


def others_weights(_: list[Raw], stored: dict[str, Stored]) -> None:
    stored[NEW] = Stored(stored[NEW].manifest, "two", {"a": np.full(2, 7.0)})


def both_at_once(history: list[Raw], _: dict[str, Stored]) -> None:
    history.insert(4, request("s", worker="v", claim={"worker": "v", "attempt": 1}, **end("Failed", "Cancelled")))


def complete_too_soon(history: list[Raw], _: dict[str, Stored]) -> None:
    history[5], history[6] = history[6], history[5]


def undone(history: list[Raw], _: dict[str, Stored]) -> None:
    history.append(request(result={"attempt": 1}))


def condition_lost(history: list[Raw], _: dict[str, Stored]) -> None:
    accepted = {"type": "Accepted", "status": "True", "reason": "Accepted"}
    history[4]["status"]["conditions"] = [accepted]


def condition_dated_anew(history: list[Raw], _: dict[str, Stored]) -> None:
    for raw, at in zip(history[3:5], ("2026-01-01T00:00:00Z", "2026-01-01T00:00:01Z"), strict=True):
        accepted = {"type": "Accepted", "status": "True", "reason": "Accepted", "lastTransitionTime": at}
        raw["status"]["conditions"] = [accepted]


def attempt_fell(history: list[Raw], _: dict[str, Stored]) -> None:
    history[3]["status"]["attempt"] = 2


def never_ends(history: list[Raw], _: dict[str, Stored]) -> None:
    history.append(thing("DistillRequest", "s", {"state": "Pending"}))


def stays_locked(history: list[Raw], _: dict[str, Stored]) -> None:
    history.append(head((HOME, ""), (NEW, "uid-r"), active={"requestName": "r"}))


def lost(_: list[Raw], stored: dict[str, Stored]) -> None:
    del stored[NEW]


def committed_and_failed(history: list[Raw], _: dict[str, Stored]) -> None:
    history[6] = request(**end("Failed", "WorkerLost"))


def abroad(_: list[Raw], stored: dict[str, Stored]) -> None:
    stored[OTHER] = stored[NEW]


def told(history: list[Raw], _: dict[str, Stored]) -> None:
    history[2]["metadata"]["annotations"]["why"] = "SECRET"


BREAKS: dict[Callable[[list[Raw], dict[str, Stored]], None], str] = {
    twice: "a_request_moves_its_head_once",
    gap: "heads_follow_one_another",
    silent_move: "heads_follow_one_another",
    another_parent: "heads_follow_one_another",
    another_manifest: "versions_name_their_parents",
    others_weights: "versions_name_their_parents",
    both_at_once: "one_at_a_time",
    complete_too_soon: "complete_comes_after_the_head",
    undone: "complete_comes_after_the_head",
    condition_lost: "conditions_stay_whole",
    condition_dated_anew: "conditions_stay_whole",
    attempt_fell: "complete_comes_after_the_head",
    never_ends: "every_request_ends",
    stays_locked: "every_request_ends",
    lost: "what_was_committed_is_there",
    committed_and_failed: "what_was_committed_is_there",
    abroad: "namespaces_stay_apart",
    told: "no_text_is_told",
}


@pytest.mark.parametrize("broken", BREAKS, ids=lambda broken: broken.__name__)
def test_what_is_broken_is_seen(broken: Callable[[list[Raw], dict[str, Stored]], None]) -> None:
    history, stored = copy.deepcopy(sound()), versions()
    broken(history, stored)
    assert BREAKS[broken] in [problem.partition(":")[0] for problem in judge(history, stored)]


def test_text_in_a_log_is_seen() -> None:
    assert judge(sound(), versions(), [("worker.log", "it says SECRET")]) == [
        "no_text_is_told: text of a sample in worker.log"
    ]
