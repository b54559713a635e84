"""A real Kubernetes on one machine, for development and tests, from the Go module proxy and Debian's packages alone.

    PYTHONPATH=tests python -m cluster up      two nodes, or reuse those that are up; prints how to use them
    PYTHONPATH=tests python -m cluster --help

Only Python's standard library (3.11 or newer), because this runs before any virtual environment exists.

* ``programs``      builds the Kubernetes programs once and caches them
* ``controlplane``  etcd and the API server alone, without root: for contract and operator tests
* ``nodes``         the cluster of two nodes, seen from the host; ``inside`` runs in its namespaces
* ``images``        base image, Dockerfile builds and their way onto the nodes, with buildah
* ``fixtures``      the same as pytest fixtures
"""
