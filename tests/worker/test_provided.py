"""teacher.mode Provided: the four payload shapes, and what each makes of a payload that is not the response's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

import models
from claas_worker.errors import LogprobLengthMismatch, NonFiniteInput
from claas_worker.job import InvalidSpec
from claas_worker.provided import Scored, TokenTexts, parse
from payloads import SHAPES, Row

RESPONSE = "def add(a, b):\n    return a + b 🎒"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(models.qwen_tokenizer_dir())


@pytest.fixture(scope="module")
def texts(tokenizer: Any) -> TokenTexts:
    return TokenTexts(tokenizer)


@pytest.fixture(scope="module")
def ids(tokenizer: Any) -> list[int]:
    return [*tokenizer(RESPONSE)["input_ids"], tokenizer.eos_token_id]


def read(payload: Any, ids: list[int], texts: TokenTexts, dropped: int = 0) -> Scored:
    return parse(payload, ids, dropped, texts, "samples[0].teacherLogprobs")


def row(scored: Scored, t: int) -> dict[int, float]:
    """The support of one position, without padding."""
    entries = zip(scored.support_ids[t].tolist(), scored.logprobs[t].tolist(), strict=True)
    return {token: pytest.approx(value) for token, value in entries if token >= 0}


def word(tokenizer: Any, token: int) -> str:
    return str(tokenizer.decode([token]))


def chosen(ids: list[int]) -> list[float]:
    return [-0.1 * t for t in range(len(ids))]


def rows_of(ids: list[int]) -> list[Row]:
    """One and the same teacher for every shape: -0.1 t for the response's tokens, -3 for the id 1000."""
    return [Row(token, -0.1 * t, {1000: -3.0}) for t, token in enumerate(ids)]


def payload_of(shape: str, ids: list[int], tokenizer: Any) -> Any:
    return SHAPES[shape](rows_of(ids), tokenizer)


def test_floats_are_the_chosen_tokens_alone(ids: list[int], texts: TokenTexts) -> None:
    scored = read(chosen(ids), ids, texts)
    assert scored.chosen_only
    assert scored.support_ids.squeeze(1).tolist() == ids
    torch.testing.assert_close(scored.logprobs.squeeze(1), torch.tensor(chosen(ids)))


@pytest.mark.parametrize("shape", ["vllm", "legacy", "fireworks"])
def test_the_other_shapes_say_the_same(ids: list[int], texts: TokenTexts, tokenizer: Any, shape: str) -> None:
    scored = read(payload_of(shape, ids, tokenizer), ids, texts)
    assert not scored.chosen_only
    for t, token in enumerate(ids):
        assert row(scored, t) == {token: -0.1 * t, 1000: -3.0}


def test_ids_win_over_text(ids: list[int], texts: TokenTexts, tokenizer: Any) -> None:
    """Wrong words beside right ids; the other way round, a wrong id beside the right word is refused."""
    payload = payload_of("fireworks", ids, tokenizer)
    for entry in payload["content"]:
        entry["token"] = "wombat"
    assert row(read(payload, ids, texts), 3) == {ids[3]: -0.3, 1000: -3.0}
    payload = payload_of("fireworks", [ids[0] + 1, *ids[1:]], tokenizer)
    payload["content"][0]["token"] = word(tokenizer, ids[0])
    with pytest.raises(LogprobLengthMismatch, match="position 0"):
        read(payload, ids, texts)


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("shape", ["vllm", "legacy", "fireworks"])
def test_an_echo_of_prompt_and_response_is_cut(
    ids: list[int], texts: TokenTexts, tokenizer: Any, shape: str, after: int
) -> None:
    """With the prompt before, and a generated token behind, as servers answer that must generate one."""
    prompt = tokenizer("Write add.")["input_ids"]
    everything = [*prompt, *ids, *([1000] * after)]
    payload = payload_of(shape, everything, tokenizer)
    if shape == "vllm":
        payload[0] = None
        payload = {"prompt_logprobs": payload}
    if shape == "legacy":
        payload["token_logprobs"][0] = payload["top_logprobs"][0] = None
    scored = read(payload, ids, texts)
    for t, token in enumerate(ids):
        assert row(scored, t)[token] == pytest.approx(-0.1 * (t + len(prompt)), abs=1e-5)


