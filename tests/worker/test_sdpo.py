"""The SDPO loss against its oracles (numbers 1-9 and 13), each by a formula that shares no code with it.

Distributions are enumerated in numpy, derivatives are finite differences, expectations are sums over the vocabulary:
everything is float64, so a bound of 1e-9 means "equal". Where an oracle says "any", hypothesis draws the case.
"""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from claas_worker.errors import (
    EmptyResponse,
    GuardError,
    LogprobLengthMismatch,
    NonFiniteInput,
    NonFiniteLoss,
    TokenizerMismatch,
)
from claas_worker.sdpo import (
    TAIL_FLOOR,
    anchor_kl,
    combine,
    logprobs_from_hidden,
    sdpo_loss,
    sdpo_loss_from_hidden,
    topk_from_hidden,
)

ALPHAS = (0.0, 0.01, 0.3, 0.5, 0.7, 0.99, 1.0)
torch.set_num_threads(2)
settings.register_profile("worker", max_examples=60, deadline=None, derandomize=True)
settings.load_profile("worker")


@dataclass(frozen=True)
class Case:
    """N positions of a student and a teacher over V ids, seen through K of them."""

    logits: Tensor  # (N, V)
    log_q: Tensor  # (N, V) the teacher's whole distribution
    y: Tensor  # (N,)
    ids: Tensor  # (N, K)

    @property
    def teacher(self) -> Tensor:
        return self.log_q.gather(1, self.ids)  # (N, K)

    def loss(self, **options: object) -> tuple[Tensor, dict[str, float]]:
        return sdpo_loss(self.logits, self.y, self.ids, self.teacher, **options)  # type: ignore[arg-type]

    def jsd(self, **options: object) -> float:
        return self.loss(**options)[1]["jsd"]

    def gradient(self, **options: object) -> Tensor:
        logits = self.logits.clone().requires_grad_()
        replace(self, logits=logits).loss(**options)[0].backward()
        assert logits.grad is not None
        return logits.grad


