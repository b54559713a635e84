"""The queue in tokens, on a clock of its own: who goes first, who waits, who is turned away."""

from __future__ import annotations

import asyncio

import pytest

from claas_teacher.admission import Admission
from claas_teacher.errors import QueueFull, TeacherRefused


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


class Line:
    """Samples in an admission's turns; `served` is the order in which the engine got them."""

    def __init__(self, limit: int = 10_000, window: int = 100) -> None:
        self.clock = Clock()
        self.admission = Admission(limit, window, self.clock)
        self.admission.seconds_per_token = 1.0
        self.served: list[str] = []
        self.ends: dict[str, asyncio.Event] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}

    async def come(self, name: str, tokens: int) -> None:
        self.ends[name] = asyncio.Event()
        self.tasks[name] = asyncio.create_task(self._sample(name, tokens))
        await settle()

    async def end(self, name: str) -> None:
        self.ends[name].set()
        await self.tasks[name]
        await settle()

    async def _sample(self, name: str, tokens: int) -> None:
        async with self.admission.turn(tokens):
            self.served.append(name)
            await self.ends[name].wait()


async def settle() -> None:
    """Until every task that can go on has gone on."""
    for _ in range(10):
        await asyncio.sleep(0)


async def test_the_engine_gets_a_window_and_a_larger_sample_alone() -> None:
    line = Line(window=100)
    for name, tokens in (("a", 60), ("b", 40), ("c", 1), ("huge", 500)):
        await line.come(name, tokens)
    assert line.served == ["a", "b"]
    assert line.admission.engine_tokens == 100
    await line.end("a")
    assert line.served == ["a", "b", "c"]
    await line.end("b")
    await line.end("c")
    assert line.served == ["a", "b", "c", "huge"]
    await line.end("huge")
    assert line.admission.engine_tokens == 0


async def test_a_short_one_overtakes_but_a_long_one_is_not_overtaken_for_longer_than_it_takes() -> None:
    line = Line(window=100)
    await line.come("first", 100)
    await line.come("long", 90)  # due at 90
    line.clock.now = 50
    await line.come("short", 10)  # due at 60: first
    line.clock.now = 85
    await line.come("late", 10)  # due at 95: the long one has waited long enough
    await line.end("first")
    assert line.served == ["first", "short", "long"]
    await line.end("short")
    assert line.served == ["first", "short", "long", "late"]
    await line.end("long")
    await line.end("late")


async def test_who_leaves_while_waiting_holds_nobody_up() -> None:
    line = Line(window=100)
    for name, tokens in (("a", 100), ("b", 90), ("c", 90)):
        await line.come(name, tokens)
    line.tasks["b"].cancel()
    await settle()
    await line.end("a")
    assert line.served == ["a", "c"]
    line.tasks["c"].cancel()  # with the engine
    await settle()
    assert line.admission.engine_tokens == 0
    await line.come("d", 100)
    assert line.served[-1] == "d"
    await line.end("d")


async def test_who_leaves_in_the_moment_of_its_turn_gives_it_back() -> None:
    line = Line(window=100)
    await line.come("a", 100)
    await line.come("b", 100)
    line.ends["a"].set()  # a goes on, and grants b its turn; then b is cancelled, and only then would it go on
    asyncio.get_running_loop().call_soon(line.tasks["b"].cancel)
    await settle()
    assert line.admission.engine_tokens == 0
    assert "b" not in line.served


def test_what_does_not_fit_comes_again_when_there_is_room() -> None:
    admission = Admission(1000, 100)
    admission.seconds_per_token = 0.01
    with admission.admitted(900), pytest.raises(QueueFull) as full, admission.admitted(500):
        pass
    assert full.value.retry_after_seconds == 4  # 400 tokens too many
    assert full.value.retryable and full.value.status == 429
    with admission.admitted(1000):
        assert admission.queued_tokens == 1000
    with pytest.raises(TeacherRefused) as refused, admission.admitted(1001):
        pass
    assert refused.value.status == 413
    assert admission.queued_tokens == 0


async def test_it_learns_what_a_token_takes() -> None:
    line = Line(window=1000)
    line.admission.seconds_per_token = 0.001
    for number in range(40):
        await line.come(str(number), 100)
        line.clock.now += 2
        await line.end(str(number))
    assert line.admission.seconds_per_token == pytest.approx(0.02, rel=0.01)
