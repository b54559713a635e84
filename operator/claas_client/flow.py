"""Calls as generators that ask for what they need done, so that one text of each serves both clients.

A `Flow` yields effects (send this, read a line, wait) and is given their outcomes; what fails is thrown into it. It
decides everything and does nothing: `run` does it on an `httpx.Client`, `run_async` on an `httpx.AsyncClient`. A flow
that also yields `Emit` is a stream, driven by `stream` and `stream_async`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import httpx

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Send:
    """Send it; the outcome is the response, its body read unless `stream`."""

    request: httpx.Request
    stream: bool = False


@dataclass(frozen=True, slots=True)
class Line:
    """The next line of a streamed response; the outcome is None at its end."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Read:
    """Read the whole body of a streamed response, for what is no stream."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Close:
    """Close a streamed response."""

    response: httpx.Response


@dataclass(frozen=True, slots=True)
class Pause:
    """Wait so many seconds."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Emit(Generic[T]):
    """Hand an item to whoever reads the stream."""

    item: T


Effect: TypeAlias = Send | Line | Read | Close | Pause
Flow: TypeAlias = Generator[Effect, Any, T]
Stream: TypeAlias = Generator[Effect | Emit[T], Any, None]


def run(http: httpx.Client, flow: Flow[T]) -> T:
    """The flow's result."""
    lines: dict[httpx.Response, Iterator[str]] = {}
    step: Callable[[], Effect] = partial(next, flow)
    try:
        while True:
            try:
                effect = step()
            except StopIteration as end:
                result: T = end.value
                return result
            step = _outcome(http, flow, effect, lines)
    finally:
        flow.close()
        _close_all(lines)


def stream(http: httpx.Client, flow: Stream[T]) -> Iterator[T]:
    """The items that the flow emits. Closing the iterator ends the flow and its connection."""
    lines: dict[httpx.Response, Iterator[str]] = {}
    step: Callable[[], Effect | Emit[T]] = partial(next, flow)
    try:
        while True:
            try:
                effect = step()
            except StopIteration:
                return
            if isinstance(effect, Emit):
                yield effect.item
                step = partial(flow.send, None)
            else:
                step = _outcome(http, flow, effect, lines)
    finally:
        flow.close()
        _close_all(lines)


async def run_async(http: httpx.AsyncClient, flow: Flow[T]) -> T:
    """The flow's result."""
    lines: dict[httpx.Response, AsyncIterator[str]] = {}
    step: Callable[[], Effect] = partial(next, flow)
    try:
        while True:
            try:
                effect = step()
            except StopIteration as end:
                result: T = end.value
                return result
            step = await _outcome_async(http, flow, effect, lines)
    finally:
        flow.close()
        await _close_all_async(lines)


async def stream_async(http: httpx.AsyncClient, flow: Stream[T]) -> AsyncIterator[T]:
    """The items that the flow emits. Closing the iterator ends the flow and its connection."""
    lines: dict[httpx.Response, AsyncIterator[str]] = {}
    step: Callable[[], Effect | Emit[T]] = partial(next, flow)
    try:
        while True:
            try:
                effect = step()
            except StopIteration:
                return
            if isinstance(effect, Emit):
                yield effect.item
                step = partial(flow.send, None)
            else:
                step = await _outcome_async(http, flow, effect, lines)
    finally:
        flow.close()
        await _close_all_async(lines)


def _outcome(
    http: httpx.Client, flow: Generator[Any, Any, Any], effect: Effect, lines: dict[httpx.Response, Iterator[str]]
) -> Callable[[], Any]:
    """Does what the flow asked for; gives what resumes it."""
    outcome: httpx.Response | str | None = None
    try:
        match effect:
            case Send(request, streamed):
                outcome = http.send(request, stream=streamed)
                if streamed:
                    lines[outcome] = outcome.iter_lines()
            case Line(response):
                outcome = next(lines[response], None)
            case Read(response):
                response.read()
            case Close(response):
                lines.pop(response, None)
                response.close()
            case Pause(seconds):
                time.sleep(seconds)
    except httpx.HTTPError as error:
        return partial(flow.throw, error)
    return partial(flow.send, outcome)


async def _outcome_async(
    http: httpx.AsyncClient,
    flow: Generator[Any, Any, Any],
    effect: Effect,
    lines: dict[httpx.Response, AsyncIterator[str]],
) -> Callable[[], Any]:
    """Does what the flow asked for; gives what resumes it."""
    outcome: httpx.Response | str | None = None
    try:
        match effect:
            case Send(request, streamed):
                outcome = await http.send(request, stream=streamed)
                if streamed:
                    lines[outcome] = outcome.aiter_lines()
            case Line(response):
                outcome = await anext(lines[response], None)
            case Read(response):
                await response.aread()
            case Close(response):
                lines.pop(response, None)
                await response.aclose()
            case Pause(seconds):
                await asyncio.sleep(seconds)
    except httpx.HTTPError as error:
        return partial(flow.throw, error)
    return partial(flow.send, outcome)


def _close_all(lines: dict[httpx.Response, Iterator[str]]) -> None:
    for response in lines:
        response.close()


async def _close_all_async(lines: dict[httpx.Response, AsyncIterator[str]]) -> None:
    for response in lines:
        await response.aclose()
