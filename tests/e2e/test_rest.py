"""An application of the published API on the real cluster: its example byte for byte, with only a bucket there."""

from __future__ import annotations

from collections.abc import Iterator

import httpx
import pytest

from claas_store.uris import is_step_output
from claas_store.version import find_manifest
from deployment import NAMESPACE, RELEASE, USER, Deployment
from e2e import story

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

URI = "s3://my-bucket/loras/user123/coder-v1/"
EXAMPLE = rb"""{"lora_uri": "s3://my-bucket/loras/user123/coder-v1/", "prompt": "Write a function to calculate factorial", "response": "def factorial(n):\n    if n <= 1:\n        return 1\n    return n * factorial(n-1)",
 "feedback": "Good recursive solution", "training": {"learning_rate": 1e-4, "alpha": 0.5, "clip_eps": 0.2, "max_grad_norm": 1.0, "jsd_reg_weight": 0.5, "teacher_top_k": 100}}"""  # noqa: E501
NINE = {
    *("total_loss", "pg_loss", "jsd_reg", "mean_advantage", "frac_positive_advantage"),
    *("mean_is_ratio", "clip_fraction", "grad_norm", "tokens_processed"),
}


@pytest.fixture(scope="module")
def api(installed: Deployment) -> Iterator[httpx.Client]:
    """The REST API, as a service account that may edit in the user's namespace."""
    kubectl, name = installed.kubectl, story.unique("app")
    kubectl("create", "serviceaccount", name, "-n", USER)
    kubectl("create", "rolebinding", name, "-n", USER, "--clusterrole=edit", f"--serviceaccount={USER}:{name}")
    headers = {"Authorization": f"Bearer {kubectl('create', 'token', name, '-n', USER).strip()}"}
    with kubectl.forwarded(f"{RELEASE}-shim", 80, namespace=NAMESPACE) as port:
        url = f"http://127.0.0.1:{port}"
        with httpx.Client(base_url=url, headers=headers, timeout=story.COLD_SECONDS, trust_env=False) as client:
            yield client


def test_the_published_example_byte_for_byte(installed: Deployment, api: httpx.Client) -> None:
    made = api.post("/v1/lora/init", json={"output_uri": URI})
    assert (made.status_code, made.json()) == (200, {"lora_uri": URI}), made.text
    answer = api.post("/v1/distill", content=EXAMPLE, headers={"Content-Type": "application/json"})
    assert answer.status_code == 200, answer.text
    found = answer.json()
    numbers = found["metadata"]
    assert found.keys() == {"lora_uri", "metadata"} and numbers.keys() == NINE
    assert numbers["total_loss"] == pytest.approx(numbers["pg_loss"] + numbers["jsd_reg"], abs=1e-6)
    assert numbers["jsd_reg"] > 0 and numbers["grad_norm"] > 0 and numbers["tokens_processed"] > 10
    assert (numbers["mean_is_ratio"], numbers["clip_fraction"]) == (1.0, 0.0)
    assert found["lora_uri"].startswith("s3://my-bucket/loras/user123/coder-v1-") and is_step_output(found["lora_uri"])
    with installed.store():
        manifest = find_manifest(found["lora_uri"])
    assert manifest is not None and manifest.parent is not None and manifest.parent.uri == URI
    where = answer.headers["content-location"]
    shown = api.get(where).json()
    assert (shown["state"], shown["lora_uri"]) == ("Complete", found["lora_uri"])
    assert shown["created_at"] < shown["ended_at"]


def test_health_and_the_page_as_they_are_deployed(api: httpx.Client) -> None:
    health = api.get("/v1/health")
    assert (health.status_code, health.json()["status"]) == (200, "healthy"), health.text
    assert "swagger-ui-bundle.js" in api.get("/docs").text
    assert api.get("/docs/swagger-ui-bundle.js").status_code == 200
