"""What prompt logprobs take of a GPU beside the model: the constants of `claas_teacher.memory`, measured.

    python tests/bench/logprob_memory.py --out build/logprob-memory.json     a GPU and torch; seconds

The two forms are what vLLM's model runners do with the hidden states of scored tokens: V2 takes logits in bf16 for at
most 1,024 rows at a time, and top-k of them; V1 takes all rows of a request in the step, their log-softmax in fp32, and
top-k of that. Prints bytes an entry (row x vocabulary) at the allocator's peak, and the time.
"""

from __future__ import annotations

import record
import torch

HIDDEN, VOCABULARY, K = 5120, 152_064, 100
GIB = 1 << 30


def v2(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(rows, K) ids from logits in bf16."""
    return torch.topk(hidden @ head.T, K, dim=-1).indices


def v1(hidden: torch.Tensor, head: torch.Tensor) -> torch.Tensor:
    """(rows, K) ids from log-probabilities in fp32."""
    logits = hidden @ head.T
    return torch.topk(logits.log_softmax(dim=-1, dtype=torch.float32), K, dim=-1).indices


def main() -> None:
    """Measure both at the rows of one step."""
    options = record.parser(__doc__).parse_args()
    result = record.circumstances("logprob_memory", "torch") | {"vocabulary": VOCABULARY, "k": K, "steps": []}
    torch.manual_seed(0)
    head = torch.randn(VOCABULARY, HIDDEN, device="cuda", dtype=torch.bfloat16)
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, V {VOCABULARY}, K {K}")
    print("| runner | rows | peak, GiB | reserved, GiB | bytes an entry | ms |")
    print("|---|---|---|---|---|---|")
    for form in (v2, v1):
        for rows in (256, 512, 1024, 2048):
            hidden = torch.randn(rows, HIDDEN, device="cuda", dtype=torch.bfloat16)
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before, reserved = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
            form(hidden, head)
            torch.cuda.synchronize()
            peak = torch.cuda.max_memory_allocated() - before
            most = torch.cuda.max_memory_reserved() - reserved
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(5):
                form(hidden, head)
            end.record()
            torch.cuda.synchronize()
            entry_bytes, ms = max(peak, most) / (rows * VOCABULARY), start.elapsed_time(end) / 5
            one = {"runner": form.__name__, "rows": rows, "peak_bytes": peak, "reserved_bytes": most}
            result["steps"].append(one | {"entry_bytes": entry_bytes, "ms": ms})
            print(f"| {form.__name__} | {rows} | {peak / GIB:.2f} | {most / GIB:.2f} | {entry_bytes:.1f} | {ms:.1f} |")
    record.write(options.out, result)


if __name__ == "__main__":
    main()
