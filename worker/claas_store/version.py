"""A version: adapter_config.json, adapter_model.safetensors, optimizer.safetensors and, last, its manifest claas.json.

A version without a manifest does not exist: a writer that was killed in between leaves nothing that anyone can read.
One with a tombstone (`claas_store.tombstone`) is being collected, and readers refuse it.
The manifest holds the digest of every file, so what is read is what was written. Only safetensors is read; nothing is
ever unpickled.

`optimizer.safetensors` holds, for every parameter named as in the adapter file, `<parameter>.exp_avg` and
`<parameter>.exp_avg_sq` (float32, the parameter's shape), and in its header's metadata one key `claas`: JSON of
`{"schemaVersion": 1, "step": …, "rank": …, "targetModules": […]}`.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata as distributions
from itertools import accumulate, pairwise
from typing import Annotated, Any, Final, Literal

import numpy as np
import safetensors
from numpy.typing import NDArray
from pydantic import Field, JsonValue, StringConstraints, ValidationError

from claas_crds.model import StatusModel
from claas_crds.request import Metadata
from claas_store import uris
from claas_store.checks import ADAPTER, CONFIG, check_config, check_expressions, check_finite, shown
from claas_store.errors import AlreadyExists, NotFound, VersionInvalid
from claas_store.limits import (
    MAX_ADAPTER_BYTES,
    MAX_ALPHA,
    MAX_CONFIG_BYTES,
    MAX_FILES,
    MAX_HEADER_BYTES,
    MAX_MANIFEST_BYTES,
    MAX_OBJECT_BYTES,
    MAX_OPTIMIZER_BYTES,
    MAX_RANK,
    MAX_STEPS,
)
from claas_store.pieces import Pieces
from claas_store.stores import Store, open_store
from claas_store.tombstone import MANIFEST, read_tombstone, refuse_collected

OPTIMIZER: Final = "optimizer.safetensors"

_BOUNDS = {CONFIG: MAX_CONFIG_BYTES, ADAPTER: MAX_ADAPTER_BYTES, OPTIMIZER: MAX_OPTIMIZER_BYTES}
_HEADER_KEY = "claas"
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WIDTHS = {"F32": 4, "F16": 2, "BF16": 2}  # bytes
_MAX_DIMENSIONS = 8

Tensors = Mapping[str, NDArray[np.float32]]
Sha256 = Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
FileName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$")]


class FileDigest(StatusModel):
    """One file of a version."""

    sha256: Sha256
    size: int = Field(ge=0, le=MAX_OBJECT_BYTES, description="Bytes.")


class ParentVersion(StatusModel):
    """What a version was made from."""

    uri: str
    sha256: Sha256 = Field(description="Of the parent's manifest; of its adapter file when it had no manifest.")


class TeacherUsed(StatusModel):
    """Who taught."""

    id: str = ""
    mode: str = ""


class Manifest(StatusModel):
    """`claas.json`. `files` is filled in by `write_version`; fields of a later release are ignored."""

    schema_version: Literal[1] = 1
    base_model: str = Field(max_length=253)
    parent: ParentVersion | None = Field(None, description="Absent for an adapter's first version.")
    adapter_uid: str = Field(
        "",
        max_length=64,
        description="The LoraAdapter that it was made for; empty: a request that names none; absent: an early release.",
    )
    request_uid: str = Field("", max_length=64, description="Of a later one: the DistillRequest that made it.")
    attempt: int = Field(1, ge=1)
    files: dict[FileName, FileDigest] = Field(default_factory=dict, max_length=MAX_FILES)
    training: dict[str, JsonValue] = Field(default_factory=dict, description="spec.training as it was in effect.")
    metadata: Metadata | None = Field(None, description="The nine numbers and the extras.")
    teacher: TeacherUsed | None = None
    template_id: str = Field("", max_length=64)
    code_version: str = Field("", max_length=64)
    created_at: str = Field("", max_length=40, description="RFC 3339, UTC.")

    @property
    def says_for_whom(self) -> bool:
        """Whether it has an `adapterUid`, be it empty; manifests of an early release have none."""
        return "adapter_uid" in self.model_fields_set


@dataclass(frozen=True)
class OptimizerState:
    """AdamW's state by parameter name, which is the name in the adapter file."""

    step: int
    rank: int
    target_modules: tuple[str, ...]  # sorted
    exp_avg: Tensors
    exp_avg_sq: Tensors


