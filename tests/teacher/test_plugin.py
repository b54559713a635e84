"""The routes on an app of their own; the engine is a stand-in, for its deaths and delays cannot be had on order.

`test_server.py` has the real one.
"""

from __future__ import annotations

import asyncio
from argparse import Namespace
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any, Self

import httpx
import numpy as np
import pytest
from fastapi import FastAPI
from prometheus_client import CollectorRegistry

from claas_teacher import wire
from claas_teacher.client import QUEUE_HEADER, SCORE_PATH, TIMEOUT_HEADER
from claas_teacher.defaults import QUEUE_TOKENS_VARIABLE
from claas_teacher.plugin import INFO_PATH, READY_PATH, EndpointPlugin

pytestmark = pytest.mark.vllm  # the scoring's parameters are vLLM's own


class Engine:
    """As much of vLLM's engine client as a scoring needs; `release` lets the scoring end."""

    def __init__(self, rows: int | None = None, error: Exception | None = None, logprob: float = -6.0) -> None:
        self.logprob = logprob
        self.aborted = 0
        self.shut_down: list[float | None] = []
        self.model_config = SimpleNamespace(
            max_model_len=512, max_logprobs=100, dtype="torch.float32", get_vocab_size=lambda: 50
        )
        self.vllm_config = SimpleNamespace(scheduler_config=SimpleNamespace(max_num_batched_tokens=32))
        self.renderer = self
        self.errored = False
        self.release = asyncio.Event()
        self.rows, self.error = rows, error
        self.asked: Any = None

    def get_tokenizer(self) -> Any:
        raise ValueError("the server was started with --skip-tokenizer-init")

    def shutdown(self, timeout: float | None = None) -> None:
        self.shut_down.append(timeout)

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        return prompts

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked = (prompt, parameters)
        try:
            await self.release.wait()
        except asyncio.CancelledError:
            self.aborted += 1
            raise
        if self.error:
            raise self.error
        ids, k = prompt["prompt_token_ids"], parameters.prompt_logprobs
        rows = len(ids) - 1 if self.rows is None else self.rows
        yield SimpleNamespace(
            prompt_logprobs=SimpleNamespace(
                logprob_token_ids=np.stack([[ids[1 + t], *range(100, 100 + k)] for t in range(rows)] or [[]]),
                logprobs=np.full((rows, k + 1), self.logprob, np.float32),
            )
        )


