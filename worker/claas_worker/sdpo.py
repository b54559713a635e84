"""The SDPO loss: one response scored by student and teacher becomes a loss, its exact gradient and its numbers.

Self-Distillation Policy Optimization, Hübotter et al. 2026, arXiv:2601.20802, on a top-K support with one tail bucket.
Notation: p student, q teacher, y response token, S the support of a position (K ids), V rows of the student's lm_head;
P, Q the masses of the buckets "each id of S, and all the rest"; M = (1-alpha) P + alpha Q; b the bucket of y.

    D = (1-alpha) KL(P||M) + alpha KL(Q||M)       alpha = 0: KL(Q||P)    alpha = 1: KL(P||Q)
    A = log M_b/P_b                               alpha = 0: Q_b/P_b - 1   (no gradient, clamped)
    r = exp(log p(y) - log mu(y))                 mu: the policy that sampled y, or p itself, held fixed: then r = 1
    loss = 1/N sum_t [ -pgWeight min(r A, clip(r, 1-eps, 1+eps) A) + jsdRegWeight min(r, 2) D ]

What is unusual:
- The gradient is written out (`_score_rows`) rather than traced: D depends on the logits through log P alone, and
  dD/dlogP is (1-alpha) P log P/M, P log P/Q or P - Q. So a few buffers of `chunk_rows` rows are all that a step
  of any length holds in fp32, and no 0 * inf of an autograd graph can turn a gradient into NaN.
- KL is P log(P/Q) - P + Q, bucket by bucket: each term is >= 0, zero when P = Q whatever the rounding, and the sum is
  the usual KL because masses sum to one. They do so only up to the floor under the tails; with this form that cannot
  make D negative, nor its gradient non-zero where student and teacher agree.
- Ids to which the teacher gives no mass (-inf) are buckets like others, except at alpha = 1, where KL(P||Q) would be
  infinite: there they join the tail, whose floor bounds it. Their own advantage is -inf, hence clamped and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import pad

from claas_worker.errors import (
    EmptyResponse,
    GuardError,
    LogprobLengthMismatch,
    NonFiniteInput,
    NonFiniteLoss,
    TokenizerMismatch,
)

TAIL_FLOOR = 1e-6  # under both tails: fp32 logprobs cannot resolve a smaller complement
SUM_SLACK = 1e-3  # teacher masses may sum to 1 + this (rounding) and are then rescaled
LOGPROB_SLACK = 1e-4  # a teacher logprob may exceed 0 by this (rounding)
ZERO_MASS = -9000.0  # vLLM's JSON writes -inf as -9999.0, which half precision rounds; e^-9000 is 0 in every precision
MAX_LOG_RATIO = 20.0
MAX_DIVERGENCE_RATIO = 2.0
POSITIVE_ADVANTAGE = 1e-6
NO_SIGNAL_JSD = 1e-6  # mean D below it: nothing to learn, the step is skipped (reason NoSignal)
COLUMN_STEP = 32  # support columns are padded to a multiple of it, where many responses come together
CHUNK_ROWS = 512  # rows whose logits are held in fp32 at once: 512 x 151,936 x 4 bytes = 311 MB a buffer


class SDPOResult(NamedTuple):
    """What `sdpo_loss` returns: a pair."""

    loss: Tensor  # scalar in the arithmetic's precision, differentiable once
    metrics: dict[str, float]  # by the names of status.metadata in snake case; sums over tokens / N, so parts add up


def sdpo_loss(
    student_logits: Tensor,
    response_ids: Tensor,
    support_ids: Tensor,
    teacher_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    alpha: float = 0.5,
    clip_eps: float = 0.2,
    jsd_reg_weight: float = 0.5,
    pg_weight: float = 1.0,
    advantage_clip: float = 10.0,
    total_tokens: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> SDPOResult:
    """Loss and metrics of N response tokens. float64 logits are computed in float64, all others in float32.

    Args:
        student_logits: (N, V), row t predicts response token t (row `len(prefix) - 1 + t` of the sequence).
        response_ids: (N,), in [0, V) where the mask is set.
        support_ids: (N, K) token ids; negative ids are padding; ids >= V and duplicates are dropped. Any order.
        teacher_logprobs: (N, K) log q of those ids; -inf or -9999.0 is zero mass. What S lacks to 1 is the tail.
        old_logprobs: (N,) log mu of the response tokens, or None for the student itself, held fixed. When given, D is
            weighted by min(r, 2).
        mask: (N,), zero excludes a token, whatever its row holds; None includes all.
        alpha: 0 forward KL(q||p), 0.5 Jensen-Shannon, 1 reverse KL(p||q).
        total_tokens: N of the whole request when these rows are one part of it: losses and metrics of the parts then
            add up to those of the whole (`combine`). Default: the number of unmasked rows here.
        chunk_rows: rows held in fp32 at once; the result does not depend on it.

    Raises:
        EmptyResponse: no unmasked token (unless `total_tokens` says that others exist elsewhere).
        LogprobLengthMismatch: the rows of two arguments differ in number.
        TokenizerMismatch: an unmasked response id has no row in the student's vocabulary.
        NonFiniteInput: NaN or above-zero teacher logprobs, teacher mass above 1 + 1e-3, NaN or infinite logits, a
            response token of student probability zero.
        NonFiniteLoss: the loss is not finite.
    """
    options = Options(alpha, clip_eps, jsd_reg_weight, pg_weight, advantage_clip, chunk_rows)
    v = student_logits.shape[-1]
    targets = _targets(student_logits, v, response_ids, support_ids, teacher_logprobs, old_logprobs, mask, alpha)
    return _loss(student_logits, None, targets, options, total_tokens)


def sdpo_loss_from_hidden(
    hidden: Tensor,
    lm_head_weight: Tensor,
    response_ids: Tensor,
    support_ids: Tensor,
    teacher_logprobs: Tensor,
    old_logprobs: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    alpha: float = 0.5,
    clip_eps: float = 0.2,
    jsd_reg_weight: float = 0.5,
    pg_weight: float = 1.0,
    advantage_clip: float = 10.0,
    total_tokens: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> SDPOResult:
    """`sdpo_loss` of `hidden @ lm_head_weight.T`, of which only `chunk_rows` rows exist at a time.

    hidden is (N, d), the last hidden state after the final norm; lm_head_weight (V, d) is frozen and gets no gradient.
    The gradient of `hidden` is computed in the forward pass, while a chunk's logits are there.
    """
    if lm_head_weight.requires_grad:
        raise ValueError("lm_head_weight requires a gradient, which is not computed here: freeze it, or use sdpo_loss")
    options = Options(alpha, clip_eps, jsd_reg_weight, pg_weight, advantage_clip, chunk_rows)
    v = lm_head_weight.shape[0]
    targets = _targets(hidden, v, response_ids, support_ids, teacher_logprobs, old_logprobs, mask, alpha)
    return _loss(hidden, lm_head_weight, targets, options, total_tokens)


def combine(parts: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """Metrics of a request from those of its micro-batches, each computed with the request's `total_tokens`."""
    total: dict[str, float] = {}
    for part in parts:
        for name, value in part.items():
            total[name] = total.get(name, 0) + value
    return total


