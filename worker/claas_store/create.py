"""An adapter's first version: fresh with no effect, adopted where it lies, or forked from another adapter.

Needs neither torch nor the model's weights in memory: shapes come from the headers of the base model's safetensors
files. Fresh weights depend on the LoraAdapter's uid and a module's name alone, so a creation that was killed is
finished, byte by byte, by the next try.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

from claas_crds.adapter import Lora
from claas_store import uris
from claas_store.checks import ADAPTER, PREFIX, check_config, check_patterns, check_tensors, expected_shapes, shown
from claas_store.errors import AlreadyExists, ArgumentInvalid, NotFound, Occupied, VersionInvalid
from claas_store.limits import MAX_HEADER_BYTES
from claas_store.pieces import Pieces
from claas_store.stores import Store, open_store
from claas_store.tombstone import read_tombstone, refuse_collected
from claas_store.version import (
    Manifest,
    OptimizerState,
    ParentVersion,
    Tensors,
    Version,
    adopt_folder,
    digest_of,
    encode,
    find_manifest,
    put_manifest,
    read_config,
    read_peft_folder,
    read_version,
)

MAX_NAMES = 16  # of a file, in a message

_INDEX = "model.safetensors.index.json"
_EMBEDDINGS = ("embed_tokens", "wte", "wpe", "word_embeddings")
_HEADS = ("lm_head", "embed_out")


def create_adapter(uri: str, base_model_id: str, model_dir: Path, lora: Lora, adapter_uid: str) -> Version:
    """Writes a zero-effect LoRA adapter: A uniform as PEFT initialises it (kaiming, a = sqrt 5), B zero.

    Again for the same LoraAdapter it succeeds: it finds its version, or finishes what a killed try began.

    Args:
        base_model_id: hub id, kept in the config and the manifest.
        model_dir: the base model's folder: `config.json` and `*.safetensors`.
        adapter_uid: the LoraAdapter's, the seed of the weights.

    Raises:
        ArgumentInvalid: the folder holds no such model, or target modules match none of its layers.
        Occupied: something else lies at `uri`.
        UriInvalid, StorageUnavailable, StorageDenied, VersionInvalid: see `Store` and `read_version`.
    """
    uri = uris.normalise(uri)
    manifest = Manifest(base_model=base_model_id, adapter_uid=adapter_uid)
    shapes = linear_shapes(model_dir, lora.target_modules)
    largest = _largest_bytes(expected_shapes(shapes, lora.r))
    if version := _existing(uri, manifest, largest):
        return version
    config, tensors = peft_config(base_model_id, lora), fresh_tensors(shapes, lora.r, adapter_uid)
    return _write(uri, config, tensors, None, manifest, largest)


def init_adapter(
    uri: str, base_model_id: str, model_dir: Path, source_uri: str, lora: Lora, adapter_uid: str
) -> Version:
    """An adapter's first version from a PEFT folder or another adapter's version: adopted if it lies at `uri` itself,
    otherwise copied there, optimizer state included. Key by key it must be what `lora` makes of the base model.

    Again for the same LoraAdapter it succeeds, also when the source is gone by then.

    Raises:
        NotFound: nothing lies at `source_uri`.
        VersionCollected: it is collected.
        VersionInvalid: it is broken, or does not fit `lora` or the base model; the message names the field or the key.
        ArgumentInvalid: the folder holds no such model, or target modules match none of its layers.
        Occupied: something else lies at `uri`.
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri, source_uri = uris.normalise(uri), uris.normalise(source_uri)
    if uri != source_uri and _is_fork(find_manifest(uri), source_uri, adapter_uid):
        shapes = expected_shapes(linear_shapes(model_dir, lora.target_modules), lora.r)
        return read_version(uri, max_bytes=_largest_bytes(shapes))
    found = find_manifest(source_uri)
    if found is None:
        refuse_collected(open_store(source_uri), source_uri)
    _check_fits(source_uri, read_config(source_uri), found.base_model if found else "", base_model_id, lora)
    expected = expected_shapes(linear_shapes(model_dir, lora.target_modules), lora.r)
    largest = _largest_bytes(expected)
    if found and found.files[ADAPTER].size > largest:
        raise VersionInvalid(f"{source_uri}: {ADAPTER} has more than the {largest} bytes that spec.lora can need")

    def check(at: str, config: Mapping[str, Any], tensors: Tensors) -> None:
        check_config(at, config, base_model_id)
        check_tensors(at, tensors, expected)

    manifest = Manifest(base_model=base_model_id, adapter_uid=adapter_uid)
    if uri == source_uri:
        if found is None:
            adopt_folder(uri, manifest, check, max_bytes=largest)
        adopted = read_version(uri, max_bytes=largest)
        check(uri, adopted.config, adopted.tensors)
        return adopted
    optimizer: OptimizerState | None = None
    if found:
        source = read_version(source_uri, max_bytes=largest)
        config, tensors, optimizer, digest = source.config, source.tensors, source.optimizer, source.manifest_sha256
    else:
        config, tensors, digest = read_peft_folder(source_uri, max_bytes=largest)
    check(source_uri, config, tensors)
    manifest = manifest.model_copy(update={"parent": ParentVersion(uri=source_uri, sha256=digest)})
    return _existing(uri, manifest, largest) or _write(uri, config, tensors, optimizer, manifest, largest)


