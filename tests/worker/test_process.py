"""The worker as a process: `run-request`, and death at the worst moments."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

import models
from claas_crds import names
from claas_crds.adapter import Lora
from claas_store.create import create_adapter
from claas_store.version import read_version
from cluster.controlplane import ControlPlane
from operatorstage import apply_crds
from workerstage import MODEL, REAL, WorkerStage

IDS = list(range(1000, 1032))
# Chosen tokens alone: a random model has nothing to say about feedback, but it can learn these.
SAMPLE = {"prompt": "Count.", "responseTokenIds": IDS, "teacherLogprobs": [-1.0] * len(IDS)}


def adapter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(folder))
    return create_adapter(f"file://{folder}/versions/a/", MODEL, models.tiny_qwen_dir(), Lora(r=4), "seed").uri


def spec(uri: str, **more: Any) -> dict[str, Any]:
    return {"loraUri": uri, "samples": [SAMPLE], "teacher": {"mode": "Provided"}} | more


def run_request(folder: Path, content: dict[str, Any], before: str = "") -> subprocess.CompletedProcess[str]:
    """`python -m claas_worker run-request`, with a line of Python before it."""
    manifest = {
        "apiVersion": names.API_VERSION,
        "kind": names.REQUEST_KIND,
        "metadata": {"name": "dr"},
        "spec": content,
    }
    file = folder / "request.yaml"
    file.write_text(yaml.safe_dump(manifest))
    program = f"{before}\nimport sys\nfrom claas_worker.__main__ import main\nsys.exit(main())"
    flags = ["--model-path", str(models.tiny_qwen_dir()), "--base-model", MODEL, "--threads", "2"]
    return subprocess.run(
        [sys.executable, "-c", program, "run-request", str(file), *flags],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=120,
        check=False,
    )


def test_run_request_prints_the_status(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = adapter(tmp_path, monkeypatch)
    done = run_request(tmp_path, spec(uri))
    assert done.returncode == 0, done.stderr
    status = json.loads(done.stdout)
    assert status["state"] == "Complete"
    assert status["result"]["outcome"] == "Succeeded"
    assert status["metadata"]["tokensProcessed"] == len(IDS)
    assert read_version(status["loraUri"]).manifest.parent is not None
    assert {"loadMs", "teacherMs", "stepMs", "saveMs"} <= status["timings"].keys()


def test_run_request_says_what_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    uri = adapter(tmp_path, monkeypatch)
    done = run_request(tmp_path, spec(uri, samples=[SAMPLE | {"teacherLogprobs": [-1.0]}]))
    assert done.returncode == 1
    assert json.loads(done.stdout)["reason"] == "LogprobLengthMismatch"
    refused = run_request(tmp_path, {"adapterRef": {"name": "coder"}, "samples": [{"prompt": "x", "response": "y"}]})
    assert refused.returncode == 1
    assert "spec.loraUri is needed" in refused.stderr


def test_death_between_the_files_and_the_manifest_leaves_no_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process kills itself where the manifest would be written: three files, and no version."""
    uri = adapter(tmp_path, monkeypatch)
    die = "import os, claas_store.version as v\nv.put_manifest = lambda *_: os.kill(os.getpid(), 9)"
    done = run_request(tmp_path, spec(uri), before=die)
    assert done.returncode == -signal.SIGKILL
    (left,) = (path for path in (tmp_path / "versions").iterdir() if path.name != "a")
    assert sorted(path.name for path in left.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "optimizer.safetensors",
    ]


@pytest.fixture
def stage(control_plane: ControlPlane, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[WorkerStage]:
    apply_crds(control_plane)
    with WorkerStage(control_plane, tmp_path, request.node.name) as made:
        yield made


@pytest.mark.controlplane
def test_kill_9_in_mid_step_leaves_no_version_and_the_next_attempt_makes_one(
    stage: WorkerStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = adapter(stage.folder, monkeypatch)
    process = stage.start(REAL, MODEL_PATH=str(models.tiny_qwen_dir()))
    stage.wait_state(names.STATE_READY, 90)
    name = stage.request(**spec(uri, training={"innerSteps": 16}))
    stage.bind(name)
    stage.wait("the step", lambda: stage.status(name).get("progress", {}).get("phase") == "Stepping", 60)
    process.kill()
    process.wait(timeout=10)
    stage.processes.clear()
    assert "result" not in stage.status(name)
    versions = stage.folder / "versions"
    assert sorted(str(path.relative_to(versions)) for path in versions.rglob("claas.json")) == ["a/claas.json"]

    stage.start(REAL, MODEL_PATH=str(models.tiny_qwen_dir()))  # the kubelet's restart, for a Pod of another name
    stage.wait_state(names.STATE_READY, 90)
    stage.bind(name, attempt=2)
    result = stage.wait_result(name, 60)
    assert (result["outcome"], result["attempt"]) == ("Succeeded", 2)
    assert result["loraUri"].endswith("-a2/")
    assert read_version(result["loraUri"]).manifest.request_uid == stage.uid(name)


@pytest.mark.controlplane
def test_two_adapters_bound_together_are_trained_in_one_batched_step(
    stage: WorkerStage, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = adapter(stage.folder, monkeypatch)
    second = create_adapter(f"file://{stage.folder}/versions/b/", MODEL, models.tiny_qwen_dir(), Lora(r=4), "seed").uri
    bound = [stage.bound("", **spec(uri)) for uri in (first, second)]
    stage.start(REAL, MODEL_PATH=str(models.tiny_qwen_dir()), BATCH="2")
    results = [stage.wait_result(name, 90) for name in bound]
    assert [result["outcome"] for result in results] == ["Succeeded", "Succeeded"]
    assert results[0]["gpuMs"] == results[1]["gpuMs"], "each has its share of one step"
    for name, result, uri in zip(bound, results, (first, second), strict=True):
        manifest = read_version(result["loraUri"]).manifest
        assert manifest.request_uid == stage.uid(name)
        assert manifest.parent is not None
        assert manifest.parent.uri == uri
