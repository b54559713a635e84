"""What people see: the examples, the columns, the explanations, and the watch by worker."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml

from kubectl import CommandFailed, Kubectl, Object

pytestmark = pytest.mark.controlplane

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
METADATA = {
    "totalLoss": 0.532,
    "pgLoss": 0.4,
    "jsdReg": 0.132,
    "meanAdvantage": -0.1,
    "fracPositiveAdvantage": 0.4,
    "meanIsRatio": 1,
    "clipFraction": 0,
    "gradNorm": 2,
    "tokensProcessed": 41,
}


def create(kubectl: Kubectl, namespace: str, example: str) -> Object:
    """Creates an example; what the API server made of it."""
    created: Object = json.loads(kubectl("create", "-n", namespace, "-f", str(EXAMPLES / example), "-o", "json"))
    return created


def patch_status(kubectl: Kubectl, namespace: str, what: str, status: Object) -> None:
    """As operator and worker write it."""
    patch = json.dumps({"status": status})
    kubectl("patch", "-n", namespace, what, "--subresource=status", "--type=merge", "-p", patch)


def table(kubectl: Kubectl, namespace: str, *arguments: str) -> tuple[list[str], list[str]]:
    """Header and first row of `kubectl get`."""
    header, row = kubectl("get", "-n", namespace, *arguments).splitlines()[:2]
    return header.split(), row.split()


@pytest.mark.parametrize("example", ["adapter.yaml", "request.yaml", "chat-request.yaml"])
def test_the_examples_are_accepted(kubectl: Kubectl, namespace: str, example: str) -> None:
    created = create(kubectl, namespace, example)
    assert created["metadata"]["name"].startswith("coder")
    assert created["metadata"]["generation"] == 1


def test_the_chat_example_arrives_as_it_was_written(kubectl: Kubectl, namespace: str) -> None:
    written = yaml.safe_load((EXAMPLES / "chat-request.yaml").read_text(encoding="utf-8"))["spec"]
    spec = create(kubectl, namespace, "chat-request.yaml")["spec"]
    chat, short = spec["samples"]
    assert [sample | given for sample, given in zip(spec["samples"], written["samples"], strict=True)] == [chat, short]
    assert [turn["role"] for turn in chat["messages"]] == ["system", "user", "assistant", "user"]
    assert not chat["response"].isascii()
    assert len(chat["response"]) != len(short["response"])
    assert written["training"].items() <= spec["training"].items()


def test_a_typing_error_is_named(kubectl: Kubectl, namespace: str) -> None:
    text = (EXAMPLES / "request.yaml").read_text().replace("learningRate", "learningrate")
    with pytest.raises(CommandFailed, match=r'unknown field "spec\.training\.learningrate"'):
        kubectl("create", "-n", namespace, "-f", "-", stdin=text)


def test_columns_of_a_request(kubectl: Kubectl, namespace: str) -> None:
    name = create(kubectl, namespace, "request.yaml")["metadata"]["name"]
    header, row = table(kubectl, namespace, "dr")
    assert header == ["NAME", "ADAPTER", "STATE", "REASON", "LOSS", "TOKENS", "AGE"]
    assert row[:2] == [name, "coder"]
    uri = "s3://my-bucket/loras/user123/coder-v1-20260101-000000-12345678/"
    status = {"state": "Waiting", "reason": "NoCapacity", "worker": "w-1", "loraUri": uri, "metadata": METADATA}
    patch_status(kubectl, namespace, f"dr/{name}", status)
    assert table(kubectl, namespace, "dr")[1][:6] == [name, "coder", "Waiting", "NoCapacity", "0.532", "41"]
    header, row = table(kubectl, namespace, "dr", "-o", "wide")
    assert header == ["NAME", "ADAPTER", "STATE", "REASON", "LOSS", "TOKENS", "WORKER", "URI", "AGE"]
    assert row[6:8] == ["w-1", uri]


def test_columns_of_an_adapter(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, "adapter.yaml")
    uri = "s3://my-bucket/loras/user123/coder-v1/"
    ready = {"type": "Ready", "status": "True", "reason": "Created", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {
        "uri": uri,
        "version": "coder-v1",
        "headSeq": 1,
        "totals": {"steps": 3, "tokens": 99},
        "conditions": [ready],
    }
    patch_status(kubectl, namespace, "la/coder", status)
    header, row = table(kubectl, namespace, "la")
    assert header == ["NAME", "BASE", "VERSION", "STEPS", "READY", "AGE"]
    assert row[:5] == ["coder", "Qwen/Qwen2.5-Coder-3B-Instruct", "coder-v1", "3", "True"]
    header, row = table(kubectl, namespace, "la", "-o", "wide")
    assert header == ["NAME", "BASE", "VERSION", "STEPS", "READY", "URI", "AGE"]
    assert row[5] == uri
    kubectl("wait", "--for=condition=Ready", "-n", namespace, "la/coder", "--timeout=5s")


def test_both_are_in_the_category(kubectl: Kubectl, namespace: str) -> None:
    create(kubectl, namespace, "adapter.yaml")
    create(kubectl, namespace, "request.yaml")
    found = kubectl("get", "claas", "-n", namespace, "-o", "name")
    assert "loraadapter.claas.dev/coder" in found
    assert "distillrequest.claas.dev/coder-" in found


def test_a_worker_finds_its_own_requests(kubectl: Kubectl, namespace: str) -> None:
    mine, other, unbound = (create(kubectl, namespace, "request.yaml")["metadata"]["name"] for _ in range(3))
    patch_status(kubectl, namespace, f"dr/{mine}", {"worker": "w-1"})
    patch_status(kubectl, namespace, f"dr/{other}", {"worker": "w-2"})
    select = ["dr", "-n", namespace, "-o", "name", "--field-selector"]
    assert kubectl("get", *select, "status.worker=w-1").split() == [f"distillrequest.claas.dev/{mine}"]
    assert kubectl("get", *select, "status.worker=").split() == [f"distillrequest.claas.dev/{unbound}"]


def test_status_and_spec_are_written_apart(kubectl: Kubectl, namespace: str) -> None:
    name = create(kubectl, namespace, "request.yaml")["metadata"]["name"]
    kubectl("patch", "-n", namespace, f"dr/{name}", "--type=merge", "-p", '{"status": {"worker": "w-1"}}')
    assert "worker" not in kubectl.get("dr", name, "-n", namespace).get("status", {})
    patch_status(kubectl, namespace, f"dr/{name}", {"worker": "w-1"})
    found = kubectl.get("dr", name, "-n", namespace)
    assert found["status"] == {"worker": "w-1"}  # and nothing that nobody wrote
    assert found["metadata"]["generation"] == 1


def test_a_condition_has_one_type(kubectl: Kubectl, namespace: str) -> None:
    name = create(kubectl, namespace, "request.yaml")["metadata"]["name"]
    accepted = {
        "type": "Accepted",
        "status": "True",
        "reason": "Accepted",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    with pytest.raises(CommandFailed, match=r"status\.conditions\[1\]: Duplicate value"):
        patch_status(kubectl, namespace, f"dr/{name}", {"conditions": [accepted, accepted]})


def test_a_report_out_of_form_is_refused(kubectl: Kubectl, namespace: str) -> None:
    name = create(kubectl, namespace, "request.yaml")["metadata"]["name"]
    result = {"attempt": 1, "outcome": "Maybe", "reason": "x", "at": "2026-01-01T00:00:00Z"}
    with pytest.raises(CommandFailed, match=r'status\.result\.outcome: Unsupported value: "Maybe"'):
        patch_status(kubectl, namespace, f"dr/{name}", {"result": result})


def test_explain_gives_meaning_default_and_range(kubectl: Kubectl) -> None:
    text = " ".join(kubectl("explain", "dr.spec.training").split())
    for words in (
        "Hyper-parameters of the step.",
        "alpha <number> Divergence: 0 forward KL(q||p), 0.5 Jensen-Shannon, 1 reverse KL(p||q). (default 0.5, 0 to 1)",
        "learningRate <number> AdamW learning rate of the step. (default 0.0001, above 0 to 1)",
        "teacherTopK <integer> Tokens of the vocabulary compared at each position; the rest is one bucket. "
        "(default 100, 1 to 100)",
        "preset <string> enum: default, paper",
    ):
        assert words in text
    assert "chain of versions" in kubectl("explain", "la")
    assert "Rank of the low-rank update. (default 16, 1 to 512)" in kubectl("explain", "la.spec.lora.r")
