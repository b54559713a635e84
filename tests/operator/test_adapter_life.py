"""The life of an adapter as its user sees it: the real operator process, API server, `claas_store` and object store.

The test plays the kubelet (it runs the operation Pods' real command) and the workers (they write real versions).
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from claas_crds import names
from claas_crds.reasons import Cause, Reason
from claas_store.errors import StoreError
from claas_store.stores import open_store
from claas_store.uris import join
from claas_store.version import Manifest, ParentVersion, encode, find_manifest, read_version, write_version
from cluster.controlplane import ControlPlane
from objectstore import ObjectStore
from operatorkit import Raw
from operatorstage import AT_HOME, OPERATOR, Stage
from store import examples
from store.conftest import use_s3

RBAC_GROUP = "rbac.authorization.k8s.io"
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

    def write(self, name: str) -> str:
        """A worker's new version is whole in the store. Its uri."""
        raw = self.stage.api("GET", self.stage.request_path(name))
        bound, uri = raw["status"]["parent"], self.stage.next_uri(name)
        parent = read_version(bound["uri"])
        manifest = Manifest(
            base_model=examples.BASE,
            parent=ParentVersion(uri=parent.uri, sha256=parent.manifest_sha256),
            request_uid=raw["metadata"]["uid"],
            adapter_uid=bound["adapterUid"],
            attempt=raw["status"]["attempt"],
        )
        write_version(uri, parent.config, parent.tensors, None, manifest)
        return uri

    def report(self, name: str) -> str:
        """The version is written, then reported. Its uri."""
        uri = self.write(name)
        assert self.stage.report(name) == uri
        return uri

    def first(self, name: str, adapter: str = "coder") -> str:
        """One step on the release's first worker. The uri of the new version."""
        self.stage.request(name, adapter)
        self.stage.worker()
        self.claim(name)
        uri = self.report(name)
        self.stage.complete(name)
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
        timings={"collectDelaySeconds": 1},
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
    first = life.first("r1")
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
    stage.wait("the Event", lambda: [e["reason"] for e in stage.events()].count("RolledBack") == 1)


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
    files = encode({**examples.CONFIG, **config}, examples.tensors(), None)
    store = open_store(uri)
    for name, data in files.items():
        store.put(join(uri, name), data)


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
    origin = life.first("r1")
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
    life.stage.wait("the refusal", lambda: life.stage.condition("Ready", "odd").get("reason") == Reason.ADAPTER_INVALID)
    assert "r" in life.stage.condition("Ready", "odd")["message"]


# Deletion


def versions_left(stage: Stage) -> Raw:
    """The one Event about it, which comes after the write that it tells of."""
    found: list[Raw] = []

    def told() -> bool:
        found[:] = [event for event in stage.events() if event["reason"] == Reason.VERSIONS_LEFT]
        return bool(found)

    stage.wait("the Event", told)
    (event,) = found
    return event


