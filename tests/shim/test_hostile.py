"""What no client of ours would send: every answer is a problem of the caller's, and the shim goes on as before."""

from __future__ import annotations

import http.client
import json
import random
import socket
import time
from typing import Any

import httpx
import pytest

from shimstage import Shim, ShimStage

pytestmark = pytest.mark.controlplane

JSON = {"Content-Type": "application/json"}
BODIES = ["/v1/distill", "/v1/distill/lite", "/v1/lora/init", "/v1/adapters/coder/rollback"]
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[]",
    "a string": b'"x"',
    "a number": b"1",
    "half": b'{"lora_uri": "s3://',
    "deep lists": b"[" * 200_000,
    "deep objects": b'{"a":' * 100_000,
    "deep in a field": b'{"teacher_logprobs": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    "a huge integer": b'{"priority": ' + b"9" * 10_000 + b"}",
    "a huge exponent": b'{"training": {"alpha": 1e999999999}}',
    "NaN": b'{"training": {"alpha": NaN}}',
    "Infinity": b'{"training": {"alpha": Infinity}}',
    "not UTF-8": b'{"prompt": "\xff\xfe\xfd"}',
    "UTF-16": '{"prompt": "x"}'.encode("utf-16"),
    "half a surrogate": b'{"prompt": "\\ud800"}',
    "half a surrogate in a name": b'{"\\udc00": 1}',
    "a name twice": b'{"prompt": "a", "prompt": "b"}',
    "a raw NUL": b'{"prompt": "\x00"}',
    "very many names": json.dumps({f"x{n}": n for n in range(20_000)}).encode(),
    "very many wrong samples": json.dumps({"samples": [7] * 20_000}).encode(),
    "__proto__": b'{"__proto__": {"a": 1}, "constructor": 1}',
}


def calm(answer: httpx.Response) -> None:
    """A refusal, in our words."""
    assert 400 <= answer.status_code < 500, f"{answer.status_code} {answer.text[:300]}"
    assert answer.headers["content-type"] == "application/problem+json"
    assert answer.json()["status"] == answer.status_code
    assert len(answer.content) < 20_000


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_bodies(team: httpx.Client, path: str, name: str) -> None:
    calm(team.post(path, content=HOSTILE[name], headers=JSON))


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    "kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", "", "json", "a/b/c"]
)
def test_other_content_types(team: httpx.Client, path: str, kind: str) -> None:
    answer = team.post(path, content=b'{"version": "x"}', headers={"Content-Type": kind})
    calm(answer)
    assert answer.status_code == 415


def test_a_compressed_body_is_not_unpacked(team: httpx.Client) -> None:
    calm(team.post("/v1/distill", content=b"\x1f\x8b" + b"x" * 100, headers=JSON | {"Content-Encoding": "gzip"}))


def test_bodies_too_large(team: httpx.Client) -> None:
    said = json.dumps({"prompt": "x" * (5 * 2**20)}).encode()
    answer = team.post("/v1/distill", content=said, headers=JSON)
    assert answer.status_code == 413
    calm(answer)

    def endless() -> Any:
        for _ in range(600):
            yield b" " * 10_000

    try:
        answer = team.post("/v1/distill", content=endless(), headers=JSON)
    except (httpx.WriteError, httpx.ReadError, httpx.RemoteProtocolError):
        return  # hung up on while still sending: as good
    assert answer.status_code == 413


PATHS = [
    "/v1/requests/%2e%2e",
    "/v1/requests/..%2f..%2fsecrets",
    "/v1/requests/%2e%2e%2fstatus",
    "/v1/requests/a%00b",
    "/v1/requests/a%0d%0aX-Evil:%201",
    "/v1/requests/A",
    "/v1/requests/a%20b",
    "/v1/requests/" + "a" * 300,
    "/v1/requests/a%3Flimit=1",
    "/v1/requests/a%23",
    "/v1/requests/%ff%fe",
    "/v1/requests/%F0%9F%98%80",
    "/v1/requests//",
    "/v1//requests",
    "/v1/requests/",
    "/v1/requests/status/status",
    "/v1/adapters/..%2f..%2fnamespaces%2fkube-system",
    "/v1/adapters/a/versions/..",
    "/docs/..%2f..%2fmodels.py",
    "/docs/%2e%2e/models.py",
    "/",
    "/v2/distill",
]


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("method", ["GET", "DELETE"])
def test_path_tricks(shim: Shim, stage: ShimStage, path: str, method: str) -> None:
    """Sent as they are: httpx would tidy them up."""
    headers = f"Host: x\r\nConnection: close\r\nAuthorization: Bearer {stage.token()}\r\n"
    answer = raw(shim, f"{method} {path} HTTP/1.1\r\n{headers}\r\n".encode())
    status = int(answer.split(b" ", 2)[1])
    assert status in (400, 404, 405, 422), answer[:300]
    assert b"x-evil" not in answer.lower()


