"""Asking the teacher: response tokens in, arrays out. Needs numpy and httpx only.

A call has a deadline, which the server is told. Within it, connection loss, 408, 425, 429 and 5xx are tried again, a
bounded number of times, after a random wait (full jitter) or the server's own Retry-After. What another try cannot
mend is raised at once, and what the request itself breaks is found before anything is sent. Several replicas are
several urls, or one name with several addresses (a headless Service): each try goes to the one with the fewest tokens
waiting. A stock vLLM is asked by its own `/v1/completions`, and gives the same arrays.
`python -m claas_teacher.client URL` shows a teacher.
"""

from __future__ import annotations

import json
import random
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from functools import partial
from types import TracebackType
from typing import Any, Self, TypeVar

import httpx
import numpy as np
import numpy.typing as npt

from claas_teacher import wire
from claas_teacher.errors import (
    TeacherAnswerInvalid,
    TeacherError,
    TeacherNonFinite,
    TeacherRefused,
    TeacherUnavailable,
)
from claas_teacher.limits import Limits, check
from claas_teacher.replicas import QUEUE_HEADER, Replica, Replicas, ends_at
from claas_teacher.scores import Scores, from_prompt_logprobs
from claas_teacher.wire import Sample

__all__ = ["QUEUE_HEADER", "Scores", "TeacherClient", "TeacherInfo"]

INFO_PATH = "/claas/v1/info"
SCORE_PATH = "/claas/v1/score"
COMPLETIONS_PATH = "/v1/completions"
MODELS_PATH = "/v1/models"
TIMEOUT_HEADER = "Claas-Timeout-Ms"
RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
REFUSED = frozenset({400, 413, 422})  # the other 4xx speak of the installation, not of the sample
LONGEST_SECONDS = 86_400.0
INFO_SECONDS = 30.0  # then it is asked anew: a teacher may have been put right
BACKOFF_BASE_SECONDS = 0.2
BACKOFF_CAP_SECONDS = 5.0
ERROR_BYTES = 1 << 16  # of an answer that is an error; the rest is not read
MESSAGE_CHARACTERS = 2000  # looked at of a server's sentence: the search for ids takes their square
JSON_BYTES_AN_ENTRY = 256  # of vLLM's JSON: id, logprob, rank and a decoded token
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class TeacherInfo:
    """What `/claas/v1/info` says; fields that this client does not know are left out.

    Of a stock vLLM only the model and its length are known: the others are None, and it is the server that refuses.
    """

    model: str
    tokenizer_fingerprint: str | None  # None when the server holds no fast tokenizer
    vocab_size: int | None
    max_logprobs: int | None
    max_model_len: int | None
    dtype: str | None = None
    vllm_version: str | None = None
    claas_version: str | None = None
    wire_version: int | None = None  # None: it has no route for frames
    request_tokens: int | None = None
    chosen_ids: bool = False

    @property
    def frames(self) -> bool:
        """Whether it is asked by frames; by /v1/completions otherwise."""
        return self.wire_version == wire.VERSION

    @property
    def limits(self) -> Limits:
        """What it refuses."""
        return Limits(self.max_model_len, self.max_logprobs, self.vocab_size, self.request_tokens)


