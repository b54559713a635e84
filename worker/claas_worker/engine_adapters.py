"""An adapter as the engine holds it: all weights one flat fp32 tensor on the device, and Adam's moments beside it.

One tensor is copied, measured and updated by one kernel each, where PEFT's 504 small ones (3B, all linear layers) would
be launched 504 times. The named parameters of the adapter are views of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from claas_store.version import OptimizerState
from claas_worker.engine_decoder import Place
from claas_worker.errors import NonFiniteGrad, NonFiniteWeights
from claas_worker.optim import BETAS, EPS, WARM_UP_STEPS, WEIGHT_DECAY, mismatch

ROW = 4096  # weights whose squares are summed in fp32 before fp64 takes over


class Block(NamedTuple):
    """Neighbouring layers in which one linear layer has the same rank and scaling: A, then B, in the flat tensor."""

    group: int
    member: int
    first: int  # layer
    last: int  # one past it
    rank: int
    scaling: float
    a: tuple[int, tuple[int, int, int]]  # start, (layers, r, i)
    b: tuple[int, tuple[int, int, int]]  # start, (layers, o, r)


class Flat(NamedTuple):
    """How an adapter's tensors lie in one: by block, and by key of adapter_model.safetensors."""

    size: int  # a multiple of ROW; what is beyond `used` is zero, and stays so
    used: int
    rank: int  # the largest
    blocks: tuple[Block, ...]
    places: Mapping[str, tuple[int, tuple[int, ...]]]  # start and shape

    def join(self, tensors: Mapping[str, Any], out: Tensor) -> Tensor:
        """`out` (size,), on the CPU, filled with these tensors or arrays."""
        for key, (start, shape) in self.places.items():
            out[start : start + math.prod(shape)] = torch.as_tensor(tensors[key]).reshape(-1)
        out[self.used :] = 0
        return out

    def parts(self, flat: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Of each block A (layers, r, i) and B (layers, o, r), views."""
        return [
            (flat[a : a + math.prod(a_shape)].view(a_shape), flat[b : b + math.prod(b_shape)].view(b_shape))
            for (a, a_shape), (b, b_shape) in ((block.a, block.b) for block in self.blocks)
        ]

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Views by key, sorted."""
        return {
            key: flat[start : start + math.prod(shape)].view(shape)
            for key, (start, shape) in sorted(self.places.items())
        }


def flatten(
    layers: Mapping[str, tuple[tuple[int, int], tuple[int, int], float]],
    places: Mapping[str, Place],
    keys: Callable[[str], tuple[str, str]],
) -> Flat | None:
    """The layout of an adapter of these layers (name: A's shape, B's shape, scaling); None if one has no place."""
    if not all(name in places for name in layers):
        return None
    ordered = sorted(layers, key=lambda name: (places[name].group, places[name].member, places[name].layer))
    runs: list[list[str]] = []
    for name in ordered:
        last = runs[-1][-1] if runs else None
        joins = last is not None and layers[last] == layers[name] and _follows(places[last], places[name])
        if joins:
            runs[-1].append(name)
        else:
            runs.append([name])
    blocks, found, start = [], {}, 0
    for run in runs:
        (a_shape, b_shape, scaling), place = layers[run[0]], places[run[0]]
        starts = []
        for side, shape in enumerate((a_shape, b_shape)):
            starts.append(start)
            for name in run:
                found[keys(name)[side]] = (start, shape)
                start += math.prod(shape)
        span = (place.group, place.member, place.layer, place.layer + len(run), a_shape[0], scaling)
        blocks.append(Block(*span, (starts[0], (len(run), *a_shape)), (starts[1], (len(run), *b_shape))))
    return Flat(-(-start // ROW) * ROW, start, max(block.rank for block in blocks), tuple(blocks), found)


def _follows(one: Place, other: Place) -> bool:
    return one == other._replace(layer=other.layer - 1)


class FlatState:
    """What the engine keeps of an adapter beside its names: weights, moments, and how many steps these have seen.

    Attributes:
        weights: (P,) fp32, on the device.
        parts: by block, views of it.
        moments: (2, P): Adam's exp_avg and exp_avg_sq; None until the first optimizer takes it.
        step: optimizer steps since the moments were fresh.
        origin: of the moments, as the first optimizer found them.
    """

    def __init__(self, layout: Flat, weights: Tensor) -> None:
        self.layout, self.weights = layout, weights
        self.parts = layout.parts(weights)
        self.moments: Tensor | None = None
        self.step = 0
        self.origin = ""

    @property
    def size_bytes(self) -> int:
        """Of weights and moments."""
        return 3 * int(self.weights.numel() * self.weights.element_size())

    def arrays(self) -> dict[str, NDArray[np.float32]]:
        """The weights, copied to the CPU, by key."""
        return {key: one.numpy() for key, one in self.layout.split(_to_cpu(self.weights)).items()}


def _to_cpu(tensor: Tensor) -> Tensor:
    if tensor.device.type == "cpu":
        return tensor.clone()
    out = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return out.copy_(tensor)


class FlatOptimizer:
    """AdamW over a flat adapter, handed to the device as a whole and judged later: `optim.AdapterOptimizer` otherwise.

    Attributes:
        origin, step, learning_rate: as there.
    """

    def __init__(
        self,
        adapter: FlatState,
        state: OptimizerState | None,
        *,
        rank: int,
        target_modules: Sequence[str],
        inner_steps: int,
    ) -> None:
        self.adapter = adapter
        self._rank, self._target_modules = rank, tuple(sorted(target_modules))
        self.learning_rate = 0.0
        if adapter.moments is None:
            self._restore(state)
        self.origin = "resumed" if adapter.step else adapter.origin
        # A single inner step knows how far it went; of several, only the whole way counts.
        self._parent = adapter.weights.clone() if inner_steps > 1 else None

    def _restore(self, state: OptimizerState | None) -> None:
        adapter = self.adapter
        shapes = {key: shape for key, (_, shape) in adapter.layout.places.items()}
        problem = None if state is None else mismatch(state, self._rank, self._target_modules, shapes)
        if state is None or problem:
            adapter.origin = f"fresh: {problem}" if problem else "fresh"
            adapter.moments = torch.zeros(2, *adapter.weights.shape, device=adapter.weights.device)
            return
        moments = torch.empty(2, *adapter.weights.shape, pin_memory=adapter.weights.device.type == "cuda")
        for row, arrays in zip(moments, (state.exp_avg, state.exp_avg_sq), strict=True):
            adapter.layout.join(arrays, row)
        adapter.moments, adapter.step = moments.to(adapter.weights.device), state.step

    @property
    def step(self) -> int:
        """Optimizer steps since the state was fresh."""
        return self.adapter.step

    def scalars(self, learning_rate: float, max_grad_norm: float) -> list[float]:
        """What `enqueue` needs of this request's options: SCALARS numbers, for the device."""
        step = self.adapter.step + 1
        rate = self._rate(learning_rate)
        first, second = (1 - beta**step for beta in BETAS)
        return [max_grad_norm, 1 - rate * WEIGHT_DECAY, rate / first, math.sqrt(second)]

    def enqueue(self, gradient: Tensor, scalars: Tensor, adamw: Callable[..., Tensor]) -> Tensor:
        """Clips, updates, measures: (3,) norms of gradient, update and new weights, in float64, without waiting."""
        assert self.adapter.moments is not None
        norms = adamw(*(one.view(-1, ROW) for one in (self.adapter.weights, *self.adapter.moments, gradient)), scalars)
        if self._parent is not None:
            norms[1] = torch.linalg.vector_norm(self.adapter.weights - self._parent, dtype=torch.float64)
        return norms

    def check_gradient(self, grad_norm: float) -> None:
        """Raises NonFiniteGrad."""
        if not math.isfinite(grad_norm):
            raise NonFiniteGrad("a gradient is not finite: nothing was saved")

    def settle(self, learning_rate: float, weights_norm: float) -> None:
        """The update that was made counts.

        Raises:
            NonFiniteWeights: nothing may be saved.
        """
        self.learning_rate = self._rate(learning_rate)
        self.adapter.step += 1
        if not math.isfinite(weights_norm):
            raise NonFiniteWeights("the step made weights not finite: nothing was saved; lower training.learningRate")

    def state(self) -> OptimizerState:
        """What the next request resumes from, copied."""
        assert self.adapter.moments is not None
        moments = [
            {key: one.numpy() for key, one in self.adapter.layout.split(row).items()}
            for row in _to_cpu(self.adapter.moments)
        ]
        return OptimizerState(self.adapter.step, self._rank, self._target_modules, *moments)

    def _rate(self, learning_rate: float) -> float:
        return learning_rate * min(1.0, (self.adapter.step + 1) / WARM_UP_STEPS)


def adamw(weights: Tensor, exp_avg: Tensor, exp_avg_sq: Tensor, gradient: Tensor, scalars: Tensor) -> Tensor:
    """One AdamW step in place (torch.optim.AdamW's formula), in one pass: gradient clipping before, norms beside it.

    Args:
        weights, exp_avg, exp_avg_sq, gradient: (P / ROW, ROW) fp32.
        scalars: (4,) maximal gradient norm, 1 - rate * decay, rate / bias correction, root of the other's.

    Returns:
        (3,) float64: the L2 norms of gradient, change and new weights. Not finite (values beyond 1e17 are taken for
        that): the step must not be kept.
    """
    max_norm, keep, rate, root = scalars
    norm = gradient.square().sum(-1).sum(dtype=torch.float64).sqrt()
    clipped = gradient * (max_norm / norm).clamp(max=1.0).to(gradient.dtype)
    first = exp_avg + (clipped - exp_avg) * (1 - BETAS[0])
    second = exp_avg_sq * BETAS[1] + clipped * clipped * (1 - BETAS[1])
    change = weights * (keep - 1) - rate * first / (second.sqrt() / root + EPS)
    new = weights + change
    squares = torch.stack([change.square().sum(-1), new.square().sum(-1)])  # (2, P / ROW)
    exp_avg.copy_(first)
    exp_avg_sq.copy_(second)
    weights.copy_(new)
    return torch.cat([norm[None], squares.sum(-1, dtype=torch.float64).sqrt()])
