"""A mistake in the values is refused before anything is installed, in words that say where and what to do."""

from __future__ import annotations

import json

import pytest
import yaml

from chart.rendering import CHART, Helm


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("polls=1", ["'polls' not allowed"]),
        ("image.tga=1", ["/image", "'tga' not allowed"]),
        ("poolDefaults.lingerSecond=3", ["/poolDefaults", "'lingerSecond' not allowed"]),
        ("pools[0].name=x,pools[0].nodeselector.a=b", ["/pools/0", "'nodeselector' not allowed"]),
        ("pools[0].maxWorkers=1", ["/pools/0", "missing property 'name'"]),
        ("pools[0].name=L40S", ["/pools/0/name", "does not match pattern"]),
        ("pools[0].name=x,pools[0].isolation=None", ["/pools/0/isolation", "'Shared', 'Namespace'"]),
        ("pools[0].name=x,pools[0].isolation=Namespace", ["pools[0] (x)", "needs modelClaim"]),
        ("pools[0].name=x,pools[1].name=x", ["pools[1].name", "another pool"]),
        ("poolDefaults.minWorkers=5", ["minWorkers 5 is more than maxWorkers 2"]),
        ("watchNamespaces={Team}", ["/watchNamespaces/0", "does not match pattern"]),
        ("watchNamespaces={a,a}", ["/watchNamespaces", "equal"]),
        ("defaultPool=a100", ["defaultPool: a100", "l40s"]),
        ("operator.replicas=3", ["/operator/replicas", "maximum"]),
        ("operator.timings.leaseSeconds=0", ["/operator/timings/leaseSeconds"]),
        ("storage.prefixes[0].uri=adapters,storage.prefixes[0].namespace=a", ["/storage/prefixes/0/uri"]),
        ("storage.prefixes[0].uri=file:///data/,storage.prefixes[0].namespace=a", ["storage.fileRoots"]),
        (
            "storage.prefixes[0].uri=file:///data2/,storage.prefixes[0].namespace=a,storage.fileRoots[0]=/data",
            ["storage.prefixes[0].uri", "storage.fileRoots"],  # a prefix of whose name is a root's is not below it
        ),
        ("storage.fileRoots[0]=/data/../etc", ["storage.fileRoots[0]", "'..' segment"]),
        ("storage.fileRoots[0]=data", ["/storage/fileRoots/0"]),
        ("storage.fileRoots[0]=/a:/etc", ["/storage/fileRoots/0"]),
        ("storage.prefixes[0].uri=s3://adapters/../other/,storage.prefixes[0].namespace=a", ["'..' segment"]),
        ("storage.addressing=dns", ["/storage/addressing", "'auto', 'path', 'virtual'"]),
        ("storage.encryption.mode=AES", ["/storage/encryption/mode"]),
        ("storage.encryption.kmsKeyId=k", ["storage.encryption.kmsKeyId needs mode aws:kms"]),
        ("storage.encryption.mode=AES256,storage.encryption.kmsKeyId=k", ["needs mode aws:kms"]),
        ("storage.credentials.accessKeyId=a", ["accessKeyId and secretAccessKey go together"]),
        (
            "storage.credentials.existingSecret=s,storage.credentials.accessKeyId=a,storage.credentials.secretAccessKey=b",
            ["either existingSecret or accessKeyId"],
        ),
        ("model.source=Qwen/Qwen2.5", ["/model/source", "does not match pattern"]),
        ("teacher.url=http://elsewhere", ["set teacher.enabled to false"]),
        ("teacher.resources.limit.memory=1Gi", ["/teacher/resources", "'limit' not allowed"]),
    ],
)
def test_a_mistake_is_named(helm: Helm, mistake: str, words: list[str]) -> None:
    said = helm.refusal("--set", mistake)
    assert [word for word in words if word not in said] == [], said


def test_a_release_name_too_long_for_jobs_is_refused(helm: Helm) -> None:
    assert "at most 25 characters" in helm.refusal(release="a" * 26)
    helm.render(release="a" * 25)


def test_the_schema_covers_every_value() -> None:
    """Only what the schema lists is checked for typing errors, so it must list all, and nothing that does not exist."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    assert _keys(schema, schema) - {"global"} == _keys_of(values)


# Maps whose keys are the user's, or Kubernetes'.
FREE = {
    "affinity",
    "annotations",
    "nodeSelector",
    "podAnnotations",
    "podLabels",
    "podSecurityContext",
    "resources",
    "timings",
}


def _keys(node: dict[str, object], schema: dict[str, object], path: str = "") -> set[str]:
    """Every dotted key that the schema knows; a pool's own are those of poolDefaults."""
    if isinstance(ref := node.get("$ref"), str):
        node = schema["$defs"][ref.removeprefix("#/$defs/")]  # type: ignore[index]
    found: set[str] = set()
    for name, child in node.get("properties", {}).items():  # type: ignore[union-attr]
        here = f"{path}.{name}" if path else name
        found |= {here} | (set() if name == "resources" else _keys(child, schema, here))
    return found


def _keys_of(value: object, path: str = "") -> set[str]:
    if not isinstance(value, dict) or path.split(".")[-1] in FREE:
        return set()
    found: set[str] = set()
    for name, child in value.items():
        here = f"{path}.{name}" if path else name
        found |= {here} | _keys_of(child, here)
    return found
