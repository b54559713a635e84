"""A small version to write, and a small base model's folder to create adapters for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from claas_crds.adapter import Lora
from claas_crds.request import Metadata
from claas_store.create import peft_config
from claas_store.version import Manifest, OptimizerState, ParentVersion, TeacherUsed

BASE = "example/tiny"
LORA = Lora(r=4, alpha=8, target_modules=["q_proj", "down_proj"])
CONFIG = peft_config(BASE, LORA)
UID = "9f2c4d1e-0000-4000-8000-000000000000"
PARENT = ParentVersion(uri="s3://adapters/coder/", sha256="0" * 64)
NUMBERS = Metadata(
    total_loss=0.25,
    pg_loss=0.125,
    jsd_reg=0.125,
    mean_advantage=-0.5,
    frac_positive_advantage=0.25,
    mean_is_ratio=1.0,
    clip_fraction=0.0,
    grad_norm=3.5,
    tokens_processed=17,
)


def tensors(seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """Weights of an adapter of `model_dir`'s model, as LORA makes it: two layers, two modules in each."""
    random = np.random.default_rng(seed)
    made = {}
    for layer in range(2):
        name = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        made[f"{name}.lora_A.weight"] = random.standard_normal((4, 24), dtype=np.float32)
        made[f"{name}.lora_B.weight"] = random.standard_normal((16, 4), dtype=np.float32)
        name = f"base_model.model.model.layers.{layer}.mlp.down_proj"
        made[f"{name}.lora_A.weight"] = random.standard_normal((4, 40), dtype=np.float32)
        made[f"{name}.lora_B.weight"] = random.standard_normal((24, 4), dtype=np.float32)
    return dict(sorted(made.items()))


def optimizer(step: int = 3) -> OptimizerState:
    """AdamW's state of `tensors`."""
    return OptimizerState(step, 4, ("down_proj", "q_proj"), tensors(1), tensors(2))


def manifest(attempt: int = 1) -> Manifest:
    """What a worker would say of its step."""
    return Manifest(
        base_model=BASE,
        parent=PARENT,
        request_uid=UID,
        attempt=attempt,
        training={"learningRate": 1e-4, "preset": "default", "truncateResponse": None},
        metadata=NUMBERS,
        teacher=TeacherUsed(id="example/teacher", mode="Server"),
        template_id="hindsight-1",
    )


def model_dir(folder: Path) -> Path:
    """A base model of two layers in two files, as a hub ships it; only headers and shapes matter here."""
    folder.mkdir(parents=True)
    weights: dict[str, NDArray[np.float16]] = {
        "model.embed_tokens.weight": np.zeros((32, 24), np.float16),
        "model.norm.weight": np.zeros(24, np.float16),
    }
    for layer in range(2):
        weights[f"model.layers.{layer}.self_attn.q_proj.weight"] = np.zeros((16, 24), np.float16)
        weights[f"model.layers.{layer}.self_attn.q_proj.bias"] = np.zeros(16, np.float16)
        weights[f"model.layers.{layer}.mlp.down_proj.weight"] = np.zeros((24, 40), np.float16)
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[::2], names[1::2])):
        file = f"model-{number}.safetensors"
        safetensors.numpy.save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    (folder / "config.json").write_text("{}")
    return folder
