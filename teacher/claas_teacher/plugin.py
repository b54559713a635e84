"""Our routes on vLLM's server, by its `vllm.endpoint_plugins` entry point.

POST /claas/v1/score  a batch of responses, scored: frames of `wire`. `Claas-Timeout-Ms` bounds it: what is not done by
                      then is aborted in the engine. Every answer says `Claas-Queue-Tokens`
GET  /claas/v1/ready  200 once one scoring with the most logprobs has gone through this route's code, for the first one
                      compiles for seconds; 503 before, while draining, and when the engine is dead
GET  /claas/v1/info   the model, the tokenizer's fingerprint, limits, versions, features, load (`client.TeacherInfo`)

Errors are problem documents (RFC 9457) with `reason` and `retryable`. On SIGTERM readiness ends, new scorings get 503,
those that are under way are finished, and then vLLM shuts the engine down. vLLM is imported only where it is used.
"""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import time
from argparse import Namespace
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from importlib import metadata
from typing import Any, TypeVar

import numpy as np
from fastapi import APIRouter, FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.requests import ClientDisconnect

from claas_teacher import wire
from claas_teacher.admission import Admission
from claas_teacher.client import INFO_PATH, QUEUE_HEADER, SCORE_PATH, TIMEOUT_HEADER
from claas_teacher.defaults import MAX_LOGPROBS, QUEUE_TOKENS_VARIABLE, queue_tokens
from claas_teacher.engine import Engine
from claas_teacher.errors import QueueFull, TeacherError, TeacherRefused, TeacherUnavailable
from claas_teacher.fingerprint import fingerprint
from claas_teacher.limits import Limits, check
from claas_teacher.metrics import Metrics

READY_PATH = "/claas/v1/ready"
PROBLEM_TYPE = "application/problem+json"
WARM_UP_TOKENS_CPU = 64  # compiles as much as 2,048 do, in 5 s on two busy cores instead of 12
WINDOW_STEPS = 4  # of the scheduler: enough that the engine never waits for us
DEFAULT_TIMEOUT_SECONDS = 600.0
DRAIN_SECONDS = 600.0  # without a --shutdown-timeout of the user's; Kubernetes has its own grace period

logger = logging.getLogger("vllm.claas_teacher")  # below vLLM's logger, so that its format and level hold
router = APIRouter(tags=["claas"])
T = TypeVar("T")


