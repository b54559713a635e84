"""The client against a real HTTP server that fails in every way a teacher can."""

from __future__ import annotations

import contextlib
import gzip
import json
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from claas_crds.reasons import Reason
from claas_teacher import errors, wire
from claas_teacher.client import TeacherClient
from claas_teacher.errors import (
    TeacherAnswerInvalid,
    TeacherError,
    TeacherNonFinite,
    TeacherRefused,
    TeacherUnavailable,
)
from claas_teacher.scores import canonical, without_repetitions

INFO: dict[str, Any] = {
    "model": "small",
    "tokenizer_fingerprint": "f" * 64,
    "vocab_size": 1000,
    "max_logprobs": 100,
    "max_model_len": 256,
    "dtype": "float32",
    "vllm_version": "0",
    "claas_version": "0",
    "a_field_of_a_newer_server": True,
}
Behaviour = Callable[["Handler", bytes], None]


class Handler(BaseHTTPRequestHandler):
    """Plays the server's script, one behaviour a scoring, the last one for ever."""

    protocol_version = "HTTP/1.1"
    server: Server

    def do_GET(self) -> None:
        self.server.infos += 1
        if self.path == "/v1/models":
            self.reply(200, json.dumps({"data": [{"id": "small", "max_model_len": 256}]}).encode())
        elif self.server.info is None:
            self.reply(404, b'{"detail": "Not Found"}')
        else:
            self.reply(200, json.dumps({**self.server.info, "queue_tokens": self.server.queue_tokens}).encode())

    def do_POST(self) -> None:
        content = self.rfile.read(int(self.headers["content-length"]))
        framed = self.path == "/claas/v1/score"
        body = {"frame": content, "headers": dict(self.headers)} if framed else json.loads(content)
        with self.server.lock:
            self.server.connections.add(self.client_address)
            self.server.bodies.append(body)
            self.server.in_flight += 1
            self.server.most_in_flight = max(self.server.most_in_flight, self.server.in_flight)
            script = self.server.script
            behaviour = script.pop(0) if len(script) > 1 else script[0]
        try:
            behaviour(self, frame_answer(content) if framed else answer_to(body))
        finally:
            with self.server.lock:
                self.server.in_flight -= 1

    def reply(self, status: int, content: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {**headers, "content-length": str(len(content))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.script: list[Behaviour] = [good]
        self.bodies: list[dict[str, Any]] = []
        self.connections: set[Any] = set()
        self.info: dict[str, Any] | None = dict(INFO)
        self.queue_tokens = 0
        self.infos = self.in_flight = self.most_in_flight = 0
        self.lock = threading.Lock()
        self.ending = threading.Event()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hung up is what some tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


def answer_to(body: dict[str, Any]) -> bytes:
    """What vLLM says to `body`; the token at position i has the logprob -i/100, so rows cannot be mixed up."""
    k, rows = body["prompt_logprobs"], []
    for position, token in enumerate(body["prompt"]):
        others = {i: -5.0 - i / 100 for i in range(k)}
        row = {token: -position / 100, **others}
        rows.append(
            {str(i): {"logprob": lp, "rank": 1, "decoded_token": ""} for i, lp in row.items()} if position else None
        )
    return json.dumps({"model": body["model"], "choices": [{"prompt_logprobs": rows}]}).encode()


def frame_answer(frame: bytes) -> bytearray:
    """What our route says; the same numbers as `answer_to`."""
    request = wire.decode_request(frame)
    answer = wire.Answer(request, frame)
    for number, sample in enumerate(request.samples):
        positions = len(sample.prompt) + np.arange(len(sample.response))
        others = np.tile(np.arange(request.width), (len(positions), 1))
        chosen = others if sample.chosen is None else without_repetitions(sample.chosen)
        answer.put(
            number,
            canonical(
                np.concatenate([sample.response[:, None], chosen], axis=1),
                np.concatenate([-positions[:, None] / 100, -5.0 - others / 100], axis=1),
            ),
        )
    return answer.frame


def good(handler: Handler, content: bytes) -> None:
    handler.reply(200, content)


def status(code: int, content: bytes = b"{}", **headers: str) -> Behaviour:
    return lambda handler, _: handler.reply(code, content, **headers)


def cut(handler: Handler, content: bytes) -> None:
    """Half of the answer, then the line is dead."""
    handler.send_response(200)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    handler.wfile.write(content[: len(content) // 2])
    handler.close_connection = True


def drop(handler: Handler, content: bytes) -> None:
    """Not a byte."""
    handler.close_connection = True


def hang(handler: Handler, content: bytes) -> None:
    handler.server.ending.wait(30)


def drip(handler: Handler, content: bytes) -> None:
    """A byte now and then: never silent, never done."""
    handler.send_response(200)
    handler.send_header("content-length", str(len(content)))
    handler.end_headers()
    for byte in content:
        if handler.server.ending.wait(0.02):
            return
        handler.wfile.write(bytes([byte]))


@pytest.fixture
def server() -> Iterator[Server]:
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield running
        finally:
            running.ending.set()
            running.shutdown()
            thread.join(10)


PROMPT, RESPONSE = [201, 202, 203], [301, 302]


def test_a_score_is_the_responses_rows_alone(server: Server) -> None:
    with TeacherClient(server.url) as client:
        scores = client.score(np.array(PROMPT), np.array(RESPONSE), 4)
    np.testing.assert_allclose(scores.chosen, [-0.03, -0.04], atol=1e-7)
    assert scores.ids.tolist() == [[301, 0, 1, 2, 3], [302, 0, 1, 2, 3]]
    assert server.bodies == [
        {"model": "small", "prompt": PROMPT + RESPONSE, "prompt_logprobs": 4, "max_tokens": 1, "temperature": 0}
    ]


@pytest.mark.parametrize("failure", [status(500), status(503), status(429), status(408), cut, drop], ids=str)
def test_what_passes_is_tried_again(server: Server, failure: Behaviour) -> None:
    server.script = [failure, failure, good]
    with TeacherClient(server.url) as client:
        assert client.score(PROMPT, RESPONSE, 2).chosen.shape == (2,)
    assert len(server.bodies) == 3


def test_a_silent_try_is_given_up_and_made_again(server: Server) -> None:
    server.script = [hang, good]
    with TeacherClient(server.url, read_timeout_s=0.2) as client:
        client.score(PROMPT, RESPONSE, 2)
    assert len(server.bodies) == 2


def test_tries_are_bounded_and_the_error_says_how_many(server: Server) -> None:
    server.script = [status(500)]
    with (
        TeacherClient(server.url, attempts=3) as client,
        pytest.raises(TeacherUnavailable, match=r"HTTP 500.*3 tries") as caught,
    ):
        client.score(PROMPT, RESPONSE, 2)
    assert len(server.bodies) == 3
    assert caught.value.retryable


@pytest.mark.parametrize("failure", [hang, drip])
def test_no_server_outlasts_the_deadline(server: Server, failure: Behaviour) -> None:
    server.script = [failure]
    with TeacherClient(server.url) as client:
        client.info()
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable):
            client.score(PROMPT, RESPONSE, 2, timeout_s=0.5)
    assert 0.4 < time.monotonic() - started < 3


def test_retry_after_is_honoured(server: Server) -> None:
    server.script = [status(429, retry_after="1"), good]
    with TeacherClient(server.url) as client:
        client.info()
        started = time.monotonic()
        client.score(PROMPT, RESPONSE, 2)
    assert time.monotonic() - started >= 1


def test_a_wait_beyond_the_deadline_is_not_begun(server: Server) -> None:
    server.script = [status(503, retry_after="30")]
    started = time.monotonic()
    with TeacherClient(server.url, timeout_s=5) as client, pytest.raises(TeacherUnavailable, match="HTTP 503"):
        client.score(PROMPT, RESPONSE, 2)
    assert time.monotonic() - started < 3
    assert len(server.bodies) == 1


def test_nobody_there(server: Server) -> None:
    url = server.url
    server.server_close()
    with TeacherClient(url, attempts=2) as client, pytest.raises(TeacherUnavailable, match=r"ConnectError.*2 tries"):
        client.info()


def test_a_refused_sample_is_not_tried_again_and_its_ids_are_not_repeated(server: Server) -> None:
    message = f"Token ids {PROMPT} or 201, 202, 203, 301 are bad: prompt_logprobs of 101 exceeds 100"
    server.script = [status(400, json.dumps({"error": {"message": message}}).encode())]
    with TeacherClient(server.url) as client, pytest.raises(TeacherRefused, match="prompt_logprobs of 101") as caught:
        client.score(PROMPT, RESPONSE, 2)
    assert len(server.bodies) == 1
    assert "201" not in str(caught.value)
    assert "301" not in str(caught.value)


@pytest.mark.parametrize("code", [301, 401, 403, 405])
def test_a_wrong_address_or_key_is_the_installations_fault(server: Server, code: int) -> None:
    server.script = [status(code, location="/elsewhere")]
    with (
        TeacherClient(server.url) as client,
        pytest.raises(TeacherUnavailable, match=f"HTTP {code}, check the teacher's url"),
    ):
        client.score(PROMPT, RESPONSE, 2)
    assert len(server.bodies) == 1


@pytest.mark.parametrize(
    "content",
    [
        b"<html>",
        b"",
        b"[]",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{}]}',
        b'{"choices": [7]}',
        b"\xff{",
        b"[" * 100_000,
    ],
)
def test_a_wrong_answer_is_a_named_error(server: Server, content: bytes) -> None:
    server.script = [status(200, content)]
    with TeacherClient(server.url) as client, pytest.raises(TeacherAnswerInvalid):
        client.score(PROMPT, RESPONSE, 2)


def test_info_is_asked_once_until_the_model_changes(server: Server) -> None:
    server.script = [good, status(404), good]
    with TeacherClient(server.url) as client:
        assert client.info().model == "small"
        client.score(PROMPT, RESPONSE, 2)
        assert server.infos == 1
        with pytest.raises(TeacherUnavailable, match="model changed"):
            client.score(PROMPT, RESPONSE, 2)
        client.score(PROMPT, RESPONSE, 2)
        assert server.infos == 2


@pytest.mark.parametrize(
    ("prompt", "response", "k", "reason", "words"),
    [
        (PROMPT, [], 2, Reason.EMPTY_RESPONSE, "no tokens"),
        (PROMPT, RESPONSE, 101, Reason.INVALID_SPEC, "teacherTopK is 101.*1 to 100.*--max-logprobs"),
        (PROMPT, RESPONSE, 0, Reason.INVALID_SPEC, "teacherTopK is 0"),
        (
            [1] * 200,
            [2] * 56,
            2,
            Reason.PROMPT_TOO_LONG,
            "200 prompt and 56 response tokens do not fit the teacher's 255",
        ),
        ([1], [2] * 255, 2, Reason.RESPONSE_TOO_LONG, "255 response tokens"),
        ([1], [1000], 2, Reason.TOKENIZER_MISMATCH, "vocabulary of 1000"),
        ([-1], [1], 2, Reason.TOKENIZER_MISMATCH, "vocabulary of 1000"),
        ([], [1], 2, Reason.INTERNAL_ERROR, "prompt has no tokens"),
    ],
)
def test_what_the_teacher_would_refuse_is_not_sent(
    server: Server, prompt: list[int], response: list[int], k: int, reason: Reason, words: str
) -> None:
    with TeacherClient(server.url) as client, pytest.raises(TeacherRefused, match=words) as caught:
        client.score_batch([(PROMPT, RESPONSE), (prompt, response)], k)
    assert caught.value.reason == reason
    assert not caught.value.retryable
    assert not server.bodies


def test_the_longest_sample_that_fits_is_sent(server: Server) -> None:
    with TeacherClient(server.url) as client:
        assert client.score([1] * 200, [2] * 55, 2).chosen.shape == (55,)


def test_a_batch_keeps_its_order_and_its_limit(server: Server) -> None:
    together = threading.Barrier(3)

    def wait_for_two_more(handler: Handler, content: bytes) -> None:
        together.wait(10)  # breaks the test when fewer than three are in flight
        handler.reply(200, content)

    server.script = [wait_for_two_more]
    lengths = [5, 1, 9, 2, 7, 3, 8, 4, 6]
    with TeacherClient(server.url, concurrency=3) as client:
        found = client.score_batch([([700 + n], [800 + n] * n) for n in lengths], 2)
    assert [len(scores.chosen) for scores in found] == lengths
    assert [int(scores.ids[0, 0]) for scores in found] == [800 + n for n in lengths]
    assert server.most_in_flight == 3
    assert len(server.connections) == 3  # pooled


def test_a_failed_sample_fails_the_batch_and_stops_the_rest(server: Server) -> None:
    server.script = [status(400)]
    with TeacherClient(server.url, concurrency=2) as client, pytest.raises(TeacherRefused):
        client.score_batch([(PROMPT, RESPONSE)] * 50, 2)
    assert len(server.bodies) < 10


def test_an_empty_batch_is_no_work(server: Server) -> None:
    with TeacherClient(server.url) as client:
        assert client.score_batch([], 2) == []


@pytest.mark.parametrize("url", ["teacher:8000", "ftp://teacher", "http://", ""])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(ValueError, match="http://HOST:PORT"):
        TeacherClient(url)


def test_every_error_has_a_reason_of_the_api() -> None:
    for error in (TeacherError, *TeacherError.__subclasses__()):
        assert Reason(error.reason)
    named = {
        name for name, value in vars(errors).items() if isinstance(value, type) and issubclass(value, TeacherError)
    }
    assert len(named) == 7


# By frames


FRAMES = {**INFO, "wire_version": wire.VERSION, "request_tokens": 4096, "features": {"chosen_ids": True}}


@pytest.fixture
def framed(server: Server) -> Server:
    server.info = FRAMES
    return server


def problem(code: int, reason: str, retryable: bool, **headers: str) -> Behaviour:
    document = {"status": code, "reason": reason, "retryable": retryable, "detail": "because"}
    return status(code, json.dumps(document).encode(), **headers)


def test_a_frame_gives_the_arrays_that_json_gives(framed: Server) -> None:
    samples = [(PROMPT, RESPONSE), ([200], [300]), (PROMPT * 9, RESPONSE * 7)]
    with TeacherClient(framed.url) as client:
        by_frames = client.score_batch(samples, 4)
        assert len(framed.bodies) == 1  # one request for the batch
        request = wire.decode_request(framed.bodies[0]["frame"])
        assert (request.model, request.fingerprint, request.width) == ("small", "f" * 64, 4)
        assert 0 < int(framed.bodies[0]["headers"]["Claas-Timeout-Ms"]) <= 120_000
    framed.info = None  # a stock vLLM
    with TeacherClient(framed.url) as client:
        by_json = client.score_batch(samples, 4)
        assert client.info().tokenizer_fingerprint is None
    for one, other in zip(by_frames, by_json, strict=True):
        for name in ("ids", "logprobs", "chosen", "tail"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
            assert getattr(one, name).dtype == getattr(other, name).dtype


def test_chosen_ids_travel_where_the_teacher_can_score_them(framed: Server) -> None:
    chosen = [[5, 6, -1], [7, 8, 9]]
    with TeacherClient(framed.url) as client:
        client.score(PROMPT, RESPONSE, 3, chosen=chosen)
        request = wire.decode_request(framed.bodies[0]["frame"])
        assert request.chosen and request.samples[0].chosen is not None
        assert request.samples[0].chosen.tolist() == chosen
        with pytest.raises(TeacherRefused, match="shape"):
            client.score(PROMPT, RESPONSE, 2, chosen=chosen)
    framed.info = {**FRAMES, "features": {"chosen_ids": False}}
    with TeacherClient(framed.url) as client, pytest.raises(TeacherRefused, match="support") as caught:
        client.score(PROMPT, RESPONSE, 3, chosen=chosen)
    assert caught.value.reason == Reason.INVALID_SPEC


@pytest.mark.parametrize(
    "failure",
    [status(500), problem(503, "TeacherUnavailable", True), cut, drop, status(502, b"<html>" * 50_000)],
    ids=str,
)
def test_what_passes_is_tried_again_with_frames(framed: Server, failure: Behaviour) -> None:
    framed.script = [failure, good]
    with TeacherClient(framed.url) as client:
        assert client.score(PROMPT, RESPONSE, 2).chosen.shape == (2,)
    assert len(framed.bodies) == 2


@pytest.mark.parametrize(
    ("failure", "error", "reason"),
    [
        (problem(422, "PromptTooLong", False), TeacherRefused, Reason.PROMPT_TOO_LONG),
        (problem(409, "TokenizerMismatch", False), TeacherRefused, Reason.TOKENIZER_MISMATCH),
        (problem(409, "TeacherUnavailable", True), TeacherUnavailable, Reason.TEACHER_UNAVAILABLE),
        (problem(500, "NonFiniteInput", False), TeacherNonFinite, Reason.NON_FINITE_INPUT),
        (problem(501, "InvalidSpec", False), TeacherRefused, Reason.INVALID_SPEC),
    ],
    ids=str,
)
def test_what_another_try_cannot_mend_is_raised_at_once(
    framed: Server, failure: Behaviour, error: type[TeacherError], reason: Reason
) -> None:
    framed.script = [failure]
    with TeacherClient(framed.url) as client, pytest.raises(error, match="because") as caught:
        client.score(PROMPT, RESPONSE, 2)
    assert caught.value.reason == reason
    assert len(framed.bodies) == 1


def lie(handler: Handler, content: bytes) -> None:
    """The right answer to another request."""
    other = wire.encode_request(wire.Request((wire.Sample(np.int32([9]), np.int32([8, 7])),), 2, model="small"))
    handler.reply(200, bytes(frame_answer(other)))


def flood(handler: Handler, content: bytes) -> None:
    handler.reply(200, bytes(content) + bytes(1 << 20))


@pytest.mark.parametrize("failure", [lie, flood, status(200, b"CLSA"), status(200, b"")])
def test_a_lying_answer_is_a_named_error_and_no_array(framed: Server, failure: Behaviour) -> None:
    framed.script = [failure]
    with TeacherClient(framed.url) as client, pytest.raises(TeacherAnswerInvalid):
        client.score(PROMPT, RESPONSE, 2)


def test_tokens_in_flight_are_bounded(framed: Server) -> None:
    with TeacherClient(framed.url, in_flight_tokens=60, concurrency=8) as client:
        found = client.score_batch([([1] * 10, [n] * 15) for n in range(9)], 2)
    assert [len(scores.chosen) for scores in found] == [15] * 9
    assert sorted(wire.decode_request(body["frame"]).tokens for body in framed.bodies) == [25, 50, 50, 50, 50]
    assert framed.most_in_flight == 1  # 50 and 50 do not fit into 60


@pytest.fixture
def three() -> Iterator[list[Server]]:
    """Three replicas of one teacher."""
    servers = [Server() for _ in range(3)]
    threads = [threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.01}) for one in servers]
    for one, thread in zip(servers, threads, strict=True):
        one.info = FRAMES
        thread.start()
    try:
        yield servers
    finally:
        for one, thread in zip(servers, threads, strict=True):
            one.ending.set()
            one.shutdown()
            one.server_close()
            thread.join(10)