@dataclass(frozen=True)
class Version:
    """A whole, verified version. Arrays may be read-only."""

    uri: str
    manifest: Manifest
    manifest_sha256: str
    config: dict[str, Any]
    tensors: Tensors
    optimizer: OptimizerState | None


def read_version(uri: str, *, adopt: bool = False, base_model: str = "", max_bytes: int = MAX_ADAPTER_BYTES) -> Version:
    """Reads a version and checks every byte of it against its manifest. Other files that it may list are not read.

    Args:
        adopt: a PEFT folder of somebody else's gets a manifest and is a version from then on. What a killed step left
            behind is never adopted.
        base_model: for the manifest of an adopted folder; by default what its config names.
        max_bytes: of the adapter file, and twice of its optimizer state; larger ones are not read. With the config,
            which has its own bound, that is all: at most 3 * max_bytes + MAX_CONFIG_BYTES.

    Raises:
        NotFound: no manifest (the version does not exist), or a listed file is missing.
        VersionCollected: it bears a tombstone, also after a little while.
        VersionInvalid: a digest, a size, a format; the message names the file.
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    store = open_store(uri)
    found = read_manifest(store, uri)
    if found is None:
        refuse_collected(store, uri)
        if not adopt:
            raise NotFound(f"{uri} is no version: it has no {MANIFEST} (a version without a manifest does not exist)")
        found = adopt_folder(uri, Manifest(base_model=base_model), _check_foreign, max_bytes=max_bytes)
    manifest, digest = found
    # Only what a version is made of: another name in a manifest is a later release's, or there to fill the memory.
    listed = {name: manifest.files[name] for name in _BOUNDS if name in manifest.files}
    for name, most in ((ADAPTER, max_bytes), (OPTIMIZER, 2 * max_bytes)):
        if name in listed and listed[name].size > most:
            raise VersionInvalid(f"{uri}: {name} has {listed[name].size} bytes, at most {most} are read here")
    with ThreadPoolExecutor(len(listed) + 1) as threads:
        dying = threads.submit(read_tombstone, store, uri)
        reads = {name: threads.submit(_read_file, store, uri, name, known) for name, known in listed.items()}
        try:
            files = {name: read.result() for name, read in reads.items()}
        except NotFound:
            refuse_collected(store, uri)  # deleted while it was read
            raise
        if dying.result():
            refuse_collected(store, uri)
    optimizer = parse_optimizer(files[OPTIMIZER], uri) if OPTIMIZER in files else None
    return Version(
        uri, manifest, digest, parse_config(files[CONFIG], uri), parse_adapter(files[ADAPTER], uri), optimizer
    )


def read_head(uri: str, config: Mapping[str, Any]) -> Version:
    """A version whose content is known already, without it: what shows that it still exists.

    Raises:
        NotFound, VersionCollected, VersionInvalid, UriInvalid, StorageUnavailable, StorageDenied: as `read_version`.
    """
    uri = uris.normalise(uri)
    store = open_store(uri)
    found = read_manifest(store, uri)
    if found is None or read_tombstone(store, uri):
        refuse_collected(store, uri)
    if found is None:
        raise NotFound(f"{uri} is no version: it has no {MANIFEST} (a version without a manifest does not exist)")
    return Version(uri, *found, dict(config), {}, None)


def read_peft_folder(uri: str, *, max_bytes: int = MAX_ADAPTER_BYTES) -> tuple[dict[str, Any], Tensors, str]:
    """(config, tensors, sha256 of the adapter file) of a PEFT folder, manifest or not; nothing is written.

    Args:
        max_bytes: of the adapter file; a larger one is not read.

    Raises:
        NotFound, VersionInvalid, UriInvalid, StorageUnavailable, StorageDenied: as `read_version`.
    """
    uri = uris.normalise(uri)
    config, adapter = _read_peft(open_store(uri), uri, max_bytes)
    return parse_config(config, uri), parse_adapter(adapter, uri), _sha256(adapter)


def read_config(uri: str) -> dict[str, Any]:
    """The config of a version or a PEFT folder, as it lies there: no digest is checked.

    Raises:
        NotFound, VersionInvalid, UriInvalid, StorageUnavailable, StorageDenied: as `read_version`.
    """
    uri = uris.normalise(uri)
    return parse_config(open_store(uri).get(uris.join(uri, CONFIG), max_bytes=MAX_CONFIG_BYTES), uri)


def adopt_folder(
    uri: str,
    manifest: Manifest,
    check: Callable[[str, dict[str, Any], Tensors], None],
    *,
    max_bytes: int = MAX_ADAPTER_BYTES,
) -> tuple[Manifest, str]:
    """Gives a PEFT folder its manifest, or reads the one that another adopter gave it first.

    Args:
        manifest: everything but `files`, `codeVersion` and `createdAt`; a base model that is empty is the config's.
        check: of uri, config and tensors; what it raises is raised before anything is written.
        max_bytes: of the adapter file; a larger one is not read.

    Raises:
        NotFound, VersionInvalid, UriInvalid, StorageUnavailable, StorageDenied: as `read_version`.
    """
    if uris.is_step_output(uri):
        raise NotFound(f"{uri} is what an unfinished step left behind: it has no {MANIFEST}")
    store = open_store(uri)
    files = dict(zip((CONFIG, ADAPTER), _read_peft(store, uri, max_bytes), strict=True))
    config = parse_config(files[CONFIG], uri)
    check(uri, config, parse_adapter(files[ADAPTER], uri))
    named = manifest.base_model or str(config.get("base_model_name_or_path") or "")
    try:
        digests = {name: digest_of(data) for name, data in files.items()}
        return put_manifest(store, uri, manifest.model_copy(update={"base_model": named[:253]}), digests)
    except AlreadyExists:
        found = read_manifest(store, uri)
        if found is None:
            raise
        return found


def find_manifest(uri: str) -> Manifest | None:
    """The manifest of the version at `uri`; None when the version does not exist.

    Raises:
        VersionInvalid: there is one, but it cannot be read.
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    found = read_manifest(open_store(uri), uri)
    return found[0] if found else None


