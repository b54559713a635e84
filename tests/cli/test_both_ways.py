"""Every command that works by kubeconfig and by url: the same words, the same answers, the same exit codes."""

from __future__ import annotations

import itertools
import json
import re
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

import operations
from claas_crds import names
from claas_operator.cli.exits import Exit
from clikit import Claas, plain
from operatorkit import MODEL
from operatorstage import GROUP
from shimstage import ShimStage

pytestmark = pytest.mark.controlplane

_numbers = itertools.count(1)
TEXTS = ["--prompt", "SECRET prompt", "--response", "SECRET response", "--feedback", "SECRET feedback"]
NUMBERS = {"total_loss": 0.1, "pg_loss": 0.05, "jsd_reg": 0.05, "tokens_processed": 7}


def fresh(stage: ShimStage, *, ready: bool = True) -> str:
    """Name of an adapter that no other test uses."""
    name = f"coder-{next(_numbers)}"
    stage.adapter(name, ready=ready)
    return name


def asked(stage: ShimStage, adapter: str) -> list[dict[str, Any]]:
    """The DistillRequests for an adapter."""
    items = stage.api("GET", f"{GROUP}/namespaces/{stage.team}/{names.REQUEST_PLURAL}")["items"]
    return [item for item in items if item["spec"].get("adapterRef", {}).get("name") == adapter]


def adapter_uri(stage: ShimStage, name: str) -> str:
    return f"s3://adapters/{stage.team}/{name}/"


# Teach


