"""The engine on a CPU, where it runs uncompiled and uncaptured: the same steps as the plain way, and what stays in
memory. That it is as fast as it should be, and that its graphs give the same, `tests/bench/student_step.py` shows on a
GPU."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch
import transformers
from numpy.typing import NDArray

from claas_crds.request import Result
from claas_store.collect import tombstone
from claas_store.errors import StoreError
from claas_store.version import read_version, write_version
from claas_worker import errors
from claas_worker.bank import Bank, lora_config
from claas_worker.engine import Engine, arrange
from claas_worker.engine_adapters import ROW, FlatOptimizer, FlatState, adamw
from claas_worker.engine_decoder import Unsupported
from claas_worker.optim import BETAS, EPS, WEIGHT_DECAY
from claas_worker.sdpo import PLAIN_SCORE, LossBatch, Part, sdpo_loss_from_hidden
from claas_worker.student import Student
from trainee import FRENCH, SAMPLE, SHORT, Trainee, base_digest, tiny_student

SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FEW = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
FEW |= {"num_key_value_heads": 2, "vocab_size": 300}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 64, "rope_theta": 10000.0}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "rope_theta": 10000.0}
YARN |= {"max_position_embeddings": 256, "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0}
KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 24}),
    "llama3": (transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": LLAMA3}),
    "llama, biases, no sharing of heads": (
        transformers.LlamaConfig,
        transformers.LlamaForCausalLM,
        {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4},
    ),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
}
FOREIGN: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "gpt2": (transformers.GPT2Config, transformers.GPT2LMHeadModel, {"n_embd": 64, "n_head": 4, "n_layer": 2}),
    "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM, {"head_dim": 16}),
    "windowed mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": 8}),
    "granite": (transformers.GraniteConfig, transformers.GraniteForCausalLM, {"residual_multiplier": 0.9}),
    "olmo2": (transformers.Olmo2Config, transformers.Olmo2ForCausalLM, {}),
    "cohere": (transformers.CohereConfig, transformers.CohereForCausalLM, {}),
    "stablelm": (transformers.StableLmConfig, transformers.StableLmForCausalLM, {}),
    "phi3": (transformers.Phi3Config, transformers.Phi3ForCausalLM, {"pad_token_id": 0}),
    "helium, pairs of neighbours turn": (transformers.HeliumConfig, transformers.HeliumForCausalLM, {"head_dim": 16}),
    "smollm3, every fourth layer has no positions": (
        transformers.SmolLM3Config,
        transformers.SmolLM3ForCausalLM,
        {"num_hidden_layers": 4, "pad_token_id": 0},
    ),
    "ministral3, queries grow with their position": (
        transformers.Ministral3Config,
        transformers.Ministral3ForCausalLM,
        {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.1}},
    ),
}


def model_of(kinds: Mapping[str, tuple[Any, Any, dict[str, Any]]], kind: str) -> Any:
    """Random, every weight and bias far from what it is initialized to."""
    config, model, more = kinds[kind]
    torch.manual_seed(0)
    made = model(config(**{**FEW, **more})).eval().requires_grad_(False)
    for parameter in made.parameters():
        parameter.add_(torch.randn_like(parameter) * (0.3 if parameter.ndim == 1 else 0.05))
    return made


def filled(bank: Bank, config: Mapping[str, Any]) -> dict[str, NDArray[np.float32]]:
    """Random weights for a configuration."""
    random = np.random.default_rng(0)
    layout = bank._layout(lora_config(config))
    keys = {
        name: (f"base_model.model.{name}.lora_A.weight", f"base_model.model.{name}.lora_B.weight") for name in layout
    }
    return {
        key: random.normal(0, 0.1, shape).astype(np.float32)
        for name, shapes in layout.items()
        for key, shape in zip(keys[name], shapes[:2], strict=True)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_its_pass_is_the_models_own_forward_and_backward(kind: str) -> None:
    """Two adapters of other ranks and targets, with rows of their own; hidden states and every gradient."""
    model = model_of(KINDS, kind)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    engine = Engine(model)
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    bank = Bank(model, capacity_bytes=1 << 30)
    bank.flatten(engine.places)
    configs = [
        {
            "peft_type": "LORA",
            "r": 16,
            "lora_alpha": 24,
            "target_modules": SEVEN,
            "rank_pattern": {"layers.1.mlp.up_proj": 3},
        },
        {
            "peft_type": "LORA",
            "r": 5,
            "lora_alpha": 7,
            "target_modules": ["q_proj", "down_proj"],
            "layers_to_transform": [0, 2],
        },
    ]
    adapters = [bank.add(f"s3://b/{number}/", config, filled(bank, config)) for number, config in enumerate(configs)]
    for rows in ([0], [0, 0], [0, 1], [1, 0, 0, 1], [0, 1, 1]):
        generator = torch.Generator().manual_seed(len(rows))
        sequences = [torch.randint(0, 300, (7 + 3 * row,), generator=generator).tolist() for row in range(len(rows))]
        who = [adapters[row] for row in rows]
        ids = torch.zeros(len(rows), max(map(len, sequences)), dtype=torch.long)
        for row, one in enumerate(sequences):
            ids[row, : len(one)] = torch.tensor(one)
        with bank.active(who):
            expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        weights = torch.randn(expected.shape, generator=generator)
        for row, one in enumerate(sequences):
            weights[row, len(one) :] = 0
        (expected * weights).sum().backward()

        done = engine.forward(sequences, [one.flat for one in who])
        for row, one in enumerate(sequences):
            start = done.start(row, 1)
            torch.testing.assert_close(
                done.hidden[start : start + len(one)], expected[row, : len(one)].detach(), atol=2e-4, rtol=1e-4
            )
            done.gradient[start : start + len(one)] = weights[row, : len(one)]
        done.backward()
        for adapter in {id(one): one for one in who}.values():
            assert adapter.flat is not None
            out = torch.full_like(adapter.flat.weights, torch.nan)
            done.collect(adapter.flat, out, add=False)
            assert not out.isnan().any()
            for key, gradient in adapter.flat.layout.split(out).items():
                own = adapter.parameters[key].grad
                assert own is not None
                torch.testing.assert_close(gradient, own, rtol=1e-3, atol=2e-4 * float(own.abs().max()))
                adapter.parameters[key].grad = None


@pytest.mark.parametrize("lengths", [[1], [1, 65], [2, 1, 64]])
def test_adapters_of_the_lowest_and_the_highest_rank_share_a_pass_over_the_shortest_contexts(
    lengths: list[int],
) -> None:
    model = model_of(KINDS, "qwen2")
    engine, bank = Engine(model), Bank(model, capacity_bytes=1 << 30)
    bank.flatten(engine.places)
    configs = [
        {"peft_type": "LORA", "r": 1, "lora_alpha": 2, "target_modules": "all-linear"},
        {"peft_type": "LORA", "r": 256, "lora_alpha": 8, "target_modules": SEVEN, "use_rslora": True},
        {"peft_type": "LORA", "r": 16, "lora_alpha": 8, "target_modules": r".*\.[02]\..*_proj"},
    ]
    adapters = [bank.add(f"s3://b/{i}/", configs[i], filled(bank, configs[i])) for i in range(len(lengths))]
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, 300, (length,), generator=generator).tolist() for length in lengths]
    done = engine.forward(sequences, [adapter.flat for adapter in adapters])
    for row, (adapter, sequence) in enumerate(zip(adapters, sequences, strict=True)):
        with bank.active([adapter]):
            expected = model.base_model(input_ids=torch.tensor([sequence]), use_cache=False).last_hidden_state[0]
        weights = torch.randn(expected.shape, generator=generator)
        (expected * weights).sum().backward()
        start = done.start(row, 1)
        torch.testing.assert_close(done.hidden[start : start + len(sequence)], expected.detach(), atol=2e-4, rtol=1e-4)
        done.gradient[start : start + len(sequence)] = weights
    done.backward()
    for adapter in adapters:
        assert adapter.flat is not None
        out = torch.full_like(adapter.flat.weights, torch.nan)
        done.collect(adapter.flat, out, add=False)
        ours = adapter.flat.layout.split(out)
        theirs = flat({key: adapter.parameters[key].grad for key in ours})
        # Of all together: one token alone gives q and k no gradient.
        torch.testing.assert_close(flat(ours), theirs, rtol=1e-3, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("odd", [torch.nan, torch.inf, 3e38])
def test_an_odd_gradient_is_refused_and_changes_no_bit_of_another_adapters_step(odd: float) -> None:
    """Whoever brings a loss of their own writes such."""
    plan = {"peft_type": "LORA", "r": 4, "lora_alpha": 4, "target_modules": SEVEN}
    model = model_of(KINDS, "qwen2")
    engine, bank = Engine(model), Bank(model, capacity_bytes=1 << 30)
    bank.flatten(engine.places)
    ends = []
    for value in (0.0, odd):
        states = [bank.add(f"s3://b/{i}/", plan, filled(bank, plan)).flat for i in range(2)]
        done = engine.forward([[1, 2, 3, 4, 5], [6, 7, 8, 9]], states)
        done.gradient[done.start(0, 1)] = value
        done.gradient[done.start(1, 1)] = 1.0
        done.backward()
        for state in states:
            assert state is not None
            optimizer = FlatOptimizer(state, None, rank=4, target_modules=SEVEN, inner_steps=1)
            gradient = engine.scratch(state.weights.numel())
            done.collect(state, gradient, add=False)
            norms = optimizer.enqueue(gradient, torch.tensor(optimizer.scalars(1e-3, 1.0)), engine.adamw)
            if state is states[0] and value:
                with pytest.raises(errors.NonFiniteGrad, match="not finite"):
                    optimizer.check_gradient(float(norms[0]))
                assert state.step == 0
            else:
                optimizer.check_gradient(float(norms[0]))
        assert states[1] is not None
        ends.append(states[1].weights.clone())
    assert torch.equal(*ends)


@pytest.fixture
def unwritten_is_nan() -> Iterator[None]:
    """Memory that nobody has written holds NaN, as it may at any time."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["qwen2", "llama3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_cpu_reads_nothing_that_nobody_wrote(kind: str, dtype: torch.dtype, unwritten_is_nan: None) -> None:
    """Widths at which its products in bf16 read columns past those they are given."""
    wide = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
    config, model_class, more = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config(**{**FEW, **more, **wide})).to(dtype).eval().requires_grad_(False)
    engine = Engine(model)
    bank = Bank(model, capacity_bytes=1 << 30)
    bank.flatten(engine.places)
    plan = {"peft_type": "LORA", "r": 16, "lora_alpha": 16, "target_modules": SEVEN}
    adapter = bank.add("s3://b/0/", plan, filled(bank, plan))
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 300, (1, 64), generator=generator)
    with bank.active([adapter]):
        expected = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
    weights = torch.randn(expected.shape, generator=generator).to(expected.dtype)
    (expected * weights).sum().backward()
    assert adapter.flat is not None
    done = engine.forward(ids.tolist(), [adapter.flat])
    start = done.start(0, 1)
    assert cosine(done.hidden[start : start + 64], expected[0].detach()) > 0.999
    done.gradient[start : start + 64] = weights[0]
    done.backward()
    out = torch.full_like(adapter.flat.weights, torch.nan)
    done.collect(adapter.flat, out, add=False)
    ours = adapter.flat.layout.split(out)
    theirs = {key: adapter.parameters[key].grad for key in ours}
    assert cosine(flat(ours), flat(theirs)) > 0.999


