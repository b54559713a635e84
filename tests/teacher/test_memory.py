"""The arithmetic of the memory that vLLM's own profiling does not see."""

from __future__ import annotations

import pytest

from claas_teacher.memory import GIB, gpu_memory_utilization, prompt_logprobs_bytes

QWEN = 152_064
A100, H100, H200 = (int(gib * GIB) for gib in (79.25, 79.11, 139.8))


def test_two_bytes_of_logits_and_four_of_their_softmax() -> None:
    assert prompt_logprobs_bytes(1, QWEN, 0) == 6 * QWEN + 24
    assert prompt_logprobs_bytes(2048, QWEN, 100) / GIB == pytest.approx(1.745, abs=0.005)


@pytest.mark.parametrize(("total", "share"), [(A100, 0.90), (80 * GIB, 0.90), (H100, 0.90), (H200, 0.94)])
def test_the_share_of_a_32b(total: int, share: float) -> None:
    assert gpu_memory_utilization(total, 2048, QWEN, 100) == share


def test_the_whole_server_stays_within_74_gib_of_an_a100() -> None:
    for step in (512, 1024, 2048, 4096, 8192):
        whole = gpu_memory_utilization(A100, step, QWEN, 100) * A100 + prompt_logprobs_bytes(step, QWEN, 100)
        assert 72 < whole / GIB < 74


def test_a_card_too_small_is_left_to_vllms_own_words() -> None:
    assert gpu_memory_utilization(4 * GIB, 2048, QWEN, 100) == 0.05
