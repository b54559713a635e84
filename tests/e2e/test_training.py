"""A user with kubectl on the real cluster: real kubelets, real SeaweedFS, real vLLM, the real SmolLM2."""

from __future__ import annotations

import time

import pytest
import yaml
from transformers import AutoTokenizer

import models
from claas_store.stores import open_store
from claas_store.version import find_manifest, read_version
from deployment import NAMESPACE, ROOT, USER, Deployment
from e2e import story
from kubectl import condition

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

SIXTY_FOUR_TOKENS = "The capital of France is Paris. " * 9


@pytest.fixture(scope="module")
def adapter_name(installed: Deployment) -> str:
    """An adapter whose worker is warm: one request has been trained on it."""
    name = story.unique("warm")
    story.create_adapter(installed, name)
    story.request(installed, f"{name}-0", adapterRef={"name": name}, samples=[story.sample("Paris.")])
    story.complete(installed, f"{name}-0")
    return name


def test_user_trains_on_a_warm_lease_within_15_seconds(installed: Deployment, adapter_name: str) -> None:
    before = story.adapter(installed, adapter_name)["status"]
    started = time.monotonic()
    name = story.request(
        installed, f"{adapter_name}-1", adapterRef={"name": adapter_name}, samples=[story.sample(SIXTY_FOUR_TOKENS)]
    )
    done = story.complete(installed, name)
    took = time.monotonic() - started
    status, after = done["status"], story.adapter(installed, adapter_name)["status"]

    assert status["metadata"]["tokensProcessed"] >= 60
    assert took <= 15, f"{took:.1f} s: {status['timings']}"
    assert set(status["timings"]) == {"queueMs", "claimMs", "loadMs", "teacherMs", "stepMs", "saveMs"}
    assert after["headSeq"] == before["headSeq"] + 1
    assert (after["uri"], after["version"]) == (status["loraUri"], status["version"])
    assert status["parent"] == {"adapterUid": story.adapter(installed, adapter_name)["metadata"]["uid"],
                                "uri": before["uri"], "headSeq": before["headSeq"]}  # fmt: skip
    with installed.store():
        version = read_version(status["loraUri"])
    assert version.manifest.parent is not None
    assert version.manifest.parent.uri == before["uri"]
    assert version.manifest.request_uid == done["metadata"]["uid"]


def test_complete_is_never_seen_before_the_head_moved(installed: Deployment, adapter_name: str) -> None:
    for turn in range(3):
        name = story.request(
            installed,
            f"{adapter_name}-order-{turn}",
            adapterRef={"name": adapter_name},
            samples=[story.sample("Paris!")],
        )
        installed.kubectl.wait(f"dr/{name}", "condition=Complete", namespace=USER, seconds=story.LIMIT_SECONDS)
        head = story.adapter(installed, adapter_name)["status"]
        request = installed.kubectl.get("dr", name, "-n", USER)
        assert head["history"][-1]["requestUid"] == request["metadata"]["uid"]
        assert head["uri"] == request["status"]["loraUri"]


def test_samples_of_all_kinds_train_together_on_their_exact_tokens(installed: Deployment, adapter_name: str) -> None:
    spec = yaml.safe_load((ROOT / "examples" / "chat-request.yaml").read_text())["spec"]
    name = story.request(installed, f"{adapter_name}-chat", **{**spec, "adapterRef": {"name": adapter_name}})
    status = story.complete(installed, name)["status"]
    tokenizer = AutoTokenizer.from_pretrained(models.smollm2_dir())
    responses = [sample["response"] for sample in spec["samples"]]
    expected = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in responses)
    assert status["metadata"]["tokensProcessed"] == expected