class TeacherClient:
    """A teacher behind `url`. Thread-safe; one per process is enough. Close it, or use it as a context manager."""

    def __init__(
        self,
        url: str | Sequence[str],
        *,
        timeout_s: float = 120.0,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 60.0,
        attempts: int = 4,
        concurrency: int = 4,
        in_flight_tokens: int = 32_768,
    ) -> None:
        """`timeout_s` bounds a call with all its tries, `read_timeout_s` a silence, `concurrency` requests at once.

        Args:
            url: one url, several, or several in one text with commas between.
            in_flight_tokens: sent and not answered at once, over all calls; a single larger sample goes alone.
        """
        urls = url.split(",") if isinstance(url, str) else list(url)
        self._replicas = Replicas(urls, concurrency, self._ask_load)
        self.url = ",".join(self._replicas.urls)
        self.timeout_s, self._connect_s, self._read_s = timeout_s, connect_timeout_s, read_timeout_s
        self._attempts, self._concurrency = attempts, concurrency
        self._in_flight = InFlight(in_flight_tokens)
        self._info: TeacherInfo | None = None
        self._info_at = 0.0
        self._info_lock = threading.Lock()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the pooled connections."""
        self._replicas.close()

    def info(self, *, timeout_s: float | None = None) -> TeacherInfo:
        """The teacher's model, tokenizer and limits, as of half a minute ago or less."""
        return self._known_info(self._deadline(timeout_s))

    def _deadline(self, timeout_s: float | None) -> float:
        return time.monotonic() + min(LONGEST_SECONDS, self.timeout_s if timeout_s is None else timeout_s)

    def score(
        self,
        prompt_ids: npt.ArrayLike,
        response_ids: npt.ArrayLike,
        k: int,
        *,
        chosen: npt.ArrayLike | None = None,
        timeout_s: float | None = None,
    ) -> Scores:
        """Log-probabilities of `response_ids` after `prompt_ids`, and of the teacher's `k` most likely ids beside them.

        Args:
            chosen: (N, k) ids to score instead of the most likely ones; -1 is padding.

        Raises:
            TeacherRefused: empty response, too long, `k` or an id beyond the teacher's (reason says which).
            TeacherUnavailable: no answer within the deadline and the tries.
            TeacherAnswerInvalid, TeacherNonFinite: an answer that is none.
        """
        given = None if chosen is None else [chosen]
        return self.score_batch([(prompt_ids, response_ids)], k, chosen=given, timeout_s=timeout_s)[0]

    def score_batch(
        self,
        samples: Sequence[tuple[npt.ArrayLike, npt.ArrayLike]],
        k: int,
        *,
        chosen: Sequence[npt.ArrayLike] | None = None,
        timeout_s: float | None = None,
    ) -> list[Scores]:
        """`score` for each (prompt ids, response ids), under one deadline, in order.

        Samples travel together, as many as the limits on tokens allow. Nothing is sent when one of them would be
        refused. Raises what `score` does, the first that failed.
        """
        deadline = self._deadline(timeout_s)
        info = self._known_info(deadline)
        wanted: Sequence[npt.ArrayLike | None] = [None] * len(samples) if chosen is None else chosen
        known = [
            _sample(p, r, c, k, f"samples[{number}]: ")
            for number, ((p, r), c) in enumerate(zip(samples, wanted, strict=True))
        ]
        if chosen is not None and not info.chosen_ids:
            raise TeacherRefused("spec.teacher.support student: this teacher cannot score chosen ids", "InvalidSpec")
        check(known, k, info.limits)
        if not info.frames:
            return self._run([partial(self._score_json, sample, k, info, deadline) for sample in known])
        most = min(self._in_flight.limit, info.request_tokens or self._in_flight.limit)
        parts = self._run(
            [
                partial(self._score_frame, part, k, chosen is not None, info, deadline)
                for part in _together(known, most, self._replicas.count)
            ]
        )
        return [scores for part in parts for scores in part]

    def _run(self, calls: Sequence[Callable[[], T]]) -> list[T]:
        """The results, in order; the first failure stops what has not begun."""
        if len(calls) < 2:
            return [call() for call in calls]
        with ThreadPoolExecutor(min(self._concurrency, len(calls)), "teacher") as pool:
            futures = [pool.submit(call) for call in calls]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            for future in done:
                future.result()
            return [future.result() for future in futures]

    def _score_frame(
        self, samples: Sequence[Sample], width: int, chosen: bool, info: TeacherInfo, deadline: float
    ) -> list[Scores]:
        request = wire.Request(tuple(samples), width, chosen, info.model, info.tokenizer_fingerprint)
        frame = wire.encode_request(request)
        most = wire.answer_bytes([len(sample.response) for sample in samples], width)
        with self._in_flight.hold(request.tokens, deadline):
            return self._ask(
                lambda content: wire.decode_answer(content, request, frame),
                "POST",
                SCORE_PATH,
                deadline,
                frame,
                most,
                request.tokens,
            )

    def _score_json(self, sample: Sample, k: int, info: TeacherInfo, deadline: float) -> Scores:
        body = {
            "model": info.model,
            "prompt": sample.prompt.tolist() + sample.response.tolist(),
            "prompt_logprobs": k,
            "max_tokens": 1,  # the least that vLLM takes
            "temperature": 0,
        }
        most = ERROR_BYTES + sample.tokens * (k + 1) * JSON_BYTES_AN_ENTRY
        with self._in_flight.hold(sample.tokens, deadline):
            return self._ask(
                partial(self._read_json, sample, k),
                "POST",
                COMPLETIONS_PATH,
                deadline,
                json.dumps(body).encode(),
                most,
                sample.tokens,
            )

    def _read_json(self, sample: Sample, k: int, content: bytes | bytearray) -> Scores:
        choices = self._object(COMPLETIONS_PATH, content).get("choices")
        if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
            raise TeacherAnswerInvalid(f"{self.url}{COMPLETIONS_PATH}: one choice expected")
        return from_prompt_logprobs(choices[0].get("prompt_logprobs"), len(sample.prompt), sample.response, k)

    def _known_info(self, deadline: float) -> TeacherInfo:
        if not self._info_lock.acquire(timeout=max(0, deadline - time.monotonic())):
            raise TeacherUnavailable(f"{self.url}{INFO_PATH}: another call still waited for it as the deadline passed")
        try:
            known = self._info  # a call that is refused may clear it meanwhile
            if known is None or time.monotonic() - self._info_at > INFO_SECONDS:
                try:
                    known = self._ask(self._read_info, "GET", INFO_PATH, deadline)
                except _NoSuchRoute:
                    known = self._stock_info(deadline)
                self._info, self._info_at = known, time.monotonic()
            return known
        finally:
            self._info_lock.release()

    def _read_info(self, content: bytes | bytearray) -> TeacherInfo:
        return _info_from(self._object(INFO_PATH, content), f"{self.url}{INFO_PATH}")

    def _stock_info(self, deadline: float) -> TeacherInfo:
        """A vLLM without our routes: its model's id and length are all that it shows."""
        try:
            return self._ask(self._read_models, "GET", MODELS_PATH, deadline)
        except _NoSuchRoute:
            raise TeacherUnavailable(f"{self.url}{INFO_PATH}: HTTP 404, is that a teacher?") from None

    def _read_models(self, content: bytes | bytearray) -> TeacherInfo:
        models = self._object(MODELS_PATH, content).get("data")
        if not isinstance(models, list) or not models or not isinstance(models[0], dict) or "id" not in models[0]:
            raise TeacherAnswerInvalid(f"{self.url}{MODELS_PATH}: a list of models expected")
        length = models[0].get("max_model_len")
        return TeacherInfo(str(models[0]["id"]), None, None, None, length if isinstance(length, int) else None)

    def _ask_load(self, replica: Replica, timeout_s: float) -> int:
        """Tokens that wait at one replica. Raises httpx.RequestError or TeacherAnswerInvalid."""
        response, content = self._exchange(replica, "GET", INFO_PATH, time.monotonic() + timeout_s, None, ERROR_BYTES)
        if response.status_code == httpx.codes.NOT_FOUND:
            return 0  # a stock vLLM does not say
        tokens = self._object(INFO_PATH, content).get("queue_tokens")
        if type(tokens) is not int:
            raise TeacherAnswerInvalid(f"{replica.url}{INFO_PATH}: tokens that wait expected")
        return tokens

    def _ask(
        self,
        read: Callable[[bytearray], T],
        method: str,
        path: str,
        deadline: float,
        body: bytes | None = None,
        most: int = ERROR_BYTES,
        tokens: int = 0,
    ) -> T:
        """What `read` makes of one good answer, over as many tries as it takes and the deadline allows.

        An answer that is none counts as a replica that is out of reach, as long as another can be asked.
        """
        tries = 0
        avoid: set[str] = set()
        while True:
            tries += 1
            wanted_wait = 0.0
            replica = self._replicas.choose(avoid)
            try:
                with replica.sending(tokens):
                    response, content = self._exchange(replica, method, path, deadline, body, most)
                    if response.status_code == httpx.codes.OK:
                        answer = read(content)
                        replica.answered(response.headers)
                        return answer
            except httpx.RequestError as error:
                problem = type(error).__name__
                replica.failed()
            except TeacherAnswerInvalid as error:
                replica.failed()
                avoid.add(replica.url)
                if tries >= self._attempts or not self._replicas.others(avoid):
                    raise
                problem = str(error)
            else:
                replica.answered(response.headers)
                problem = f"HTTP {response.status_code}"
                refusal = self._refusal(path, response.status_code, content)
                if response.status_code not in RETRIED or not refusal.retryable:
                    raise refusal
                wanted_wait = _retry_after(response)
            avoid.add(replica.url)
            elsewhere = self._replicas.others(avoid)
            jitter = random.uniform(0, min(BACKOFF_CAP_SECONDS, BACKOFF_BASE_SECONDS * 2**tries))
            pause = 0.0 if elsewhere else max(wanted_wait, jitter)
            if not elsewhere:
                avoid.clear()
            if tries >= self._attempts or time.monotonic() + pause >= deadline:
                raise TeacherUnavailable(f"{self.url}{path}: {problem}, given up after {tries} tries")
            time.sleep(pause)

    def _exchange(
        self, replica: Replica, method: str, path: str, deadline: float, body: bytes | None, most: int
    ) -> tuple[httpx.Response, bytearray]:
        """One try. The answer is read in pieces: a server that drips cannot outlast the deadline, nor a large one."""
        left = max(deadline - time.monotonic(), 0.001)
        silence = min(self._read_s, left)
        timeout = httpx.Timeout(connect=min(self._connect_s, left), read=silence, write=silence, pool=left)
        # No compression: what a server sends is what is read, so `most` bounds the memory.
        headers = {TIMEOUT_HEADER: str(max(1, int(left * 1000))), "accept-encoding": "identity"}
        if body is not None:
            headers["content-type"] = wire.MEDIA_TYPE if path == SCORE_PATH else "application/json"
        with (
            ends_at(deadline),
            replica.http.stream(method, path, content=body, headers=headers, timeout=timeout) as response,
        ):
            good = response.status_code == httpx.codes.OK
            content = bytearray()
            for piece in response.iter_raw():
                content += piece
                if time.monotonic() > deadline:
                    raise httpx.ReadTimeout("the deadline passed while the answer was read")
                if len(content) > (most if good else ERROR_BYTES):
                    if good:
                        raise TeacherAnswerInvalid(f"{self.url}{path}: more than the {most} bytes that were asked for")
                    break
            return response, content

    def _object(self, path: str, content: bytes | bytearray) -> dict[str, Any]:
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise TeacherAnswerInvalid(f"{self.url}{path}: no JSON ({type(error).__name__})") from None
        if not isinstance(answer, dict):
            raise TeacherAnswerInvalid(f"{self.url}{path}: a JSON object expected")
        return answer

    def _refusal(self, path: str, status: int, content: bytes | bytearray) -> TeacherError:
        if said := _said_by_the_teacher(status, content):
            if status == httpx.codes.CONFLICT:
                self._info = None  # another model is served now: ask again who it is
            return said
        text = _server_message(content)
        if path in (COMPLETIONS_PATH, SCORE_PATH) and status == httpx.codes.NOT_FOUND:
            self._info = None
            return TeacherUnavailable(f"{self.url}{path}: HTTP 404, the teacher's model changed{text}")
        if status == httpx.codes.NOT_FOUND:
            return _NoSuchRoute(f"{self.url}{path}: HTTP 404, is that a teacher?")
        if status in REFUSED:
            return TeacherRefused(f"the teacher refused the sample: HTTP {status}{text}")
        return TeacherUnavailable(f"{self.url}{path}: HTTP {status}, check the teacher's url and its access rules")


