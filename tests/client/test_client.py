"""Both clients, call by call, over a transport that the test answers."""

from __future__ import annotations

import inspect
import json
import threading
import time
from typing import Any

import httpx
import pytest

import claas_client
from claas_client import (
    AnswerInvalid,
    AsyncClient,
    BadRequest,
    Client,
    Conflict,
    ConnectionFailed,
    Forbidden,
    NotFound,
    ProblemError,
    RequestFailed,
    Retries,
    ServerProblem,
    TooManyRequests,
    Unauthorized,
    WaitTimeout,
)
from clientkit import URL, Script, Use

NUMBERS = {
    "total_loss": 0.234,
    "pg_loss": 0.156,
    "jsd_reg": 0.078,
    "mean_advantage": -0.045,
    "frac_positive_advantage": 0.62,
    "mean_is_ratio": 1.0,
    "clip_fraction": 0.0,
    "grad_norm": 0.89,
    "tokens_processed": 128,
}
NEXT = "s3://my-bucket/loras/user123/coder-v1-20261123-123456-0a1b2c3d/"
BODY: Any = {"adapter": "coder", "prompt": "p", "response": "r", "feedback": "f"}


def answer(content: Any, status: int = 200, **headers: str) -> httpx.Response:
    return httpx.Response(status, json=content, headers=headers)


def request(state: str = "Pending", **fields: Any) -> dict[str, Any]:
    return {"id": "rest-1", "namespace": "user123", "state": state, "reason": "", "message": "", "phase": ""} | fields


def complete() -> dict[str, Any]:
    return request("Complete", lora_uri=NEXT, metadata=NUMBERS)


def problem(status: int, **members: Any) -> httpx.Response:
    content = {"type": "urn:claas:problem:x", "title": "T", "status": status, "detail": "D", "fix": "F"} | members
    headers = {"content-type": "application/problem+json", "x-request-id": "call-7"}
    headers |= {"retry-after": str(members["retry"])} if "retry" in members else {}
    return httpx.Response(status, content=json.dumps(content), headers=headers)


# Teaching


def test_distill_gives_the_new_version_and_the_nine_numbers(use: Use) -> None:
    script = Script([answer({"lora_uri": NEXT, "metadata": NUMBERS})])
    made = use(script, namespace="user123").call("distill", training={"learning_rate": 1e-4}, **BODY)
    assert made.lora_uri == NEXT
    assert made.metadata.model_dump() == NUMBERS
    (sent,) = script.seen
    assert json.loads(sent.content) == BODY | {"training": {"learning_rate": 1e-4}}
    assert sent.headers["authorization"] == "Bearer t"
    assert sent.headers["claas-namespace"] == "user123"
    assert float(sent.url.params["wait"]) > 0
    assert len(sent.headers["idempotency-key"]) > 20


def test_distill_goes_on_waiting_where_the_server_does_not(use: Use) -> None:
    script = Script([answer(request(), 202), answer(request("Running")), answer(complete())])
    assert use(script).call("distill", **BODY).lora_uri == NEXT
    assert script.paths == ["POST /v1/distill", "GET /v1/requests/rest-1", "GET /v1/requests/rest-1"]


def test_distill_lite_has_its_own_route(use: Use) -> None:
    script = Script([answer({"lora_uri": NEXT, "metadata": NUMBERS})])
    use(script).call("distill_lite", teacher_logprobs=[-0.1], **BODY)
    assert script.paths == ["POST /v1/distill/lite"]


def test_nothing_learnt_is_an_answer_with_zeros(use: Use) -> None:
    script = Script([answer(request("Complete", reason="NoSignal", lora_uri=NEXT))])
    made = use(script).call("wait", "rest-1")
    assert (made.lora_uri, made.metadata.total_loss, made.metadata.mean_is_ratio) == (NEXT, 0, 1)
    lost = Script([answer(request("Complete", lora_uri=NEXT))])
    with pytest.raises(AnswerInvalid, match=f"{NEXT}, and its numbers were lost"):
        use(lost).call("wait", "rest-1")


