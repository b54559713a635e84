"""What an adapter says, by plain PEFT and nothing of ours: the proof that a step did what its numbers claim."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from claas_store.stores import open_store

PEFT_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Judge:
    """The base model, to be asked with any adapter on."""

    def __init__(self, model_dir: Path) -> None:
        transformers.utils.logging.disable_progress_bar()
        self._dir = model_dir
        self._tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)

    def log_probabilities(self, adapter_uri: str, prompt: str, responses: list[str]) -> list[float]:
        """Sum of the log-probabilities (nats) of each response after `prompt`, with the version at `adapter_uri`."""
        model = transformers.AutoModelForCausalLM.from_pretrained(self._dir, dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            for name in PEFT_FILES:
                (Path(folder) / name).write_bytes(open_store(adapter_uri).get(adapter_uri + name))
            adapted = peft.PeftModel.from_pretrained(model, folder).eval()
        return [self._score(adapted, prompt, response) for response in responses]

    def _score(self, model: Any, prompt: str, response: str) -> float:
        chat = [{"role": "user", "content": prompt}]
        prefix = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        answer = self._tokenizer(response, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(torch.tensor([prefix + answer])).logits[0, len(prefix) - 1 : -1]  # (N, V)
        return float(torch.log_softmax(logits, -1).gather(1, torch.tensor(answer)[:, None]).sum())
