"""A Llama- or Qwen-style decoder written out: forward and backward pass of frozen weights under batched LoRA.

    h = W x + B (A x)        of every linear layer, B scaled; A (n, p r, i) and B (n, o, p r) of n adapters at once

What is unusual:
- The backward pass is written out rather than traced: a frozen base needs the gradient of its inputs alone, so what is
  kept for it is known and small (about 90 KiB a token and layer at 3B), and both passes are fixed sequences of kernels
  that a CUDA graph can hold.
- Linear layers that share an input are one product: q, k, v; gate and up. The model's own weights become views of the
  stacked ones, bit for bit what they were, so nothing is kept twice.
- One adapter alone is the common case, and gate and up are the widest product: there, B lies in the same tensor as the
  weights, behind their columns, and A x behind those of x, so that one product gives W x + B A x without passing over
  (N, 2 I) again. (Backward, the same trick costs cuBLAS more than it saves.)
- Between the products lie a few functions of rows (`Rows`), which are compiled on a GPU and are plain torch elsewhere.
- Whether this is the model's arithmetic is not trusted but tried (`engine.py`): structure is read off the modules, and
  what comes out is compared with the model's own forward pass before anything is trained on it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
QKV, OUT, GATE_UP, DOWN = range(4)
ACTIVATIONS = ("SiLU", "SiLUActivation")
WIDE_RANK = 16  # of a lone adapter whose B lies behind the weights of gate and up
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
    """Functions of rows of tokens: norms, rotation, gating, and their gradients. `compiled` ones are Inductor's."""

    def __init__(self, compiled: bool = False) -> None:
        wrap: Callable[[Any], Any] = torch.compile if compiled else lambda function: function
        self.norm, self.norm_backward = wrap(_norm), wrap(_norm_backward)
        self.add_norm, self.norm_backward_add = wrap(_add_norm), wrap(_norm_backward_add)
        self.add_norm_into = wrap(_add_norm_into)
        self.rotate, self.rotate_backward = wrap(_rotate), wrap(_rotate_backward)
        self.norm_rotate, self.norm_rotate_backward = wrap(_norm_rotate), wrap(_norm_rotate_backward)
        self.gate, self.gate_backward = wrap(_gate), wrap(_gate_backward)