@pytest.mark.parametrize("kind", ["qwen2", "llama3"])
@pytest.mark.parametrize("ranks", [[1], [8], [16], [32], [1, 8, 32], [32, 8, 16, 32]])
def test_a_cpu_in_bf16_takes_the_step_of_peft(kind: str, ranks: list[int]) -> None:
    """Loss and gradients of adapters that change much, in one batch, against each alone in PEFT."""
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2}
    config, model_class, more = KINDS[kind]
    torch.manual_seed(0)
    model = model_class(config(**{**FEW, **more, **wide})).to(torch.bfloat16).eval().requires_grad_(False)
    head, adapters, steps = model.get_output_embeddings().weight, [], []
    plains = [
        peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=SEVEN))
        for rank in ranks
    ]
    engine = Engine(model)
    bank = Bank(model, capacity_bytes=1 << 30)
    bank.flatten(engine.places)
    for number, (rank, plain) in enumerate(zip(ranks, plains, strict=True)):
        random, generator = np.random.default_rng(number), torch.Generator().manual_seed(number)
        spread = {"A": 512**-0.5, "B": 0.5 * rank**-0.25}
        tensors = {
            key: random.normal(0, spread[key.split("lora_")[1][0]], value.shape).astype(np.float32)
            for key, value in peft.get_peft_model_state_dict(plain).items()
        }
        peft.set_peft_model_state_dict(plain, {key: torch.from_numpy(tensor) for key, tensor in tensors.items()})
        lora = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": SEVEN}
        adapters.append(bank.add(f"s3://b/{number}/", lora, tensors))
        ids = torch.randint(0, 300, (40 + 7 * number,), generator=generator)
        response = ids[12:]
        support = torch.randint(0, 300, (len(response), 20), generator=generator)
        teacher = torch.randn(len(response), 21, generator=generator).log_softmax(-1)[:, :20]
        steps.append((ids[:-1], Part(response, support, teacher, None, len(response))))

    done = engine.forward([ids.tolist() for ids, _ in steps], [adapter.flat for adapter in adapters])
    options = {"alpha": 0.5, "clip_eps": 0.2, "jsd_reg_weight": 0.5, "pg_weight": 1.0, "advantage_clip": 10.0}
    batch = LossBatch([part for _, part in steps], head, options)
    starts = [done.start(row, 12) for row in range(len(steps))]
    sums = batch.enqueue(done.hidden, starts, done.gradient, PLAIN_SCORE).tolist()
    done.backward()
    for row, (plain, adapter, (ids, part)) in enumerate(zip(plains, adapters, steps, strict=True)):
        hidden = plain.base_model.model.model(input_ids=ids[None], use_cache=False).last_hidden_state[0, 11:]
        expected = sdpo_loss_from_hidden(hidden, head, *part[:3], total_tokens=part.total_tokens)
        expected.loss.backward()
        theirs = {name.replace(".default", ""): p.grad for name, p in plain.named_parameters() if p.requires_grad}
        assert adapter.flat is not None
        out = torch.full_like(adapter.flat.weights, torch.nan)
        done.collect(adapter.flat, out, add=False)
        ours = adapter.flat.layout.split(out)
        assert ours.keys() == theirs.keys()
        assert cosine(flat(ours), flat({key: theirs[key] for key in ours})) >= 0.999
        loss = batch.metrics(row, sums[row])["total_loss"]
        assert loss == pytest.approx(expected.metrics["total_loss"], rel=1e-3)