def write_version(
    uri: str, config: Mapping[str, Any], tensors: Tensors, optimizer: OptimizerState | None, manifest: Manifest
) -> Version:
    """Writes a new version: its files, each only if absent, and last the manifest, which makes it exist.

    Args:
        tensors: LoRA weights by PEFT's names, `base_model.model.<module>.lora_A.weight` (r, in) and `lora_B` (out, r).
        manifest: everything but `files`, `codeVersion` and `createdAt`, which are filled in.

    Raises:
        AlreadyExists: an object lies there already. Nothing may be assumed about it: use the next attempt's uri.
        VersionInvalid: the config is no LoRA config, or a file exceeds its bound.
        UriInvalid, StorageUnavailable, StorageDenied: see `Store`.
    """
    uri = uris.normalise(uri)
    files = encode(config, tensors, optimizer)
    store = open_store(uri)
    # The small file is the claim on the folder: of several writers one goes on, instead of each owning a part of it.
    store.put(uris.join(uri, CONFIG), files[CONFIG])
    others = {name: data for name, data in files.items() if name != CONFIG}
    with ThreadPoolExecutor(2 * len(files)) as threads:
        digests = {name: threads.submit(digest_of, data) for name, data in files.items()}
        for put in [threads.submit(store.put, uris.join(uri, name), data) for name, data in others.items()]:
            put.result()
    written, digest = put_manifest(store, uri, manifest, {name: of.result() for name, of in digests.items()})
    return Version(uri, written, digest, dict(config), tensors, optimizer)


