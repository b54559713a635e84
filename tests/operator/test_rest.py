"""An adapter about which nothing is to be done is not looked at in every plan, and nothing is missed by that."""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from claas_crds import names
from claas_operator import plan as planner
from claas_operator.snapshot import Snapshot, format_time
from operatorkit import MODEL, Raw, active, adapter, ended, kind_of, later, lease, pod, request, settings, snapshot

USING = settings(timings={"sweepSeconds": 1000, "collectDelaySeconds": 30})


def trained(versions: int, keep: int, **status: Any) -> Raw:
    """An adapter with so many versions."""
    uri = "s3://adapters/team/v{}/"
    history = [
        {"seq": i + 1, "version": f"v{i}", "uri": uri.format(i), "requestUid": "", "at": format_time(later(i))}
        for i in range(versions)
    ]
    head = {"uri": uri.format(versions - 1), "version": f"v{versions - 1}", "headSeq": versions, "history": history}
    root = {"storage": {"uri": uri.format(0)}, "retention": {"keepLast": keep}}
    return adapter(spec=root, status=head | {"sweepAt": format_time(later(1500))} | status)


READY = {"type": "Ready", "reason": "Ready", "message": "", "lastTransitionTime": format_time(later(0))}
SPECS: list[Raw] = [{}, {"rollbackTo": "v0"}, {"rollbackTo": "v9"}, {"deletionPolicy": "Delete"}, {"pool": "none"}]
STATUSES: list[Raw] = [
    {},
    {"sweepAt": ""},
    {"sweepAt": format_time(later(50))},
    {"collecting": ["v0"]},
    {"active": active("held")},
    {"active": active("over")},
    {"active": active("gone")},
    {"rollbackAnswered": "v0"},
    {"observedGeneration": 1},
    {"conditions": [READY | {"status": "False"}]},
    {"conditions": [READY | {"status": "True"}], "observedGeneration": 2},
]
METAS: list[Raw] = [{}, {"finalizers": [names.FINALIZER]}, {"deletionTimestamp": format_time(later(1))}]
OTHERS = [
    request("held", "coder"),
    request("over", "other", status=ended("Complete", "Succeeded")),
    pod("claas-l40s-1-w"),
    lease("claas-l40s-1-w"),
]


def decided(seen: Snapshot, at: float) -> tuple[list[str], Any]:
    made = planner.plan(seen, USING, later(at))
    return sorted(map(repr, made.actions)), made.wake_at


@pytest.mark.parametrize("versions", [0, 1, 3, 8, 80])
def test_plans_are_the_same_as_when_every_adapter_is_looked_at(versions: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rested = 0
    for spec, status, meta in itertools.product(SPECS, STATUSES, METAS):
        raw = trained(versions, 5, **status) if versions else adapter(head=0)
        raw["spec"] |= {"baseModel": MODEL} | spec
        raw["metadata"] |= {"generation": 2} | meta
        lazy, thorough = snapshot(raw, *OTHERS), snapshot(raw, *OTHERS)
        for at in (0, 20, 40, 60, 200, 1100, 1600):
            found = [decided(lazy, at) for _ in range(2)]
            with monkeypatch.context() as patched:
                patched.setattr(planner, "rests_until", lambda *_: None)
                assert found == [decided(thorough, at)] * 2, (spec, status, meta, at)
            rested += any(until is not None and until > later(at) for _, _, until in lazy.rests.values())
    assert rested > 20 or versions in (0, 80)


def test_what_has_changed_is_looked_at_again() -> None:
    seen = snapshot(trained(4, 5), now=later(0))
    assert decided(seen, 60) == ([], later(1500))
    changed = trained(4, 2)
    changed["metadata"]["resourceVersion"] = "2"
    seen.put(kind_of(changed), changed, later(60))
    (collect,), _ = decided(seen, 60)
    assert collect.startswith("Collect")