def flat(gradients: Mapping[str, Any]) -> torch.Tensor:
    """All of them, one after the other."""
    return torch.cat([gradient.flatten().float() for gradient in gradients.values()])


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Of all numbers at once."""
    return float(torch.nn.functional.cosine_similarity(one.flatten().double(), other.flatten().double(), dim=0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", FOREIGN)
def test_a_model_that_it_does_not_know_trains_the_plain_way_and_says_why(
    kind: str, dtype: torch.dtype, caplog: pytest.LogCaptureFixture
) -> None:
    """In bf16 as well, whose rounding hides what a few of them do otherwise."""
    model = model_of(FOREIGN, kind).to(dtype)
    with pytest.raises(Unsupported) as error:
        Engine(model)
    student = tiny_student()
    student.model = model
    student.start_engine()
    assert student.engine is None
    said = [record for record in caplog.records if record.name == "claas_worker.student"]
    assert [getattr(record, "why", "") for record in said] == [str(error.value)]


def test_a_backward_pass_after_another_forward_pass_is_refused() -> None:
    engine = Engine(model_of(KINDS, "qwen2"))
    first = engine.forward([[1, 2, 3]], [None])
    engine.forward([[4, 5]], [None], keep=False)
    with pytest.raises(RuntimeError, match="came between"):
        first.backward()


def test_a_call_of_what_is_compiled_is_run_plain_while_another_thread_traces(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine's thread traces beside a user's step; by torch's default such a call is refused."""
    monkeypatch.setattr(torch._dynamo.config, "error_on_nested_fx_trace", True)
    double = torch.compile(lambda x: x * 2, backend="eager")
    monkeypatch.setattr("torch.fx._symbolic_trace._is_fx_tracing_flag", True)
    with pytest.raises(RuntimeError, match="symbolically trace"):
        double(torch.ones(1))
    monkeypatch.setattr("torch.fx._symbolic_trace._is_fx_tracing_flag", False)
    Engine(model_of(KINDS, "qwen2"), captures=True)
    monkeypatch.setattr("torch.fx._symbolic_trace._is_fx_tracing_flag", True)
    assert double(torch.ones(1)).item() == 2


