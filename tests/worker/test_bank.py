"""The adapter bank against plain PEFT, and against itself: oracle 11 of the design, layer by layer."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from claas_crds.adapter import Lora
from claas_store.create import peft_config
from claas_worker import errors
from claas_worker.bank import Adapter, Bank
from trainee import BASE_MODEL

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.randint(100, (6, 7), generator=torch.Generator().manual_seed(5))  # (B, T)


def tiny_model(dtype: torch.dtype = torch.float32) -> Any:
    """A random Qwen2 with biases in its attention and 100 rows in its head."""
    config = transformers.Qwen2Config(
        vocab_size=100,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = transformers.Qwen2ForCausalLM(config)
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
    return model.to(dtype).eval().requires_grad_(False)


def config_of(rank: int = 16, targets: list[str] | str = SEVEN, **change: Any) -> dict[str, Any]:
    return peft_config(BASE_MODEL, Lora(r=rank, target_modules=["q_proj"])) | {"target_modules": targets} | change


def weights_of(model: Any, config: Mapping[str, Any], seed: int = 0) -> dict[str, NDArray[np.float32]]:
    """A trained adapter's, which is to say B is not zero: shaped by PEFT itself, from a copy of the model."""
    plain = peft.LoraConfig(**config | {"base_model_name_or_path": None})
    adapted = peft.get_peft_model(copy.deepcopy(model).float(), plain)
    rng = np.random.default_rng(seed)
    state = peft.get_peft_model_state_dict(adapted)
    return {key: (rng.standard_normal(value.shape) * 0.1).astype(np.float32) for key, value in state.items()}


@pytest.fixture
def model() -> Any:
    return tiny_model()


@pytest.fixture
def bank(model: Any) -> Bank:
    return Bank(model, base_model=BASE_MODEL, capacity_bytes=2**30)


def add(bank: Bank, model: Any, key: str, seed: int = 0, **config: Any) -> Adapter:
    made = config_of(**config)
    return bank.add(key, made, weights_of(tiny_model(), made, seed))


def forward(model: Any, bank: Bank, rows: list[Adapter | None], ids: torch.Tensor = IDS) -> torch.Tensor:
    with bank.active(rows):
        logits: torch.Tensor = model(input_ids=ids[: len(rows)], use_cache=False).logits  # (B, T, V)
    return logits


def digest(model: Any) -> list[Any]:
    tensors = [(name, tensor.dtype, tensor.tolist()) for name, tensor in model.state_dict().items()]
    return [tensors, [(name, id(module)) for name, module in model.named_modules()], list(model._modules)]


# PEFT's meaning and PEFT's arithmetic


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "config",
    [
        config_of(),
        config_of(4, ["q_proj", "v_proj"]),
        config_of(8, use_rslora=True, lora_alpha=3),
        config_of(8, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 5, r"1\.mlp\.down_proj": 7}),
        config_of(2, layers_to_transform=[1], layers_pattern="layers"),
        config_of(3, exclude_modules=["k_proj"]),
        config_of(3, r".*\.0\..*_proj"),
        config_of(3, "all-linear"),
    ],
    ids=["seven", "two", "rslora", "patterns", "one layer", "exclude", "regex", "all-linear"],
)
def test_oracle_11_one_adapter_alone_is_plain_peft_bit_for_bit(config: dict[str, Any], dtype: torch.dtype) -> None:
    model = tiny_model(dtype)
    tensors = weights_of(model, config)
    trainable = peft.LoraConfig(**config | {"inference_mode": False, "base_model_name_or_path": None})
    plain = peft.get_peft_model(copy.deepcopy(model), trainable)  # its A and B are in fp32
    peft.set_peft_model_state_dict(plain, {key: torch.from_numpy(tensor) for key, tensor in tensors.items()})
    expected = plain(input_ids=IDS, use_cache=False).logits
    expected.float().square().mean().backward()

    bank = Bank(model)
    adapter = bank.add("a", config, tensors)
    logits = forward(model, bank, [adapter] * len(IDS))
    assert torch.equal(logits, expected)
    assert not torch.equal(logits, forward(model, bank, [None] * len(IDS)))
    logits.float().square().mean().backward()
    gradients = {name.replace(".default", ""): p.grad for name, p in plain.named_parameters() if p.grad is not None}
    assert gradients.keys() == adapter.parameters.keys()
    for key, parameter in adapter.parameters.items():
        assert parameter.grad is not None and torch.equal(parameter.grad, gradients[key]), key
    assert adapter.tensors().keys() == tensors.keys()
    assert all(np.array_equal(tensor, tensors[key]) for key, tensor in adapter.tensors().items())


