"""Two releases in one cluster: neither's policies refuse the other's workers, and none reaches further by it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import kubernetes
import pytest

from chart.rendering import CHART, Object
from chart.test_install import (
    PROGRESS,
    as_token,
    claim,
    kubectl,  # noqa: F401  (a fixture: the API server with our two kinds)
    patch,
    pod_of,
    refused,
    request_bound_to,
    restricted_namespace,
    until,
    worker_template,
)
from cluster.controlplane import ControlPlane
from kubectl import CommandFailed, Kubectl

pytestmark = pytest.mark.controlplane

# By release; `twin` is installed twice, in two namespaces, with one pool's name in both.
RELEASES = {"one": "twin", "two": "twin", "three": "solo"}
VALUES = "crds.install=false,pools[0].name=shared,pools[1].name=own,pools[1].isolation=Namespace,pools[1].modelClaim=m"

Act = Callable[[str, str], kubernetes.client.ApiClient]


@pytest.fixture(scope="module")
def homes(kubectl: Kubectl) -> Iterator[dict[str, str]]:  # noqa: F811
    """The namespace of each release."""
    made = {which: restricted_namespace(kubectl) for which in RELEASES}
    for which, namespace in made.items():
        serves = f"watchNamespaces={{{which}-a,{which}-b}}"
        kubectl.helm("install", RELEASES[which], str(CHART), "-n", namespace, "--set", VALUES, "--set", serves)
    yield made
    for which, namespace in made.items():
        kubectl.helm("uninstall", RELEASES[which], "-n", namespace, "--no-hooks")


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("", r"serves (one|two|three)-a,\w+-b, and of two that serve all namespaces"),
        ("other,one-b", "one-b is another release's; a namespace has one operator"),
    ],
)
def test_a_release_that_would_serve_what_another_serves_is_refused(
    kubectl: Kubectl,  # noqa: F811
    homes: dict[str, str],
    names: str,
    words: str,
) -> None:
    assert len(homes) == len(RELEASES)
    given = ("--set", VALUES + (f",watchNamespaces={{{names}}}" if names else ""))
    with pytest.raises(CommandFailed, match=words):
        kubectl.helm("install", "fourth", str(CHART), "-n", homes["three"], *given)
    kubectl.helm("upgrade", "solo", str(CHART), "-n", homes["three"], "--set", f"{VALUES},watchNamespaces={{three-a}}")


def acting(kubectl: Kubectl, url: str, namespace: str, account: str, pod: str) -> kubernetes.client.ApiClient:  # noqa: F811
    """A client with the token of a new Pod of that name and account."""
    template: Object = worker_template()
    template["spec"]["serviceAccountName"] = account
    kubectl.apply(pod_of(template, pod), namespace=namespace)
    bound = ("--bound-object-kind", "Pod", "--bound-object-name", pod)
    return as_token(kubectl, url, kubectl("create", "token", account, "-n", namespace, *bound))


def in_force(client: kubernetes.client.ApiClient, probe: str) -> bool:
    """Whether some policy refuses this client what is not bound to it."""
    try:
        patch(client, probe, PROGRESS)
    except kubernetes.client.ApiException as error:
        return "not bound to Pod" in error.body
    return False


@pytest.fixture(scope="module")
def workers(
    kubectl: Kubectl,  # noqa: F811
    control_plane: ControlPlane,
    homes: dict[str, str],
) -> dict[str, tuple[str, kubernetes.client.ApiClient]]:
    """A Shared pool's worker of each release: its Pod's name and a client with its token."""
    probe, made = request_bound_to(kubectl, "nobody"), {}
    for which, namespace in homes.items():
        pod = f"{RELEASES[which]}-shared-1-{which:a<5}"
        client = acting(kubectl, control_plane.url, namespace, f"{RELEASES[which]}-worker", pod)
        until(f"the policy of {which}", lambda found=client: in_force(found, probe))
        made[which] = (pod, client)
    return made


@pytest.mark.parametrize("which", RELEASES)
def test_each_releases_worker_writes_what_is_bound_to_it(
    kubectl: Kubectl,  # noqa: F811
    workers: dict[str, tuple[str, Any]],
    which: str,
) -> None:
    pod, client = workers[which]
    name = request_bound_to(kubectl, pod)
    assert patch(client, name, claim(pod))["status"]["claim"]["worker"] == pod
    assert "may write only status.claim" in refused(patch, client, name, {"state": "Complete"})
    for other in RELEASES.keys() - {which}:
        stranger, its_client = workers[other]
        assert f"not bound to Pod {stranger}" in refused(patch, its_client, name, claim(stranger))


def test_a_worker_of_one_release_is_no_namesake_of_anothers(
    kubectl: Kubectl,  # noqa: F811
    control_plane: ControlPlane,
    homes: dict[str, str],
    workers: dict[str, tuple[str, Any]],
) -> None:
    """Whoever makes Pods in one release's namespace may call one as it likes."""
    pod, client = workers["three"]
    name = request_bound_to(kubectl, pod)
    namesake = acting(kubectl, control_plane.url, homes["one"], "twin-worker", pod)
    said = refused(patch, namesake, name, claim(pod))
    assert f"Pod {pod} is no worker of release twin in {homes['one']}" in said
    patch(client, name, claim(pod))


@pytest.mark.parametrize("which", ["one", "three"])
def test_each_releases_worker_in_a_tenants_namespace_writes_there_alone(
    kubectl: Kubectl,  # noqa: F811
    control_plane: ControlPlane,
    homes: dict[str, str],
    workers: dict[str, tuple[str, Any]],
    which: str,
) -> None:
    """The tenant (here the namespace `default`, where `request_bound_to` makes requests) and another one."""
    release, elsewhere = RELEASES[which], restricted_namespace(kubectl)
    pod = f"{release}-own-1-{which:b<5}"
    for namespace in ("default", elsewhere):
        role = f"--clusterrole={homes[which]}-{release}-worker"
        account = f"tenant-{which}"
        kubectl("create", "serviceaccount", account, "-n", namespace)
        # The right in `default` for both: the policy alone stands between the other tenant and this one.
        kubectl("create", "rolebinding", f"{account}-{namespace}", role, f"--serviceaccount={namespace}:{account}")
    tenant = acting(kubectl, control_plane.url, "default", account, pod)
    stranger = acting(kubectl, control_plane.url, elsewhere, account, pod)
    name = request_bound_to(kubectl, pod)
    until("the tenant's right", lambda: patch(tenant, name, claim(pod)))
    assert f"the workers of the pool of Pod {pod} do not run in" in refused(patch, stranger, name, claim(pod))
