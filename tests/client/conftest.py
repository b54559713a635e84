"""One scenario, both clients: `use(handler)` drives `Client` or `AsyncClient` over a transport of the test's."""

from __future__ import annotations

from typing import Any

import pytest

from clientkit import Driver, Handler, Use


@pytest.fixture(params=["sync", "async"])
def use(request: pytest.FixtureRequest) -> Use:
    """Makes a driver of the client that this run is about."""

    def make(handler: Handler, **options: Any) -> Driver:
        return Driver(request.param, handler, options)

    return make