class Teacher:
    """What the routes know of one engine. Made as the server starts; the warm-up runs beside it from then on."""

    def __init__(self, client: Any, model: str, registry: Any = None) -> None:
        import vllm
        from vllm.platforms import current_platform

        config = client.model_config
        self.model = model
        self.engine = Engine(client)
        step_tokens = client.vllm_config.scheduler_config.max_num_batched_tokens
        vocab_size: int = config.get_vocab_size()
        self._vocab_size = vocab_size
        most = vocab_size if config.max_logprobs == -1 else config.max_logprobs
        limit = queue_tokens(os.environ.get(QUEUE_TOKENS_VARIABLE), config.max_model_len)
        self.limits = Limits(config.max_model_len, most, vocab_size, limit)
        self.admission = Admission(limit, WINDOW_STEPS * step_tokens)
        self.metrics = Metrics(self.admission, registry)
        self.draining = False
        self._under_way = 0
        self._idle = threading.Event()
        self._idle.set()
        self._loop_thread = threading.get_ident()
        self._about = {
            "model": model,
            "tokenizer_fingerprint": _fingerprint(client),
            "vocab_size": vocab_size,
            "max_logprobs": most,
            "max_model_len": config.max_model_len,
            "dtype": str(config.dtype).removeprefix("torch."),
            "vllm_version": vllm.__version__,
            "claas_version": metadata.version("claas"),
            "wire_version": wire.VERSION,
            "request_tokens": limit,
        }
        warm_up_tokens = WARM_UP_TOKENS_CPU if current_platform.is_cpu() else step_tokens
        self._warm_up_tokens = min(warm_up_tokens, step_tokens, config.max_model_len - 1)
        self.warm_up = asyncio.create_task(self._score_once())
        self.warm_up.add_done_callback(_log_failure)
        self._drain_before_shutdown(client)

    @property
    def info(self) -> dict[str, Any]:
        """`/claas/v1/info`."""
        features = {"arrays": self.engine.arrays, "chosen_ids": self.engine.chosen_ids}
        return {**self._about, "features": features, "queue_tokens": self.admission.queued_tokens}

    async def score(self, request: wire.Request, frame: wire.Buffer) -> bytearray:
        """The answer's frame.

        Raises:
            TeacherError: with reason and status; the samples that are not done are aborted.
        """
        self._check(request)
        with self.admission.admitted(request.tokens):
            answer = wire.Answer(request, frame)
            tasks = [
                asyncio.create_task(self._score_sample(answer, number, sample, request.width))
                for number, sample in enumerate(request.samples)
            ]
            try:
                await asyncio.gather(*tasks)
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
        self.metrics.tokens.inc(request.tokens)
        self.metrics.rows.inc(sum(len(sample.response) for sample in request.samples))
        return answer.frame

    async def _score_sample(self, answer: wire.Answer, number: int, sample: wire.Sample, width: int) -> None:
        async with self.admission.turn(sample.tokens):
            answer.put(number, await self.engine.score(sample, width))

    def _check(self, request: wire.Request) -> None:
        if request.model not in ("", self.model):
            raise TeacherUnavailable(f"this teacher serves {self.model}, another model was asked for", status=409)
        if request.fingerprint not in (None, self._about["tokenizer_fingerprint"]):
            raise TeacherRefused("the ids were made by another tokenizer than the teacher's", "TokenizerMismatch", 409)
        if request.chosen and not self.engine.chosen_ids:
            raise TeacherRefused(
                "this teacher cannot score chosen ids (vLLM from 0.32 on, a GPU and its V2 runner can): leave "
                "spec.teacher.support out",
                "InvalidSpec",
                501,
            )
        check(request.samples, request.width, self.limits)

    async def _score_once(self) -> None:
        """What must compile does so now, by the same code as every scoring.

        On a GPU it is the largest step that the scheduler takes, so what may run out of memory does so now, too.
        """
        started = time.monotonic()
        ids = np.arange(self._warm_up_tokens, dtype=np.int32) % self._vocab_size
        width = min(self.limits.max_logprobs or MAX_LOGPROBS, MAX_LOGPROBS)
        request = wire.Request((wire.Sample(ids[:1], ids[1:]),), width)
        await self.score(request, b"")
        logger.info("warm-up: %d tokens scored in %.1f s", self._warm_up_tokens, time.monotonic() - started)

    def readiness(self) -> tuple[bool, str, str]:
        """Whether to send requests here; if not, a reason in one word and a sentence."""
        if self.engine.dead:
            return False, "EngineDead", "the engine has stopped; the server is about to end"
        if self.draining:
            return False, "Stopping", "the server finishes what it has begun, and stops"
        if not self.warm_up.done():
            return False, "WarmingUp", "the first scoring is still running"
        if self.warm_up.cancelled():
            return False, "Stopping", "the server is stopping"
        if error := self.warm_up.exception():
            return False, "WarmUpFailed", f"the first scoring failed: {type(error).__name__}; the log says more"
        return True, "Ready", "a scoring has gone through the engine"

    @contextmanager
    def under_way(self) -> Iterator[None]:
        """Keep the engine alive until this scoring has its numbers; vLLM's server sends what it has before it ends."""
        self._under_way += 1
        self._idle.clear()
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    def _drain_before_shutdown(self, client: Any) -> None:
        """Finish what is under way before vLLM stops the engine, which it does on SIGTERM, in a thread of its own."""
        shutdown = getattr(client, "shutdown", None)
        if shutdown is None:
            return

        def drain_then_shut_down(timeout: float | None = None) -> None:
            self.draining = True
            if threading.get_ident() != self._loop_thread and not self.engine.dead:
                self._idle.wait(timeout or DRAIN_SECONDS)
            shutdown(timeout=timeout)

        client.shutdown = drain_then_shut_down


class EndpointPlugin:
    """vLLM's protocol of that name. Servers without an engine that generates do not load it."""

    name = "claas"
    required_tasks = ("generate",)

    def __init__(self, registry: Any = None) -> None:
        """`registry`: Prometheus' own when None."""
        self._registry = registry

    def attach_router(self, app: FastAPI) -> None:
        """Add the routes."""
        app.include_router(router)

    async def init_state(self, engine_client: Any, state: Any, args: Namespace) -> None:
        """Start the warm-up. Runs in the server's event loop, before it accepts connections."""
        model = args.served_model_name[0] if args.served_model_name else args.model
        state.claas = Teacher(engine_client, model, self._registry)


def _fingerprint(client: Any) -> str | None:
    try:
        return fingerprint(client.get_tokenizer())
    except (TypeError, ValueError) as error:  # a slow tokenizer, or --skip-tokenizer-init
        logger.warning("no tokenizer fingerprint: %s", error)
        return None