@pytest.mark.parametrize(
    "query",
    [
        "limit=0",
        "limit=-1",
        "limit=1e9",
        "limit=99999999999999999999",
        "limit=NaN",
        "continue=" + "x" * 5000,
        "continue=..%2f..",
        "continue=%00",
        "continue=e30",
        "namespace=..",
        "namespace=kube-system%2Fpods",
        "namespace=%00",
        "wait=nan",
        "wait=inf",
        "wait=-1",
        "limti=1",
        "continue=eyJ2IjoibWV0YS5rOHMuaW8vdjEiLCJydiI6MSwic3RhcnQiOiIuLi8uLi8ifQ",
    ],
)
def test_hostile_parameters(team: httpx.Client, query: str) -> None:
    calm(team.get(f"/v1/requests?{query}"))
    calm(team.get(f"/v1/adapters/nobody/versions?{query}"))


def test_hostile_headers(team: httpx.Client) -> None:
    for headers in (
        {"Idempotency-Key": "x" * 256},
        {"Idempotency-Key": ""},
        {"Claas-Namespace": "../x"},
        {"Prefer": "x" * 600},
    ):
        calm(team.post("/v1/distill", json={"adapter": "a", "prompt": "p", "response": "r"}, headers=headers))


def test_methods_that_are_not_there(team: httpx.Client) -> None:
    for method, path in (
        ("PUT", "/v1/distill"),
        ("GET", "/v1/distill"),
        ("PATCH", "/v1/requests/a"),
        ("TRACE", "/docs"),
    ):
        answer = team.request(method, path)
        assert answer.status_code == 405
        assert answer.headers["allow"]
    assert team.request("PATCH", "/v1/requests/a").headers["allow"] == "DELETE, GET"


def test_a_page_that_is_not_there(team: httpx.Client) -> None:
    for path in ("requests", "adapters"):
        answer = team.get(f"/v1/{path}?continue=e30")
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (404, "continue")


def test_what_is_not_http(shim: Shim) -> None:
    for junk in (b"\x00" * 100, b"GET\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x16\x03\x01\x02\x00\x01", b"A" * 100_000):
        answer = raw(shim, junk)
        assert answer[:12] in (b"", b"HTTP/1.1 400", b"HTTP/1.1 404"), junk[:20]
        assert not answer or b"application/problem+json" in answer, answer


def test_a_body_that_is_not_as_long_as_it_says(shim: Shim, stage: ShimStage) -> None:
    head = f"POST /v1/distill HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {stage.token()}\r\n".encode()
    with socket.create_connection(("127.0.0.1", shim.port), timeout=5) as connection:
        connection.sendall(head + b"Content-Type: application/json\r\nContent-Length: 100\r\n\r\n{")
    for lengths in (b"Content-Length: -1", b"Content-Length: 1\r\nContent-Length: 2", b"Content-Length: x"):
        assert raw(shim, head + lengths + b"\r\n\r\n{")[:12] == b"HTTP/1.1 400"


