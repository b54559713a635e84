"""The fingerprint: equal for one tokenizer however it is loaded, different once an id could mean something else."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import models
from claas_teacher.fingerprint import fingerprint


@pytest.fixture(scope="module")
def folder() -> Path:
    return models.smollm2_dir()


@pytest.fixture(scope="module")
def original(folder: Path) -> str:
    return fingerprint(load(folder))


def load(folder: Path, **options: Any) -> Any:
    return AutoTokenizer.from_pretrained(folder, **options)


def test_it_is_the_same_in_another_process_by_another_loader(folder: Path, original: str) -> None:
    program = (
        "import sys; from types import SimpleNamespace; from tokenizers import Tokenizer;"
        "from claas_teacher.fingerprint import fingerprint;"
        "print(fingerprint(SimpleNamespace(backend_tokenizer=Tokenizer.from_file(sys.argv[1]))))"
    )
    command = [sys.executable, "-c", program, str(folder / "tokenizer.json")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == original


def test_use_and_loading_options_do_not_change_it(folder: Path, original: str) -> None:
    tokenizer = load(folder, padding_side="left", truncation_side="left", model_max_length=77)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer(
        ["one", "two words here"], padding=True, truncation=True, max_length=3
    )  # leaves its settings in the backend
    assert fingerprint(tokenizer) == original


def test_a_saved_copy_has_the_same(folder: Path, original: str, tmp_path: Path) -> None:
    load(folder).save_pretrained(tmp_path)
    assert fingerprint(load(tmp_path)) == original


def test_merges_of_the_older_file_format_are_the_same(folder: Path, original: str, tmp_path: Path) -> None:
    def as_strings(state: dict[str, Any]) -> None:
        state["model"]["merges"] = [" ".join(merge) for merge in state["model"]["merges"]]

    assert fingerprint(changed(folder, tmp_path, as_strings)) == original


def test_another_model_has_another(folder: Path, original: str) -> None:
    assert fingerprint(load(models.qwen_tokenizer_dir())) != original


def test_an_added_token_changes_it(folder: Path, original: str) -> None:
    tokenizer = load(folder)
    tokenizer.add_tokens(["<|feedback|>"])
    assert fingerprint(tokenizer) != original


def swap_two_words(state: dict[str, Any]) -> None:
    vocabulary = state["model"]["vocab"]
    first, second = list(vocabulary)[300:302]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]


def swap_two_merges(state: dict[str, Any]) -> None:
    merges = state["model"]["merges"]
    merges[10], merges[11] = merges[11], merges[10]


@pytest.mark.parametrize("change", [swap_two_words, swap_two_merges])
def test_a_changed_vocabulary_or_merge_changes_it(
    folder: Path, original: str, tmp_path: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    assert fingerprint(changed(folder, tmp_path, change)) != original


def test_a_tokenizer_without_tokenizer_json_is_refused_by_name() -> None:
    class Slow:
        pass

    with pytest.raises(TypeError, match=r"Slow is no fast tokenizer.*tokenizer\.json"):
        fingerprint(Slow())


def changed(folder: Path, scratch: Path, change: Callable[[dict[str, Any]], None]) -> Any:
    """The tokenizer of `folder` with `change` made to its tokenizer.json."""
    for name in ("tokenizer_config.json", "config.json"):
        shutil.copyfile(folder / name, scratch / name)
    state = json.loads((folder / "tokenizer.json").read_text())
    change(state)
    (scratch / "tokenizer.json").write_text(json.dumps(state))
    return load(scratch)
