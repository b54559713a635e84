"""Versions: exist with their manifest or not at all, and are read only as they were written."""

from __future__ import annotations

import hashlib
import json
import signal
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import example, given, settings
from hypothesis import strategies as st

from claas_store.errors import AlreadyExists, NotFound, TooLarge, VersionInvalid
from claas_store.fsck import Kind, fsck
from claas_store.limits import MAX_CONFIG_BYTES
from claas_store.stores import Store, open_store
from claas_store.uris import next_version_uri
from claas_store.version import (
    ADAPTER,
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    FileDigest,
    Manifest,
    Version,
    find_manifest,
    parse_adapter,
    parse_config,
    parse_optimizer,
    read_version,
    write_version,
)
from store import examples

CREATED = "2026-11-23T19:10:07Z"
HOSTILE = "<script>"  # in file contents: must never come back in a message


def write(uri: str) -> Version:
    return write_version(uri, examples.CONFIG, examples.tensors(), examples.optimizer(), examples.manifest())


def replace(uri: str, change: Callable[[bytes], bytes]) -> None:
    """What an attacker with the credential, or a rotten disk, could do."""
    store = open_store(uri)
    store.put(uri, change(store.get(uri)), if_absent=False)


def assert_same(left: Any, right: Any) -> None:
    assert left.keys() == right.keys()
    assert list(left) == sorted(left), "an order that changes from run to run would change sums over it"
    for name in left:
        assert left[name].dtype == np.float32
        np.testing.assert_array_equal(left[name], right[name], strict=True)


def test_round_trip(home: str) -> None:
    uri = f"{home}coder-v1"
    written, found = write(uri), read_version(uri)
    assert found.uri == written.uri == f"{uri}/"
    assert_same(found.tensors, examples.tensors())
    assert found.config == examples.CONFIG
    assert found.optimizer is not None
    assert (found.optimizer.step, found.optimizer.rank) == (3, 4)
    assert found.optimizer.target_modules == ("down_proj", "q_proj")
    assert_same(found.optimizer.exp_avg, examples.tensors(1))
    assert_same(found.optimizer.exp_avg_sq, examples.tensors(2))
    assert found.manifest == written.manifest == find_manifest(uri)
    assert found.manifest_sha256 == written.manifest_sha256
    assert found.manifest_sha256 == hashlib.sha256(open_store(uri).get(f"{uri}/{MANIFEST}")).hexdigest()


def test_the_manifest_says_where_the_version_comes_from(home: str) -> None:
    write(f"{home}coder")
    said = json.loads(open_store(home).get(f"{home}coder/{MANIFEST}"))
    assert said["schemaVersion"] == 1
    assert said["baseModel"] == examples.BASE
    assert said["parent"] == {"uri": examples.PARENT.uri, "sha256": examples.PARENT.sha256}
    assert (said["requestUid"], said["attempt"]) == (examples.UID, 1)
    assert said["training"]["learningRate"] == 1e-4
    assert said["metadata"]["totalLoss"] == 0.25
    assert said["teacher"] == {"id": "example/teacher", "mode": "Server"}
    assert said["templateId"] == "hindsight-1"
    assert said["codeVersion"]
    assert said["createdAt"].endswith("Z")
    for name in (CONFIG, ADAPTER, OPTIMIZER):
        data = open_store(home).get(f"{home}coder/{name}")
        assert said["files"][name] == {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}


def test_without_optimizer_state(home: str) -> None:
    write_version(f"{home}v", examples.CONFIG, examples.tensors(), None, examples.manifest())
    assert read_version(f"{home}v").optimizer is None
    assert f"{home}v/{OPTIMIZER}" not in dict(open_store(home).list(f"{home}v"))


def test_the_same_input_gives_the_same_bytes(home: str) -> None:
    """Whatever the memory layout of the arrays: a parent's digest must not depend on the machine that wrote it."""
    tensors = {name: np.asfortranarray(value.astype(">f4")) for name, value in reversed(examples.tensors().items())}
    first = write(f"{home}first")
    for number in range(8):
        uri = f"{home}{number}"
        again = write_version(uri, examples.CONFIG, tensors, examples.optimizer(), examples.manifest())
        assert again.manifest.files == first.manifest.files
    assert_same(read_version(uri).tensors, examples.tensors())


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, OPTIMIZER])
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
        lambda data: data[:-1],
        lambda data: data + b"\0",
        lambda data: b"",
    ],
    ids=["bit", "short", "long", "empty"],
)
def test_a_tampered_file_is_named(home: str, name: str, change: Callable[[bytes], bytes]) -> None:
    write(f"{home}v")
    replace(f"{home}v/{name}", change)
    with pytest.raises(VersionInvalid, match=name) as caught:
        read_version(f"{home}v")
    assert not caught.value.retryable