def peft_config(base_model_id: str, lora: Lora) -> dict[str, Any]:
    """`adapter_config.json`: the fields of PEFT's LoraConfig that every release since 0.10 knows, at its defaults."""
    return {
        "alpha_pattern": {},
        "auto_mapping": None,
        "base_model_name_or_path": base_model_id,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "layers_pattern": None,
        "layers_to_transform": None,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": lora.r,
        "rank_pattern": {},
        "revision": None,
        "target_modules": sorted(lora.target_modules),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }


def linear_shapes(model_dir: Path, target_modules: Sequence[str]) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear layer whose name is one of `target_modules` or ends in `.` and one.

    Raises:
        ArgumentInvalid: no readable model there, or a target that matches nothing that can be adapted.
    """
    shapes = {}
    matched = set()
    for name, shape in _weights(model_dir).items():
        module = name.removesuffix(".weight")
        targets = {target for target in target_modules if module == target or module.endswith(f".{target}")}
        if not targets or module == name or len(shape) != 2:
            continue
        if module.rpartition(".")[2] in _EMBEDDINGS:
            raise ArgumentInvalid(f"spec.lora.targetModules: {sorted(targets)[0]} is an embedding, not a linear layer")
        if module.rpartition(".")[2] in _HEADS:
            raise ArgumentInvalid(
                f"spec.lora.targetModules: {sorted(targets)[0]} is the output layer, not adapted here"
            )
        if ".experts." in module:
            raise ArgumentInvalid(f"spec.lora.targetModules: {sorted(targets)[0]} matches mixture-of-experts layers")
        shapes[module] = (shape[0], shape[1])
        matched |= targets
    if missing := sorted(set(target_modules) - matched):
        raise ArgumentInvalid(
            f"spec.lora.targetModules: {', '.join(missing)} match no linear layer of the base model;"
            " name last components of its layers, for example q_proj"
        )
    return shapes


def fresh_tensors(shapes: Mapping[str, tuple[int, int]], rank: int, seed: str) -> dict[str, NDArray[np.float32]]:
    """LoRA weights of no effect: A (rank, in) uniform in +-1/sqrt(in), B (out, rank) zero."""
    tensors = {}
    for module, (rows, columns) in shapes.items():
        generator = np.random.default_rng(int.from_bytes(hashlib.sha256(f"{seed}/{module}".encode()).digest()))
        # kaiming_uniform_(a=sqrt(5)): bound = sqrt(6 / ((1 + a^2) * fan_in)) = 1 / sqrt(fan_in)
        uniform = generator.random((rank, columns), dtype=np.float32)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = (2 * uniform - 1) / np.float32(np.sqrt(columns))
        tensors[f"{PREFIX}{module}.lora_B.weight"] = np.zeros((rows, rank), dtype=np.float32)
    return tensors


def _weights(model_dir: Path) -> dict[str, list[int]]:
    """Shape of every tensor of the model, from the headers of its files."""
    shapes: dict[str, list[int]] = {}
    try:
        if (model_dir / _INDEX).exists():
            files = sorted(
                {model_dir / name for name in json.loads((model_dir / _INDEX).read_text())["weight_map"].values()}
            )
        else:
            files = sorted(model_dir.glob("*.safetensors"))
        for file in files:
            with safe_open(file, framework="numpy") as tensors:
                shapes |= {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118 (no dict)
    except (OSError, SafetensorError, ValueError, KeyError) as error:
        raise ArgumentInvalid(f"the base model in {model_dir} cannot be read: {type(error).__name__}") from None
    if not shapes:
        raise ArgumentInvalid(f"{model_dir} holds no base model: it has no *.safetensors")
    return shapes


def _largest_bytes(expected: Mapping[str, tuple[int, int]]) -> int:
    """Of an adapter file with these weights, in fp32."""
    return sum(4 * rows * columns for rows, columns in expected.values()) + MAX_HEADER_BYTES


def _existing(uri: str, wanted: Manifest, largest: int) -> Version | None:
    """The version at `uri` if it is the wanted one; None if there is none.

    Args:
        largest: bytes of an adapter file that is read.

    Raises:
        Occupied: it is another's.
        VersionInvalid: it is broken, or claims to be larger.
    """
    found = find_manifest(uri)
    if found is None:
        if read_tombstone(open_store(uri), uri):
            raise Occupied(f"{uri} held a version that was collected: choose another spec.storage.uri")
        return None
    identity = (found.adapter_uid, found.base_model, found.parent, found.request_uid)
    if identity != (wanted.adapter_uid, wanted.base_model, wanted.parent, ""):
        raise Occupied(f"{uri} already holds another adapter's version: {_way_out(uri)}")
    return read_version(uri, max_bytes=largest)


def _is_fork(found: Manifest | None, source_uri: str, adapter_uid: str) -> bool:
    """Whether an earlier try of this adapter has taken that source over."""
    if found is None or found.parent is None or found.request_uid:
        return False
    return found.adapter_uid == adapter_uid and found.parent.uri == source_uri


def _write(
    uri: str,
    config: dict[str, Any],
    tensors: Tensors,
    optimizer: OptimizerState | None,
    manifest: Manifest,
    largest: int,
) -> Version:
    """`write_version` for a uri that all tries share: files that are there with just these bytes are a killed try's."""
    store = open_store(uri)
    files = encode(config, tensors, optimizer)
    for name, data in files.items():
        _put_same(store, uri, name, data)
    try:
        digests = {name: digest_of(data) for name, data in files.items()}
        written, digest = put_manifest(store, uri, manifest, digests)
    except AlreadyExists:  # another try of ours was faster, or somebody else's manifest appeared
        version = _existing(uri, manifest, largest)
        if version is None:
            raise
        return version
    return Version(uri, written, digest, config, tensors, optimizer)


