"""The shim's part of the chart."""

from __future__ import annotations

import pytest

from chart.rendering import Helm, Object, containers, environment, only, pod_templates, settings_of, shim_settings_of
from claas_crds import names
from claas_operator.settings import Settings
from claas_operator.shim.settings import ShimSettings
from shimstage import SHIM_HOME_RULES, SHIM_RULES


def granted(objects: list[Object]) -> set[tuple[str, str, str]]:
    """(where, resource, verb) of everything that the shim may do."""
    bindings = [
        o
        for o in objects
        if o["kind"] in ("RoleBinding", "ClusterRoleBinding") and o["subjects"][0]["name"] == "claas-shim"
    ]
    found = set()
    for binding in bindings:
        role = only(objects, binding["roleRef"]["kind"], binding["roleRef"]["name"])
        where = binding["metadata"].get("namespace", "*")
        found |= {(where, r, verb) for rule in role["rules"] for r in rule["resources"] for verb in rule["verbs"]}
    return found


def listed(rules: list[Object], where: str) -> set[tuple[str, str, str]]:
    return {(where, r, verb) for rule in rules for r in rule["resources"] for verb in rule["verbs"]}


def test_the_shim_understands_its_settings(rendered: list[Object]) -> None:
    settings = ShimSettings.model_validate(shim_settings_of(rendered))
    assert (settings.instance, settings.namespace) == ("claas", "claas-system")
    assert settings.prefixes("alice") == ["s3://adapters/alice/"]
    assert settings.auth.mode == "Kubernetes"
    assert settings.teacher is not None
    assert settings.limits.max_body_bytes == 4 * 2**20
    assert settings.request_ttl_seconds == 86400
    assert settings.pools == {pool["name"]: pool["baseModel"] for pool in settings_of(rendered)["pools"]} != {}


def test_it_may_do_what_the_tests_let_it_do_and_no_more(helm: Helm) -> None:
    by_token = granted(helm.render())
    by_key = granted(helm.render("--set", "shim.auth.mode=ApiKey"))
    assert by_token == listed(SHIM_RULES, "*") | {("claas-system", "leases", verb) for verb in ("get", "list")}
    assert ("claas-system", "secrets", "list") in by_key
    assert not any("reviews" in resource for _, resource, _ in by_key)
    assert by_key <= listed(SHIM_RULES, "*") | listed(SHIM_HOME_RULES, "claas-system")
    assert not any(names.GROUP in r and "status" in r for _, r, _ in by_token), "it never writes a status"


def test_keys_lie_where_the_values_say(helm: Helm) -> None:
    objects = helm.render("--set", "shim.auth.mode=ApiKey,shim.auth.keysNamespace=keys")
    assert only(objects, "Role", "claas-shim-keys")["metadata"]["namespace"] == "keys"
    assert shim_settings_of(objects)["auth"]["keysNamespace"] == "keys"
    assert ("claas-system", "secrets", "list") not in granted(objects)


def test_it_is_found_by_its_service_and_reaches_the_store(helm: Helm) -> None:
    objects = helm.render("--set", "seaweedfs.enabled=true")
    pod = pod_templates(objects)["Deployment claas-shim"]
    service = only(objects, "Service", "claas-shim")["spec"]
    assert service["selector"].items() <= pod["metadata"]["labels"].items()
    assert service["ports"] == [{"name": "http", "port": 80, "targetPort": "http"}]
    assert "AWS_SECRET_ACCESS_KEY" in environment(containers(pod)[0])


def test_it_can_be_left_out(helm: Helm) -> None:
    objects = helm.render("--set", "shim.enabled=false,networkPolicy.enabled=true")
    assert [o["metadata"]["name"] for o in objects if "shim" in o["metadata"]["name"]] == []


@pytest.mark.parametrize(
    ("mistake", "words"),
    [
        ("shim.auth.mode=None", "needs namespace"),
        ("shim.auth.namespace=team", "no other mode has it"),
        ("shim.auth.mode=Nobody", "/shim/auth/mode"),
        ("shim.waitSeconds=1000", "shim.maxWaitSeconds"),
        ("shim.limits.maxBodyBytes=1", "/shim/limits/maxBodyBytes"),
    ],
)
def test_a_mistake_is_named(helm: Helm, mistake: str, words: str) -> None:
    assert words in helm.refusal("--set", mistake)


def test_it_knows_the_weights_that_the_operator_goes_by(helm: Helm) -> None:
    objects = helm.render("--set-json", 'tenants=[{"namespace": "*", "weight": 0.5}]')
    told = ShimSettings.model_validate(shim_settings_of(objects)).tenants
    assert told == Settings.model_validate(settings_of(objects)).tenants
    assert told[0].weight == 0.5


def test_it_knows_where_forks_may_start(helm: Helm) -> None:
    objects = helm.render("--set-json", 'storage.forkPrefixes=[{"namespace": "bob", "uri": "s3://adapters/alice/"}]')
    settings = ShimSettings.model_validate(shim_settings_of(objects))
    assert (settings.fork_prefixes("bob"), settings.fork_prefixes("alice")) == (["s3://adapters/alice/"], [])


def test_one_trusted_tenant(helm: Helm) -> None:
    objects = helm.render("--set", "shim.auth.mode=None,shim.auth.namespace=team")
    settings = ShimSettings.model_validate(shim_settings_of(objects))
    assert (settings.auth.mode, settings.auth.namespace) == ("None", "team")
