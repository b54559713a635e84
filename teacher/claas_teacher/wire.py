"""The frames of `POST /claas/v1/score`, byte by byte. Numpy only.

Everything is little-endian and at a multiple of four bytes; u = unsigned integer, i = signed, f = IEEE float.
Each length follows from the fixed part and the table behind it, and is compared with the bytes that are there before
anything is allocated; arrays are views into the frame.

Request (version 1)
    offset  bytes  is
    0       4      "CLSQ"
    4       2      u16 version, 1
    6       2      u16 flags: bit 0, the frame holds chosen ids; other bits are 0
    8       4      u32 W: the K most likely ids that are wanted a position, or with bit 0 the chosen ids a position
    12      4      u32 S: samples
    16      32     SHA-256 fingerprint of the tokenizer that made the ids; all zero: do not compare
    48      4      u32 M: bytes of the model's id
    52      M      the model's id in UTF-8, then zeros up to a multiple of four; M = 0: whichever is served
            8 S    for each sample: u32 P prompt tokens, u32 N response tokens
            4 P    for each sample: i32 prompt ids,
            4 N    i32 response ids,
            4 N W  with bit 0: i32 chosen ids, row by row; -1 is padding

Answer (version 1)
    offset  bytes      is
    0       4          "CLSA"
    4       2          u16 version, 1
    6       2          u16 flags: as in the request
    8       4          u32 W: as in the request
    12      4          u32 S: as in the request
    16      8          the first 8 bytes of the request frame's BLAKE2b: an answer to another request is none
            4 S        for each sample: u32 N rows
            4 N (W+1)  for each sample: i32 ids, row by row, in the order of `scores.Scores`; -1 is padding
            4 N (W+1)  f32 their log-probabilities
            4 N        f32 log-probabilities of the response's own tokens
            4 N        f32 probability of all ids that are not in the row
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from claas_teacher.errors import FrameInvalid, TeacherAnswerInvalid, TeacherNonFinite
from claas_teacher.scores import ABOVE_ZERO, PADDING_ID, Scores, tail_mass, without_repetitions

VERSION = 1
MEDIA_TYPE = "application/vnd.claas.score.v1"
MAX_SAMPLES = 1024
MAX_WIDTH = 1 << 18  # no vocabulary is wider
MAX_MODEL_BYTES = 512
CHOSEN = 1  # flag
TAIL_ROUNDING = 1e-5

_REQUEST = struct.Struct("<4sHHII32sI")  # 52 bytes
_ANSWER = struct.Struct("<4sHHII8s")  # 24 bytes
_REQUEST_MAGIC, _ANSWER_MAGIC = b"CLSQ", b"CLSA"
_I32, _F32, _U32 = np.dtype("<i4"), np.dtype("<f4"), np.dtype("<u4")
_NO_FINGERPRINT = bytes(32)

Buffer = bytes | bytearray | memoryview


@dataclass(frozen=True, slots=True)
class Sample:
    """One response after its prompt: ids (P,) and (N,) int32, and the ids to score (N, W) int32 if they are chosen."""

    prompt: npt.NDArray[np.int32]
    response: npt.NDArray[np.int32]
    chosen: npt.NDArray[np.int32] | None = None

    @property
    def tokens(self) -> int:
        """What the engine has to read."""
        return len(self.prompt) + len(self.response)


@dataclass(frozen=True, slots=True)
class Request:
    """A batch of samples that are scored alike: the `width` most likely ids, or all of them `width` chosen ids."""

    samples: tuple[Sample, ...]
    width: int
    chosen: bool = False
    model: str = ""
    fingerprint: str | None = None  # 64 hex digits

    @property
    def tokens(self) -> int:
        """What the engine has to read."""
        return sum(sample.tokens for sample in self.samples)


def encode_request(request: Request) -> bytes:
    """The frame of a request.

    Raises:
        ValueError: it does not fit the format (counts, chosen ids of another shape, a fingerprint that is none).
    """
    model = request.model.encode()
    if len(request.samples) > MAX_SAMPLES or not 1 <= request.width <= MAX_WIDTH or len(model) > MAX_MODEL_BYTES:
        raise ValueError(f"{len(request.samples)} samples, width {request.width}, {len(model)} bytes of model id")
    fingerprint = bytes.fromhex(request.fingerprint) if request.fingerprint is not None else _NO_FINGERPRINT
    if len(fingerprint) != len(_NO_FINGERPRINT):
        raise ValueError("a fingerprint has 64 hex digits")
    head = _REQUEST.pack(
        _REQUEST_MAGIC,
        VERSION,
        CHOSEN * request.chosen,
        request.width,
        len(request.samples),
        fingerprint,
        len(model),
    )
    lengths = np.array([(len(s.prompt), len(s.response)) for s in request.samples], _U32)
    pieces: list[bytes] = [head, model, bytes(-len(model) % 4), lengths.tobytes()]
    for sample in request.samples:
        pieces += [sample.prompt.astype(_I32).tobytes(), sample.response.astype(_I32).tobytes()]
        if request.chosen:
            if sample.chosen is None or sample.chosen.shape != (len(sample.response), request.width):
                raise ValueError(f"chosen ids: ({len(sample.response)}, {request.width}) expected in every sample")
            pieces.append(sample.chosen.astype(_I32).tobytes())
    return b"".join(pieces)


def decode_request(frame: Buffer) -> Request:
    """The request of a frame; its arrays are views into it.

    Raises:
        FrameInvalid: the bytes are no request of this version.
    """
    if len(frame) < _REQUEST.size:
        raise FrameInvalid(f"a request has at least {_REQUEST.size} bytes, got {len(frame)}")
    magic, version, flags, width, samples, fingerprint, model_bytes = _REQUEST.unpack_from(frame)
    if magic != _REQUEST_MAGIC:
        raise FrameInvalid("no request: it does not begin with CLSQ")
    if version != VERSION:
        raise FrameInvalid(f"version {version} of the request is not known here, {VERSION} is")
    if flags & ~CHOSEN:
        raise FrameInvalid(f"flags {flags:#x} are not known here")
    if not 1 <= samples <= MAX_SAMPLES or not 1 <= width <= MAX_WIDTH or model_bytes > MAX_MODEL_BYTES:
        raise FrameInvalid(f"{samples} samples, width {width}, {model_bytes} bytes of model id: out of bounds")
    table = _REQUEST.size + model_bytes + -model_bytes % 4
    if len(frame) < table + 8 * samples:
        raise FrameInvalid(f"{len(frame)} bytes cannot hold the lengths of {samples} samples")
    lengths = np.frombuffer(frame, _U32, 2 * samples, table).reshape(samples, 2).astype(np.int64)  # (S, 2)
    chosen = bool(flags & CHOSEN)
    ids = lengths.sum(axis=1) + (lengths[:, 1] * width if chosen else 0)  # (S,); below 2^51 each, so nothing overflows
    expected = table + 8 * samples + 4 * int(ids.sum())
    if len(frame) != expected:
        raise FrameInvalid(f"its lengths make {expected} bytes, it has {len(frame)}")
    if any(frame[_REQUEST.size + model_bytes : table]):
        raise FrameInvalid("what fills up the model's id is not zero")
    try:
        model = bytes(frame[_REQUEST.size : _REQUEST.size + model_bytes]).decode()
    except UnicodeDecodeError:
        raise FrameInvalid("the model's id is not UTF-8") from None
    offset = table + 8 * samples
    found = []
    for p, n in lengths.tolist():
        prompt = np.frombuffer(frame, _I32, p, offset)
        response = np.frombuffer(frame, _I32, n, offset + 4 * p)
        offset += 4 * (p + n)
        wanted = None
        if chosen:
            wanted = np.frombuffer(frame, _I32, n * width, offset).reshape(n, width)
            offset += 4 * n * width
        found.append(Sample(prompt, response, wanted))
    known = None if fingerprint == _NO_FINGERPRINT else fingerprint.hex()
    return Request(tuple(found), width, chosen, model, known)


def answer_bytes(rows: Sequence[int], width: int) -> int:
    """Length of the answer's frame for samples of so many response tokens."""
    return _ANSWER.size + 4 * len(rows) + sum(rows) * 4 * (2 * (width + 1) + 2)