def test_a_truncated_responses_head_is_taken(ids: list[int], texts: TokenTexts, tokenizer: Any) -> None:
    for payload in (payload_of(shape, ids, tokenizer) for shape in SHAPES):
        scored = read(payload, ids[:4], texts, dropped=len(ids) - 4)
        assert [row(scored, t)[token] for t, token in enumerate(ids[:4])] == pytest.approx([0, -0.1, -0.2, -0.3])


@pytest.mark.parametrize("extra", [-1, 1])
def test_too_few_or_too_many_tokens_are_refused(ids: list[int], texts: TokenTexts, extra: int) -> None:
    payload = chosen(ids)[:-1] if extra < 0 else [*chosen(ids), -1.0]
    with pytest.raises(LogprobLengthMismatch, match=f"{len(payload)} .* {len(ids)} tokens") as caught:
        read(payload, ids, texts)
    assert ("end-of-turn" in str(caught.value)) == (extra < 0)


def test_another_responses_logprobs_are_refused(ids: list[int], texts: TokenTexts, tokenizer: Any) -> None:
    other = [*ids[:2], 1000, *ids[3:]]
    for payload in (payload_of(shape, other, tokenizer) for shape in ("legacy", "fireworks")):
        with pytest.raises(LogprobLengthMismatch, match="position 2"):
            read(payload, ids, texts)
    with pytest.raises(LogprobLengthMismatch, match="position 2"):
        read(payload_of("vllm", [*ids[:2], 999, *ids[3:]], tokenizer), ids, texts)


def test_texts_that_are_no_single_id_leave_their_mass_to_the_tail(
    ids: list[int], texts: TokenTexts, tokenizer: Any
) -> None:
    payload = payload_of("legacy", ids, tokenizer)
    payload["top_logprobs"][0] = {"two words at once": -0.5, "bytes:\\xf0": -1.0, "token_id:77": -2.0}
    assert row(read(payload, ids, texts), 0) == {ids[0]: 0.0, 77: -2.0}


@pytest.mark.parametrize(
    ("value", "error"),
    [
        (math.nan, NonFiniteInput),
        (0.5, NonFiniteInput),
        (math.inf, NonFiniteInput),
        (None, NonFiniteInput),
        ("-1", InvalidSpec),
        (True, InvalidSpec),
    ],
)
def test_what_is_no_logprob_is_refused(
    ids: list[int], texts: TokenTexts, tokenizer: Any, value: Any, error: type[Exception]
) -> None:
    by_id = [{str(ids[0]): {"logprob": value}}, *payload_of("vllm", ids, tokenizer)[1:]]
    for payload in ([value, *chosen(ids)[1:]], by_id):
        with pytest.raises(error, match=r"samples\[0\]"):
            read(payload, ids, texts)


def test_minus_9999_is_no_mass(ids: list[int], texts: TokenTexts, tokenizer: Any) -> None:
    payload = payload_of("vllm", ids, tokenizer)
    payload[0]["1000"]["logprob"] = -9999.0
    assert row(read(payload, ids, texts), 0)[1000] == -math.inf


@pytest.mark.parametrize("payload", [{}, {"tokens": ["a"]}, {"content": [1]}, [[]], {"prompt_logprobs": 3}, ["wombat"]])
def test_an_unknown_shape_is_refused_without_being_quoted(ids: list[int], texts: TokenTexts, payload: Any) -> None:
    with pytest.raises(InvalidSpec, match=r"samples\[0\]\.teacherLogprobs") as caught:
        read(payload, ids, texts)
    assert "wombat" not in str(caught.value)