def encode(config: Mapping[str, Any], tensors: Tensors, optimizer: OptimizerState | None) -> dict[str, Pieces]:
    """The files of a version but its manifest; the same input gives the same bytes. What they hold of the tensors are
    views of these.

    Raises:
        VersionInvalid: as `write_version`.
    """
    data = _json(config)
    parse_config(data, "the new version")
    files = {CONFIG: Pieces([data]), ADAPTER: _safetensors(tensors, {"format": "pt"})}
    if optimizer is not None:
        header = _OptimizerHeader(
            schema_version=1, step=optimizer.step, rank=optimizer.rank, target_modules=[*optimizer.target_modules]
        ).model_dump_json(by_alias=True)
        moments = {f"{name}.exp_avg": value for name, value in optimizer.exp_avg.items()}
        moments |= {f"{name}.exp_avg_sq": value for name, value in optimizer.exp_avg_sq.items()}
        files[OPTIMIZER] = _safetensors(moments, {_HEADER_KEY: header})
    for name, pieces in files.items():
        if len(pieces) > _BOUNDS[name]:
            raise VersionInvalid(f"{name} would have {len(pieces)} bytes, at most {_BOUNDS[name]} can be kept")
    return files


def digest_of(data: bytes | Pieces) -> FileDigest:
    """What the manifest says of a file."""
    return FileDigest(sha256=Pieces.of(data).sha256(), size=len(data))


def put_manifest(store: Store, uri: str, manifest: Manifest, files: Mapping[str, FileDigest]) -> tuple[Manifest, str]:
    """Makes the version at `uri` exist; gives the manifest as written and the sha256 of its bytes.

    Raises:
        AlreadyExists: it exists.
    """
    filled = manifest.model_copy(update={"files": dict(files), "code_version": code_version(), "created_at": _now()})
    data = _json(filled.model_dump(by_alias=True, exclude_none=True, mode="json"))
    store.put(uris.join(uri, MANIFEST), data)
    return filled, _sha256(data)


def code_version() -> str:
    """Of this distribution; `unknown` in a bare checkout."""
    try:
        return distributions.version("claas")
    except distributions.PackageNotFoundError:
        return "unknown"


def parse_config(data: bytes, uri: str) -> dict[str, Any]:
    """`adapter_config.json` of a LoRA adapter.

    Raises:
        VersionInvalid: not JSON, not LoRA, or no rank, alpha or target modules.
    """
    config = _parse_json(data, f"{uri}: {CONFIG}")
    if config.get("peft_type") != "LORA":
        raise VersionInvalid(f"{uri}: {CONFIG}: peft_type must be LORA, is {shown(config.get('peft_type'), 'none')}")
    rank, alpha, targets = (config.get(key) for key in ("r", "lora_alpha", "target_modules"))
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= MAX_RANK:
        raise VersionInvalid(f"{uri}: {CONFIG}: r must be a whole number from 1 to {MAX_RANK}")
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not 0 < alpha <= MAX_ALPHA:
        raise VersionInvalid(f"{uri}: {CONFIG}: lora_alpha must be a number above 0, at most {MAX_ALPHA}")
    names = isinstance(targets, list) and targets and all(isinstance(target, str) and target for target in targets)
    if not names and not (isinstance(targets, str) and targets):
        raise VersionInvalid(f"{uri}: {CONFIG}: target_modules must be a list of names")
    check_expressions(f"{uri}: {CONFIG}", config)
    return config


def parse_adapter(data: bytes, uri: str) -> dict[str, NDArray[np.float32]]:
    """Weights as float32; bfloat16 and float16 widen without loss.

    Raises:
        VersionInvalid: not safetensors, or another type.
    """
    return _parse_safetensors(data, f"{uri}: {ADAPTER}")


def parse_optimizer(data: bytes, uri: str) -> OptimizerState:
    """The state that `encode` wrote.

    Raises:
        VersionInvalid: not safetensors, no header of ours, or moments that do not pair up.
    """
    what = f"{uri}: {OPTIMIZER}"
    moments: dict[str, dict[str, NDArray[np.float32]]] = {moment: {} for moment in _MOMENTS}
    for name, value in _parse_safetensors(data, what).items():
        parameter, _, moment = name.rpartition(".")
        if moment not in moments:
            raise VersionInvalid(f"{what}: a tensor is neither exp_avg nor exp_avg_sq")
        moments[moment][parameter] = value
    first, second = (moments[moment] for moment in _MOMENTS)
    if {name: value.shape for name, value in first.items()} != {name: value.shape for name, value in second.items()}:
        raise VersionInvalid(f"{what}: exp_avg and exp_avg_sq differ in names or shapes")
    try:
        state = _OptimizerHeader.model_validate_json(_check_header(data, what)["__metadata__"][_HEADER_KEY])
    except (KeyError, ValidationError):
        raise VersionInvalid(f"{what}: its header lacks step, rank or targetModules") from None
    return OptimizerState(state.step, state.rank, tuple(sorted(state.target_modules)), first, second)