def _log_failure(warm_up: asyncio.Task[None]) -> None:
    if not warm_up.cancelled() and (error := warm_up.exception()):
        logger.error("warm-up failed: this server will not become ready", exc_info=error)


def endpoint_plugin() -> EndpointPlugin:
    """What the entry point names."""
    return EndpointPlugin()


@router.post(SCORE_PATH)
async def score(request: Request) -> Response:
    """Score a batch: one frame in, one frame out."""
    teacher: Teacher = request.app.state.claas
    started = time.monotonic()
    try:
        if teacher.draining:
            raise TeacherUnavailable("the server is stopping")
        seconds = _timeout_seconds(request.headers.get(TIMEOUT_HEADER))
        deadline = asyncio.get_running_loop().time() + seconds
        async with asyncio.timeout_at(deadline):
            body = await _body(request, _most_bytes(teacher.limits))
        started = time.monotonic()
        with teacher.under_way():
            async with asyncio.timeout_at(deadline):
                answer = await _unless_gone(request, teacher.score(wire.decode_request(body), body))
            response = Response(memoryview(answer), media_type=wire.MEDIA_TYPE)
            code, reason = 200, "OK"
    except Exception as error:  # noqa: BLE001 (not logged whole: its message may hold ids)
        problem = _problem(error, teacher)
        response, code, reason = problem_response(problem), problem.status, problem.reason
    teacher.metrics.seconds.observe(time.monotonic() - started)
    teacher.metrics.requests.labels(str(code), reason).inc()
    response.headers[QUEUE_HEADER] = str(teacher.admission.queued_tokens)
    return response


@router.get(READY_PATH)
async def ready(request: Request) -> JSONResponse:
    """For readiness probes, and for whoever waits for the teacher."""
    is_ready, reason, message = request.app.state.claas.readiness()
    return JSONResponse({"ready": is_ready, "reason": reason, "message": message}, 200 if is_ready else 503)


@router.get(INFO_PATH)
async def info(request: Request) -> JSONResponse:
    """Who answers here and within which limits; known before the server is ready."""
    return JSONResponse(request.app.state.claas.info)


def problem_response(error: TeacherError) -> Response:
    """RFC 9457, with the API's reason."""
    headers = {}
    if isinstance(error, QueueFull):
        headers["Retry-After"] = str(error.retry_after_seconds)
    elif error.status == 503:
        headers["Retry-After"] = "1"
    document = {
        "type": "about:blank",
        "title": type(error).__name__,
        "status": error.status,
        "detail": str(error),
        "reason": error.reason,
        "retryable": error.retryable,
    }
    return JSONResponse(document, error.status, headers, PROBLEM_TYPE)


def _problem(error: Exception, teacher: Teacher) -> TeacherError:
    """What to tell the client. An unforeseen error's message stays here: it may hold ids."""
    if isinstance(error, TeacherError):
        return error
    if teacher.engine.dead:
        return TeacherUnavailable("the engine has stopped")
    if isinstance(error, TimeoutError):
        return TeacherUnavailable("the deadline passed; the scoring was aborted", status=504)
    if isinstance(error, ClientGone | ClientDisconnect):
        return TeacherUnavailable("the client has left; the scoring was aborted", status=499)
    logger.error("a scoring failed: %s", type(error).__name__)
    return TeacherUnavailable(f"the scoring failed: {type(error).__name__}", status=500)


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


async def _unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client hangs up. The body has been read."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_hung_up(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (working, leaving):
            task.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _body(request: Request, most: int) -> bytearray:
    """The request's body, of a bounded size whatever the client announces."""
    body = bytearray()
    async for piece in request.stream():
        body += piece
        if len(body) > most:
            raise TeacherRefused(f"the request is larger than {most} bytes", "PromptTooLong", 413)
    return body


def _most_bytes(limits: Limits) -> int:
    """The largest frame that could be scored: all tokens, chosen ids at each, and the head."""
    tokens, width = limits.request_tokens or 0, limits.max_logprobs or 0
    return 4 * tokens * (width + 1) + 8 * wire.MAX_SAMPLES + wire.MAX_MODEL_BYTES + 64


def _timeout_seconds(header: str | None) -> float:
    """Seconds that the client waits.

    Raises:
        TeacherRefused: no number of milliseconds.
    """
    if header is None:
        return DEFAULT_TIMEOUT_SECONDS
    if not header.isascii() or not header.isdigit() or len(header) > 9:
        raise TeacherRefused(f"{TIMEOUT_HEADER}: expected milliseconds", status=400)
    return min(int(header) / 1000, DEFAULT_TIMEOUT_SECONDS)
