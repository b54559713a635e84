"""From the models to CustomResourceDefinitions: `kubectl apply` files in crds/ and the chart's templates.

pydantic writes JSON Schema; the API server wants a structural OpenAPI 3.0 schema: no references, no null, one type a
node, bounds everywhere (they also bound what CEL rules may cost). Whatever has no counterpart there is an error here,
so a new field cannot lose a constraint on its way.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, cast

import yaml
from pydantic import BaseModel
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import core_schema

from claas_crds import names
from claas_crds.adapter import LoraAdapterSpec, LoraAdapterStatus
from claas_crds.model import Model, StatusModel
from claas_crds.reasons import table
from claas_crds.request import DistillRequestSpec, DistillRequestStatus

Json = dict[str, Any]

INT32_MAX: Final = 2**31 - 1
RULES: Final = "x-kubernetes-validations"
ANY: Final = "x-kubernetes-preserve-unknown-fields"
COPIED: Final = (
    *("description", "type", "format", "pattern", "enum", "default", "minimum", "maximum"),
    *("minLength", "maxLength", "minItems", "maxItems", "maxProperties"),
    *("x-kubernetes-list-type", "x-kubernetes-list-map-keys", RULES),
)
TRANSLATED: Final = {"title", "properties", "required", "items", "additionalProperties", "anyOf", "const", "$ref"} | {
    *("exclusiveMinimum", "exclusiveMaximum", ANY, "$defs")
}


class SchemaError(ValueError):
    """A field of a model cannot become a safe structural schema; the message names it."""


@dataclass(frozen=True)
class Column:
    """A column of `kubectl get`; a wide one shows with `-o wide` only."""

    name: str
    json_path: str
    type: str = "string"
    wide: bool = False


@dataclass(frozen=True)
class Resource:
    """What a CustomResourceDefinition says besides its spec and status."""

    kind: str
    plural: str
    short: str
    description: str
    spec: type[Model]
    status: type[StatusModel]
    columns: tuple[Column, ...]
    selectable: tuple[str, ...] = ()  # JSON paths that a --field-selector may name

    @property
    def name(self) -> str:
        return f"{self.plural}.{names.GROUP}"


AGE: Final = Column("Age", ".metadata.creationTimestamp", "date")
RESOURCES: Final = (
    Resource(
        kind=names.ADAPTER_KIND,
        plural=names.ADAPTER_PLURAL,
        short="la",
        description="One LoRA adapter and its chain of versions in the object store. status.uri is the one to load.",
        spec=LoraAdapterSpec,
        status=LoraAdapterStatus,
        columns=(
            Column("Base", ".spec.baseModel"),
            Column("Version", ".status.version"),
            Column("Steps", ".status.totals.steps", "integer"),
            Column("Ready", '.status.conditions[?(@.type=="Ready")].status'),
            Column("URI", ".status.uri", wide=True),
            AGE,
        ),
    ),
    Resource(
        kind=names.REQUEST_KIND,
        plural=names.REQUEST_PLURAL,
        short="dr",
        description="One training step on one adapter, from feedback on a few responses. It ends Complete or Failed.",
        spec=DistillRequestSpec,
        status=DistillRequestStatus,
        columns=(
            Column("Adapter", ".spec.adapterRef.name"),
            Column("State", ".status.state"),
            Column("Reason", ".status.reason"),
            Column("Loss", ".status.metadata.totalLoss", "number"),
            Column("Tokens", ".status.metadata.tokensProcessed", "integer"),
            Column("Worker", ".status.worker", wide=True),
            Column("URI", ".status.loraUri", wide=True),
            AGE,
        ),
        selectable=(".status.worker",),
    ),
)


class _ModelSchema(GenerateJsonSchema):
    """pydantic's JSON Schema, with each model's CEL rules and, in specs, defaults that the API server can fill in."""

    def model_schema(self, schema: core_schema.ModelSchema) -> Json:
        node = super().model_schema(schema)
        model = cast(type[Model], schema["cls"])
        for name, field in model.model_fields.items():
            node["properties"][field.alias or name].pop("default", None)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if default is not None and not issubclass(model, StatusModel):
                # {}: the API server goes on to fill in the defaults inside.
                node["properties"][field.alias or name]["default"] = {} if isinstance(default, BaseModel) else default
        if model.cel:
            node[RULES] = [
                {
                    "rule": rule.rule,
                    "message": rule.message,
                    "fieldPath": rule.field_path,
                    **({"reason": rule.reason} if rule.reason else {}),
                }
                for rule in model.cel
                if rule.rule
            ]
        return node


def schema_of(model: type[Model], path: str) -> Json:
    """The structural schema of `model`; `path` is its place in the resource, for errors.

    Raises:
        SchemaError: a field has no bound, or a constraint that the API server does not know.
    """
    node = model.model_json_schema(by_alias=True, schema_generator=_ModelSchema)
    return _structural(node, node.get("$defs", {}), path)


def _structural(node: Json, definitions: Json, path: str) -> Json:
    if "$ref" in node:
        node = {**definitions[node["$ref"].removeprefix("#/$defs/")], **node}
    if ANY in node:  # no type, so a union is the models' affair
        node = {key: value for key, value in node.items() if key != "anyOf"}
    elif "anyOf" in node and "properties" not in node:
        variants = [variant for variant in node["anyOf"] if variant != {"type": "null"}]
        if len(variants) != 1:
            raise SchemaError(f"{path} is a union: give it one type")
        return _structural(
            {**variants[0], **{key: value for key, value in node.items() if key != "anyOf"}}, definitions, path
        )
    if unknown := node.keys() - set(COPIED) - TRANSLATED:
        raise SchemaError(f"{path} has {sorted(unknown)}, which the generator does not know")

    out: Json = {key: node[key] for key in COPIED if key in node}
    if "const" in node:
        out["enum"] = [node["const"]]
    for exclusive, bound in (("exclusiveMinimum", "minimum"), ("exclusiveMaximum", "maximum")):
        if exclusive in node:
            out |= {bound: node[exclusive], exclusive: True}  # a number in JSON Schema, a flag in OpenAPI 3.0
    if out.get("type") == "integer":
        small = out.get("minimum", -INT32_MAX - 1) >= -INT32_MAX and out.get("maximum", INT32_MAX + 1) <= INT32_MAX
        out["format"] = "int32" if small else "int64"
    if node.get("required"):
        out["required"] = node["required"]
    if isinstance(node.get("additionalProperties"), dict):
        out["additionalProperties"] = _structural(node["additionalProperties"], definitions, f"{path}[*]")
    if "items" in node:
        out["items"] = _structural(node["items"], definitions, f"{path}[]")
    if "properties" in node:
        out["properties"] = {
            name: _structural(child, definitions, f"{path}.{name}") for name, child in node["properties"].items()
        }
    if "anyOf" in node:
        out["anyOf"] = node["anyOf"]  # of whole objects: it restricts values and adds no types
    if ANY in node:
        out[ANY] = True
    _check_bounds(out, path)
    if limits := _limits(out):
        out["description"] = f"{out['description']} {limits}"
    return out


def _limits(node: Json) -> str:
    """Default and range in words: `kubectl explain` shows neither."""
    words = []
    if isinstance(default := node.get("default"), (str, int, float)):
        words.append(f"default {_plain(default)}")
    if node.get("type") in ("integer", "number") and "maximum" in node:
        above = "above " if node.get("exclusiveMinimum") else ""
        low = f"{above}{_plain(node['minimum'])} to " if "minimum" in node else "at most "
        words.append(f"{low}{_plain(node['maximum'])}")
    return f"({', '.join(words)})" if words and "description" in node else ""


def _plain(value: str | float) -> str:
    """As one would write it in a manifest: 0.5, 10, false, Server."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def _check_bounds(node: Json, path: str) -> None:
    """Everything that a user can make long has an end."""
    bounds = {
        "string": ("maxLength", "enum"),
        "array": ("maxItems",),
        "object": ("maxProperties", "properties"),
        "integer": ("type",),
        "number": ("type",),
        "boolean": ("type",),
    }
    if ANY in node:
        needed = [bound for bound in ("maxItems", "maxProperties") if bound not in node]
    elif node.get("type") in bounds:
        needed = [] if any(bound in node for bound in bounds[node["type"]]) else [bounds[node["type"]][0]]
    else:
        raise SchemaError(f"{path} has no type that the API server knows: {node.get('type')}")
    if needed:
        raise SchemaError(f"{path} has no bound: give it {' and '.join(needed)}")


