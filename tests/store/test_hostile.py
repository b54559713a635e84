"""Adapters from elsewhere, made to hurt: each is refused before anything is made of it, by a message that names why."""

from __future__ import annotations

import hashlib
import json
import re
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from claas_crds.adapter import Lora
from claas_crds.reasons import Reason
from claas_store.collect import delete, destroy, restore, sweep, tombstone
from claas_store.create import create_adapter, init_adapter
from claas_store.errors import StoreError, TooLarge, VersionInvalid
from claas_store.fsck import fsck
from claas_store.limits import MAX_HEADER_BYTES
from claas_store.stores import open_store
from claas_store.tombstone import TOMBSTONE, VERDICT
from claas_store.version import (
    ADAPTER,
    CONFIG,
    MANIFEST,
    OPTIMIZER,
    Manifest,
    ParentVersion,
    Version,
    find_manifest,
    parse_adapter,
    parse_config,
    read_config,
    read_version,
    write_version,
)
from store import examples
from store.chains import first

KEY = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"  # (4, 24)
OTHER = "base_model.model.model.layers.0.mlp.down_proj.lora_B.weight"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return examples.model_dir(tmp_path / "model")


def put(uri: str, config: bytes | dict[str, Any] = examples.CONFIG, adapter: bytes | None = None) -> None:
    """Somebody's PEFT folder."""
    data = config if isinstance(config, bytes) else json.dumps(config).encode()
    open_store(uri).put(f"{uri}{CONFIG}", data)
    open_store(uri).put(f"{uri}{ADAPTER}", safetensors.numpy.save(examples.tensors()) if adapter is None else adapter)


def init(uri: str, source: str, model: Path, lora: Lora = examples.LORA) -> Version:
    return init_adapter(uri, examples.BASE, model, source, lora, examples.UID)


def assert_refused(home: str, model: Path, said: str, lora: Lora = examples.LORA) -> None:
    """Neither adopted where it lies nor copied, and nothing is left of the tries."""
    before = [*open_store(home).list(home)]
    for uri in (f"{home}theirs", f"{home}mine"):
        with pytest.raises(StoreError, match=said) as caught:
            init(uri, f"{home}theirs", model, lora)
        assert caught.value.reason is Reason.ADAPTER_INVALID
        assert not caught.value.retryable
    assert [*open_store(home).list(home)] == before


def test_a_healthy_one_is_taken(home: str, model: Path) -> None:
    put(f"{home}theirs/")
    assert init(f"{home}mine", f"{home}theirs", model).manifest.adapter_uid == examples.UID
    assert init(f"{home}theirs", f"{home}theirs", model).manifest.adapter_uid == examples.UID


def test_a_pickle_is_never_read(home: str, model: Path) -> None:
    open_store(home).put(f"{home}theirs/{CONFIG}", json.dumps(examples.CONFIG).encode())
    open_store(home).put(f"{home}theirs/adapter_model.bin", b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert_refused(home, model, r"adapter_model\.bin")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"base_model_name_or_path": "another/model"}, "base_model_name_or_path is another model another/model"),
        ({"base_model_name_or_path": "gpt2"}, "base_model_name_or_path is another model gpt2"),
        ({"base_model_name_or_path": ["x"]}, "base_model_name_or_path"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"use_dora": True}, "use_dora"),
        ({"rank_pattern": {"q_proj": 8}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 8}}, "alpha_pattern"),
        ({"layers_to_transform": [0]}, "layers_to_transform"),
        ({"layers_pattern": "layers"}, "layers_pattern"),
        ({"exclude_modules": ["down_proj"]}, "exclude_modules"),
        ({"target_modules": ".*_proj"}, "target_modules"),
        ({"bias": "all"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"layer_replication": [[0, 2]]}, "layer_replication"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"target_parameters": ["mlp.experts"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights"),
        ({"megatron_config": {"a": 1}}, "megatron_config"),
        ({"task_type": "SEQ_CLS"}, "task_type"),
        ({"auto_mapping": {"parent_library": "os", "base_model_class": "system"}}, "auto_mapping"),
        ({"auto_mapping": {"parent_library": "transformers.models", "x": [[[]]]}}, "auto_mapping"),
        ({"lora_dropout": [[0.1]]}, "lora_dropout"),
        ({"lora_alpha": 10**400}, "lora_alpha"),
        ({"a_field_of_tomorrow": 1}, "a_field_of_tomorrow"),
        ({"<script>": 1}, "a key that is no name"),
        ({"peft_type": "IA3"}, "peft_type"),
        ({"r": 8}, "has r 8"),
        ({"r": 10**6}, "r must be"),
        ({"lora_alpha": 16}, "alpha 16"),
        ({"target_modules": ["q_proj"]}, "targetModules q_proj"),
    ],
)  # fmt: skip
def test_a_field_that_would_mean_something_else_is_named(
    home: str, model: Path, change: dict[str, Any], said: str
) -> None:
    put(f"{home}theirs/", {**examples.CONFIG, **change})
    assert_refused(home, model, said)