@st.composite
def cases(draw: st.DrawFn, whole: bool = False, alike: bool = False) -> Case:
    """Any case: sizes, sharpness and support drawn; `whole`: K = V; `alike`: student == teacher."""
    n, v = draw(st.integers(1, 4)), draw(st.integers(2, 12))
    k = v if whole else draw(st.integers(1, v))
    sharpness = draw(st.sampled_from([0.1, 1.0, 3.0]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    logits = torch.tensor(rng.normal(0, sharpness, (n, v)))
    teacher = logits if alike else torch.tensor(rng.normal(0, sharpness, (n, v)))
    ids = torch.tensor(np.stack([rng.permutation(v)[:k] for _ in range(n)]))
    return Case(logits, teacher.log_softmax(-1), torch.tensor(rng.integers(0, v, n)), ids)


def make_case(n: int = 5, v: int = 11, k: int = 4, seed: int = 0, sharpness: float = 1.5) -> Case:
    rng = np.random.default_rng(seed)
    ids = torch.tensor(np.stack([rng.permutation(v)[:k] for _ in range(n)]))
    log_q = torch.tensor(rng.normal(0, sharpness, (n, v))).log_softmax(-1)
    return Case(torch.tensor(rng.normal(0, sharpness, (n, v))), log_q, torch.tensor(rng.integers(0, v, n)), ids)


def masses(case: Case, t: int) -> tuple[np.ndarray, np.ndarray]:
    """Bucket masses P, Q of one position by enumeration: the support in its order, then the tail unless it is empty."""
    p, q = case.logits[t].softmax(-1).numpy(), case.log_q[t].exp().numpy()
    inside = case.ids[t].numpy()
    outside = np.setdiff1d(np.arange(len(p)), inside)
    if not outside.size:
        return p[inside], q[inside]
    return tuple(np.append(mass[inside], max(mass[outside].sum(), TAIL_FLOOR)) for mass in (p, q))  # type: ignore[return-value]


def kl(p: np.ndarray, q: np.ndarray) -> float:
    return float(np.sum(p * np.log(p / q)))


def enumerated_divergence(p: np.ndarray, q: np.ndarray, alpha: float) -> float:
    if alpha == 0:
        return kl(q, p)
    if alpha == 1:
        return kl(p, q)
    m = (1 - alpha) * p + alpha * q
    return (1 - alpha) * kl(p, m) + alpha * kl(q, m)


def one(case: Case, t: int, y: int | None = None) -> Case:
    """Position t alone, with another response token if one is given."""
    rows = slice(t, t + 1)
    return Case(case.logits[rows], case.log_q[rows], case.y[rows] if y is None else torch.tensor([y]), case.ids[rows])


# ---------------------------------------------------------------------------------------------------------------------


@given(cases(), st.sampled_from(ALPHAS))
def test_divergence_is_that_of_the_enumerated_buckets(case: Case, alpha: float) -> None:
    expected = np.mean([enumerated_divergence(*masses(case, t), alpha) for t in range(len(case.y))])
    assert case.jsd(alpha=alpha) == pytest.approx(expected, abs=2 * TAIL_FLOOR if alpha in (0, 1) else 1e-12)


@given(cases(), st.floats(1e-6, 1 - 1e-6))
def test_oracle_1_divergence_is_bounded_and_symmetric(case: Case, alpha: float) -> None:
    log_p = case.logits.log_softmax(-1)
    swapped = Case(logits=case.log_q, log_q=log_p, y=case.y, ids=case.ids)
    entropy = -(alpha * math.log(alpha) + (1 - alpha) * math.log1p(-alpha))
    assert 0 <= case.jsd(alpha=0.5) <= math.log(2)
    assert 0 <= case.jsd(alpha=alpha) <= entropy
    assert case.jsd(alpha=alpha) == pytest.approx(swapped.jsd(alpha=1 - alpha), rel=1e-9, abs=1e-12)
    assert case.jsd(alpha=0) == pytest.approx(swapped.jsd(alpha=1), rel=1e-9, abs=1e-12)


def test_oracle_1_disjoint_distributions_reach_log_2() -> None:
    far = torch.tensor([[40.0, 0.0]], dtype=torch.float64)
    case = Case(far, far.flip(1).log_softmax(-1), torch.tensor([0]), torch.tensor([[0, 1]]))
    assert case.jsd(alpha=0.5) == pytest.approx(math.log(2), abs=1e-12)


@given(cases(whole=True))
def test_oracle_2_limits_are_the_two_kl(case: Case) -> None:
    small = 1e-7
    forward = np.mean([kl(*reversed(masses(case, t))) for t in range(len(case.y))])
    reverse = np.mean([kl(*masses(case, t)) for t in range(len(case.y))])
    assert case.jsd(alpha=small) / (small * (1 - small)) == pytest.approx(forward, rel=1e-2, abs=1e-9)
    assert case.jsd(alpha=1 - small) / (small * (1 - small)) == pytest.approx(reverse, rel=1e-2, abs=1e-9)
    assert case.jsd(alpha=0) == pytest.approx(forward, abs=1e-12)
    assert case.jsd(alpha=1) == pytest.approx(reverse, abs=1e-12)


@given(cases(whole=True), st.sampled_from(ALPHAS))
def test_oracle_3_gradients_in_the_logits_are_the_formulas(case: Case, alpha: float) -> None:
    p, q = case.logits.softmax(-1), case.log_q.exp()
    m = (1 - alpha) * p + alpha * q
    if alpha == 0:
        expected = p - q
    elif alpha == 1:
        expected = p * ((p / q).log() - (p * (p / q).log()).sum(-1, keepdim=True))
    else:
        expected = (1 - alpha) * p * ((p / m).log() - (p * (p / m).log()).sum(-1, keepdim=True))
    found = case.gradient(alpha=alpha, pg_weight=0, jsd_reg_weight=1)
    torch.testing.assert_close(found, expected / len(case.y), rtol=0, atol=1e-12)


@settings(max_examples=25)
@given(cases(), st.sampled_from(ALPHAS), st.booleans())
def test_oracle_3_gradients_are_the_finite_differences(case: Case, alpha: float, off_policy: bool) -> None:
    log_p_y = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1)
    shift = torch.linspace(-0.5, 0.5, len(case.y) + 2, dtype=torch.float64)[1:-1]
    options = {"alpha": alpha, "pg_weight": 0.0, "jsd_reg_weight": 1.0}
    gradient = case.gradient(**options, old_logprobs=log_p_y - shift if off_policy else None)
    step = 1e-5
    weight = shift.exp().clamp(max=2) if off_policy else torch.ones_like(shift)  # detached: held while the logits move
    for t in range(len(case.y)):
        for i in range(case.logits.shape[1]):
            ends = []
            for sign in (1, -1):
                moved = case.logits[t : t + 1].clone()
                moved[0, i] += sign * step
                ends.append(replace(one(case, t), logits=moved).jsd(alpha=alpha))
            difference = (ends[0] - ends[1]) / (2 * step) * weight[t].item() / len(case.y)
            assert gradient[t, i].item() == pytest.approx(difference, abs=1e-8)


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("log_tail", [-15.0, -20.0])  # both below the floor of 1e-6
def test_oracle_3_a_floored_tail_has_no_gradient_of_its_own(alpha: float, log_tail: float) -> None:
    """The teacher expects 0.3 there, the student next to nothing: the divergence stands still while its tail moves."""
    logits = torch.tensor([[1.0, 0.5, 0.0, log_tail, log_tail - 1]], dtype=torch.float64)
    log_q = torch.tensor([[0.3, 0.25, 0.15, 0.2, 0.1]], dtype=torch.float64).log()
    case = Case(logits, log_q, torch.tensor([0]), torch.tensor([[0, 1, 2]]))
    options = {"alpha": alpha, "pg_weight": 0.0, "jsd_reg_weight": 1.0}
    gradient, step = case.gradient(**options), 1e-3
    for i in range(5):
        ends = []
        for sign in (1, -1):
            moved = logits.clone()
            moved[0, i] += sign * step
            ends.append(replace(case, logits=moved).jsd(alpha=alpha))
        assert gradient[0, i].item() == pytest.approx((ends[0] - ends[1]) / (2 * step), abs=1e-6 if i < 3 else 1e-9)


@settings(max_examples=30)
@given(cases(), st.sampled_from([a for a in ALPHAS if a > 0]))
def test_oracle_4_expected_advantage_is_minus_kl_and_its_policy_gradient_minus_grad_d(case: Case, alpha: float) -> None:
    t, v = 0, case.logits.shape[1]
    p_rows = case.logits[t].softmax(-1)
    p, q = masses(case, t)
    options = {"alpha": alpha, "advantage_clip": 1e6}
    mean, policy_gradient = 0.0, torch.zeros(1, v, dtype=torch.float64)
    for y in range(v):
        sampled = one(case, t, y)
        mean += p_rows[y].item() * sampled.loss(**options)[1]["mean_advantage"]
        policy_gradient += p_rows[y] * sampled.gradient(**options, pg_weight=1, jsd_reg_weight=0)
    # Buckets may sum to 1 + 1e-6, the floor; so far may an expectation over ids be from one over buckets.
    assert mean == pytest.approx(
        -kl(p, (1 - alpha) * p + alpha * q), abs=2e-5 if min(p[-1], q[-1]) <= TAIL_FLOOR else 1e-10
    )
    assert mean <= 2e-5 if min(p[-1], q[-1]) <= TAIL_FLOOR else mean <= 1e-12
    if alpha < 1:  # pg = -r A, so its gradient is -A grad log p
        divergence = one(case, t).gradient(alpha=alpha, pg_weight=0, jsd_reg_weight=1)
        torch.testing.assert_close(policy_gradient, divergence / (1 - alpha), rtol=1e-8, atol=1e-9)


@given(cases(alike=True), st.sampled_from(ALPHAS))
def test_oracle_5_student_equal_to_teacher_has_nothing_to_learn(case: Case, alpha: float) -> None:
    metrics = case.loss(alpha=alpha)[1]
    assert metrics["mean_abs_advantage"] < 1e-9
    assert 0 <= metrics["jsd"] < 1e-12
    assert case.gradient(alpha=alpha).abs().max() < 1e-9


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("log_tail", [-3.0, -12.0, -13.9, -30.0])  # above, at and far below the floor
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_oracle_5_holds_outside_the_top_k_and_under_the_floor(
    alpha: float, log_tail: float, dtype: torch.dtype
) -> None:
    logits = torch.tensor([[1.0, 0.5, 0.0, log_tail, log_tail - 1]], dtype=torch.float64).log_softmax(-1)
    case = Case(logits.to(dtype), logits, torch.tensor([4]), torch.tensor([[0, 1, 2]]))  # y is in the tail
    metrics = case.loss(alpha=alpha)[1]
    near = 1e-9 if dtype == torch.float64 else 1e-6
    assert metrics["chosen_in_topk_fraction"] == 0
    assert metrics["mean_abs_advantage"] < near
    assert 0 <= metrics["jsd"] < near * 1e-3
    assert case.gradient(alpha=alpha).abs().max() < near


@given(cases(whole=True), st.sampled_from(ALPHAS))
def test_oracle_6_full_support_is_the_full_vocabulary(case: Case, alpha: float) -> None:
    full = [
        enumerated_divergence(row.softmax(-1).numpy(), log_q.exp().numpy(), alpha)
        for row, log_q in zip(case.logits, case.log_q, strict=True)
    ]
    metrics = case.loss(alpha=alpha)[1]
    assert metrics["jsd"] == pytest.approx(np.mean(full), abs=1e-12)
    assert metrics["student_topk_mass"] == pytest.approx(1)
    assert metrics["teacher_topk_mass"] == pytest.approx(1)


def test_oracle_6_full_support_has_no_tail_and_is_rescaled() -> None:
    case = make_case(n=2, v=6, k=6)
    short = case.teacher + math.log(0.9)  # a teacher with more rows than the student: their mass is missing
    found = sdpo_loss(case.logits, case.y, case.ids, short)[1]
    assert found == pytest.approx(case.loss()[1], abs=1e-12)


@given(cases(whole=True), st.sampled_from(ALPHAS))
def test_oracle_6_nested_supports_never_lose_divergence(case: Case, alpha: float) -> None:
    seen = [replace(case, ids=case.ids[:, :k]).jsd(alpha=alpha) for k in range(case.ids.shape[1] + 1)]
    assert seen[0] == pytest.approx(0, abs=1e-15)  # the tail alone
    assert all(finer >= coarser - 2 * TAIL_FLOOR for coarser, finer in pairwise(seen))
    if case.logits.abs().max() < 4:  # every tail above the floor: exact
        assert all(finer >= coarser - 1e-12 for coarser, finer in pairwise(seen))


@given(cases(), st.sampled_from(ALPHAS), st.randoms(use_true_random=False))
def test_oracle_6_order_padding_and_duplicates_change_nothing(case: Case, alpha: float, random: object) -> None:
    n, k = case.ids.shape
    v = case.logits.shape[1]
    padding = torch.full((n, 2), -1)
    ids = torch.cat([case.ids, padding, case.ids[:, :1], torch.full((n, 1), v + 3)], -1)
    again = case.teacher[:, :1] - 1  # of two logprobs for one id the larger counts
    log_q = torch.cat([case.teacher, torch.full((n, 2), torch.nan), again, torch.full((n, 1), -50.0)], -1)
    order = list(range(k + 4))
    random.shuffle(order)  # type: ignore[attr-defined]
    logits = case.logits.clone().requires_grad_()
    loss, metrics = sdpo_loss(logits, case.y, ids[:, order], log_q[:, order], alpha=alpha)
    loss.backward()
    assert metrics == pytest.approx(case.loss(alpha=alpha)[1], rel=1e-12, abs=1e-14)
    torch.testing.assert_close(logits.grad, case.gradient(alpha=alpha), rtol=1e-12, atol=1e-14)
    assert replace(case, ids=case.ids.flip(1)).loss(alpha=alpha)[1] == case.loss(alpha=alpha)[1]  # order: bit for bit


@given(cases())
def test_oracle_7_alpha_is_continuous_and_both_ends_learn(case: Case) -> None:
    lower, middle, upper = (case.loss(alpha=a)[1]["mean_advantage"] for a in (0.49, 0.50, 0.51))
    # A = log(1 - alpha + alpha q/p): its slope lies in [-1/(1-alpha), 1/alpha], its curvature is the slope squared.
    assert abs(upper - middle) <= 0.01 / 0.49
    assert abs(upper - 2 * middle + lower) <= (0.01 / 0.49) ** 2
    for alpha in (0.0, 1.0):
        gradient = case.gradient(alpha=alpha)
        assert gradient.isfinite().all()
        assert gradient.abs().max() > 0


@given(cases())
def test_oracle_7_share_of_positive_advantages_does_not_depend_on_alpha(case: Case) -> None:
    shares = {case.loss(alpha=a)[1]["frac_positive_advantage"] for a in (0.0, 0.3, 0.5, 0.7, 1.0)}
    assert len(shares) == 1
    if case.ids.shape[1] == case.logits.shape[1]:  # liked better by the teacher than by the student
        better = case.log_q.gather(1, case.y[:, None]) > case.logits.log_softmax(-1).gather(1, case.y[:, None]) + 1e-5
        assert shares == {better.double().mean().item()}


@given(cases(), st.sampled_from(ALPHAS))
def test_oracle_8_snapshot_is_on_policy(case: Case, alpha: float) -> None:
    log_p_y = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1)
    for metrics in (case.loss(alpha=alpha)[1], case.loss(alpha=alpha, old_logprobs=log_p_y)[1]):
        assert metrics["mean_is_ratio"] == pytest.approx(1, abs=1e-12)
        assert metrics["clip_fraction"] == metrics["active_clip_fraction"] == 0
        assert metrics["pg_loss"] == pytest.approx(-metrics["mean_advantage"], abs=1e-12)
        assert metrics["jsd_reg"] == pytest.approx(0.5 * metrics["jsd"], abs=1e-12)
        assert metrics["total_loss"] == pytest.approx(metrics["pg_loss"] + metrics["jsd_reg"], abs=1e-12)