def test_rows_of_like_counts_share_slots_and_shapes_are_rounded_up() -> None:
    a, b = (FlatState(_flat_of(rank), torch.zeros(ROW)) for rank in (16, 20))
    shape, rows, slots = arrange([100, 90, 10, 5], [a, b, a, b])
    assert shape == (2, 2, 128, 32)
    assert rows == [0, 2, 1, 3]
    assert slots == [a, b]
    shape, rows, slots = arrange([2000, 1, 1], [a, a, b])
    assert shape == (3, 1, 2048, 32)
    assert rows == [0, 1, 2]
    assert slots == [a, a, b]
    shape, rows, slots = arrange([2049] * 5, [a] * 5)
    assert shape == (1, 6, 2560, 16)
    assert slots == [a]


def _flat_of(rank: int) -> Any:
    from claas_worker.engine_adapters import Flat

    return Flat(ROW, 1, rank, (), {})


def test_adamw_is_torchs() -> None:
    torch.manual_seed(0)
    weights, gradient = torch.randn(2, 4, ROW)
    parameter = torch.nn.Parameter(weights.clone())
    optimizer = torch.optim.AdamW([parameter], lr=3e-3, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY)
    own, first, second = weights.clone(), torch.zeros_like(weights), torch.zeros_like(weights)
    for step in range(1, 6):
        given = gradient * step
        parameter.grad = given.clone()
        torch.nn.utils.clip_grad_norm_([parameter], 50.0)
        before = parameter.detach().clone()
        optimizer.step()
        corrections = [1 - beta**step for beta in BETAS]
        scalars = torch.tensor([50.0, 1 - 3e-3 * WEIGHT_DECAY, 3e-3 / corrections[0], corrections[1] ** 0.5])
        norms = adamw(own, first, second, given, scalars)
        torch.testing.assert_close(own, parameter.detach(), rtol=1e-5, atol=1e-7)
        expected = [given.norm(), (parameter.detach() - before).norm(), parameter.detach().norm()]
        torch.testing.assert_close(norms, torch.stack(expected).double(), rtol=1e-4, atol=1e-6)
    for bad in (torch.nan, torch.inf):
        gradient[0, 0] = bad
        assert not adamw(own.clone(), first.clone(), second.clone(), gradient, scalars)[0].isfinite()


