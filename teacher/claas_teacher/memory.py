"""How much of a GPU vLLM may take, so that scoring never runs out of what is left.

vLLM fills `gpu_memory_utilization` of the card with weights, the largest step's activations and the KV cache, and
measures that before the first request. Prompt logprobs come on top. For a step of T scheduled tokens and V rows of the
vocabulary it holds at once, at most (V1 runner; the V2 runner chunks to 1,024 rows and makes no fp32 copy):

    T V 2 bytes   logits in bf16
    T V 4 bytes   their log-softmax in fp32
    T (K+1) 24    ids, logprobs and ranks, twice: on the card and in top-k's workspace

so the share is (total - spare - that) / total. 2,048 tokens of a 32B (V = 152,064) need 1.75 GiB; of an A100-80GB,
which shows 79.25 GiB, 0.90 is left: 71.3 GiB for vLLM and 73.1 GiB in all.
"""

from __future__ import annotations

import math

GIB = 1 << 30
# An A100-80GB minus the 74 GiB that the server may use there: CUDA contexts of neighbours, monitoring, a debugger.
SPARE_BYTES = int(5.25 * GIB)
ALLOCATOR_BYTES = GIB // 2  # blocks of several hundred megabytes do not fit into each other's holes


def prompt_logprobs_bytes(step_tokens: int, vocab_size: int, k: int) -> int:
    """Memory that prompt logprobs of one step take beside what vLLM has measured."""
    return step_tokens * vocab_size * (2 + 4) + step_tokens * (k + 1) * 24


def gpu_memory_utilization(total_bytes: int, step_tokens: int, vocab_size: int, k: int) -> float:
    """vLLM's flag, in whole hundredths, rounded down; 0.05 at least, so that vLLM says itself what does not fit."""
    kept_free = SPARE_BYTES + ALLOCATOR_BYTES + prompt_logprobs_bytes(step_tokens, vocab_size, k)
    return max(0.05, math.floor(100 * (total_bytes - kept_free) / total_bytes) / 100)