class Answer:
    """The frame of an answer, allocated once and filled sample by sample in any order."""

    def __init__(self, request: Request, frame: Buffer) -> None:
        """`frame` is the request's, whose digest the answer carries."""
        rows = [len(sample.response) for sample in request.samples]
        self._rows, self._width = rows, request.width
        self.frame = bytearray(answer_bytes(rows, request.width))
        flags = CHOSEN * request.chosen
        head = (_ANSWER_MAGIC, VERSION, flags, request.width, len(rows), request_digest(frame))
        _ANSWER.pack_into(self.frame, 0, *head)
        table = np.frombuffer(self.frame, _U32, len(rows), _ANSWER.size)
        table[:] = rows
        starts = np.cumsum([0, *rows]) * 4 * (2 * (request.width + 1) + 2)
        self._starts = (_ANSWER.size + 4 * len(rows) + starts).tolist()

    def put(self, sample: int, scores: Scores) -> None:
        """Write one sample's scores.

        Raises:
            ValueError: they are not of its shape.
        """
        views = _views(self.frame, self._starts[sample], self._rows[sample], self._width)
        given = (scores.ids, scores.logprobs, scores.chosen, scores.tail)
        for view, array in zip(views, given, strict=True):
            if view.shape != array.shape:
                raise ValueError(f"sample {sample}: {array.shape} where {view.shape} was asked")
            view[...] = array