@pytest.mark.parametrize("name", [CONFIG, ADAPTER, OPTIMIZER])
def test_a_missing_file_is_named(home: str, name: str) -> None:
    write(f"{home}v")
    open_store(home).delete(f"{home}v/{name}")
    with pytest.raises(NotFound, match=name):
        read_version(f"{home}v")


@pytest.mark.parametrize(
    "text",
    [
        "", HOSTILE, "null", "[]", "{}", "[" * 100_000, '{"schemaVersion": 2, "baseModel": "a"}', '{"baseModel": 7}',
        json.dumps({"baseModel": "a", "files": {CONFIG: {"sha256": "0" * 64, "size": 1}}}),
        json.dumps({"baseModel": "a", "files": {"../secret": {"sha256": "0" * 64, "size": 1}}}),
        json.dumps({"baseModel": "a", "files": {f"f{n}": {"sha256": "0" * 64, "size": 1} for n in range(99)}}),
        json.dumps({"baseModel": "a", "files": {n: {"sha256": "0" * 64, "size": 2**32} for n in (CONFIG, ADAPTER)}}),
        json.dumps({"baseModel": "a", "files": {n: {"sha256": HOSTILE, "size": 1} for n in (CONFIG, ADAPTER)}}),
    ],
)  # fmt: skip
def test_a_hostile_manifest_is_refused(home: str, text: str) -> None:
    open_store(home).put(f"{home}v/{MANIFEST}", text.encode())
    for read in (read_version, find_manifest):
        with pytest.raises(VersionInvalid, match=r"claas\.json|adapter_config\.json") as caught:
            read(f"{home}v")
        assert HOSTILE not in str(caught.value)


def test_a_huge_manifest_is_not_read(home: str) -> None:
    open_store(home).put(f"{home}v/{MANIFEST}", b" " * 2**20 + b"{}")
    with pytest.raises(TooLarge):
        find_manifest(f"{home}v")


def test_a_later_releases_manifest_is_read(home: str) -> None:
    """Fields and files that we do not know are left alone; fsck, which reads piece by piece, verifies the files."""
    write(f"{home}v")
    extra = b"anything"
    open_store(home).put(f"{home}v/notes.txt", extra)

    def later(data: bytes) -> bytes:
        said = json.loads(data)
        said["quantisation"] = {"bits": 4}
        said["files"]["notes.txt"] = {"sha256": hashlib.sha256(extra).hexdigest(), "size": len(extra)}
        return json.dumps(said).encode()

    replace(f"{home}v/{MANIFEST}", later)
    assert "notes.txt" in read_version(f"{home}v").manifest.files
    replace(f"{home}v/notes.txt", lambda _: b"anythinG")
    assert read_version(f"{home}v").manifest.files.keys() >= {"notes.txt"}
    assert [finding.uri for finding in fsck(f"{home}v", everything=True).findings if finding.kind is Kind.BROKEN] == [
        f"{home}v/notes.txt"
    ]


def test_without_manifest_there_is_no_version(home: str) -> None:
    write(f"{home}v")
    open_store(home).delete(f"{home}v/{MANIFEST}")
    assert find_manifest(f"{home}v") is None
    with pytest.raises(NotFound, match="a version without a manifest does not exist"):
        read_version(f"{home}v")


def test_nothing_is_written_over(home: str) -> None:
    first = write(f"{home}v")
    with pytest.raises(AlreadyExists) as caught:
        write_version(f"{home}v", examples.CONFIG, examples.tensors(9), None, examples.manifest())
    assert caught.value.retryable
    assert read_version(f"{home}v").manifest == first.manifest


def test_of_eight_racing_writers_exactly_one_wins(home: str) -> None:
    start = threading.Barrier(8)

    def race(number: int) -> bool:
        start.wait(timeout=30)
        try:
            write_version(f"{home}v", examples.CONFIG, examples.tensors(number), None, examples.manifest(number + 1))
        except AlreadyExists:
            return False
        return True

    with ThreadPoolExecutor(8) as threads:
        won = [number for number, one in enumerate(threads.map(race, range(8))) if one]
    assert len(won) == 1
    found = read_version(f"{home}v")
    assert found.manifest.attempt == won[0] + 1
    assert_same(found.tensors, examples.tensors(won[0]))


