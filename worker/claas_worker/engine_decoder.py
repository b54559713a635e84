"""A Llama- or Qwen-style decoder written out: forward and backward pass of frozen weights under batched LoRA.

    h = W x + B (A x)        of every linear layer, B scaled; A (n, p r, i) and B (n, o, p r) of n adapters at once

What is unusual:
- The backward pass is written out rather than traced: a frozen base needs the gradient of its inputs alone, so what is
  kept for it is known and small (about 90 KiB a token and layer at 3B), and both passes are fixed sequences of kernels
  that a CUDA graph can hold.
- Linear layers that share an input are one product: q, k, v; gate and up. The model's own weights become views of the
  stacked ones, bit for bit what they were, so nothing is kept twice.
- One adapter alone is the common case: there, B lies in the same tensor as the weights, behind their columns, and A
  below their rows, and A x lies behind the columns of x. So one product gives W x + B A x, and one W' dy + A' B' dy,
  without passing over the outputs again. It is done where it gains: where a function of rows writes x, or dy, and the
  product is not so long (22,016 of gate and up, 11,008 of down) that a few columns more cost cuBLAS a pass of its own.
- A CPU's products of A and B are in fp32 whatever the base is, and added to the base's before that is rounded a second
  time: PEFT's arithmetic.
- Between the products lie a few functions of rows (`Rows`), which are compiled on a GPU and are plain torch elsewhere.
- Whether this is the model's arithmetic is not trusted but tried (`engine.py`): structure is read off the modules, and
  what comes out is compared with the model's own forward pass before anything is trained on it: of one layer in fp32,
  because bf16's rounding hides a small difference, and of the whole.
"""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
QKV, OUT, GATE_UP, DOWN = range(4)
ACTIVATIONS = ("SiLU", "SiLUActivation")
WIDE_RANK = 16  # of a lone adapter whose A and B lie around the weights
TAIL = (
    64  # columns behind those of x for A x, and around the weights: at least members * WIDE_RANK, and rows stay aligned
)
FIXED_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on the position alone


class Unsupported(Exception):
    """This model is none that is written out here; it can be trained the plain way."""


class Place(NamedTuple):
    """Where a linear layer of the model lies here."""

    group: int  # of GROUPS
    member: int  # of the group
    layer: int


class Stack(NamedTuple):
    """Linear layers that share their input, as one: (o, i) weight, (o,) bias; `ends` of the members' output columns."""

    weight: Tensor
    bias: Tensor | None
    ends: tuple[int, ...]

    @property
    def columns(self) -> list[tuple[int, int]]:
        """Of the output, by member: first and one past the last."""
        return list(zip((0, *self.ends[:-1]), self.ends, strict=True))


class Layer(NamedTuple):
    """One decoder layer."""

    stacks: tuple[Stack, Stack, Stack, Stack]  # by GROUPS
    norm_attention: Tensor  # (d,)
    norm_mlp: Tensor  # (d,)
    norm_q: Tensor | None  # (head_dim,)
    norm_k: Tensor | None


class Saved(NamedTuple):
    """What a layer's backward pass needs, N rows of tokens."""

    x: Tensor  # (N, d) its input
    y: Tensor  # (N, d) normed
    qkv: Tensor | None  # (N, ...) before the norms of q and k, where there are any
    q: Tensor  # (B, T, H, head_dim); k, v: (B, T, KV, head_dim)
    k: Tensor
    v: Tensor
    attended: Tensor  # (B, H, T, head_dim)
    x_mlp: Tensor  # (N, d)
    y_mlp: Tensor  # (N, d)
    gate_up: Tensor  # (N, 2 I)
    gated: Tensor  # (N, I)
    low: tuple[Tensor, Tensor, Tensor, Tensor]  # (n, t, p r) A x, by group


