"""Asking the teacher: response tokens in, arrays out. Needs numpy and httpx only.

A call has a deadline. Within it, connection loss, 408, 425, 429 and 5xx are tried again, a bounded number of times,
after a random wait (full jitter) or the server's own Retry-After. What another try cannot mend is raised at once, and
what the request itself breaks is found before anything is sent. `python -m claas_teacher.client URL` shows a teacher.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass, fields
from types import TracebackType
from typing import Any, Self

import httpx

from claas_teacher.errors import TeacherAnswerInvalid, TeacherRefused, TeacherUnavailable
from claas_teacher.scores import Scores, from_prompt_logprobs

__all__ = ["Scores", "TeacherClient", "TeacherInfo"]

INFO_PATH = "/claas/v1/info"
COMPLETIONS_PATH = "/v1/completions"
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
REFUSED = frozenset({400, 413, 422})  # the other 4xx speak of the installation, not of the sample
BACKOFF_BASE_SECONDS = 0.2
BACKOFF_CAP_SECONDS = 5.0
KEEPALIVE_SECONDS = 4.0  # below vLLM's 5, so that a pooled connection is not one that the server is just closing


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What `/claas/v1/info` says; fields that this client does not know are left out."""

    model: str
    tokenizer_fingerprint: str | None  # None when the server holds no fast tokenizer
    vocab_size: int
    max_logprobs: int
    max_model_len: int
    dtype: str
    vllm_version: str
    claas_version: str


class TeacherClient:
    """A teacher behind `url`. Thread-safe; one per process is enough. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str,
        *,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        attempts: int = 4,
        concurrency: int = 4,
    ) -> None:
        """`timeout_s` bounds a call with all its tries, `read_timeout_s` a silence, `concurrency` samples at once."""
        base = httpx.URL(url)
        if base.scheme not in ("http", "https") or not base.host:
            raise ValueError("teacher url: expected http://HOST:PORT")
        self.url = str(base).rstrip("/")
        self._timeout_s, self._connect_s, self._read_s = timeout_s, connect_timeout_s, read_timeout_s
        self._attempts, self._concurrency = attempts, concurrency
        limits = httpx.Limits(max_connections=concurrency, keepalive_expiry=KEEPALIVE_SECONDS)
        self._http = httpx.Client(base_url=self.url, limits=limits)
        self._info: TeacherInfo | None = None
        self._info_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the pooled connections."""
        self._http.close()

    def info(self) -> TeacherInfo:
        """The teacher's model, tokenizer and limits: asked once, and again after its model was seen to change."""
        return self._known_info(time.monotonic() + self._timeout_s)

    def score(
        self, prompt_ids: Sequence[int], response_ids: Sequence[int], k: int, *, timeout_s: float | None = None
    ) -> Scores:
        """Log-probabilities of `response_ids` after `prompt_ids`, and of the teacher's `k` most likely ids beside them.

        Raises:
            TeacherRefused: empty response, too long, `k` or an id beyond the teacher's (reason says which).
            TeacherUnavailable: no answer within the deadline and the tries.
            TeacherAnswerInvalid, TeacherNonFinite: an answer that is none.
        """
        return self.score_batch([(prompt_ids, response_ids)], k, timeout_s=timeout_s)[0]

    def score_batch(
        self, samples: Sequence[tuple[Sequence[int], Sequence[int]]], k: int, *, timeout_s: float | None = None
    ) -> list[Scores]:
        """`score` for each (prompt ids, response ids), at most `concurrency` at once, under one deadline, in order.

        Nothing is sent when one of them would be refused. Raises what `score` does, the first that failed.
        """
        deadline = time.monotonic() + (self._timeout_s if timeout_s is None else timeout_s)
        info = self._known_info(deadline)
        plain = [([int(i) for i in prompt], [int(i) for i in response]) for prompt, response in samples]
        for number, (prompt, response) in enumerate(plain):
            _check(prompt, response, k, info, f"samples[{number}]: ")
        if len(plain) < 2:
            return [self._score(prompt, response, k, info, deadline) for prompt, response in plain]
        with ThreadPoolExecutor(min(self._concurrency, len(plain)), "teacher") as pool:
            futures = [pool.submit(self._score, prompt, response, k, info, deadline) for prompt, response in plain]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            for future in done:
                future.result()
            return [future.result() for future in futures]

    def _score(self, prompt: list[int], response: list[int], k: int, info: TeacherInfo, deadline: float) -> Scores:
        body = {
            "model": info.model,
            "prompt": prompt + response,
            "prompt_logprobs": k,
            "max_tokens": 1,  # the least that vLLM takes
            "temperature": 0,
        }
        answer = self._ask("POST", COMPLETIONS_PATH, deadline, body)
        choices = answer.get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise TeacherAnswerInvalid(f"{self.url}{COMPLETIONS_PATH}: one choice expected")
        return from_prompt_logprobs(choices[0].get("prompt_logprobs"), len(prompt), response, k)

    def _known_info(self, deadline: float) -> TeacherInfo:
        with self._info_lock:
            if self._info is None:
                answer = self._ask("GET", INFO_PATH, deadline)
                try:
                    self._info = TeacherInfo(**{field.name: answer[field.name] for field in fields(TeacherInfo)})
                except KeyError as error:
                    raise TeacherAnswerInvalid(f"{self.url}{INFO_PATH}: no field {error}") from None
            return self._info

    def _ask(self, method: str, path: str, deadline: float, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """One JSON object for one request, over as many tries as it takes and the deadline allows."""
        tries = 0
        while True:
            tries += 1
            wanted_wait = 0.0
            try:
                response = self._exchange(method, path, deadline, body)
            except httpx.RequestError as error:
                problem = type(error).__name__
            else:
                if response.status_code == httpx.codes.OK:
                    return self._object(path, response)
                problem = f"HTTP {response.status_code}"
                if response.status_code not in RETRIED:
                    raise self._refusal(path, response)
                wanted_wait = _retry_after(response)
            jitter = random.uniform(0, min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2**tries))
            pause = max(wanted_wait, jitter)
            if tries >= self._attempts or time.monotonic() + pause >= deadline:
                raise TeacherUnavailable(f"{self.url}{path}: {problem}, given up after {tries} tries")
            time.sleep(pause)

    def _exchange(self, method: str, path: str, deadline: float, body: dict[str, Any] | None) -> httpx.Response:
        """One try. The answer is read in pieces, so that a server that drips cannot outlast the deadline."""
        left = max(deadline - time.monotonic(), 0.001)
        silence = min(self._read_s, left)
        timeout = httpx.Timeout(connect=min(self._connect_s, left), read=silence, write=silence, pool=left)
        with self._http.stream(method, path, json=body, timeout=timeout) as response:
            content = bytearray()
            for piece in response.iter_bytes():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the deadline passed while the answer was read")
            headers = {name: value for name, value in response.headers.items() if name == "retry-after"}
            return httpx.Response(response.status_code, headers=headers, content=bytes(content))

    def _object(self, path: str, response: httpx.Response) -> dict[str, Any]:
        try:
            answer = json.loads(response.content)
        except (ValueError, RecursionError) as error:
            raise TeacherAnswerInvalid(f"{self.url}{path}: no JSON ({type(error).__name__})") from None
        if not isinstance(answer, dict):
            raise TeacherAnswerInvalid(f"{self.url}{path}: a JSON object expected")
        return answer

    def _refusal(self, path: str, response: httpx.Response) -> TeacherRefused | TeacherUnavailable:
        status, text = response.status_code, _server_message(response.content)
        if path == COMPLETIONS_PATH and status == httpx.codes.NOT_FOUND:
            self._info = None  # another model is served now: ask again who it is
            return TeacherUnavailable(f"{self.url}{path}: HTTP 404, the teacher's model changed{text}")
        if status == httpx.codes.NOT_FOUND:
            return TeacherUnavailable(
                f"{self.url}{path}: HTTP 404, is the teacher started by `python -m claas_teacher`?"
            )
        if status in REFUSED:
            return TeacherRefused(f"the teacher refused the sample: HTTP {status}{text}")
        return TeacherUnavailable(f"{self.url}{path}: HTTP {status}, check the teacher's url and its access rules")