@pytest.mark.parametrize("survivors", [0, 1, 2, 3])
def test_killed_in_between_is_invisible_and_the_next_attempt_works(home: str, survivors: int) -> None:
    """kill -9 when `survivors` of the four objects have been written."""
    first = next_version_uri(f"{home}coder/", CREATED, examples.UID, 1)
    code = f"""
import os, signal, threading
from claas_store import version
from store import examples
class Dying:
    def __init__(self, store):
        self.store, self.left, self.lock = store, {survivors}, threading.Lock()
    def put(self, *put):
        with self.lock:
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)
            self.left -= 1
            self.store.put(*put)
real = version.open_store
version.open_store = lambda uri: Dying(real(uri))
version.write_version({first!r}, examples.CONFIG, examples.tensors(), examples.optimizer(), examples.manifest())
"""
    done = subprocess.run([sys.executable, "-c", code], env=_environment(), timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert len(open_store(home).list(first)) == survivors
    assert find_manifest(first) is None
    with pytest.raises(NotFound):
        read_version(first)
    with pytest.raises(NotFound):
        read_version(first, adopt=True)  # a dead attempt's leftover is nobody's parent
    second = next_version_uri(f"{home}coder/", CREATED, examples.UID, 2)
    write(second)
    assert read_version(second).manifest.request_uid == examples.UID
    assert find_manifest(first) is None


def _environment() -> dict[str, str]:
    import os

    tests = str(Path(__file__).parent.parent)
    return {**os.environ, "PYTHONPATH": ":".join([tests, *(path for path in sys.path if path)])}


# Folders of other people


def foreign(uri: str, tensors: bytes | None = None, config: dict[str, Any] | None = None) -> None:
    store = open_store(uri)
    store.put(f"{uri}{CONFIG}", json.dumps(config or examples.CONFIG).encode())
    store.put(f"{uri}{ADAPTER}", safetensors.numpy.save(examples.tensors()) if tensors is None else tensors)


def test_an_adopted_folder_gets_a_manifest(home: str) -> None:
    foreign(f"{home}theirs/")
    open_store(home).put(f"{home}theirs/{OPTIMIZER}", b"not ours")  # not vouched for, so never read
    with pytest.raises(NotFound):
        read_version(f"{home}theirs/")
    adopted = read_version(f"{home}theirs", adopt=True)
    assert_same(adopted.tensors, examples.tensors())
    assert adopted.manifest.base_model == examples.BASE
    assert adopted.manifest.parent is None
    assert adopted.optimizer is None
    again = read_version(f"{home}theirs", adopt=True, base_model="another/name")
    assert again.manifest_sha256 == adopted.manifest_sha256, "a second adoption changes nothing"
    replace(f"{home}theirs/{ADAPTER}", lambda data: data[:-1] + b"x")
    with pytest.raises(VersionInvalid, match=ADAPTER):
        read_version(f"{home}theirs", adopt=True)


def test_racing_adopters_agree(home: str) -> None:
    foreign(f"{home}theirs/")
    with ThreadPoolExecutor(8) as threads:
        digests = {
            version.manifest_sha256
            for version in threads.map(lambda _: read_version(f"{home}theirs/", adopt=True), range(8))
        }
    assert len(digests) == 1


def test_pickled_adapters_are_not_read(home: str) -> None:
    open_store(home).put(f"{home}theirs/{CONFIG}", json.dumps(examples.CONFIG).encode())
    open_store(home).put(f"{home}theirs/adapter_model.bin", b"cos\nsystem\n(S'true'\ntR.")
    with pytest.raises(NotFound, match="pickled adapters are never read"):
        read_version(f"{home}theirs/", adopt=True)
    assert find_manifest(f"{home}theirs/") is None


def test_a_broken_folder_is_not_adopted(home: str) -> None:
    foreign(f"{home}theirs/", b"not safetensors")
    with pytest.raises(VersionInvalid, match=ADAPTER):
        read_version(f"{home}theirs/", adopt=True)
    assert find_manifest(f"{home}theirs/") is None


def test_a_huge_config_is_not_read(home: str) -> None:
    open_store(home).put(f"{home}theirs/{CONFIG}", b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(TooLarge, match=CONFIG):
        read_version(f"{home}theirs/", adopt=True)


# Formats


def raw(name: str, dtype: str, shape: list[int], data: bytes) -> bytes:
    header = json.dumps({name: {"dtype": dtype, "shape": shape, "data_offsets": [0, len(data)]}}).encode()
    return struct.pack("<Q", len(header)) + header + data


def test_half_precision_is_widened_without_loss() -> None:
    import torch
    from safetensors.torch import save

    values = torch.randn(7, 5, dtype=torch.float64) * 10.0 ** torch.arange(-3, 2, dtype=torch.float64)
    values[0, 0], values[1, 1] = 0.0, -0.0
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        data = save({"x": values.to(dtype)})
        found = parse_adapter(data, "uri")["x"]
        np.testing.assert_array_equal(found, values.to(dtype).float().numpy(), strict=True)


@pytest.mark.parametrize("dtype", ["F64", "I64", "BOOL", "U8"])
def test_other_types_are_refused(dtype: str) -> None:
    size = {"F64": 8, "I64": 8}.get(dtype, 1)
    with pytest.raises(VersionInvalid, match=f"type {dtype}"):
        parse_adapter(raw("x", dtype, [1], bytes(size)), "uri")


@settings(max_examples=400, deadline=None)
@given(st.binary(max_size=200))
@example(b"")
@example(struct.pack("<Q", 2**64 - 1) + b"{}")
@example(struct.pack("<Q", 2**40) + b"{}")
@example(struct.pack("<Q", 100_000) + b"[" * 100_000)
@example(raw("x", "F32", [2**62, 2**62], b""))
@example(raw("x", "F32", [2**63], b""))
@example(raw("x", "F32", [-1], bytes(4)))
@example(raw("x", "F32", [3], bytes(8)))
@example(raw("x", "F8_E4M3", [8], bytes(8)))
@example(raw("x", "F32", [2], bytes(8)) + b"trailing")
@example(struct.pack("<Q", 62) + b'{"x":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}        ' + bytes(8))
@example(raw("x", "F4", [1], bytes(1)))
def test_any_bytes_are_tensors_or_refused(data: bytes) -> None:
    for parse in (parse_adapter, parse_optimizer):
        try:
            parse(data, "uri")
        except VersionInvalid:
            continue
        assert parse is parse_adapter, "an optimizer file without our header was accepted"


@settings(max_examples=200, deadline=None)
@given(st.integers(0, 400), st.integers(0, 255))
def test_a_flipped_byte_is_tensors_or_refused(at: int, value: int) -> None:
    data = bytearray(safetensors.numpy.save(examples.tensors()))
    data[at] = value
    try:
        found = parse_adapter(bytes(data), "uri")
    except VersionInvalid:
        return
    assert all(array.dtype == np.float32 for array in found.values())


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"peft_type": "IA3"}, "peft_type"),
        ({"peft_type": None}, "peft_type"),
        ({"r": 0}, "r must"),
        ({"r": True}, "r must"),
        ({"r": 1e3}, "r must"),
        ({"r": 10**9}, "r must"),
        ({"lora_alpha": "32"}, "lora_alpha"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"target_modules": []}, "target_modules"),
        ({"target_modules": [1]}, "target_modules"),
        ({"target_modules": None}, "target_modules"),
    ],
)
def test_a_config_that_is_no_loras(change: dict[str, Any], named: str) -> None:
    with pytest.raises(VersionInvalid, match=f"{CONFIG}: {named}"):
        parse_config(json.dumps({**examples.CONFIG, **change}).encode(), "uri")


