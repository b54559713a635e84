"""The base model's weights, read while the libraries are imported: the same model as `from_pretrained` gives."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers.pre_tokenizers import ByteLevel

from claas_worker.student import Student
from claas_worker.weights import Weights

SMALL = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CONFIGS = {
    "tied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=True),
    "untied": transformers.Qwen2Config(**SMALL, tie_word_embeddings=False),
    "llama3 rope": transformers.LlamaConfig(**SMALL, rope_parameters=LLAMA3_ROPE),
    "norms of q and k": transformers.Qwen3Config(**SMALL, head_dim=16),
}


def folder_of(config: Any, folder: Path, **options: Any) -> Path:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.save_pretrained(folder, **options)
    letters = {letter: number for number, letter in enumerate(sorted(ByteLevel.alphabet()))}
    transformers.Qwen2Tokenizer(vocab=letters, merges=[]).save_pretrained(folder)
    return folder


def assert_as_from_pretrained(folder: Path) -> None:
    """Bit for bit the same logits, weights and buffers, and nothing left without memory."""
    ours = Student.load(folder, device="cpu").model
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    ids = torch.arange(90)[None]
    with torch.no_grad():
        assert torch.equal(ours(input_ids=ids).logits, theirs(input_ids=ids).logits)
    assert {name: (t.dtype, t.device) for name, t in ours.named_parameters()} == {
        name: (t.dtype, t.device) for name, t in theirs.named_parameters()
    }
    assert dict(ours.named_buffers()).keys() == dict(theirs.named_buffers()).keys()
    tied = ours.get_output_embeddings().weight is ours.get_input_embeddings().weight
    assert tied == theirs.config.tie_word_embeddings


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_model_is_what_from_pretrained_gives(kind: str, tmp_path: Path) -> None:
    assert_as_from_pretrained(folder_of(CONFIGS[kind], tmp_path / "model"))


def test_weights_in_several_files(tmp_path: Path) -> None:
    folder = folder_of(CONFIGS["tied"], tmp_path / "model", max_shard_size="40KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    assert_as_from_pretrained(folder)


def test_names_that_are_not_the_modules_are_left_to_transformers(tmp_path: Path) -> None:
    """A base model's file, whose names lack the first word."""
    folder = folder_of(CONFIGS["tied"], tmp_path / "model")
    file = folder / "model.safetensors"
    renamed = {name.removeprefix("model."): tensor for name, tensor in load_file(file).items()}
    save_file(renamed, file, metadata={"format": "pt"})
    assert_as_from_pretrained(folder)


def test_a_head_in_the_file_of_a_model_that_ties_it(tmp_path: Path) -> None:
    folder = folder_of(CONFIGS["tied"], tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()}, file, {"format": "pt"})
    assert_as_from_pretrained(folder)


def test_the_file_may_change_afterwards(tmp_path: Path) -> None:
    folder = folder_of(CONFIGS["tied"], tmp_path / "model")
    file = folder / "model.safetensors"
    save_file({name: tensor.float() for name, tensor in load_file(file).items()}, file, {"format": "pt"})  # not cast
    tensors = Weights(folder, "cpu").take()
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    with file.open("r+b") as content:
        content.seek(-(1 << 15), 2)
        content.write(bytes(1 << 15))
    assert all(torch.equal(before[name], tensor) for name, tensor in tensors.items())


def test_no_such_folder(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="--model-path"):
        Weights(tmp_path / "nothing")


def test_reading_begins_before_the_long_imports(tmp_path: Path) -> None:
    folder = folder_of(CONFIGS["tied"], tmp_path / "model")
    program = (
        "import sys; from pathlib import Path; from claas_worker.weights import Weights\n"
        f"weights = Weights(Path({str(folder)!r}), 'cpu').take()\n"
        "assert weights and not {'transformers', 'peft'} & sys.modules.keys(), 'imported too early'"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)


@pytest.fixture
def silent_teacher() -> Iterator[tuple[str, list[str]]]:
    """Counts who asks for what, and answers 503."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


def test_the_teacher_is_asked_while_the_model_loads_and_may_be_away(
    tmp_path: Path, silent_teacher: tuple[str, list[str]], caplog: pytest.LogCaptureFixture
) -> None:
    import gc

    from claas_worker.__main__ import load_step
    from claas_worker.config import StepSettings

    url, asked = silent_teacher
    folder = folder_of(CONFIGS["tied"], tmp_path / "model")
    with caplog.at_level("INFO", "claas_worker"):
        load_step(StepSettings(folder, "", url, "cpu", 0, 64, 64, 64))
        assert gc.isenabled()
        for thread in threading.enumerate():
            if thread.name == "teacher":
                thread.join(timeout=20)
    assert asked[:1] == ["/claas/v1/info"]
    assert "the teacher does not answer yet" in caplog.messages
    assert json.dumps(caplog.messages).count("model loaded") == 1
