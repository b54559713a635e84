"""What a server of an adapter would say: the base model, with the adapter merged into a copy of its weights.

A decoder of its own rather than transformers' `generate`: every shape is fixed, so on a GPU a token is one replayed
CUDA graph instead of a thousand kernel launches, and a trial of twenty requests takes seconds. A test holds it to
transformers' own logits. Llama only (SmolLM2 is one).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention, silu

from claas_worker.bank import PREFIX
from claas_worker.student import Student
from learning.preferences import Answer

SLOTS = 64  # room for tokens grows by so many: fewer shapes, fewer graphs


class Speaker:
    """Generates in batches with the current adapter; the student's own weights stay as they are."""

    def __init__(self, student: Student) -> None:
        if student.model.config.model_type != "llama":
            raise ValueError(f"the speaker decodes Llama models, this is a {student.model.config.model_type}")
        self._base = dict(student.model.named_modules())
        self.model = copy.deepcopy(student.model)
        for module in self.model.modules():
            module._forward_hooks.clear()  # the bank's: here adapters are merged
        self.tokenizer = student.tokenizer
        self._device = student.device
        self._end_of_turn = student.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self._decoders: dict[tuple[int, int], Decoder] = {}

    @torch.no_grad()
    def wear(self, config: Mapping[str, Any], tensors: Mapping[str, Any]) -> None:
        """W + alpha/r B A in every adapted layer. Takes any adapter's place: layers are written, never added to."""
        scale = config["lora_alpha"] / config["r"]
        for key in tensors:
            name, found, _ = key.removeprefix(PREFIX).partition(".lora_A")
            if found:
                a = torch.from_numpy(tensors[key]).to(self._device)  # (r, in)
                b = torch.from_numpy(tensors[key.replace(".lora_A", ".lora_B")]).to(self._device)  # (out, r)
                self.model.get_submodule(name).weight.copy_(self._base[name].weight + scale * (b @ a))

    def prefix(self, prompt: str) -> list[int]:
        """Ids of the chat template with one user turn and the generation prompt."""
        chat = [{"role": "user", "content": prompt}]
        text = self.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    @torch.no_grad()
    def respond(
        self, prefixes: Sequence[Sequence[int]], *, temperature: float, max_tokens: int, seed: int
    ) -> list[Answer]:
        """One sampled answer per prefix. The same seed and number of prefixes draw the same noise, row by row and token
        by token, whatever the adapter: two adapters differ by their probabilities alone."""
        decoder = self._decoder(len(prefixes), max(map(len, prefixes)) + max_tokens)
        generator = torch.Generator(self._device).manual_seed(seed)
        logits = decoder.read(prefixes)  # (B, V)
        done = torch.zeros(len(prefixes), dtype=torch.bool, device=self._device)
        drawn: list[Tensor] = []
        for step in range(max_tokens):
            noise = torch.empty_like(logits).exponential_(generator=generator)
            token = (logits / temperature - noise.log()).argmax(-1)  # (B,): a sample, by the Gumbel-max trick
            drawn.append(torch.where(done, self._end_of_turn, token))
            done = done | (token == self._end_of_turn)
            if step % 8 == 7 and bool(done.all()):  # asking makes the GPU wait
                break
            if step < max_tokens - 1:
                logits = decoder.next(drawn[-1])
        return [self._answer(row) for row in torch.stack(drawn, -1).tolist()]

    def _decoder(self, rows: int, tokens: int) -> Decoder:
        slots = -(-tokens // SLOTS) * SLOTS
        if (rows, slots) not in self._decoders:
            self._decoders[rows, slots] = Decoder(self.model, rows, slots)
        return self._decoders[rows, slots]

    def _answer(self, ids: list[int]) -> Answer:
        finished = self._end_of_turn in ids
        kept = ids[: ids.index(self._end_of_turn) + 1] if finished else ids
        return Answer(kept, self.tokenizer.decode(kept, skip_special_tokens=True).strip(), finished)


class Decoder:
    """The model on a batch of fixed size with keys and values in fixed memory: B rows, S slots of tokens each.

    The weights are the model's own tensors: writing into them changes what is decoded, with no need to start anew.
    """

    def __init__(self, model: Any, rows: int, slots: int) -> None:
        self._model, config = model.base_model, model.config
        self._head = model.get_output_embeddings().weight  # (V, d)
        self._heads, self._groups = config.num_attention_heads, config.num_key_value_heads
        self._size = config.head_dim or config.hidden_size // self._heads
        self._eps = config.rms_norm_eps
        device = self._head.device
        half = torch.arange(0, self._size, 2, dtype=torch.float32, device=device) / self._size
        angles = torch.outer(
            torch.arange(slots, dtype=torch.float32, device=device), config.rope_parameters["rope_theta"] ** -half
        )
        self._cos, self._sin = (f(torch.cat([angles, angles], -1)) for f in (torch.cos, torch.sin))  # (S, h)
        cache = (config.num_hidden_layers, 2, rows, self._groups, slots, self._size)
        self._cache = torch.zeros(cache, dtype=self._head.dtype, device=device)
        self._used = torch.zeros(rows, slots, dtype=torch.bool, device=device)  # slots that may be looked at
        self._slot = torch.zeros(1, dtype=torch.long, device=device)  # where the next token goes
        self._position = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._token = torch.zeros(rows, 1, dtype=torch.long, device=device)
        self._advance: Callable[[], Tensor] = self._step if device.type == "cpu" else _graphed(self._step)

    def read(self, prefixes: Sequence[Sequence[int]]) -> Tensor:
        """Starts anew with these prefixes, padded on the left; gives the logits (B, V) of what follows."""
        longest = max(map(len, prefixes))
        ids = torch.tensor([[0] * (longest - len(prefix)) + list(prefix) for prefix in prefixes])  # (B, T)
        given = torch.tensor([[False] * (longest - len(prefix)) + [True] * len(prefix) for prefix in prefixes])
        ids, given = ids.to(self._head.device), given.to(self._head.device)
        positions = (given.cumsum(-1) - 1).clamp_min(0)
        self._used.zero_()
        self._used[:, :longest] = given
        slots = torch.arange(longest, device=ids.device)
        every = torch.arange(self._used.shape[1], device=ids.device)
        earlier, itself = every <= slots[:, None], every == slots[:, None]  # (T, S)
        # Padding looks at itself: a row without any key would be NaN.
        mask = (earlier & self._used[:, None]) | itself  # (B, T, S)
        logits = self._forward(ids, positions, slots, mask)
        self._slot.fill_(longest)
        self._position.copy_(positions[:, -1:] + 1)
        return logits

    def next(self, token: Tensor) -> Tensor:
        """Appends one token (B,) to every row; gives the logits (B, V) of what follows."""
        self._token.copy_(token[:, None])
        return self._advance()

    def _step(self) -> Tensor:
        self._used.index_fill_(1, self._slot, True)
        logits = self._forward(self._token, self._position, self._slot, self._used[:, None])
        self._slot += 1
        self._position += 1
        return logits

    def _forward(self, ids: Tensor, positions: Tensor, slots: Tensor, mask: Tensor) -> Tensor:
        """ids and positions (B, T), slots (T,), mask (B, T, S): logits (B, V) after the last token."""
        b, t = ids.shape
        h = self._model.embed_tokens.weight[ids]  # (B, T, d)
        cos, sin = self._cos[positions][:, None], self._sin[positions][:, None]  # (B, 1, T, h)
        for layer, cache in zip(self._model.layers, self._cache, strict=True):
            attention, mlp = layer.self_attn, layer.mlp
            x = self._norm(h, layer.input_layernorm)
            q = _rotated(self._split(x @ attention.q_proj.weight.T, self._heads), cos, sin)  # (B, H, T, h)
            k = _rotated(self._split(x @ attention.k_proj.weight.T, self._groups), cos, sin)  # (B, G, T, h)
            cache[0].index_copy_(2, slots, k)
            cache[1].index_copy_(2, slots, self._split(x @ attention.v_proj.weight.T, self._groups))
            keys, values = (part.repeat_interleave(self._heads // self._groups, 1) for part in cache)  # (B, H, S, h)
            seen = scaled_dot_product_attention(q, keys, values, attn_mask=mask[:, None])
            h = h + seen.transpose(1, 2).reshape(b, t, -1) @ attention.o_proj.weight.T
            x = self._norm(h, layer.post_attention_layernorm)
            gated = silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
            h = h + gated @ mlp.down_proj.weight.T
        logits: Tensor = self._norm(h[:, -1], self._model.norm) @ self._head.T
        return logits

    def _norm(self, x: Tensor, norm: Any) -> Tensor:
        scaled: Tensor = x * (x.square().mean(-1, keepdim=True) + self._eps).rsqrt() * norm.weight
        return scaled

    def _split(self, x: Tensor, heads: int) -> Tensor:
        return x.view(*x.shape[:2], heads, self._size).transpose(1, 2)


def _rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    left, right = x.chunk(2, -1)
    return x * cos + torch.cat([-right, left], -1) * sin


def _graphed(step: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The same, recorded once and replayed. What it did to its counters while it was recorded, `read` undoes."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries allocate at their first use, which a recording must not see
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits = step()

    def replay() -> Tensor:
        graph.replay()
        return logits

    return replay
