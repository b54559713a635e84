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
import pytest
from fastapi import FastAPI

from claas_teacher.plugin import INFO_PATH, READY_PATH, endpoint_plugin

pytestmark = pytest.mark.vllm  # the scoring's parameters are vLLM's own


class Engine:
    """As much of vLLM's engine client as a scoring needs; `release` lets the scoring end."""

    def __init__(self, rows: int | None = None, error: Exception | None = None) -> None:
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

    async def render_cmpl_async(self, prompts: list[Any]) -> list[Any]:
        return prompts

    async def generate(self, prompt: Any, parameters: Any, request_id: str) -> AsyncIterator[Any]:
        self.asked = (prompt, parameters)
        await self.release.wait()
        if self.error:
            raise self.error
        yield SimpleNamespace(
            prompt_logprobs=[None] * (len(prompt["prompt_token_ids"]) if self.rows is None else self.rows)
        )


class Served:
    """The routes over `engine`, asked without a socket."""

    def __init__(self, engine: Engine) -> None:
        self.engine, self.app = engine, FastAPI()
        self.http = httpx.AsyncClient(transport=httpx.ASGITransport(self.app), base_url="http://teacher")

    async def __aenter__(self) -> Self:
        plugin = endpoint_plugin()
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
        found = (await teacher.http.get(INFO_PATH)).json()
    assert found["model"] == "alias"
    assert found["tokenizer_fingerprint"] is None
    assert (found["max_logprobs"], found["max_model_len"], found["vocab_size"]) == (100, 512, 50)
