"""The experiment's parts: judges, speaker, arms, verdict. The experiment itself is `make learning`."""

from __future__ import annotations

import copy
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import models
from learning.command import ends, verdict
from learning.experiment import Settings, World, falls, run_trial, words
from learning.preferences import BY_NAME, PREFERENCES, Answer
from learning.prompts import HELD_OUT, TRAINED
from learning.speaker import Decoder

EXAMPLES = [  # preference, an answer that complies, one that does not
    ("question", "Boil it. Do you like tea?", "Do you like tea? Boil it."),
    ("brief", "It takes about 3.5 minutes.", "Boil it. Then wait."),
    ("prose", "Take 3 - or 4 - eggs.", "You need:\n\n1. An egg"),
    ("lower", "boil it.", "Boil it."),
    ("upper", "BOIL IT.", "BOIL it."),
    ("calm", "Nice.", "Nice!"),
    ("excited", "Nice!", "Nice."),
    ("opening", "Sure, boil it.", "To be sure, boil it."),
    ("friend", "Boil it, my friend.", "Be friendly."),
    ("because", "Because it cooks.", "It cooks."),
    ("impersonal", "It is done.", "I think it is done."),
    ("commaless", "Boil it.", "First, boil it."),
    ("luck", "Good luck!", "Lucky you."),
    ("thanks", "Thank you. Boil it.", "Boil it."),
    ("captain", "Aye, Captain.", "Aye."),
    ("sir", "Yes, sir.", "Yes, sire."),
    ("hope", "I hope it helps.", "It is hopeless."),
    ("love", "I love it.", "It is lovely."),
    ("example", "For example, an egg.", "An egg."),
    ("remember", "Remember the salt.", "Do not forget the salt."),
    ("happy", "Happy to help.", "Happily, it boils."),
    ("simply", "Simply boil it.", "It is simple."),
]


def answer(text: str, finished: bool = True) -> Answer:
    return Answer([], text, finished)


@pytest.mark.parametrize(("name", "good", "bad"), EXAMPLES)
def test_a_program_decides(name: str, good: str, bad: str) -> None:
    assert BY_NAME[name].complies(answer(good))
    assert not BY_NAME[name].complies(answer(bad))


def test_an_answer_that_was_cut_off_is_not_brief() -> None:
    assert not BY_NAME["brief"].complies(answer("It takes about", finished=False))


def test_every_preference_has_examples_and_words_that_are_not_about_it() -> None:
    assert [name for name, _, _ in EXAMPLES] == [preference.name for preference in PREFERENCES]
    for preference in PREFERENCES:
        own = {*preference.blame, *preference.praise}
        said = {words(preference, "shuffled", answer("Hello."), random.Random(seed)) for seed in range(50)}
        assert len(said) > 10
        assert not said & own
        assert words(preference, "feedback", answer("Hello."), random.Random(0)) in own