def test_user_trains_a_bare_uri_without_an_adapter(installed: Deployment, adapter_name: str) -> None:
    head = story.adapter(installed, adapter_name)["status"]
    name = story.request(installed, story.unique("bare"), loraUri=head["uri"], samples=[story.sample("Paris is it.")])
    status = story.complete(installed, name)["status"]
    with installed.store():
        found = find_manifest(status["loraUri"])
    assert found is not None
    assert story.adapter(installed, adapter_name)["status"]["headSeq"] == head["headSeq"], "nobody's head moved"


def test_bad_input_fails_with_its_reason_and_the_lease_goes_on(installed: Deployment, adapter_name: str) -> None:
    bad = story.request(
        installed,
        story.unique("empty"),
        adapterRef={"name": adapter_name},
        samples=[story.sample("", finishReason="length")],
    )
    installed.kubectl.wait(f"dr/{bad}", "condition=Failed", namespace=USER, seconds=story.LIMIT_SECONDS)
    failed = installed.kubectl.get("dr", bad, "-n", USER)
    assert condition(failed, "Failed")["reason"] == "EmptyResponse"
    good = story.request(
        installed, story.unique("after"), adapterRef={"name": adapter_name}, samples=[story.sample("Paris, I say.")]
    )
    assert story.complete(installed, good)["status"]["worker"] == failed["status"]["worker"], "the same lease serves on"


def test_worker_killed_in_mid_step_and_the_head_moves_once(installed: Deployment, adapter_name: str) -> None:
    before = story.adapter(installed, adapter_name)["status"]
    long = [
        story.sample(
            " ".join(
                f"{word} is a city in France."
                for word in ["Paris", "Lyon", "Nice", "Lille", "Metz", "Brest", "Tours", "Dijon"] * 4
            )
        )
    ]
    name = story.request(
        installed, story.unique("killed"), adapterRef={"name": adapter_name}, samples=long, training={"innerSteps": 8}
    )
    seen = story.until(installed, name, lambda status: status.get("progress", {}).get("phase") == "Stepping")
    installed.kubectl("delete", "pod", seen["status"]["worker"], "-n", NAMESPACE, "--grace-period=0", "--force")
    done = story.complete(installed, name)
    status, after = done["status"], story.adapter(installed, adapter_name)["status"]

    assert status["attempt"] == 2
    assert status["worker"] != seen["status"]["worker"]
    assert after["headSeq"] == before["headSeq"] + 1
    assert [entry["requestUid"] for entry in after["history"]].count(done["metadata"]["uid"]) == 1
    with installed.store():
        family = f"s3://adapters/{USER}/{adapter_name}"
        manifests = [
            uri
            for uri, _ in open_store(family).list(f"s3://adapters/{USER}/")
            if uri.startswith(family) and uri.endswith("claas.json")
        ]
        versions = [found for uri in manifests if (found := find_manifest(uri.removesuffix("claas.json")))]
    assert [version.request_uid for version in versions].count(done["metadata"]["uid"]) == 1
    committed = {entry["uri"] for entry in after["history"]}
    assert status["loraUri"] in committed
    assert {version.parent.uri for version in versions if version.parent} <= committed, "a leftover is nobody's parent"


def test_teacher_down_the_request_waits_and_goes_on(installed: Deployment, adapter_name: str) -> None:
    installed.kubectl("scale", "deploy/claas-teacher", "-n", NAMESPACE, "--replicas=0")
    installed.kubectl(
        "wait",
        "pod",
        "-n",
        NAMESPACE,
        "-l",
        "app.kubernetes.io/component=teacher",
        "--for=delete",
        "--timeout=90s",
        seconds=100,
    )
    name = story.request(
        installed, story.unique("patient"), adapterRef={"name": adapter_name}, samples=[story.sample("Paris, still.")]
    )
    story.until(installed, name, lambda status: status.get("reason") == "TeacherUnavailable")
    installed.kubectl("scale", "deploy/claas-teacher", "-n", NAMESPACE, "--replicas=1")
    status = story.complete(installed, name, seconds=600)["status"]
    assert condition({"status": status}, "Complete")["reason"] == "Succeeded"