class Rows:
    """Functions of rows of tokens: norms, rotation, gating, and their gradients. `compiled` ones are Inductor's.

    What a product reads next, they write into `into`, rows with a TAIL behind them; and so they read what they wrote.
    It is cut off in here: of a view, Inductor does not know that its rows are aligned.
    """

    def __init__(self, compiled: bool = False) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self.norm, self.norm_backward = wrap(_norm_into), wrap(_norm_backward_into)
        self.add_norm, self.norm_backward_add = wrap(_add_norm), wrap(_norm_backward_add)
        self.rotate, self.rotate_backward = wrap(_rotate), wrap(_rotate_backward)
        self.norm_rotate, self.norm_rotate_backward = wrap(_norm_rotate), wrap(_norm_rotate_backward)
        self.gate, self.gate_backward = wrap(_gate), wrap(_gate_backward)


class Beside:
    """Work that nothing waits for soon, on a stream of its own: small products fill what large ones leave idle.

    What it reads lives until the main stream has waited for it, which `settle` does for what was begun before the last
    `settle`. On a CPU it is done at once.
    """

    def __init__(self, like: Tensor) -> None:
        self._stream = torch.cuda.Stream() if like.is_cuda else None
        self._begun: list[Any] = []
        self._before: tuple[Any, list[Any]] | None = None

    def __call__(self, work: Callable[..., None], *tensors: Tensor) -> None:
        if self._stream is None:
            work(*tensors)
            return
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            work(*tensors)
        self._begun.append(tensors)

    def settle(self) -> None:
        """Lets go what was begun before the last call; two calls, of everything."""
        if self._stream is None:
            return
        if self._before is not None:
            torch.cuda.current_stream().wait_event(self._before[0])
        self._before, self._begun = (self._stream.record_event(), self._begun), []