@pytest.mark.parametrize("seed", range(4))
def test_the_published_example_with_something_broken(stage: ShimStage, team: httpx.Client, seed: int) -> None:
    """Every mutation is a 2xx or a refusal; the shim and the API server agree on what is valid."""
    chance = random.Random(seed)
    odd: list[Any] = [None, True, 0, -1, 2**62, 1.5, -0.0, 1e308, "", "\0", "x" * 300, "../..", [], {}, [[]], {"a": []}]
    for _ in range(60):
        said: dict[str, Any] = {
            "lora_uri": f"s3://adapters/{stage.team}/broken/",
            "prompt": "p",
            "response": "r",
            "feedback": "f",
            "training": {"learning_rate": 1e-4, "alpha": 0.5, "teacher_top_k": 100},
            "priority": 1,
            "messages": None,
            "rollout_logprobs": [-0.1],
        }
        for _ in range(chance.randint(1, 3)):
            place = said["training"] if chance.random() < 0.4 and isinstance(said.get("training"), dict) else said
            name = chance.choice([*place, "adapter", "samples", "teacher", "x\ud7ff"])
            place[name] = chance.choice(odd)
        answer = team.post("/v1/distill?wait=0", content=json.dumps(said), headers=JSON)
        assert answer.status_code < 500, (said, answer.text)
        assert answer.status_code == 202 or answer.headers["content-type"] == "application/problem+json", said


def test_afterwards_it_serves_as_before(stage: ShimStage, shim: Shim, team: httpx.Client) -> None:
    said = {"lora_uri": f"s3://adapters/{stage.team}/after/", "prompt": "p", "response": "r"}
    assert team.post("/v1/distill", json=said).status_code == 200
    lines = [json.loads(line) for line in shim.log.read_text().splitlines()]
    assert [line for line in lines if line["level"] in ("ERROR", "CRITICAL")] == []


def raw(shim: Shim, data: bytes) -> bytes:
    """What comes back for bytes as they are, until the connection is closed or quiet."""
    with socket.create_connection(("127.0.0.1", shim.port), timeout=1) as connection:
        found = b""
        try:
            connection.sendall(data)
            while chunk := connection.recv(65536):
                found += chunk
        except (ConnectionError, TimeoutError):
            pass
    return found


def head(stage: ShimStage, line: str, *headers: str) -> bytes:
    """A call's beginning, with a token."""
    lines = [line, "Host: x", "Connection: close", f"Authorization: Bearer {stage.token()}", *headers]
    return "\r\n".join([*lines, "", ""]).encode("latin-1")


POST = "POST /v1/distill HTTP/1.1"
TYPE = "Content-Type: application/json"
STRANGE: dict[str, tuple[str, list[str], bytes]] = {
    "chunks that are none": (POST, [TYPE, "Transfer-Encoding: chunked"], b"zz\r\n{}\r\n0\r\n\r\n"),
    "a huge chunk": (POST, [TYPE, "Transfer-Encoding: chunked"], b"ffffffffffffffffffffff\r\n{"),
    "two lengths": (POST, [TYPE, "Transfer-Encoding: chunked", "Content-Length: 2"], b"0\r\n\r\n"),
    "gzip": (POST, [TYPE, "Content-Encoding: gzip", "Content-Length: 4"], b"\x1f\x8b\x08\x00"),
    "a transfer encoding": (POST, [TYPE, "Transfer-Encoding: gzip, chunked"], b"0\r\n\r\n"),
    "huge headers": (POST, [TYPE, f"X-Junk: {'x' * 100_000}", "Content-Length: 2"], b"{}"),
    "many headers": (POST, [TYPE, *(f"X-{n}: {n}" for n in range(10_000)), "Content-Length: 2"], b"{}"),
    "two tokens": (POST, [TYPE, "Authorization: Bearer x", "Content-Length: 2"], b"{}"),
    "utf-16 by its type": (POST, ["Content-Type: application/json; charset=utf-16", "Content-Length: 2"], b"{}"),
    "bytes in a header": (POST, [TYPE, "Prefer: \xff\xfe", "Content-Length: 2"], b"{}"),
    "the whole url": ("GET http://elsewhere/v1/requests/x HTTP/1.1", [], b""),
    "a query that is not utf-8": ("GET /v1/requests?continue=%ff%fe HTTP/1.1", [], b""),
    "a parameter twice": ("GET /v1/requests?limit=1&limit=x HTTP/1.1", [], b""),
    "a long query": (f"GET /v1/requests?continue={'x' * 20_000} HTTP/1.1", [], b""),
    "an upgrade": ("GET /v1/requests/x HTTP/1.1", ["Upgrade: websocket", "Sec-WebSocket-Key: eA=="], b""),
    "an unknown method": ("BREW /v1/distill HTTP/1.1", [], b""),
    "OPTIONS": ("OPTIONS /v1/distill HTTP/1.1", ["Origin: http://x", "Access-Control-Request-Method: POST"], b""),
    "OPTIONS of all": ("OPTIONS * HTTP/1.1", [], b""),
    "CONNECT": ("CONNECT elsewhere:443 HTTP/1.1", [], b""),
    "HEAD": ("HEAD /v1/distill HTTP/1.1", [], b""),
    "a body with GET": ("GET /v1/requests/x HTTP/1.1", [TYPE, "Content-Length: 200000"], b"[" * 200_000),
    "a NUL in the path": ("GET /v1/requests/%00 HTTP/1.1", [], b""),
    "a doubly encoded path": ("GET /v1/requests/%252e%252e%252fsecrets HTTP/1.1", [], b""),
}


