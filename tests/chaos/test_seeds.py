"""A few seeds of what `make chaos` runs by the dozen, side by side."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from chaos import seeds
from chaos.release import World

pytestmark = pytest.mark.controlplane

FEW = (0, 3)


def test_a_plan_is_its_seeds_alone() -> None:
    assert seeds.plan(7) == seeds.plan(7) != seeds.plan(8)


def test_whatever_dies_every_request_ends_and_the_invariants_hold(world: World) -> None:
    with ThreadPoolExecutor(len(FEW)) as lanes:
        ended = list(lanes.map(lambda seed: seeds.run(world, seed), FEW))
    assert min(ended) > 5, "so few requests show nothing"