class Decoder:
    """A causal language model's decoder, its weights stacked.

    Args:
        model: frozen; its linear layers' parameters become views of the stacked ones.

    Attributes:
        places: of the model's linear layers, by name.
        shapes: of each group: (inputs, ends of the members' outputs).
        around: by group, A (1, layers, p WIDE_RANK, i) and B (1, layers, o, p WIDE_RANK) of a lone adapter.
        lora_dtype: of A and B.

    Raises:
        Unsupported: it is built in another way; the message says how.
    """

    def __init__(self, model: Any) -> None:
        check(model)
        base = model.base_model
        self.places: dict[str, Place] = {}
        self.embedding: Tensor = base.embed_tokens.weight
        own = self.embedding.dtype
        self.lora_dtype = own if self.embedding.is_cuda else torch.promote_types(own, torch.float32)
        self.norm: Tensor = base.norm.weight
        self.eps = float(base.norm.variance_epsilon)
        self._rotary = base.rotary_emb
        attention = base.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.scaling = float(attention.scaling)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        names = {id(module): name for name, module in model.named_modules()}
        self.shapes = [_shape(linears) for linears in _linears(base.layers[0])]
        # W (o, i) of a layer and group, B behind its columns, A below its rows.
        self._whole = [
            self.embedding.new_zeros(len(base.layers), ends[-1] + TAIL, inputs + TAIL) for inputs, ends in self.shapes
        ]
        self.around = [
            (
                whole[None, :, ends[-1] : ends[-1] + len(ends) * WIDE_RANK, :inputs],
                whole[None, :, : ends[-1], inputs : inputs + len(ends) * WIDE_RANK],
            )
            for whole, (inputs, ends) in zip(self._whole, self.shapes, strict=True)
        ]
        self.layers = [self._stacked(layer, index, names) for index, layer in enumerate(base.layers)]

    def _stacked(self, layer: Any, index: int, names: dict[int, str]) -> Layer:
        stacks = []
        for number, linears in enumerate(_linears(layer)):
            biases = [linear.bias for linear in linears]
            if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
                raise Unsupported(f"some of {', '.join(GROUPS[number])} have a bias and some have none")
            if _shape(linears) != self.shapes[number]:
                raise Unsupported("its layers differ in shape")
            inputs, ends = self.shapes[number]
            weight = _joined([linear.weight for linear in linears], self._whole[number][index, : ends[-1], :inputs])
            bias = None if biases[0] is None else _joined(biases)
            for member, linear in enumerate(linears):
                self.places[names[id(linear)]] = Place(number, member, index)
            stacks.append(Stack(weight, bias, ends))
        attention = layer.self_attn
        q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
        return Layer(
            (stacks[0], stacks[1], stacks[2], stacks[3]),
            layer.input_layernorm.weight,
            layer.post_attention_layernorm.weight,
            None if q_norm is None else q_norm.weight,
            None if k_norm is None else k_norm.weight,
        )

    @property
    def bytes_a_token(self) -> int:
        """Of what a forward pass keeps for the backward pass, at one token; without A x, which is small."""
        d, (_, qkv), (attended, _), (_, gate_up), (inner, _) = self.embedding.shape[1], *self.shapes
        width = (
            4 * d + qkv[-1] * (1 if self.layers[0].norm_q is None else 2) + attended + gate_up[-1] + inner + 2 * TAIL
        )
        return len(self.layers) * int(width) * int(self.embedding.element_size())

    def angles(self, rows: int, length: int, first: int = 0) -> tuple[Tensor, Tensor]:
        """cos and sin (rows * length, head_dim) of the positions of `rows` sequences, from `first` on."""
        positions = torch.arange(first, first + length, device=self.embedding.device)[None]
        cos, sin = self._rotary(self.embedding[:1, None], positions)  # (1, T, head_dim)
        return cos[0].repeat(rows, 1), sin[0].repeat(rows, 1)

    def forward(
        self,
        ids: Tensor,
        angles: tuple[Tensor, Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        rows: Rows,
        saved: list[Any] | None,
    ) -> Tensor:
        """(N, d) the last hidden states after the final norm; N = B T.

        Args:
            ids: (B, T), n adapters' rows one after another, as many of each.
            angles: of these rows.
            a: (n, layers, p r, i), by group; b: (n, layers, o, p r).
            saved: filled with a `Saved` of each layer and the final norm's input, for `backward`. None keeps nothing.
        """
        batch, length = ids.shape
        cos, sin = angles
        x = functional.embedding(ids.reshape(-1), self.embedding)  # (N, d)
        y_wide, y = self._wide(x, self.embedding.shape[1])
        rows.norm(x, self.layers[0].norm_attention, self.eps, y_wide)
        for index, layer in enumerate(self.layers):
            qkv, low_qkv = self._linear(QKV, index, y_wide, a, b)
            if layer.norm_q is None:
                q, k, v = rows.rotate(qkv, cos, sin, self.heads, self.kv_heads)
            else:
                norms = (layer.norm_q, layer.norm_k, self.eps)
                q, k, v = rows.norm_rotate(qkv, cos, sin, self.heads, self.kv_heads, *norms)
            q, k, v = (one.view(batch, length, -1, self.head_dim).detach() for one in (q, k, v))
            with torch.enable_grad() if saved is not None else torch.no_grad():
                if saved is not None:
                    q, k, v = (one.requires_grad_() for one in (q, k, v))
                attended = self._attend(q, k, v)  # (B, H, T, head_dim)
            flat = attended.detach().transpose(1, 2).reshape(batch * length, -1)
            o, low_o = self._linear(OUT, index, flat, a, b)
            y_mlp_wide, y_mlp = self._wide(x, x.shape[1])
            x_mlp = rows.add_norm(x, o, layer.norm_mlp, self.eps, y_mlp_wide)
            gate_up, low_gate_up = self._linear(GATE_UP, index, y_mlp_wide, a, b)
            gated = rows.gate(gate_up)
            down, low_down = self._linear(DOWN, index, gated, a, b)
            if saved is not None:
                low = (low_qkv, low_o, low_gate_up, low_down)
                before = qkv if layer.norm_q is not None else None
                saved.append(Saved(x, y, before, q, k, v, attended, x_mlp, y_mlp, gate_up, gated, low))
            after = self.layers[index + 1].norm_attention if index + 1 < len(self.layers) else self.norm
            y_wide, y = self._wide(x, x.shape[1])
            x = rows.add_norm(x_mlp, down, after, self.eps, y_wide)
        if saved is not None:
            saved.append(x)
        return y

    def backward(
        self,
        gradient: Tensor,
        angles: tuple[Tensor, Tensor],
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        grad_a: Sequence[Tensor],
        grad_b: Sequence[Tensor],
        rows: Rows,
        saved: list[Any],
    ) -> None:
        """Writes the gradients of A and B, given that (N, d) of the hidden states; empties `saved`.

        In grad_b, only the blocks on the diagonal, member by member, have a meaning.
        """
        cos, sin = angles
        dx_wide, dx = self._wide(gradient, gradient.shape[1])
        rows.norm_backward(gradient, saved.pop(), self.norm, self.eps, dx_wide)
        beside = Beside(dx)
        for index in reversed(range(len(self.layers))):
            layer, s = self.layers[index], saved.pop()
            out = [(grad_a[group][:, index], grad_b[group][:, index]) for group in range(4)]
            d_gated, d_low = self._linear_input(DOWN, index, dx_wide, a, b)
            beside(_linear_weights, dx, s.gated, s.low[DOWN], d_low, *out[DOWN])
            d_gate_up = rows.gate_backward(d_gated, s.gate_up)
            d_y, d_low = self._linear_input(GATE_UP, index, d_gate_up, a, b)
            beside(_linear_weights, d_gate_up, s.y_mlp, s.low[GATE_UP], d_low, *out[GATE_UP])
            before, (dx_wide, dx) = dx_wide, self._wide(dx, dx.shape[1])
            rows.norm_backward_add(d_y, s.x_mlp, layer.norm_mlp, self.eps, before, dx_wide)
            d_flat, d_low = self._linear_input(OUT, index, dx_wide, a, b)
            flat = s.attended.detach().transpose(1, 2).reshape(dx.shape[0], -1)
            beside(_linear_weights, dx, flat, s.low[OUT], d_low, *out[OUT])
            d_attended = d_flat.view(*s.q.shape).transpose(1, 2)
            dq, dk, dv = torch.autograd.grad(s.attended, (s.q, s.k, s.v), d_attended)
            dq, dk, dv = (one.reshape(dx.shape[0], -1, self.head_dim) for one in (dq, dk, dv))
            d_qkv_wide, d_qkv = self._wide(dx, self.shapes[QKV][1][-1])
            if layer.norm_q is None:
                rows.rotate_backward(dq, dk, dv, cos, sin, d_qkv_wide)
            else:
                norms = (layer.norm_q, layer.norm_k, self.eps)
                rows.norm_rotate_backward(dq, dk, dv, cos, sin, s.qkv, *norms, d_qkv_wide)
            d_y, d_low = self._linear_input(QKV, index, d_qkv_wide, a, b, needed=index > 0)
            beside(_linear_weights, d_qkv, s.y, s.low[QKV], d_low, *out[QKV])
            if index:
                before, (dx_wide, dx) = dx_wide, self._wide(dx, dx.shape[1])
                rows.norm_backward_add(d_y, s.x, layer.norm_attention, self.eps, before, dx_wide)
            beside.settle()
        beside.settle()

    def _wide(self, like: Tensor, columns: int) -> tuple[Tensor, Tensor]:
        """New rows of so many columns, with and without the TAIL behind them.

        There is none where nothing could lie in it: a CPU's bf16 product reads columns past its own.
        """
        wide = like.new_empty(like.shape[0], columns + (TAIL if like.dtype == self.lora_dtype else 0))
        return wide, wide[:, :columns]

    def _linear(
        self, group: int, index: int, x_wide: Tensor, a: Sequence[Tensor], b: Sequence[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """(N, o) output and (n, t, p r) A x, of x (N, i), which may have a TAIL."""
        inputs, ends = self.shapes[group]
        own_a, own_b, bias = a[group][:, index], b[group][:, index], self.layers[index].stacks[group].bias
        weight, x, n = self.layers[index].stacks[group].weight, x_wide[:, :inputs], own_a.shape[0]
        if a[group].data_ptr() == self.around[group][0].data_ptr() and x_wide.shape[1] > inputs:
            last = inputs + len(ends) * WIDE_RANK
            torch.mm(x, own_a[0].T, out=x_wide[:, inputs:last])
            whole = self._whole[group][index, : ends[-1], :last].T
            y = x_wide[:, :last] @ whole if bias is None else torch.addmm(bias, x_wide[:, :last], whole)
            return y, x_wide[None, :, inputs:last]
        low = torch.bmm(x.to(own_a.dtype).unflatten(0, (n, -1)), own_a.transpose(1, 2))
        if x.dtype != self.lora_dtype:
            y = torch.bmm(low, own_b.transpose(1, 2)).flatten(0, 1)
            return y.add_(functional.linear(x, weight, bias)).to(x.dtype), low
        if bias is None and ends[-1] > inputs:  # over many columns, the product itself had better add what is there
            y = torch.bmm(low, own_b.transpose(1, 2)).flatten(0, 1)
            return y.addmm_(x, weight.T), low
        y = x @ weight.T if bias is None else torch.addmm(bias, x, weight.T)
        y.view(n, -1, y.shape[1]).baddbmm_(low, own_b.transpose(1, 2))
        return y, low

    def _linear_input(
        self,
        group: int,
        index: int,
        dy_wide: Tensor,
        a: Sequence[Tensor],
        b: Sequence[Tensor],
        *,
        needed: bool = True,
    ) -> tuple[Tensor, Tensor]:
        """Gradients of the input (N, i), empty if not needed, and of A x (n, t, p r). dy (N, o) may have a TAIL."""
        inputs, ends = self.shapes[group]
        own_a, own_b, n = a[group][:, index], b[group][:, index], a[group].shape[0]
        dy = dy_wide[:, : ends[-1]]
        if a[group].data_ptr() == self.around[group][0].data_ptr() and dy_wide.shape[1] > ends[-1]:
            last = ends[-1] + len(ends) * WIDE_RANK
            torch.mm(dy, own_b[0], out=dy_wide[:, ends[-1] : last])
            dx = dy_wide[:, :last] @ self._whole[group][index, :last, :inputs] if needed else dy.new_empty(0)
            return dx, dy_wide[None, :, ends[-1] : last]
        d_low = torch.bmm(dy.to(own_b.dtype).unflatten(0, (n, -1)), own_b)
        if not needed:
            return dy.new_empty(0), d_low
        weight = self.layers[index].stacks[group].weight
        if dy.dtype != self.lora_dtype:
            return torch.bmm(d_low, own_a).flatten(0, 1).add_(dy @ weight).to(dy.dtype), d_low
        if inputs > ends[-1]:
            dx = torch.bmm(d_low, own_a).flatten(0, 1)
            return dx.addmm_(dy, weight), d_low
        dx = dy @ weight
        dx.view(n, -1, inputs).baddbmm_(d_low, own_a)
        return dx, d_low

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """(B, H, T, head_dim). Padding is on the right, where earlier positions cannot see it."""
        return functional.scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            is_causal=True,
            scale=self.scaling,
            enable_gqa=self.kv_heads != self.heads,
        )


def check(model: Any) -> None:
    """Reads off its modules whether a model is built as those that are written out here.

    Raises:
        Unsupported: it is not; the message says how.
    """
    base, config = model.base_model, model.config
    layers = getattr(base, "layers", None)
    parts = ("embed_tokens", "norm", "rotary_emb")
    if not layers or not all(hasattr(base, part) for part in parts):
        raise Unsupported(f"{type(model).__name__} has no embed_tokens, layers, norm and rotary_emb")
    rope = getattr(base.rotary_emb, "rope_type", "")
    if rope not in FIXED_ROPES:
        raise Unsupported(f"its rotary embedding is {rope or 'of a kind of its own'}")
    if any(kind != "full_attention" for kind in getattr(config, "layer_types", None) or ()):
        raise Unsupported("not all of its layers attend to everything before")
    if getattr(config, "sliding_window", None) and not getattr(config, "layer_types", None):
        raise Unsupported("it attends within a window")
    expected = {name for group in GROUPS for name in group}
    norms = [("norm", base.norm)]
    for layer in layers:
        linears = {name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, nn.Linear)}
        if linears != expected or not all(hasattr(layer, part) for part in ("self_attn", "mlp")):
            raise Unsupported(f"its layers hold {', '.join(sorted(linears)) or 'no linear layers'}")
        if type(getattr(layer.mlp, "act_fn", None)).__name__ not in ACTIVATIONS:
            raise Unsupported(f"its activation is {type(getattr(layer.mlp, 'act_fn', None)).__name__}")
        if differing := _settings(layer) ^ _settings(layers[0]):
            raise Unsupported(f"its layers differ in {', '.join(sorted({name for _, name, _ in differing}))}")
        norms += [(name, getattr(layer, name, None)) for name in ("input_layernorm", "post_attention_layernorm")]
    for name, norm in norms:
        if not hasattr(norm, "variance_epsilon") or getattr(norm, "weight", None) is None:
            raise Unsupported(f"its {name} is {'missing' if norm is None else type(norm).__name__}")


def _settings(layer: Any) -> set[tuple[str, str, object]]:
    """What a layer's modules are set to, besides their weights: of each its name, a field and the value."""
    return {
        (name, field, value)
        for name, module in layer.named_modules()
        for field, value in {**vars(module), "type": type(module).__name__}.items()
        if isinstance(value, bool | int | float | str) and field != "layer_idx"
    }


def few_of(model: Any, tokens: int) -> Any:
    """A copy of a model's decoder with its first layer alone and its first tokens, in fp32 on the CPU.

    For a model that has passed `check`. Hooks stay behind.
    """
    base = model.base_model
    memo: dict[int, Any] = {id(module._forward_hooks): OrderedDict() for module in base.modules()}
    layer, embedding = base.layers[0], base.embed_tokens.weight
    for parameter in (*layer.parameters(), *base.norm.parameters()):
        memo[id(parameter)] = nn.Parameter(parameter.detach().to("cpu", torch.float32), requires_grad=False)
    memo[id(embedding)] = nn.Parameter(embedding[:tokens].detach().to("cpu", torch.float32), requires_grad=False)
    memo |= {id(buffer): buffer.to("cpu") for buffer in base.buffers()}
    memo[id(base.layers)] = nn.ModuleList([copy.deepcopy(layer, memo)])
    few = copy.deepcopy(base, memo)
    few.config._attn_implementation = "sdpa"  # others may not run here
    return few


def _linears(layer: Any) -> list[list[Any]]:
    """By group."""
    owners = (layer.self_attn, layer.self_attn, layer.mlp, layer.mlp)
    return [[getattr(owner, name) for name in group] for owner, group in zip(owners, GROUPS, strict=True)]


def _shape(linears: Sequence[Any]) -> tuple[int, tuple[int, ...]]:
    """Inputs, and the ends of the members' outputs."""
    return linears[0].in_features, tuple(itertools.accumulate(linear.out_features for linear in linears))


def _joined(parameters: Sequence[nn.Parameter], into: Tensor | None = None) -> Tensor:
    """All of them in one tensor, of which they become views."""
    joined = torch.cat([parameter.detach() for parameter in parameters], out=into)
    for parameter, part in zip(parameters, joined.split([len(one) for one in parameters]), strict=True):
        parameter.data = part
    return joined


def _linear_weights(dy: Tensor, x: Tensor, low: Tensor, d_low: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    """Writes the gradients of A (n, p r, i) and B (n, o, p r)."""
    n = low.shape[0]
    torch.bmm(d_low.transpose(1, 2), x.to(d_low.dtype).unflatten(0, (n, -1)), out=grad_a)
    torch.bmm(dy.to(low.dtype).unflatten(0, (n, -1)).transpose(1, 2), low, out=grad_b)


def _up(x: Tensor) -> Tensor:
    """In fp32, as the models do their norms in; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, rounded where the models round."""
    high = _up(x)
    return weight * (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _norm_into(x: Tensor, weight: Tensor, eps: float, into: Tensor) -> None:
    into[:, : x.shape[1]].copy_(_norm(x, weight, eps))


def _add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float, into: Tensor) -> Tensor:
    """x + update; that normed goes into `into`."""
    x = x + update
    into[:, : x.shape[1]].copy_(_norm(x, weight, eps))
    return x


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    high = _up(x)
    scale = torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    normed, slope = high * scale, _up(dy) * _up(weight)
    return (scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))).to(x.dtype)