def test_the_replica_with_the_fewest_tokens_waiting_is_asked(three: list[Server]) -> None:
    for one, waiting in zip(three, (500, 20, 300), strict=True):
        one.queue_tokens = waiting
    with TeacherClient(",".join(one.url for one in three)) as client:
        client.score(PROMPT, RESPONSE, 2)
    assert [len(one.bodies) for one in three] == [0, 1, 0]


def test_a_batch_is_shared_by_the_replicas(three: list[Server]) -> None:
    gate = threading.Barrier(3)

    def together(handler: Handler, content: bytes) -> None:
        gate.wait(10)  # breaks unless each replica works at the same time
        handler.reply(200, bytes(content))

    for one in three:
        one.script = [together]
    with TeacherClient([one.url for one in three]) as client:
        found = client.score_batch([(PROMPT, RESPONSE)] * 9, 2)
    assert len(found) == 9
    assert [len(one.bodies) for one in three] == [1, 1, 1]


def test_what_one_replica_refuses_another_gets_at_once(three: list[Server]) -> None:
    three[0].script = [problem(429, "TeacherUnavailable", True, retry_after="30")]
    three[1].script = [drop]
    three[2].queue_tokens = 1000  # the last that is tried
    with TeacherClient([one.url for one in three]) as client:
        client.info()
        started = time.monotonic()
        client.score(PROMPT, RESPONSE, 2)
    assert time.monotonic() - started < 5
    assert len(three[2].bodies) == 1