class _OptimizerHeader(StatusModel):
    schema_version: Literal[1]
    step: int = Field(ge=0, le=MAX_STEPS)
    rank: int = Field(ge=1, le=MAX_RANK)
    target_modules: list[str]


def read_manifest(store: Store, uri: str) -> tuple[Manifest, str] | None:
    """(manifest, sha256 of its bytes), checked to be usable; None when there is none.

    Raises:
        VersionInvalid, StorageUnavailable, StorageDenied: as `find_manifest`.
    """
    try:
        data = store.get(uris.join(uri, MANIFEST), max_bytes=MAX_MANIFEST_BYTES)
    except NotFound:
        return None
    return parse_manifest(data, f"{uri}: {MANIFEST}")


def parse_manifest(data: bytes, what: str) -> tuple[Manifest, str]:
    """(manifest, sha256 of its bytes), checked to be usable.

    Raises:
        VersionInvalid: not JSON, or not of the schema; the message begins with `what`.
    """
    try:
        manifest = Manifest.model_validate(_parse_json(data, what))
    except ValidationError as error:
        fields = sorted({_field(problem["loc"]) for problem in error.errors()})
        raise VersionInvalid(f"{what} does not fit its schema: {', '.join(fields[:5])[:400]}") from None
    for name in (CONFIG, ADAPTER):
        if name not in manifest.files:
            raise VersionInvalid(f"{what} lists no {name}")
    for name, bound in _BOUNDS.items():
        if name in manifest.files and manifest.files[name].size > bound:
            raise VersionInvalid(f"{what}: {name} has {manifest.files[name].size} bytes, at most {bound} are read")
    return manifest, _sha256(data)


def _field(path: tuple[int | str, ...]) -> str:
    """Where in a manifest: the first two steps, of which the second may be a key that the file made up."""
    return ".".join(shown(str(part)) for part in path[:2]) or "."


def _read_file(store: Store, uri: str, name: str, known: FileDigest) -> bytes:
    data = store.get(uris.join(uri, name), max_bytes=known.size)
    if len(data) != known.size or _sha256(data) != known.sha256:
        raise VersionInvalid(f"{uri}: {name} is not what {MANIFEST} says (its sha256 differs)")
    return data


def _read_peft(store: Store, uri: str, max_bytes: int) -> tuple[bytes, bytes]:
    config = store.get(uris.join(uri, CONFIG), max_bytes=MAX_CONFIG_BYTES)
    try:
        return config, store.get(uris.join(uri, ADAPTER), max_bytes=max_bytes)
    except NotFound:
        raise NotFound(
            f"{uri} has no {ADAPTER} (pickled adapters are never read, such as adapter_model.bin: save as safetensors)"
        ) from None


def _check_foreign(uri: str, config: dict[str, Any], tensors: Tensors) -> None:
    """What can be known of a PEFT folder without its base model; whoever trains it checks key by key."""
    check_config(uri, config)
    check_finite(uri, tensors)


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False).encode() + b"\n"


def _parse_json(data: bytes, what: str) -> dict[str, Any]:

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):  # two readers would take two different ones
            twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
            raise VersionInvalid(f"{what}: {shown(twice)} appears twice")
        return value

    try:
        value = json.loads(data, object_pairs_hook=once, parse_float=_finite, parse_constant=_finite)
    except (ValueError, RecursionError):
        raise VersionInvalid(f"{what} is not JSON") from None
    if not isinstance(value, dict):
        raise VersionInvalid(f"{what} is not a JSON object")
    return value


