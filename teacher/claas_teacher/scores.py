"""What the teacher thinks of one response, as arrays in one canonical order, wherever the numbers came from.

The order is made by sorting 64-bit keys (logprob descending, then id), one pass of numpy's vectorised sort: 1,024 x 101
entries take about a millisecond, an argsort by two columns takes ten.

vLLM's JSON answers `prompt_logprobs=K` with one row per prompt token: the first null, the others
`{"<id>": {"logprob", "rank", "decoded_token"}}` with the K most likely ids and the actual token: K entries, or K+1 when
the actual token is not among them. JSON has no infinity: -9999 stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from claas_teacher.errors import TeacherAnswerInvalid, TeacherNonFinite

MINUS_INFINITY = -9999.0  # vLLM's spelling in JSON
ABOVE_ZERO = 1e-4  # rounding of an fp32 log-softmax; more than that is no probability
PADDING_ID = -1

Ids = npt.NDArray[np.int32]
Logprobs = npt.NDArray[np.float32]

_SIGN = np.uint32(1 << 31)
_LOW = np.uint64((1 << 32) - 1)
_HALF = np.uint64(32)
_PADDING_KEY = np.uint64((1 << 64) - 1)


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's view of a response of N tokens on W ids a position: its K most likely, or the ids that were asked.

    ids:      (N, W+1) int32, by logprob descending, ties by id; the response's own token is always among them; what is
              left over (the own token was one of the W, or fewer were asked) is padding (-1) at the end.
    logprobs: (N, W+1) float32 natural logarithms, -inf for no mass and on padding.
    chosen:   (N,) float32, of the response's own tokens.
    tail:     (N,) float32, the probability of all other ids together, in [0, 1]; a difference of fp32 numbers, so
              below about 1e-6 it says no more than "small".
    """

    ids: Ids
    logprobs: Logprobs
    chosen: Logprobs
    tail: Logprobs


def canonical(ids: npt.NDArray[Any], logprobs: npt.NDArray[Any]) -> Scores:
    """Scores from rows in any order.

    Args:
        ids: (N, W+1) integers, the response's own token first; negative ids and repetitions of the own token are
            padding, other repetitions are the caller's error.
        logprobs: (N, W+1) floats; -9999 and less is no mass.

    Raises:
        TeacherNonFinite: NaN or a logprob above zero (+1e-4 for rounding).
    """
    given = np.asarray(logprobs, np.float32)
    padding = ids < 0
    padding[:, 1:] |= ids[:, 1:] == ids[:, :1]
    given = np.where(padding | (given <= MINUS_INFINITY), np.float32(-np.inf), given)
    if given.size and not given.max() <= ABOVE_ZERO:  # a NaN is the maximum of whatever it is among
        raise TeacherNonFinite("the teacher's logprobs hold NaN or a value above zero")
    chosen = given[:, 0].copy()
    bits = (np.float32(0) - given).view(np.uint32)  # ascending from here on; 0 - x, for -x makes two zeros
    ordered = np.where(bits & _SIGN, ~bits, bits | _SIGN)
    keys = (ordered.astype(np.uint64) << _HALF) | ids.astype(np.uint64)
    keys[padding] = _PADDING_KEY
    keys.sort(axis=1)
    bits = (keys >> _HALF).astype(np.uint32)
    sorted_logprobs = np.float32(0) - np.where(bits & _SIGN, bits ^ _SIGN, ~bits).view(np.float32)
    sorted_ids = (keys & _LOW).astype(np.uint32).view(np.int32)
    sorted_logprobs[sorted_ids == PADDING_ID] = -np.inf
    return Scores(sorted_ids, sorted_logprobs, chosen, tail_mass(sorted_logprobs))


def tail_mass(logprobs: Logprobs) -> Logprobs:
    """(N,) float32: what (N, W+1) distinct ids leave of the probability, clipped to [0, 1]."""
    mass = np.exp(logprobs).sum(axis=1, dtype=np.float64)
    tail: Logprobs = np.clip(1.0 - mass, 0.0, 1.0).astype(np.float32)
    return tail


def without_repetitions(ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """The rows (N, W) with every id but its first occurrence made padding."""
    order = np.argsort(ids, axis=1, kind="stable")
    ordered = np.take_along_axis(ids, order, axis=1)
    repeated = np.zeros(ids.shape, bool)
    np.put_along_axis(repeated, order[:, 1:], ordered[:, 1:] == ordered[:, :-1], axis=1)
    return np.where(repeated, np.int32(PADDING_ID), ids)


def from_prompt_logprobs(rows: object, prompt_tokens: int, response_ids: npt.ArrayLike, k: int) -> Scores:
    """Read the response's rows of vLLM's `prompt_logprobs`; the prompt's are only counted.

    Raises:
        TeacherAnswerInvalid: not the rows of this sample: their number, a row's entries, a token that is not scored.
        TeacherNonFinite: NaN or a logprob above zero.
    """
    response = np.asarray(response_ids, np.int64)
    n, sent = len(response), prompt_tokens + len(response)
    if not isinstance(rows, list) or len(rows) != sent:
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise TeacherAnswerInvalid(f"prompt_logprobs: {sent} tokens were sent, {got} came back")
    ids = np.full((n, k + 2), PADDING_ID, np.int64)  # the own token, then a row's entries, itself among them
    logprobs = np.full((n, k + 2), -np.inf, np.float64)
    for t, token in enumerate(response):
        row_ids, row_logprobs = _row(rows[prompt_tokens + t], t, k)
        of_token = np.flatnonzero(row_ids == token)
        if len(of_token) != 1:
            raise TeacherAnswerInvalid(f"prompt_logprobs: the response's own token is not scored at position {t}")
        ids[t, 0], logprobs[t, 0] = token, row_logprobs[of_token[0]]
        ids[t, 1 : 1 + len(row_ids)] = row_ids
        logprobs[t, 1 : 1 + len(row_ids)] = row_logprobs
    scores = canonical(ids, logprobs)
    return Scores(scores.ids[:, :-1], scores.logprobs[:, :-1], scores.chosen, scores.tail)


def _row(row: object, t: int, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float64]]:
    """Ids and logprobs of one position, in the order of the answer."""
    if not isinstance(row, Mapping) or not k <= len(row) <= k + 1:
        got = f"{len(row)} entries" if isinstance(row, Mapping) else type(row).__name__
        raise TeacherAnswerInvalid(f"prompt_logprobs: {k} or {k + 1} entries expected at position {t}, got {got}")
    try:
        ids = np.array([int(key) for key in row], np.int32)
        logprobs = np.array([entry["logprob"] for entry in row.values()], np.float64)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise TeacherAnswerInvalid(f"prompt_logprobs: unreadable at position {t} ({type(error).__name__})") from None
    if logprobs.shape != ids.shape:
        raise TeacherAnswerInvalid(f"prompt_logprobs: unreadable at position {t} (a list for a logprob)")
    if len(np.unique(ids)) != len(ids) or ids.min() < 0:
        raise TeacherAnswerInvalid(f"prompt_logprobs: an id twice or below zero at position {t}")
    return ids, logprobs
