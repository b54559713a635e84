"""The student: one frozen base model in memory, and the one LoRA adapter that a step trains on it.

The base stays bit-identical whatever happens: its parameters never require gradients, and when an adapter leaves, every
linear layer that the model was loaded with is put back into its place. So nothing of an adapter can stay, neither of
one with more target modules or another rank, nor of one whose loading failed half-way.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from claas_teacher.fingerprint import fingerprint
from claas_worker.errors import AdapterInvalid
from claas_worker.job import Unfit

log = logging.getLogger(__name__)

PREFIX = "base_model.model."  # of every key in PEFT's adapter_model.safetensors
NAME = "default"  # PEFT's name of the adapter inside the model; it is not part of the keys

# Fields of adapter_config.json that shape the adapter; and those that change neither its forward pass nor its gradient.
USED_FIELDS = frozenset({"r", "lora_alpha", "target_modules", "exclude_modules", "rank_pattern", "alpha_pattern"}) | {
    "use_rslora",
    "layers_to_transform",
    "layers_pattern",
}
FREE_FIELDS = frozenset({"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"}) | {
    "revision",
    "inference_mode",
    "lora_dropout",
    "init_lora_weights",
    "fan_in_fan_out",
}
# Initializations that leave the base as it is. PiSSA, OLoRA, LoftQ ... store adapters of a changed base.
PLAIN_INITIALIZATIONS = frozenset({True, False, None, "gaussian", "eva", "orthogonal"})


class Context(NamedTuple):
    """A prefix and the response that follows it, as token ids."""

    prefix_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.prefix_ids) + len(self.response_ids)


class Adapter:
    """A LoRA adapter in the model: its fp32 parameters by their keys in adapter_model.safetensors."""

    def __init__(self, config: Mapping[str, Any], parameters: dict[str, nn.Parameter], layers: list[LoraLayer]) -> None:
        self.config = dict(config)
        self.parameters = parameters
        self._layers = layers

    def tensors(self) -> dict[str, np.ndarray[Any, np.dtype[np.float32]]]:
        """The weights, copied."""
        return {key: parameter.detach().cpu().numpy().copy() for key, parameter in self.parameters.items()}

    @contextlib.contextmanager
    def off(self) -> Iterator[None]:
        """The base model alone."""
        for layer in self._layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)


class Student:
    """The base model of one worker with its tokenizer.

    Attributes:
        base_model: its id, as adapters name it; empty: adapters of any base are taken as they come.
        head: (V, d) the lm_head, frozen.
        fingerprint: of the tokenizer, to compare with the teacher's.
    """

    def __init__(self, model: Any, tokenizer: Any, *, base_model: str = "", micro_batch_tokens: int = 4096) -> None:
        self.model = model.eval().requires_grad_(False)  # dropout off
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.fingerprint = fingerprint(tokenizer)
        self.head: Tensor = model.get_output_embeddings().weight
        self.device = self.head.device
        self._micro_batch_tokens = micro_batch_tokens
        self._head_name = next(n for n, module in model.named_modules() if module is model.get_output_embeddings())
        self._modules = dict(model.named_modules())

    @classmethod
    def load(
        cls, path: Path, *, base_model: str = "", device: str = "auto", threads: int = 0, micro_batch_tokens: int = 4096
    ) -> Student:
        """Reads a Hugging Face folder of safetensors: fp32 on the CPU, bf16 on a GPU. No network, no remote code.

        Raises:
            OSError, ValueError: no such folder, or no causal language model in it.
        """
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder: --model-path must name the base model's")
        if threads:
            torch.set_num_threads(threads)
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=torch.bfloat16 if device == "cuda" else torch.float32,
            local_files_only=True,
            use_safetensors=True,
            attn_implementation="sdpa",
        ).to(device)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return cls(model, tokenizer, base_model=base_model, micro_batch_tokens=micro_batch_tokens)

    def warm_up(self) -> None:
        """One small forward pass, which also proves that logits are `hidden @ head.T`, as the loss takes them to be.

        Raises:
            ValueError: this architecture does more between the last hidden state and the logits.
        """
        ids = list(range(1, 9))
        with torch.no_grad():
            (hidden,) = self.hidden([Context(ids[:1], ids)])  # one row for each of the ids
            sequence = torch.tensor([[*ids[:1], *ids[:-1]]], device=self.device)
            logits = self.model(input_ids=sequence, use_cache=False).logits[0]
            ours = hidden @ self.head.T
        if not torch.allclose(ours.float(), logits.float(), rtol=1e-2, atol=1e-2 * float(logits.abs().max())):
            raise ValueError(
                f"{type(self.model).__name__} scales or caps its logits: such models cannot be trained here"
            )

    def micro_batches(self, contexts: Sequence[Context]) -> list[list[int]]:
        """Indices of the contexts in groups that fit one forward pass each. Gradients do not depend on the groups."""
        groups: list[list[int]] = []
        longest = 0
        for index, context in enumerate(contexts):
            longest = max(longest, context.tokens) if groups else context.tokens
            if groups and (len(groups[-1]) + 1) * longest <= self._micro_batch_tokens:
                groups[-1].append(index)
            else:
                groups.append([index])
                longest = context.tokens
        return groups

    def hidden(self, contexts: Sequence[Context]) -> list[Tensor]:
        """Last hidden states of the rows that predict each response: a list of (N, d), row t for response token t.

        One padded batch. Padding is on the right, where a causal model's earlier positions cannot see it.
        """
        # The last response token predicts nothing that is asked for.
        sequences = [[*context.prefix_ids, *context.response_ids][:-1] for context in contexts]
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # (B, T)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        states = self.model.base_model(input_ids=ids.to(self.device), use_cache=False).last_hidden_state  # (B, T, d)
        starts = [len(context.prefix_ids) - 1 for context in contexts]
        return [
            states[row, start : start + len(context.response_ids)]
            for row, (start, context) in enumerate(zip(starts, contexts, strict=True))
        ]

    def map_hidden(self, contexts: Sequence[Context], use: Callable[[int, Tensor], None]) -> None:
        """`use(index, hidden)` for every context, micro-batch by micro-batch, without gradients."""
        with torch.no_grad():
            for group in self.micro_batches(contexts):
                for index, states in zip(group, self.hidden([contexts[i] for i in group]), strict=True):
                    use(index, states)

    @contextlib.contextmanager
    def adapter(self, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]) -> Iterator[Adapter]:
        """The adapter in the model while the context lasts.

        Args:
            config: adapter_config.json.
            tensors: adapter_model.safetensors: every key that the config asks for and no other.

        Raises:
            AdapterInvalid: another base, a kind of adapter that is not trained here, a wrong key, shape or value.
        """
        lora = lora_config(config, self.base_model)
        try:
            yield self._inject(lora, config, tensors)
        finally:
            self._restore()

    def _inject(
        self, lora: LoraConfig, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray[Any, Any]]
    ) -> Adapter:
        try:
            # The weights are born without memory, on the meta device, and replaced below: no random initialization.
            inject_adapter_in_model(lora, self.model, NAME, low_cpu_mem_usage=True)
        except (ValueError, TypeError, KeyError, NotImplementedError, RuntimeError) as error:
            raise AdapterInvalid(f"adapter_config.json does not fit the base model: {error}") from error
        wrapped = {name: m for name, m in self.model.named_modules() if isinstance(m, BaseTunerLayer)}
        for name, layer in wrapped.items():
            linear = isinstance(layer, LoraLayer) and isinstance(self._modules[name], nn.Linear)
            if not linear or name == self._head_name:
                raise AdapterInvalid(f"adapter_config.json: target_modules match {name}, which cannot be trained here")
        places = {
            f"{PREFIX}{name}.lora_{side}.weight": (layer, f"lora_{side}")
            for name, layer in wrapped.items()
            for side in ("A", "B")
        }
        missing, unexpected = sorted(places.keys() - tensors.keys()), sorted(tensors.keys() - places.keys())
        if missing:
            raise AdapterInvalid(f"adapter_model.safetensors lacks {missing[0]} (and {len(missing) - 1} more keys)")
        if unexpected:
            count = len(unexpected) - 1
            raise AdapterInvalid(
                f"adapter_model.safetensors holds {unexpected[0]} (and {count} more keys) for no target"
            )
        parameters: dict[str, nn.Parameter] = {}
        for key in sorted(places):
            layer, side = places[key]
            linear = getattr(layer, side)[NAME]
            given = torch.from_numpy(np.array(tensors[key], dtype=np.float32))
            if given.shape != linear.weight.shape:
                expected = f"{tuple(given.shape)}, expected {tuple(linear.weight.shape)}"
                raise AdapterInvalid(f"adapter_model.safetensors: {key} has shape {expected}")
            if not bool(given.isfinite().all()):
                raise AdapterInvalid(f"adapter_model.safetensors: {key} holds values that are not finite")
            linear.weight = nn.Parameter(given.to(self.device))
            parameters[key] = linear.weight
        return Adapter(config, parameters, list(wrapped.values()))

    def _restore(self) -> None:
        """Puts every module of the base back into its place."""
        wrapped = [name for name, module in self.model.named_modules() if isinstance(module, BaseTunerLayer)]
        for name in wrapped:
            parent, _, leaf = name.rpartition(".")
            setattr(self.model.get_submodule(parent), leaf, self._modules[name])
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        self.model.requires_grad_(False)
        if dict(self.model.named_modules()) != self._modules:
            raise Unfit("an adapter could not be taken out of the base model")


def lora_config(config: Mapping[str, Any], base_model: str = "") -> LoraConfig:
    """PEFT's configuration from adapter_config.json, without dropout.

    Raises:
        AdapterInvalid: no LoRA, of another base model, or with a feature that changes more than plain A and B matrices.
    """
    if config.get("peft_type") != "LORA":
        raise AdapterInvalid(
            f"adapter_config.json: peft_type is {config.get('peft_type')!r}, only LORA is trained here"
        )
    if (base := config.get("base_model_name_or_path")) and base_model and base != base_model:
        raise AdapterInvalid(f"the adapter belongs to the base model {base}, this worker holds {base_model}")
    if (initial := config.get("init_lora_weights")) not in PLAIN_INITIALIZATIONS:
        raise AdapterInvalid(
            f"adapter_config.json: init_lora_weights {initial!r} changes the base model: convert it first"
        )
    defaults = LoraConfig().to_dict()
    for field, value in config.items():
        if field not in USED_FIELDS | FREE_FIELDS and value and value != defaults.get(field):
            raise AdapterInvalid(f"adapter_config.json: {field} is not supported here")
    if not config.get("target_modules"):
        raise AdapterInvalid("adapter_config.json: target_modules is missing")
    used = {field: config[field] for field in USED_FIELDS if config.get(field) is not None}
    try:
        return LoraConfig(**used, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM")
    except (ValueError, TypeError) as error:
        raise AdapterInvalid(f"adapter_config.json: {error}") from error