def anchor_kl(
    student: Tensor,
    base: Tensor,
    mask: Tensor | None = None,
    *,
    lm_head_weight: Tensor | None = None,
    total_tokens: int | None = None,
    chunk_rows: int = CHUNK_ROWS,
) -> Tensor:
    """Mean KL(p || p_base) over the **whole** vocabulary, differentiable in the student: how far the adapter has gone.

    student and base are logits (N, V), or hidden states (N, d) when lm_head_weight (V, d) is given; the base's are made
    with adapters off. No buckets here: both distributions are our own, so the exact value costs no more. Multiply by
    `anchorKlWeight`, add to the loss, and `combine` {"anchor": x, "total_loss": x} into the metrics.
    """
    if base.shape != student.shape:
        raise LogprobLengthMismatch(f"base has shape {tuple(base.shape)}, the student {tuple(student.shape)}")
    rows = _unmasked(mask, student.shape[0], student.device)
    count = rows.numel() if total_tokens is None else total_tokens
    if count < max(rows.numel(), 1):
        raise EmptyResponse("the anchor KL has no token to average over")
    gradient = torch.zeros_like(student)
    total = torch.zeros((), dtype=torch.float64, device=student.device)
    with torch.no_grad():
        for chunk in rows.split(chunk_rows):
            log_p = _logits(student, lm_head_weight, chunk).log_softmax(-1)  # (C, V)
            p = log_p.exp()
            log_ratio = log_p.sub_(_logits(base, lm_head_weight, chunk).log_softmax(-1))
            kl = (p * log_ratio).sum(-1, keepdim=True)  # (C, 1)
            total += kl.sum(dtype=torch.float64)
            gradient[chunk] = _backward_rows(p.mul_(log_ratio.sub_(kl)).div_(count), lm_head_weight, student.dtype)
    if not math.isfinite(total.item()):
        raise NonFiniteLoss("the anchor KL(student || base) is not finite")
    return _attach(student, (total / count).to(_arithmetic(student)), gradient)


