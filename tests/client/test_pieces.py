"""When to try again, and how a stream of events is read."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from claas_client.retry import Retries, retry_after_seconds
from claas_client.sse import Decoder, ServerEvent

NOW = datetime(2026, 11, 25, 12, 0, 0, tzinfo=UTC)


def test_pauses_double_and_are_capped_and_end() -> None:
    retries = Retries(attempts=5, base_seconds=1, cap_seconds=3, jitter=lambda: 1.0)
    assert [retries.pause(tried, None, 100) for tried in range(1, 6)] == [1, 2, 3, 3, None]


def test_a_pause_is_random_within_its_bound() -> None:
    pauses = {Retries(base_seconds=1).pause(1, None, 100) for _ in range(20)}
    assert len(pauses) > 1
    assert all(pause is not None and 0 <= pause <= 1 for pause in pauses)


def test_the_server_s_wish_comes_first_unless_it_asks_for_too_much() -> None:
    retries = Retries(base_seconds=0.5, cap_seconds=30, jitter=lambda: 1.0)
    assert retries.pause(1, 7.0, 100) == pytest.approx(7.5)
    assert retries.pause(1, 31.0, 100) is None, "nobody waits for minutes without having been asked"


def test_no_pause_outlasts_the_deadline() -> None:
    assert Retries(base_seconds=5, jitter=lambda: 1.0).pause(1, None, 4.9) is None
    assert Retries(jitter=lambda: 0.0).pause(1, 5.0, 4.9) is None


@pytest.mark.parametrize("wrong", [{"attempts": 0}, {"base_seconds": -1}, {"cap_seconds": -1}])
def test_senseless_retries_are_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="at least"):
        Retries(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("header", "seconds"),
    [
        ("3", 3.0),
        (" 12 ", 12.0),
        ("Wed, 25 Nov 2026 12:00:09 GMT", 9.0),
        ("Wed, 25 Nov 2026 11:00:00 GMT", 0.0),
        ("-1", None),
        ("soon", None),
        ("", None),
        (None, None),
    ],
)
def test_retry_after_is_seconds_or_a_date(header: str | None, seconds: float | None) -> None:
    assert retry_after_seconds(header, NOW) == seconds


def read(text: str) -> list[ServerEvent]:
    decoder = Decoder()
    return [event for line in text.split("\n") if (event := decoder.feed(line))]


def test_events_are_told_apart_by_empty_lines() -> None:
    found = read('event: phase\nid: 7\ndata: {"a":1}\n\n: ping\n\ndata: x\ndata: y\n\nevent: lost\n\n')
    assert found == [ServerEvent("phase", '{"a":1}', "7"), ServerEvent("message", "x\ny", "7")]


def test_what_a_stream_may_hold_besides_is_skipped() -> None:
    decoder = Decoder()
    for line in ("retry: 250", "retry: soon", "id: a\0b", "data", "nonsense: 1"):
        decoder.feed(line)
    assert decoder.retry_seconds == 0.25
    assert decoder.last_id == ""
    assert decoder.feed("") == ServerEvent("message", "", "")
