"""The checked-in files are the models', and the generator refuses what would lose a bound on its way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import pytest
import yaml
from pydantic import Field

from claas_crds import generate
from claas_crds.__main__ import main
from claas_crds.adapter import LoraAdapterSpec
from claas_crds.model import Model
from claas_crds.reasons import Reason
from claas_crds.request import DistillRequestSpec

ROOT = Path(__file__).resolve().parents[2]
SPECS: list[type[Model]] = [LoraAdapterSpec, DistillRequestSpec]


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node of a structural schema with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    if "items" in schema:
        yield from nodes(schema["items"], f"{path}[]")


def server_defaults(schema: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    """Fills in defaults as the API server does: from the outside in."""
    for name, child in schema["properties"].items():
        if name not in value and "default" in child:
            value[name] = child["default"].copy() if isinstance(child["default"], dict) else child["default"]
        if isinstance(value.get(name), dict) and "properties" in child:
            server_defaults(child, value[name])
        elif isinstance(value.get(name), list) and "properties" in child.get("items", {}):
            value[name] = [server_defaults(child["items"], dict(item)) for item in value[name]]
    return value


@pytest.mark.parametrize("path", generate.files(), ids=str)
def test_the_checked_in_file_is_the_models(path: Path) -> None:
    file = ROOT / path
    assert file.read_text(encoding="utf-8") == generate.files()[path], "run `python -m claas_crds` and commit"


def test_check_says_which_file_differs_and_how_to_mend_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "pyproject.toml").touch()
    assert main(["--root", str(tmp_path)]) == 0
    assert main(["--root", str(tmp_path), "--check"]) == 0
    (tmp_path / "crds/claas.dev_loraadapters.yaml").write_text("old")
    shutil.rmtree(tmp_path / "charts")
    capsys.readouterr()
    assert main(["--root", str(tmp_path), "--check"]) == 1
    errors = capsys.readouterr().err
    assert "crds/claas.dev_loraadapters.yaml differs" in errors
    assert "charts/claas/templates/crd-loraadapters.yaml differs" in errors
    assert "crds/claas.dev_distillrequests.yaml differs" not in errors
    assert "run `python -m claas_crds`" in errors
    assert not (tmp_path / "charts").exists()


def test_the_charts_templates_hold_the_same_definitions_and_are_kept_at_uninstall() -> None:
    for resource in generate.RESOURCES:
        text = generate.files()[Path(f"charts/claas/templates/crd-{resource.plural}.yaml")]
        head, _, body = text.partition("\n")
        assert head == "{{- if .Values.crds.install }}"
        assert body.startswith(generate.HEADER)
        assert body.endswith("{{- end }}\n")
        body = body.removesuffix("{{- end }}\n")
        assert "{{" not in body.replace('{{ "{{" }}', "")
        document = yaml.safe_load(body.replace('{{ "{{" }}', "{{"))
        assert document["metadata"].pop("annotations") == {"helm.sh/resource-policy": "keep"}
        assert document == yaml.safe_load(generate.files()[Path(f"crds/claas.dev_{resource.plural}.yaml")])


def test_reasons_print_as_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["reasons"]) == 0
    rows = capsys.readouterr().out.splitlines()
    assert [row.split("`")[1] for row in rows[2:]] == [str(reason) for reason in Reason]
    assert all(row.count("|") == 3 for row in rows)


@pytest.mark.parametrize(
    ("model", "given"),
    [
        (DistillRequestSpec, {"adapterRef": {"name": "a"}, "samples": [{"prompt": "p", "response": "r"}]}),
        (DistillRequestSpec, {"loraUri": "s3://abc/d", "samples": [{"prompt": "p", "response": "r"}], "teacher": {}}),
        (LoraAdapterSpec, {"baseModel": "m", "storage": {"uri": "s3://abc/d"}, "lora": {"r": 4}}),
        (LoraAdapterSpec, {"baseModel": "m", "storage": {"uri": "s3://abc/d"}}),
    ],
)
def test_the_api_server_fills_in_what_python_would(model: type[Model], given: dict[str, Any]) -> None:
    filled = server_defaults(generate.schema_of(model, "spec"), given)
    assert model.model_validate(given).model_dump(by_alias=True, exclude_none=True) == filled


@pytest.mark.parametrize("resource", generate.RESOURCES, ids=lambda resource: resource.short)
def test_every_field_of_a_resource_is_described(resource: generate.Resource) -> None:
    versions = generate.definition(resource)["spec"]["versions"]
    root = versions[0]["schema"]["openAPIV3Schema"]["properties"]
    for part in ("spec", "status"):
        for path, node in nodes(root[part], part):
            assert node.get("description") or path.endswith("[]"), path


def test_a_status_has_no_defaults_that_nobody_wrote() -> None:
    for resource in generate.RESOURCES:
        schema = generate.schema_of(resource.status, "status")
        assert [path for path, node in nodes(schema) if "default" in node] == []


def test_every_rule_is_checked_by_both_sides() -> None:
    """A transition rule has nothing to compare with in Python; a rule without CEL is in the schema's own words."""
    ours = [model for model in Model.__subclasses__() if model.__module__.startswith("claas_crds.")]
    assert set(SPECS) < set(ours)
    for model in ours:
        for rule in model.cel:
            assert (rule.holds is None) == ("oldSelf" in (rule.rule or "")), rule
            if rule.rule is None:
                assert "anyOf" in generate.schema_of(model, "spec")


def test_a_request_cannot_change_but_for_cancel() -> None:
    frozen = {rule.field_path for rule in DistillRequestSpec.cel if rule.rule and "oldSelf" in rule.rule}
    assert frozen == {f".{field.alias}" for field in DistillRequestSpec.model_fields.values()}


class Unbounded(Model):
    """A text without end."""

    text: str


class UnboundedList(Model):
    """A list without end."""

    texts: list[Annotated[str, Field(max_length=3)]]


class UnboundedInside(Model):
    """A list with an end of texts without."""

    texts: list[str] = Field(max_length=3)


class UnboundedMap(Model):
    """A map without end."""

    numbers: dict[str, int]


class Union(Model):
    """Two types at one place."""

    either: Annotated[str, Field(max_length=3)] | int


class Multiple(Model):
    """A constraint that the generator was not taught."""

    even: int = Field(multiple_of=2)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Unbounded, "spec.text has no bound: give it maxLength"),
        (UnboundedList, "spec.texts has no bound: give it maxItems"),
        (UnboundedInside, r"spec.texts\[\] has no bound: give it maxLength"),
        (UnboundedMap, "spec.numbers has no bound: give it maxProperties"),
        (Union, "spec.either is a union"),
        (Multiple, "spec.even has .'multipleOf'."),
    ],
)
def test_what_has_no_bound_or_counterpart_is_refused(model: type[Model], message: str) -> None:
    with pytest.raises(generate.SchemaError, match=message):
        generate.schema_of(model, "spec")