@pytest.mark.parametrize(
    ("tensors", "header", "said"),
    [
        ({"a.exp_avg": (2,)}, None, "differ"),
        ({"a.exp_avg": (2,), "a.exp_avg_sq": (3,)}, None, "differ"),
        ({"a.momentum": (2,)}, None, "neither"),
        ({"a.exp_avg": (2,), "a.exp_avg_sq": (2,)}, {}, "header"),
        ({"a.exp_avg": (2,), "a.exp_avg_sq": (2,)}, {"claas": "{}"}, "header"),
        ({"a.exp_avg": (2,), "a.exp_avg_sq": (2,)}, {"claas": '{"schemaVersion": 1, "step": -1}'}, "header"),
        (
            {"a.exp_avg": (2,), "a.exp_avg_sq": (2,)},
            {"claas": f'{{"schemaVersion": 1, "step": {10**400}, "rank": 2, "targetModules": ["a"]}}'},
            "header",
        ),
    ],
)
def test_optimizer_state_that_is_none(tensors: dict[str, Any], header: dict[str, str] | None, said: str) -> None:
    data = safetensors.numpy.save({name: np.zeros(shape, np.float32) for name, shape in tensors.items()}, header)
    with pytest.raises(VersionInvalid, match=f"{OPTIMIZER}.*{said}"):
        parse_optimizer(data, "uri")


def test_a_version_that_could_not_be_read_back_is_not_written(root: Path) -> None:
    store: Store = open_store(f"file://{root}/v")
    with pytest.raises(VersionInvalid, match="peft_type"):
        write_version(f"file://{root}/v", {"r": 4}, examples.tensors(), None, examples.manifest())
    assert list(store.list(f"file://{root}/v")) == []


def test_digests_are_checked_for_form() -> None:
    with pytest.raises(ValueError, match="sha256"):
        FileDigest(sha256="0" * 63, size=1)
    assert Manifest(base_model="a").attempt == 1