def test_a_replica_that_is_gone_is_passed_over_and_found_again(three: list[Server]) -> None:
    gone = three[0]
    gone.shutdown()
    gone.server_close()
    with TeacherClient([one.url for one in three], attempts=2) as client:
        for _ in range(4):
            client.score(PROMPT, RESPONSE, 2)
    assert sum(len(one.bodies) for one in three[1:]) == 4


# Servers that mean harm


def drip_head(handler: Handler, content: bytes) -> None:
    """The status line and the headers, a byte now and then, without end."""
    for byte in b"HTTP/1.1 200 OK\r\nx-fill: " + b"a" * 2000:
        if handler.server.ending.wait(0.02):
            return
        handler.wfile.write(bytes([byte]))


def test_headers_that_drip_do_not_outlast_the_deadline(framed: Server) -> None:
    with TeacherClient(framed.url) as client:
        client.info()
        framed.script = [drip_head]
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable):
            client.score(PROMPT, RESPONSE, 2, timeout_s=0.5)
    assert time.monotonic() - started < 5  # all of it would take 40 s


def test_a_proxy_of_the_environment_is_not_asked(framed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    with TeacherClient(framed.url, attempts=1) as client:
        client.score(PROMPT, RESPONSE, 2)


@pytest.mark.parametrize("tokens", ["\xb2", "9" * 5000, "-5", "1e9"], ids=["superscript", "long", "negative", "float"])
def test_a_load_that_is_none_is_passed_over(framed: Server, tokens: str) -> None:
    framed.script = [lambda handler, content: handler.reply(200, content, Claas_Queue_Tokens=tokens)]
    with TeacherClient(framed.url, attempts=1) as client:
        client.score(PROMPT, RESPONSE, 2)


@pytest.mark.parametrize("tokens", [float("inf"), -(10**12), None, [], "x"], ids=str)
def test_a_replica_whose_load_is_none_takes_nobody_down(three: list[Server], tokens: Any) -> None:
    three[0].queue_tokens = tokens
    with TeacherClient([one.url for one in three]) as client:
        client.score(PROMPT, RESPONSE, 2)


def test_several_stock_vllms_are_tried_one_after_the_other(three: list[Server]) -> None:
    for one in three:
        one.info = None
    three[0].script = three[1].script = [status(500)]
    with TeacherClient([one.url for one in three], attempts=3) as client:
        client.score(PROMPT, RESPONSE, 2)
    assert [len(one.bodies) for one in three] == [1, 1, 1]


@pytest.mark.parametrize(
    "change",
    [
        {"model": 5},
        {"model": ""},
        {"model": "x" * 600},
        {"tokenizer_fingerprint": "zz"},
        {"tokenizer_fingerprint": 5},
        {"vocab_size": "many"},
        {"vocab_size": 1.5},
        {"max_logprobs": []},
        {"max_logprobs": True},
        {"max_model_len": 0},
        {"request_tokens": "a"},
        {"request_tokens": -1},
    ],
    ids=str,
)
def test_an_info_that_cannot_be_is_a_named_error(framed: Server, change: dict[str, Any]) -> None:
    framed.info = {**FRAMES, **change}
    with TeacherClient(framed.url) as client, pytest.raises(TeacherAnswerInvalid):
        client.score(PROMPT, RESPONSE, 2)


def test_an_error_of_digits_takes_no_time(server: Server) -> None:
    server.script = [status(400, json.dumps({"error": {"message": "1" * 60_000}}).encode())]
    with TeacherClient(server.url) as client:
        client.info()
        started = time.thread_time()
        with pytest.raises(TeacherRefused):
            client.score(PROMPT, RESPONSE, 2)
    assert time.thread_time() - started < 3  # it took 29 s


@pytest.mark.parametrize("logprob", [[1, 2], [1], {"a": 1}], ids=str)
def test_a_logprob_that_is_a_list_is_a_named_error(server: Server, logprob: Any) -> None:
    row = {str(token): {"logprob": logprob} for token in RESPONSE}
    content = json.dumps({"choices": [{"prompt_logprobs": [None, None, None, row, row]}]}).encode()
    server.script = [status(200, content)]
    with TeacherClient(server.url) as client, pytest.raises(TeacherAnswerInvalid):
        client.score(PROMPT, RESPONSE, 2)


def test_chosen_ids_beyond_int32_are_refused_and_not_wrapped(framed: Server) -> None:
    with TeacherClient(framed.url) as client, pytest.raises(TeacherRefused, match="outside every vocabulary"):
        client.score(PROMPT, RESPONSE, 2, chosen=[[2**32 + 5, 6], [5, 6]])
    assert not framed.bodies


def test_a_packed_answer_is_not_unpacked(framed: Server) -> None:
    framed.script = [status(200, gzip.compress(bytes(1 << 26)), content_encoding="gzip")]
    with TeacherClient(framed.url) as client:
        client.info()
        tracemalloc.start()
        try:
            with pytest.raises(TeacherAnswerInvalid):
                client.score(PROMPT, RESPONSE, 2)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 4 << 20


def test_no_call_waits_for_anothers_info_past_its_deadline(framed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "do_GET", lambda handler: handler.server.ending.wait(30))
    with TeacherClient(framed.url, attempts=1, timeout_s=6) as client:

        def ask() -> None:
            with contextlib.suppress(TeacherUnavailable):
                client.info()

        first = threading.Thread(target=ask)
        first.start()
        while not client._info_lock.locked():
            time.sleep(0.01)
        started = time.monotonic()
        with pytest.raises(TeacherUnavailable, match="another call"):
            client.score(PROMPT, RESPONSE, 2, timeout_s=0.3)
        assert time.monotonic() - started < 4
        framed.ending.set()
        first.join(10)


def test_a_replica_that_lies_is_passed_over(three: list[Server]) -> None:
    liar, *others = three
    for other in others:
        other.queue_tokens = 1000
    liar.script = [lambda handler, content: handler.reply(200, b"CLSA" + bytes(40))]
    with TeacherClient([server.url for server in three]) as client:
        assert client.score(PROMPT, RESPONSE, 2).chosen.shape == (2,)


@pytest.mark.parametrize("ids", [[1.7, 2.2], [True, False], ["1", "2"], [10**30, 1], [None, 1]])
def test_ids_that_are_no_whole_numbers_are_refused(framed: Server, ids: list[object]) -> None:
    with TeacherClient(framed.url) as client, pytest.raises(TeacherRefused):
        client.score(PROMPT, ids, 2)  # type: ignore[arg-type]


def test_a_password_in_the_url_is_in_no_message() -> None:
    with TeacherClient("http://user:secret@127.0.0.1:1", attempts=1) as client:
        with pytest.raises(TeacherUnavailable) as caught:
            client.score(PROMPT, RESPONSE, 2)
    assert "secret" not in str(caught.value) + client.url
    with pytest.raises(ValueError, match="expected http"):
        TeacherClient("http://host:port")


def test_a_teacher_that_is_put_right_is_seen(framed: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with TeacherClient(framed.url) as client:
        assert client.info().max_logprobs == FRAMES["max_logprobs"]
        framed.info = {**FRAMES, "max_logprobs": 7}
        assert client.info().max_logprobs != 7, "asked twice within half a minute"
        monkeypatch.setattr("claas_teacher.client.INFO_SECONDS", 0.0)
        assert client.info().max_logprobs == 7