def decode_answer(frame: Buffer, request: Request, request_frame: Buffer) -> list[Scores]:
    """The scores that answer this very request; arrays are views into the frame.

    Raises:
        TeacherAnswerInvalid: the bytes are no answer to it: cut, of other shapes, or rows that cannot be.
        TeacherNonFinite: NaN or a logprob above zero.
    """
    rows = [len(sample.response) for sample in request.samples]
    expected = answer_bytes(rows, request.width)
    if len(frame) != expected:
        raise TeacherAnswerInvalid(f"an answer of {expected} bytes was expected, got {len(frame)}")
    head = _ANSWER.unpack_from(frame)
    flags = CHOSEN * request.chosen
    if head != (_ANSWER_MAGIC, VERSION, flags, request.width, len(rows), request_digest(request_frame)):
        raise TeacherAnswerInvalid("the answer's head is not that of an answer to this request")
    if np.frombuffer(frame, _U32, len(rows), _ANSWER.size).tolist() != rows:
        raise TeacherAnswerInvalid("the answer's rows are not those of the samples that were sent")
    offset, found = _ANSWER.size + 4 * len(rows), []
    for number, (n, sample) in enumerate(zip(rows, request.samples, strict=True)):
        ids, logprobs, chosen, tail = _views(frame, offset, n, request.width)
        offset += 4 * n * (2 * (request.width + 1) + 2)
        _check_rows(ids, logprobs, chosen, tail, sample, f"samples[{number}]")
        found.append(Scores(ids, logprobs, chosen, tail))
    return found


def request_digest(frame: Buffer) -> bytes:
    """Eight bytes that tell requests apart."""
    return hashlib.blake2b(frame, digest_size=8).digest()


def _views(
    frame: Buffer, offset: int, n: int, width: int
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Ids and logprobs (N, W+1), chosen and tail (N,) of a sample whose part begins at `offset`."""
    entries = n * (width + 1)
    ids = np.frombuffer(frame, _I32, entries, offset).reshape(n, width + 1)
    logprobs = np.frombuffer(frame, _F32, entries, offset + 4 * entries).reshape(n, width + 1)
    chosen = np.frombuffer(frame, _F32, n, offset + 8 * entries)
    tail = np.frombuffer(frame, _F32, n, offset + 8 * entries + 4 * n)
    return ids, logprobs, chosen, tail


def _check_rows(
    ids: npt.NDArray[np.int32],
    logprobs: npt.NDArray[np.float32],
    chosen: npt.NDArray[np.float32],
    tail: npt.NDArray[np.float32],
    sample: Sample,
    where: str,
) -> None:
    """Raise unless the rows are scores of this sample."""
    if not all(given.max(initial=-np.inf) <= ABOVE_ZERO for given in (logprobs, chosen)):  # NaN is no less
        raise TeacherNonFinite(f"{where}: the teacher's logprobs hold NaN or a value above zero")
    if ids.min(initial=PADDING_ID) < PADDING_ID:
        raise TeacherAnswerInvalid(f"{where}: an id below zero that is no padding")
    own = ids == sample.response[:, None]
    if not (own.sum(axis=1) == 1).all() or not (logprobs[own] == chosen).all():
        raise TeacherAnswerInvalid(f"{where}: the response's own token is not scored, or not once, or not alike")
    if not (logprobs[:, :-1] >= logprobs[:, 1:]).all() or not (logprobs[ids == PADDING_ID] == -np.inf).all():
        raise TeacherAnswerInvalid(f"{where}: rows are not by descending log-probability")
    ordered = np.sort(ids, axis=1)
    if ((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] != PADDING_ID)).any():
        raise TeacherAnswerInvalid(f"{where}: an id twice at one position")
    if sample.chosen is not None:
        given = np.concatenate([sample.response[:, None], sample.chosen], axis=1)
        if not (ordered == np.sort(without_repetitions(given), axis=1)).all():
            raise TeacherAnswerInvalid(f"{where}: other ids than those that were chosen")
    if not (np.abs(tail - tail_mass(logprobs)) <= TAIL_ROUNDING).all():  # NaN is not
        raise TeacherAnswerInvalid(f"{where}: a tail that is not what the row leaves")
