"""What we write is PEFT's own format: plain PEFT loads it, on the real small model."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from transformers import AutoModelForCausalLM, AutoTokenizer

from claas_crds.adapter import Lora
from claas_store.create import create_adapter, peft_config
from claas_store.version import Manifest, OptimizerState, ParentVersion, Version, read_version, write_version
from models import smollm2_dir

BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"


@pytest.fixture(scope="module")
def folder() -> Path:
    return smollm2_dir()


@pytest.fixture
def base(folder: Path) -> torch.nn.Module:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture
def ids(folder: Path) -> torch.Tensor:
    text = AutoTokenizer.from_pretrained(folder)("Die Hauptstadt von Frankreich heißt Paris.", return_tensors="pt")
    return text["input_ids"]  # (1, T)


@torch.no_grad()
def logits(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids).logits[0]  # (T, V)


def assert_loads(model: PeftModel, version: Version) -> None:
    """Every tensor of the version is in the model, and the model has no other LoRA weight."""
    loaded = get_peft_model_state_dict(model, save_embedding_layers=False)
    assert loaded.keys() == version.tensors.keys()
    for name, value in version.tensors.items():
        np.testing.assert_array_equal(loaded[name].numpy(), value)


def test_plain_peft_loads_a_fresh_adapter_and_a_later_version(
    folder: Path, base: torch.nn.Module, ids: torch.Tensor, root: Path
) -> None:
    before = logits(base, ids)
    first = create_adapter(f"file://{root}/coder", BASE, folder, Lora(), "uid")
    model = PeftModel.from_pretrained(base, root / "coder").eval()
    assert_loads(model, first)
    assert len(first.tensors) == 30 * 7 * 2, "seven linear layers in each of 30 blocks"
    assert torch.equal(logits(model, ids), before), "a fresh adapter must not change one bit"

    random = np.random.default_rng(0)
    moved = {
        name: value + (random.standard_normal(value.shape, dtype=np.float32) * 0.02 if "lora_B" in name else 0)
        for name, value in first.tensors.items()
    }
    state = OptimizerState(1, 16, tuple(sorted(Lora().target_modules)), moved, moved)
    parent = ParentVersion(uri=first.uri, sha256=first.manifest_sha256)
    uri = f"file://{root}/coder-20261123-191007-9f2c4d1e"
    write_version(uri, first.config, moved, state, Manifest(base_model=BASE, parent=parent, request_uid="9f2c4d1e"))
    later = read_version(uri)
    model.load_adapter(root / "coder-20261123-191007-9f2c4d1e", "later")
    model.set_adapter("later")
    after = logits(model, ids)
    assert not torch.allclose(after, before, atol=0.1), "the later version has an effect"
    fresh = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    alone = PeftModel.from_pretrained(fresh, root / "coder-20261123-191007-9f2c4d1e").eval()
    assert_loads(alone, later)
    assert torch.equal(logits(alone, ids), after)


def test_the_config_is_what_peft_would_write(tmp_path: Path) -> None:
    lora = Lora(r=8, alpha=12.5, target_modules=["v_proj", "q_proj"])
    ours = peft_config(BASE, lora)
    LoraConfig(
        r=8,
        lora_alpha=12.5,  # type: ignore[arg-type]
        target_modules=["q_proj", "v_proj"],
        base_model_name_or_path=BASE,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(tmp_path))
    theirs = json.loads((tmp_path / "adapter_config.json").read_text())
    assert {**ours, "target_modules": set(ours["target_modules"])} == {
        name: set(value) if name == "target_modules" else value for name, value in theirs.items() if name in ours
    }
    (tmp_path / "adapter_config.json").write_text(json.dumps(ours))
    read = LoraConfig.from_pretrained(str(tmp_path))
    assert read.to_dict() == {**LoraConfig(**theirs).to_dict(), "peft_version": read.to_dict()["peft_version"]}


def test_weights_are_drawn_as_peft_draws_them(folder: Path, base: torch.nn.Module, root: Path) -> None:
    """The same bounds and spread as PEFT's own initialisation, layer by layer."""
    ours = create_adapter(f"file://{root}/coder", BASE, folder, Lora(r=64), "uid").tensors
    config = LoraConfig(r=64, lora_alpha=32, target_modules=Lora().target_modules, task_type="CAUSAL_LM")
    theirs = get_peft_model_state_dict(get_peft_model(base, config), save_embedding_layers=False)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].shape == tuple(value.shape)
        assert np.abs(ours[name]).max() == pytest.approx(float(value.abs().max()), rel=0.01)
        assert np.std(ours[name]) == pytest.approx(float(value.std()), rel=0.03)