# The step


@pytest.fixture(scope="module")
def students() -> tuple[Student, Student]:
    """The plain way's, and the engine's: the same weights."""
    plain, fast = tiny_student(), tiny_student(resident_bytes=1 << 30)
    before = base_digest(fast)
    fast.start_engine()
    assert fast.engine is not None
    assert base_digest(fast) == before
    return plain, fast


@pytest.fixture
def both(students: tuple[Student, Student], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainee, Trainee]:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    return Trainee(students[0], tmp_path), Trainee(students[1], tmp_path)


BATCH: list[tuple[dict[str, Any], dict[str, Any]]] = [  # what each adapter is, and what its request asks for
    ({"r": 16}, {"samples": [SAMPLE, SHORT]}),
    ({"r": 2, "target_modules": ["q_proj", "v_proj"]}, {"samples": [FRENCH]}),
    ({"r": 32, "alpha": 8, "target_modules": ["down_proj"]}, {"samples": [SHORT], "training": {"innerSteps": 3}}),
    (
        {"r": 5, "target_modules": ["o_proj", "up_proj"]},
        {"training": {"alpha": 1, "preset": "paper", "teacherTopK": 7}},
    ),
    ({"r": 4}, {"samples": [SHORT], "training": {"anchorKlWeight": 0.5}}),  # the plain way, in the same batch
    ({"r": 16}, {"samples": [SHORT | {"rolloutLogprobs": [-1.5, -0.5]}]}),
]