def _put_same(store: Store, uri: str, name: str, data: Pieces) -> None:
    target = uris.join(uri, name)
    try:
        store.put(target, data)
    except AlreadyExists:
        try:
            same = store.get(target, max_bytes=len(data)) == bytes(data)
        except (NotFound, VersionInvalid):
            same = False
        if not same:
            raise Occupied(f"{target} already exists and is not this adapter's: {_way_out(uri)}") from None


def _way_out(uri: str) -> str:
    return f"set spec.initFrom.uri to {uri} to go on from what is there, or choose another spec.storage.uri"


def _check_fits(uri: str, config: dict[str, Any], base_model: str, wanted_base_model: str, lora: Lora) -> None:
    """What the LoraAdapter says of itself must be true of what it starts from."""
    check_patterns(uri, config)
    if base_model and base_model != wanted_base_model:
        named = shown(base_model, "with a name that cannot be shown")
        raise VersionInvalid(f"{uri} belongs to the base model {named}: set spec.baseModel to it")
    found = (config["r"], float(config["lora_alpha"]), sorted(config["target_modules"]))
    if found != (lora.r, lora.alpha, sorted(lora.target_modules)):
        targets = ", ".join(shown(target) for target in found[2][:MAX_NAMES])
        more = f" and {len(found[2]) - MAX_NAMES} more" if len(found[2]) > MAX_NAMES else ""
        what = f"r {found[0]}, alpha {found[1]:g} and targetModules {targets}{more}"
        raise VersionInvalid(f"{uri} has {what}: set spec.lora to these")