def test_a_request_that_fails_says_why_by_either_way(use: Use) -> None:
    failed = request("Failed", reason="ResponseTooLong", message="samples[0].response has 9000 tokens")
    by_polling = Script([answer(request(), 202), answer(failed)])
    at_once = Script([problem(422, reason="ResponseTooLong", instance="/v1/requests/rest-1")])
    for script in (by_polling, at_once):
        with pytest.raises(RequestFailed) as caught:
            use(script).call("distill", **BODY)
        assert caught.value.reason == "ResponseTooLong"
    assert len(at_once.seen) == 1


def test_what_failed_for_good_is_not_tried_again_though_it_is_a_503(use: Use) -> None:
    script = Script([problem(503, reason="BackoffLimitExceeded", instance="/v1/requests/rest-1", retry=1)])
    with pytest.raises(RequestFailed):
        use(script).call("distill", **BODY)
    assert len(script.seen) == 1


def test_a_wait_that_ends_names_the_request_and_stops_nothing(use: Use) -> None:
    script = Script([answer(request(), 202), answer(request("Running"))])
    for call, arguments, options in (("distill", (), BODY), ("wait", ("rest-1",), {})):
        with pytest.raises(WaitTimeout) as caught:
            use(script).call(call, *arguments, timeout=0.02, **options)
        assert caught.value.request_id == "rest-1"
    assert "DELETE" not in " ".join(script.paths)


def test_submit_gives_a_handle_that_waits_follows_and_cancels() -> None:
    events = 'event: phase\ndata: {"id":"rest-1","state":"Running","phase":"Scoring"}\n\n'
    events += f"event: end\ndata: {json.dumps(complete())}\n\n"
    stream = httpx.Response(200, text=events, headers={"content-type": "text/event-stream"})
    script = Script([answer(request(), 202), answer(complete()), stream, answer(request(cancelled=True), 202)])
    with Client(URL, transport=httpx.MockTransport(script)) as client:
        handle = client.submit(**BODY)
        assert handle.accepted.state == "Pending"
        assert handle.wait().lora_uri == NEXT
        assert [event.type for event in handle.events()] == ["phase", "end"]
        assert handle.cancel().cancelled
    assert script.seen[0].url.params["wait"] == "0"
    assert script.paths[1:] == [
        "GET /v1/requests/rest-1",
        "GET /v1/requests/rest-1/events",
        "DELETE /v1/requests/rest-1",
    ]


async def test_an_async_handle_does_the_same() -> None:
    script = Script([answer(request(), 202), answer(complete()), answer(request(cancelled=True), 202)])
    async with AsyncClient(URL, transport=httpx.MockTransport(script)) as client:
        handle = await client.submit(**BODY)
        assert (await handle.wait()).lora_uri == NEXT
        assert (await handle.cancel()).cancelled
        assert client.handle("rest-1").id == handle.id


def test_submit_of_a_request_that_has_ended_long_ago_gives_its_handle(use: Use) -> None:
    script = Script(
        [
            answer({"lora_uri": NEXT, "metadata": NUMBERS}, **{"content-location": "/v1/requests/rest-1?namespace=x"}),
            answer(complete()),
        ]
    )
    assert use(script).call("submit", idempotency_key="k", **BODY).accepted.lora_uri == NEXT


def test_init_lora_waits_until_the_adapter_has_a_version(use: Use) -> None:
    script = Script([answer({"name": "coder"}, 202), answer({"name": "coder"}, 202), answer({"lora_uri": "s3://b/c/"})])
    assert use(script).call("init_lora", "s3://b/c/", lora_r=8).lora_uri == "s3://b/c/"
    assert [json.loads(sent.content) for sent in script.seen] == [{"output_uri": "s3://b/c/", "lora_r": 8}] * 3
    with pytest.raises(WaitTimeout):
        use(Script([answer({"name": "coder"}, 202)])).call("init_lora", "s3://b/c/", timeout=0.05)


# What is sent again


@pytest.mark.parametrize("trouble", [httpx.ConnectError("x"), httpx.ReadError("x"), httpx.RemoteProtocolError("x")])
def test_a_lost_connection_is_tried_again_with_the_same_key(use: Use, trouble: Exception) -> None:
    script = Script([trouble, problem(503), problem(429, retry=0), answer({"lora_uri": NEXT, "metadata": NUMBERS})])
    assert use(script).call("distill", **BODY).lora_uri == NEXT
    assert len({sent.headers["idempotency-key"] for sent in script.seen}) == 1
    assert len(script.seen) == 4


