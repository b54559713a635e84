"""Reading vLLM's prompt_logprobs: any row it can send comes out sorted and whole, any other is a named error."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claas_teacher.errors import TeacherAnswerInvalid, TeacherError, TeacherNonFinite
from claas_teacher.scores import MINUS_INFINITY, canonical, from_prompt_logprobs

Row = dict[str, dict[str, Any]]


def row(logprobs: dict[int, float]) -> Row:
    """A row as vLLM writes it."""
    return {str(i): {"logprob": lp, "rank": n, "decoded_token": "x"} for n, (i, lp) in enumerate(logprobs.items(), 1)}


@st.composite
def samples(draw: st.DrawFn) -> tuple[int, int, list[int], list[dict[int, float]]]:
    """K, prompt length, response ids and the response's rows; the token among the K most likely or beside them."""
    k = draw(st.integers(1, 12))
    prompt_tokens = draw(st.integers(1, 4))
    response, rows = [], []
    for _ in range(draw(st.integers(1, 5))):
        extra = draw(st.booleans())
        ids = draw(st.lists(st.integers(0, 200_000), min_size=k + extra, max_size=k + extra, unique=True))
        logprob = st.one_of(st.floats(-60, 0), st.just(MINUS_INFINITY))
        rows.append(dict(zip(ids, draw(st.lists(logprob, min_size=len(ids), max_size=len(ids))), strict=True)))
        response.append(ids[0] if extra else draw(st.sampled_from(ids)))
    return k, prompt_tokens, response, rows


@settings(deadline=None)  # the machine may be busy
@given(samples())
def test_every_row_comes_out_sorted_whole_and_padded(
    sample: tuple[int, int, list[int], list[dict[int, float]]],
) -> None:
    k, prompt_tokens, response, rows = sample
    prompt_rows = [None, *[row({7: -1.0})] * (prompt_tokens - 1)]
    wire = json.loads(json.dumps([*prompt_rows, *map(row, rows)]))
    scores = from_prompt_logprobs(wire, prompt_tokens, response, k)
    n = len(response)
    assert (scores.ids.shape, scores.ids.dtype) == ((n, k + 1), np.int32)
    assert (scores.logprobs.shape, scores.logprobs.dtype) == ((n, k + 1), np.float32)
    assert (scores.chosen.shape, scores.chosen.dtype) == ((n,), np.float32)
    for t, sent in enumerate(rows):
        expected = {i: np.float32(-math.inf if lp == MINUS_INFINITY else lp) for i, lp in sent.items()}
        real = scores.ids[t] >= 0
        assert dict(zip(scores.ids[t][real].tolist(), scores.logprobs[t][real], strict=True)) == expected
        assert not real[len(sent) :].any()
        assert (scores.logprobs[t][len(sent) :] == -math.inf).all()
        assert (scores.logprobs[t][:-1] >= scores.logprobs[t][1:]).all()
        assert scores.chosen[t] == expected[response[t]]


def test_ties_are_ordered_by_id_so_that_the_same_scores_are_the_same_arrays() -> None:
    scores = from_prompt_logprobs([None, row({9: -1.0, 4: -1.0, 6: -0.5})], 1, [9], 3)
    assert scores.ids.tolist() == [[6, 4, 9, -1]]


