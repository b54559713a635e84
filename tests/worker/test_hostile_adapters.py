"""What a worker that others share makes of adapters that were made to hurt it: a result that names the key, quickly."""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

import models
from claas_crds.adapter import Lora
from claas_crds.reasons import Reason
from claas_crds.request import Parent, Result
from claas_store.create import fresh_tensors, linear_shapes, peft_config
from claas_store.version import ADAPTER, CONFIG, MANIFEST
from trainee import BASE_MODEL, Trainee, tiny_student

LORA = Lora(r=4, target_modules=["q_proj", "v_proj"])
KEY = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"


@pytest.fixture(scope="module")
def shared_student() -> Any:
    return tiny_student()


@pytest.fixture
def trainee(shared_student: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Trainee:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    return Trainee(shared_student, tmp_path)


def weights() -> dict[str, Any]:
    return dict(fresh_tensors(linear_shapes(models.tiny_qwen_dir(), LORA.target_modules), LORA.r, "seed"))


def train_bare(trainee: Trainee, config: dict[str, Any], adapter: bytes | None = None) -> Result:
    """A request that names somebody's PEFT folder, which the worker adopts."""
    folder = trainee.folder / "theirs"
    folder.mkdir()
    (folder / CONFIG).write_text(json.dumps(peft_config(BASE_MODEL, LORA) | config))
    if adapter is not None:
        (folder / ADAPTER).write_bytes(adapter)
    elif not (folder / ADAPTER).exists():
        (folder / ADAPTER).write_bytes(safetensors.numpy.save(weights()))
    job = trainee.job(f"file://{folder}/")
    return trainee.step(dataclasses.replace(job, parent=Parent(uri=job.parent.uri, adapter_uid="")), [].append)


def refusal(trainee: Trainee, config: dict[str, Any], adapter: bytes | None = None) -> str:
    """What the worker says, which must be that the adapter is invalid, and soon."""
    start = time.monotonic()
    with pytest.raises(Exception, match="adapter") as caught:
        train_bare(trainee, config, adapter)
    assert caught.value.reason is Reason.ADAPTER_INVALID  # type: ignore[attr-defined]
    assert not caught.value.retryable  # type: ignore[attr-defined]
    assert time.monotonic() - start < 5
    assert not trainee.versions() or trainee.versions() == ["theirs"], "nothing was made of it"
    return str(caught.value)


def test_a_folder_of_plain_peft_is_trained_whatever_its_base_is_called_there(trainee: Trainee) -> None:
    result = train_bare(trainee, {"base_model_name_or_path": "/home/me/models/tiny"})
    assert result.outcome == "Succeeded"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({KEY: np.zeros((4, 127), np.float32)}, f"{KEY} has shape"),
        ({KEY: np.zeros((8, 128), np.float32)}, f"{KEY} has shape"),
        ({KEY: np.full((4, 128), np.nan, np.float32)}, f"{KEY} holds values that are not finite"),
        ({KEY: None}, f"lacks {KEY}"),
        ({KEY.replace("q_proj", "k_proj"): np.zeros((4, 128), np.float32)}, "k_proj"),
    ],
)
def test_keys_are_checked_against_the_base_one_by_one(trainee: Trainee, change: dict[str, Any], said: str) -> None:
    changed = {key: value for key, value in {**weights(), **change}.items() if value is not None}
    assert said in refusal(trainee, {}, safetensors.numpy.save(changed))


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": "another/model"}, "another/model"),
        ({"init_lora_weights": ["pissa"]}, "init_lora_weights"),
        ({"target_modules": "(.*)*x"}, "target_modules"),
        ({"rank_pattern": {"(a*)*": 8}}, "rank_pattern"),
        ({"auto_mapping": {"parent_library": "os"}}, "auto_mapping"),
    ],
)
def test_fields_that_would_hurt_are_named(trainee: Trainee, config: dict[str, Any], said: str) -> None:
    assert said in refusal(trainee, config)


def test_a_file_larger_than_any_adapter_of_the_base_is_not_read(trainee: Trainee) -> None:
    folder = trainee.folder / "theirs"
    folder.mkdir()
    with (folder / ADAPTER).open("wb") as file:
        file.truncate(3 * 2**30)  # sparse
    (folder / CONFIG).write_text(json.dumps(peft_config(BASE_MODEL, LORA)))
    uri = f"file://{folder}/"
    job = trainee.job(uri)
    with pytest.raises(Exception, match="3221225472 bytes, at most") as caught:
        trainee.step(dataclasses.replace(job, parent=Parent(uri=uri, adapter_uid="")), [].append)
    assert caught.value.reason is Reason.ADAPTER_INVALID  # type: ignore[attr-defined]
    files = {name: {"sha256": "0" * 64, "size": (folder / name).stat().st_size} for name in (CONFIG, ADAPTER)}
    (folder / MANIFEST).write_text(json.dumps({"baseModel": BASE_MODEL, "files": files}))
    with pytest.raises(Exception, match="3221225472 bytes, at most") as caught:
        trainee.step(job, [].append)
    assert caught.value.reason is Reason.ADAPTER_INVALID  # type: ignore[attr-defined]


def test_a_worker_goes_on_after_all_of_them(trainee: Trainee) -> None:
    refusal(trainee, {"use_dora": True})
    assert trainee.run(trainee.adapter("mine")).outcome == "Succeeded"
