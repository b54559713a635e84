"""The loss's two passes over the vocabulary as two Triton kernels: a row's logits are read once, then overwritten once
with its gradient. Nothing of (C, V) is held but the logits themselves, in the precision of the product they come from.

What lies between is `sdpo.weigh`, the formulas on K+1 buckets. The kernels differ from the plain passes of `sdpo.py` in
how they order sums, and in nothing else: their softmax is the online one (Milakov and Gimelshein 2018), and a bucket's
own logit is set to -inf once it has been gathered, so that what is left of the row is the complement, summed itself.
"""

from __future__ import annotations

from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from claas_worker.sdpo import Buckets, Options, Score, Targets, stack_values, weigh

BLOCK = 4096  # columns of a row that a program has in flight
WARPS = 8
ROWS = 2048  # whose logits exist at once: 622 MB of 151,936 in bf16


def fused_score() -> Score:
    """`sdpo.score_chunk` by these kernels: it overwrites the logits. What lies between is compiled on a GPU."""
    between = torch.compile(between_passes) if torch.cuda.is_available() else between_passes

    def score(logits: Tensor, targets: Targets, options: Options, counts: Tensor) -> tuple[Tensor, Tensor]:
        rows, vocabulary = logits.shape
        k = targets.ids.shape[1]
        found = torch.empty(rows, k + 4, device=logits.device)  # logits of S, of y; maximum, sum and dot of the rest
        torch._dynamo.maybe_mark_dynamic(found, 0)
        ids, bucket, y = targets.ids.contiguous(), targets.bucket.contiguous(), targets.y.contiguous()
        columns = triton.next_power_of_2(k)
        how: dict[str, Any] = {"BLOCK": BLOCK, "COLUMNS": columns, "num_warps": WARPS}
        _sum_row[(rows,)](logits, logits.stride(0), ids, bucket, y, found, k, vocabulary, **how)
        values, log_norm, tail, at_ids, at_y = between(found, targets, options, counts)
        _spread_row[(rows,)](
            logits, logits.stride(0), ids, bucket, y, log_norm, tail, at_ids, at_y, k, vocabulary, **how
        )
        return values, logits

    return Score(score, ROWS)


def between_passes(
    found: Tensor, targets: Targets, options: Options, counts: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """From the sums of the first pass (C, K+4) to what the second writes.

    Returns:
        (C, sums) values; (C,) log of the softmax's denominator; (C,) what the probability of an id in the tail is
        multiplied with; (C, K) and (C,) the gradients at the buckets' ids and at y.
    """
    k = targets.ids.shape[1]
    logits_ids = found[:, :k]
    logits_y, rest, rest_sum, rest_dot = found[:, k:].unbind(1)
    own = torch.where(targets.bucket, logits_ids, -torch.inf)  # (C, K)
    top = torch.maximum(own.amax(-1), rest)  # (C,)
    p = (own - top[:, None]).exp()
    there = rest_sum > 0  # a support of all V rows leaves no rest
    scale = torch.where(there, (rest - top).exp(), 0.0)
    norm = p.sum(-1) + rest_sum * scale
    shift = torch.where(there, rest - top, 0.0)
    dot = (p * (own - top[:, None]).clamp(min=-1e4)).sum(-1) + (rest_dot + rest_sum * shift) * scale
    log_norm = top + norm.log()
    log_p_y = logits_y - log_norm
    seen = Buckets(logits_ids - log_norm[:, None], log_p_y, rest_sum * scale / norm, norm.log() - dot / norm)
    values, slopes = weigh(seen, targets, options)
    at_ids = slopes.ids / counts[:, None]
    is_y = targets.bucket & (targets.ids == targets.y[:, None])
    at_y = torch.where(is_y, at_ids, 0.0).sum(-1)
    at_y = torch.where(is_y.any(-1), at_y, log_p_y.exp() * slopes.tail / counts) + slopes.y / counts
    return stack_values(values), log_norm, slopes.tail / counts, at_ids, at_y


@triton.jit  # type: ignore[untyped-decorator]
def _sum_row(logits, stride, ids, bucket, y, found, k, vocabulary, BLOCK: tl.constexpr, COLUMNS: tl.constexpr):  # type: ignore[no-untyped-def]
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    found += row * (k + 4)
    column = tl.arange(0, COLUMNS)
    listed = column < k
    at = tl.load(ids + row * k + column, mask=listed, other=0)
    own = tl.load(bucket + row * k + column, mask=listed, other=0) != 0
    tl.store(found + column, tl.load(logits + at, mask=listed, other=0.0).to(tl.float32), mask=listed)
    tl.store(found + k, tl.load(logits + tl.load(y + row)).to(tl.float32))
    tl.debug_barrier()
    tl.store(logits + at, tl.full((COLUMNS,), float("-inf"), tl.float32).to(logits.dtype.element_ty), mask=own)
    tl.debug_barrier()

    top = float("-inf")
    total = tl.zeros((BLOCK,), tl.float32)
    dot = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        x = tl.load(logits + place, mask=place < vocabulary, other=float("-inf")).to(tl.float32)
        higher = tl.maximum(top, tl.max(x, 0))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        shift = tl.where(top == float("-inf"), 0.0, top - base)
        scale = tl.exp(shift)
        below = x - base
        p = tl.exp(below)
        dot = (dot + total * shift) * scale + p * tl.maximum(below, -1e4)
        total = total * scale + p
        top = higher
    tl.store(found + k + 1, top)
    tl.store(found + k + 2, tl.sum(total, 0))
    tl.store(found + k + 3, tl.sum(dot, 0))


@triton.jit  # type: ignore[untyped-decorator]
def _spread_row(  # type: ignore[no-untyped-def]
    logits, stride, ids, bucket, y, log_norm, tail, at_ids, at_y, k, vocabulary,
    BLOCK: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits += row.to(tl.int64) * stride
    norm = tl.load(log_norm + row)
    slope = tl.load(tail + row)
    for start in range(0, vocabulary, BLOCK):
        place = start + tl.arange(0, BLOCK)
        inside = place < vocabulary
        x = tl.load(logits + place, mask=inside, other=0.0).to(tl.float32)
        tl.store(logits + place, (tl.exp(x - norm) * slope).to(logits.dtype.element_ty), mask=inside)
    tl.debug_barrier()
    column = tl.arange(0, COLUMNS)
    listed = column < k
    at = tl.load(ids + row * k + column, mask=listed, other=0)
    own = tl.load(bucket + row * k + column, mask=listed, other=0) != 0
    value = tl.load(at_ids + row * k + column, mask=listed, other=0.0)
    tl.store(logits + at, value.to(logits.dtype.element_ty), mask=own)
    tl.debug_barrier()
    tl.store(logits + tl.load(y + row), tl.load(at_y + row).to(logits.dtype.element_ty))
