"""Model folders: whole or not there, filled once, without pickles."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from claas_store.errors import ArgumentInvalid, NotFound, StorageUnavailable
from claas_store.models import MARKER, fetch_model, wait_model
from claas_store.stores import open_store
from store import examples
from store.hub import serving

SHIPPED = {"config.json", "model.safetensors.index.json", "model-0.safetensors", "model-1.safetensors", "chat.jinja"}


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """What a hub ships: beside the model, things that must not be fetched."""
    folder = examples.model_dir(tmp_path / "model")
    (folder / "chat.jinja").write_text("{{ messages }}")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "consolidated.safetensors").write_bytes(b"twice the same")
    (folder / "original").mkdir()
    (folder / "original" / "params.json").write_text("{}")
    return folder


def source_of(kind: str, model: Path, request: pytest.FixtureRequest) -> str:
    """The model folder, as a source of this kind."""
    if kind == "file":
        return f"file://{model}"
    bucket = str(request.getfixturevalue("bucket"))
    for path in model.rglob("*"):
        if path.is_file():
            open_store(bucket).put(f"{bucket}{path.relative_to(model)}", path.read_bytes())
    return bucket


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_fetch(kind: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    source, target = source_of(kind, model, request), tmp_path / "volume" / "student"
    fetch_model(source, target)
    assert {path.name for path in target.iterdir()} == SHIPPED | {MARKER}
    for name in SHIPPED:
        assert (target / name).read_bytes() == (model / name).read_bytes()
    wait_model(target, 0)
    before = {path.name: path.stat().st_mtime_ns for path in target.iterdir()}
    fetch_model(source, target)
    assert {path.name: path.stat().st_mtime_ns for path in target.iterdir()} == before, "doing it again does nothing"
    with pytest.raises(ArgumentInvalid, match="use another folder"):
        fetch_model("hub:another/model", target)


@pytest.mark.parametrize("kind", ["file", "s3"])
def test_a_killed_fetch_is_not_whole_and_goes_on(
    kind: str, model: Path, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    source, target = source_of(kind, model, request), tmp_path / "student"
    code = f"""
import os, pathlib, signal
from claas_store import models
real, left = models._sync, [3]
def sync(path):
    left[0] -= 1
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)
    real(path)
models._sync = sync
models.fetch_model({source!r}, pathlib.Path({str(target)!r}))
"""
    done = subprocess.run([sys.executable, "-c", code], env=environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    whole = {path.name for path in target.iterdir() if not path.name.startswith(".")}
    assert len(whole) == 2
    for name in whole:
        assert (target / name).read_bytes() == (model / name).read_bytes()
    with pytest.raises(StorageUnavailable, match="not complete"):
        wait_model(target, 0)
    fetch_model(source, target)
    assert {path.name for path in target.iterdir() if not path.name.startswith(".")} == SHIPPED


def test_waiting_ends_when_the_model_is_there(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "student"
    thread = threading.Thread(target=fetch_model, args=(f"file://{model}", target))
    threading.Timer(0.5, thread.start).start()
    wait_model(target, 30)
    assert (target / "config.json").exists()


def test_waiting_ends_when_time_is_up(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(StorageUnavailable, match=r"not complete after 0\.5 s"):
        wait_model(tmp_path / "student", 0.5)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("file:///nowhere/at/all", NotFound),
        ("http://example.com/model", ArgumentInvalid),
        ("Qwen/Qwen2.5", ArgumentInvalid),
        ("hub:", ArgumentInvalid),
        ("hub:a/b/c", ArgumentInvalid),
    ],
)
def test_sources_that_are_none(source: str, error: type[Exception], tmp_path: Path) -> None:
    with pytest.raises(error):
        fetch_model(source, tmp_path / "student")
    assert not (tmp_path / "student" / MARKER).exists()


def test_pickled_weights_are_no_model(tmp_path: Path) -> None:
    source = tmp_path / "model"
    source.mkdir()
    (source / "config.json").write_text("{}")
    (source / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(ArgumentInvalid, match="no safetensors model"):
        fetch_model(f"file://{source}", tmp_path / "student")
    assert not (tmp_path / "student" / MARKER).exists()


def environment(**more: str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": ":".join(path for path in sys.path if path), **more}


def fetch_in_process(source: str, target: Path, hub: str, tmp_path: Path) -> dict[str, object]:
    """The command, because huggingface_hub reads HF_ENDPOINT when it is imported; gives its answer."""
    command = [sys.executable, "-m", "claas_store", "fetch-model", "--source", source, "--target", str(target)]
    settings = {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf"), "CLAAS_TERMINATION_LOG": str(tmp_path / "answer")}
    done = subprocess.run(command, env=environment(**settings), capture_output=True, text=True, timeout=120)
    answer: dict[str, object] = json.loads((tmp_path / "answer").read_text())
    assert done.returncode == (0 if answer["ok"] else 1), done.stderr
    return answer


def test_fetch_from_a_hub(model: Path, tmp_path: Path) -> None:
    target = tmp_path / "student"
    with serving(model, "example/tiny") as hub:
        answer = fetch_in_process("hub:example/tiny@main", target, hub, tmp_path)
        assert answer == {"ok": True, "target": str(target)}
        assert {path.name for path in target.iterdir() if not path.name.startswith(".")} == SHIPPED
        missing = fetch_in_process("hub:example/none", tmp_path / "none", hub, tmp_path)
        assert (missing["ok"], missing["retryable"]) == (False, False)
    down = fetch_in_process("hub:example/tiny", tmp_path / "down", hub, tmp_path)
    assert (down["reason"], down["retryable"]) == ("StorageUnavailable", True)
    assert not (tmp_path / "down" / MARKER).exists()
