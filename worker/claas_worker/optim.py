"""The update: AdamW on the adapter's fp32 weights, with state that outlives the process, by name.

Decoupled weight decay (Loshchilov and Hutter 2019), betas 0.9 and 0.999, decay 0.01; torch's own implementation. A
fresh state warms up over eight steps, because the first Adam step is a sign step whatever the gradient. The learning
rate is the request's, never the state's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from claas_store.version import OptimizerState
from claas_worker.errors import NonFiniteGrad, NonFiniteWeights

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
EPS = 1e-8
WARM_UP_STEPS = 8


def total_norm(tensors: Sequence[Tensor]) -> float:
    """L2 norm of all tensors together; not finite only if a value is not, however large they are."""
    norm = float(torch.nn.utils.get_total_norm(tensors))
    if math.isfinite(norm):
        return norm
    return float(torch.stack([tensor.double().square().sum() for tensor in tensors]).sum().sqrt())  # fp32 overflowed


def mismatch(
    state: OptimizerState, rank: int, target_modules: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Why the state is not that of an adapter of this rank, of these targets (sorted) and shapes by key; or None."""
    if state.rank != rank:
        return f"the stored state is of rank {state.rank}, the adapter of rank {rank}"
    if state.target_modules != target_modules:
        return "the stored state is of other target modules"
    for arrays in (state.exp_avg, state.exp_avg_sq):
        if {key: array.shape for key, array in arrays.items()} != shapes:
            return "the stored state is of weights with other names or shapes"
        if not all(np.isfinite(array).all() for array in arrays.values()):
            return "the stored state is not finite"
    if state.step < 1:
        return "the stored state has taken no step"
    return None


class AdapterOptimizer:
    """AdamW over named parameters.

    Attributes:
        origin: `resumed`, `fresh`, or `fresh: ` and why the given state was not used.
        step: optimizer steps since the state was fresh.
        learning_rate: of the last step, after warm-up; 0 before the first.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        state: OptimizerState | None,
        *,
        rank: int,
        target_modules: Sequence[str],
    ) -> None:
        self._parameters = dict(parameters)
        self._rank, self._target_modules = rank, tuple(sorted(target_modules))
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=0.0, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY
        )
        self.step = 0
        self.learning_rate = 0.0
        shapes = {key: tuple(parameter.shape) for key, parameter in self._parameters.items()}
        problem = None if state is None else mismatch(state, rank, self._target_modules, shapes)
        if state is None or problem:
            self.origin = f"fresh: {problem}" if problem else "fresh"
        else:
            self._restore(state)
            self.origin = "resumed"

    def grad_norm(self) -> float:
        """L2 norm of all gradients together.

        Raises:
            NonFiniteGrad: a gradient is missing or not finite.
        """
        gradients = self._gradients()
        norm = total_norm(list(gradients.values()))
        if not math.isfinite(norm):
            key = next(key for key, gradient in gradients.items() if not bool(gradient.isfinite().all()))
            raise NonFiniteGrad(f"the gradient of {key} is not finite: nothing was saved")
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        gradients = {}
        for key, parameter in self._parameters.items():
            if parameter.grad is None:
                raise NonFiniteGrad(f"{key} has no gradient: nothing was saved")
            gradients[key] = parameter.grad
        return gradients

    def update(self, learning_rate: float, max_grad_norm: float, grad_norm: float) -> None:
        """One step with the gradients that are there, of the L2 norm `grad_norm`; it clears them.

        Raises:
            NonFiniteWeights: nothing may be saved.
        """
        if grad_norm > max_grad_norm:
            torch._foreach_mul_(list(self._gradients().values()), max_grad_norm / grad_norm)
        self.learning_rate = learning_rate * min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if not math.isfinite(total_norm([parameter.detach() for parameter in self._parameters.values()])):
            key = next(key for key, weights in self._parameters.items() if not bool(weights.isfinite().all()))
            raise NonFiniteWeights(f"the step made {key} not finite: nothing was saved; lower training.learningRate")

    def state(self) -> OptimizerState:
        """What the next request resumes from, copied."""
        moments: dict[str, dict[str, NDArray[np.float32]]] = {"exp_avg": {}, "exp_avg_sq": {}}
        for key, parameter in self._parameters.items():
            for name, arrays in moments.items():
                arrays[key] = self._optimizer.state[parameter][name].detach().float().cpu().numpy().copy()
        return OptimizerState(self.step, self._rank, self._target_modules, **moments)

    def _restore(self, state: OptimizerState) -> None:
        self.step = state.step
        for key, parameter in self._parameters.items():
            self._optimizer.state[parameter] = {
                "step": torch.tensor(float(state.step)),
                "exp_avg": torch.tensor(state.exp_avg[key], dtype=parameter.dtype, device=parameter.device),
                "exp_avg_sq": torch.tensor(state.exp_avg_sq[key], dtype=parameter.dtype, device=parameter.device),
            }
