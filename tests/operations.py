"""The kubelet's part of an operation: the Job that makes an adapter's first version ends with its answer."""

from __future__ import annotations

import json
import threading

from claas_crds import names
from claas_store.uris import version_name
from operatorkit import Raw
from operatorstage import Stage


def pods_of(stage: Stage, adapter: str) -> list[Raw]:
    """The Pods of an adapter's operations."""
    uid = (stage.see_adapter(adapter).get("metadata") or {}).get("uid")
    label = names.ADAPTER_UID_LABEL
    return [pod for pod in stage.pods("operation") if uid and pod["metadata"]["labels"].get(label) == uid]


def make_first_version(stage: Stage, adapter: str) -> None:
    """Waits for the adapter's operation, and answers it."""
    stage.wait(f"the operation of {adapter}", lambda: pods_of(stage, adapter))
    uri = stage.see_adapter(adapter)["spec"]["storage"]["uri"]
    answer = {"ok": True, "uri": uri, "version": version_name(uri), "sha256": "0" * 64}
    stage.end_pod(pods_of(stage, adapter)[0]["metadata"]["name"], "operation", json.dumps(answer))


def soon(stage: Stage, adapter: str) -> threading.Thread:
    """The same beside the test, for an adapter that a command is about to make."""
    thread = threading.Thread(target=make_first_version, args=(stage, adapter))
    thread.start()
    return thread