def test_a_caller_s_own_key_is_sent(use: Use) -> None:
    script = Script([answer(request(), 202)])
    use(script).call("submit", idempotency_key="mine", **BODY)
    assert script.seen[0].headers["idempotency-key"] == "mine"


def test_two_calls_have_two_keys(use: Use) -> None:
    script = Script([answer(request(), 202)])
    for _ in range(2):
        use(script).call("submit", **BODY)
    assert len({sent.headers["idempotency-key"] for sent in script.seen}) == 2


def test_no_answer_after_all_tries_leaves_the_key_to_go_on_with(use: Use) -> None:
    script = Script([httpx.ReadTimeout("x")])
    with pytest.raises(ConnectionFailed, match="ReadTimeout, given up after 4 tries") as caught:
        use(script).call("distill", **BODY)
    assert caught.value.idempotency_key == script.seen[0].headers["idempotency-key"]
    assert isinstance(caught.value.__cause__, httpx.ReadTimeout)
    assert len(script.seen) == 4


def test_tries_are_bounded_and_the_last_refusal_is_raised(use: Use) -> None:
    script = Script([problem(429, retry=0)])
    with pytest.raises(TooManyRequests) as caught:
        use(script).call("request", "rest-1")
    assert caught.value.retry_after == 0
    assert len(script.seen) == 4


def test_a_long_retry_after_is_the_caller_s_to_decide_about(use: Use) -> None:
    script = Script([problem(429, retry=3600)])
    with pytest.raises(TooManyRequests) as caught:
        use(script).call("distill", **BODY)
    assert caught.value.retry_after == 3600
    assert len(script.seen) == 1


def test_retry_after_is_obeyed() -> None:
    script = Script([problem(503, retry=1), answer(request())])
    retries = Retries(cap_seconds=2, jitter=lambda: 0.0)
    with Client(URL, transport=httpx.MockTransport(script), retries=retries) as client:
        started = time.monotonic()
        client.request("rest-1")
    assert time.monotonic() - started >= 1


@pytest.mark.parametrize("status", [400, 401, 403, 404, 409, 410, 413, 422, 500, 501])
def test_what_another_try_cannot_mend_is_not_tried_again(use: Use, status: int) -> None:
    script = Script([problem(status)])
    with pytest.raises(ProblemError) as caught:
        use(script).call("distill", **BODY)
    assert caught.value.status == status
    assert len(script.seen) == 1


def test_whoever_wants_no_second_try_has_none(use: Use) -> None:
    script = Script([httpx.ConnectError("x")])
    with pytest.raises(ConnectionFailed):
        use(script, retries=Retries(attempts=1)).call("whoami")
    assert len(script.seen) == 1


def test_a_token_may_change_between_two_tries(use: Use) -> None:
    tokens = iter(["old", "new"])
    script = Script([problem(503), answer(request())])
    use(script, token=lambda: next(tokens)).call("request", "rest-1")
    assert [sent.headers["authorization"] for sent in script.seen] == ["Bearer old", "Bearer new"]


# Problems


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, BadRequest),
        (401, Unauthorized),
        (403, Forbidden),
        (404, NotFound),
        (409, Conflict),
        (413, BadRequest),
        (422, BadRequest),
        (500, ServerProblem),
    ],
)
def test_a_problem_document_becomes_an_exception(use: Use, status: int, kind: type[ProblemError]) -> None:
    errors = [{"field": "training.alpha", "detail": "must be at most 1"}, {"field": "priority", "detail": "no number"}]
    with pytest.raises(kind) as caught:
        use(Script([problem(status, errors=errors)])).call("distill", **BODY)
    found = caught.value
    assert (found.type, found.title, found.detail, found.fix) == ("urn:claas:problem:x", "T", "D", "F")
    assert (found.field, found.request_id) == ("training.alpha", "call-7")
    assert [error.field for error in found.errors] == ["training.alpha", "priority"]
    assert str(found) == "training.alpha: must be at most 1 (F)"


