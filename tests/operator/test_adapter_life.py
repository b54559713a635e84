"""The life of an adapter as its user sees it: the real operator process, API server, `claas_store` and object store.

The test plays the kubelet (it runs the operation Pods' real command) and the workers (they write real versions).
"""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest

from claas_crds import names
from claas_crds.reasons import Cause, Reason
from claas_store.errors import StoreError
from claas_store.version import Manifest, ParentVersion, find_manifest, read_version, write_version
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorkit import Raw
from operatorstage import OPERATOR, Stage
from store import examples
from store.conftest import use_s3

pytestmark = pytest.mark.controlplane

LORA = {"r": 4, "alpha": 8, "targetModules": ["q_proj", "down_proj"]}


class Life:
    """A user, a worker and a store around a `Stage`."""

    def __init__(self, stage: Stage, config: Path, prefix: str) -> None:
        self.stage, self.config, self.prefix = stage, config, prefix

    def uri(self, name: str) -> str:
        return f"{self.prefix}{name}/"

    def create(self, name: str = "coder", **spec: object) -> Raw:
        """An adapter that is Ready."""
        given = {"baseModel": examples.BASE, "lora": LORA, "storage": {"uri": self.uri(name)}}
        self.stage.adapter(name, ready=False, **given | spec)
        self.stage.wait(f"{name} to be ready", lambda: self.stage.condition("Ready", name).get("status") == "True")
        return self.stage.see_adapter(name)

    def claim(self, name: str) -> None:
        self.stage.bound(name)
        self.stage.claim(name)

    def report(self, name: str) -> str:
        """The version is written, then reported. Its uri."""
        raw = self.stage.api("GET", self.stage.request_path(name))
        parent = read_version(raw["status"]["parent"]["uri"])
        uri = self.stage.next_uri(name)
        made_from = ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256)
        manifest = Manifest(base_model=examples.BASE, parent=made_from, request_uid=raw["metadata"]["uid"])
        write_version(uri, parent.config, parent.tensors, None, manifest)
        assert self.stage.report(name) == uri
        return uri

    def train(self, name: str, adapter: str = "coder") -> str:
        """One step. The uri of the new version."""
        self.stage.request(name, adapter)
        self.claim(name)
        uri = self.report(name)
        self.stage.complete(name)
        return uri

    def head(self, name: str = "coder") -> Raw:
        status: Raw = self.stage.see_adapter(name)["status"]
        return status


@pytest.fixture
def life(stage: Stage, object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Life]:
    """A release whose adapters lie in the real object store, below a prefix of the test's own; one worker is Ready."""
    use_s3(monkeypatch, object_store)
    model, root = examples.model_dir(tmp_path / "model"), f"s3://{object_store.bucket}/{uuid.uuid4().hex}/"
    config = stage.settings(
        pool={"baseModel": examples.BASE},
        defaultBaseModel=examples.BASE,
        storage={"prefixes": [{"uri": f"{root}{{namespace}}/"}], "forkPrefixes": [{"uri": f"{root}public/"}]},
        operations={"template": OPERATION, "modelDir": str(model)},
    )
    with stage.store(object_store.environment):
        yield Life(stage, config, f"{root}{stage.team}/")


OPERATION = {"spec": {"containers": [{"name": "operation", "image": "example/claas:1"}]}}


def names_of(status: Raw) -> list[str]:
    return [entry["version"] for entry in status["history"]]


# Rollback


def test_user_rolls_back_and_trains_on(life: Life) -> None:
    stage = life.stage
    stage.start_operator(life.config)
    life.create()
    stage.request("r1")
    stage.worker()
    life.claim("r1")
    first = life.report("r1")
    stage.complete("r1")
    second = life.train("r2")
    before = life.head()
    stage.change_adapter(rollbackTo=before["history"][1]["version"])
    stage.wait("the rollback", lambda: life.head()["headSeq"] == 4)
    back = life.head()
    assert (back["uri"], back["version"]) == (first, before["history"][1]["version"])
    assert back["history"][:3] == before["history"], "nothing is rewritten"
    assert back["rolledBackGeneration"] == stage.see_adapter()["metadata"]["generation"]
    assert (stage.condition("RolledBack")["status"], stage.condition("RolledBack")["reason"]) == (
        "True",
        Reason.ROLLED_BACK,
    )
    third = life.train("r3")
    on = life.head()
    assert (on["headSeq"], on["uri"], on["totals"]["steps"]) == (5, third, 3)
    assert [entry["cause"] for entry in on["history"]] == [
        Cause.CREATED,
        Cause.TRAINED,
        Cause.TRAINED,
        Cause.ROLLED_BACK,
        Cause.TRAINED,
    ]
    manifest = find_manifest(third)
    assert manifest is not None
    assert manifest.parent is not None
    assert manifest.parent.uri == first
    assert find_manifest(second) is not None, "the version that was left is still there"
    stage.change_adapter(retention={"keepLast": 9})
    stage.wait("it to be seen", lambda: life.head()["observedGeneration"] == 3)
    assert life.head()["headSeq"] == 5, "another field's change moves nothing"
    assert [e["reason"] for e in stage.events() if e["reason"] == "RolledBack"] == ["RolledBack"]