@given(cases(), st.sampled_from(ALPHAS))
def test_oracle_8_clip_stops_the_policy_gradient_of_good_tokens_only(case: Case, alpha: float) -> None:
    log_p_y = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1)
    for t in range(len(case.y)):
        token, mu = one(case, t), log_p_y[t : t + 1] - math.log(1.5)
        _, metrics = token.loss(alpha=alpha, old_logprobs=mu)
        advantage = metrics["mean_advantage"]
        gradient = token.gradient(alpha=alpha, old_logprobs=mu, jsd_reg_weight=0)
        assert metrics["mean_is_ratio"] == pytest.approx(1.5)
        assert metrics["clip_fraction"] == 1
        assert metrics["jsd_reg"] == pytest.approx(0.5 * 1.5 * metrics["jsd"])
        if advantage > 0:
            assert metrics["pg_loss"] == pytest.approx(-1.2 * advantage)
            assert torch.count_nonzero(gradient) == 0
            assert metrics["active_clip_fraction"] == 1
        elif advantage < 0:
            score = torch.nn.functional.one_hot(token.y, case.logits.shape[1]) - token.logits.softmax(-1)
            assert metrics["pg_loss"] == pytest.approx(-1.5 * advantage)
            torch.testing.assert_close(gradient, -1.5 * advantage * score)
            assert metrics["active_clip_fraction"] == 0


