"""Bounds on what is read, checked before the bytes are: a hostile object costs a refusal, not the memory."""

from __future__ import annotations

from typing import Final

MAX_CONFIG_BYTES: Final = 2**20
MAX_MANIFEST_BYTES: Final = 2**20
MAX_ADAPTER_BYTES: Final = 4 * 2**30  # rank 512 on every linear layer of a 3B model, in fp32
MAX_OPTIMIZER_BYTES: Final = 2 * MAX_ADAPTER_BYTES + 2**20  # two moments of every weight, and names
MAX_OBJECT_BYTES: Final = MAX_OPTIMIZER_BYTES
MAX_RANK: Final = 512
MAX_STEPS: Final = 10**12  # of an optimizer's state: a float's whole numbers, and more than anybody takes
MAX_ALPHA: Final = 1_000_000
MAX_FILES: Final = 16
MAX_HEADER_BYTES: Final = 8 * 2**20  # names, types and shapes of a safetensors file: 3B on every layer needs 0.1 MiB
MAX_TOMBSTONE_BYTES: Final = 4 * MAX_MANIFEST_BYTES  # it quotes the manifest
CHUNK_BYTES: Final = 2**20  # of what is read piece by piece