FEW = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
FEW |= {"num_key_value_heads": 2, "vocab_size": 100, "pad_token_id": 0}
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16}
OTHERS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 8}),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 3}),
    "qwen2 moe": (transformers.Qwen2MoeConfig, transformers.Qwen2MoeForCausalLM, EXPERTS),
    "opt": (transformers.OPTConfig, transformers.OPTForCausalLM, {"ffn_dim": 48, "word_embed_proj_dim": 32}),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_other_decoders_are_plain_peft_too_each_adapter_on_its_own_rows(kind: str) -> None:
    """Fused products, scaled embeddings, windows; and layers that see all tokens of a batch one after the other."""
    config_class, model_class, more = OTHERS[kind]
    torch.manual_seed(0)
    model = model_class(config_class(**FEW, **more)).eval().requires_grad_(False)
    targets = r".*(q_proj|shared_expert\.(gate|up|down)_proj)" if kind == "qwen2 moe" else "all-linear"
    configs = [config_of(rank, targets) for rank in (4, 2)]
    weights = [weights_of(model, config, seed) for seed, config in enumerate(configs)]
    plains = []
    for config, tensors in zip(configs, weights, strict=True):
        trainable = peft.LoraConfig(**config | {"inference_mode": False, "base_model_name_or_path": None})
        plains.append(peft.get_peft_model(copy.deepcopy(model), trainable))
        peft.set_peft_model_state_dict(plains[-1], {key: torch.from_numpy(one) for key, one in tensors.items()})
    bank = Bank(model, capacity_bytes=2**30)
    adapters = [bank.add(f"{i}", *one) for i, one in enumerate(zip(configs, weights, strict=True))]
    rows = [0, 0, 1, 0]
    with bank.active([adapters[row] for row in rows], IDS.shape[1]):
        ours = model(input_ids=IDS[:4], use_cache=False).logits
    ours.square().mean((1, 2)).sum().backward()
    for row, whose in enumerate(rows):
        expected = plains[whose](input_ids=IDS[row : row + 1], use_cache=False).logits
        torch.testing.assert_close(ours[row : row + 1], expected, rtol=1e-4, atol=1e-5)
        expected.square().mean().backward()
    for adapter, plain in zip(adapters, plains, strict=True):
        for name, parameter in plain.named_parameters():
            if parameter.requires_grad:
                own = adapter.parameters[name.replace(".default", "")].grad
                assert own is not None and parameter.grad is not None, name
                torch.testing.assert_close(
                    own, parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max())
                )


# Any mix of adapters


KINDS: list[dict[str, Any]] = [
    {"rank": 2, "targets": SEVEN},
    {"rank": 32, "targets": ["q_proj", "v_proj"]},
    {"rank": 5, "targets": ["down_proj"], "use_rslora": True},
    {"rank": 9, "targets": ["o_proj", "up_proj"], "rank_pattern": {"up_proj": 3}},
]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([None, 0, 1, 2, 3]), min_size=1, max_size=len(IDS)))
def test_oracle_11_rows_of_any_mix_are_what_they_are_alone(kinds: list[int | None]) -> None:
    """In float64, forward and backward: a batch's shape changes the rounding of its products, and nothing else."""
    model = tiny_model(torch.float64)
    bank = Bank(model, capacity_bytes=2**30)
    adapters = {kind: add(bank, model, f"{kind}", kind, **KINDS[kind]) for kind in kinds if kind is not None}
    rows = [None if kind is None else adapters[kind] for kind in kinds]
    together = forward(model, bank, rows)
    if adapters:
        together.square().sum().backward()
    mixed = {kind: [p.grad for p in adapter.parameters.values()] for kind, adapter in adapters.items()}
    for adapter in adapters.values():
        for parameter in adapter.parameters.values():
            parameter.grad = None
    for index, adapter in enumerate(rows):
        alone = forward(model, bank, [adapter], IDS[index : index + 1])
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-11, atol=1e-11)
        if adapter is not None:
            alone.square().sum().backward()  # summed up over the adapter's rows
    for kind, adapter in adapters.items():
        for parameter, expected in zip(adapter.parameters.values(), mixed[kind], strict=True):
            assert parameter.grad is not None and expected is not None
            scale = float(expected.abs().max())
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-11 * scale)


# Nothing leaks


def test_oracle_11_the_base_is_bit_identical_whatever_was_in(model: Any) -> None:
    before = tiny_model()(input_ids=IDS).logits
    state = digest(model)
    bank = Bank(model, base_model=BASE_MODEL, capacity_bytes=2**30)
    seven, two = add(bank, model, "seven"), add(bank, model, "two", rank=4, targets=["q_proj", "v_proj"])
    for rows in ([seven] * 6, [two] * 6, [seven, None, two, two, None, seven]):
        forward(model, bank, rows).sum().backward()
    with pytest.raises(errors.AdapterInvalid):
        bank.add("three", config_of(targets=["lm_head"]), {})
    mixed = forward(model, bank, [seven, None, None, two, two, None])
    assert torch.equal(model(input_ids=IDS).logits, before)
    bank.remove("seven")
    assert torch.equal(model(input_ids=IDS).logits, before)
    assert digest(model) == state
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())
    assert torch.equal(mixed[[1, 2, 5]], before[[1, 2, 5]])  # rows of no adapter, beside others': the same shape


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), 1e30])
def test_oracle_11_a_poisoned_adapter_changes_no_bit_of_other_rows(model: Any, bank: Bank, poison: float) -> None:
    one = add(bank, model, "one", 1)
    other = add(bank, model, "other", 2, rank=4, targets=["q_proj", "down_proj"])
    rows = [one, one, other, other, None, None]

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        logits = forward(model, bank, rows)
        logits[2:].square().sum().backward()
        gradients = [p.grad.clone() for p in other.parameters.values() if p.grad is not None]
        for parameter in [*one.parameters.values(), *other.parameters.values()]:
            parameter.grad = None
        return logits.detach(), gradients

    logits, gradients = run()
    with torch.no_grad():
        for parameter in one.parameters.values():
            parameter.fill_(poison)
    poisoned, others = run()
    assert not poisoned[:2].isfinite().all()
    assert torch.equal(poisoned[2:], logits[2:])
    assert len(others) == len(gradients) == len(other.parameters)
    assert all(torch.equal(a, b) for a, b in zip(others, gradients, strict=True))