def test_oracle_8_ratios_are_bounded_and_so_is_the_weight_of_the_divergence() -> None:
    case = make_case(n=1)
    log_p_y = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1)
    metrics = case.loss(old_logprobs=log_p_y - 50)[1]
    assert metrics["mean_is_ratio"] == pytest.approx(math.exp(20))
    assert metrics["jsd_reg"] == pytest.approx(0.5 * 2 * metrics["jsd"])


@given(cases(), st.sampled_from(ALPHAS), st.booleans())
def test_oracle_9_one_pass_is_its_micro_batches_in_any_order(case: Case, alpha: float, off_policy: bool) -> None:
    case = Case(*(field.repeat(3, 1) if field.ndim == 2 else field.repeat(3) for field in vars(case).values()))
    n = len(case.y)
    mu = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1) - 0.4 if off_policy else None
    _, whole = case.loss(alpha=alpha, old_logprobs=mu)
    gradient = case.gradient(alpha=alpha, old_logprobs=mu)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(n))
    parts, losses, split = [], [], torch.zeros_like(gradient)
    for rows in order.tensor_split(4):  # some may be empty
        part = Case(case.logits[rows], case.log_q[rows], case.y[rows], case.ids[rows])
        options = {"alpha": alpha, "total_tokens": n, "old_logprobs": None if mu is None else mu[rows]}
        loss, metrics = part.loss(**options)
        losses.append(loss.item())
        parts.append(metrics)
        split[rows] = part.gradient(**options)
    assert combine(parts) == pytest.approx(whole, abs=1e-12)
    assert sum(losses) == pytest.approx(whole["total_loss"], abs=1e-12)
    torch.testing.assert_close(split, gradient, rtol=0, atol=1e-14)


