"""The document: every example in it is run, it is OpenAPI 3.1, and its page needs nothing from elsewhere."""

from __future__ import annotations

import re
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from jsonschema import Draft202012Validator

from claas_operator.shim import docs
from claas_operator.shim.app import make_app
from claas_operator.shim.settings import ShimSettings
from operatorkit import Raw, settings
from shimstage import Shim, ShimStage


def document() -> Raw:
    return docs.document(make_app(ShimSettings.of(settings())))


def operations(found: Raw) -> list[tuple[str, str, Raw]]:
    return [(method, path, op) for path, methods in found["paths"].items() for method, op in methods.items()]


def test_it_is_openapi_3_1_and_every_operation_says_how_it_fails() -> None:
    found = document()
    assert found["openapi"].startswith("3.1")
    for _, path, operation in operations(found):
        problem = operation["responses"]["default"]["content"]
        assert problem == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}, path
        assert operation["summary"] and operation["description"], path
        for parameter in operation.get("parameters", []):
            assert parameter.get("description") or parameter["schema"].get("description"), (path, parameter["name"])
        assert {"Retry-After", "X-Request-Id"} <= operation["responses"]["default"]["headers"].keys()
        if "202" in operation["responses"]:
            assert operation["responses"]["202"]["headers"]["Location"]["required"], path
    for name, schema in found["components"]["schemas"].items():
        Draft202012Validator.check_schema(schema)
        assert schema.get("description"), name


def test_every_reference_leads_somewhere() -> None:
    text = repr(document())
    schemas = document()["components"]["schemas"]
    assert {name for name in re.findall(r"#/components/schemas/([\w-]+)", text) if name not in schemas} == set()


def test_every_example_fits_its_schema() -> None:
    found = document()
    for name, schema in found["components"]["schemas"].items():
        whole = schema | {"components": found["components"]}
        for example in schema.get("examples", []):
            Draft202012Validator(whole).validate(example), name


@pytest.mark.controlplane
def test_every_example_of_a_body_is_accepted(stage: ShimStage, team: httpx.Client) -> None:
    """As the document is for this caller: below their own prefix."""
    stage.adapter("coder")
    found = team.get("/openapi.json").json()
    ran = 0
    for method, path, operation in operations(found):
        if "requestBody" not in operation:
            continue
        reference = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"]
        for example in found["components"]["schemas"][reference.rpartition("/")[2]]["examples"]:
            example = example | ({"version": "coder"} if path.endswith("rollback") else {})
            # Nobody runs the create Job of an init here, and an operator that does not roll back leaves that a 202 too.
            later = path.endswith(("init", "rollback"))
            params = {"wait": 1 if later else 20}
            answer = team.request(method, path.replace("{name}", "coder"), json=example, params=params)
            assert answer.status_code == 200 or (later and answer.status_code == 202), (path, answer.text)
            check(found, operation, answer)
            ran += 1
    assert ran == 5


def check(found: Raw, operation: Raw, answer: httpx.Response) -> None:
    """The answer is one that the document knows."""
    content = operation["responses"][str(answer.status_code)]["content"][answer.headers["content-type"]]
    schema: dict[str, Any] = content["schema"] | {"components": found["components"]}
    Draft202012Validator(schema).validate(answer.json())


@pytest.mark.controlplane
def test_the_document_of_a_caller_names_their_prefix(stage: ShimStage, shim: Shim, team: httpx.Client) -> None:
    mine = team.get("/openapi.json").text
    assert f"s3://adapters/{stage.team}/coder-v1/" in mine
    bodies = team.get("/openapi.json").json()["components"]["schemas"]
    assert bodies["DistillBody"]["properties"]["pool"]["anyOf"][0]["enum"] == ["l40s"]
    with shim.client("") as nobody:
        assert "my-bucket" in nobody.get("/openapi.json").text
    with shim.client("nonsense") as stranger:
        assert stranger.get("/openapi.json").status_code == 401


def test_the_page_works_without_a_network() -> None:
    app = make_app(ShimSettings.of(settings()))
    browser = TestClient(app)  # without its lifespan: the page needs no cluster
    page = browser.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "http:" not in page.text and "https:" not in page.text and "<script>" not in page.text
    found = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert found[0] == "data:,", "no browser asks for an icon that is not there"
    kinds = {".css": "text/css", ".js": "text/javascript"}
    for asset in found[1:]:
        answer = browser.get(f"/{asset}")
        assert answer.status_code == 200 and answer.content, asset
        assert answer.headers["x-content-type-options"] == "nosniff"
        assert answer.headers["content-type"].partition(";")[0] == kinds[asset[asset.rindex(".") :]]
    assert len(found) == 4
    assert "openapi.json" in browser.get("/docs/start.js").text