@pytest.mark.parametrize(
    "body",
    ["", "<html>Bad gateway</html>", "[1]", '{"title": 7, "errors": 3}', "[" * 100_000, '{"errors": [{"field": 1}]}'],
)
def test_an_error_without_a_document_is_one_all_the_same(use: Use, body: str) -> None:
    failure = httpx.Response(500, text=body, headers={"content-type": "application/json"})
    with pytest.raises(ServerProblem) as caught:
        use(Script([failure])).call("whoami")
    assert caught.value.title == "Internal Server Error"


@pytest.mark.parametrize("body", ["", "<html>Hello</html>", "{}", "[]", '{"lora_uri": 1}'])
def test_an_answer_that_no_claas_gives_is_told(use: Use, body: str) -> None:
    with pytest.raises(AnswerInvalid, match="is the url right"):
        use(Script([httpx.Response(200, text=body)])).call("distill", **BODY)


def test_a_token_does_not_follow_a_redirect(use: Use) -> None:
    script = Script([httpx.Response(307, headers={"location": "https://elsewhere.test/v1/whoami"})])
    with pytest.raises(AnswerInvalid, match=r"redirects to https://elsewhere\.test"):
        use(script).call("whoami")
    assert len(script.seen) == 1


def test_prompts_are_in_no_error(use: Use) -> None:
    for failure in (problem(422), httpx.ReadError("x"), httpx.Response(200, text="{}")):
        with pytest.raises(claas_client.ClaasError) as caught:
            use(Script([failure])).call("distill", adapter="a", prompt="SECRET-p", response="SECRET-r")
        assert "SECRET" not in repr(caught.value)


@pytest.mark.parametrize("url", ["claas.test", "ftp://claas.test", "https://", "https://claas.test/?a=1"])
def test_a_url_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="is not the url of a server"):
        Client(url)


def test_token_and_key_exclude_each_other() -> None:
    with pytest.raises(ValueError, match="not both"):
        Client(URL, token="a", api_key="b")


def test_a_key_is_sent_as_a_bearer_and_nothing_where_there_is_none(use: Use) -> None:
    script = Script([answer(request())])
    use(script, api_key="k").call("request", "rest-1")
    use(script, token="").call("request", "rest-1")
    assert script.seen[0].headers["authorization"] == "Bearer k"
    assert "authorization" not in script.seen[1].headers


def test_a_path_before_the_routes_is_kept(use: Use) -> None:
    script = Script([answer(request())])
    with Client("https://gateway.test/claas/", transport=httpx.MockTransport(script)) as client:
        client.request("rest-1")
    assert script.paths == ["GET /claas/v1/requests/rest-1"]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_a_name_that_would_be_another_path_is_refused(use: Use, name: str) -> None:
    with pytest.raises(ValueError, match="is not a name"):
        use(Script([answer(request())])).call("request", name)


def test_a_name_is_one_segment_whatever_it_holds(use: Use) -> None:
    script = Script([problem(404)])
    with pytest.raises(NotFound):
        use(script).call("adapter", "../requests/x?wait=1#y")
    assert script.seen[0].url.raw_path == b"/v1/adapters/..%2Frequests%2Fx%3Fwait%3D1%23y"


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_numbers_that_json_does_not_have_are_refused_here(use: Use, number: float) -> None:
    script = Script([answer(request())])
    with pytest.raises(ValueError, match="JSON"):
        use(script).call("distill", training={"learning_rate": number}, **BODY)
    assert not script.seen


# Lists, adapters, health


def test_lists_are_read_page_by_page(use: Use) -> None:
    pages = [{"items": [request(id="a", adapter="x"), request(id="b", adapter="y")], "continue": "next"}]
    pages += [{"items": [request(id="c", adapter="x")]}]
    script = Script([answer(page) for page in pages])
    assert [found.id for found in use(script).items("requests")] == ["a", "b", "c"]
    assert script.seen[1].url.params["continue"] == "next"
    assert [found.id for found in use(Script([answer(p) for p in pages])).items("requests", adapter="x")] == ["a", "c"]