@given(cases(), st.sampled_from(ALPHAS))
def test_oracle_9_padded_is_packed_is_one_by_one(case: Case, alpha: float) -> None:
    n = len(case.y)
    mask = torch.arange(2 * n) % 2 > 0  # left, right and in between

    def padded(values: Tensor, filler: float) -> Tensor:
        spread = torch.full((2 * n, *values.shape[1:]), filler, dtype=values.dtype)
        spread[mask] = values
        return spread

    mu = case.logits.log_softmax(-1).gather(1, case.y[:, None]).squeeze(1)
    logits = padded(case.logits, torch.nan).requires_grad_()  # whatever a masked row holds
    tensors = (padded(case.y, -100), padded(case.ids, 0), padded(case.teacher, torch.nan), padded(mu, torch.nan))
    loss, metrics = sdpo_loss(logits, *tensors, mask, alpha=alpha)
    loss.backward()
    assert metrics == case.loss(alpha=alpha, old_logprobs=mu)[1]
    assert torch.equal(logits.grad[mask], case.gradient(alpha=alpha, old_logprobs=mu))
    assert torch.count_nonzero(logits.grad[~mask]) == 0
    singles = [one(case, t).loss(alpha=alpha, old_logprobs=mu[t : t + 1], total_tokens=n)[1] for t in range(n)]
    assert combine(singles) == pytest.approx(metrics, abs=1e-12)


# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", ALPHAS)
def test_oracle_13_minus_9999_is_no_mass(alpha: float) -> None:
    case = make_case(n=3, k=5)
    log_q = case.teacher.clone()
    log_q[:, 1] = -torch.inf
    logits = case.logits.clone().requires_grad_()
    loss, metrics = sdpo_loss(logits, case.y, case.ids, log_q, alpha=alpha)
    loss.backward()
    for written in (-9999.0, -9984.0):  # vLLM's JSON, and the same in bfloat16
        spelled = log_q.masked_fill(log_q == -torch.inf, written)
        assert sdpo_loss(case.logits, case.y, case.ids, spelled, alpha=alpha)[1] == metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("alpha", ALPHAS)
def test_oracle_13_a_response_token_the_teacher_refuses_is_pushed_down(alpha: float) -> None:
    case = make_case(n=1, k=5)
    y = case.ids[:, 2]
    log_q = case.teacher.clone()
    log_q[:, 2] = -9999.0
    logits = case.logits.clone().requires_grad_()
    loss, metrics = sdpo_loss(logits, y, case.ids, log_q, alpha=alpha)
    loss.backward()
    expected = -1.0 if alpha == 0 else -10.0 if alpha == 1 else math.log1p(-alpha)  # log M/P = log(1 - alpha)
    assert metrics["mean_advantage"] == pytest.approx(expected)
    assert metrics["advantage_clamps"] == (alpha == 1)
    assert metrics["chosen_in_topk_fraction"] == 1
    assert logits.grad[0, y].item() > 0  # descent lowers it


def test_oracle_13_missing_zero_mass_at_alpha_1_is_bounded_by_the_floor() -> None:
    case = make_case(n=1, v=4, k=4)
    log_q = case.log_q.clone()
    log_q[0, 0] = -torch.inf
    log_q -= log_q.logsumexp(-1, keepdim=True)
    p, q = case.logits[0].softmax(-1).numpy(), log_q[0].exp().numpy()
    expected = kl(p[1:], q[1:]) + p[0] * math.log(p[0] / TAIL_FLOOR)
    found = sdpo_loss(case.logits, case.y, torch.arange(4)[None], log_q, alpha=1)[1]["jsd"]
    assert found == pytest.approx(expected, abs=2 * TAIL_FLOOR)