@pytest.mark.parametrize(
    "change",
    [
        {"use_rslora": True},  # the worker, PEFT and vLLM all scale by it, and the config stays with every version
        {"base_model_name_or_path": "/data/models/tiny"},
        {"base_model_name_or_path": "./tiny"},
        {"base_model_name_or_path": None},
        {"auto_mapping": {"parent_library": "transformers.models.qwen2.modeling_qwen2", "base_model_class": "Qwen2"}},
        {"peft_version": "0.99", "megatron_core": "megatron.core", "qalora_group_size": 16, "loftq_config": {}},
        {"task_type": None, "lora_dropout": 0.1, "inference_mode": False},
    ],
)
def test_what_changes_nothing_or_is_understood_is_taken(home: str, model: Path, change: dict[str, Any]) -> None:
    put(f"{home}theirs/", {**examples.CONFIG, **change})
    assert init(f"{home}mine", f"{home}theirs", model).config == {**examples.CONFIG, **change}


def without(key: str) -> dict[str, Any]:
    return {name: value for name, value in examples.tensors().items() if name != key}


def changed(key: str, value: Any) -> dict[str, Any]:
    return {**examples.tensors(), key: value}


def infected(value: float) -> dict[str, Any]:
    weights = examples.tensors()
    weights[KEY][3, 23] = value
    return weights


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (without(KEY), f"lacks {KEY}"),
        ({}, "lacks base_model.* and 7 more"),
        (changed("base_model.model.lm_head.lora_A.weight", np.zeros((4, 4), np.float32)), "lm_head.lora_A"),
        (changed("base_model.model.model.layers.7.self_attn.q_proj.lora_A.weight", np.zeros((4, 24), np.float32)), "7"),
        (changed("base_model.model.model.embed_tokens.lora_embedding_A", np.zeros((4, 32), np.float32)), "embedding_A"),
        (changed("<script>", np.zeros(1, np.float32)), "a key that is no name"),
        (changed(KEY, np.zeros((4, 25), np.float32)), rf"{KEY} has the shape \(4, 25\)"),
        (changed(KEY, np.zeros((24, 4), np.float32)), rf"{KEY} has the shape \(24, 4\)"),
        (
            changed(KEY, np.zeros((8, 24), np.float32)),
            rf"{KEY} has the shape \(8, 24\), the base model needs \(4, 24\)",
        ),
        (changed(KEY, np.zeros((4, 24, 1), np.float32)), f"{KEY} has the shape"),
        (changed(KEY, np.zeros(96, np.float32)), f"{KEY} has the shape"),
        (changed(KEY, np.zeros((0, 24), np.float32)), f"{KEY} has the shape"),
        (infected(np.nan), f"{KEY} holds values that are not finite"),
        (infected(np.inf), f"{KEY} holds values that are not finite"),
        (infected(-np.inf), f"{KEY} holds values that are not finite"),
        (changed(KEY, np.full((4, 24), 1e6, np.float16)), f"{KEY} holds values that are not finite"),
        (changed(KEY, np.zeros((4, 24), np.float64)), f"{KEY} has the type F64"),
        (changed(KEY, np.zeros((4, 24), np.int64)), f"{KEY} has the type I64"),
    ],
)
def test_a_wrong_key_is_named(home: str, model: Path, weights: dict[str, Any], said: str) -> None:
    put(f"{home}theirs/", adapter=safetensors.numpy.save(weights))
    assert_refused(home, model, said)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
def test_a_bfloat16_that_is_not_finite_is_named(home: str, model: Path, bits: int) -> None:
    import torch
    from safetensors.torch import save

    weights = {name: torch.from_numpy(value).to(torch.bfloat16) for name, value in examples.tensors().items()}
    put(f"{home}fine/", adapter=save(weights))
    assert init(f"{home}copy", f"{home}fine", model)
    weights[KEY].view(torch.uint16)[3, 23] = bits
    put(f"{home}theirs/", adapter=save(weights))
    assert_refused(home, model, f"{KEY} holds values that are not finite")


