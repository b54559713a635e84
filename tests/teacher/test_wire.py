"""The frames: what goes in comes out, and every other sequence of bytes is a named error that allocates nothing."""

from __future__ import annotations

import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from claas_teacher import wire
from claas_teacher.errors import FrameInvalid, TeacherAnswerInvalid, TeacherError, TeacherNonFinite
from claas_teacher.scores import Scores, canonical
from claas_teacher.wire import Answer, Request, Sample

NO_DEADLINE = settings(deadline=None)  # the machine may be busy


@st.composite
def requests(draw: st.DrawFn) -> Request:
    """Any request: lengths may be zero, ids are any int32, the model's id any text."""
    chosen, width = draw(st.booleans()), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))

    def ids(*shape: int) -> np.ndarray:
        return rng.integers(-(2**31), 2**31, shape).astype(np.int32)

    samples = []
    for p, n in draw(st.lists(st.tuples(st.integers(0, 6), st.integers(0, 6)), min_size=1, max_size=4)):
        samples.append(Sample(ids(p), ids(n), ids(n, width) if chosen else None))
    model = draw(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
    fingerprint = draw(st.none() | st.binary(min_size=32, max_size=32).filter(any).map(bytes.hex))
    return Request(tuple(samples), width, chosen, model, fingerprint)


def scores_of(request: Request, seed: int = 0) -> list[Scores]:
    """Some scores that a teacher could give."""
    rng = np.random.default_rng(seed)
    found = []
    for sample in request.samples:
        n = len(sample.response)
        others = np.stack([rng.permutation(1_000)[: request.width] + 10_000 for _ in range(n)] or [np.empty(0)])
        ids = np.concatenate([sample.response[:, None], others.reshape(n, -1)[:, : request.width]], axis=1)
        logprobs = np.log(rng.dirichlet(np.ones(request.width + 2), n))[:, :-1] if n else np.empty(ids.shape)
        found.append(canonical(ids.astype(np.int64), logprobs))
    return found


def answer_to(request: Request, frame: bytes) -> bytearray:
    answer = Answer(request, frame)
    for number, scores in reversed(list(enumerate(scores_of(request)))):
        answer.put(number, scores)
    return answer.frame


@NO_DEADLINE
@given(requests())
def test_a_request_comes_out_as_it_went_in(request: Request) -> None:
    found = wire.decode_request(wire.encode_request(request))
    assert (found.width, found.chosen, found.model) == (request.width, request.chosen, request.model)
    assert found.fingerprint == request.fingerprint
    assert found.tokens == request.tokens
    for got, sent in zip(found.samples, request.samples, strict=True):
        np.testing.assert_array_equal(got.prompt, sent.prompt)
        np.testing.assert_array_equal(got.response, sent.response)
        assert (got.chosen is None) == (sent.chosen is None)
        if sent.chosen is not None:
            np.testing.assert_array_equal(got.chosen, sent.chosen)


def small_request(width: int = 3, chosen: bool = False) -> tuple[Request, bytes]:
    samples = []
    for p, n in ((4, 2), (1, 1), (2, 5)):
        wanted = np.arange(n * width, dtype=np.int32).reshape(n, width) if chosen else None
        samples.append(Sample(np.arange(p, dtype=np.int32), np.arange(n, dtype=np.int32) + 7, wanted))
    request = Request(tuple(samples), width, chosen, "org/model", "ab" * 32)
    return request, wire.encode_request(request)


@pytest.mark.parametrize("width", [1, 20, 100])
def test_an_answer_comes_out_as_it_went_in(width: int) -> None:
    request, frame = small_request(width)
    sent, found = scores_of(request), wire.decode_answer(answer_to(request, frame), request, frame)
    for got, expected in zip(found, sent, strict=True):
        for name in ("ids", "logprobs", "chosen", "tail"):
            np.testing.assert_array_equal(getattr(got, name), getattr(expected, name))
            assert getattr(got, name).dtype == getattr(expected, name).dtype


def test_the_bytes_are_the_documented_ones() -> None:
    sample = Sample(np.array([5, 6], np.int32), np.array([7], np.int32))
    frame = wire.encode_request(Request((sample,), 2, model="abcde"))
    head = b"CLSQ" + struct.pack("<HHII", 1, 0, 2, 1) + bytes(32) + struct.pack("<I", 5)
    assert frame == head + b"abcde\0\0\0" + struct.pack("<5i", 2, 1, 5, 6, 7)
    request = wire.decode_request(frame)
    answer = Answer(request, frame)
    answer.put(0, canonical(np.array([[7, 3, 9]]), np.log(np.array([[0.25, 0.5, 0.125]]))))
    expected = b"CLSA" + struct.pack("<HHII", 1, 0, 2, 1) + wire.request_digest(frame) + struct.pack("<I", 1)
    expected += struct.pack(
        "<3i3f2f", 3, 7, 9, *np.log(np.float32([0.5, 0.25, 0.125])), np.log(np.float32(0.25)), 0.125
    )
    assert bytes(answer.frame) == expected


@NO_DEADLINE
@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda rest: b"CLSQ\x01\x00\x00\x00" + rest))
def test_no_bytes_are_a_crash(frame: bytes) -> None:
    try:
        request = wire.decode_request(frame)
    except FrameInvalid:
        return
    assert 4 * request.tokens <= len(frame)


@NO_DEADLINE
@given(st.booleans(), st.data())
def test_a_cut_or_longer_request_is_refused(chosen: bool, data: st.DataObject) -> None:
    _, frame = small_request(chosen=chosen)
    length = data.draw(st.integers(0, len(frame) - 1))
    with pytest.raises(FrameInvalid):
        wire.decode_request(frame[:length])
    with pytest.raises(FrameInvalid):
        wire.decode_request(frame + bytes(data.draw(st.integers(1, 9))))