def test_a_list_is_read_no_further_than_somebody_looks() -> None:
    script = Script([answer({"items": [{"name": "a"}, {"name": "b"}], "continue": "more"})])
    with Client(URL, transport=httpx.MockTransport(script)) as client:
        assert next(client.adapters()).name == "a"
    assert len(script.seen) == 1


def test_versions_lineage_and_rollback(use: Use) -> None:
    version = {"seq": 1, "version": "v1", "lora_uri": "s3://b/v1/", "at": "2026-11-25T12:00:00Z", "head": True}
    assert use(Script([answer({"items": [version]})])).items("versions", "coder")[0].head
    script = Script([answer({"items": [version], "complete": True})])
    assert use(script).call("lineage", "coder", version="v1").complete
    assert script.seen[0].url.params["version"] == "v1"
    script = Script([answer({"name": "coder"}, 202), answer({"name": "coder", "version": "v1"})])
    assert use(script).call("rollback", "coder", "v1").version == "v1"
    assert script.paths == ["POST /v1/adapters/coder/rollback"] * 2


def test_an_unhealthy_installation_is_an_answer(use: Use) -> None:
    part = {"status": "healthy", "message": ""}
    health = dict.fromkeys(("operator", "workers", "teacher", "object_store", "api_server"), part)
    script = Script([answer(health | {"status": "unhealthy", "teacher": {"status": "unhealthy"}}, 503)])
    found = use(script).call("health")
    assert not found.healthy
    assert found.teacher.status == "unhealthy"
    assert len(script.seen) == 1
    with pytest.raises(ServerProblem):
        use(Script([problem(503)])).call("health")


# Events


def events(*requests: dict[str, Any]) -> httpx.Response:
    text = "".join(
        f"event: {'end' if r['state'] == 'Complete' else 'phase'}\nid: {i}\ndata: {json.dumps(r)}\n\n: ping\n\n"
        for i, r in enumerate(requests, 1)
    )
    return httpx.Response(200, text=text, headers={"content-type": "text/event-stream; charset=utf-8"})


def test_events_end_with_the_request(use: Use) -> None:
    script = Script([events(request(), request("Running", phase="Scoring"), complete())])
    found = use(script).items("events", "rest-1")
    assert [(event.type, event.request.phase) for event in found] == [("phase", ""), ("phase", "Scoring"), ("end", "")]


def test_a_stream_that_breaks_goes_on_without_telling_anything_twice(use: Use) -> None:
    script = Script(
        [
            events(request(), request("Running")),
            httpx.ReadError("x"),
            problem(503),
            events(request("Running")),
            events(request("Running"), complete()),
        ]
    )
    found = use(script).items("events", "rest-1")
    assert [event.request.state for event in found] == ["Pending", "Running", "Complete"]
    assert script.seen[1].headers["last-event-id"] == "2"


def test_a_stream_that_never_says_anything_is_given_up(use: Use) -> None:
    with pytest.raises(ConnectionFailed, match="the stream has ended before the request"):
        use(Script([events()])).items("events", "rest-1")


def test_a_stream_is_refused_like_any_call(use: Use) -> None:
    with pytest.raises(NotFound):
        use(Script([problem(404)])).items("events", "rest-1")
    with pytest.raises(AnswerInvalid):
        use(Script([answer({})])).items("events", "rest-1")


def test_a_stream_ends_with_its_time_limit(use: Use) -> None:
    with pytest.raises(WaitTimeout):
        use(Script([events(request())])).items("events", "rest-1", timeout=0.05)


# Both clients


def test_both_clients_offer_the_same_with_the_same_signatures() -> None:
    def offered(kind: type) -> dict[str, str]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: str(inspect.signature(method)) for name, method in methods if not name.startswith("_")}

    sync, awaited = offered(Client), offered(AsyncClient)
    assert set(sync) == set(awaited)
    differing = {name for name in sync if sync[name] != awaited[name]}
    assert differing <= {"handle"}
    assert all(getattr(Client, name).__doc__ for name in sync)


def test_a_client_is_shared_by_threads() -> None:
    script = Script([answer(complete())])
    with Client(URL, transport=httpx.MockTransport(script)) as client:
        threads = [threading.Thread(target=lambda: [client.wait("rest-1") for _ in range(20)]) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
    assert len(script.seen) == 160
