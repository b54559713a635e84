"""What the command fills in, and that it never overrides its user."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from claas_teacher.defaults import environment_defaults, flag_defaults, has_bf16, model_of, usable_cpus


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({"cpu.max": "200000 100000"}, 2),
        ({"cpu.max": "150000 100000"}, 1),
        ({"cpu.max": "50000 100000"}, 1),  # never none
        ({"cpu.max": "6400000 100000"}, 8),  # never more than the affinity
        ({"cpu.max": "max 100000"}, 8),
        ({"cpu/cpu.cfs_quota_us": "300000", "cpu/cpu.cfs_period_us": "100000"}, 3),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 8),
        ({}, 8),
    ],
)
def test_usable_cpus(files: dict[str, str], cpus: int, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(8, tmp_path) == cpus


@pytest.mark.parametrize(
    ("arguments", "model"),
    [
        (["--model", "/m", "--port", "1"], "/m"),
        (["--port", "1", "--model=org/name"], "org/name"),
        (["--served-model-name", "x"], None),
        (["--model"], None),
    ],
)
def test_model_of(arguments: list[str], model: str | None) -> None:
    assert model_of(arguments) == model


def test_an_empty_environment_keeps_everything_below_one_folder(tmp_path: Path) -> None:
    found = environment_defaults({"HOME": "/home/x"}, str(tmp_path), cpu=True, cpus=3)
    written = {name: value for name, value in found.items() if value.startswith("/")}
    assert written
    assert all(value.startswith("/home/x/.cache") for value in written.values())
    assert found["OMP_NUM_THREADS"] == "3"
    assert found["HF_HUB_OFFLINE"] == "1"  # the model is a folder
    assert found["VLLM_PLUGINS"] == "claas"


def test_what_the_user_set_stays() -> None:
    user = {
        "HOME": "/home/x",
        "CLAAS_CACHE_DIR": "/cache",
        "TRITON_CACHE_DIR": "/elsewhere",
        "OMP_NUM_THREADS": "7",
        "VLLM_PLUGINS": "theirs",
    }
    found = environment_defaults(user, "org/name", cpu=True, cpus=3)
    assert not {"TRITON_CACHE_DIR", "OMP_NUM_THREADS", "CLAAS_CACHE_DIR"} & found.keys()
    assert found["TORCHINDUCTOR_CACHE_DIR"].startswith("/cache/")
    assert found["VLLM_PLUGINS"] == "theirs,claas"  # joined: without ours there is no readiness
    assert "HF_HUB_OFFLINE" not in found  # the model comes from a hub


def test_a_gpu_server_is_not_told_about_processors() -> None:
    assert (
        not {"OMP_NUM_THREADS", "VLLM_ENABLE_V1_MULTIPROCESSING"}
        & environment_defaults({}, None, cpu=False, cpus=3).keys()
    )
    for_a_gpu = flag_defaults(False, "flags: avx2")
    assert "dtype" not in for_a_gpu and for_a_gpu["enforce_eager"]  # its graphs are for steps of a few tokens


@pytest.mark.parametrize(
    ("cpuinfo", "dtype"),
    [("flags : sse avx2 avx512f", "float32"), ("flags : avx2 avx512_bf16", None), ("flags : amx_bf16 amx_tile", None)],
)
def test_processors_without_bf16_get_float32(cpuinfo: str, dtype: str | None) -> None:
    assert has_bf16(cpuinfo) == (dtype is None)
    assert flag_defaults(True, cpuinfo).get("dtype") == dtype


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=60, env={**os.environ, **environment}, check=False
    )


def test_a_cache_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    done = run("-m", "claas_teacher", "--model", "x", CLAAS_CACHE_DIR=str(tmp_path / "file" / "below"))
    assert done.returncode == 1
    assert done.stderr.startswith("CLAAS_CACHE_DIR=")
    assert "writable" in done.stderr


def test_without_vllm_it_says_what_to_install() -> None:
    hide = "import sys; sys.modules['vllm'] = None; sys.argv[1:] = ['--help']; import runpy; import importlib.util as u"
    find = "real = u.find_spec; u.find_spec = lambda name, *rest: None if name == 'vllm' else real(name, *rest)"
    done = run("-c", f"{hide}; {find}; runpy.run_module('claas_teacher', run_name='__main__')")
    assert done.returncode == 1
    assert "requirements-cpu.txt" in done.stderr
    assert "Traceback" not in done.stderr
