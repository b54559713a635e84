"""The update: AdamW on the adapter's fp32 weights, with state that outlives the process, by name.

Decoupled weight decay (Loshchilov and Hutter 2019), betas 0.9 and 0.999, decay 0.01; torch's own implementation. A
fresh state warms up over eight steps, because the first Adam step is a sign step whatever the gradient. The learning
rate is the request's, never the state's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from claas_worker.errors import NonFiniteGrad, NonFiniteWeights

BETAS = (0.9, 0.999)
WEIGHT_DECAY = 0.01
WARM_UP_STEPS = 8
STEP = "step"  # () int64: steps since the state was fresh
FIRST, SECOND = "exp_avg/", "exp_avg_sq/"  # each followed by the weight's key: fp32, of the weight's shape

Arrays = Mapping[str, "np.ndarray[Any, Any]"]


class AdapterOptimizer:
    """AdamW over named parameters.

    Attributes:
        origin: `resumed`, `fresh`, or `fresh: ` and why the given state was not used.
        step: optimizer steps since the state was fresh.
        learning_rate: of the last step, after warm-up; 0 before the first.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], state: Arrays | None) -> None:
        self._parameters = dict(parameters)
        self._optimizer = torch.optim.AdamW(
            list(self._parameters.values()), lr=0.0, betas=BETAS, weight_decay=WEIGHT_DECAY
        )
        self.step = 0
        self.learning_rate = 0.0
        mismatch = None if state is None else self._mismatch(state)
        if state is None or mismatch:
            self.origin = f"fresh: {mismatch}"[:128] if mismatch else "fresh"
        else:
            self._restore(state)
            self.origin = "resumed"

    def update(self, learning_rate: float, max_grad_norm: float) -> float:
        """One step with the gradients that are there, which it clears; gives their L2 norm before clipping.

        Raises:
            NonFiniteGrad, NonFiniteWeights: nothing may be saved.
        """
        gradients = {key: parameter.grad for key, parameter in self._parameters.items()}
        present = {key: gradient for key, gradient in gradients.items() if gradient is not None}
        if len(present) < len(gradients):
            raise NonFiniteGrad(f"{next(iter(gradients.keys() - present.keys()))} has no gradient")
        # In float64, where squares of finite fp32 values cannot overflow.
        norm = float(torch.stack([gradient.double().square().sum() for gradient in present.values()]).sum().sqrt())
        if not math.isfinite(norm):
            raise NonFiniteGrad("a gradient of the adapter is not finite: nothing was saved")
        if norm > max_grad_norm:
            for gradient in present.values():
                gradient.mul_(max_grad_norm / norm)
        self.learning_rate = learning_rate * min(1.0, (self.step + 1) / WARM_UP_STEPS)
        for group in self._optimizer.param_groups:
            group["lr"] = self.learning_rate
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.step += 1
        finite = torch.stack([parameter.detach().isfinite().all() for parameter in self._parameters.values()]).tolist()
        if not all(finite):
            key = list(self._parameters)[finite.index(False)]
            raise NonFiniteWeights(f"the step made {key} not finite: nothing was saved; lower training.learningRate")
        return norm

    def state(self) -> dict[str, np.ndarray[Any, Any]]:
        """What the next request resumes from, by name, copied. Shapes and targets are those of the arrays."""
        arrays: dict[str, np.ndarray[Any, Any]] = {STEP: np.array(self.step, dtype=np.int64)}
        for key, parameter in self._parameters.items():
            moments = self._optimizer.state[parameter]
            for prefix, name in ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq")):
                arrays[prefix + key] = moments[name].detach().cpu().numpy().copy()
        return arrays

    def _mismatch(self, state: Arrays) -> str | None:
        """Why the state is not this adapter's, or None."""
        if STEP not in state or state[STEP].size != 1 or int(state[STEP].item()) < 1:
            return "the stored state has no step count"
        expected = {prefix + key for prefix in (FIRST, SECOND) for key in self._parameters}
        if odd := expected ^ (state.keys() - {STEP}):
            return f"the stored state is of other targets ({len(odd)} keys differ)"
        for key, parameter in self._parameters.items():
            for prefix in (FIRST, SECOND):
                array = state[prefix + key]
                if tuple(array.shape) != tuple(parameter.shape):
                    return f"the stored state is of another rank or shape ({tuple(array.shape)})"
                if not np.isfinite(np.asarray(array, dtype=np.float32)).all():
                    return "the stored state is not finite"
        return None

    def _restore(self, state: Arrays) -> None:
        self.step = int(state[STEP].item())
        for key, parameter in self._parameters.items():
            moments: dict[str, Tensor] = {"step": torch.tensor(float(self.step))}
            for prefix, name in ((FIRST, "exp_avg"), (SECOND, "exp_avg_sq")):
                moments[name] = torch.from_numpy(np.array(state[prefix + key], dtype=np.float32)).to(parameter.device)
            self._optimizer.state[parameter] = moments
