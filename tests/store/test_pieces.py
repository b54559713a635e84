"""Bytes in pieces are the bytes put together: for digests, for files, and for what boto3 makes of a part."""

from __future__ import annotations

import hashlib
import io
import json
from itertools import accumulate, pairwise

import numpy as np
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st

from claas_store.checks import ADAPTER
from claas_store.pieces import Pieces, Window
from claas_store.version import OPTIMIZER, encode
from store import examples

cuts = st.lists(st.integers(0, 40), max_size=12)


@given(cuts, st.integers(0, 500), st.integers(0, 500), st.lists(st.tuples(st.integers(-60, 60), st.integers(0, 2))))
def test_a_window_reads_as_a_file_of_its_bytes(
    sizes: list[int], start: int, end: int, moves: list[tuple[int, int]]
) -> None:
    data = bytes(range(256)) * 2
    data = data[: sum(sizes)]
    pieces = Pieces([data[first:last] for first, last in pairwise(accumulate(sizes, initial=0))])
    assert (len(pieces), bytes(pieces)) == (len(data), data)
    assert pieces.sha256() == hashlib.sha256(data).hexdigest()
    start, end = sorted((min(start, len(data)), end))
    window, file = Window(pieces, start, end), io.BytesIO(data[start:end])
    for offset, whence in moves:
        where = min(max(0, {0: 0, 1: file.tell(), 2: len(file.getvalue())}[whence] + offset), len(file.getvalue()))
        assert window.seek(offset, whence) == file.seek(where) == window.tell()
        assert window.read(abs(offset)) == file.read(abs(offset)), "all that is asked for, over the pieces' borders"
    window.seek(0)
    assert window.read() == file.getvalue()
    assert window.read(1) == b""


def test_files_are_what_the_library_writes() -> None:
    """Of any order and layout in memory, with names that JSON escapes; and they hold no copy of the tensors."""
    tensors = examples.tensors() | {'ü"\\ \u2028\x7f\n': np.ones((4, 3), np.float32).T}
    tensors = dict(reversed(tensors.items()))
    files = encode(examples.CONFIG, tensors, examples.optimizer())
    contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    assert bytes(files[ADAPTER]) == safetensors.numpy.save(contiguous, {"format": "pt"})
    optimizer = bytes(files[OPTIMIZER])
    header = json.loads(optimizer[8 : 8 + int.from_bytes(optimizer[:8], "little")])
    assert optimizer == safetensors.numpy.save(safetensors.numpy.load(optimizer), header["__metadata__"])
    name = next(iter(examples.tensors()))
    tensors[name][0, 0] = 12345.0
    assert safetensors.numpy.load(bytes(files[ADAPTER]))[name][0, 0] == 12345.0