class Served:
    """The routes over `engine`, asked without a socket."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.app = engine, FastAPI()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://teacher")

    async def __aenter__(self) -> Self:
        plugin = EndpointPlugin(CollectorRegistry())
        plugin.attach_router(self.app)
        await plugin.init_state(self.engine, self.app.state, Namespace(served_model_name=["alias"], model="/models/x"))
        return self

    async def __aexit__(self, *error: object) -> None:
        self.engine.release.set()
        await asyncio.wait({self.app.state.claas.warm_up}, timeout=10)
        await self.http.aclose()

    async def ready(self) -> tuple[int, str]:
        """Status and reason of /ready."""
        answer = await self.http.get(READY_PATH)
        assert answer.json()["ready"] == (answer.status_code == 200)
        return answer.status_code, answer.json()["reason"]

    async def ready_after_the_scoring(self) -> tuple[int, str]:
        """The same, once the scoring has ended."""
        self.engine.release.set()
        await asyncio.wait({self.app.state.claas.warm_up}, timeout=10)
        return await self.ready()


async def test_it_is_ready_after_the_scoring_and_not_before() -> None:
    engine = Engine()
    async with Served(engine) as teacher:
        assert await teacher.ready() == (503, "WarmingUp")
        assert await teacher.ready_after_the_scoring() == (200, "Ready")
        engine.errored = True
        assert await teacher.ready() == (503, "EngineDead")
    prompt, parameters = engine.asked
    assert len(prompt["prompt_token_ids"]) == 32  # one whole step of the scheduler
    assert max(prompt["prompt_token_ids"]) < 50
    assert parameters.prompt_logprobs == 100


@pytest.mark.parametrize("engine", [{"error": RuntimeError("out of memory")}, {"rows": 3}, {"rows": 0}])
async def test_a_failed_scoring_never_becomes_ready(engine: dict[str, Any]) -> None:
    async with Served(Engine(**engine)) as teacher:
        assert await teacher.ready_after_the_scoring() == (503, "WarmUpFailed")


async def test_info_is_known_before_it_is_ready_and_lacks_a_fingerprint_without_a_tokenizer() -> None:
    async with Served(Engine()) as teacher:
        await until(lambda: teacher.app.state.claas.admission.queued_tokens)
        found = (await teacher.http.get(INFO_PATH)).json()
    assert found["model"] == "alias"
    assert found["tokenizer_fingerprint"] is None
    assert (found["max_logprobs"], found["max_model_len"], found["vocab_size"]) == (100, 512, 50)
    assert found["features"] == {"arrays": False, "chosen_ids": False}
    assert found["wire_version"] == wire.VERSION
    assert found["queue_tokens"] == 32  # the warm-up


def frame(prompt: int = 3, response: int = 2, width: int = 4, **more: Any) -> bytes:
    sample = wire.Sample(*(np.arange(n, dtype=np.int32) % 50 for n in (prompt, response)))
    return wire.encode_request(wire.Request((sample,), width, **more))


async def ask(teacher: Served, body: bytes, **headers: str) -> httpx.Response:
    return await teacher.http.post(SCORE_PATH, content=body, headers=headers)


async def until(condition: Any) -> None:
    """Let the loop run until it is so."""
    for _ in range(100_000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("did not come true")


async def test_a_frame_is_answered_by_its_scores() -> None:
    engine = Engine()
    async with Served(engine) as teacher:
        await teacher.ready_after_the_scoring()
        body = frame(model="alias")
        answer = await ask(teacher, body)
    assert answer.status_code == 200 and answer.headers["content-type"] == wire.MEDIA_TYPE
    (scores,) = wire.decode_answer(answer.content, wire.decode_request(body), body)
    assert scores.ids.tolist() == [[0, 100, 101, 102, 103], [1, 100, 101, 102, 103]]
    assert (scores.logprobs == -6).all()
    assert engine.asked[0]["prompt_token_ids"] == [0, 1, 2, 0, 1]
    assert (engine.asked[1].max_tokens, engine.asked[1].prompt_logprobs) == (1, 4)
    assert engine.asked[1].detokenize is False


CHOSEN = wire.encode_request(
    wire.Request((wire.Sample(np.zeros(2, np.int32), np.zeros(1, np.int32), np.zeros((1, 3), np.int32)),), 3, True)
)


@pytest.mark.parametrize(
    ("body", "status", "reason", "words"),
    [
        (b"", 400, "InternalError", "at least 52 bytes"),
        (frame()[:-1], 400, "InternalError", "its lengths make"),
        (frame(model="another"), 409, "TeacherUnavailable", "serves alias"),
        (frame(fingerprint="ab" * 32), 409, "TokenizerMismatch", "another tokenizer"),
        (frame(response=0), 422, "EmptyResponse", "no tokens"),
        (frame(width=101), 422, "InvalidSpec", "teacherTopK is 101"),
        (frame(prompt=50, response=48, width=1)[:-4] + b"\x32\0\0\0", 422, "TokenizerMismatch", "vocabulary of 50"),
        (frame(prompt=40, response=20)[:-4] + b"\xff\xff\xff\xff", 422, "TokenizerMismatch", "vocabulary of 50"),
        (frame(prompt=500, response=12), 422, "PromptTooLong", "511"),
        (frame(prompt=1, response=511), 422, "ResponseTooLong", "511"),
        (CHOSEN, 501, "InvalidSpec", "support"),
        (bytes(300_000_000), 413, "PromptTooLong", "larger than"),
    ],
    ids=lambda value: str(value)[:20],
)
async def test_what_it_cannot_score_is_a_problem_document(body: bytes, status: int, reason: str, words: str) -> None:
    async with Served(Engine()) as teacher:
        answer = await ask(teacher, body)
    problem = answer.json()
    assert (answer.status_code, problem["status"], problem["reason"]) == (status, status, reason)
    assert answer.headers["content-type"] == "application/problem+json"
    assert words in problem["detail"]
    assert problem["retryable"] == (reason == "TeacherUnavailable")


@pytest.mark.parametrize(
    ("engine", "reason", "retryable"),
    [
        ({"logprob": float("nan")}, "NonFiniteInput", False),
        ({"logprob": 0.5}, "NonFiniteInput", False),
        ({"rows": 3}, "TeacherUnavailable", True),
        ({"error": RuntimeError("ids 1, 2, 3")}, "TeacherUnavailable", True),
    ],
    ids=str,
)
async def test_an_engine_that_fails_is_a_problem_document(engine: dict[str, Any], reason: str, retryable: bool) -> None:
    async with Served(Engine(**engine)) as teacher:
        teacher.engine.release.set()
        answer = await ask(teacher, frame())
    assert answer.status_code == 500
    assert (answer.json()["reason"], answer.json()["retryable"]) == (reason, retryable)
    assert "1, 2, 3" not in answer.text


async def test_a_dead_engine_says_so() -> None:
    async with Served(Engine(error=RuntimeError())) as teacher:
        teacher.engine.release.set()
        teacher.engine.errored = True
        answer = await ask(teacher, frame())
    assert (answer.status_code, answer.json()["reason"]) == (503, "TeacherUnavailable")


async def test_the_deadline_aborts_in_the_engine() -> None:
    engine = Engine()
    async with Served(engine) as teacher:
        answer = await ask(teacher, frame(), **{TIMEOUT_HEADER: "50"})
        assert (answer.status_code, answer.json()["reason"]) == (504, "TeacherUnavailable")
        assert engine.aborted == 1
        assert answer.headers[QUEUE_HEADER] == "32"  # the warm-up alone
        assert (await ask(teacher, frame(), **{TIMEOUT_HEADER: "soon"})).status_code == 400


async def test_a_client_that_hangs_up_aborts_in_the_engine() -> None:
    engine = Engine()
    async with Served(engine) as teacher:
        gone, sent = asyncio.Event(), [{"type": "http.request", "body": frame(), "more_body": False}]

        async def receive() -> Any:
            if sent:
                return sent.pop()
            await gone.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            """Nobody listens."""

        scope = {"type": "http", "method": "POST", "path": SCORE_PATH, "query_string": b"", "headers": []}
        call = asyncio.create_task(teacher.app(scope, receive, send))
        await until(lambda: teacher.app.state.claas.admission.engine_tokens == 32 + 5)
        gone.set()
        await call
        assert engine.aborted == 1
        assert teacher.app.state.claas.admission.queued_tokens == 32


async def test_past_the_limit_it_says_when_to_come_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(QUEUE_TOKENS_VARIABLE, "600")
    engine = Engine()
    async with Served(engine) as teacher:
        first = asyncio.create_task(ask(teacher, frame(prompt=450, response=40)))
        await until(lambda: teacher.app.state.claas.admission.queued_tokens == 32 + 490)
        answer = await ask(teacher, frame(prompt=45, response=40))
        assert answer.status_code == 429
        assert int(answer.headers["retry-after"]) >= 1
        engine.release.set()
        assert (await first).status_code == 200


async def test_shutting_down_finishes_what_is_under_way() -> None:
    engine = Engine()
    async with Served(engine) as teacher:
        call = asyncio.create_task(ask(teacher, frame()))
        await until(lambda: teacher.app.state.claas.admission.engine_tokens == 32 + 5)
        stop = asyncio.create_task(asyncio.to_thread(engine.shutdown, 30.0))  # as vLLM's server does on SIGTERM
        await until(lambda: teacher.app.state.claas.draining)
        assert await teacher.ready() == (503, "Stopping")
        refused = await ask(teacher, frame())
        assert (refused.status_code, refused.headers["retry-after"]) == (503, "1")
        assert not engine.shut_down
        engine.release.set()
        assert (await call).status_code == 200
        await stop
        assert engine.shut_down == [30.0]