def test_feedback_becomes_a_version_and_nine_numbers(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    done = claas("distill", "--adapter", adapter, *TEXTS)
    assert (done.code, done.err) == (Exit.OK, ""), "piped, nothing is said about progress"
    fields = {row[0]: row[1] for row in done.rows}
    assert fields["lora_uri"] == stage.see_adapter(adapter)["status"]["uri"]
    assert {name: float(fields[name]) for name in NUMBERS} == NUMBERS
    assert "\x1b" not in done.out


def test_as_json_it_is_the_rest_api_s_request(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    found = claas("distill", "--adapter", adapter, *TEXTS, "-o", "json").json
    assert (found["state"], found["adapter"], found["namespace"]) == ("Complete", adapter, stage.team)
    assert found["metadata"].items() >= NUMBERS.items()
    assert found["timings"]["step_ms"] == 0
    assert claas("get", "request", found["id"], "-o", "json").json == found


def test_a_bare_version_by_its_uri(claas: Claas, stage: ShimStage) -> None:
    uri = adapter_uri(stage, f"bare-{next(_numbers)}")
    found = claas("distill", "--lora-uri", uri, *TEXTS, "-o", "json").json
    assert found["lora_uri"].startswith(uri.rstrip("/") + "-")
    assert found["adapter"] is None


def test_hyper_parameters_priority_and_teacher_arrive(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    flags = ["-t", "learning_rate=1e-3", "-t", "preset=paper", "-t", "teacher_top_k=50", "--teacher", "Self"]
    assert claas("distill", "--adapter", adapter, *TEXTS, *flags, "--priority", "7").code == 0
    spec = asked(stage, adapter)[0]["spec"]
    assert spec["training"]["learningRate"] == 1e-3
    assert (spec["training"]["preset"], spec["training"]["teacherTopK"]) == ("paper", 50)
    assert (spec["teacher"]["mode"], spec["priority"]) == ("Self", 7)


def test_texts_come_from_files_and_stdin(claas: Claas, stage: ShimStage, tmp_path: Path) -> None:
    adapter, answer = fresh(stage), tmp_path / "answer.py"
    answer.write_text("SECRET = 'é'\n")
    words = ["--prompt", "@@SECRET", "--response", f"@{answer}", "--feedback", "@-"]
    assert claas("distill", "--adapter", adapter, *words, stdin="SECRET remark\n").code == 0
    sample = asked(stage, adapter)[0]["spec"]["samples"][0]
    assert (sample["prompt"], sample["response"], sample["feedback"]) == (
        "@SECRET",
        "SECRET = 'é'\n",
        "SECRET remark\n",
    )


@pytest.mark.parametrize("form", ["manifest", "body", "lite"])
def test_a_whole_request_from_a_file(claas: Claas, stage: ShimStage, tmp_path: Path, form: str) -> None:
    adapter, file = fresh(stage), tmp_path / "request.yaml"
    sample: dict[str, Any] = {"prompt": "SECRET p", "response": "SECRET r"}
    if form == "manifest":
        spec = {
            "adapterRef": {"name": adapter},
            "samples": [sample],
            "training": {"learningRate": 0.001, "teacherTopK": 9},
        }
        content: dict[str, Any] = {"apiVersion": names.API_VERSION, "kind": names.REQUEST_KIND}
        content |= {"metadata": {"generateName": "mine-"}, "spec": spec}
    elif form == "body":
        content = {"adapter": adapter, "samples": [sample], "training": {"learning_rate": 0.001, "teacher_top_k": 9}}
    else:
        training = {"learning_rate": 0.001, "teacher_top_k": 9}
        content = {"adapter": adapter, "training": training, "samples": [sample | {"teacher_logprobs": [-0.1]}]}
    file.write_text(yaml.safe_dump(content))
    assert claas("distill", "-f", str(file)).code == 0
    assert claas("distill", "-f", "-", stdin=json.dumps(content)).code == 0
    for request in asked(stage, adapter):
        assert request["spec"]["training"]["teacherTopK"] == 9
        assert (request["spec"]["teacher"]["mode"] == "Provided") == (form == "lite")


def test_flags_add_to_a_body(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    body = json.dumps({"prompt": "SECRET p", "response": "SECRET r", "training": {"alpha": 1.0}})
    done = claas("distill", "-f", "-", "--adapter", adapter, "-t", "teacher_top_k=5", stdin=body)
    assert done.code == 0, done.err
    training = asked(stage, adapter)[0]["spec"]["training"]
    assert (training["alpha"], training["teacherTopK"]) == (1, 5)


def test_the_same_key_is_the_same_request(claas: Claas, stage: ShimStage) -> None:
    adapter, key = fresh(stage), f"key-{next(_numbers)}"
    words = ["distill", "--adapter", adapter, *TEXTS, "--idempotency-key", key, "-o", "json"]
    first, again = claas(*words), claas(*words)
    assert first.json == again.json
    assert len(asked(stage, adapter)) == 1
    other = claas("distill", "--adapter", adapter, "--prompt", "x", "--response", "y", "--idempotency-key", key)
    assert (other.code, other.out) == (Exit.CONFLICT, "")


def test_a_request_that_fails_has_its_reason_and_an_exit_code(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    done = claas("distill", "--adapter", adapter, "--prompt", "bad", "--response", "r")
    assert (done.code, done.out) == (Exit.REQUEST_FAILED, "")
    assert "failed: EmptyResponse: samples[0].response is empty" in done.err
    assert "claas reasons EmptyResponse" in done.err
    as_json = claas("distill", "--adapter", adapter, "--prompt", "bad", "--response", "r", "-o", "json")
    assert (as_json.code, as_json.json["reason"]) == (Exit.REQUEST_FAILED, "EmptyResponse")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"training": {"alpha": 7}}, "training.alpha: "),
        ({"training": {"alfa": 1}}, "training.alfa: "),
        ({"prompt": None}, "prompt"),
        ({"samples": []}, "samples"),
        ({"lora_uri": "http://x"}, "lora_uri"),
        ({"colour": "red"}, "colour: "),
        ({"priority": "high"}, "priority: "),
    ],
)
def test_a_mistake_in_a_body_names_the_field_and_never_its_text(
    claas: Claas, stage: ShimStage, changes: dict[str, Any], says: str
) -> None:
    body = {"adapter": "coder", "prompt": "SECRET p", "response": "SECRET r"} | changes
    done = claas("distill", "-f", "-", stdin=json.dumps(body))
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert says in done.err
    assert "SECRET" not in done.err


def test_no_wait_prints_the_id_alone(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    done = claas("distill", "--adapter", adapter, *TEXTS, "--no-wait")
    assert (done.code, done.err) == (0, "")
    assert re.fullmatch(r"[a-z0-9.-]+\n", done.out)
    assert done.out.strip() == asked(stage, adapter)[0]["metadata"]["name"]
    assert claas("distill", "--adapter", adapter, *TEXTS, "--no-wait", "-o", "json").json["adapter"] == adapter


def test_a_wait_ends_the_request_goes_on_and_can_be_cancelled(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage, ready=False)
    done = claas("distill", "--adapter", adapter, *TEXTS, "--timeout", "0.5")
    assert (done.code, done.out) == (Exit.WAIT_ENDED, "")
    id = asked(stage, adapter)[0]["metadata"]["name"]
    assert f"claas cancel {id}" in done.err
    assert claas("get", "request", id, "-o", "json").json["state"] == "Pending"
    assert claas("cancel", id).out == f"request {id} is being stopped\n"
    stage.wait("the end", lambda: stage.see(id).get("state") == "Cancelled")
    assert "had ended already: Cancelled" in claas("cancel", id).out


def test_ctrl_c_stops_the_waiting_and_not_the_request(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage, ready=False)
    running = claas.start("distill", "--adapter", adapter, *TEXTS)
    stage.wait("the request", lambda: asked(stage, adapter))
    id = asked(stage, adapter)[0]["metadata"]["name"]
    threading.Event().wait(1.0)  # until it waits; a signal while it sends is another test's matter
    done = running.end(signal.SIGINT)
    assert (done.code, done.out) == (Exit.INTERRUPTED, "")
    assert f"request {id} goes on" in done.err
    assert f"claas cancel {id}" in done.err
    assert stage.see(id).get("state", "Pending") == "Pending"
    assert not asked(stage, adapter)[0]["spec"].get("cancel")


def test_a_person_sees_what_happens_and_a_table(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    done = claas.on_terminal("distill", "--adapter", adapter, *TEXTS)
    assert done.code == 0
    seen = plain(done.out)
    progress = seen.partition("FIELD")[0]  # an instant worker may have ended before the first look
    assert re.search(r"\b(Pending|Assigned|Running|Complete)\b", progress), seen
    assert re.search(r"total_loss +0\.1 *\n", seen)
    assert "\t" not in seen
    assert "SECRET" not in seen


# Look


def test_lists_and_single_ones(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    id = claas("distill", "--adapter", adapter, *TEXTS, "-o", "json").json["id"]
    listed = claas("get", "requests", "--adapter", adapter)
    assert listed.out.splitlines()[0] == "ID\tADAPTER\tSTATE\tREASON\tLOSS\tTOKENS\tAGE"
    assert [row[:6] for row in listed.rows] == [[id, adapter, "Complete", "", "0.1", "7"]]
    assert [item["id"] for item in claas("get", "requests", "--adapter", adapter, "-o", "json").json] == [id]
    assert len(claas("get", "requests", "--limit", "1", "-o", "json").json) == 1
    rows = {row[0]: row for row in claas("get", "adapters").rows}
    assert rows[adapter][1:5] == [MODEL, stage.see_adapter(adapter)["status"]["version"], "1", "yes"]
    one = claas("get", "adapter", adapter, "-o", "json").json
    assert (one["name"], one["ready"], one["steps"], one["head_seq"]) == (adapter, True, 1, 2)
    fields = {row[0]: row[1] for row in claas("get", "request", id).rows}
    assert (fields["state"], fields["adapter"], fields["tokens_processed"]) == ("Complete", adapter, "7")


def test_versions_and_lineage(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    assert claas("distill", "--adapter", adapter, *TEXTS).code == 0
    versions = claas("get", "versions", adapter)
    assert [(row[0], row[2]) for row in versions.rows] == [("2", "yes"), ("1", "no")]
    assert versions.rows[1][1] == adapter
    assert versions.rows[1][3] == "creation"
    lineage = claas("get", "lineage", adapter, "-o", "json").json
    assert [item["seq"] for item in lineage["items"]] == [2, 1]
    assert lineage["complete"]
    assert claas("get", "lineage", adapter, "nope").code == Exit.NOT_FOUND


@pytest.mark.parametrize(
    "words",
    [
        ["get", "request", "nope"],
        ["get", "adapter", "nope"],
        ["get", "versions", "nope"],
        ["cancel", "nope"],
        ["rollback", "nope", "v1"],
        ["fork", "nope", "--output-uri", "s3://adapters/x/y/"],
    ],
)
def test_what_is_not_there(claas: Claas, words: list[str]) -> None:
    done = claas(*words)
    assert (done.code, done.out) == (Exit.NOT_FOUND, "")
    assert done.err.startswith("claas: ")


@pytest.mark.parametrize("name", ["Über", "a/b", "../x", "a b", "-"])
def test_a_name_that_cannot_be_one(claas: Claas, name: str) -> None:
    done = claas("get", "request", "--", name)
    assert done.code in (Exit.USAGE, Exit.NOT_FOUND)
    assert done.out == ""


def test_what_is_another_tenant_s(claas: Claas, stage: ShimStage) -> None:
    done = claas("get", "adapters", "-n", stage.other)
    assert (done.code, done.out) == (Exit.DENIED, "")
    assert "claas: " in done.err


def test_health(claas: Claas, stage: ShimStage) -> None:
    """`somebody` sees little by kubeconfig, and everything by url."""
    done = claas("health", "-o", "json")
    assert set(done.json) >= {"status", "operator", "workers", "teacher", "object_store", "api_server"}
    table = claas("health")
    assert [row[0] for row in table.rows] == ["operator", "workers", "teacher", "object_store", "api_server"]
    assert done.code == table.code == (0 if done.json["status"] == "healthy" else 1)


# Adapters


def test_init_lora_waits_for_the_first_version(claas: Claas, stage: ShimStage) -> None:
    name = f"new-{next(_numbers)}"
    uri = adapter_uri(stage, name)
    kubelet = operations.soon(stage, name)
    words = [
        "init-lora",
        "--output-uri",
        uri,
        "--name",
        name,
        "--base-model",
        MODEL,
        "--r",
        "8",
        "--target-modules",
        "q,v",
    ]
    done = claas(*words, "-o", "json")
    kubelet.join(timeout=30)
    assert (done.code, done.err) == (0, "")
    assert done.json == {"lora_uri": uri, "name": name}
    lora = stage.see_adapter(name)["spec"]["lora"]
    assert (lora["r"], lora["alpha"], lora["targetModules"]) == (8, 32, ["q", "v"])
    assert claas(*words).code == 0, "the same again is the same adapter"
    assert claas(*words, "--alpha", "64").code == Exit.CONFLICT


def test_an_adapter_that_cannot_be_made_says_why(claas: Claas, stage: ShimStage) -> None:
    uri = f"s3://adapters/{stage.other}/stolen-{next(_numbers)}/"
    done = claas("init-lora", "--output-uri", uri, "--base-model", MODEL)
    assert done.code in (Exit.DENIED, Exit.REQUEST_FAILED)
    assert "must lie below a storage prefix" in done.err
    done = claas("init-lora", "--output-uri", "s3://x", "--base-model", MODEL)
    assert (done.code, done.out) == (Exit.USAGE, "")
    assert "output-uri" in done.err.replace("_", "-")


def test_init_lora_may_stop_waiting(claas: Claas, stage: ShimStage) -> None:
    uri = adapter_uri(stage, f"slow-{next(_numbers)}")
    done = claas("init-lora", "--output-uri", uri, "--base-model", MODEL, "--timeout", "0.3")
    assert done.code == Exit.WAIT_ENDED


def test_rollback_and_on_and_back_again(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage)
    assert claas("distill", "--adapter", adapter, *TEXTS).code == 0
    trained = stage.see_adapter(adapter)["status"]["version"]
    done = claas("rollback", adapter, adapter, "-o", "json")
    assert (done.code, done.err) == (0, "")
    assert (done.json["version"], done.json["head_seq"]) == (adapter, 3)
    assert stage.see_adapter(adapter)["status"]["uri"] == adapter_uri(stage, adapter)
    assert claas("rollback", adapter, trained).code == 0
    assert claas("rollback", adapter, adapter).code == 0, "a second time to the same version"
    versions = claas("get", "versions", adapter).rows
    assert [row[0] for row in versions] == ["5", "4", "3", "2", "1"]
    assert [row[1] for row in versions] == [adapter, trained, adapter, trained, adapter]
    assert claas("rollback", adapter, "nope").code == Exit.NOT_FOUND


def test_a_fork_has_its_source_s_shape_and_starts_at_its_head(claas: Claas, stage: ShimStage) -> None:
    source = fresh(stage)
    assert claas("distill", "--adapter", source, *TEXTS).code == 0
    head, name = stage.see_adapter(source)["status"]["uri"], f"fork-{next(_numbers)}"
    kubelet = operations.soon(stage, name)
    done = claas("fork", source, "--output-uri", adapter_uri(stage, name), "--name", name)
    kubelet.join(timeout=30)
    assert done.code == 0, done.err
    made = stage.see_adapter(name)["spec"]
    assert made["initFrom"]["uri"] == head
    assert made["baseModel"] == MODEL
    old = f"fork-{next(_numbers)}"
    kubelet = operations.soon(stage, old)
    words = ["fork", source, "--version", source, "--output-uri", adapter_uri(stage, old), "--name", old]
    assert claas(*words).code == 0
    kubelet.join(timeout=30)
    assert stage.see_adapter(old)["spec"]["initFrom"]["uri"] == adapter_uri(stage, source)
    assert claas("fork", source, "--version", "nope", "--output-uri", adapter_uri(stage, "x")).code == Exit.NOT_FOUND


def test_a_pending_request_says_why_and_where_it_stands(claas: Claas, stage: ShimStage) -> None:
    adapter = fresh(stage, ready=False)
    id = claas("distill", "--adapter", adapter, *TEXTS, "--no-wait").out.strip()
    stage.wait("the reason", lambda: stage.see(id).get("reason") == "AdapterNotReady")
    found = claas("get", "request", id, "-o", "json").json
    assert (found["state"], found["reason"]) == ("Pending", "AdapterNotReady")
    assert found["message"]
    assert found["place"]["position"] >= 1
    assert ("namespace's requests" in found["place"]["note"]) == ("KUBECONFIG" in claas.environment)
    assert f"{found['place']['position']}, with" in claas("get", "request", id).out
