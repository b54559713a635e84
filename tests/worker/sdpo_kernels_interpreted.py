"""The loss's kernels against the plain passes, in Triton's interpreter: a process of its own, as Triton asks when it is
imported. `test_sdpo.py` runs it; on a GPU, `tests/bench/student_step.py` compares the whole step."""

from __future__ import annotations

import itertools
import os

os.environ["TRITON_INTERPRET"] = "1"

import torch

from claas_worker import sdpo_kernels
from claas_worker.sdpo import Options, Targets, _targets, score_chunk

sdpo_kernels.BLOCK = 128  # several blocks to a row

N, V, K = 7, 1000, 20


def made_up(alpha: float, given_mu: bool, dtype: torch.dtype) -> tuple[torch.Tensor, Targets]:
    """Logits (N, V) and targets: y in the support and out of it, padding, duplicates, ids beyond V, zero mass."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(N, V, generator=generator) * 3
    logits[1, 5] = -torch.inf
    y = torch.randint(0, V, (N,), generator=generator)
    ids = torch.randint(0, V, (N, K), generator=generator)
    ids[0, 3:] = -1
    ids[2, 1] = ids[2, 0]
    ids[3, 2] = V + 5
    ids[4:6, 0] = y[4:6]
    log_q = torch.log_softmax(torch.randn(N, K + 1, generator=generator), -1)[:, :K]
    log_q[5, 0] = log_q[6, 3] = -torch.inf
    mu = -torch.rand(N, generator=generator) * 8 if given_mu else None
    logits = logits.to(dtype)
    return logits, _targets(logits, V, y, ids, log_q, mu, None, alpha)


def check_values_and_gradient(alpha: float, given_mu: bool) -> None:
    """The plain passes' to rounding, the gradient in the logits' place."""
    logits, targets = made_up(alpha, given_mu, torch.float32)
    options, counts = Options(alpha, 0.2, 0.5, 1.0, 10.0, 512), torch.arange(1.0, N + 1)
    values, gradient = score_chunk(logits.clone(), targets, options, counts)
    found, written = sdpo_kernels.fused_score().run(logits, targets, options, counts)
    torch.testing.assert_close(found, values, rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(written, gradient, rtol=1e-4, atol=1e-6 * float(gradient.abs().max()))
    assert written.data_ptr() == logits.data_ptr()


def check_bf16() -> None:
    """The gradient is rounded once, within a unit in the last place (the interpreter cuts off)."""
    logits, targets = made_up(0.5, False, torch.bfloat16)
    options, counts = Options(0.5, 0.2, 0.5, 1.0, 10.0, 512), torch.full((N,), float(N))
    _, exact = score_chunk(logits.float(), targets, options, counts)
    _, written = sdpo_kernels.fused_score().run(logits, targets, options, counts)
    torch.testing.assert_close(written.float(), exact, rtol=2**-7, atol=0)


def check_a_support_of_all_rows_and_a_row_that_is_not_finite() -> None:
    """There is no tail; and what is unscored is told."""
    logits = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    logits[2, 7] = torch.nan
    ids = torch.arange(16).expand(3, 16)
    log_q = torch.randn(3, 16, generator=torch.Generator().manual_seed(2)).log_softmax(-1)
    targets = _targets(logits, 16, torch.tensor([1, 2, 3]), ids, log_q, None, None, 0.5)
    options, counts = Options(0.5, 0.2, 0.5, 1.0, 10.0, 512), torch.ones(3)
    values, gradient = score_chunk(logits.clone(), targets, options, counts)
    found, written = sdpo_kernels.fused_score().run(logits, targets, options, counts)
    torch.testing.assert_close(found[:2], values[:2], rtol=1e-5, atol=2e-6)
    torch.testing.assert_close(written[:2], gradient[:2], rtol=1e-4, atol=1e-6)
    assert found[2, -1] == values[2, -1] == 1  # unscored


if __name__ == "__main__":
    for alpha, given_mu in itertools.product((0.0, 0.3, 0.5, 1.0), (False, True)):
        check_values_and_gradient(alpha, given_mu)
    check_bf16()
    check_a_support_of_all_rows_and_a_row_that_is_not_finite()