def raw(header: str | dict[str, Any], data: bytes = b"", size: int | None = None) -> bytes:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return struct.pack("<Q", len(text) if size is None else size) + text + data


def entry(begin: int, end: int, shape: list[Any] | None = None, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": [(end - begin) // 4] if shape is None else shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (raw("{}", size=10 * 10**9), "a header of 10000000000 bytes in a file of 10"),
        (raw("{}", size=2**64 - 1), "a header of 18446744073709551615 bytes"),
        (raw(" " * (MAX_HEADER_BYTES + 1)), "has a header of"),
        (raw("[" * 100_000), "not JSON"),
        (raw('{"a":' * 100_000 + "1" + "}" * 100_000), "not JSON"),
        (raw("[]"), "not a JSON object"),
        (raw(f'{{"{KEY}": 1, "{OTHER}": 2, "{KEY}": 3}}'), f"{KEY} appears twice"),
        (raw({KEY: entry(0, 8), OTHER: entry(4, 12)}, bytes(12)), "overlaps another"),
        (raw({KEY: entry(0, 8), OTHER: entry(0, 8)}, bytes(8)), "overlaps another"),
        (raw({KEY: entry(4, 8)}, bytes(8)), f"{KEY} overlaps another tensor, or leaves a gap"),
        (raw({KEY: entry(0, 4 * 10**9)}, bytes(8)), f"{KEY} has offsets outside the file's 8 bytes"),
        (raw({KEY: entry(8, 0, [0])}, bytes(8)), f"{KEY} has offsets outside"),
        (raw({KEY: entry(-8, 0)}, bytes(8)), f"{KEY} has offsets outside"),
        (raw({KEY: entry(0, 8, [2**40, 2**40])}, bytes(8)), f"{KEY} has a shape that cannot be"),
        (raw({KEY: entry(0, 8, [2**31, 2])}, bytes(8)), f"{KEY} needs 17179869184 bytes by its shape and holds 8"),
        (raw({KEY: entry(0, 8, [-1, -2])}, bytes(8)), f"{KEY} has a shape that cannot be"),
        (raw({KEY: entry(0, 8, [2.0])}, bytes(8)), f"{KEY} has a shape that cannot be"),
        (raw({KEY: entry(0, 8, [1] * 100_000 + [2])}, bytes(8)), f"{KEY} has a shape that cannot be"),
        (raw({KEY: entry(0, 8, dtype="F8_E4M3")}, bytes(8)), f"{KEY} has the type F8_E4M3"),
        (raw({KEY: {"dtype": "F32"}}, bytes(8)), f"{KEY} lacks a dtype, a shape or offsets"),
        (raw({KEY: entry(0, 8)}, bytes(9)), "1 bytes of no tensor"),
        (raw({KEY: entry(0, 8), "__metadata__": {"format": 1}}, bytes(8)), "not a safetensors file"),
        (b"", "a header of 0 bytes"),
        (b"PK\x03\x04" + bytes(100), "not a safetensors file|a header of"),
        (b"\x80\x04\x95" + bytes(100), "not a safetensors file|a header of"),
    ],
)
def test_a_file_that_lies_about_itself_is_refused_without_its_memory(data: bytes, said: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(VersionInvalid, match=said):
            parse_adapter(data, "uri")
        assert tracemalloc.get_traced_memory()[1] < 20 * len(data) + 2**20
    finally:
        tracemalloc.stop()


def test_a_file_larger_than_the_base_model_allows_is_not_read(root: Path, model: Path) -> None:
    home = f"file://{root}/"
    put(f"{home}theirs/", adapter=b"")
    with (root / "theirs" / ADAPTER).open("wb") as file:
        file.truncate(3 * 2**30)  # sparse: it takes no room here, and would in memory
    tracemalloc.start()
    assert_refused(home, model, "has 3221225472 bytes, at most")
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


def test_a_version_that_claims_too_much_is_not_copied(root: Path, model: Path) -> None:
    home = f"file://{root}/"
    put(f"{home}theirs/")
    said = {"baseModel": examples.BASE, "files": {n: {"sha256": "0" * 64, "size": 2**31} for n in (CONFIG, ADAPTER)}}
    said["files"][CONFIG]["size"] = 10  # type: ignore[index]
    open_store(home).put(f"{home}theirs/{MANIFEST}", json.dumps(said).encode())
    assert_refused(home, model, "more than the")


HUGE = 10 * 2**30


def swell(root: Path, *path: str) -> None:
    """10 GB under an object's name; sparse: they take no room here, and would in memory."""
    with root.joinpath(*path).open("wb") as file:
        file.truncate(HUGE)


@pytest.mark.parametrize("name", [MANIFEST, TOMBSTONE, VERDICT, CONFIG, ADAPTER, OPTIMIZER])
def test_ten_gigabytes_under_the_name_of_any_object_cost_no_memory(root: Path, model: Path, name: str) -> None:
    """Whatever is asked for: it does without the object, or says which is too large and how much is read of it."""
    home = f"file://{root}/"
    create_adapter(f"{home}coder", examples.BASE, model, examples.LORA, examples.UID)
    later = "coder-20260101-000000-01234567"
    first_sha = read_version(f"{home}coder").manifest_sha256
    made = Manifest(
        base_model=examples.BASE,
        adapter_uid=examples.UID,
        request_uid=examples.UID,
        parent=ParentVersion(uri=f"{home}coder/", sha256=first_sha),
    )
    write_version(f"{home}{later}", examples.CONFIG, examples.tensors(), examples.optimizer(), made)
    swell(root, later, name)
    swell(root, "coder", name)
    acts: dict[str, Callable[[], object]] = {
        "read": lambda: read_version(f"{home}{later}"),
        "read, with a bound": lambda: read_version(f"{home}{later}", max_bytes=2**20),
        "manifest": lambda: find_manifest(f"{home}{later}"),
        "config": lambda: read_config(f"{home}{later}"),
        "create again": lambda: create_adapter(f"{home}coder", examples.BASE, model, examples.LORA, examples.UID),
        "adopt": lambda: init(f"{home}coder", f"{home}coder", model),
        "fork": lambda: init(f"{home}fork", f"{home}{later}", model),
        "fsck": lambda: fsck(f"{home}coder"),
        "sweep": lambda: sweep(f"{home}coder", ["coder"], 0),
        "tombstone": lambda: tombstone(f"{home}coder", [later], "retention"),
        "restore": lambda: restore(f"{home}coder", [later]),
        "delete": lambda: delete(f"{home}coder", [later]),
        "destroy": lambda: destroy(f"{home}coder", adapter_uid=examples.UID),
    }
    if name in (ADAPTER, OPTIMIZER):
        del acts["fsck"]  # it reads every byte that a digest stands for, piece by piece: ten seconds of zeros
    refusals = list[StoreError]()
    tracemalloc.start()
    for what, act in acts.items():
        try:
            act()
        except StoreError as error:
            refusals.append(error)
        assert tracemalloc.get_traced_memory()[1] < 2**25, what
    tracemalloc.stop()
    too_large = [str(error) for error in refusals if isinstance(error, TooLarge)]
    assert too_large or name == VERDICT, "which goes with the next tombstone"
    for said in too_large:
        assert re.search(rf"{name} has {HUGE} bytes, at most \d+ are read", said)


@pytest.mark.parametrize("forked", [False, True])
def test_a_version_of_ones_own_that_claims_too_much_is_not_read(root: Path, model: Path, forked: bool) -> None:
    """Who may write at spec.storage.uri may write a manifest there as the operation itself would, uid and all."""
    home = f"file://{root}/"
    put(f"{home}theirs/")
    put(f"{home}mine/")
    made = Manifest(base_model=examples.BASE, adapter_uid=examples.UID)
    said = made.model_dump(by_alias=True, exclude_none=True, mode="json")
    said["files"] = {CONFIG: {"sha256": "0" * 64, "size": 10}, ADAPTER: {"sha256": "0" * 64, "size": 3 * 2**30}}
    if forked:
        said["parent"] = {"uri": f"{home}theirs/", "sha256": "0" * 64}
    open_store(home).put(f"{home}mine/{MANIFEST}", json.dumps(said).encode())
    with (root / "mine" / ADAPTER).open("wb") as file:
        file.truncate(3 * 2**30)

    def again() -> Version:
        if forked:
            return init(f"{home}mine", f"{home}theirs", model)
        return create_adapter(f"{home}mine", examples.BASE, model, examples.LORA, examples.UID)

    tracemalloc.start()
    with pytest.raises(VersionInvalid, match=f"{ADAPTER} has {3 * 2**30} bytes, at most .* are read here"):
        again()
    assert tracemalloc.get_traced_memory()[1] < 2**24
    tracemalloc.stop()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999", "-1e999"])
def test_a_config_with_a_number_that_json_has_not_is_refused(home: str, model: Path, number: str) -> None:
    text = json.dumps(examples.CONFIG | {"lora_dropout": 7.5}).replace("7.5", number)
    put(f"{home}theirs/", text.encode())
    assert_refused(home, model, f"{CONFIG} is not JSON")


def test_a_name_that_appears_twice_among_very_many_is_found_at_once() -> None:
    """In the largest header that is read at all; looked for pair by pair it would take hours, on a worker's thread."""
    names = ",".join(f'"k{i}":0' for i in range(500_000))
    started = time.process_time()
    with pytest.raises(VersionInvalid, match="k499999 appears twice"):
        parse_adapter(raw(f'{{{names},"k499999":0}}'), "uri")
    assert time.process_time() - started < 10


@pytest.mark.parametrize("text", ['{"r": 4, "r": 8}', '{"peft_type": "LORA", "x": {"a": 1, "a": 2}}'])
def test_a_config_that_two_readers_would_read_differently_is_refused(home: str, model: Path, text: str) -> None:
    put(f"{home}theirs/", text.encode())
    assert_refused(home, model, "appears twice")


@pytest.mark.parametrize(
    "change",
    [
        {"target_modules": "(a*)*b"},
        {"target_modules": "(.*)+x"},
        {"target_modules": ".*.*.*.*x"},
        {"target_modules": r"(.)\1.*x"},
        {"exclude_modules": "(a+)+"},
        {"rank_pattern": {".*.*x": 4}},
        {"alpha_pattern": {f"q_proj{n}": 4 for n in range(1000)}},
        {"rank_pattern": ["q_proj"]},
        {"rank_pattern": {"x_proj": [[4]]}},
        {"layers_to_transform": [0], "layers_pattern": ["(a*)*"]},
        {"target_modules": ".?" * 60 + "x"},
        {"target_modules": "(.|.)" * 31 + "x"},
        {"target_modules": "((.|.)|(.|.))" * 15 + "x"},
        {"target_modules": ".*.*.*" + "(q|k|v|o)" * 2},
        {"target_modules": [f"q_proj{n}" for n in range(1000)]},
        {"exclude_modules": [f"q_proj{n}" for n in range(1000)]},
        {"layers_pattern": [f"layers{n}" for n in range(1000)]},
        {"exclude_modules": "(l|la)?" * 30},
        {"rank_pattern": {"(.|.)" * 31: 4}},
        {"alpha_pattern": {f".*(q|v){n}": 4 for n in range(500)}},
    ],
)
def test_a_pattern_that_would_keep_a_worker_busy_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(VersionInvalid, match=next(iter(set(change) - {"layers_to_transform"}))):
        parse_config(json.dumps({**examples.CONFIG, **change}).encode(), "uri")


def test_the_patterns_that_people_write_are_read() -> None:
    layers = "|".join(map(str, range(64)))
    for targets in (
        r".*\.layers\.(0|1|2)\.self_attn\.(q|v)_proj",
        rf"(?:model\.)?layers\.({layers})\.(self_attn|mlp)\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)",
        r"^(?!.*visual).*(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj).*",
        "all-linear",
    ):
        change = {"target_modules": targets, "rank_pattern": {f".*layers.{n}.(q|k|v|o)_proj": 8 for n in range(64)}}
        parse_config(json.dumps({**examples.CONFIG, **change}).encode(), "uri")


def test_a_worker_that_adopts_a_bare_folder_refuses_what_it_can_without_the_model(home: str) -> None:
    """A bare request's folder is adopted by the worker, which checks its keys when it loads them."""
    put(f"{home}dora/", {**examples.CONFIG, "use_dora": True})
    put(f"{home}nan/", adapter=safetensors.numpy.save(infected(np.nan)))
    for folder, said in (("dora", "use_dora"), ("nan", KEY)):
        with pytest.raises(VersionInvalid, match=said):
            read_version(f"{home}{folder}", adopt=True)
        assert f"{home}{folder}/{MANIFEST}" not in dict(open_store(home).list(home))


# Fuzzing: whatever it is, it is exactly what was asked for, or refused in words

NAMES = st.sampled_from([KEY, OTHER, "__metadata__", "x", ""])
NUMBERS = st.one_of(st.integers(-2, 100), st.sampled_from([2**31, 2**63, 2**64, 10**400]), st.none(), st.floats())
ENTRIES = st.fixed_dictionaries(
    {
        "dtype": st.sampled_from(["F32", "F16", "BF16", "F64", "", "I8", 7, None]),
        "shape": st.one_of(st.lists(NUMBERS, max_size=4), st.none()),
        "data_offsets": st.one_of(st.lists(NUMBERS, max_size=3), st.just([0, 8])),
    }
)


def dumps(value: Any) -> str:
    try:
        return json.dumps(value)
    except ValueError:  # an integer of more digits than Python writes
        return "{}"


@settings(max_examples=500, deadline=None)
@given(
    st.dictionaries(NAMES, st.one_of(ENTRIES, NUMBERS, st.just({"format": "pt"})), max_size=4), st.binary(max_size=64)
)
@example({KEY: entry(0, 8, [2])}, bytes(8))
def test_any_header_is_tensors_of_their_shapes_or_refused(header: dict[str, Any], data: bytes) -> None:
    try:
        found = parse_adapter(raw(dumps(header), data), "uri")
    except VersionInvalid:
        return
    assert sum(value.nbytes for value in found.values()) <= 2 * len(data)
    for name, value in found.items():
        assert list(value.shape) == header[name]["shape"]


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 600), st.floats(), st.text("ab_.*\\", max_size=6)),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.text("ab_", max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)