class Decoder:
    """A causal language model's decoder, its weights stacked.

    Args:
        model: frozen; its linear layers' parameters become views of the stacked ones.

    Attributes:
        places: of the model's linear layers, by name.
        shapes: of each group: (inputs, ends of the members' outputs).
        tail: (1, layers, o, 2 WIDE_RANK) B of a lone adapter in gate and up.

    Raises:
        Unsupported: it is built in another way; the message says how.
    """

    def __init__(self, model: Any) -> None:
        base, config = model.base_model, model.config
        self.places: dict[str, Place] = {}
        self._check(model, base, config)
        self.embedding: Tensor = base.embed_tokens.weight
        self.norm: Tensor = base.norm.weight
        self.eps = float(base.norm.variance_epsilon)
        self._rotary = base.rotary_emb
        attention = base.layers[0].self_attn
        self.head_dim: int = attention.head_dim
        self.scaling = float(attention.scaling)
        self.heads = attention.q_proj.out_features // self.head_dim
        self.kv_heads = attention.k_proj.out_features // self.head_dim
        names = {id(module): name for name, module in model.named_modules()}
        mlp = base.layers[0].mlp
        outputs, inputs = 2 * mlp.up_proj.out_features, mlp.up_proj.in_features
        self._wide = self.embedding.new_zeros(len(base.layers), outputs, inputs + 2 * WIDE_RANK)
        self.tail = self._wide[None, :, :, inputs:]
        self.layers = [self._stacked(layer, index, names) for index, layer in enumerate(base.layers)]
        self.shapes = [(stack.weight.shape[1], stack.ends) for stack in self.layers[0].stacks]
        for layer in self.layers:
            if [(stack.weight.shape[1], stack.ends) for stack in layer.stacks] != self.shapes:
                raise Unsupported("its layers differ in shape")

    def _check(self, model: Any, base: Any, config: Any) -> None:
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
        for layer in layers:
            linears = {
                name.rpartition(".")[2] for name, module in layer.named_modules() if isinstance(module, nn.Linear)
            }
            if linears != expected or not all(hasattr(layer, part) for part in ("self_attn", "mlp")):
                raise Unsupported(f"its layers hold {', '.join(sorted(linears)) or 'no linear layers'}")
            if type(getattr(layer.mlp, "act_fn", None)).__name__ not in ACTIVATIONS:
                raise Unsupported(f"its activation is {type(getattr(layer.mlp, 'act_fn', None)).__name__}")

    def _stacked(self, layer: Any, index: int, names: dict[int, str]) -> Layer:
        stacks = []
        for number, group in enumerate(GROUPS):
            owner = layer.self_attn if number in (QKV, OUT) else layer.mlp
            linears = [getattr(owner, name) for name in group]
            biases = [linear.bias for linear in linears]
            if any(bias is None for bias in biases) and any(bias is not None for bias in biases):
                raise Unsupported(f"some of {', '.join(group)} have a bias and some have none")
            into = self._wide[index, :, : -2 * WIDE_RANK] if number == GATE_UP else None
            weight = _joined([linear.weight for linear in linears], into)
            bias = None if biases[0] is None else _joined(biases)
            ends: list[int] = []
            for member, linear in enumerate(linears):
                ends.append((ends[-1] if ends else 0) + linear.out_features)
                self.places[names[id(linear)]] = Place(number, member, index)
            stacks.append(Stack(weight, bias, tuple(ends)))
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
        width = 4 * d + qkv[-1] * (1 if self.layers[0].norm_q is None else 2) + attended + gate_up[-1] + inner
        return len(self.layers) * int(width) * int(self.embedding.element_size())

    def angles(self, rows: int, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin (rows * length, head_dim) of the positions of `rows` sequences."""
        positions = torch.arange(length, device=self.embedding.device)[None]
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
        alone = b[GATE_UP].data_ptr() == self.tail.data_ptr()
        x = functional.embedding(ids.reshape(-1), self.embedding)  # (N, d)
        y = rows.norm(x, self.layers[0].norm_attention, self.eps)
        for index, layer in enumerate(self.layers):
            ab = [(a[group][:, index], b[group][:, index]) for group in range(4)]
            qkv, low_qkv = _linear(layer.stacks[QKV], y, *ab[QKV])
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
            o, low_o = _linear(layer.stacks[OUT], flat, *ab[OUT])
            if alone:
                y_wide = x.new_empty(x.shape[0], self._wide.shape[2])
                y_mlp, low_gate_up = y_wide[:, : -2 * WIDE_RANK], y_wide[None, :, -2 * WIDE_RANK :]
                x_mlp = rows.add_norm_into(x, o, layer.norm_mlp, self.eps, y_mlp)
                torch.mm(y_mlp, ab[GATE_UP][0][0].T, out=low_gate_up[0])
                gate_up, bias = y_wide @ self._wide[index].T, layer.stacks[GATE_UP].bias
                gate_up = gate_up if bias is None else gate_up.add_(bias)
            else:
                x_mlp, y_mlp = rows.add_norm(x, o, layer.norm_mlp, self.eps)
                gate_up, low_gate_up = _linear(layer.stacks[GATE_UP], y_mlp, *ab[GATE_UP])
            gated = rows.gate(gate_up)
            down, low_down = _linear(layer.stacks[DOWN], gated, *ab[DOWN])
            if saved is not None:
                low = (low_qkv, low_o, low_gate_up, low_down)
                before = qkv if layer.norm_q is not None else None
                saved.append(Saved(x, y, before, q, k, v, attended, x_mlp, y_mlp, gate_up, gated, low))
            after = self.layers[index + 1].norm_attention if index + 1 < len(self.layers) else self.norm
            x, y = rows.add_norm(x_mlp, down, after, self.eps)
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
        dx = rows.norm_backward(gradient, saved.pop(), self.norm, self.eps)
        for index in reversed(range(len(self.layers))):
            layer, s = self.layers[index], saved.pop()
            ab = [(a[group][:, index], b[group][:, index]) for group in range(4)]
            out = [(grad_a[group][:, index], grad_b[group][:, index]) for group in range(4)]
            d_gated, d_low = _linear_input(layer.stacks[DOWN], dx, *ab[DOWN])
            _linear_weights(dx, s.gated, s.low[DOWN], d_low, *out[DOWN])
            d_gate_up = rows.gate_backward(d_gated, s.gate_up)
            d_y, d_low = _linear_input(layer.stacks[GATE_UP], d_gate_up, *ab[GATE_UP])
            _linear_weights(d_gate_up, s.y_mlp, s.low[GATE_UP], d_low, *out[GATE_UP])
            dx = rows.norm_backward_add(d_y, s.x_mlp, layer.norm_mlp, self.eps, dx)
            d_flat, d_low = _linear_input(layer.stacks[OUT], dx, *ab[OUT])
            flat = s.attended.detach().transpose(1, 2).reshape(dx.shape[0], -1)
            _linear_weights(dx, flat, s.low[OUT], d_low, *out[OUT])
            d_attended = d_flat.view(*s.q.shape).transpose(1, 2)
            dq, dk, dv = torch.autograd.grad(s.attended, (s.q, s.k, s.v), d_attended)
            dq, dk, dv = (one.reshape(dx.shape[0], -1, self.head_dim) for one in (dq, dk, dv))
            if layer.norm_q is None:
                d_qkv = rows.rotate_backward(dq, dk, dv, cos, sin)
            else:
                norms = (layer.norm_q, layer.norm_k, self.eps)
                d_qkv = rows.norm_rotate_backward(dq, dk, dv, cos, sin, s.qkv, *norms)
            d_y, d_low = _linear_input(layer.stacks[QKV], d_qkv, *ab[QKV], needed=index > 0)
            _linear_weights(d_qkv, s.y, s.low[QKV], d_low, *out[QKV])
            if index:
                dx = rows.norm_backward_add(d_y, s.x, layer.norm_attention, self.eps, dx)

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


def _joined(parameters: Sequence[nn.Parameter], into: Tensor | None = None) -> Tensor:
    """All of them in one tensor, of which they become views."""
    if len(parameters) == 1:
        return parameters[0].detach()
    if into is not None and sum(map(len, parameters)) != len(into):
        raise Unsupported("its layers differ in shape")
    joined = torch.cat([parameter.detach() for parameter in parameters], out=into)
    for parameter, part in zip(parameters, joined.split([len(one) for one in parameters]), strict=True):
        parameter.data = part
    return joined


def _linear(stack: Stack, x: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(N, o) output and (n, t, p r) A x, of x (N, i)."""
    n = a.shape[0]
    y = x @ stack.weight.T if stack.bias is None else torch.addmm(stack.bias, x, stack.weight.T)
    low = torch.bmm(x.view(n, -1, x.shape[1]), a.transpose(1, 2))
    y.view(n, -1, y.shape[1]).baddbmm_(low, b.transpose(1, 2))
    return y, low


def _linear_input(stack: Stack, dy: Tensor, a: Tensor, b: Tensor, *, needed: bool = True) -> tuple[Tensor, Tensor]:
    """Gradients of the input (N, i), empty if it is not needed, and of A x (n, t, p r)."""
    n = a.shape[0]
    d_low = torch.bmm(dy.view(n, -1, dy.shape[1]), b)
    if not needed:
        return dy.new_empty(0), d_low
    dx = dy @ stack.weight
    dx.view(n, -1, dx.shape[1]).baddbmm_(d_low, a)
    return dx, d_low


def _linear_weights(dy: Tensor, x: Tensor, low: Tensor, d_low: Tensor, grad_a: Tensor, grad_b: Tensor) -> None:
    """Writes the gradients of A (n, p r, i) and B (n, o, p r)."""
    n = low.shape[0]
    torch.bmm(d_low.transpose(1, 2), x.unflatten(0, (n, -1)), out=grad_a)
    torch.bmm(dy.view(n, -1, dy.shape[1]).transpose(1, 2), low, out=grad_b)


def _up(x: Tensor) -> Tensor:
    """In fp32, as the models do their norms in; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def _norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMS norm over the last dimension, rounded where the models round."""
    high = _up(x)
    return weight * (high * torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)).to(x.dtype)


