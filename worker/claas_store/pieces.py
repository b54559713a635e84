"""Bytes that lie in several places: digested and sent from where they lie, never put together.

A version is hundreds of tensors; one copy of them into one string takes as long as an object store does to keep them.
"""

from __future__ import annotations

import bisect
import hashlib
import os
from collections.abc import Iterator, Sequence
from itertools import accumulate


class Pieces:
    """Args:
    views: of bytes, in their order; what they show must not change as long as this is in use.
    """

    def __init__(self, views: Sequence[bytes | memoryview]) -> None:
        self._views = [memoryview(view) for view in views if len(view)]
        self._ends = [*accumulate(len(view) for view in self._views)]

    @classmethod
    def of(cls, data: bytes | Pieces) -> Pieces:
        """`data`, as one piece if it is no pieces yet."""
        return data if isinstance(data, Pieces) else cls([data])

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __bytes__(self) -> bytes:
        return b"".join(self._views)

    def __iter__(self) -> Iterator[memoryview]:
        return iter(self._views)

    def between(self, start: int, end: int) -> Iterator[memoryview]:
        """The bytes from `start` to before `end`, piece by piece."""
        index = bisect.bisect_right(self._ends, start)
        while start < min(end, len(self)):
            view, after = self._views[index], self._ends[index]
            yield view[start - after :][: end - start]  # counted from its end
            start, index = after, index + 1

    def sha256(self) -> str:
        """In hex. Other threads run meanwhile."""
        digest = hashlib.sha256()
        for view in self._views:
            digest.update(view)
        return digest.hexdigest()


class Window:
    """Some of the bytes of `data`, as the binary file that boto3 reads, rewinds and measures: `read` gives no copy
    where one piece holds what is asked for.

    Args:
        start, end: of them, cut off at the end of `data`.
    """

    def __init__(self, data: Pieces, start: int, end: int) -> None:
        self._data, self._start, self._end = data, start, min(end, len(data))
        self._at = start

    def read(self, size: int = -1) -> bytes | memoryview:
        """As many as asked for, or all that are left: chunks that an upload is cut into may not be shorter."""
        end = self._end if size < 0 else min(self._end, self._at + size)
        found = [*self._data.between(self._at, end)]
        self._at = end
        return found[0] if len(found) == 1 else b"".join(found)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Where the next `read` begins, from the window's start, where it is, or the window's end."""
        base = {os.SEEK_SET: self._start, os.SEEK_CUR: self._at, os.SEEK_END: self._end}[whence]
        self._at = min(max(self._start, base + offset), self._end)
        return self.tell()

    def tell(self) -> int:
        """From the window's start."""
        return self._at - self._start