def _norm_backward_into(dy: Tensor, x: Tensor, weight: Tensor, eps: float, into: Tensor) -> None:
    into[:, : x.shape[1]].copy_(_norm_backward(dy, x, weight, eps))


def _norm_backward_add(dy: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor, into: Tensor) -> None:
    """The gradient of x, which also went past the norm."""
    d = x.shape[1]
    into[:, :d].copy_(dx[:, :d] + _norm_backward(dy, x, weight, eps))


def _heads(qkv: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """(N, H, head_dim) q and (N, KV, head_dim) k, v."""
    split = qkv.view(qkv.shape[0], heads + 2 * kv_heads, -1)
    return split[:, :heads], split[:, heads : heads + kv_heads], split[:, heads + kv_heads :]


def _turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x (N, H, head_dim) turned by the angles of its row: half the dimensions pair with the other half."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


def _turn_back(dy: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The transpose of `_turn`."""
    first, second = (dy * sin[:, None]).chunk(2, -1)
    return dy * cos[:, None] + torch.cat([second, -first], -1)


def _rotate(qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(qkv, heads, kv_heads)
    return _turn(q, cos, sin), _turn(k, cos, sin), v.contiguous()


def _rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor, into: Tensor) -> None:
    _join_heads(_turn_back(dq, cos, sin), _turn_back(dk, cos, sin), dv, into)


def _norm_rotate(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int, norm_q: Tensor, norm_k: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _heads(qkv, heads, kv_heads)
    return _turn(_norm(q, norm_q, eps), cos, sin), _turn(_norm(k, norm_k, eps), cos, sin), v.contiguous()


def _norm_rotate_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    qkv: Tensor,
    norm_q: Tensor,
    norm_k: Tensor,
    eps: float,
    into: Tensor,
) -> None:
    q, k, _ = _heads(qkv, dq.shape[1], dk.shape[1])
    dq = _norm_backward(_turn_back(dq, cos, sin), q, norm_q, eps)
    dk = _norm_backward(_turn_back(dk, cos, sin), k, norm_k, eps)
    _join_heads(dq, dk, dv, into)


def _join_heads(q: Tensor, k: Tensor, v: Tensor, into: Tensor) -> None:
    """(N, H, head_dim) and (N, KV, head_dim) as the columns of qkv."""
    joined = torch.cat([q, k, v], 1).flatten(1)
    into[:, : joined.shape[1]].copy_(joined)


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def _gate_backward(d_gated: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up (N, 2 I)."""
    gate, up = (_up(one) for one in gate_up.chunk(2, -1))
    slope, sigmoid = _up(d_gated), gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([slope * up * (sigmoid + silu * (1 - sigmoid)), slope * silu], -1).to(d_gated.dtype)