def _add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + update, and that normed."""
    x = x + update
    return x, _norm(x, weight, eps)


def _add_norm_into(x: Tensor, update: Tensor, weight: Tensor, eps: float, into: Tensor) -> Tensor:
    """x + update; that normed goes into `into`."""
    x, normed = _add_norm(x, update, weight, eps)
    into.copy_(normed)
    return x


def _norm_backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    high = _up(x)
    scale = torch.rsqrt(high.square().mean(-1, keepdim=True) + eps)
    normed, slope = high * scale, _up(dy) * _up(weight)
    return (scale * (slope - normed * (slope * normed).mean(-1, keepdim=True))).to(x.dtype)


def _norm_backward_add(dy: Tensor, x: Tensor, weight: Tensor, eps: float, dx: Tensor) -> Tensor:
    """The gradient of x, which also went past the norm."""
    return dx + _norm_backward(dy, x, weight, eps)


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


def _rotate_backward(dq: Tensor, dk: Tensor, dv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return torch.cat([_turn_back(dq, cos, sin), _turn_back(dk, cos, sin), dv], 1).flatten(1)


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
) -> Tensor:
    q, k, _ = _heads(qkv, dq.shape[1], dk.shape[1])
    dq = _norm_backward(_turn_back(dq, cos, sin), q, norm_q, eps)
    dk = _norm_backward(_turn_back(dk, cos, sin), k, norm_k, eps)
    return torch.cat([dq, dk, dv], 1).flatten(1)


def _gate(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, -1)
    return functional.silu(gate) * up


def _gate_backward(d_gated: Tensor, gate_up: Tensor) -> Tensor:
    """The gradient of gate and up (N, 2 I)."""
    gate, up = (_up(one) for one in gate_up.chunk(2, -1))
    slope, sigmoid = _up(d_gated), gate.sigmoid()
    silu = gate * sigmoid
    return torch.cat([slope * up * (sigmoid + silu * (1 - sigmoid)), slope * silu], -1).to(d_gated.dtype)