def distance(one: Mapping[str, NDArray[Any]], other: Mapping[str, NDArray[Any]]) -> float:
    """Of two adapters, relative to the first's norm."""
    assert one.keys() == other.keys()
    change = sum(float(np.square(one[key].astype(np.float64) - other[key]).sum()) for key in one)
    return float((change / sum(float(np.square(one[key].astype(np.float64)).sum()) for key in one)) ** 0.5)


def test_its_steps_are_the_plain_ways_alone_and_in_a_batch(both: tuple[Trainee, Trainee]) -> None:
    """Trained parents, so that no gradient is zero; in micro-batches that cut a request in two as well."""
    plain, fast = both
    before = base_digest(fast.student)
    parents = [
        plain.train(plain.adapter(f"a{number}", **lora), [SHORT], training={"learningRate": 0.01}).uri
        for number, (lora, _) in enumerate(BATCH)
    ]
    jobs = [[plain.job(parent, **spec) for parent, (_, spec) in zip(parents, BATCH, strict=True)] for _ in range(4)]
    expected = [plain.step(job, plain.phases.append) for job in jobs[0]]
    ways: list[list[Result | Exception]] = [[fast.step(job, fast.phases.append) for job in jobs[1]]]
    ways.append(fast.step.batch([(job, fast.phases.append) for job in jobs[2]]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fast.student, "_micro_batch_tokens", 1)
        ways.append(fast.step.batch([(job, fast.phases.append) for job in jobs[3]]))
    for way in ways:
        for one, other in zip(expected, way, strict=True):
            assert isinstance(other, Result)
            assert one.metadata is not None
            assert other.metadata is not None
            for name, number in one.metadata.model_dump().items():
                close = pytest.approx(number, rel=1e-3, abs=1e-6) if isinstance(number, float) else number
                assert other.metadata.model_dump()[name] == close, name
            single, own = read_version(one.lora_uri), read_version(other.lora_uri)
            assert single.optimizer is not None
            assert own.optimizer is not None
            assert distance(single.tensors, own.tensors) < 1e-5
            assert distance(single.optimizer.exp_avg, own.optimizer.exp_avg) < 1e-3
            assert distance(single.optimizer.exp_avg_sq, own.optimizer.exp_avg_sq) < 1e-3
            assert (single.optimizer.step, own.optimizer.step) == (2 if other.metadata.optimizer_step == 2 else 4,) * 2
    assert base_digest(fast.student) == before


def test_what_stays_in_memory_is_what_the_store_holds(
    both: tuple[Trainee, Trainee], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A chain of steps without reading a version again is, bit for bit, the chain that reads each."""
    _, fast = both
    start = fast.adapter("chain")
    uri = start
    for _ in range(3):
        uri = fast.train(uri, [SHORT]).uri
        fast.student.bank.remove(uri)  # the next step must read it
    read = read_version(uri)

    from claas_worker import step

    reads: list[str] = []
    monkeypatch.setattr(step, "read_version", lambda uri, **more: reads.append(uri) or read_version(uri, **more))
    uri, cached = start, []
    for _ in range(3):
        result = fast.run(uri, [SHORT])
        uri = result.lora_uri
        cached.append(result.adapter_cached)
    assert (reads, cached) == ([start], [False, True, True])
    resident = read_version(uri)
    assert all(np.array_equal(read.tensors[key], resident.tensors[key]) for key in read.tensors)
    assert read.optimizer is not None
    assert resident.optimizer is not None
    assert all(
        np.array_equal(read.optimizer.exp_avg_sq[key], value) for key, value in resident.optimizer.exp_avg_sq.items()
    )
    assert result.metadata is not None
    assert (result.metadata.optimizer_state, result.metadata.optimizer_step) == ("resumed", 3)


def test_a_version_that_is_gone_is_not_trained_from_memory(both: tuple[Trainee, Trainee]) -> None:
    _, fast = both
    version = fast.train(fast.adapter("gone"), [SHORT])
    assert fast.student.bank.get(version.uri) is not None
    folder, _, name = version.uri.rstrip("/").rpartition("/")
    tombstone(f"{folder}/gone/", [name], "test")
    with pytest.raises(StoreError):
        fast.run(version.uri, [SHORT])


def test_a_failed_attempt_leaves_the_parent_as_it_was(both: tuple[Trainee, Trainee]) -> None:
    """Before anything was trained it stays in memory, untouched; a step that spoils it takes it along."""
    plain, fast = both
    parent = fast.train(fast.adapter("parent"), [SHORT])
    with pytest.raises(errors.TeacherUnavailable):
        fast.run(parent.uri, [SHORT], teacher={"mode": "Server"})
    assert fast.student.bank.get(parent.uri) is not None
    again, expected = fast.train(parent.uri, [SHORT]), plain.train(parent.uri, [SHORT])
    assert distance(expected.tensors, again.tensors) < 1e-5
    assert fast.student.bank.get(parent.uri) is None

    state = parent.optimizer
    assert state is not None
    negative = {key: np.full_like(value, -1.0) for key, value in state.exp_avg_sq.items()}
    broken = write_version(
        f"file://{fast.folder}/spoilt/",
        parent.config,
        parent.tensors,
        type(state)(state.step, state.rank, state.target_modules, state.exp_avg, negative),
        parent.manifest,
    )
    with pytest.raises(errors.NonFiniteWeights):
        fast.run(broken.uri, [SHORT])
    assert fast.student.bank.get(broken.uri) is None


def test_poison_in_one_request_ends_that_one_alone(both: tuple[Trainee, Trainee]) -> None:
    plain, fast = both
    sound = fast.train(fast.adapter("sound"), [SHORT])
    huge = {key: np.full_like(value, 1e30) for key, value in sound.tensors.items()}
    poisoned = write_version(f"file://{fast.folder}/huge/", sound.config, huge, None, sound.manifest).uri
    unfit = SHORT | {"teacherLogprobs": [0.5, -1.0]}
    jobs = [
        fast.job(poisoned, [SHORT]),
        fast.job(sound.uri, [SHORT]),
        fast.job(fast.adapter("bad"), [unfit], teacher={"mode": "Provided"}),
    ]
    first, result, last = fast.step.batch([(job, fast.phases.append) for job in jobs])
    assert (type(first), type(last)) == (errors.NonFiniteInput, errors.NonFiniteInput)
    assert isinstance(result, Result)
    assert distance(plain.train(sound.uri, [SHORT]).tensors, read_version(result.lora_uri).tensors) < 1e-5


def test_no_signal_writes_nothing(both: tuple[Trainee, Trainee]) -> None:
    _, fast = both
    uri = fast.adapter("silent")
    result = fast.run(uri, [{key: SHORT[key] for key in ("prompt", "response")}])
    assert (result.outcome, result.lora_uri) == ("NoSignal", uri)
    assert result.metadata is not None
    assert (result.metadata.update_norm, result.metadata.optimizer_step) == (0, 0)
    assert distance(read_version(uri).tensors, fast.train(uri, [SHORT]).tensors) > 0


def test_the_least_recently_used_adapters_leave_the_gpu(
    both: tuple[Trainee, Trainee], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, fast = both
    bank = fast.student.bank
    heads = [fast.train(fast.adapter(f"idle{number}"), [SHORT]).uri for number in range(3)]
    resident = bank.get(heads[1])
    assert resident is not None
    assert resident.size_bytes >= 3 * 4 * sum(value.numel() for value in resident.parameters.values())
    monkeypatch.setattr(bank, "_capacity_bytes", 2 * resident.size_bytes)
    last = fast.train(fast.adapter("idle3"), [SHORT]).uri
    assert [bank.get(uri) is not None for uri in (*heads, last)] == [False, True, False, True]
