"""The whole server on a real model: its numbers are those of a plain forward pass."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import pytest

from claas_teacher import wire
from claas_teacher.client import QUEUE_HEADER, SCORE_PATH, TIMEOUT_HEADER, TeacherClient
from claas_teacher.errors import TeacherError, TeacherRefused
from claas_teacher.fingerprint import fingerprint
from claas_teacher.scores import Scores
from stockserver import stock
from vllmserver import TeacherServer

pytestmark = pytest.mark.vllm
TOLERANCE = 1e-4

MARKER = "the wombat sings at dawn"
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
    assert info.frames
    found = httpx.get(f"{teacher_server.url}/claas/v1/info", timeout=60).json()
    # vLLM hands out its tensors; only a GPU's V2 runner gathers chosen ids.
    assert found["features"] == {"arrays": True, "chosen_ids": False}
    assert found["queue_tokens"] == 0


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


def test_nothing_of_a_sample_is_told(teacher_server: TeacherServer, tokenizer: Any) -> None:
    """A marker in prompts and responses, of scorings that succeed or fail: in no log, metric or answer."""
    url, marker = teacher_server.url, tokenizer.encode(MARKER)
    response = [*marker, *tokenizer.encode(ANSWER)]
    frame, begun = frame_of((marker, response)), teacher_server.log.stat().st_size

    def post(path: str, **given: Any) -> httpx.Response:
        return httpx.post(f"{url}{path}", timeout=60, **given)

    long = [*marker * (2048 // len(marker) + 1)]
    answers = {
        "scored": (200, post(SCORE_PATH, content=frame)),
        "cut": (400, post(SCORE_PATH, content=frame[:-3])),
        "no frame": (400, post(SCORE_PATH, content=f"{MARKER} {MARKER}")),
        "too long": (422, post(SCORE_PATH, content=frame_of((long, response)))),
        "too wide": (422, post(SCORE_PATH, content=frame_of((marker, response), width=4000))),
        "no token": (422, post(SCORE_PATH, content=frame_of((marker, [*response, 10**6])))),
        "late": (504, post(SCORE_PATH, content=frame_of(([*long[:1000]], response)), headers={TIMEOUT_HEADER: "1"})),
        "no number": (400, post("/v1/completions", json={"prompt": MARKER, "max_tokens": "x"})),
        "no body": (400, post("/v1/completions", content=MARKER, headers={"content-type": "application/json"})),
        "too many": (400, post("/v1/completions", json={"prompt": long, "max_tokens": 1, "prompt_logprobs": 5})),
        "completed": (200, post("/v1/completions", json={"prompt": MARKER, "max_tokens": 1})),
    }
    assert {name: answer.status_code for name, (_, answer) in answers.items()} == {
        name: code for name, (code, _) in answers.items()
    }
    told = {name: answer.text for name, (_, answer) in answers.items() if name not in ("scored", "completed")}
    with TeacherClient(url) as client:
        for number, (prompt, those, k) in enumerate([(long, response, 1), (marker, response, 4000)]):
            with pytest.raises(TeacherError) as caught:
                client.score(prompt, those, k)
            told[f"client's error {number}"] = str(caught.value)
    told["metrics"] = httpx.get(f"{url}/metrics", timeout=60).text
    told["log"] = teacher_server.log.read_bytes()[begun:].decode(errors="replace")
    assert "/v1/completions" in told["log"] and "claas_teacher_requests_total" in told["metrics"]  # it is they
    ids = [", ".join(map(str, some[:4])) for some in (marker, response[len(marker) :])]
    for where, text in told.items():
        assert MARKER not in text, f"text of a sample in {where}: {text[:500]}"
        assert not [run for run in ids if run in text], f"ids of a sample in {where}: {text[:500]}"


def frame_of(*samples: tuple[list[int], list[int]], width: int = 20) -> bytes:
    made = (wire.Sample(np.array(prompt, np.int32), np.array(response, np.int32)) for prompt, response in samples)
    return wire.encode_request(wire.Request(tuple(made), width))


@pytest.mark.parametrize("k", [1, 20, 100])
def test_frames_are_what_a_stock_vllm_says_in_json(
    client: TeacherClient, teacher_server: TeacherServer, samples: Any, k: int
) -> None:
    """One by one, so that the engine computes the same both times; other batches differ by rounding."""
    with stock(teacher_server.url) as url, TeacherClient(url) as by_json:
        assert not by_json.info().frames
        for prompt, response in samples:
            one, other = client.score(prompt, response, k), by_json.score(prompt, response, k)
            np.testing.assert_array_equal(one.ids, other.ids)
            for name in ("logprobs", "chosen", "tail"):
                np.testing.assert_allclose(getattr(one, name), getattr(other, name), atol=1e-6, rtol=0)


def test_the_rows_and_the_tail_are_a_distribution(client: TeacherClient, model: Any, samples: Any) -> None:
    for prompt, response in samples:
        scores = client.score(prompt, response, 100)
        mass = np.exp(scores.logprobs.astype(np.float64)).sum(1)
        np.testing.assert_allclose(mass + scores.tail, 1, atol=1e-5)
        expected = np.exp(reference(model, prompt, response).astype(np.float64))
        for t in range(len(response)):
            others = np.delete(expected[t], scores.ids[t][scores.ids[t] >= 0]).sum()
            assert scores.tail[t] == pytest.approx(others, abs=1e-4)


def test_a_deadline_ends_the_scoring_in_the_engine(teacher_server: TeacherServer) -> None:
    body = frame_of(([5] * 1000, [6] * 1000))
    answer = httpx.post(f"{teacher_server.url}{SCORE_PATH}", content=body, headers={TIMEOUT_HEADER: "200"}, timeout=60)
    assert (answer.status_code, answer.json()["reason"]) == (504, "TeacherUnavailable")
    assert answer.headers[QUEUE_HEADER] == "0"
    started = time.monotonic()
    assert httpx.post(f"{teacher_server.url}{SCORE_PATH}", content=frame_of(([5], [6])), timeout=60).status_code == 200
    assert time.monotonic() - started < 3  # 2,000 tokens would take longer


def test_metrics_count_scorings_beside_vllms_own(client: TeacherClient, teacher_server: TeacherServer) -> None:
    def read() -> tuple[str, float]:
        text = httpx.get(f"{teacher_server.url}/metrics", timeout=60).text
        rows = [line for line in text.splitlines() if line.startswith("claas_teacher_rows_total")]
        return text, float(rows[0].split()[1])

    _, before = read()
    client.score([1, 2], [3, 4, 5], 2)
    text, after = read()
    assert after - before == 3
    for name in (
        "claas_teacher_seconds_bucket",
        'requests_total{code="200",reason="OK"}',
        "queue_tokens",
        "engine_tokens",
    ):
        assert name in text
    assert "vllm:num_requests_running" in text


async def test_200_at_once_are_served_or_told_to_come_again(teacher_server: TeacherServer) -> None:
    """Bounded memory, short ones do not wait for long ones, and what does not fit gets 429 with a time to wait."""
    rng = np.random.default_rng(5)
    lengths = [96 if number % 2 else 8 for number in range(200)]  # 10,400 tokens; 2,048 may wait
    before = teacher_server.resident_bytes()
    limits = httpx.Limits(max_connections=200)
    async with httpx.AsyncClient(base_url=teacher_server.url, limits=limits, timeout=120) as http:
        started = time.monotonic()

        async def ask(tokens: int) -> tuple[int, float, int]:
            ids = rng.integers(0, 40_000, tokens).tolist()
            answer = await http.post(SCORE_PATH, content=frame_of((ids[:2], ids[2:]), width=100))
            if answer.status_code == 429:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["reason"] == "TeacherUnavailable"
            return answer.status_code, time.monotonic() - started, int(answer.headers[QUEUE_HEADER])

        answers = await asyncio.gather(*map(ask, lengths))
        peak = teacher_server.resident_bytes()
        spent = time.monotonic() - started
    by_code = {code: sum(1 for found, _, _ in answers if found == code) for code in (200, 429)}
    assert sum(by_code.values()) == 200
    assert by_code[200] >= 20 and by_code[429] >= 40
    assert max(queue for _, _, queue in answers) <= 2048
    waits = {
        length: [at for (code, at, _), of in zip(answers, lengths, strict=True) if of == length and code == 200]
        for length in (8, 96)
    }
    print(
        f"{by_code} in {spent:.1f} s; median of short {np.median(waits[8]):.2f} s, of long {np.median(waits[96]):.2f} s"
    )
    assert np.median(waits[8]) < np.median(waits[96])
    assert peak - before < 300 << 20


def test_the_client_waits_its_turn_where_the_queue_is_full(teacher_server: TeacherServer, samples: Any) -> None:
    """Twice what may wait, from one client: none is lost."""
    prompt, response = samples[1]
    count = 4096 // (len(prompt) + len(response)) + 1
    with TeacherClient(teacher_server.url, timeout_s=240, attempts=50, in_flight_tokens=4096, concurrency=8) as many:
        found = many.score_batch([(prompt, response)] * count, 5)
    assert len(found) == count
    for scores in found:
        np.testing.assert_allclose(scores.chosen, found[0].chosen, atol=TOLERANCE, rtol=0)