def logprobs_from_hidden(
    hidden: Tensor, lm_head_weight: Tensor, ids: Tensor, *, chunk_rows: int = CHUNK_ROWS
) -> Tensor:
    """log p of chosen ids (N,) or (N, K), in their shape, without gradient. hidden (N, d), lm_head_weight (V, d).

    Takes the snapshot of log mu before the first of several inner steps, and scores a support as teacher in mode Self.
    """
    columns = ids.reshape(ids.shape[0], -1).to(hidden.device, torch.long)
    with torch.no_grad():
        parts = [
            _logits(hidden, lm_head_weight, rows).log_softmax(-1).gather(1, columns[rows])
            for rows in torch.arange(hidden.shape[0], device=hidden.device).split(chunk_rows)
        ]
    return torch.cat(parts).reshape(ids.shape)


def topk_from_hidden(
    hidden: Tensor, lm_head_weight: Tensor, k: int, *, chunk_rows: int = CHUNK_ROWS
) -> tuple[Tensor, Tensor]:
    """The k likeliest ids of each position and their log p, without gradient: ((N, k) ids, (N, k) logprobs)."""
    with torch.no_grad():
        parts = [
            _logits(hidden, lm_head_weight, rows).log_softmax(-1).topk(min(k, lm_head_weight.shape[0]))
            for rows in torch.arange(hidden.shape[0], device=hidden.device).split(chunk_rows)
        ]
    return torch.cat([part.indices for part in parts]), torch.cat([part.values for part in parts])


class Part(NamedTuple):
    """One response of many whose losses are computed together: the arguments of `sdpo_loss`, without mask."""

    response_ids: Tensor  # (N,)
    support_ids: Tensor  # (N, K)
    teacher_logprobs: Tensor  # (N, K)
    old_logprobs: Tensor | None  # (N,)
    total_tokens: int


