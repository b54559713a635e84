"""The base model's weights on their way to the device, while the libraries that build the model are still imported.

Those imports take seconds, of the interpreter alone; reading takes the disk, the bus and torch. So this module imports
no more than these.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"  # as in any Hugging Face folder
THREADS = 4  # one copies about 3 GB/s out of mapped pages


class Weights:
    """The safetensors of a folder, in bf16 on a GPU or fp32 on the CPU; threads read them from construction on.

    Args:
        device: `auto`, `cpu` or `cuda`.

    Raises:
        FileNotFoundError: no such folder.
    """

    def __init__(self, path: Path, device: str = "auto") -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"{path} is no folder: --model-path must name the base model's")
        self.path, self._wanted = path, device
        self._pool = ThreadPoolExecutor(1 + THREADS, "weights")
        self._device = self._pool.submit(self._start_device)
        self._tensors = self._pool.submit(self._read)

    @property
    def device(self) -> torch.device:
        """Where they are read to, ready for work."""
        return self._device.result()

    @property
    def dtype(self) -> torch.dtype:
        """Of all of them that are not whole numbers."""
        return torch.bfloat16 if self.device.type == "cuda" else torch.float32

    def take(self) -> dict[str, Tensor]:
        """All of them by name, once they are there; none, where the folder holds no such files. They are the caller's.

        Raises:
            OSError, safetensors.SafetensorError: a file cannot be read.
            torch.OutOfMemoryError: the device holds no such model.
        """
        try:
            return self._tensors.result()
        finally:
            del self._tensors
            self._pool.shutdown(wait=False)

    def _start_device(self) -> torch.device:
        wanted = self._wanted
        if wanted == "auto":
            wanted = "cuda" if torch.cuda.is_available() else "cpu"
        return torch.zeros(1, device=wanted).device

    def _read(self) -> dict[str, Tensor]:
        with ExitStack() as opened:
            work = [
                (file, name)
                for path in self._files()
                for file in [opened.enter_context(safe_open(path, framework="pt"))]
                for name in file.keys()  # noqa: SIM118 (it is no mapping)
            ]
            return dict(self._pool.map(lambda one: (one[1], self._moved(one[0].get_tensor(one[1]))), work))

    def _files(self) -> Iterator[Path]:
        if (single := self.path / SINGLE_FILE).is_file():
            yield single
        elif (index := self.path / INDEX_FILE).is_file():
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                yield self.path / name

    def _moved(self, mapped: Tensor) -> Tensor:
        """A copy: a file that somebody writes into must not change the model."""
        return mapped.to(self.device, self.dtype if mapped.is_floating_point() else mapped.dtype, copy=True)