def test_user_deletes_an_adapter_and_its_versions_go_with_it(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers") == [names.FINALIZER])
    stage.delete_adapter()
    uri = stage.see_adapter()["spec"]["storage"]["uri"]
    arguments = stage.operation("destroy", {"ok": True})
    assert arguments[:3] == ["destroy", "--root", uri]
    assert "--adapter-uid" in arguments
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
    stage.start_operator(stage.settings(timings={"deletionLimitSeconds": 10}))
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers"))
    uri = stage.see_adapter()["spec"]["storage"]["uri"]
    stage.delete_adapter()
    stage.operation("destroy", {"ok": False, "reason": "StorageDenied", "message": "403", "retryable": False})
    stage.wait("the trouble to show", lambda: "StorageDenied: 403" in stage.condition("Ready").get("message", ""))
    stage.wait("the adapter to go", lambda: not stage.see_adapter())
    event = versions_left(stage)
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
    assert versions_left(stage)["type"] == "Normal"


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


def test_user_deletes_a_namespace_whose_operations_run_there_and_it_goes_at_once(stage: Stage) -> None:
    """No Job can run in a namespace that is being deleted: nothing is waited for, far less the limit."""
    name, user = {"metadata": {"name": stage.instance}}, {"kind": "User", "name": OPERATOR, "apiGroup": RBAC_GROUP}
    role = {"kind": "ClusterRole", "name": stage.instance, "apiGroup": RBAC_GROUP}
    stage.api("POST", f"/apis/{RBAC_GROUP}/v1/clusterroles", name | {"rules": AT_HOME[:1]})
    stage.api("POST", f"/apis/{RBAC_GROUP}/v1/clusterrolebindings", name | {"roleRef": role, "subjects": [user]})
    stage.start_operator(stage.settings(pool={"isolation": "Namespace"}, timings={"deletionLimitSeconds": 300}))
    stage.adapter(deletionPolicy="Delete")
    stage.wait("the finalizer", lambda: stage.see_adapter()["metadata"].get("finalizers"))
    path = f"/api/v1/namespaces/{stage.team}"
    stage.api("DELETE", path)
    stage.wait("the namespace to go", lambda: stage.api.get(path) is None, 60)
    stage.api("POST", "/api/v1/namespaces", {"metadata": {"name": stage.team}})  # the stage deletes it at its end


def test_admin_uninstalls_and_no_adapter_is_wedged(stage: Stage, control_plane: ControlPlane) -> None:
    stage.start_operator()
    stage.adapter(deletionPolicy="Delete")
    stage.adapter("going", deletionPolicy="Delete")
    for name in ("coder", "going"):
        stage.wait("the finalizer", lambda name=name: stage.see_adapter(name)["metadata"].get("finalizers"))
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


def objects(life: Life) -> set[str]:
    """Folders below the user's prefix that hold anything but a tombstone."""
    found = (uri for uri, _ in open_store(life.prefix).list(life.prefix))
    return {uri.rpartition("/")[0] + "/" for uri in found if not uri.endswith("tombstone.json")}


def test_user_deletes_an_adapter_and_the_store_is_empty_but_for_the_others(life: Life) -> None:
    stage = life.stage
    stage.start_operator(life.config)
    life.create(deletionPolicy="Delete")
    life.create("coder-two")
    life.first("r1")
    life.train("r2")
    assert len(objects(life)) == 4
    stage.delete_adapter()
    stage.wait("the adapter to go", lambda: not stage.see_adapter())
    assert objects(life) == {life.uri("coder-two")}


# Retention


def test_user_keeps_two_versions_and_what_a_fork_began_as(life: Life) -> None:
    stage = life.stage
    stage.start_operator(life.config)
    life.create(retention={"keepLast": 2})
    made = [life.first("r1")]
    life.create("fork", initFrom={"uri": made[0]})
    made += [life.train(f"r{i}") for i in (2, 3, 4)]
    stage.wait("the old ones to go", lambda: stage.condition("Collected").get("status") == "True")
    status = life.head()
    assert [entry["uri"] for entry in status["history"]] == [made[0], *made[2:]]
    assert status.get("collecting", []) == []
    assert [find_manifest(uri) is not None for uri in (life.uri("coder"), *made)] == [False, True, False, True, True]
    stage.change_adapter(rollbackTo="coder")
    stage.wait("the refusal", lambda: stage.condition("RolledBack").get("reason") == Reason.VERSION_UNKNOWN)
    life.train("r5")
    check(life, "coder")


def check(life: Life, name: str) -> None:
    """`claas_store fsck` finds every digest and every parent of the adapter's versions as they should be."""
    known = ",".join(dict.fromkeys(names_of(life.head(name))))
    command = [sys.executable, "-m", "claas_store", "fsck", life.uri(name), "--known", known]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout
    for entry in life.head(name)["history"]:
        assert find_manifest(entry["uri"]) is not None, f"{entry['uri']} is in the history and gone"


def test_orphans_of_lost_attempts_go_and_a_bare_request_s_version_stays(life: Life) -> None:
    stage = life.stage
    settings = yaml.safe_load(life.config.read_text())
    settings["timings"] |= {"orphanGraceSeconds": 1}
    life.config.write_text(yaml.safe_dump(settings))
    stage.start_operator(life.config)
    life.create()
    stage.request("r1")
    lost = stage.worker()
    life.claim("r1")
    orphan = life.write("r1")  # whole, and never reported
    stage.kill_worker(lost)
    stage.worker()
    stage.wait("the second attempt", lambda: stage.see("r1").get("attempt") == 2)
    life.claim("r1")
    head = life.report("r1")
    stage.complete("r1")
    stage.request("bare", "", loraUri=head, baseModel=examples.BASE)
    life.claim("bare")
    kept = life.report("bare")
    stage.complete("bare")
    stage.api("DELETE", stage.request_path("bare"))
    stage.wait("the orphan to go", lambda: find_manifest(orphan) is None, 30)
    assert find_manifest(head) is not None
    assert find_manifest(kept) is not None, "no object names it any more, and it is the user's"
    stage.wait("the Event", lambda: [e for e in stage.events() if e["reason"] == Reason.SWEPT])


STEPS = 100


@pytest.mark.stress
@pytest.mark.timeout(900)
def test_a_hundred_steps_with_forks_a_rollback_and_dying_workers_leave_a_clean_chain(life: Life) -> None:
    stage, dice = life.stage, random.Random(7)
    stage.start_operator(life.config)
    life.create(retention={"keepLast": 5})
    worker, forks, killed = "", dict[str, str](), 0
    for i in range(1, STEPS + 1):
        name = f"r{i}"
        stage.request(name)
        while True:
            worker = worker or stage.worker()
            life.claim(name)
            fate = dice.random()
            if fate >= 0.1:
                break
            if fate < 0.05:
                life.write(name)
            stage.kill_worker(worker)
            worker, attempt = "", stage.see(name)["attempt"]
            killed += 1
            fresh = stage.worker()
            stage.wait("another attempt", lambda n=name, a=attempt: stage.see(n).get("attempt") == a + 1)
            worker = fresh
        life.report(name)
        stage.complete(name)
        if i in (30, 60):
            forks[f"fork{i}"] = life.head()["uri"]
            life.create(f"fork{i}", initFrom={"uri": life.head()["uri"]})
        if i == 70:
            back = life.head()["history"][-3]["version"]
            stage.change_adapter(rollbackTo=back)
            stage.wait("the rollback", lambda b=back: life.head()["version"] == b)
    assert killed > 3, "nothing died: nothing is shown"
    assert life.head()["headSeq"] == STEPS + 2, "one for each step, the first version and the rollback"
    stage.wait("the old ones to go", lambda: len(set(names_of(life.head()))) <= 5 + len(forks), 60)
    assert life.head()["totals"]["steps"] == STEPS
    for name in ("coder", *forks):
        check(life, name)
    for origin in forks.values():
        assert find_manifest(origin) is not None, "a fork's parent is never collected"
    assert len(objects(life)) <= 5 + len(forks) * 2 + killed
