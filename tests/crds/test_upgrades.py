"""Objects that earlier releases stored: today's definitions take them, keep every field, and mean the same by them.

`fixtures/vX.Y/` holds objects as that release stored them, in many states, defaults filled in. They are never changed:
a release that adds a field leaves its own folder beside them.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes
import pytest
import yaml

from claas_crds import names
from claas_crds.adapter import LoraAdapterSpec, LoraAdapterStatus
from claas_crds.model import Model
from claas_crds.request import DistillRequestSpec, DistillRequestStatus
from claas_operator.plan import plan
from claas_operator.snapshot import Adapter, Kind, Request, Snapshot
from kubectl import Kubectl
from operatorkit import later, settings

FIXTURES = Path(__file__).parent / "fixtures"
MODELS: dict[str, tuple[type[Model], type[Model]]] = {
    names.ADAPTER_KIND: (LoraAdapterSpec, LoraAdapterStatus),
    names.REQUEST_KIND: (DistillRequestSpec, DistillRequestStatus),
}
PLURALS = {names.ADAPTER_KIND: names.ADAPTER_PLURAL, names.REQUEST_KIND: names.REQUEST_PLURAL}
Json = dict[str, Any]


def stored() -> Iterator[Any]:
    for file in sorted(FIXTURES.glob("v*/*.yaml")):
        for found in yaml.safe_load_all(file.read_text(encoding="utf-8")):
            yield pytest.param(found, id=f"{file.parent.name} {found['kind']} {found['metadata']['name']}")


STORED = list(stored())


def missing(small: Any, large: Any, path: str = "") -> Iterator[str]:
    """Where `large` does not hold what `small` does."""
    if isinstance(small, dict) and isinstance(large, dict):
        for key, value in small.items():
            if key in large:
                yield from missing(value, large[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(small, list) and isinstance(large, list) and len(small) == len(large):
        for i, (one, other) in enumerate(zip(small, large, strict=True)):
            yield from missing(one, other, f"{path}[{i}]")
    elif small != large:
        yield f"{path}: {small!r} became {large!r}"


def seen(raw: Json) -> Json:
    """As the API server shows it."""
    meta = {"uid": f"uid-{raw['metadata']['name']}", "namespace": "team", "resourceVersion": "7"}
    return raw | {"metadata": raw["metadata"] | meta | {"creationTimestamp": "2026-11-25T12:00:00Z"}}


def test_there_are_objects_of_every_release_in_many_states() -> None:
    assert [folder.name for folder in FIXTURES.iterdir()] == ["v0.1"]
    assert len(STORED) >= 20


@pytest.mark.parametrize("raw", STORED)
def test_the_models_lose_nothing_of_a_stored_object(raw: Json) -> None:
    spec, status = MODELS[raw["kind"]]
    kept = spec.model_validate(raw["spec"]).model_dump(by_alias=True, exclude_none=True, mode="json")
    assert not list(missing(raw["spec"], kept))
    if "status" in raw:
        kept = status.model_validate(raw["status"]).model_dump(by_alias=True, exclude_none=True, mode="json")
        assert not list(missing(raw["status"], kept))


@pytest.mark.parametrize("raw", STORED)
def test_the_operator_reads_a_stored_object_as_it_was_meant(raw: Json) -> None:
    snapshot, kind = Snapshot(), Kind(raw["kind"])
    entry = snapshot.put(kind, seen(raw), later(0))
    assert not snapshot.broken
    status = raw.get("status") or {}
    if isinstance(entry, Adapter):
        assert entry.problem == ""
        assert (entry.status.version, entry.status.head_seq) == (status.get("version", ""), status.get("headSeq", 0))
        assert entry.rollback == ""
        assert entry.active == (status.get("active") or {}).get("requestUid", "")
    else:
        assert isinstance(entry, Request)
        assert entry.problem is None
        assert (entry.ended is not None) == (status.get("state") in ("Complete", "Failed", "Cancelled"))
        assert entry.cancel == raw["spec"]["cancel"]
        assert entry.claimed == ("claim" in status and entry.ended is None)


def test_the_operator_goes_on_with_all_of_them() -> None:
    snapshot = Snapshot()
    for parameters in STORED:
        raw = parameters.values[0]
        snapshot.put(Kind(raw["kind"]), seen(raw), later(0))
    model = "Qwen/Qwen2.5-Coder-3B-Instruct"
    pools = settings(pool={"baseModel": model}, defaultBaseModel=model)
    made = plan(snapshot, pools, later(10**9))
    assert not made.skipped
    assert made.actions


@pytest.mark.controlplane
@pytest.mark.parametrize("raw", STORED)
def test_the_api_server_takes_a_stored_object_and_keeps_every_field(
    raw: Json, kubectl: Kubectl, api: kubernetes.client.CustomObjectsApi, stored_namespace: str
) -> None:
    """With strict validation: a field that today's definitions do not know is an error, and would be pruned."""
    metadata, plural = raw["metadata"], PLURALS[raw["kind"]]
    place = (names.GROUP, names.VERSION, stored_namespace, plural)
    body = {key: raw[key] for key in ("apiVersion", "kind", "spec")} | {"metadata": {"name": metadata["name"]}}
    created = api.create_namespaced_custom_object(*place, body, field_validation="Strict")
    assert created["spec"] == raw["spec"], "with the defaults that it was stored with, and no other"
    if "status" in raw:
        merge = {"_content_type": "application/merge-patch+json", "field_validation": "Strict"}
        status = {"status": raw["status"]}
        after = api.patch_namespaced_custom_object_status(*place, metadata["name"], status, **merge)
        assert after["status"] == raw["status"]
        # Whoever writes the object again, a label say, has all of it validated again.
        label = {"metadata": {"labels": {"a": "b"}}}
        again = api.patch_namespaced_custom_object(*place, metadata["name"], label, **merge)
        assert (again["spec"], again["status"]) == (raw["spec"], raw["status"])


@pytest.fixture(scope="module")
def stored_namespace(kubectl: Kubectl) -> str:
    """A namespace for the objects of earlier releases."""
    kubectl("create", "namespace", "stored")
    return "stored"