def test_oracle_13_an_extra_entry_for_the_response_token_is_a_bucket() -> None:
    case = make_case(n=4, v=11, k=4)
    outside = ~(case.ids == case.y[:, None]).any(-1)
    assert outside.any()
    ids = torch.cat([case.y[:, None], case.ids], -1)  # vLLM: the actual token first, then the top K
    log_q = case.log_q.gather(1, ids)
    metrics = sdpo_loss(case.logits, case.y, ids, log_q)[1]
    assert metrics["chosen_in_topk_fraction"] == 1
    log_p_y = case.logits.log_softmax(-1).gather(1, case.y[:, None])
    expected = (0.5 + 0.5 * (log_q[:, :1] - log_p_y).exp()).log().mean().item()
    assert metrics["mean_advantage"] == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(("excess", "outcome"), [(5e-4, "rescaled"), (5e-3, "refused")])
def test_oracle_13_teacher_mass_above_one(excess: float, outcome: str) -> None:
    case = make_case(n=2, v=8, k=8)
    case = replace(case, ids=case.ids[:, :7], log_q=case.log_q)
    normal = case.teacher - case.teacher.logsumexp(-1, keepdim=True)  # all mass on the support, none in the tail
    above = normal + math.log1p(excess)
    if outcome == "refused":
        with pytest.raises(NonFiniteInput, match="sum to more than 1"):
            sdpo_loss(case.logits, case.y, case.ids, above)
    else:
        assert sdpo_loss(case.logits, case.y, case.ids, above)[1] == pytest.approx(
            sdpo_loss(case.logits, case.y, case.ids, normal)[1], abs=1e-9
        )