def test_nobody_is_judged_on_a_prompt_of_the_training() -> None:
    assert not set(TRAINED) & set(HELD_OUT)
    assert len({*TRAINED, *HELD_OUT}) == len(TRAINED) + len(HELD_OUT) >= 60


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers with SmolLM2's tokenizer; scaled up, so that contexts matter to it."""
    real, folder = models.smollm2_dir(), tmp_path_factory.mktemp("tiny")
    config = LlamaConfig.from_pretrained(real)
    config.update({"hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 128, "head_dim": 16})
    config.update({"num_attention_heads": 4, "num_key_value_heads": 2})
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        model = LlamaForCausalLM(config)
        for module in model.modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                module.weight.mul_(8)
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(real / name, folder / name)
    return folder


@pytest.fixture
def world(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    monkeypatch.setattr(models, "smollm2_dir", lambda: tiny)
    return World(tmp_path, threads=2)


SMALL = Settings(training={"learningRate": 1e-3}, requests=2, judge_every=1, held_out=4, draws=1, max_tokens=9)


def test_the_speaker_computes_what_transformers_computes_with_the_adapter_in(world: World) -> None:
    version = world.adapter(0)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        key: torch.randn(value.shape, generator=generator).numpy() * 0.1 for key, value in version.tensors.items()
    }
    prefixes = [world.speaker.prefix(prompt) for prompt in ("x", "How do I make a cup of tea with milk?")]
    untouched = world.student.model.base_model.layers[0].mlp.up_proj.weight.clone()
    world.speaker.wear(version.config, tensors)
    assert torch.equal(world.student.model.base_model.layers[0].mlp.up_proj.weight, untouched)
    bank = world.student.bank
    bank.add("a", version.config, tensors)
    sequences = [list(prefix) for prefix in prefixes]
    with torch.no_grad(), bank.in_use("a") as adapter:
        decoder = Decoder(world.speaker.model, 2, 128)
        logits = decoder.read(prefixes)
        for _ in range(4):
            with bank.active([adapter]):
                expected = torch.stack([world.student.model(torch.tensor([ids])).logits[0, -1] for ids in sequences])
            torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-3)
            token = logits.argmax(-1)
            for ids, id_ in zip(sequences, token.tolist(), strict=True):
                ids.append(id_)
            logits = decoder.next(token)


def test_a_trial_trains_and_leaves_nothing_behind(world: World, tmp_path: Path) -> None:
    record = run_trial(world, BY_NAME["brief"], "feedback", 0, SMALL)
    assert [step["reason"] for step in record["requests"]] == ["Succeeded"] * 2
    assert all(step["jsd_after"] != step["metadata"]["jsd"] for step in record["requests"])
    assert sorted(record["compliance"]) == [0, 1, 2]
    assert list(tmp_path.iterdir()) == []


def test_without_words_there_is_nothing_to_learn(world: World) -> None:
    record = run_trial(world, BY_NAME["brief"], "empty", 0, SMALL)
    assert [step["reason"] for step in record["requests"]] == ["NoSignal"] * 2
    assert record["answers"][0] == record["answers"][1] == record["answers"][2]
    assert record["probes"][0] == record["probes"][2]


@pytest.mark.timeout(600)
def test_oracle_14_in_small_feedback_teaches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real small model, one preference, one seed, twelve small requests. Untrained it complies in 1 answer of 24,
    and under shuffled words it ended at none; with the words it ended at 7."""
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    small = Settings(
        training={"learningRate": 4e-4}, requests=12, samples=2, judge_every=12, held_out=24, draws=1, max_tokens=32
    )
    record = run_trial(World(tmp_path, threads=2), BY_NAME["friend"], "feedback", 0, small)
    start, end = ends(record["compliance"])
    before, after = ends(record["probes"])
    assert start <= 1 / 24
    assert end >= 4 / 24
    assert falls(record)[0] >= 11
    assert after["facts"] >= 0.9 * before["facts"] and after["nll"] <= before["nll"] / 0.9


def trial(arm: str, end: float) -> dict[str, Any]:
    same = {"facts": 0.7, "nll": 3.0}
    step = {"reason": "Succeeded", "jsd_after": 0.01, "metadata": {"jsd": 0.02}}
    return {
        "preference": "brief",
        "arm": arm,
        "seed": 0,
        "settings": {"held_out": 48, "draws": 2},
        "compliance": {"0": 0.1, "5": 0.9, "20": end},
        "probes": {"0": same, "20": same},
        "requests": [{"reason": "NoSignal"}] if arm == "empty" else [step],
    }


def test_the_verdict_asks_for_everything_that_the_oracle_asks_for() -> None:
    good = [trial("feedback", 0.8), trial("shuffled", 0.15), trial("empty", 0.1)]
    assert verdict(good) == []
    for index, change in [
        (0, {"compliance": {"0": 0.1, "20": 0.15}}),  # within the noise
        (0, {"probes": {"0": {"facts": 0.7, "nll": 3.0}, "20": {"facts": 0.6, "nll": 3.0}}}),
        (0, {"probes": {"0": {"facts": 0.7, "nll": 3.0}, "20": {"facts": 0.7, "nll": 3.4}}}),
        (0, {"requests": [{"reason": "Succeeded", "jsd_after": 0.03, "metadata": {"jsd": 0.02}}]}),
        (1, {"compliance": {"0": 0.1, "20": 0.8}}),
        (2, {"requests": [{"reason": "Succeeded"}]}),
    ]:
        records = copy.deepcopy(good)
        records[index] |= change
        assert len(verdict(records)) == 1, change