def _check(prompt: list[int], response: list[int], k: int, info: TeacherInfo, where: str) -> None:
    """Refuse what the teacher would, in words that name the bound.

    Raises:
        TeacherRefused: with the reason.
    """
    if not response:
        raise TeacherRefused(f"{where}the response has no tokens", "EmptyResponse")
    if not prompt:
        raise TeacherRefused(f"{where}the prompt has no tokens: the first response token has nothing to follow")
    if not 1 <= k <= info.max_logprobs:
        fix = "lower it, or start the teacher with a larger --max-logprobs"
        raise TeacherRefused(
            f"training.teacherTopK is {k}, the teacher gives 1 to {info.max_logprobs}: {fix}", "InvalidSpec"
        )
    room = info.max_model_len - 1  # vLLM generates one token
    if len(prompt) + len(response) > room:
        raise TeacherRefused(
            f"{where}{len(prompt)} prompt and {len(response)} response tokens do not fit the teacher's {room}",
            "PromptTooLong" if len(response) < room else "ResponseTooLong",
        )
    if min(min(prompt), min(response)) < 0 or max(max(prompt), max(response)) >= info.vocab_size:
        raise TeacherRefused(f"{where}an id beyond the teacher's vocabulary of {info.vocab_size}", "TokenizerMismatch")


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks us to wait; 0 when it does not say so in seconds."""
    value = response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def _server_message(content: bytes) -> str:
    """vLLM's sentence about a refused request, cut short and without lists of numbers: a sample's ids."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return ": " + re.sub(r"\[[^\]]*\]?|(\d+,\s*){2,}\d+", "[…]", str(message))[:300]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m claas_teacher.client URL")
    with TeacherClient(sys.argv[1], timeout_s=10) as client:
        known = client.info()
    print(json.dumps({field.name: getattr(known, field.name) for field in fields(known)}, indent=2))