def definition(resource: Resource) -> Json:
    """The CustomResourceDefinition of `resource`."""
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": resource.name},
        "spec": {
            "group": names.GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": resource.kind,
                "listKind": f"{resource.kind}List",
                "plural": resource.plural,
                "singular": resource.kind.lower(),
                "shortNames": [resource.short],
                "categories": [names.CATEGORY],
            },
            "versions": [
                {
                    "name": names.VERSION,
                    "served": True,
                    "storage": True,
                    "subresources": {"status": {}},
                    "additionalPrinterColumns": [
                        {
                            "name": column.name,
                            "type": column.type,
                            "jsonPath": column.json_path,
                            **({"priority": 1} if column.wide else {}),
                        }
                        for column in resource.columns
                    ],
                    **(
                        {"selectableFields": [{"jsonPath": path} for path in resource.selectable]}
                        if resource.selectable
                        else {}
                    ),
                    "schema": {
                        "openAPIV3Schema": {
                            "description": resource.description,
                            "type": "object",
                            "required": ["spec"],
                            "properties": {
                                "apiVersion": {"type": "string"},
                                "kind": {"type": "string"},
                                "metadata": {"type": "object"},
                                "spec": schema_of(resource.spec, f"{resource.kind}.spec"),
                                "status": schema_of(resource.status, f"{resource.kind}.status"),
                            },
                        }
                    },
                }
            ],
        },
    }


