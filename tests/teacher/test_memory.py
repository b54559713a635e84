"""The arithmetic of the memory that vLLM's own profiling does not see."""

from __future__ import annotations

import pytest

from claas_teacher.defaults import MAX_NUM_SEQS
from claas_teacher.memory import CONTEXT_BYTES, GIB, gpu_memory_utilization, scoring_bytes

QWEN = 152_064
A100, H100, H200 = (int(gib * GIB) for gib in (79.25, 79.11, 139.8))


def test_the_three_parts() -> None:
    assert scoring_bytes(1, 0, QWEN, 0) == 10 * QWEN + 24
    assert scoring_bytes(0, 1, QWEN, 100) == 24 * QWEN
    assert scoring_bytes(2048, MAX_NUM_SEQS, QWEN, 100) / GIB == pytest.approx(3.340, abs=0.005)


@pytest.mark.parametrize(("total", "share"), [(A100, 0.877), (80 * GIB, 0.878), (H100, 0.877), (H200, 0.93)])
def test_the_share_of_a_32b(total: int, share: float) -> None:
    assert gpu_memory_utilization(total, 2048, MAX_NUM_SEQS, QWEN, 100) == share


def test_the_whole_server_stays_within_74_gib_of_an_a100() -> None:
    for step in (512, 1024, 2048, 4096, 8192):
        for sequences in (1, 128, 1024):
            share = gpu_memory_utilization(A100, step, sequences, QWEN, 100)
            whole = share * A100 + CONTEXT_BYTES + scoring_bytes(step, sequences, QWEN, 100)
            assert 73.4 < whole / GIB < 73.6


def test_a_card_too_small_is_left_to_vllms_own_words() -> None:
    assert gpu_memory_utilization(4 * GIB, 2048, MAX_NUM_SEQS, QWEN, 100) == 0.05
