"""Our routes on vLLM's server, by its `vllm.endpoint_plugins` entry point.

GET /claas/v1/ready  200 once one scoring with the most logprobs has gone through the engine, for the first one compiles
                     for seconds; 503 before, and again when the engine is dead. {"ready", "reason", "message"}
GET /claas/v1/info   the model, the tokenizer's fingerprint, limits and versions (`client.TeacherInfo`)

vLLM is imported only where it is used, so this module loads without it.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from argparse import Namespace
from importlib import metadata
from typing import Any

from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse

from claas_teacher.client import INFO_PATH
from claas_teacher.defaults import MAX_LOGPROBS
from claas_teacher.fingerprint import fingerprint

READY_PATH = "/claas/v1/ready"
WARM_UP_TOKENS_CPU = 64  # compiles as much as 2,048 do, in 5 s on two busy cores instead of 12

logger = logging.getLogger("vllm.claas_teacher")  # below vLLM's logger, so that its format and level hold
router = APIRouter(tags=["claas"])


class Teacher:
    """What the routes know of one engine. Made as the server starts; the warm-up runs beside it from then on."""

    def __init__(self, engine: Any, model: str) -> None:
        import vllm
        from vllm.platforms import current_platform

        config = engine.model_config
        self._engine = engine
        step_tokens = engine.vllm_config.scheduler_config.max_num_batched_tokens
        warm_up_tokens = WARM_UP_TOKENS_CPU if current_platform.is_cpu() else step_tokens
        self._warm_up_tokens = min(warm_up_tokens, step_tokens, config.max_model_len - 1)
        self._vocab_size: int = config.get_vocab_size()
        self._max_logprobs: int = self._vocab_size if config.max_logprobs == -1 else config.max_logprobs
        self.info: dict[str, Any] = {
            "model": model,
            "tokenizer_fingerprint": _fingerprint(engine),
            "vocab_size": self._vocab_size,
            "max_logprobs": self._max_logprobs,
            "max_model_len": config.max_model_len,
            "dtype": str(config.dtype).removeprefix("torch."),
            "vllm_version": vllm.__version__,
            "claas_version": metadata.version("claas"),
        }
        self.warm_up = asyncio.create_task(self._score_once())
        self.warm_up.add_done_callback(_log_failure)

    async def _score_once(self) -> None:
        """What must compile does so now.

        On a GPU it is the largest step that the scheduler takes, so what may run out of memory does so now, too.
        """
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        started = time.monotonic()
        parameters = SamplingParams(
            max_tokens=1,
            prompt_logprobs=min(self._max_logprobs, MAX_LOGPROBS),
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )
        ids = [token % self._vocab_size for token in range(self._warm_up_tokens)]
        (prompt,) = await self._engine.renderer.render_cmpl_async([{"prompt_token_ids": ids}])
        scored = 0
        async for output in self._engine.generate(prompt, parameters, f"claas-warm-up-{uuid.uuid4()}"):
            scored = len(output.prompt_logprobs or ())
        if scored != self._warm_up_tokens:
            raise RuntimeError(f"the warm-up sent {self._warm_up_tokens} tokens and {scored} were scored")
        logger.info("warm-up: %d tokens scored in %.1f s", scored, time.monotonic() - started)

    def readiness(self) -> tuple[bool, str, str]:
        """Whether to send requests here; if not, a reason in one word and a sentence."""
        if self._engine.errored:
            return False, "EngineDead", "the engine has stopped; the server is about to end"
        if not self.warm_up.done():
            return False, "WarmingUp", "the first scoring is still running"
        if self.warm_up.cancelled():
            return False, "Stopping", "the server is stopping"
        if error := self.warm_up.exception():
            return False, "WarmUpFailed", f"the first scoring failed: {type(error).__name__}; the log says more"
        return True, "Ready", "a scoring has gone through the engine"


class EndpointPlugin:
    """vLLM's protocol of that name. Servers without an engine that generates do not load it."""

    name = "claas"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the warm-up. Runs in the server's event loop, before it accepts connections."""
        state.claas = Teacher(engine_client, args.served_model_name[0] if args.served_model_name else args.model)


def _fingerprint(engine: Any) -> str | None:
    try:
        return fingerprint(engine.get_tokenizer())
    except (TypeError, ValueError) as error:  # a slow tokenizer, or --skip-tokenizer-init
        logger.warning("no tokenizer fingerprint: %s", error)
        return None


def _log_failure(warm_up: asyncio.Task[None]) -> None:
    if not warm_up.cancelled() and (error := warm_up.exception()):
        logger.error("warm-up failed: this server will not become ready", exc_info=error)


def endpoint_plugin() -> EndpointPlugin:
    """What the entry point names."""
    return EndpointPlugin()


@router.get(READY_PATH)
async def ready(request: Request) -> JSONResponse:
    """For readiness probes, and for whoever waits for the teacher."""
    is_ready, reason, message = request.app.state.claas.readiness()
    return JSONResponse({"ready": is_ready, "reason": reason, "message": message}, 200 if is_ready else 503)


@router.get(INFO_PATH)
async def info(request: Request) -> JSONResponse:
    """Who answers here and within which limits; known before the server is ready."""
    return JSONResponse(request.app.state.claas.info)