class _NoSuchRoute(TeacherUnavailable):
    """404 on a route that tells who answers."""


class InFlight:
    """A bound on tokens that are sent and not answered, over all threads."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._tokens = 0
        self._changed = threading.Condition()

    @contextmanager
    def hold(self, tokens: int, deadline: float) -> Iterator[None]:
        """Wait until there is room, at most until `deadline`.

        Raises:
            TeacherUnavailable: there was none in time.
        """
        with self._changed:
            room = self._changed.wait_for(
                lambda: not self._tokens or self._tokens + tokens <= self.limit, max(0, deadline - time.monotonic())
            )
            if not room:
                raise TeacherUnavailable(f"{self._tokens} tokens were in flight until the deadline passed")
            self._tokens += tokens
        try:
            yield
        finally:
            with self._changed:
                self._tokens -= tokens
                self._changed.notify_all()


def _sample(prompt: npt.ArrayLike, response: npt.ArrayLike, chosen: npt.ArrayLike | None, k: int, where: str) -> Sample:
    """Ids as the wire has them.

    Raises:
        TeacherRefused: an id that is none; chosen ids that are not (N, k).
    """
    try:
        arrays = [_integers(ids).reshape(-1) for ids in (prompt, response)]
        wanted = None if chosen is None else _integers(chosen)
        given = arrays if wanted is None else [*arrays, wanted]
        if any(ids.size and not -1 <= ids.min() <= ids.max() < 1 << 31 for ids in given):
            raise OverflowError
    except (OverflowError, TypeError, ValueError):
        raise TeacherRefused(f"{where}a token id is outside every vocabulary", "TokenizerMismatch") from None
    if wanted is not None and wanted.shape != (len(arrays[1]), k):
        raise TeacherRefused(f"{where}chosen ids of shape {wanted.shape}, ({len(arrays[1])}, {k}) expected")
    prompt_ids, response_ids = (ids.astype(np.int32) for ids in arrays)
    return Sample(prompt_ids, response_ids, None if wanted is None else wanted.astype(np.int32))


def _integers(ids: npt.ArrayLike) -> npt.NDArray[np.int64]:
    """Raises TypeError: numbers that are not whole ones by their type."""
    given = np.asarray(ids)
    if given.size and given.dtype.kind not in "iu":
        raise TypeError
    return given.astype(np.int64)


def _together(samples: Sequence[Sample], most: int, replicas: int) -> list[list[Sample]]:
    """Samples in order, in as few requests as limits allow and as many as there are replicas to share them."""
    share = max(1, -(-sum(sample.tokens for sample in samples) // replicas))
    parts: list[list[Sample]] = []
    room = count = 0
    for sample in samples:
        if not parts or sample.tokens > room or count == wire.MAX_SAMPLES:
            parts.append([])
            room, count = min(most, share), 0
        parts[-1].append(sample)
        room, count = room - sample.tokens, count + 1
    return parts


def _info_from(answer: dict[str, Any], where: str) -> TeacherInfo:
    """Raises TeacherAnswerInvalid: a field is missing."""
    needed = ("model", "tokenizer_fingerprint", "vocab_size", "max_logprobs", "max_model_len")
    if missing := [name for name in needed if name not in answer]:
        raise TeacherAnswerInvalid(f"{where}: no field {missing[0]!r}")
    for name in ("vocab_size", "max_logprobs", "max_model_len", "request_tokens"):
        count = answer.get(name)
        if count is not None and (type(count) is not int or count < 1):
            raise TeacherAnswerInvalid(f"{where}: field {name!r} is no count")
    model, fingerprint = answer["model"], answer["tokenizer_fingerprint"]
    if not isinstance(model, str) or not 0 < len(model.encode(errors="replace")) <= wire.MAX_MODEL_BYTES:
        raise TeacherAnswerInvalid(f"{where}: field 'model' is no model's id")
    if fingerprint is not None and not re.fullmatch("[0-9a-f]{64}", str(fingerprint)):
        raise TeacherAnswerInvalid(f"{where}: field 'tokenizer_fingerprint' is none")
    features = answer.get("features")
    known = {field.name: answer[field.name] for field in fields(TeacherInfo) if field.name in answer}
    known["chosen_ids"] = bool(isinstance(features, dict) and features.get("chosen_ids"))
    return TeacherInfo(**known)


def _said_by_the_teacher(status: int, content: bytes | bytearray) -> TeacherError | None:
    """The error of one of our problem documents; None when it is no such document."""
    try:
        document = json.loads(content)
        reason, detail, retryable = document["reason"], str(document["detail"]), document["retryable"] is True
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
    message = f"the teacher: {detail[:300]}"
    if retryable:
        return TeacherUnavailable(message, status=status)
    if reason == TeacherNonFinite.reason:
        return TeacherNonFinite(message, status=status)
    return TeacherRefused(message, str(reason), status)


def _retry_after(response: httpx.Response) -> float:
    """Seconds that the server asks us to wait; 0 when it does not say so in seconds."""
    value = response.headers.get("retry-after", "")
    return float(value) if re.fullmatch(r"\d{1,6}", value) else 0.0


def _server_message(content: bytes | bytearray) -> str:
    """vLLM's sentence about a refused request, cut short and without lists of numbers: a sample's ids."""
    try:
        message = json.loads(content)["error"]["message"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return ""
    return ": " + re.sub(r"\[[^\]]*\]?|(\d+,\s*){2,}\d+", "[…]", str(message)[:MESSAGE_CHARACTERS])[:300]


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m claas_teacher.client URL")
    try:
        with TeacherClient(sys.argv[1], timeout_s=10) as client:
            print(json.dumps(asdict(client.info()), indent=2))
    except (TeacherError, ValueError) as error:
        sys.exit(str(error))
