"""Creating adapters: no effect at first, the same bytes for the same uid, and nobody's work overwritten."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from claas_crds.adapter import Lora
from claas_store.collect import delete, destroy, tombstone
from claas_store.create import create_adapter, init_adapter, linear_shapes
from claas_store.errors import ArgumentInvalid, NotFound, Occupied, VersionCollected, VersionInvalid
from claas_store.stores import open_store
from claas_store.version import ADAPTER, CONFIG, MANIFEST, Version, find_manifest, read_version, write_version
from store import examples


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return examples.model_dir(tmp_path / "model")


def create(uri: str, model: Path, uid: str = examples.UID, lora: Lora = examples.LORA) -> Version:
    return create_adapter(uri, examples.BASE, model, lora, uid)


def test_a_fresh_adapter_has_the_models_shapes_and_no_effect(home: str, model: Path) -> None:
    version = create(f"{home}coder", model)
    assert read_version(f"{home}coder").manifest == version.manifest
    assert version.manifest.adapter_uid == examples.UID
    assert version.manifest.parent is None
    assert version.optimizer is None
    shapes = {name: value.shape for name, value in version.tensors.items()}
    assert shapes == {
        f"base_model.model.model.layers.{layer}.{module}.lora_{side}.weight": shape
        for layer in range(2)
        for module, side, shape in [
            ("self_attn.q_proj", "A", (4, 24)),
            ("self_attn.q_proj", "B", (16, 4)),
            ("mlp.down_proj", "A", (4, 40)),
            ("mlp.down_proj", "B", (24, 4)),
        ]
    }
    for name, value in version.tensors.items():
        if "lora_B" in name:
            assert not value.any()
            continue
        bound = 1 / np.sqrt(value.shape[1])
        assert np.abs(value).max() <= bound
        assert np.abs(value).max() > 0.9 * bound
        assert np.std(value) == pytest.approx(bound / np.sqrt(3), rel=0.2)
    different = [value for name, value in version.tensors.items() if "q_proj.lora_A" in name]
    assert not np.array_equal(*different), "every layer draws its own numbers"


def test_creation_is_idempotent(home: str, model: Path) -> None:
    first = create(f"{home}coder", model)
    again = create(f"{home}coder/", model)
    assert again.manifest_sha256 == first.manifest_sha256
    assert len(open_store(home).list(f"{home}coder")) == 3


def test_another_uid_draws_other_weights(home: str, model: Path) -> None:
    one, two = create(f"{home}a", model), create(f"{home}b", model, uid="other")
    assert one.manifest.files[ADAPTER] != two.manifest.files[ADAPTER]


def test_racing_creations_agree(home: str, model: Path) -> None:
    with ThreadPoolExecutor(8) as threads:
        digests = {v.manifest_sha256 for v in threads.map(lambda _: create(f"{home}coder", model), range(8))}
    assert len(digests) == 1


@pytest.mark.parametrize("survivors", [0, 1, 2])
def test_a_killed_creation_is_finished_by_the_next(home: str, model: Path, survivors: int) -> None:
    code = f"""