def test_user_rolls_back_while_a_step_runs_and_it_follows_the_step(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r")
    stage.worker()
    stage.bound("r")
    stage.claim("r")
    stage.request("next")
    stage.change_adapter(rollbackTo="coder")
    stage.wait("the condition", lambda: stage.condition("RolledBack").get("reason") == Reason.ADAPTER_BUSY)
    assert "request r holds the adapter" in stage.condition("RolledBack")["message"]
    stage.report("r")
    stage.bound("next")
    status = stage.see_adapter()["status"]
    assert names_of(status)[0] == names_of(status)[2] == "coder"
    assert (status["headSeq"], stage.see("next")["parent"]["headSeq"]) == (3, 3), "before the next step begins"
    assert stage.see("r")["state"] == "Complete", "the step was not in vain: its version is in the history"


def test_user_rolls_back_to_a_version_that_never_was_and_is_told(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.change_adapter(rollbackTo="coder-yesterday")
    stage.wait("the refusal", lambda: stage.condition("RolledBack").get("reason") == Reason.VERSION_UNKNOWN)
    assert stage.condition("RolledBack")["status"] == "False"
    assert stage.see_adapter()["status"]["headSeq"] == 1
    stage.wait("the Event", lambda: [e for e in stage.events() if e["reason"] == Reason.VERSION_UNKNOWN])
    stage.request("r")
    stage.worker()
    stage.run("r")
    stage.complete("r")


# Adopt and fork


def peft_folder(uri: str, **config: object) -> None:
    """What a user has trained elsewhere and copied into the store: no manifest."""
    from claas_store.stores import open_store
    from claas_store.uris import join
    from claas_store.version import CONFIG, encode

    files = encode({**examples.CONFIG, **config}, examples.tensors(), None)
    store = open_store(uri)
    for name, data in files.items():
        store.put(join(uri, name), data)
    assert CONFIG in files


def test_user_adopts_an_adapter_trained_elsewhere_where_it_lies(life: Life) -> None:
    peft_folder(life.uri("mine"))
    life.stage.start_operator(life.config)
    adopted = life.create("mine", initFrom={"uri": life.uri("mine")})["status"]
    (first,) = adopted["history"]
    assert (first["cause"], first["origin"], adopted["uri"]) == (Cause.ADOPTED, life.uri("mine"), life.uri("mine"))
    manifest = find_manifest(life.uri("mine"))
    assert manifest is not None, "an adopted folder gets a manifest"
    assert manifest.parent is None


def test_user_forks_a_version_and_both_are_trained(life: Life) -> None:
    stage = life.stage
    stage.start_operator(life.config)
    life.create()
    stage.request("r1")
    stage.worker()
    life.claim("r1")
    origin = life.report("r1")
    stage.complete("r1")
    (first,) = life.create("fork", initFrom={"uri": origin})["status"]["history"]
    assert (first["cause"], first["origin"], first["seq"]) == (Cause.FORKED, origin, 1)
    version = read_version(life.uri("fork"))
    assert version.manifest.parent is not None
    assert version.manifest.parent.uri == origin
    assert version.manifest.parent.sha256 == read_version(origin).manifest_sha256
    ours, theirs = life.train("r2"), life.train("r3", "fork")
    assert (life.head()["uri"], life.head("fork")["uri"]) == (ours, theirs)
    assert (life.head()["headSeq"], life.head("fork")["headSeq"]) == (3, 2)


def test_user_forks_from_another_namespace_only_where_that_is_allowed(life: Life) -> None:
    public, private = (life.prefix.replace(f"/{life.stage.team}/", f"/{who}/") + "coder/" for who in ("public", "eve"))
    for uri in (public, private):
        write_version(uri, examples.CONFIG, examples.tensors(), None, Manifest(base_model=examples.BASE))
    life.stage.start_operator(life.config)
    life.create("mine", initFrom={"uri": public})
    given = {"baseModel": examples.BASE, "lora": LORA, "storage": {"uri": life.uri("stolen")}}
    life.stage.adapter("stolen", ready=False, **given, initFrom={"uri": private})
    life.stage.wait(
        "the refusal", lambda: life.stage.condition("Ready", "stolen").get("reason") == Reason.STORAGE_DENIED
    )
    with pytest.raises(StoreError):
        read_version(life.uri("stolen"))


def test_user_adopts_what_does_not_fit_and_is_told_what(life: Life) -> None:
    peft_folder(life.uri("odd"), r=2)
    life.stage.start_operator(life.config)
    given = {"baseModel": examples.BASE, "lora": LORA, "storage": {"uri": life.uri("odd")}}
    life.stage.adapter("odd", ready=False, **given, initFrom={"uri": life.uri("odd")})
    life.stage.wait(
        "the refusal", lambda: life.stage.condition("Ready", "odd").get("reason") == Reason.ADAPTER_INVALID
    )
    assert "r" in life.stage.condition("Ready", "odd")["message"]


# Deletion


def test_user_deletes_an_adapter_and_its_versions_go_with_it(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers") == [names.FINALIZER])
    stage.delete_adapter()
    uri = stage.see_adapter()["spec"]["storage"]["uri"]
    arguments = stage.operation("destroy", {"ok": True})
    assert arguments == ["destroy", "--root", uri]
    stage.wait("the adapter to go", lambda: not stage.see_adapter())
    stage.adapter()
    assert "finalizers" not in stage.see_adapter()["metadata"], "with Retain there is none"
    stage.delete_adapter()
    stage.wait("the adapter to go", lambda: not stage.see_adapter())


def test_user_deletes_an_adapter_during_a_step_and_the_step_ends_first(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.request("r")
    stage.worker()
    stage.bound("r")
    stage.claim("r")
    stage.delete_adapter()
    stage.wait("the condition", lambda: stage.condition("Ready").get("reason") == Reason.DELETING)
    assert not stage.pods("operation")
    stage.report("r")
    stage.complete("r")
    stage.operation("destroy", {"ok": True})
    stage.wait("the adapter to go", lambda: not stage.see_adapter())


def test_an_adapter_whose_versions_cannot_be_deleted_goes_after_the_limit_and_says_what_was_left(stage: Stage) -> None:
    stage.start_operator(stage.settings(timings={"deletionLimitSeconds": 3}))
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers"))
    uri = stage.see_adapter()["spec"]["storage"]["uri"]
    stage.delete_adapter()
    stage.operation("destroy", {"ok": False, "reason": "StorageDenied", "message": "403", "retryable": False})
    stage.wait("the adapter to go", lambda: not stage.see_adapter())
    (event,) = [e for e in stage.events() if e["reason"] == Reason.VERSIONS_LEFT]
    assert event["type"] == "Warning"
    assert uri in event["note"]
    assert "StorageDenied: 403" in event["note"]
    assert [line for line in stage.lines() if line["message"] == "versions left" and line["head"] == uri]


def test_user_takes_the_way_out_of_a_deletion_that_hangs(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers"))
    stage.delete_adapter()
    stage.wait("the Job", lambda: stage.pods("operation"))
    assert stage.see_adapter()
    stage.change_adapter(deletionPolicy="Retain")
    stage.wait("the adapter to go", lambda: not stage.see_adapter())
    (event,) = [e for e in stage.events() if e["reason"] == Reason.VERSIONS_LEFT]
    assert event["type"] == "Normal"


def test_user_deletes_the_namespace_and_it_goes(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.request("r")
    stage.worker()
    stage.bound("r")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers"))
    path = f"/api/v1/namespaces/{stage.team}"
    stage.api("DELETE", path)
    stage.operation("destroy", {"ok": True})
    stage.wait("the namespace to go", lambda: stage.api.get(path) is None, 60)
    stage.api("POST", "/api/v1/namespaces", {"metadata": {"name": stage.team}})  # the stage deletes it at its end


def test_admin_uninstalls_and_no_adapter_is_wedged(stage: Stage, control_plane: ControlPlane) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.adapter("going", deletionPolicy="Delete")
    for name in ("coder", "going"):
        stage.wait(
            "the finalizer", lambda name=name: stage.see_adapter(name)["metadata"].get("finalizers")
        )
    stage.delete_adapter("going")
    labels = {names.INSTANCE_LABEL: stage.instance, names.COMPONENT_LABEL: "operator"}
    pod = {"metadata": {"labels": labels}, "spec": {"containers": [{"name": "operator", "image": "none"}]}}
    spec = {"replicas": 1, "selector": {"matchLabels": labels}, "template": pod}
    deployments = f"/apis/apps/v1/namespaces/{stage.home}/deployments"
    stage.api("POST", deployments, {"metadata": {"name": "claas-operator"}, "spec": spec})
    stage.wait("the operator's Pod", lambda: stage.pods("operator"))
    stage.operators[-1].terminate()  # there is no kubelet: the process ends by our hand, as its Pod does
    stage.operators[-1].wait(timeout=10)
    command = [sys.executable, "-m", "claas_operator.release", "--namespace", stage.home]
    command += ["--deployment", "claas-operator"]
    command += ["--selector", ",".join(f"{key}={value}" for key, value in labels.items())]
    environment = {"KUBECONFIG": str(control_plane.kubeconfig_of(OPERATOR)), "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert stage.api("GET", f"{deployments}/claas-operator")["spec"]["replicas"] == 0
    assert not stage.see_adapter("going")
    assert stage.see_adapter()["metadata"].get("finalizers", []) == []
    assert json.loads(done.stderr.splitlines()[-1])["adapters"] >= 2
    stage.delete_adapter()
    assert not stage.see_adapter(), "at once, with nobody there to do it"


