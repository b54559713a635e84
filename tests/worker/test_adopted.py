"""An adapter that plain PEFT trained elsewhere: adopted, trained on by real steps, and still PEFT's and vLLM's own.

On the real SmolLM2, since vLLM must answer as PEFT does: token by token, greedily.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import peft
import pytest
import torch
import transformers

import models
from claas_crds.adapter import Lora
from claas_store.create import init_adapter
from claas_store.fsck import fsck
from claas_store.version import Version, read_version
from claas_worker.student import Student
from trainee import Trainee
from vllmserver import SMOLLM2_FLAGS, cache_environment, vllm_server

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TARGETS = ["q_proj", "v_proj"]
RANK = 8
PROMPTS = ("What is the capital of France?", "Name a colour.", "Write one line about the sea.")
LESSONS = (
    {"prompt": PROMPTS[0], "response": "It is the city of Paris.", "feedback": "One word only.", "solution": "Paris."},
    {"prompt": PROMPTS[1], "response": "A nice colour is blue.", "feedback": "In capitals.", "solution": "BLUE"},
    {"prompt": PROMPTS[2], "response": "The sea is wide.", "feedback": "Mention salt.", "solution": "Salt and foam."},
)


def base() -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(models.smollm2_dir(), dtype=torch.float32)


def train_elsewhere(folder: Path) -> None:
    """A user's own script: PEFT and a few steps of AdamW, saved as PEFT saves; the base by its path on that machine."""
    torch.manual_seed(0)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.smollm2_dir())
    config = peft.LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.05, target_modules=TARGETS)
    model = peft.get_peft_model(base(), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    ids = tokenizer("A short answer is a good answer: yes, no, Paris, blue, salt.", return_tensors="pt")["input_ids"]
    for _ in range(6):
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(str(folder))


@pytest.fixture(scope="module")
def adopted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Version, Version]:
    """The adapter as it was adopted where it lies, and what three steps made of it."""
    root = tmp_path_factory.mktemp("adopted")
    train_elsewhere(root / "theirs")
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLAAS_FILE_ROOTS", str(root))
        lora = Lora(r=RANK, alpha=16, target_modules=TARGETS)
        uri = f"file://{root}/theirs/"
        first = version = init_adapter(uri, BASE_MODEL, models.smollm2_dir(), uri, lora, "uid")
        student = Student.load(models.smollm2_dir(), base_model=BASE_MODEL, device="cpu", threads=2)
        trainee = Trainee(student, root)
        for lesson in LESSONS:
            version = trainee.train(version.uri, [lesson], training={"learningRate": 1e-3})
        report = fsck(version.uri)
        assert (report.ok, report.versions, report.findings) == (True, 4, [])
    return first, version


def folder_of(version: Version) -> Path:
    return Path(version.uri.removeprefix("file://"))


def prompt_ids(prompt: str) -> list[int]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.smollm2_dir())
    chat = [{"role": "user", "content": prompt}]
    ids: list[int] = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
    return ids


def greedy(model: Any, ids: Sequence[int], count: int = 24) -> list[int]:
    """The next `count` token ids by PEFT, fewer where the model ends."""
    with torch.no_grad():
        out = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=count, do_sample=False)
    found: list[int] = out[0, len(ids) :].tolist()
    return found


def test_it_is_adopted_as_it_is_and_trained_on(adopted: tuple[Version, Version]) -> None:
    first, last = adopted
    assert first.manifest.adapter_uid == "uid"
    assert first.config["r"] == RANK
    assert last.optimizer is not None
    assert last.optimizer.step == 3
    assert last.config == first.config, "PEFT's own words stay, whatever they were"
    assert last.tensors.keys() == first.tensors.keys()
    assert any(not np.array_equal(last.tensors[key], first.tensors[key]) for key in last.tensors)


def test_every_version_loads_in_plain_peft(adopted: tuple[Version, Version]) -> None:
    answers = []
    for version in adopted:
        model = peft.PeftModel.from_pretrained(base(), folder_of(version)).eval()
        loaded = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        assert loaded.keys() == version.tensors.keys()
        for key, value in version.tensors.items():
            np.testing.assert_array_equal(loaded[key].numpy(), value)
        with torch.no_grad():
            answers.append(model(input_ids=torch.tensor([prompt_ids(PROMPTS[0])])).logits)
    assert not torch.equal(*answers), "three steps changed what it says"


@pytest.mark.stress
@pytest.mark.vllm
def test_vllm_loads_it_and_says_what_peft_says(adopted: tuple[Version, Version], tmp_path: Path) -> None:
    """`/v1/load_lora_adapter` of the adopted and of the trained version; a name of its own for each."""
    flags = [*SMOLLM2_FLAGS, "--enable-lora", "--max-lora-rank", str(RANK), "--max-loras", "2"]
    environment = cache_environment() | {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    said: dict[tuple[int, str], list[int]] = {}
    with vllm_server(models.smollm2_dir(), *flags, log=tmp_path / "log", environment=environment) as server:
        with httpx.Client(base_url=server.url, timeout=60, trust_env=False) as http:
            for number, version in enumerate(adopted):
                load = {"lora_name": f"version-{number}", "lora_path": str(folder_of(version))}
                answer = http.post("/v1/load_lora_adapter", json=load)
                assert answer.status_code == 200, answer.text
                for prompt in PROMPTS:
                    ask = {"model": f"version-{number}", "prompt": prompt_ids(prompt), "max_tokens": 24}
                    ask |= {"temperature": 0, "return_token_ids": True}
                    answer = http.post("/v1/completions", json=ask)
                    assert answer.status_code == 200, answer.text
                    said[number, prompt] = answer.json()["choices"][0]["token_ids"]
    for number, version in enumerate(adopted):
        model = peft.PeftModel.from_pretrained(base(), folder_of(version)).eval()
        for prompt in PROMPTS:
            assert said[number, prompt] == greedy(model, prompt_ids(prompt)), (number, prompt)
    assert [said[0, prompt] for prompt in PROMPTS] != [said[1, prompt] for prompt in PROMPTS]


def test_a_version_is_read_back_where_its_root_is_named(adopted: tuple[Version, Version]) -> None:
    _, last = adopted
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("CLAAS_FILE_ROOTS", os.path.dirname(folder_of(last)))
        assert read_version(last.uri).manifest == last.manifest
