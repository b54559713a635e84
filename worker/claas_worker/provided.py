"""teacher.mode Provided: `samples[].teacherLogprobs` of four shapes become a support with logprobs (sdpo.md section 7).

(a) `[-0.1, …]`, one float a response token; (b) OpenAI's legacy object `{tokens, token_logprobs, top_logprobs,
text_offset}`; (c) Fireworks' `{token_ids, content: [{token, token_id, logprob, top_logprobs: […]}]}`; (d) vLLM's
`prompt_logprobs`: `[null, {"<id>": {logprob, rank, decoded_token}}, …]`. Ids win over text; a text that stands for no
single id of this tokenizer is dropped, and its mass is the tail's. (b), (c) and (d) may cover the prompt too, and one
generated token after the response. Where only the response's own tokens are scored, the buckets are {y_t, rest}.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from claas_worker.errors import LogprobLengthMismatch, NonFiniteInput
from claas_worker.job import InvalidSpec

MINUS_INFINITY = -9999.0  # JSON's, by vLLM
ABOVE_ZERO = 1e-4
PADDING = -1
ID_LIMIT = 2**31
UNREADABLE = "\ufffd"  # part of a character: such a text stands for many ids
SHAPES = (
    "a list of floats, an OpenAI legacy logprobs object (tokens, token_logprobs), a Fireworks one (content), "
    "or vLLM's prompt_logprobs"
)


class Scored(NamedTuple):
    """What a teacher thinks of one response of N tokens."""

    support_ids: Tensor  # (N, K) int64, padded with -1
    logprobs: Tensor  # (N, K) float32 log q, -inf for no mass and on padding
    chosen_only: bool = False  # the support holds the response's own tokens alone


class TokenTexts:
    """Which id a token's text stands for."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer

    @cached_property
    def _ids(self) -> dict[str, int]:
        texts = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        ids: dict[str, int] = {}
        twice: set[str] = set()
        for token, text in enumerate(texts):
            if ids.setdefault(text, token) != token:
                twice.add(text)
        return {text: token for text, token in ids.items() if text not in twice and UNREADABLE not in text}

    def id_of(self, text: str) -> int | None:
        """The one id with this text, or None."""
        if text.startswith("token_id:") and text[9:].isdigit():
            return int(text[9:])
        return self._ids.get(text)

    def may_be(self, text: str, token: int) -> bool:
        """Whether `text` can be that of `token`; parts of characters are given the benefit of the doubt."""
        if text.startswith("token_id:"):
            return self.id_of(text) == token
        own = self._tokenizer.decode([token])
        return UNREADABLE in own or UNREADABLE in text or text.startswith("bytes:") or text.strip() == own.strip()


class _Row(NamedTuple):
    """One position of a payload."""

    token: int | None  # the id that stands here, where the payload says it
    text: str | None
    logprob: Any  # of that token; None where it is not given
    top: dict[int, Any] | None  # by id; None where the payload has no such list


def parse(payload: Any, response_ids: Sequence[int], dropped: int, texts: TokenTexts, where: str) -> Scored:
    """The support and its logprobs.

    Args:
        dropped: tokens of the response behind `response_ids` that were truncated, and that the payload covers too.
        where: names the field in errors, which hold positions and counts, never text.

    Raises:
        InvalidSpec: of none of the four shapes.
        LogprobLengthMismatch: too few or too many tokens, or others than the response's.
        NonFiniteInput: NaN, a value above zero, or none for a response token.
    """
    n = len(response_ids) + dropped
    if isinstance(payload, list) and _is_chosen_only(payload):
        if len(payload) != n:
            raise LogprobLengthMismatch(
                f"{where} holds {len(payload)} values, the response has {n} tokens{_hint(n, len(payload))}"
            )
        rows = [_Row(None, None, value, None) for value in payload[: len(response_ids)]]
    else:
        rows = _align(_rows(payload, texts, where), response_ids, n, texts, where)
    columns = []
    for t, (row, token) in enumerate(zip(rows, response_ids, strict=True)):
        entries = dict(row.top or {})
        own = row.logprob if row.logprob is not None else entries.get(token)
        entries[token] = own
        at = f"{where}: position {t}"
        columns.append({key: _value(value, at) for key, value in entries.items() if 0 <= key < ID_LIMIT})
    shape = (len(columns), max(map(len, columns)))
    ids = torch.full(shape, PADDING, dtype=torch.long)
    logprobs = torch.full(shape, -torch.inf)
    for t, entries in enumerate(columns):
        ids[t, : len(entries)] = torch.tensor(list(entries))
        logprobs[t, : len(entries)] = torch.tensor(list(entries.values()))
    return Scored(ids, logprobs, chosen_only=all(row.top is None for row in rows))


