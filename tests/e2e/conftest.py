"""The chart in the two-node cluster (or KUBECONFIG's), once for all end-to-end tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

import deployment
from cluster import nodes
from cluster.nodes import Cluster
from deployment import USER, Deployment


@pytest.fixture(scope="package")
def installed(cluster: Cluster) -> Iterator[Deployment]:
    """An installed release with an empty user namespace. Our own cluster ends with these tests unless KEEP=1."""
    given = bool(os.environ.get("KUBECONFIG"))
    where = deployment.install(cluster, given=given)
    where.kubectl("delete", "dr,la", "--all", "-n", USER, "--wait", seconds=120)
    yield where
    if not given and not os.environ.get("KEEP"):
        nodes.down()