@NO_DEADLINE
@given(st.data())
def test_a_lying_answer_is_refused_or_still_scores_of_this_sample(data: st.DataObject) -> None:
    """Bytes changed anywhere, cut, or longer: a named error, or rows that could be this response's."""
    request, frame = small_request()
    answer = answer_to(request, frame)
    length = data.draw(st.integers(0, len(answer) + 8))
    lie = bytearray(bytes(answer) + bytes(8))[:length]
    for _ in range(data.draw(st.integers(0, 3))):
        if lie:
            lie[data.draw(st.integers(0, len(lie) - 1))] = data.draw(st.integers(0, 255))
    try:
        found = wire.decode_answer(lie, request, frame)
    except (TeacherAnswerInvalid, TeacherNonFinite):
        return
    assert len(lie) == len(answer)
    for scores, sample in zip(found, request.samples, strict=True):
        assert (scores.ids == sample.response[:, None]).any(axis=1).all()
        assert not np.isnan(scores.logprobs).any()


@pytest.mark.parametrize("offset", [8, 12, 48, 64, 68, 72, 76])  # W, S, M and the table's lengths
@pytest.mark.parametrize("value", [0, 2**16, 2**30, 2**31, 2**32 - 1])
def test_a_lying_count_allocates_nothing(offset: int, value: int) -> None:
    _, frame = small_request(chosen=True)
    lie = bytearray(frame)
    struct.pack_into("<I", lie, offset, value)
    tracemalloc.start()
    try:
        with pytest.raises(FrameInvalid):
            wire.decode_request(lie)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


def test_an_answer_to_another_request_is_none() -> None:
    request, frame = small_request()
    other = Request(request.samples, request.width, request.chosen, "org/another", request.fingerprint)
    with pytest.raises(TeacherAnswerInvalid, match="head"):
        wire.decode_answer(answer_to(request, frame), other, wire.encode_request(other))


@pytest.mark.parametrize(
    ("what", "error"),
    [
        ({"logprobs": np.nan}, TeacherNonFinite),
        ({"logprobs": 0.5}, TeacherNonFinite),
        ({"chosen": np.nan}, TeacherNonFinite),
        ({"chosen": -77.0}, TeacherAnswerInvalid),
        ({"tail": np.nan}, TeacherAnswerInvalid),
        ({"tail": 1.5}, TeacherAnswerInvalid),
        ({"tail": -0.5}, TeacherAnswerInvalid),
        ({"ids": -2}, TeacherAnswerInvalid),
        ({"ids": 7}, TeacherAnswerInvalid),  # the own token in every column
    ],
)
def test_rows_that_cannot_be_are_a_named_error(what: dict[str, float], error: type[TeacherError]) -> None:
    request, frame = small_request()
    answer = Answer(request, frame)
    for number, scores in enumerate(scores_of(request)):
        for name, value in what.items():
            getattr(scores, name)[0] = value
        answer.put(number, scores)
    with pytest.raises(error):
        wire.decode_answer(answer.frame, request, frame)


def test_padding_that_is_not_zero_is_refused() -> None:
    _, frame = small_request()
    (length,) = struct.unpack_from("<I", frame, 48)
    assert length % 4, "the small request's model must need padding"
    lie = bytearray(frame)
    lie[52 + length] = 1
    with pytest.raises(FrameInvalid, match="not zero"):
        wire.decode_request(lie)


@pytest.mark.parametrize(
    ("what", "chosen", "words"),
    [("twice", False, "twice"), ("tail", False, "tail"), ("others", True, "other ids than those")],
)
def test_an_answer_that_contradicts_itself_or_the_question(what: str, chosen: bool, words: str) -> None:
    wanted = np.array([[5, 6], [5, 7]], np.int32) if chosen else None
    request = Request((Sample(np.array([1], np.int32), np.array([3, 4], np.int32), wanted),), 2, chosen)
    frame = wire.encode_request(request)
    ids = np.array([[3, 5, 6], [4, 5, 7]])
    logprobs = np.log([[0.5, 0.2, 0.1], [0.1, 0.2, 0.5]])
    good = Answer(request, frame)
    good.put(0, canonical(ids, logprobs))
    assert wire.decode_answer(good.frame, request, frame)[0].chosen.shape == (2,)

    scores = canonical(ids, logprobs)
    if what == "twice":
        scores.ids[0, 2] = scores.ids[0, 1]
    elif what == "tail":
        scores.tail[1] += 0.01
    else:
        scores.ids[0, 2] = 8
    bad = Answer(request, frame)
    bad.put(0, scores)
    with pytest.raises(TeacherAnswerInvalid, match=words):
        wire.decode_answer(bad.frame, request, frame)


def test_scores_of_another_shape_do_not_fit() -> None:
    request, frame = small_request()
    answer = Answer(request, frame)
    with pytest.raises(ValueError, match="sample 1"):
        answer.put(1, scores_of(request)[0])


@pytest.mark.parametrize(
    "change", [{"width": 0}, {"samples": ()}, {"model": "x" * 513}, {"fingerprint": "abc"}, {"chosen": True}], ids=str
)
def test_what_no_frame_can_hold(change: dict[str, object]) -> None:
    request, _ = small_request()
    fields = {name: getattr(request, name) for name in ("samples", "width", "chosen", "model", "fingerprint")}
    with pytest.raises((ValueError, FrameInvalid)):
        wire.decode_request(wire.encode_request(Request(**{**fields, **change})))  # type: ignore[arg-type]