@example("fan_in_fan_out", float("inf"))
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([*sorted(examples.CONFIG), "use_qalora", "new_field"]), VALUES)
def test_a_config_with_any_value_is_refused_or_means_the_same(root: Path, field: str, value: Any) -> None:
    model = root / "model"
    if not model.exists():
        examples.model_dir(model)
    home = f"file://{root}/"
    for name in (CONFIG, ADAPTER):
        open_store(home).delete(f"{home}theirs/{name}")
    config = {**examples.CONFIG, field: value}
    put(f"{home}theirs/", json.dumps(config).encode())
    fork = f"{home}mine"
    try:
        version = init(fork, f"{home}theirs", model)
    except VersionInvalid:  # of the reason AdapterInvalid
        return
    kept = parse_config(open_store(home).get(f"{fork}/{CONFIG}"), "")
    for name in (CONFIG, ADAPTER, MANIFEST):
        open_store(home).delete(f"{fork}/{name}")
    shaping = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save", "use_dora", "bias")
    for name in shaping:
        assert (kept[name] or None) == (examples.CONFIG[name] or None), "what shapes the adapter cannot have changed"
    assert sorted(version.config["target_modules"]) == sorted(examples.CONFIG["target_modules"])


# Manifests that list more than a version is made of


def listing(uri: str, files: dict[str, bytes]) -> None:
    """Lets the manifest of the version at `uri` list `files` too, each with its right digest."""
    store = open_store(uri)
    manifest = json.loads(store.get(f"{uri}{MANIFEST}"))
    for file, data in files.items():
        store.put(f"{uri}{file}", data, if_absent=False)
        manifest["files"][file] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    store.put(f"{uri}{MANIFEST}", json.dumps(manifest).encode(), if_absent=False)


def test_other_files_that_a_manifest_lists_are_not_read(root: Path) -> None:
    version = first(f"file://{root}/coder")
    listing(version.uri, {f"extra{number}.bin": bytes(16 * 2**20) for number in range(8)})
    tracemalloc.start()
    try:
        again = read_version(version.uri, max_bytes=2**20)
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert most < 4 * 2**20
    np.testing.assert_equal(dict(again.tensors), dict(version.tensors))


def test_a_source_of_a_fork_is_read_within_what_the_adapter_can_need(root: Path, model: Path) -> None:
    source = first(f"file://{root}/coder")
    with open(root / "coder" / OPTIMIZER, "wb") as file:  # 64 MiB, of which nothing is on the disk
        file.truncate(64 * 2**20)
    manifest = json.loads((root / "coder" / MANIFEST).read_text())
    manifest["files"][OPTIMIZER] = {"sha256": "0" * 64, "size": 64 * 2**20}
    (root / "coder" / MANIFEST).write_text(json.dumps(manifest))
    for uri in (f"file://{root}/fork", source.uri):
        with pytest.raises(VersionInvalid, match=f"{OPTIMIZER} has {64 * 2**20} bytes, at most"):
            init(uri, source.uri, model)