@pytest.mark.parametrize("name", STRANGE)
def test_strange_calls(shim: Shim, stage: ShimStage, name: str) -> None:
    """Refused, in our words; no other site is let in."""
    line, headers, body = STRANGE[name]
    answer = raw(shim, head(stage, line, *headers) + body)
    begin, _, content = answer.partition(b"\r\n\r\n")
    status = int(begin.split(b" ", 2)[1])
    assert 400 <= status < 500, answer[:300]
    assert b"access-control-allow" not in begin.lower()
    assert b"application/problem+json" in begin and b"x-request-id" in begin.lower(), answer[:300]
    assert not content or json.loads(content)["status"] == status


def test_a_body_that_never_comes_holds_nobody_up(shim: Shim, stage: ShimStage, team: httpx.Client) -> None:
    with socket.create_connection(("127.0.0.1", shim.port), timeout=5) as connection:
        connection.sendall(head(stage, POST, TYPE, "Content-Length: 100") + b"{")
        assert team.get("/v1/whoami").status_code == 200


@pytest.mark.stress
def test_a_slow_body_is_given_up(shim: Shim, stage: ShimStage) -> None:
    """After half a minute, although a byte comes now and then."""
    with socket.create_connection(("127.0.0.1", shim.port), timeout=5) as connection:
        connection.sendall(head(stage, POST, TYPE, "Content-Length: 100"))
        found = b""
        for _ in range(20):
            try:
                connection.sendall(b" ")
                found += connection.recv(65536)
            except TimeoutError:
                continue
            break
    assert found.startswith(b"HTTP/1.1 408") and b"application/problem+json" in found


@pytest.mark.stress
@pytest.mark.parametrize("drips", ["", "X: y\r\n"], ids=["silence", "one header after the other"])
def test_headers_that_never_end_are_given_up(shim: Shim, drips: str) -> None:
    """After ten seconds; a call that takes longer than that, and one that comes later, are answered."""
    with socket.create_connection(("127.0.0.1", shim.port), timeout=2) as connection:
        if drips:
            connection.sendall(b"GET /v1/health HTTP/1.1\r\nHost: x\r\n")
        started = time.monotonic()
        while time.monotonic() - started < 20:
            try:
                connection.sendall(drips.encode())
                if connection.recv(1) == b"":
                    break
            except TimeoutError:
                continue
            except ConnectionError:
                break
        assert 8 < time.monotonic() - started < 16


@pytest.mark.stress
def test_a_connection_serves_calls_that_take_longer_than_its_headers_may(shim: Shim, stage: ShimStage) -> None:
    stage.adapter("asleep-too", ready=False)
    said = json.dumps({"adapter": "asleep-too", "prompt": "p", "response": "r"})
    headers = JSON | {"Authorization": f"Bearer {stage.token()}"}
    connection = http.client.HTTPConnection("127.0.0.1", shim.port, timeout=30)
    connection.connect()
    socket_before = connection.sock
    for _ in range(2):
        connection.request("POST", "/v1/distill?wait=12", said, headers)
        answer = connection.getresponse()
        assert (answer.status, connection.sock) == (202, socket_before), answer.read()
        answer.read()
    connection.close()