class LossBatch:
    """Losses and gradients of many responses with the same options, without waiting for the device in between.

    Its parts all have `old_logprobs`, or none has. The formulas are `sdpo_loss`'s; what they find is asked for later.

    Raises:
        GuardError: a part's teacher or rollout is unfit; which one, `check` of each says.
    """

    def __init__(self, parts: Sequence[Part], lm_head_weight: Tensor, options: Mapping[str, float]) -> None:
        self._head, self._options = lm_head_weight, Options(**options, chunk_rows=CHUNK_ROWS)
        self._parts = parts
        device = lm_head_weight.device
        lengths = [len(part.response_ids) for part in parts]
        source = lm_head_weight.new_empty(sum(lengths), 0)
        # Columns of padding change nothing, and of few widths few are compiled.
        width = -(-max(part.support_ids.shape[1] for part in parts) // COLUMN_STEP) * COLUMN_STEP
        support = [pad(part.support_ids, (0, width - part.support_ids.shape[1]), value=-1) for part in parts]
        logprobs = [
            pad(part.teacher_logprobs, (0, width - part.teacher_logprobs.shape[1]), value=-torch.inf) for part in parts
        ]
        old = None if parts[0].old_logprobs is None else _joined([_given(part) for part in parts], device)
        self._targets = _targets(
            source,
            lm_head_weight.shape[0],
            _joined([part.response_ids for part in parts], device),
            _joined(support, device),
            _joined(logprobs, device),
            old,
            None,
            self._options.alpha,
        )
        owners = [owner for owner, length in enumerate(lengths) for _ in range(length)]
        counts = [float(part.total_tokens) for part, length in zip(parts, lengths, strict=True) for _ in range(length)]
        self._owners = torch.tensor(owners, device=device)
        self._counts = torch.tensor(counts, dtype=_arithmetic(source), device=device)

    @staticmethod
    def check(part: Part, lm_head_weight: Tensor, alpha: float) -> None:
        """Raises what is wrong with a part's own arguments."""
        source = lm_head_weight.new_empty(len(part.response_ids), 0)
        _targets(
            source,
            lm_head_weight.shape[0],
            part.response_ids,
            part.support_ids,
            part.teacher_logprobs,
            part.old_logprobs,
            None,
            alpha,
        )

    @property
    def key(self) -> tuple[object, ...]:
        """Of the code that `score` compiles to."""
        return self._options, self._targets.log_mu is None, self._targets.ids.shape[1]

    @property
    def width(self) -> int:
        """Numbers of each part."""
        return len(_SUMS)

    def enqueue(self, hidden: Tensor, starts: Sequence[int], gradient: Tensor, score: Score) -> Tensor:
        """Writes the gradient of the losses' sum into the rows of `gradient` (N, d), and gives sums for `metrics`.

        Args:
            hidden: (N, d) of many tokens; part i begins at row `starts[i]`.
        """
        rows = [
            start + i for start, part in zip(starts, self._parts, strict=True) for i in range(len(part.response_ids))
        ]
        targets = self._targets._replace(rows=on_its_way(torch.tensor(rows), hidden.device))
        sums = torch.zeros(len(self._parts), len(_SUMS), dtype=torch.float64, device=hidden.device)
        with torch.no_grad():
            for first in range(0, len(rows), score.rows):
                part = slice(first, first + score.rows)
                chunk = Targets(*(None if field is None else field[part] for field in targets))
                logits = hidden[chunk.rows] @ self._head.T
                values, slope = score.run(logits, chunk, self._options, self._counts[part])
                sums.index_add_(0, self._owners[part], values.double())
                gradient.index_copy_(0, chunk.rows, slope @ self._head)
        return sums

    def try_out(self, score: Score) -> None:
        """Calls `score` on made-up logits, as `enqueue` will, so that it is compiled for any number of rows."""
        rows = min(len(self._counts), score.rows)
        if rows < 2:
            return  # one row is a case of its own to the compiler
        chunk = Targets(*(None if field is None else field[:rows].clone() for field in self._targets))
        logits = torch.randn(rows, self._head.shape[0], device=self._head.device).to(self._head.dtype)
        counts = self._counts[:rows].clone()
        for tensor in (logits, counts, *(field for field in chunk if field is not None)):
            torch._dynamo.mark_dynamic(tensor, 0)
        with torch.no_grad():
            score.run(logits, chunk, self._options, counts)

    def metrics(self, index: int, sums: Sequence[float]) -> dict[str, float]:
        """A part's metrics from its row of the sums.

        Raises:
            NonFiniteInput, NonFiniteLoss: see `sdpo_loss`.
        """
        part = self._parts[index]
        return _numbers(sums, len(part.response_ids), part.total_tokens, self._options)


def on_its_way(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on the device, in the order of its work, without waiting for what is before it."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _joined(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """In one, moved at most once."""
    if len({tensor.device for tensor in tensors}) > 1:
        tensors = [tensor.to(device) for tensor in tensors]
    return torch.cat(list(tensors)).to(device)


def _given(part: Part) -> Tensor:
    assert part.old_logprobs is not None
    return part.old_logprobs


def score_chunk(logits: Tensor, targets: Targets, options: Options, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Values (C, sums) of each token, and the gradient (C, V) of its share of the loss in its logits (C, V)."""
    values, slope = _score_rows(logits.to(_arithmetic(logits)), targets, options)
    return stack_values(values), slope.div_(counts[:, None]).to(logits.dtype)


class Score(NamedTuple):
    """A way to score chunks of logits: `score_chunk`, or what gives the same in its place, on `rows` rows at once."""

    run: Callable[..., tuple[Tensor, Tensor]]
    rows: int


PLAIN_SCORE = Score(score_chunk, CHUNK_ROWS)


def stack_values(values: Mapping[str, Tensor]) -> Tensor:
    """(C, sums)"""
    return torch.stack([values[name].to(values["pg"].dtype) for name in _SUMS], -1)


@dataclass(frozen=True)
class Options:
    alpha: float
    clip_eps: float
    jsd_reg_weight: float
    pg_weight: float
    advantage_clip: float
    chunk_rows: int

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha must lie in [0, 1], not {self.alpha}")
        for name in ("clip_eps", "jsd_reg_weight", "pg_weight", "advantage_clip"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} must be at least 0, not {getattr(self, name)}")


class Targets(NamedTuple):
    """What the n unmasked positions are compared with. Columns: K ids of the support, then the tail."""

    rows: Tensor  # (n,) their rows in the caller's tensors
    y: Tensor  # (n,) response ids
    ids: Tensor  # (n, K) support ids, 0 where dropped
    bucket: Tensor  # (n, K) which of them are buckets of their own
    listed: Tensor  # (n, K) which of them the teacher listed: `bucket`, and at alpha = 1 those of zero mass too
    log_q: Tensor  # (n, K+1) log Q; the tail's is floored
    y_listed: Tensor  # (n,)
    y_refused: Tensor  # (n,) the teacher listed y with zero mass
    log_mu: Tensor | None  # (n,)


def _targets(
    source: Tensor,
    vocabulary: int,
    response_ids: Tensor,
    support_ids: Tensor,
    teacher_logprobs: Tensor,
    old_logprobs: Tensor | None,
    mask: Tensor | None,
    alpha: float,
) -> Targets:
    """Checks the arguments and makes the teacher's buckets (K+1 columns: small, so float64 throughout)."""
    n, device = source.shape[0], source.device
    given = {"response_ids": response_ids, "support_ids": support_ids, "teacher_logprobs": teacher_logprobs}
    for name, tensor in {**given, "old_logprobs": old_logprobs, "mask": mask}.items():
        if tensor is not None and tensor.shape[:1] != (n,):
            raise LogprobLengthMismatch(f"{name} has shape {tuple(tensor.shape)}: the response has {n} tokens")
    if support_ids.ndim != 2 or teacher_logprobs.shape != support_ids.shape:
        shapes = f"{tuple(teacher_logprobs.shape)} and {tuple(support_ids.shape)}"
        raise LogprobLengthMismatch(f"teacher_logprobs and support_ids must both have shape (N, K), not {shapes}")
    rows = _unmasked(mask, n, device)
    y = response_ids.to(device, torch.long)[rows]
    ids = support_ids.to(device, torch.long)[rows]
    log_q = teacher_logprobs.detach().to(device, torch.float64)[rows]
    log_mu = None if old_logprobs is None else old_logprobs.detach().to(device, torch.float64)[rows]

    padding = ids < 0
    bad_logprobs = (log_q.isnan() | (log_q > LOGPROB_SLACK)) & ~padding
    log_q = log_q.masked_fill(padding | (log_q <= ZERO_MASS), -torch.inf)
    # By id, and the largest logprob first among equal ids: duplicates drop out and the caller's order cannot matter.
    order = log_q.argsort(dim=-1, descending=True, stable=True)
    ids, log_q = ids.gather(1, order), log_q.gather(1, order)
    order = ids.argsort(dim=-1, stable=True)
    ids, log_q = ids.gather(1, order), log_q.gather(1, order)
    listed = (ids >= 0) & (ids < vocabulary)
    listed[:, 1:] &= ids[:, 1:] != ids[:, :-1]
    log_q = log_q.masked_fill(~listed, -torch.inf)

    mass = log_q.exp().sum(-1)  # (n,)
    whole = listed.sum(-1) == vocabulary
    slack = max(SUM_SLACK, 4 * torch.finfo(teacher_logprobs.dtype).eps)  # half precision alone rounds by more than 1e-3
    bad_mu = torch.zeros_like(y) if log_mu is None else ~log_mu.isfinite()
    checks: list[tuple[Tensor, GuardError]] = [
        ((y < 0) | (y >= vocabulary), TokenizerMismatch(f"response ids must lie in [0, {vocabulary})")),
        (bad_logprobs, NonFiniteInput(f"teacher logprobs hold NaN or values above {LOGPROB_SLACK}")),
        (mass > 1 + slack, NonFiniteInput(f"teacher probabilities of a position sum to more than 1 + {slack:.3g}")),
        (whole & (mass == 0), NonFiniteInput("teacher probabilities of a position are all zero")),
        (bad_mu, NonFiniteInput("rollout logprobs hold NaN or infinite values")),
    ]
    failed = torch.stack([bad.any() for bad, _ in checks]).tolist()  # one synchronization for all
    for bad, (_, error) in zip(failed, checks, strict=True):
        if bad:
            raise error

    rescaled = whole | (mass > 1)
    log_q = torch.where(rescaled[:, None], log_q - mass.log()[:, None], log_q)
    tail = torch.where(rescaled, 0.0, 1 - mass).clamp_min(TAIL_FLOOR).log()
    zero = listed & (log_q == -torch.inf)
    bucket = listed & ~zero if alpha == 1 else listed
    is_y = ids == y[:, None]
    dtype = _arithmetic(source)
    return Targets(
        rows=rows,
        y=y,
        ids=ids.masked_fill(~listed, 0),
        bucket=bucket,
        listed=listed,
        log_q=torch.cat([log_q, tail[:, None]], -1).to(dtype),
        y_listed=(is_y & listed).any(-1),
        y_refused=(is_y & zero).any(-1),
        log_mu=None if log_mu is None else log_mu.to(dtype),
    )


def _loss(
    source: Tensor, lm_head_weight: Tensor | None, targets: Targets, options: Options, total_tokens: int | None
) -> SDPOResult:
    """Scores the rows chunk by chunk; loss and gradient are complete when this returns."""
    n = targets.rows.numel()
    if n == 0 and total_tokens is None:
        raise EmptyResponse("no response token to learn from: responses must not be empty, nor masked as a whole")
    count = n if total_tokens is None else total_tokens
    if count < max(n, 1):
        raise ValueError(f"total_tokens is {count}, but these rows alone hold {n} tokens")
    gradient = torch.zeros_like(source) if source.requires_grad and torch.is_grad_enabled() else None
    sums = torch.zeros(len(_SUMS), dtype=torch.float64, device=source.device)
    with torch.no_grad():
        for part in torch.arange(n, device=source.device).split(options.chunk_rows):
            chunk = Targets(*(None if field is None else field[part] for field in targets))
            logits = _logits(source, lm_head_weight, chunk.rows)  # (C, V)
            values, slope = _score_rows(logits, chunk, options)
            sums += torch.stack([values[name].sum(dtype=torch.float64) for name in _SUMS])
            if gradient is not None:
                gradient[chunk.rows] = _backward_rows(slope.div_(count), lm_head_weight, source.dtype)
    metrics = _numbers(sums.tolist(), n, count, options)
    loss = torch.tensor(metrics["total_loss"], dtype=_arithmetic(source), device=source.device)
    return SDPOResult(loss if gradient is None else _attach(source, loss, gradient), metrics)


def _numbers(sums: Iterable[float], n: int, count: int, options: Options) -> dict[str, float]:
    """Metrics from the sums over n tokens, which are a part of `count`.

    Raises:
        NonFiniteInput, NonFiniteLoss: see `sdpo_loss`.
    """
    total = dict(zip(_SUMS, sums, strict=True))
    if total["unscored"]:
        raise NonFiniteInput(
            "student logits hold NaN or infinite values, or give a response token no probability at all"
        )
    if not all(map(math.isfinite, total.values())):
        raise NonFiniteLoss(
            "the divergence is not finite: the student gives no probability to what the teacher expects"
        )

    pg_loss = options.pg_weight * total["pg"] / count
    jsd_reg = options.jsd_reg_weight * total["weighted_jsd"] / count
    return {
        "total_loss": pg_loss + jsd_reg,
        "pg_loss": pg_loss,
        "jsd_reg": jsd_reg,
        **{name: total[name] / count for name in _MEANS},
        "advantage_clamps": int(total["advantage_clamps"]),
        "tokens_processed": n,
    }


_MEANS = (
    "mean_advantage",
    "frac_positive_advantage",
    "mean_is_ratio",
    "clip_fraction",
    "jsd",
    "mean_abs_advantage",
    "active_clip_fraction",
    "teacher_topk_mass",
    "student_topk_mass",
    "chosen_in_topk_fraction",
    "student_entropy",
)
_SUMS = (*_MEANS, "pg", "weighted_jsd", "advantage_clamps", "unscored")


class Buckets(NamedTuple):
    """What the formulas need of a softmax over V rows."""

    log_p_ids: Tensor  # (C, K), of dropped ids too
    log_p_y: Tensor  # (C,)
    p_tail: Tensor  # (C,) the complement of the buckets, summed itself: 1 - sum would keep no digit of a small one
    entropy: Tensor  # (C,)


class Slopes(NamedTuple):
    """dloss/dlogits times N: that of an id in the tail is its probability times `tail`; y has `y` on top of its own."""

    tail: Tensor  # (C,)
    ids: Tensor  # (C, K), zero where dropped
    y: Tensor  # (C,)


def _score_rows(logits: Tensor, t: Targets, options: Options) -> tuple[dict[str, Tensor], Tensor]:
    """Values (C,) of each token, and the gradient (C, V) of the loss times N in the logits (C, V)."""
    shifted = logits - logits.amax(-1, keepdim=True)  # (C, V)
    p = shifted.exp()
    norm = p.sum(-1, keepdim=True)  # (C, 1)
    log_p_ids = shifted.gather(1, t.ids) - norm.log()  # (C, K)
    log_p_y = (shifted.gather(1, t.y[:, None]) - norm.log()).squeeze(1)  # (C,)
    # Exact also where a logit is -inf: its probability is 0, and 0 * -1e4 is 0.
    entropy = norm.log().squeeze(1) - torch.linalg.vecdot(p, shifted.clamp_(min=-1e4)) / norm.squeeze(1)
    del shifted

    # From here on the buffer holds the complement of the buckets alone. Dropped ids point to column 0 and must not
    # change it: minimum with infinity.
    p.scatter_reduce_(1, t.ids, torch.where(t.bucket, 0.0, torch.inf).to(p.dtype), "amin")
    p_tail = p.sum(-1) / norm.squeeze(1)  # (C,)
    values, slopes = weigh(Buckets(log_p_ids, log_p_y, p_tail, entropy), t, options)
    p.mul_(slopes.tail[:, None] / norm)
    p.scatter_add_(1, t.ids, slopes.ids)
    p.scatter_add_(1, t.y[:, None], slopes.y[:, None])
    return values, p


def weigh(seen: Buckets, t: Targets, options: Options) -> tuple[dict[str, Tensor], Slopes]:
    """The formulas: values (C,) of each token, and the loss's slopes."""
    alpha, eps = options.alpha, options.clip_eps
    log_p_ids, log_p_y, p_tail, entropy = seen
    resolved = p_tail > TAIL_FLOOR
    log_p_tail = p_tail.clamp_min(TAIL_FLOOR).log()  # buckets that cover all V rows leave the floor on both sides

    none = torch.full_like(log_p_ids, -torch.inf)
    log_p = torch.cat([torch.where(t.bucket, log_p_ids, none), log_p_tail[:, None]], -1)  # (C, K+1)
    log_q = torch.cat([torch.where(t.bucket, t.log_q[:, :-1], none), t.log_q[:, -1:]], -1)
    divergence, slope, log_ratio = _divergence(log_p, log_q, alpha)  # (C,), (C, K+1) dD/dlogP, (C, K+1) A

    is_y = t.bucket & (t.ids == t.y[:, None])
    b = pad(is_y.to(torch.uint8), (0, 1), value=1).argmax(-1)  # (C,) the first 1: y's own bucket, else the tail
    advantage = log_ratio.gather(1, b[:, None]).squeeze(1)
    if alpha == 1:
        advantage = advantage.masked_fill(t.y_refused, -torch.inf)
    clamped = advantage.abs() > options.advantage_clip
    advantage = advantage.clamp(-options.advantage_clip, options.advantage_clip)

    log_r = torch.zeros_like(log_p_y) if t.log_mu is None else log_p_y - t.log_mu
    r = log_r.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    pg = -torch.minimum(r * advantage, r.clamp(1 - eps, 1 + eps) * advantage)
    clip_active = ((advantage > 0) & (r > 1 + eps)) | ((advantage < 0) & (r < 1 - eps))
    pg_slope = torch.where(clip_active | (log_r.abs() > MAX_LOG_RATIO), 0.0, -r * advantage)  # (C,) dpg/dlog p(y)
    weight = torch.ones_like(r) if t.log_mu is None else r.clamp(max=MAX_DIVERGENCE_RATIO)

    # With g = dloss/dlog p of each id: dloss/dlogits = g - p sum(g). In the tail, g is the tail's slope times p/p_tail.
    slope = slope * (options.jsd_reg_weight * weight)[:, None]
    slope[:, -1] = torch.where(resolved, slope[:, -1], 0.0)  # a floored tail is a constant
    pg_slope = options.pg_weight * pg_slope
    total = slope.sum(-1) + pg_slope  # (C,)
    tail = slope[:, -1] / p_tail.clamp_min(TAIL_FLOOR) - total
    at_ids = torch.where(t.bucket, slope[:, :-1] - log_p[:, :-1].exp() * total[:, None], 0.0)

    values = {
        "pg": pg,
        "weighted_jsd": weight * divergence,
        "jsd": divergence,
        "mean_advantage": advantage,
        "mean_abs_advantage": advantage.abs(),
        "frac_positive_advantage": advantage > POSITIVE_ADVANTAGE,
        "advantage_clamps": clamped,
        "mean_is_ratio": r,
        "clip_fraction": (r - 1).abs() > eps,
        "active_clip_fraction": clip_active,
        "teacher_topk_mass": t.log_q[:, :-1].exp().sum(-1),
        "student_topk_mass": torch.where(t.listed, log_p_ids.exp(), 0.0).sum(-1),
        "chosen_in_topk_fraction": t.y_listed,
        "student_entropy": entropy,
        "unscored": ~log_p_y.isfinite(),
    }
    return values, Slopes(tail, at_ids, pg_slope)


def _divergence(log_p: Tensor, log_q: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor]:
    """D (C,), dD/dlogP (C, B) and the unclamped A of every bucket (C, B), from log masses (C, B)."""
    p, q = log_p.exp(), log_q.exp()
    d = torch.where(log_p == log_q, 0.0, log_q - log_p)  # also where both are -inf
    if alpha == 0:
        return _kl(log_q, log_p, -d).sum(-1), p - q, d.expm1()
    if alpha == 1:
        return _kl(log_p, log_q, d).sum(-1), -torch.where(p > 0, p * d, 0.0), d
    log_m_p = _log_mixture(d, alpha)  # log M/P
    log_m_q = _log_mixture(-d, 1 - alpha)  # log M/Q
    log_m = torch.where(d > 0, log_q + log_m_q, log_p + log_m_p)
    divergence = (1 - alpha) * _kl(log_p, log_m, log_m_p) + alpha * _kl(log_q, log_m, log_m_q)
    return divergence.sum(-1), -(1 - alpha) * torch.where(p > 0, p * log_m_p, 0.0), log_m_p


def _kl(log_p: Tensor, log_q: Tensor, d: Tensor) -> Tensor:
    """p log(p/q) - p + q by bucket, given d = log q - log p: never negative, no cancellation where d is small."""
    p = log_p.exp()
    near = p * (d.expm1() - d)
    far = log_q.exp() - p - torch.where(p > 0, p * d, 0.0)
    return torch.where(d.abs() < 0.5, near, far)


def _log_mixture(d: Tensor, weight: float) -> Tensor:
    """log((1 - weight) + weight e^d) for 0 < weight < 1: exactly 0 at d = 0, and without overflow at large d."""
    near = (weight * d.clamp(-1, 1).expm1()).log1p()
    far = torch.logaddexp(d.new_tensor(math.log1p(-weight)), d + math.log(weight))
    return torch.where(d.abs() < 1, near, far)


def _arithmetic(source: Tensor) -> torch.dtype:
    return torch.float64 if source.dtype == torch.float64 else torch.float32


def _unmasked(mask: Tensor | None, n: int, device: torch.device) -> Tensor:
    """Indices of the rows to keep. Masked rows are left out, not multiplied by 0: a NaN in one changes nothing."""
    return torch.arange(n, device=device) if mask is None else (mask.to(device) != 0).nonzero().squeeze(1)


def _logits(source: Tensor, lm_head_weight: Tensor | None, rows: Tensor) -> Tensor:
    """(C, V) logits of these rows of the source: it holds logits (N, V), or hidden states (N, d) for the lm_head."""
    chunk = source.detach()[rows]
    return (chunk if lm_head_weight is None else chunk @ lm_head_weight.T).to(_arithmetic(source))


def _backward_rows(slope: Tensor, lm_head_weight: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The gradient in the source of a gradient in the logits (C, V): (C, V), or (C, d) through the lm_head."""
    return slope.to(dtype) if lm_head_weight is None else slope.to(lm_head_weight.dtype) @ lm_head_weight


class _Attach(torch.autograd.Function):  # type: ignore[misc]
    """A value whose gradient in one tensor is already known."""

    @staticmethod
    def forward(ctx: Any, source: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return value.clone()

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (gradient,) = ctx.saved_tensors
        return gradient * upstream.to(gradient.dtype), None, None


def _attach(source: Tensor, value: Tensor, gradient: Tensor) -> Tensor:
    result: Tensor = _Attach.apply(source, value, gradient)
    return result
