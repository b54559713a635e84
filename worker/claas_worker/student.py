"""The student: one frozen base model in memory, the bank of LoRA adapters on it, and its forward pass.

The base stays bit-identical whatever happens: its parameters never require gradients, and its modules are never
replaced (bank.py).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft.utils.integrations import init_empty_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from claas_teacher.fingerprint import fingerprint
from claas_worker.bank import Adapter, Bank
from claas_worker.engine import Engine
from claas_worker.engine_decoder import Unsupported
from claas_worker.weights import Weights

log = logging.getLogger(__name__)


class Context(NamedTuple):
    """A prefix and the response that follows it, as token ids."""

    prefix_ids: Sequence[int]
    response_ids: Sequence[int]

    @property
    def tokens(self) -> int:
        """Of both."""
        return len(self.prefix_ids) + len(self.response_ids)


class Student:
    """The base model of one worker with its tokenizer.

    Attributes:
        base_model: its id, as adapters name it; empty: adapters of any base are taken as they come.
        bank: the adapters on it.
        head: (V, d) the lm_head, frozen.
        fingerprint: of the tokenizer, to compare with the teacher's.
        engine: its passes in CUDA graphs, where there is one (`start_engine`).
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        base_model: str = "",
        micro_batch_tokens: int = 4096,
        resident_bytes: int = 0,
    ) -> None:
        self.model = model.eval().requires_grad_(False)  # dropout off
        self.tokenizer = tokenizer
        self.base_model = base_model
        self.fingerprint = fingerprint(tokenizer)
        self.head: Tensor = model.get_output_embeddings().weight
        self.device = self.head.device
        self._micro_batch_tokens = micro_batch_tokens
        self.bank = Bank(self.model, base_model=base_model, capacity_bytes=resident_bytes)
        self.engine: Engine | None = None

    def start_engine(self, compile_cache: Path | None = None) -> None:
        """Trains by the engine from now on, if this model is one that it can do; else the plain way, and says why.

        Args:
            compile_cache: folder in which compiled code outlives the process.
        """
        try:
            self.engine = Engine(self.model, compile_cache=compile_cache)
        except Unsupported as error:
            log.warning("no engine for this model: it trains the plain way", extra={"why": str(error)})
            return
        self.bank.flatten(self.engine.places)

    @classmethod
    def load(
        cls,
        path: Path,
        *,
        base_model: str = "",
        device: str = "auto",
        threads: int = 0,
        micro_batch_tokens: int = 4096,
        resident_bytes: int = 0,
        weights: Weights | None = None,
    ) -> Student:
        """Reads a Hugging Face folder of safetensors: fp32 on the CPU, bf16 on a GPU. No network, no remote code.

        Args:
            weights: of this folder, where they are on their way already.

        Raises:
            OSError, ValueError: no such folder, or no causal language model in it.
        """
        weights = weights or Weights(path, device)
        if threads:
            torch.set_num_threads(threads)
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        return cls(
            _model(weights),
            tokenizer,
            base_model=base_model,
            micro_batch_tokens=micro_batch_tokens,
            resident_bytes=resident_bytes,
        )

    def warm_up(self) -> None:
        """One small forward pass, which also proves that logits are `hidden @ head.T`, as the loss takes them to be.

        Raises:
            ValueError: this architecture does more between the last hidden state and the logits.
        """
        bias = getattr(self.model.get_output_embeddings(), "bias", None)
        if bias is not None and bias.any():  # too small a one for the comparison below would be left out of the loss
            kind = type(self.model).__name__
            raise ValueError(f"{kind} has a bias in its lm_head: such models cannot be trained here")
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
            shown = context.tokens - 1  # the last is not
            longest = max(longest, shown) if groups else shown
            if groups and (len(groups[-1]) + 1) * longest <= self._micro_batch_tokens:
                groups[-1].append(index)
            else:
                groups.append([index])
                longest = shown
        return groups

    def hidden(self, contexts: Sequence[Context], adapters: Sequence[Adapter | None] = ()) -> list[Tensor]:
        """Last hidden states of the rows that predict each response: a list of (N, d), row t for response token t.

        One padded batch. Padding is on the right, where a causal model's earlier positions cannot see it.

        Args:
            adapters: of each context, those of one adapter side by side; none: the base model alone.
        """
        sequences = [input_ids(context) for context in contexts]
        ids = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)  # (B, T)
        for row, sequence in enumerate(sequences):
            ids[row, : len(sequence)] = torch.tensor(sequence)
        with self.bank.active(adapters, ids.shape[1]):
            output = self.model.base_model(input_ids=ids.to(self.device), use_cache=False)
        states = output.last_hidden_state  # (B, T, d)
        starts = [len(context.prefix_ids) - 1 for context in contexts]
        return [
            states[row, start : start + len(context.response_ids)]
            for row, (start, context) in enumerate(zip(starts, contexts, strict=True))
        ]

    def map_hidden(
        self, contexts: Sequence[Context], adapters: Sequence[Adapter], use: Callable[[int, Tensor], None]
    ) -> None:
        """`use(index, hidden)` for every context with its adapter, micro-batch by micro-batch, without gradients."""
        with torch.no_grad():
            for group in self.micro_batches(contexts):
                states = self._hidden([contexts[i] for i in group], [adapters[i] for i in group])
                for index, rows in zip(group, states, strict=True):
                    use(index, rows)

    def _hidden(self, contexts: Sequence[Context], adapters: Sequence[Adapter]) -> list[Tensor]:
        """As `hidden`, without gradients; by the engine, if it knows these adapters."""
        flat = [adapter.flat for adapter in adapters]
        if self.engine is None or None in flat:
            return self.hidden(contexts, adapters)
        with self.engine.lock:
            done = self.engine.forward([input_ids(context) for context in contexts], flat, keep=False)
            starts = [done.start(index, len(context.prefix_ids)) for index, context in enumerate(contexts)]
            return [
                done.hidden[start : start + len(context.response_ids)].clone()
                for start, context in zip(starts, contexts, strict=True)
            ]


def _model(weights: Weights) -> Any:
    """The causal language model with these weights, as `from_pretrained` gives it. By that where names in the files are
    not those of the modules, or some weights are left in another precision."""
    config = AutoConfig.from_pretrained(weights.path, local_files_only=True)
    options = {"dtype": weights.dtype, "attn_implementation": "sdpa"}
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config, **options)
    tensors = weights.take()
    missing, unexpected = model.load_state_dict(tensors, strict=False, assign=True)
    model.tie_weights()
    tied = bool(config.get_text_config().tie_word_embeddings)
    kept = getattr(model, "_keep_in_fp32_modules", None) or getattr(model, "_keep_in_fp32_modules_strict", None)
    if unexpected or kept or bool(missing) != tied or any(parameter.is_meta for parameter in model.parameters()):
        tensors.clear()
        del model
        model = AutoModelForCausalLM.from_pretrained(
            weights.path, local_files_only=True, use_safetensors=True, **options
        )
    return model.to(weights.device)


def input_ids(context: Context) -> list[int]:
    """What the model is shown: the last response token predicts nothing that is asked for."""
    return [*context.prefix_ids, *context.response_ids][:-1]
