"""`python -m claas_teacher [MODEL] [vLLM flags]`: vLLM's OpenAI server with our routes.

Every flag is vLLM's own; `defaults` fills in what the user left open. The server is the one of
`vllm.entrypoints.openai.api_server`, in this process, wherever the installed version keeps it.
"""

from __future__ import annotations

import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path

from claas_teacher.defaults import (
    CPU_KV_CACHE_GIB,
    PLUGIN,
    environment_defaults,
    flag_defaults,
    is_cpu_build,
    model_of,
    usable_cpus,
    vocabulary_of,
)
from claas_teacher.memory import gpu_memory_utilization


def main(arguments: Sequence[str]) -> None:
    """Serve until told to stop.

    Raises:
        SystemExit: with a sentence, when vLLM or our plugin is not installed or the cache cannot be written.
    """
    words = list(arguments)
    if words and not words[0].startswith("-"):
        words.insert(0, "--model")
    if find_spec("vllm") is None:
        sys.exit(
            "vLLM is not installed: teacher/requirements.txt is for GPUs, teacher/requirements-cpu.txt for processors"
        )
    if not metadata.entry_points(group="vllm.endpoint_plugins", name=PLUGIN):
        sys.exit(
            "the distribution `claas` is not installed beside vLLM (no entry point claas in vllm.endpoint_plugins)"
        )
    cpu = is_cpu_build(os.environ)
    cpus = usable_cpus(len(os.sched_getaffinity(0)))
    os.environ.update(environment_defaults(os.environ, model_of(words), cpu, cpus))
    _require_writable(Path(os.environ["CLAAS_CACHE_DIR"]))
    _serve(words, cpu)


def _require_writable(cache: Path) -> None:
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except OSError as error:
        sys.exit(
            f"CLAAS_CACHE_DIR={cache} cannot be written ({error.strerror}): point it at a writable folder or volume"
        )


def _serve(words: list[str], cpu: bool) -> None:
    """vLLM's own `main`, but for the defaults. Only now is vLLM imported: it reads the environment as it loads."""
    import uvloop
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    try:
        from vllm.entrypoints.launchers.api_server.entry import run_server
        from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    except ModuleNotFoundError:  # vLLM 0.26
        from vllm.entrypoints.openai.api_server import run_server
        from vllm.entrypoints.openai.cli_args import make_arg_parser, validate_parsed_serve_args

    cli_env_setup()
    parser = make_arg_parser(FlexibleArgumentParser(prog="python -m claas_teacher", description=__doc__))
    parser.set_defaults(**flag_defaults(cpu, Path("/proc/cpuinfo").read_text()))
    if not cpu:
        parser.set_defaults(gpu_memory_utilization=None)
    options = parser.parse_args(words)
    if not cpu and options.gpu_memory_utilization is None:
        options.gpu_memory_utilization = _memory_share(options)
    if cpu and getattr(options, "kv_cache_memory_bytes", None) is None:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", str(CPU_KV_CACHE_GIB))  # it would win over the flag
    try:
        from vllm.logger import configure_logging_from_args
    except ImportError:  # vLLM 0.26: the environment alone configures logging
        pass
    else:
        configure_logging_from_args(options)
    validate_parsed_serve_args(options)
    uvloop.run(run_server(options))


def _memory_share(options: Namespace) -> float:
    """`--gpu-memory-utilization` where the user left it open; asks the driver, and starts no CUDA."""
    from vllm.platforms import current_platform

    share = gpu_memory_utilization(
        current_platform.get_device_total_memory(),
        options.max_num_batched_tokens,
        options.max_num_seqs,
        vocabulary_of(options.model),
        options.max_logprobs,
    )
    print(f"claas_teacher: --gpu-memory-utilization {share:.3f}, the rest is for prompt logprobs", file=sys.stderr)
    return share


if __name__ == "__main__":
    main(sys.argv[1:])