class _Dumper(yaml.SafeDumper):
    """Never `&id001`: aliases are legal YAML and unreadable."""

    def ignore_aliases(self, data: object) -> bool:
        return True


REASONS_HEAD: Final = """<!-- Written by `python -m claas_crds` from crds/claas_crds/reasons.py: change that. -->
# Reasons

Why a condition of a `DistillRequest` or a `LoraAdapter` is what it is, in one word that scripts may match:
`status.conditions[].reason`, for a request that waits or has failed also `status.reason`. A condition's message says it
of the case at hand.

"""
HEADER: Final = "# Written by `python -m claas_crds` from the models in crds/claas_crds: change those.\n"


def _dump(document: Json) -> str:
    return yaml.dump(document, Dumper=_Dumper, sort_keys=False, width=120, allow_unicode=True)


def files() -> dict[Path, str]:
    """Every generated file, by its path from the repository's root."""
    written: dict[Path, str] = {}
    for resource in RESOURCES:
        document = definition(resource)
        written[Path(f"crds/{names.GROUP}_{resource.plural}.yaml")] = HEADER + _dump(document)
        # Helm must not delete the definitions, and everybody's adapters with them, when the release goes.
        kept = {**document, "metadata": {**document["metadata"], "annotations": {"helm.sh/resource-policy": "keep"}}}
        text = _dump(kept).replace("{{", '{{ "{{" }}')
        template = f"{{{{- if .Values.crds.install }}}}\n{HEADER}{text}{{{{- end }}}}\n"
        written[Path(f"charts/claas/templates/crd-{resource.plural}.yaml")] = template
    written[Path("docs/reasons.md")] = REASONS_HEAD + table() + "\n"
    return written
