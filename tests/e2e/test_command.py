"""A user with `claas` on the real cluster: what needs kubelets (a worker's log), a real step and a real doctor."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from claas_operator.cli.exits import Exit
from clikit import Claas
from deployment import BASE_MODEL, NAMESPACE, RELEASE, USER, Deployment
from e2e import story

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

FEEDBACK = [
    "--prompt",
    "SECRET What is the capital of France?",
    "--response",
    "Paris, the city of light.",
    "--feedback",
    "Shorter",
]


@pytest.fixture(scope="module")
def claas(installed: Deployment) -> Claas:
    """The command, by the cluster's kubeconfig."""
    tools = installed.kubectl.env["PATH"]
    return Claas({"KUBECONFIG": str(installed.kubectl.kubeconfig), "CLAAS_NAMESPACE": USER, "PATH": tools}, seconds=600)


def test_user_makes_teaches_and_looks_without_kubectl(claas: Claas, installed: Deployment) -> None:
    name = story.unique("typed")
    made = claas("init-lora", "--output-uri", f"s3://adapters/{USER}/{name}/", "--name", name, "-o", "json")
    assert made.code == 0, made.err
    assert claas("get", "adapter", name, "-o", "json").json["base_model"] == BASE_MODEL, "the installation's default"
    done = claas("distill", "--adapter", name, *FEEDBACK, "-o", "json")
    assert done.code == 0, done.err
    assert done.json["metadata"]["grad_norm"] > 0
    assert done.json["lora_uri"] == story.adapter(installed, name)["status"]["uri"]

    logs = claas("logs", done.json["id"])
    assert logs.code == 0, logs.err
    lines = [json.loads(line) for line in logs.out.splitlines()]
    assert {"claimed", "reported"} <= {line["message"] for line in lines}
    assert len(claas("logs", done.json["id"], "--all").out.splitlines()) > len(lines)
    assert "SECRET" not in logs.out

    with installed.store():
        store = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
        checked = Claas({**claas.environment, **store})("fsck", name)
    assert checked.code == 0, checked.err
    assert claas("rollback", name, name).code == 0
    assert story.adapter(installed, name)["status"]["version"] == name


def test_the_doctor_finds_nothing_wrong_and_health_is_well(claas: Claas) -> None:
    done = claas("doctor", "-o", "json")
    wrong = [check for check in done.json["checks"] if check["level"] == "wrong"]
    assert (done.code, wrong) == (0, [])
    assert f"release {RELEASE} in namespace {NAMESPACE}" in done.out
    health = claas("health", "-o", "json")
    assert (health.code, health.json["status"]) == (0, "healthy")
    assert health.json["teacher"]["status"] == "healthy"


def test_deploy_would_upgrade_what_is_there(claas: Claas, installed: Deployment, tmp_path: Path) -> None:
    values = tmp_path / "values.yaml"
    values.write_text(installed.kubectl.helm("get", "values", RELEASE, "-n", NAMESPACE, "-o", "yaml"))
    done = claas("deploy", "--dry-run", "-f", str(values), "-o", "json")
    wrong = [check for check in done.json["checks"] if check["level"] == "wrong"]
    assert (done.code, wrong) == (0, []), done.err
    refused = claas("deploy", "--dry-run", "-f", str(values), "--set", "defaultPool=nowhere")
    assert refused.code == Exit.USAGE
    assert "nowhere is none of the pools" in refused.err