def test_oracle_11_an_error_in_the_middle_of_a_forward_pass_leaves_nothing(model: Any, bank: Bank) -> None:
    before = model(input_ids=IDS).logits
    adapter = add(bank, model, "a")

    def fail(*args: object) -> None:
        raise OSError("in the middle")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(OSError, match="in the middle"):
        forward(model, bank, [adapter] * 6)
    handle.remove()
    assert torch.equal(model(input_ids=IDS).logits, before)
    with pytest.raises(RuntimeError, match="6 rows"):  # rows that do not fit the batch
        with bank.active([adapter, None]):
            model(input_ids=IDS)
    with pytest.raises(RuntimeError, match="already"), bank.active([adapter]), bank.active([None]):
        pytest.fail("entered twice")
    assert torch.equal(model(input_ids=IDS).logits, before)


# Residents


def test_idle_adapters_go_least_recently_used_first_and_one_in_use_never(model: Any) -> None:
    size = add(Bank(model), model, "a").size_bytes
    assert size == sum(4 * tensor.size for tensor in weights_of(model, config_of()).values())
    bank = Bank(model, capacity_bytes=3 * size)
    for key in "abc":
        add(bank, model, key)
    assert bank.get("a") is not None  # used: b is now the oldest
    add(bank, model, "d")
    assert [key for key in "abcd" if bank.get(key)] == ["a", "c", "d"]
    with bank.in_use("a") as a, bank.in_use("c"), bank.in_use("d"):
        add(bank, model, "e")  # all others are in use: beyond the capacity, for now
        assert [key for key in "acde" if bank.get(key)] == ["a", "c", "d", "e"]
        assert bank.get("a") is a
        with pytest.raises(ValueError, match="in use"):
            bank.remove("a")
        with pytest.raises(errors.VersionConflict):
            add(bank, model, "a")
    assert sum(bank.get(key) is not None for key in "acde") == 3
    for key in "acde":
        bank.remove(key)
    assert not any(bank.get(key) for key in "acde")
    with pytest.raises(KeyError), bank.in_use("a"):
        pytest.fail("a removed adapter was used")


def test_without_capacity_an_idle_adapter_makes_room_for_the_next(model: Any) -> None:
    bank = Bank(model)
    add(bank, model, "a")
    with bank.in_use("a"):
        add(bank, model, "b")
        assert bank.get("a") is not None
    assert bank.get("a") is None and bank.get("b") is None


def test_an_adapter_is_a_copy_of_what_it_was_loaded_from(model: Any, bank: Bank) -> None:
    config = config_of()
    tensors = weights_of(model, config)
    kept = {key: tensor.copy() for key, tensor in tensors.items()}
    adapter = bank.add("a", config, tensors)
    snapshot = adapter.tensors()
    with torch.no_grad():
        for parameter in adapter.parameters.values():
            parameter.add_(1)
    for key, tensor in kept.items():
        assert np.array_equal(tensors[key], tensor) and np.array_equal(snapshot[key], tensor)


# What may not be loaded


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights"),
        ({"base_model_name_or_path": "another/model"}, "another/model"),
        ({"target_modules": ["q_proj", "lm_head"]}, "lm_head"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens"),
        ({"target_modules": ["no_such_layer"]}, "no_such_layer"),
        ({"target_modules": ["input_layernorm"]}, "RMSNorm"),
        ({"target_modules": ["q_proj"]}, "down_proj.*no target"),
        ({"r": 8}, "shape"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_whole(
    model: Any, bank: Bank, change: dict[str, Any], message: str
) -> None:
    config = config_of()
    tensors = weights_of(model, config)
    before = digest(model)
    for _ in range(2):  # what PEFT said once is not remembered as good
        with pytest.raises(errors.AdapterInvalid, match=message):
            bank.add("a", config | change, tensors)
    assert bank.get("a") is None
    assert digest(model) == before


def test_a_missing_key_and_a_nan_are_named(model: Any, bank: Bank) -> None:
    config = config_of()
    tensors = weights_of(model, config)
    key = sorted(tensors)[5]
    without = {name: tensor for name, tensor in tensors.items() if name != key}
    nan = {**tensors, key: np.full_like(tensors[key], np.nan)}
    for broken in (without, nan):
        with pytest.raises(errors.AdapterInvalid, match=key.replace(".", r"\.")):
            bank.add("a", config, broken)
    assert bank.get("a") is None
