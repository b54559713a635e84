"""A teacher that is killed or told to stop in the middle of a scoring: an error or the right answer, no wrong array.

One server for each death: `CLAAS_KILLS=10` (make kills) kills ten, at ten moments of a scoring.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import pytest

import models
from claas_teacher.client import TeacherClient
from claas_teacher.errors import TeacherUnavailable
from claas_teacher.scores import Scores
from vllmserver import SMOLLM2_FLAGS, TeacherServer, cache_environment, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]
KILLS = int(os.environ.get("CLAAS_KILLS", "1"))
PROMPT, RESPONSE = list(range(100, 110)), list(range(1000, 1900))
SAMPLE_SECONDS_GUESS = 1.5  # what the moments of death are spread over; later than the end is a right answer


@pytest.fixture
def server(tmp_path: Path) -> Iterator[TeacherServer]:
    with vllm_server(
        models.smollm2_dir(), *SMOLLM2_FLAGS, log=tmp_path / "log", environment=cache_environment()
    ) as running:
        yield running


@pytest.fixture(scope="module")
def right(teacher_server: TeacherServer) -> Scores:
    """What an undisturbed teacher says."""
    with TeacherClient(teacher_server.url) as client:
        return client.score(PROMPT, RESPONSE, 100)


def engine_of(server: TeacherServer) -> int:
    """The engine's process: a child of the server with vLLM's name for it."""
    names = {pid: Path(f"/proc/{pid}/cmdline").read_bytes() for pid in server.processes()}
    (engine,) = [pid for pid, name in names.items() if b"EngineCore" in name]
    return engine


def wait_until_scoring(server: TeacherServer) -> None:
    deadline = time.monotonic() + 60
    with httpx.Client(base_url=server.url, timeout=30) as http:
        while not http.get("/claas/v1/info").json()["queue_tokens"]:
            assert time.monotonic() < deadline, "the scoring did not begin"


def begin(server: TeacherServer, pool: ThreadPoolExecutor) -> Future[Scores]:
    def score() -> Scores:
        with TeacherClient(server.url, attempts=1, timeout_s=120) as client:
            client.info()
            return client.score(PROMPT, RESPONSE, 100)

    found = pool.submit(score)
    wait_until_scoring(server)
    return found


def assert_right(found: Scores, right: Scores) -> None:
    np.testing.assert_allclose(found.chosen, right.chosen, atol=1e-4, rtol=0)
    np.testing.assert_allclose(found.logprobs, right.logprobs, atol=1e-4, rtol=0)


@pytest.mark.parametrize("number", range(KILLS))
def test_a_killed_engine_gives_an_error_or_the_right_answer(server: TeacherServer, right: Scores, number: int) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = begin(server, pool)
        time.sleep(SAMPLE_SECONDS_GUESS * number / max(1, KILLS))  # the moment of death is the point
        os.kill(engine_of(server), signal.SIGKILL)
        error = found.exception(60)
    print(f"death {number}: {error or 'after the answer'}")
    if error is None:
        assert_right(found.result(), right)
    else:
        assert isinstance(error, TeacherUnavailable)
    with contextlib.suppress(httpx.TransportError):  # it may be gone already
        answer = httpx.get(f"{server.url}/claas/v1/ready", timeout=10)
        assert (answer.status_code, answer.json()["reason"]) == (503, "EngineDead")
    # The server ends by itself, and the kubelet starts it again: no restart of the Pod by hand.
    server.process.wait(60)


def test_sigterm_finishes_what_is_under_way(server: TeacherServer, right: Scores) -> None:
    with ThreadPoolExecutor(1) as pool:
        found = begin(server, pool)
        server.process.terminate()
        assert_right(found.result(60), right)
    assert server.process.wait(60) == 0
