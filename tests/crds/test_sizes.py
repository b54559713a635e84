"""The largest objects that the definitions allow, in a real API server: etcd takes 1.5 MiB."""

from __future__ import annotations

import json

import kubernetes

from claas_crds import names
from claas_crds.adapter import HistoryEntry, Retention
from claas_operator.snapshot import Adapter, Kind, Snapshot
from claas_operator.status import SURPLUS_VERSIONS, keep_last
from operatorkit import later

MOST_KEPT = 1000
LONGEST_NAME = 253


def test_the_longest_history_of_the_longest_uris(api: kubernetes.client.CustomObjectsApi, namespace: str) -> None:
    where = (names.GROUP, names.VERSION, namespace, names.ADAPTER_PLURAL)
    longest = "s3://bucket/" + "/".join("a" * 200 for _ in range(5)) + "/"
    spec = {
        "baseModel": "Qwen/Qwen2.5-Coder-3B-Instruct",
        "storage": {"uri": longest},
        "retention": Retention(keep_last=MOST_KEPT).model_dump(by_alias=True),
    }
    created = api.create_namespaced_custom_object(
        *where,
        {
            "apiVersion": f"{names.GROUP}/{names.VERSION}",
            "kind": names.ADAPTER_KIND,
            "metadata": {"name": "long"},
            "spec": spec,
        },
    )
    adapter = Snapshot().put(Kind.ADAPTER, created, later(0))
    assert isinstance(adapter, Adapter)
    kept = keep_last(adapter)
    assert 400 < kept < MOST_KEPT
    at = "2026-11-25T12:00:00.000000Z"
    entry = HistoryEntry(
        seq=10**6, version="v" * LONGEST_NAME, uri=longest, request_uid="u" * 36, at=at, cause="RolledBack"
    ).model_dump(by_alias=True, mode="json", exclude_none=True)
    collecting = [f"{number:04}{'v' * (LONGEST_NAME - 4)}" for number in range(SURPLUS_VERSIONS)]
    history = [entry] * (kept + SURPLUS_VERSIONS + len(collecting))
    status = {"uri": entry["uri"], "version": entry["version"], "headSeq": 10**6, "history": history}

    stored = api.patch_namespaced_custom_object_status(*where, "long", {"status": {**status, "collecting": collecting}})

    assert len(stored["status"]["history"]) == len(history)
    print(f"{len(json.dumps(stored))} bytes")
