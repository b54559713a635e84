"""What users do, in a few words."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from typing import Any

from deployment import BASE_MODEL, USER, Deployment
from kubectl import Object, condition

COLD_SECONDS = 300  # a worker Job has to start
LIMIT_SECONDS = 120


def unique(word: str) -> str:
    """A name that no other test has."""
    return f"{word}-{uuid.uuid4().hex[:6]}"


def create_adapter(where: Deployment, name: str) -> Object:
    """A LoraAdapter of the small model, Ready."""
    where.kubectl.apply(
        {
            "apiVersion": "claas.dev/v1alpha1", "kind": "LoraAdapter", "metadata": {"name": name, "namespace": USER},
            "spec": {"baseModel": BASE_MODEL, "storage": {"uri": f"s3://adapters/{USER}/{name}/"}},
        }
    )  # fmt: skip
    where.kubectl.wait(f"la/{name}", "condition=Ready", namespace=USER, seconds=LIMIT_SECONDS)
    return adapter(where, name)


def adapter(where: Deployment, name: str) -> Object:
    """The LoraAdapter as it is now."""
    return dict(where.kubectl.get("la", name, "-n", USER))


def request(where: Deployment, name: str, **spec: Any) -> str:
    """Apply a DistillRequest; returns its name."""
    where.kubectl.apply(
        {
            "apiVersion": "claas.dev/v1alpha1",
            "kind": "DistillRequest",
            "metadata": {"name": name, "namespace": USER},
            "spec": spec,
        }
    )
    return name


def sample(response: str, feedback: str = "Too long. Answer in one short sentence.", **more: Any) -> Object:
    """One sample with a question of no interest."""
    return {"prompt": "What is the capital of France?", "response": response, "feedback": feedback, **more}


def until(where: Deployment, name: str, happened: Callable[[Object], bool], seconds: float = LIMIT_SECONDS) -> Object:
    """Watch a request until something holds of its status; returns the object."""
    for seen in where.kubectl.follow(f"dr/{name}", namespace=USER, seconds=seconds):
        if happened(seen.get("status", {})):
            return seen
        assert not ended(seen) or happened(seen["status"]), f"dr/{name} ended otherwise: {seen['status']['conditions']}"
    raise AssertionError("the watch ended")


def ended(seen: Object) -> bool:
    """Whether a request is Complete or Failed."""
    return any(condition(seen, kind).get("status") == "True" for kind in ("Complete", "Failed"))


def complete(where: Deployment, name: str, seconds: float = COLD_SECONDS) -> Object:
    """Wait for Complete as a user does; returns the request."""
    where.kubectl.wait(f"dr/{name}", "condition=Complete", namespace=USER, seconds=seconds)
    return dict(where.kubectl.get("dr", name, "-n", USER))