import os, pathlib, signal
from claas_store import create
from store import examples
real, left = create.open_store, [{survivors}]
class Dying:
    def __init__(self, store): self.store = store
    def get(self, *args, **more): return self.store.get(*args, **more)
    def put(self, *put):
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        self.store.put(*put)
create.open_store = lambda uri: Dying(real(uri))
create.create_adapter("{home}coder", examples.BASE, pathlib.Path({str(model)!r}), examples.LORA, examples.UID)
"""
    tests = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": ":".join([tests, *(path for path in sys.path if path)])}
    done = subprocess.run([sys.executable, "-c", code], env=environment, timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(open_store(home).list(f"{home}coder")) == survivors
    assert find_manifest(f"{home}coder") is None
    create(f"{home}coder", model)
    assert read_version(f"{home}coder").manifest.adapter_uid == examples.UID


def test_somebody_elses_version_stays(home: str, model: Path) -> None:
    theirs = create(f"{home}coder", model, uid="theirs")
    with pytest.raises(Occupied, match=r"set spec\.initFrom\.uri to .*coder/ .* or choose another") as caught:
        create(f"{home}coder", model)
    assert not caught.value.retryable
    assert read_version(f"{home}coder").manifest == theirs.manifest


@pytest.mark.parametrize("name", [CONFIG, ADAPTER])
def test_somebody_elses_files_stay(home: str, model: Path, name: str) -> None:
    open_store(home).put(f"{home}coder/{name}", b"{}")
    with pytest.raises(Occupied, match=r"spec\.initFrom\.uri"):
        create(f"{home}coder", model)
    assert open_store(home).get(f"{home}coder/{name}") == b"{}"
    assert find_manifest(f"{home}coder") is None


def test_another_shape_for_the_same_uid_is_no_leftover(home: str, model: Path) -> None:
    open_store(home).put(f"{home}coder/{CONFIG}", open_store(home).get(f"{create(f'{home}a', model).uri}{CONFIG}"))
    with pytest.raises(Occupied):
        create(f"{home}coder", model, lora=Lora(r=8, alpha=8, target_modules=["q_proj"]))


@pytest.mark.parametrize(
    ("targets", "said"),
    [
        (["q_proj", "w_pack", "out_proj"], "out_proj, w_pack match no linear layer"),
        (["proj"], "proj match no linear layer"),  # whole components only
        (["norm"], "norm match no linear layer"),
        (["embed_tokens"], "embed_tokens is an embedding"),
    ],
)
def test_targets_that_match_nothing_are_named(model: Path, targets: list[str], said: str) -> None:
    with pytest.raises(ArgumentInvalid, match=said):
        linear_shapes(model, targets)


def test_longer_names_pick_layers(model: Path) -> None:
    assert set(linear_shapes(model, ["layers.1.self_attn.q_proj"])) == {"model.layers.1.self_attn.q_proj"}


def test_experts_are_refused(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.experts.0.down_proj.weight"
    safetensors.numpy.save_file({name: np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ArgumentInvalid, match="mixture-of-experts"):
        linear_shapes(tmp_path, ["down_proj"])


@pytest.mark.parametrize("broken", ["empty", "missing", "file", "index"])
def test_no_model_there(tmp_path: Path, model: Path, broken: str) -> None:
    if broken == "empty":
        model = tmp_path / "none"
    elif broken == "missing":
        (model / "model-1.safetensors").unlink()
    elif broken == "file":
        (model / "model-1.safetensors").write_bytes(b"x")
    else:
        (model / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(ArgumentInvalid, match=str(model)):
        linear_shapes(model, ["q_proj"])


# spec.initFrom


def foreign(uri: str) -> None:
    open_store(uri).put(f"{uri}{CONFIG}", json.dumps(examples.CONFIG).encode())
    open_store(uri).put(f"{uri}{ADAPTER}", safetensors.numpy.save(examples.tensors()))


def init(uri: str, source: str, model: Path, lora: Lora = examples.LORA, base: str = examples.BASE) -> Version:
    return init_adapter(uri, base, model, source, lora, examples.UID)


def test_adopting_a_folder_where_it_lies(home: str, model: Path) -> None:
    foreign(f"{home}theirs/")
    adopted = init(f"{home}theirs", f"{home}theirs/", model)
    assert adopted.uri == f"{home}theirs/"
    assert init(f"{home}theirs", f"{home}theirs/", model).manifest_sha256 == adopted.manifest_sha256


def test_forking_takes_everything_along_and_names_its_origin(home: str, model: Path) -> None:
    source = write_version(
        f"{home}theirs", examples.CONFIG, examples.tensors(), examples.optimizer(), examples.manifest()
    )
    fork = init(f"{home}mine", f"{home}theirs", model)
    found = read_version(f"{home}mine")
    assert found.manifest.parent is not None
    assert found.manifest.parent.uri == f"{home}theirs/"
    assert found.manifest.parent.sha256 == source.manifest_sha256
    assert found.manifest.files == source.manifest.files
    assert found.optimizer is not None
    assert found.optimizer.step == 3
    assert init(f"{home}mine", f"{home}theirs", model).manifest_sha256 == fork.manifest_sha256
    assert read_version(f"{home}theirs").manifest == source.manifest


def test_forking_a_foreign_folder_leaves_it_as_it_is(home: str, model: Path) -> None:
    foreign(f"{home}theirs/")
    fork = init(f"{home}mine", f"{home}theirs", model)
    assert fork.tensors.keys() == examples.tensors().keys()
    for name, value in examples.tensors().items():
        np.testing.assert_array_equal(fork.tensors[name], value, strict=True)
    assert f"{home}theirs/{MANIFEST}" not in dict(open_store(home).list(f"{home}theirs"))


@pytest.mark.parametrize(
    ("lora", "base", "said"),
    [
        (Lora(r=8, alpha=8, target_modules=["q_proj", "down_proj"]), examples.BASE, "has r 4, alpha 8"),
        (Lora(r=4, alpha=16, target_modules=["q_proj", "down_proj"]), examples.BASE, "set spec.lora"),
        (Lora(r=4, alpha=8, target_modules=["q_proj"]), examples.BASE, "down_proj, q_proj"),
        (examples.LORA, "another/model", f"base model {examples.BASE}"),
    ],
)
def test_what_does_not_fit_is_not_taken_over(home: str, model: Path, lora: Lora, base: str, said: str) -> None:
    write_version(f"{home}theirs", examples.CONFIG, examples.tensors(), None, examples.manifest())
    with pytest.raises(VersionInvalid, match=said):
        init(f"{home}mine", f"{home}theirs", model, lora, base)
    assert list(open_store(home).list(f"{home}mine")) == []


def test_nothing_to_start_from(home: str, model: Path) -> None:
    with pytest.raises(NotFound):
        init(f"{home}mine", f"{home}nothing", model)
    with pytest.raises(NotFound):
        init(f"{home}mine", f"{home}mine", model)


def test_a_fork_does_not_overwrite(home: str, model: Path) -> None:
    write_version(f"{home}theirs", examples.CONFIG, examples.tensors(), None, examples.manifest())
    create(f"{home}mine", model)
    with pytest.raises(Occupied):
        init(f"{home}mine", f"{home}theirs", model)


def test_a_fork_is_whole_when_its_origin_is_gone(home: str, model: Path) -> None:
    """A create Job that was killed after its last write runs again; meanwhile the origin may have been deleted."""
    write_version(f"{home}theirs", examples.CONFIG, examples.tensors(), None, examples.manifest())
    fork = init(f"{home}mine", f"{home}theirs", model)
    destroy(f"{home}theirs")
    assert init(f"{home}mine", f"{home}theirs", model).manifest_sha256 == fork.manifest_sha256


def test_nothing_is_created_where_a_version_was_collected(home: str, model: Path) -> None:
    create(f"{home}coder", model)
    tombstone(f"{home}coder", ["coder"], "retention")
    delete(f"{home}coder", ["coder"])
    with pytest.raises(Occupied, match=r"was collected: choose another spec\.storage\.uri"):
        create(f"{home}coder", model)
    with pytest.raises(VersionCollected):
        init(f"{home}fork", f"{home}coder", model)


def test_the_output_layer_is_refused(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"lm_head.weight": np.zeros((4, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ArgumentInvalid, match="lm_head is the output layer"):
        linear_shapes(tmp_path, ["lm_head"])