def _finite(text: str) -> float:
    """JSON has no NaN and no infinity, and what we write has none; Python would read both, and 1e999."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def _safetensors(tensors: Tensors, metadata: Mapping[str, str]) -> Pieces:
    """What `safetensors.numpy.save` gives, to the byte. The library would copy every tensor twice, alone on one core:
    0.4 s for a 3B model's adapter and moments."""
    arrays = {name: np.ascontiguousarray(tensors[name], dtype="<f4") for name in sorted(tensors)}
    spans = pairwise(accumulate((array.nbytes for array in arrays.values()), initial=0))
    header: dict[str, Any] = {"__metadata__": metadata}
    for (name, array), span in zip(arrays.items(), spans, strict=True):
        header[name] = {"dtype": "F32", "shape": array.shape, "data_offsets": span}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the data is aligned
    views = [array.reshape(-1).view(np.uint8).data for array in arrays.values()]
    return Pieces([len(text).to_bytes(8, "little"), text, *views])


def _parse_safetensors(data: bytes, what: str) -> dict[str, NDArray[np.float32]]:
    _check_header(data, what)
    try:
        parts = safetensors.deserialize(data)  # type: ignore[no-untyped-call]
    except safetensors.SafetensorError:  # whose words may quote the file
        raise VersionInvalid(f"{what} is not a safetensors file") from None
    tensors = {}
    for name, part in sorted(parts, key=lambda part: part[0]):  # as it comes, the order is a hash table's
        match part["dtype"]:
            case "F32":
                array = np.frombuffer(part["data"], dtype="<f4")
            case "F16":
                array = np.frombuffer(part["data"], dtype="<f2").astype(np.float32)
            case _:  # BF16, the upper half of a float32; numpy has no such type
                array = (np.frombuffer(part["data"], dtype="<u2").astype(np.uint32) << 16).view(np.float32)
        tensors[name] = array.reshape(part["shape"])
    return tensors


def _check_header(data: bytes, what: str) -> dict[str, Any]:
    """The header of a safetensors file, checked before anything is made of it, so that a refusal can name the key.

    Raises:
        VersionInvalid: it claims more than there is, names a key twice, or a type, shape or offsets that cannot be.
    """
    size = int.from_bytes(data[:8], "little")
    if len(data) < 8 or size > len(data) - 8:
        raise VersionInvalid(f"{what} is not a safetensors file (a header of {size} bytes in a file of {len(data)})")
    if size > MAX_HEADER_BYTES:
        raise VersionInvalid(f"{what} has a header of {size} bytes, at most {MAX_HEADER_BYTES} are read")
    header = _parse_json(data[8 : 8 + size], f"{what}: its header")
    room = len(data) - 8 - size
    spans = []
    for name, info in header.items():
        if name == "__metadata__":
            continue
        at = f"{what}: {shown(name)}"
        match info:
            case {"dtype": str(dtype), "shape": [*shape], "data_offsets": [int(begin), int(end)]}:
                pass
            case _:
                raise VersionInvalid(f"{at} lacks a dtype, a shape or offsets")
        if dtype not in _WIDTHS:
            raise VersionInvalid(f"{at} has the type {shown(dtype)}; F32, F16 and BF16 are read")
        if len(shape) > _MAX_DIMENSIONS or not all(isinstance(n, int) and 0 <= n <= MAX_OBJECT_BYTES for n in shape):
            raise VersionInvalid(f"{at} has a shape that cannot be")
        if not 0 <= begin <= end <= room:
            raise VersionInvalid(f"{at} has offsets outside the file's {room} bytes of data")
        if (needed := math.prod(shape) * _WIDTHS[dtype]) != end - begin:
            raise VersionInvalid(f"{at} needs {needed} bytes by its shape and holds {end - begin} by its offsets")
        spans.append((begin, end, at))
    position = 0
    for begin, end, at in sorted(spans):
        if begin != position:
            raise VersionInvalid(f"{at} overlaps another tensor, or leaves a gap before it")
        position = end
    if position != room:
        raise VersionInvalid(f"{what} is not a safetensors file ({room - position} bytes of no tensor)")
    return header


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