GOOD = {5: -0.5, 6: -1.5}
BAD_ANSWERS: dict[str, tuple[object, type[TeacherError]]] = {
    "no list": ({"0": None}, TeacherAnswerInvalid),
    "nothing": (None, TeacherAnswerInvalid),
    "a row too few": ([None], TeacherAnswerInvalid),
    "a row too many": ([None, row(GOOD), row(GOOD)], TeacherAnswerInvalid),
    "an empty row": ([None, {}], TeacherAnswerInvalid),
    "a null row": ([None, None], TeacherAnswerInvalid),
    "K-1 entries": ([None, row({5: -0.5})], TeacherAnswerInvalid),
    "K+2 entries": ([None, row({5: -0.5, 6: -1.0, 7: -2.0, 8: -3.0})], TeacherAnswerInvalid),
    "the token is missing": ([None, row({6: -0.5, 7: -1.5})], TeacherAnswerInvalid),
    "no number for an id": ([None, {"5": {"logprob": -1.0}, "six": {"logprob": -1.0}}], TeacherAnswerInvalid),
    "an id twice": ([None, {"5": {"logprob": -1.0}, "05": {"logprob": -1.0}}], TeacherAnswerInvalid),
    "an id below zero": ([None, {"5": {"logprob": -1.0}, "-6": {"logprob": -1.0}}], TeacherAnswerInvalid),
    "an id beyond int32": ([None, {"5": {"logprob": -1.0}, str(2**40): {"logprob": -1.0}}], TeacherAnswerInvalid),
    "no logprob": ([None, {"5": {"logprob": -1.0}, "6": {"rank": 2}}], TeacherAnswerInvalid),
    "a logprob of text": ([None, {"5": {"logprob": -1.0}, "6": {"logprob": "low"}}], TeacherAnswerInvalid),
    "a null logprob": ([None, {"5": {"logprob": -1.0}, "6": {"logprob": None}}], TeacherError),
    "an entry that is none": ([None, {"5": -1.0, "6": -2.0}], TeacherAnswerInvalid),
    "NaN": ([None, row({5: -0.5, 6: math.nan})], TeacherNonFinite),
    "above zero": ([None, row({5: 0.01, 6: -4.0})], TeacherNonFinite),
    "infinity": ([None, row({5: math.inf, 6: -4.0})], TeacherNonFinite),
}


@pytest.mark.parametrize("name", BAD_ANSWERS)
def test_any_other_answer_is_a_named_error(name: str) -> None:
    rows, error = BAD_ANSWERS[name]
    with pytest.raises(error):
        from_prompt_logprobs(rows, 1, [5], 2)


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.just("5"), inner, max_size=3),
    max_leaves=12,
)


@settings(deadline=None)  # the machine may be busy
@given(junk)
def test_no_answer_is_a_crash(rows: object) -> None:
    try:
        scores = from_prompt_logprobs(rows, 1, [5], 2)
    except TeacherError:
        return
    assert 5 in scores.ids


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(0, 2**32), st.booleans())
def test_canonical_is_what_a_stable_sort_gives(width: int, seed: int, repeat: bool) -> None:
    rng = np.random.default_rng(seed)
    n = 4
    ids = np.stack([rng.permutation(40)[: width + 1] for _ in range(n)])
    logprobs = np.log(rng.dirichlet(np.ones(width + 2), n))[:, :-1].astype(np.float32).round(1)  # ties
    logprobs[rng.random(logprobs.shape) < 0.2] = -np.inf
    if repeat:
        ids[:, -1], logprobs[:, -1] = ids[:, 0], logprobs[:, 0]
    scores = canonical(ids, logprobs)
    for t in range(n):
        row = sorted({(-lp, i) for i, lp in zip(ids[t].tolist(), logprobs[t].tolist(), strict=True)})
        real = scores.ids[t] >= 0
        assert [i for _, i in row] == scores.ids[t][real].tolist()
        assert [-lp for lp, _ in row] == scores.logprobs[t][real].tolist()
        assert not real[len(row) :].any()
        assert scores.chosen[t] == logprobs[t, 0]
        assert scores.tail[t] == pytest.approx(max(0, 1 - sum(math.exp(-lp) for lp, _ in row)), abs=1e-6)


def test_canonical_keeps_the_bits_of_every_logprob() -> None:
    given_bits = np.array([[0x80000000, 0x00000000, 0xBF800000, 0x80000001, 0xFF7FFFFF, 0xFF800000]], np.uint32)
    scores = canonical(np.arange(6)[None, :], given_bits.view(np.float32))
    assert scores.logprobs[0].tolist() == [0, 0, -1.401298464324817e-45, -1, -math.inf, -math.inf]
