"""The whole server on a real model: its numbers are those of a plain forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from claas_teacher.client import TeacherClient
from claas_teacher.errors import TeacherRefused
from claas_teacher.fingerprint import fingerprint
from claas_teacher.scores import Scores
from vllmserver import TeacherServer

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4

QUESTION = "Write a function to calculate factorial, and say in one sentence how it ends.\n"
ANSWER = """def factorial(n):
    if n <= 1:
        return 1
    return n * factorial(n-1)
# Übrigens: 5! = 120, naïve façade, 日本."""


@pytest.fixture(scope="module")
def client(teacher_server: TeacherServer) -> Iterator[TeacherClient]:
    with TeacherClient(teacher_server.url) as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(teacher_server: TeacherServer) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(teacher_server.model)


@pytest.fixture(scope="module")
def model(teacher_server: TeacherServer) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(teacher_server.model, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def samples(tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """(prompt, response) ids: short, longer than one step of the scheduler (128 tokens), and a single token each."""
    question, answer = tokenizer.encode(QUESTION), tokenizer.encode(ANSWER)
    return [(question, answer), (question * 5, answer * 4), (question[:1], answer[:1])]


def reference(model: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """(N, V) log-softmax of a forward pass, float32, on the response's rows."""
    import torch

    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0]  # (L, V)
    rows = logits[len(prompt) - 1 : -1]  # token t is scored by row len(prompt) - 1 + t
    return torch.log_softmax(rows.float(), dim=-1).numpy()


def assert_same(scores: Scores, expected: np.ndarray, response: list[int], k: int) -> None:
    """Every number of `scores` is the forward pass's, and the ids are its K most likely and the token."""
    positions = np.arange(len(response))
    np.testing.assert_allclose(scores.chosen, expected[positions, response], atol=TOLERANCE, rtol=0)
    for t in positions:
        ids = scores.ids[t][scores.ids[t] >= 0]
        assert response[t] in ids
        np.testing.assert_allclose(scores.logprobs[t][: len(ids)], expected[t][ids], atol=TOLERANCE, rtol=0)
        kth = np.sort(expected[t])[-k]
        beyond = [i for i in ids if expected[t][i] < kth - TOLERANCE]
        assert len(ids) in (k, k + 1)
        assert beyond in ([], [response[t]])
        assert len(ids) == k or expected[t][response[t]] <= kth + TOLERANCE


@pytest.mark.parametrize("k", [1, 20, 100])
def test_scores_are_those_of_a_forward_pass(client: TeacherClient, model: Any, samples: Any, k: int) -> None:
    scored = client.score_batch(samples, k)
    for (prompt, response), scores in zip(samples, scored, strict=True):
        assert scores.ids.shape == (len(response), k + 1)
        assert_same(scores, reference(model, prompt, response), response, k)


def test_the_same_sample_alone_and_in_company_scores_the_same(client: TeacherClient, samples: Any) -> None:
    (prompt, response), *_ = samples
    alone = client.score(prompt, response, 20)
    for scores in client.score_batch([samples[0]] * 4, 20):
        np.testing.assert_allclose(scores.chosen, alone.chosen, atol=TOLERANCE, rtol=0)


def test_it_was_not_ready_before_a_scoring_had_gone_through(teacher_server: TeacherServer) -> None:
    *before, last = teacher_server.waited
    assert last == (200, "Ready")
    assert before in ([], [(503, "WarmingUp")])  # none where the scoring is over before the first question
    assert "warm-up: 64 tokens scored" in teacher_server.log.read_text(errors="replace")


def test_info_names_the_tokenizer_that_others_load(
    client: TeacherClient, tokenizer: Any, teacher_server: TeacherServer
) -> None:
    info = client.info()
    assert info.tokenizer_fingerprint == fingerprint(tokenizer)
    assert info.model == teacher_server.model
    assert info.max_logprobs == 100
    assert info.vocab_size == len(tokenizer)
    assert info.dtype == "float32"


def test_its_limits_are_refused_by_the_server_as_the_client_foretells(
    client: TeacherClient, teacher_server: TeacherServer
) -> None:
    info = client.info()

    def ask(**changes: Any) -> int:
        body = {"model": info.model, "prompt": [1, 2], "max_tokens": 1, "prompt_logprobs": 1, **changes}
        return httpx.post(f"{teacher_server.url}/v1/completions", json=body, timeout=60).status_code

    assert ask() == 200
    assert ask(prompt_logprobs=info.max_logprobs + 1) == 400
    assert ask(prompt=[info.vocab_size]) == 400
    assert ask(prompt=[1] * info.max_model_len) == 400
    assert ask(model="another") == 404
    with pytest.raises(TeacherRefused, match="teacherTopK"):
        client.score([1], [2], info.max_logprobs + 1)


def test_no_text_and_no_ids_reach_the_log(teacher_server: TeacherServer, client: TeacherClient, samples: Any) -> None:
    prompt, response = samples[0]
    client.score(prompt, response, 1)
    httpx.post(f"{teacher_server.url}/v1/completions", json={"prompt": QUESTION, "max_tokens": "x"}, timeout=60)
    log = teacher_server.log.read_text(errors="replace")
    assert "/v1/completions" in log  # it is the log
    assert "factorial" not in log
    assert ", ".join(map(str, response[:4])) not in log
