"""Fixtures of the real parts, and the rule that `make test` skips nothing."""

from __future__ import annotations

import os

import pytest

import images

# libgomp's barriers spin by default: where the cores are shared, a step of a second takes ten.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

pytest_plugins = ["cluster.fixtures", "objectstore", "vllmserver"]


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--require-all`: a skipped test is a failed run."""
    parser.addoption("--images", action="store_true", help="also run a request on the full images, where they changed")
    parser.addoption("--stress", action="store_true", help="also run what takes minutes: long lives, load, fuzz")
    parser.addoption("--require-all", action="store_true", help="fail instead of skipping when a part is missing")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]):  # type: ignore[no-untyped-def]
    """Turn a skip into a failure under `--require-all`."""
    report = yield
    if report.skipped and item.config.getoption("--require-all") and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped, but --require-all was given: {report.longrepr}"
    return report


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Full images are built by `make test`, but only as often as what they are made of changes: gigabytes, minutes.
    What is marked `stress` has a target of its own."""
    left_out = set() if config.getoption("--stress") else {"stress"}
    if not config.getoption("--images") or images.verified().exists():
        left_out.add("images")
    chosen = [item for item in items if not any(item.get_closest_marker(name) for name in left_out)]
    if len(chosen) < len(items):
        config.hook.pytest_deselected(items=[item for item in items if item not in chosen])
        items[:] = chosen