def _rows(payload: Any, texts: TokenTexts, where: str) -> list[_Row]:
    """The payload's positions, whatever its shape."""
    if isinstance(payload, Mapping) and "prompt_logprobs" in payload:
        payload = payload["prompt_logprobs"]
    try:
        if isinstance(payload, list):
            return [_vllm(entry) for entry in payload]
        if isinstance(payload, Mapping) and isinstance(payload.get("content"), list):
            content = payload["content"]
            ids = payload.get("token_ids") or [entry.get("token_id") for entry in content]
            return [_fireworks(entry, token, texts) for entry, token in zip(content, ids, strict=True)]
        if isinstance(payload, Mapping) and isinstance(payload.get("token_logprobs"), list):
            return _legacy(payload, texts)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise InvalidSpec(f"{where} is malformed ({type(error).__name__}): give {SHAPES}") from None
    raise InvalidSpec(f"{where} has an unknown shape: give {SHAPES}")


def _vllm(entry: Mapping[str, Mapping[str, Any]] | None) -> _Row:
    return _Row(
        None, None, None, None if entry is None else {int(key): value["logprob"] for key, value in entry.items()}
    )


def _fireworks(entry: Mapping[str, Any], token: int | None, texts: TokenTexts) -> _Row:
    top = None
    if entry.get("top_logprobs"):
        top = {}
        for other in entry["top_logprobs"]:
            key = other["token_id"] if other.get("token_id") is not None else texts.id_of(other["token"])
            if key is not None:
                top[int(key)] = other["logprob"]
    return _Row(None if token is None else int(token), entry.get("token"), entry["logprob"], top)


def _legacy(payload: Mapping[str, Any], texts: TokenTexts) -> list[_Row]:
    logprobs = payload["token_logprobs"]
    count = len(logprobs)
    ids = payload.get("token_ids") or [None] * count
    words = payload.get("tokens") or [None] * count
    tops = payload.get("top_logprobs") or [None] * count
    rows = []
    for token, text, logprob, top in zip(ids, words, logprobs, tops, strict=True):
        known = None if top is None else {texts.id_of(word): value for word, value in top.items()}
        if known is not None:
            known.pop(None, None)
        rows.append(_Row(None if token is None else int(token), text, logprob, known))  # type: ignore[arg-type]
    return rows


def _align(rows: list[_Row], response_ids: Sequence[int], n: int, texts: TokenTexts, where: str) -> list[_Row]:
    """The rows of the response, which are the last n, or those before one generated token."""
    if len(rows) < n:
        raise LogprobLengthMismatch(f"{where} covers {len(rows)} tokens, the response has {n}{_hint(n, len(rows))}")
    starts = [start for start in (len(rows) - n, len(rows) - n - 1) if start >= 0]
    kept = [rows[start : start + len(response_ids)] for start in starts]
    wrong = [_first_wrong(candidate, response_ids, texts) for candidate in kept]
    for candidate, position in zip(kept, wrong, strict=True):
        if position is None:
            return candidate
    raise LogprobLengthMismatch(f"{where}: position {wrong[0]} of the response holds another token than the response")


def _first_wrong(rows: Sequence[_Row], response_ids: Sequence[int], texts: TokenTexts) -> int | None:
    """The first position whose row cannot be that of the response's token, or None."""
    for t, (row, token) in enumerate(zip(rows, response_ids, strict=True)):
        if row.token is not None:
            fits = row.token == token
        elif row.text is not None:
            fits = texts.may_be(row.text, token)
        else:
            fits = row.top is None or token in row.top  # vLLM's rows always hold the actual token
        if not fits:
            return t
    return None


def _value(value: Any, where: str) -> float:
    if value is None:
        raise NonFiniteInput(f"{where} has no logprob of the response's token: score the response after its prompt")
    if not _is_number(value):
        raise InvalidSpec(f"{where} holds a {type(value).__name__} where a number belongs")
    if math.isnan(value) or value > ABOVE_ZERO:
        raise NonFiniteInput(f"{where} holds NaN or a logprob above zero")
    return -math.inf if value <= MINUS_INFINITY else float(value)


def _is_chosen_only(payload: list[Any]) -> bool:
    """Shape (a): numbers, with null for one that is missing."""
    return any(map(_is_number, payload)) and all(value is None or _is_number(value) for value in payload)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _hint(expected: int, got: int) -> str:
    """The end-of-turn token is what people forget."""
    if expected == got + 1:
        return " (the last is the end-of-turn token: score it too, or set finishReason: length)"
    return ""