FAULTS: dict[str, tuple[type[GuardError], dict[str, object]]] = {
    "nan teacher": (NonFiniteInput, {"teacher_logprobs": (0, torch.nan)}),
    "infinite teacher": (NonFiniteInput, {"teacher_logprobs": (0, torch.inf)}),
    "teacher above zero": (NonFiniteInput, {"teacher_logprobs": (0, torch.tensor([2e-4] + 3 * [-torch.inf]))}),
    "nan rollout": (NonFiniteInput, {"old_logprobs": (0, torch.nan)}),
    "infinite rollout": (NonFiniteInput, {"old_logprobs": (0, -torch.inf)}),
    "nan student": (NonFiniteInput, {"student_logits": (0, torch.nan)}),
    "infinite student": (NonFiniteInput, {"student_logits": (0, torch.inf)}),
    "response id beyond V": (TokenizerMismatch, {"response_ids": (0, 11)}),
    "response id negative": (TokenizerMismatch, {"response_ids": (0, -100)}),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_oracle_13_bad_values_are_refused_by_name(fault: str) -> None:
    error, change = FAULTS[fault]
    case = make_case()
    arguments = {
        "student_logits": case.logits.clone(),
        "response_ids": case.y.clone(),
        "support_ids": case.ids,
        "teacher_logprobs": case.teacher.clone(),
        "old_logprobs": torch.full((5,), -1.0, dtype=torch.float64),
    }
    for name, (row, value) in change.items():  # type: ignore[misc]
        arguments[name][row] = value
    with pytest.raises(error) as caught:
        sdpo_loss(**arguments)
    assert caught.value.reason == error.reason
    assert not caught.value.retryable
    mask = torch.ones(5)
    mask[0] = 0  # the same fault in a masked row is nobody's business
    assert sdpo_loss(**arguments, mask=mask)[1]["tokens_processed"] == 4


@pytest.mark.parametrize("length", [4, 6])
@pytest.mark.parametrize("name", ["response_ids", "support_ids", "teacher_logprobs", "old_logprobs", "mask"])
def test_oracle_13_lengths_off_by_one_are_refused_by_name(name: str, length: int) -> None:
    case = make_case(n=6)
    arguments = {
        "response_ids": case.y[:5],
        "support_ids": case.ids[:5],
        "teacher_logprobs": case.teacher[:5],
        "old_logprobs": torch.full((5,), -1.0),
        "mask": torch.ones(5),
    }
    wrong = {**arguments, "old_logprobs": torch.full((6,), -1.0), "mask": torch.ones(6)}
    full = {"response_ids": case.y, "support_ids": case.ids, "teacher_logprobs": case.teacher}
    arguments[name] = {**wrong, **full}[name][:length]
    with pytest.raises(LogprobLengthMismatch, match=name):
        sdpo_loss(case.logits[:5], **arguments)


def test_oracle_13_empty_responses_are_refused() -> None:
    case = make_case()
    with pytest.raises(EmptyResponse):
        case.loss(mask=torch.zeros(5))
    with pytest.raises(EmptyResponse):
        sdpo_loss(case.logits[:0], case.y[:0], case.ids[:0], case.teacher[:0])


def test_oracle_13_infinite_divergence_is_refused() -> None:
    case = make_case(n=1, v=4, k=4)
    logits = case.logits.clone()
    logits[0, (case.y[0] + 1) % 4] = -torch.inf  # the student excludes what the teacher expects
    with pytest.raises(NonFiniteLoss):
        replace(case, logits=logits).loss(alpha=0)
    assert math.isfinite(replace(case, logits=logits).loss(alpha=0.5)[0].item())


@pytest.mark.parametrize("bad", [{"alpha": -0.1}, {"alpha": 1.1}, {"alpha": math.nan}, {"clip_eps": -1.0}])
def test_options_out_of_range_are_refused(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_case().loss(**bad)


def test_a_support_without_a_single_id_carries_no_signal() -> None:
    case = make_case()
    for ids in (case.ids[:, :0], torch.full((5, 3), -1), torch.full((5, 3), 11)):
        metrics = sdpo_loss(case.logits, case.y, ids, torch.full(ids.shape, -1.0, dtype=torch.float64))[1]
        assert metrics["jsd"] == pytest.approx(0, abs=1e-15)
        assert metrics["mean_abs_advantage"] == pytest.approx(0, abs=1e-15)


# ---------------------------------------------------------------------------------------------------------------------


def from_hidden(dtype: torch.dtype, n: int = 37, v: int = 301, k: int = 20, d: int = 16) -> tuple[Tensor, Tensor, Case]:
    generator = torch.Generator().manual_seed(7)
    hidden = torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(v, d, generator=generator, dtype=torch.float64).to(dtype)
    log_q = torch.randn(n, v, generator=generator, dtype=torch.float64).mul(3).log_softmax(-1)
    ids = log_q.topk(k).indices
    return hidden, weight, Case(hidden @ weight.T, log_q, torch.randint(0, v, (n,), generator=generator), ids)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("chunk_rows", [1, 8, 64])
def test_the_chunked_path_is_the_dense_one(dtype: torch.dtype, chunk_rows: int) -> None:
    hidden, weight, case = from_hidden(dtype)
    mask = torch.arange(37) % 5 > 0
    mu = logprobs_from_hidden(hidden, weight, case.y) - 0.3
    dense_hidden, chunked_hidden = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    dense, dense_metrics = sdpo_loss(dense_hidden @ weight.T, case.y, case.ids, case.teacher, mu, mask)
    chunked, metrics = sdpo_loss_from_hidden(
        chunked_hidden, weight, case.y, case.ids, case.teacher, mu, mask, chunk_rows=chunk_rows
    )
    (3 * dense).backward()
    (3 * chunked).backward()
    assert dense.dtype == chunked.dtype == dtype
    assert metrics == pytest.approx(dense_metrics, abs=1e-6)
    torch.testing.assert_close(chunked_hidden.grad, dense_hidden.grad, rtol=1e-6, atol=1e-6)


class _Largest(TorchDispatchMode):
    """Remembers the largest tensor that any operation made."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if isinstance(tensor, Tensor) and not func.is_view:
                self.elements = max(self.elements, tensor.numel())
        return out


def test_the_chunked_path_never_holds_all_logits() -> None:
    hidden, weight, case = from_hidden(torch.float32)
    with _Largest() as largest:
        loss, _ = sdpo_loss_from_hidden(hidden.requires_grad_(), weight, case.y, case.ids, case.teacher, chunk_rows=8)
        loss.backward()
    assert largest.elements == 8 * 301


def test_logprobs_and_topk_from_hidden_are_those_of_the_logits() -> None:
    hidden, weight, case = from_hidden(torch.float64)
    log_p = case.logits.log_softmax(-1)
    torch.testing.assert_close(logprobs_from_hidden(hidden, weight, case.ids, chunk_rows=5), log_p.gather(1, case.ids))
    ids, logprobs = topk_from_hidden(hidden, weight, 9, chunk_rows=5)
    torch.testing.assert_close(logprobs, log_p.topk(9).values)
    torch.testing.assert_close(log_p.gather(1, ids), logprobs)


@pytest.mark.parametrize("alpha", ALPHAS)
def test_float32_agrees_with_float64(alpha: float) -> None:
    _, _, case = from_hidden(torch.float64)
    exact, found = case.loss(alpha=alpha)[1], replace(case, logits=case.logits.float()).loss(alpha=alpha)[1]
    assert found == pytest.approx(exact, rel=2e-5, abs=2e-5)
    single = replace(case, logits=case.logits.float()).gradient(alpha=alpha)
    torch.testing.assert_close(single.double(), case.gradient(alpha=alpha), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("alpha", ALPHAS)
def test_half_precision_is_computed_in_float32(dtype: torch.dtype, alpha: float) -> None:
    _, _, case = from_hidden(torch.float64)
    half = replace(case, logits=case.logits.to(dtype))
    loss, metrics = half.loss(alpha=alpha)
    rounded = replace(case, logits=case.logits.to(dtype).float())
    assert loss.dtype == torch.float32
    assert metrics == rounded.loss(alpha=alpha)[1]
    assert half.gradient(alpha=alpha).dtype == dtype
    torch.testing.assert_close(half.gradient(alpha=alpha), rounded.gradient(alpha=alpha).to(dtype))


@pytest.mark.parametrize("alpha", ALPHAS)
def test_underflow_in_float32_stays_finite(alpha: float) -> None:
    logits = torch.tensor([[0.0, 200.0, -300.0], [500.0, 0.0, 0.0]])
    log_q = torch.tensor([[-1e-4, -400.0, -9.3], [-800.0, -0.6931, -0.6932]])
    case = Case(logits, log_q, torch.tensor([0, 1]), torch.tensor([[0, 1, 2], [2, 0, 1]]))
    loss, metrics = case.loss(alpha=alpha)
    assert loss.isfinite()
    assert case.gradient(alpha=alpha).isfinite().all()
    assert metrics["advantage_clamps"] > 0 or alpha == 0.01 or metrics["mean_abs_advantage"] <= 10


@given(cases(whole=True))
def test_anchor_is_the_mean_kl_to_the_base_over_the_whole_vocabulary(case: Case) -> None:
    student = case.logits.clone().requires_grad_()
    mask = torch.arange(len(case.y)) < max(1, len(case.y) - 1)
    anchor = anchor_kl(student, case.log_q, mask, chunk_rows=2)
    anchor.backward()
    rows = range(int(mask.sum()))
    expected = np.mean([kl(case.logits[t].softmax(-1).numpy(), case.log_q[t].exp().numpy()) for t in rows])
    assert anchor.item() == pytest.approx(expected, abs=1e-12)
    reverse = Case(case.logits[mask], case.log_q[mask], case.y[mask], case.ids[mask])
    torch.testing.assert_close(student.grad[mask], reverse.gradient(alpha=1, pg_weight=0, jsd_reg_weight=1))
    assert torch.count_nonzero(student.grad[~mask]) == 0


def test_anchor_from_hidden_states_is_that_of_their_logits() -> None:
    hidden, weight, case = from_hidden(torch.float64)
    base = hidden + 0.1
    chunked, dense = hidden.clone().requires_grad_(), hidden.clone().requires_grad_()
    found = anchor_kl(chunked, base, lm_head_weight=weight, chunk_rows=8)
    expected = anchor_kl(dense @ weight.T, base @ weight.T)
    found.backward()
    expected.backward()
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(chunked.grad, dense.grad)
    assert anchor_kl(case.logits, case.logits).item() == 0


# The numbers, each by its definition


SHARP = torch.tensor([[2.0, 0.0, -1.0]], dtype=torch.float64)  # the student likes token 0, the teacher does not
DOUBT = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64).log()


def doubted() -> Case:
    return Case(SHARP, DOUBT, torch.tensor([0]), torch.tensor([[0, 1, 2]]))


def test_each_term_has_its_weight() -> None:
    single, triple = (doubted().loss(pg_weight=w, jsd_reg_weight=2 * w) for w in (1.0, 3.0))
    assert single[1]["pg_loss"] == pytest.approx(-single[1]["mean_advantage"])
    assert single[1]["jsd_reg"] == pytest.approx(2 * single[1]["jsd"])
    for name in ("pg_loss", "jsd_reg", "total_loss"):
        assert triple[1][name] == pytest.approx(3 * single[1][name])
    assert triple[1]["total_loss"] == pytest.approx(triple[1]["pg_loss"] + triple[1]["jsd_reg"])
    assert float(triple[0]) == pytest.approx(triple[1]["total_loss"])


@pytest.mark.parametrize(("ratio", "clipped"), [(1.5, 1), (1 / 1.5, 1), (1.1, 0), (1 / 1.1, 0)])
def test_clip_fraction_counts_ratios_on_either_side(ratio: float, clipped: int) -> None:
    log_p_y = SHARP.log_softmax(-1)[:, 0]
    metrics = doubted().loss(old_logprobs=log_p_y - math.log(ratio), clip_eps=0.2)[1]
    assert metrics["mean_is_ratio"] == pytest.approx(ratio)
    assert metrics["clip_fraction"] == clipped


def test_student_entropy_is_minus_p_log_p() -> None:
    log_p = SHARP.log_softmax(-1)
    assert doubted().loss()[1]["student_entropy"] == pytest.approx(-float((log_p.exp() * log_p).sum()))


def test_a_ratio_at_its_bound_is_a_constant() -> None:
    """A < 0 and r far above 1: PPO's minimum keeps r A, whose r no longer moves with the student."""
    log_p_y = SHARP.log_softmax(-1)[:, 0]
    options = {"pg_weight": 1.0, "jsd_reg_weight": 0.0}
    assert doubted().gradient(**options, old_logprobs=log_p_y - 19).abs().max() > 0
    assert doubted().gradient(**options, old_logprobs=log_p_y - 25).abs().max() == 0


def test_the_gpus_kernels_are_the_plain_passes() -> None:
    script = Path(__file__).with_name("sdpo_kernels_interpreted.py")
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
