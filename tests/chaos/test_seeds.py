"""A seed or two of what `make chaos` runs by the dozen, at twice the pace."""

from __future__ import annotations

import pytest

from chaos import seeds
from chaos.release import World


def test_a_plan_is_its_seeds_alone() -> None:
    assert seeds.plan(7) == seeds.plan(7) != seeds.plan(8)


@pytest.mark.controlplane
@pytest.mark.parametrize("seed", [pytest.param(0, marks=pytest.mark.stress), 3])
def test_whatever_dies_every_request_ends_and_the_invariants_hold(world: World, seed: int) -> None:
    assert seeds.run(world, seed, pace=0.5)["ended"] > 5, "so few requests show nothing"
