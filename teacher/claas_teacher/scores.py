"""What the teacher thinks of one response, as arrays; and how they are read from vLLM's JSON.

vLLM answers `prompt_logprobs=K` with one row per prompt token: the first null, the others
`{"<id>": {"logprob", "rank", "decoded_token"}}` with the K most likely ids and the actual token: K entries, or K+1 when
the actual token is not among them. JSON has no infinity: -9999 stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from claas_teacher.errors import TeacherAnswerInvalid, TeacherNonFinite

MINUS_INFINITY = -9999.0  # vLLM's spelling in JSON
ABOVE_ZERO = 1e-4  # rounding of an fp32 log-softmax; more than that is no probability
PADDING_ID = -1


@dataclass(frozen=True, slots=True)
class Scores:
    """The teacher's view of a response of N tokens, asked for K ids a position.

    ids:      (N, K+1) int32, by logprob descending, ties by id; the response's own token is always among them; where it
              is one of the K most likely, the last column is padding (-1).
    logprobs: (N, K+1) float32 natural logarithms, -inf for no mass and on padding.
    chosen:   (N,) float32, of the response's own tokens.
    """

    ids: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    chosen: npt.NDArray[np.float32]


def from_prompt_logprobs(rows: object, prompt_tokens: int, response_ids: Sequence[int], k: int) -> Scores:
    """Read the response's rows of vLLM's `prompt_logprobs`; the prompt's are only counted.

    Raises:
        TeacherAnswerInvalid: not the rows of this sample: their number, a row's entries, a token that is not scored.
        TeacherNonFinite: NaN or a logprob above zero.
    """
    n, sent = len(response_ids), prompt_tokens + len(response_ids)
    if not isinstance(rows, list) or len(rows) != sent:
        got = f"{len(rows)} rows" if isinstance(rows, list) else type(rows).__name__
        raise TeacherAnswerInvalid(f"prompt_logprobs: {sent} tokens were sent, {got} came back")
    ids = np.full((n, k + 1), PADDING_ID, np.int32)
    logprobs = np.full((n, k + 1), -np.inf, np.float32)
    chosen = np.empty(n, np.float32)
    for t, token in enumerate(response_ids):
        row_ids, row_logprobs = _row(rows[prompt_tokens + t], t, k)
        order = np.lexsort((row_ids, -row_logprobs))
        ids[t, : len(order)] = row_ids[order]
        logprobs[t, : len(order)] = row_logprobs[order]
        of_token = np.flatnonzero(row_ids == token)
        if len(of_token) != 1:
            raise TeacherAnswerInvalid(f"prompt_logprobs: the response's own token is not scored at position {t}")
        chosen[t] = row_logprobs[of_token[0]]
    return Scores(ids, logprobs, chosen)


def _row(row: object, t: int, k: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Ids and logprobs of one position, in the order of the answer."""
    if not isinstance(row, Mapping) or not k <= len(row) <= k + 1:
        got = f"{len(row)} entries" if isinstance(row, Mapping) else type(row).__name__
        raise TeacherAnswerInvalid(f"prompt_logprobs: {k} or {k + 1} entries expected at position {t}, got {got}")
    try:
        ids = np.array([int(key) for key in row], np.int32)
        logprobs = np.array([entry["logprob"] for entry in row.values()], np.float64)
    except (ValueError, TypeError, KeyError, OverflowError) as error:
        raise TeacherAnswerInvalid(f"prompt_logprobs: unreadable at position {t} ({type(error).__name__})") from None
    if len(np.unique(ids)) != len(ids) or ids.min() < 0:
        raise TeacherAnswerInvalid(f"prompt_logprobs: an id twice or below zero at position {t}")
    if np.isnan(logprobs).any() or logprobs.max() > ABOVE_ZERO:
        raise TeacherNonFinite(f"the teacher's logprobs hold NaN or a value above zero at position {t}")
    logprobs[logprobs <= MINUS_INFINITY] = -np.inf
    return ids, logprobs.astype(np.float32)
