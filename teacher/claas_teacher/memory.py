"""How much of a GPU vLLM may take, so that scoring never runs out of what is left.

vLLM fills `gpu_memory_utilization` of the card with weights, the largest step's activations and the KV cache, and
measures that before the first request. What comes on top of it, each at most (tests/bench/logprob_memory.py measures
the first; LOG.md beside it has the numbers):

    T V 10 bytes     prompt logprobs of a step of T tokens over V ids in the V1 runner: logits in bf16, their copy and
                     their log-softmax in fp32; the V2 runner takes 1,024 rows at a time, and 2 bytes
    T (K+1) 24       ids, logprobs and ranks, on the card and in top-k's workspace
    S V 24 bytes     its sampler, warmed up with all features for S sequences after the KV cache is there
    0.6 GiB          the CUDA context, which its measurement begins with

so the share is (total - spare - those) / total. An A100-80GB shows 79.25 GiB; 2,048 tokens and 128 sequences of a 32B
(V = 152,064) leave 0.877 of it: 69.5 GiB for vLLM, and 73.4 GiB with all of the above.
"""

from __future__ import annotations

import math

GIB = 1 << 30
# An A100-80GB minus the 74 GiB that the server may use there: CUDA contexts of neighbours, monitoring, a debugger.
SPARE_BYTES = int(5.25 * GIB)
CONTEXT_BYTES = int(0.6 * GIB)
ALLOCATOR_BYTES = GIB // 2  # blocks of several hundred megabytes do not fit into each other's holes


def scoring_bytes(step_tokens: int, sequences: int, vocab_size: int, k: int) -> int:
    """Memory that one step's prompt logprobs and the sampler take beside what vLLM has measured."""
    return step_tokens * vocab_size * 10 + step_tokens * (k + 1) * 24 + sequences * vocab_size * 24


def gpu_memory_utilization(total_bytes: int, step_tokens: int, sequences: int, vocab_size: int, k: int) -> float:
    """vLLM's flag, in whole thousandths, rounded down; 0.05 at least, so that vLLM says itself what does not fit."""
    kept_free = SPARE_BYTES + CONTEXT_BYTES + ALLOCATOR_BYTES + scoring_bytes(step_tokens, sequences, vocab_size, k)
    return max(0.05, math.floor(1000 * (total_bytes - kept_free) / total_bytes) / 1000)
