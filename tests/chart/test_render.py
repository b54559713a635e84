"""What the chart renders, values file by values file."""

from __future__ import annotations

import re

import pytest
import yaml

from chart.rendering import (
    CHART,
    NAMESPACE,
    VARIANTS,
    Helm,
    Object,
    containers,
    environment,
    only,
    pod_templates,
    settings_of,
)
from claas_crds.adapter import LoraAdapterSpec
from claas_crds.request import DistillRequestSpec
from claas_operator.settings import Settings
from operatorstage import AT_HOME, EVERYWHERE

REFERENCE = re.compile(r"^([\w.-]+(:\d+)?/)*[\w.-]+(:[\w][\w.-]*|@sha256:[0-9a-f]{64})$")


@pytest.mark.parametrize("variant", VARIANTS)
def test_lint_is_clean(helm: Helm, variant: str) -> None:
    helm.run("lint", "--strict", "--quiet", str(CHART), *VARIANTS[variant])


def test_every_pod_satisfies_the_restricted_standard(rendered: list[Object]) -> None:
    for name, template in pod_templates(rendered).items():
        security = template["spec"]["securityContext"]
        assert security["runAsNonRoot"] is True, name
        assert security["seccompProfile"] == {"type": "RuntimeDefault"}, name
        assert not {"hostNetwork", "hostPID", "hostIPC"} & template["spec"].keys(), name
        for container in containers(template):
            assert container["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }, f"{name}: {container['name']}"


def test_every_container_can_write_to_tmp_and_only_to_volumes(rendered: list[Object]) -> None:
    for name, template in pod_templates(rendered).items():
        volumes = {volume["name"]: volume for volume in template["spec"]["volumes"]}
        assert not any("hostPath" in volume for volume in volumes.values()), name
        for container in containers(template):
            mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
            assert volumes[mounts["/tmp"]]["emptyDir"] == {}, f"{name}: {container['name']}"
            assert set(mounts.values()) <= volumes.keys(), f"{name}: {container['name']} mounts what is not there"


def test_every_container_has_bounds_and_an_image_with_a_version(rendered: list[Object]) -> None:
    for name, template in pod_templates(rendered).items():
        for container in containers(template):
            where = f"{name}: {container['name']}"
            assert REFERENCE.match(container["image"]), f"{where}: {container['image']}"
            assert not container["image"].endswith(":latest"), where
            assert {"cpu", "memory"} <= container["resources"]["requests"].keys(), where
            assert "memory" in container["resources"]["limits"], where


def test_rights_have_no_wildcard_and_no_secrets(rendered: list[Object]) -> None:
    roles = [o for o in rendered if o["kind"] in ("Role", "ClusterRole")]
    assert roles
    for role in roles:
        for rule in role["rules"]:
            words = {*rule["apiGroups"], *rule["resources"], *rule["verbs"]}
            assert not any("*" in word for word in words), role["metadata"]["name"]
            assert "secrets" not in rule["resources"], role["metadata"]["name"]


def test_only_operator_shim_and_workers_have_a_token(rendered: list[Object]) -> None:
    """Operations, fetches, the teacher and SeaweedFS have no business at the API server."""
    with_token = {
        name
        for name, template in pod_templates(rendered).items()
        if template["spec"].get("automountServiceAccountToken", True)
    }
    pools = {name for name in pod_templates(rendered) if name.startswith("pool ")}
    assert with_token == {"Deployment claas-operator", "Deployment claas-shim", "Pod claas-uninstall"} | pools
    bound = {
        subject["name"]
        for o in rendered
        if o["kind"] in ("RoleBinding", "ClusterRoleBinding")
        for subject in o["subjects"]
    }
    assert bound == {"claas-operator", "claas-shim", "claas-worker"}


def test_the_operator_understands_its_settings(rendered: list[Object]) -> None:
    settings = Settings.model_validate(settings_of(rendered))
    assert settings.instance == "claas"
    assert settings.namespace == only(rendered, "Deployment", "claas-operator")["metadata"]["namespace"]
    assert settings.owner is not None
    assert settings.owner.deployment == "claas-operator"
    assert settings.prefixes("alice") == ["s3://adapters/alice/"]
    assert settings.teacher is not None
    service = only(rendered, "Service", "claas-teacher")
    host, port = settings.teacher.url.removeprefix("http://").split(":")
    assert host == "claas-teacher.claas-system.svc"
    assert int(port) == service["spec"]["ports"][0]["port"]


def test_several_teachers_are_found_one_by_one(helm: Helm) -> None:
    objects = helm.render("--set", "teacher.replicas=3")
    url = settings_of(objects)["teacher"]["url"]
    service = only(objects, "Service", "claas-teacher-replicas")["spec"]
    assert url == "http://claas-teacher-replicas.claas-system.svc:8000"
    assert service["clusterIP"] == "None"  # DNS gives the Pods' addresses
    assert service["selector"] == only(objects, "Service", "claas-teacher")["spec"]["selector"]
    assert service["ports"][0]["port"] == 8000


def test_the_teacher_is_not_killed_before_it_has_finished(helm: Helm) -> None:
    from claas_teacher.defaults import SHUTDOWN_SECONDS

    teacher = only(helm.render(), "Deployment", "claas-teacher")["spec"]["template"]["spec"]
    assert teacher["terminationGracePeriodSeconds"] > SHUTDOWN_SECONDS


def test_workers_find_the_model_where_the_fetch_job_puts_it(rendered: list[Object]) -> None:
    settings = settings_of(rendered)
    fetch = next(o for o in rendered if o["kind"] == "Job" and "fetch-model" in o["metadata"]["name"])
    arguments = containers(fetch["spec"]["template"])[0]["args"]
    target = arguments[arguments.index("--target") + 1]
    templates = [pool["template"] for pool in settings["pools"]]
    assert [environment(t["spec"]["containers"][0])["CLAAS_MODEL_PATH"] for t in templates] == [target] * len(templates)
    assert settings["operations"]["modelDir"] == target
    for template in [*templates, settings["operations"]["template"]]:
        (wait,) = template["spec"]["initContainers"]
        assert wait["command"][wait["command"].index("--target") + 1] == target
        for container in containers(template):
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "model"]
            assert target.startswith(mount["mountPath"] + "/")
            assert mount["readOnly"] is True


def test_deletion_of_the_release_takes_jobs_and_keeps_what_users_made(rendered: list[Object]) -> None:
    for o in rendered:
        keep = o["metadata"].get("annotations", {}).get("helm.sh/resource-policy") == "keep"
        store = o["kind"] == "PersistentVolumeClaim" and o["metadata"]["name"] == "claas-seaweedfs"
        assert keep == (o["kind"] == "CustomResourceDefinition" or store), o["metadata"]["name"]
        if o["kind"] == "Job":
            assert o["spec"]["ttlSecondsAfterFinished"] > 0
            assert o["spec"]["activeDeadlineSeconds"] > 0


def test_production_places_student_and_teacher_on_their_gpus(helm: Helm) -> None:
    templates = pod_templates(helm.render())
    worker, teacher = templates["pool l40s"]["spec"], templates["Deployment claas-teacher"]["spec"]
    assert worker["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-L40S"}
    assert teacher["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    for spec in (worker, teacher):
        assert spec["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1
        assert {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"} in spec["tolerations"]
    assert "--served-model-name=Qwen/Qwen2.5-Coder-32B-Instruct" in teacher["containers"][0]["args"]


@pytest.mark.parametrize("variant", ["cpu", "cpu, slim, SeaweedFS"])
def test_a_cpu_cluster_needs_no_gpu(helm: Helm, variant: str) -> None:
    for name, template in pod_templates(helm.render(*VARIANTS[variant])).items():
        assert "nodeSelector" not in template["spec"], name
        for container in containers(template):
            assert "nvidia.com/gpu" not in container["resources"]["limits"], name


def test_slim_images_find_their_packages_on_a_read_only_volume(helm: Helm) -> None:
    """A writable mount would have the kubelet change the owner of every file of the shared folder."""
    for name, template in pod_templates(helm.render(*VARIANTS["cpu, slim, SeaweedFS"])).items():
        (volume,) = [v for v in template["spec"]["volumes"] if v["name"] == "deps"]
        assert volume["persistentVolumeClaim"] == {"claimName": "claas-deps", "readOnly": True}, name
        for container in containers(template):
            (mount,) = [m for m in container["volumeMounts"] if m["name"] == "deps"]
            assert mount["readOnly"] is True
            assert mount["mountPath"] == ("/env" if container["name"] == "seaweedfs" else "/deps"), name


def test_the_embedded_store_is_the_one_that_workers_use(helm: Helm) -> None:
    objects = helm.render("--set", "seaweedfs.enabled=true")
    service = only(objects, "Service", "claas-seaweedfs")
    secret = only(objects, "Secret", "claas-storage")
    store = environment(containers(only(objects, "Deployment", "claas-seaweedfs")["spec"]["template"])[0])
    for name in ("pool l40s", "operations"):
        variables = environment(pod_templates(objects)[name]["spec"]["containers"][0])
        assert (
            variables["AWS_ENDPOINT_URL_S3"]
            == f"http://claas-seaweedfs.claas-system.svc:{service['spec']['ports'][0]['port']}"
        )
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert variables[key] == store[key] == {"secretKeyRef": {"name": "claas-storage", "key": key}}
            assert secret["data"][key]


STORE_USERS = ("pool l40s", "operations", "Deployment claas-operator")


def test_the_store_is_the_same_for_all_that_use_it(helm: Helm) -> None:
    """Workers, operations, the operator and the fetch of a model: endpoint, addressing and encryption as given."""
    given = "storage.endpoint=https://minio.example.com,storage.region=eu-central-1,storage.addressing=virtual"
    kms = "storage.encryption.mode=aws:kms,storage.encryption.kmsKeyId=arn:aws:kms:eu-central-1:1:key/k"
    objects = helm.render("--set", f"{given},{kms},storage.credentials.existingSecret=mine")
    (fetch,) = [o["metadata"]["name"] for o in objects if o["kind"] == "Job" and "fetch-model" in o["metadata"]["name"]]
    for name in (*STORE_USERS, f"Job {fetch}"):
        variables = environment(pod_templates(objects)[name]["spec"]["containers"][0])
        for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            assert variables.pop(key)["secretKeyRef"] == {"name": "mine", "key": key}, name
        assert {key: value for key, value in variables.items() if key.startswith(("AWS_", "CLAAS_S3_"))} == {
            "AWS_ENDPOINT_URL_S3": "https://minio.example.com",
            "AWS_REGION": "eu-central-1",
            "CLAAS_S3_ADDRESSING": "virtual",
            "CLAAS_S3_ENCRYPTION": "aws:kms",
            "CLAAS_S3_KMS_KEY_ID": "arn:aws:kms:eu-central-1:1:key/k",
        }, name


def test_what_the_chart_says_of_the_store_the_store_understands(helm: Helm) -> None:
    from claas_store.s3 import S3Store

    for given in ("", "storage.addressing=path", "storage.encryption.mode=AES256", "storage.encryption.mode=aws:kms"):
        objects = helm.render("--set", given)
        variables = environment(pod_templates(objects)["operations"]["spec"]["containers"][0])
        S3Store({key: value for key, value in variables.items() if isinstance(value, str)})
    assert "CLAAS_S3_ENCRYPTION" in variables


def test_by_default_the_store_says_nothing_of_addressing_and_encryption(helm: Helm) -> None:
    for name in STORE_USERS:
        variables = environment(pod_templates(helm.render())[name]["spec"]["containers"][0])
        assert not [key for key in variables if key.startswith("CLAAS_S3_")], name


def test_credentials_appear_in_the_secret_alone(helm: Helm) -> None:
    given = "storage.credentials.accessKeyId=MYKEY,storage.credentials.secretAccessKey=MYSECRET"
    for o in helm.render("--set", given):
        if o["kind"] == "Secret":
            assert o["metadata"]["name"] == "claas-storage"
        else:
            assert not re.search("MYKEY|MYSECRET", str(o)), o["kind"]


def test_workload_identity_needs_no_secret(helm: Helm) -> None:
    arn = "serviceAccounts.worker.annotations.eks\\.amazonaws\\.com/role-arn=arn:aws:iam::1:role/claas"
    objects = helm.render("--set", arn)
    assert not [o for o in objects if o["kind"] == "Secret"]
    assert only(objects, "ServiceAccount", "claas-worker")["metadata"]["annotations"] == {
        "eks.amazonaws.com/role-arn": "arn:aws:iam::1:role/claas"
    }
    variables = environment(pod_templates(objects)["pool l40s"]["spec"]["containers"][0])
    assert variables.keys() & {"AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL_S3"} == set()


def test_a_pool_overrides_defaults_also_with_nothing(helm: Helm) -> None:
    """0 and empty lists are values: lingerSeconds 0 with maxRequests 1 gives one Job per request."""
    pools = '[{"name": "one-shot", "lingerSeconds": 0, "maxRequests": 1, "tolerations": []}, {"name": "warm"}]'
    objects = helm.render("--set-json", f"pools={pools}")
    one_shot, warm = settings_of(objects)["pools"]
    assert (one_shot["lingerSeconds"], one_shot["maxRequests"]) == (0, 1)
    assert "tolerations" not in one_shot["template"]["spec"]
    assert (warm["lingerSeconds"], warm["maxRequests"]) == (300, 1000)
    assert warm["template"]["spec"]["tolerations"]


def test_workers_of_a_tenant_use_the_tenants_own(helm: Helm) -> None:
    pools = (
        '[{"name": "own", "isolation": "Namespace", "modelClaim": "their-model", '
        '"credentialsSecret": "their-secret", "serviceAccountName": "their-account"}]'
    )
    objects = helm.render("--set-json", f"pools={pools}", "--set", "storage.credentials.existingSecret=ours")
    spec = pod_templates(objects)["pool own"]["spec"]
    assert spec["serviceAccountName"] == "their-account"
    (model,) = [v for v in spec["volumes"] if v["name"] == "model"]
    assert model["persistentVolumeClaim"]["claimName"] == "their-model"
    assert environment(spec["containers"][0])["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == "their-secret"
    operations = pod_templates(objects)["operations of pool own"]["spec"]
    assert (operations["serviceAccountName"], operations["automountServiceAccountToken"]) == ("their-account", False)
    (model,) = [v for v in operations["volumes"] if v["name"] == "model"]
    assert model["persistentVolumeClaim"]["claimName"] == "their-model"
    assert environment(operations["containers"][0])["AWS_ACCESS_KEY_ID"]["secretKeyRef"]["name"] == "their-secret"
    assert _may_create_jobs_anywhere(objects)
    assert not _may_create_jobs_anywhere(helm.render())


def test_an_uninstall_first_takes_the_finalizers_off(helm: Helm) -> None:
    objects = helm.render()
    hook = only(objects, "Pod")
    assert hook["metadata"]["annotations"]["helm.sh/hook"] == "pre-delete"
    assert "hook-succeeded" in hook["metadata"]["annotations"]["helm.sh/hook-delete-policy"]
    assert hook["spec"]["activeDeadlineSeconds"] > 0
    operator = only(objects, "Deployment", "claas-operator")
    arguments = dict(argument.split("=", 1) for argument in hook["spec"]["containers"][0]["args"])
    assert arguments["--deployment"] == operator["metadata"]["name"]
    selected = dict(pair.split("=") for pair in arguments["--selector"].split(","))
    assert selected.items() <= operator["spec"]["template"]["metadata"]["labels"].items()
    assert not selected.items() <= hook["metadata"]["labels"].items(), "it would wait for itself"
    rules = only(objects, "Role", "claas-operator")["rules"]
    assert any(rule["resources"] == ["deployments/scale"] and rule["verbs"] == ["patch"] for rule in rules)
    without = helm.render("--set", "operator.releaseOnUninstall=false")
    assert not [o for o in without if o["kind"] == "Pod"]
    assert not any("deployments/scale" in str(o) for o in without if o["kind"] == "Role")


def test_a_namespace_may_fork_what_the_values_open_to_it(helm: Helm) -> None:
    given = '[{"namespace": "bob", "uri": "s3://adapters/alice/"}, {"namespace": "*", "uri": "s3://public/loras/"}]'
    settings = Settings.model_validate(settings_of(helm.render("--set-json", f"storage.forkPrefixes={given}")))
    assert settings.fork_prefixes("bob") == ["s3://adapters/alice/", "s3://public/loras/"]
    assert settings.fork_prefixes("eve") == ["s3://public/loras/"]
    assert settings.prefixes("bob") == ["s3://adapters/bob/"]


def _may_create_jobs_anywhere(objects: list[Object]) -> bool:
    rules = only(objects, "ClusterRole", "claas-system-claas-operator")["rules"]
    return any("jobs" in rule["resources"] and "create" in rule["verbs"] for rule in rules)


def test_a_change_of_settings_rolls_the_operator_and_renames_the_fetch_job(helm: Helm) -> None:
    def seen(*arguments: str) -> tuple[str, set[str]]:
        objects = helm.render(*arguments)
        annotations = only(objects, "Deployment", "claas-operator")["spec"]["template"]["metadata"]["annotations"]
        return annotations["checksum/settings"], {o["metadata"]["name"] for o in objects if o["kind"] == "Job"}

    checksum, jobs = seen()
    assert seen() == (checksum, jobs)
    more_workers, same_jobs = seen("--set", "poolDefaults.maxWorkers=3")
    assert more_workers != checksum
    assert same_jobs == jobs
    moved, moved_jobs = seen("--set", "model.source=s3://models/coder/")
    assert moved != checksum
    assert len(jobs & moved_jobs) == 1  # the teacher's model is where it was


def test_images_come_from_the_registry_unless_they_name_their_own(helm: Helm) -> None:
    ours = "image.registry=registry.example.com/team/,image.tag=1.2.3,image.worker=localhost/w:7"
    objects = helm.render("--set", ours)
    images = {name: template["spec"]["containers"][0]["image"] for name, template in pod_templates(objects).items()}
    assert images["Deployment claas-operator"] == "registry.example.com/team/claas-operator:1.2.3"
    assert images["Deployment claas-teacher"] == "registry.example.com/team/claas-teacher:1.2.3"
    assert images["pool l40s"] == images["operations"] == "localhost/w:7"


@pytest.mark.parametrize(
    ("source", "image"), [("", "teacher"), ("file:///models/q", "teacher"), ("s3://models/q/", "worker")]
)
def test_the_teachers_model_is_fetched_where_it_is_used(helm: Helm, source: str, image: str) -> None:
    """By the image that lies there anyway, unless it takes a client for S3."""
    objects = helm.render("--set", f"teacher.model.source={source}")
    (job,) = [o for o in objects if o["kind"] == "Job" and "fetch-teacher" in o["metadata"]["name"]]
    spec = job["spec"]["template"]["spec"]
    assert spec["containers"][0]["image"] == f"claas-{image}:0.1.0"
    assert spec["nodeSelector"] == {"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"}
    assert "nvidia.com/gpu" not in spec["containers"][0]["resources"]["limits"]
    # Its volume goes to one node only: the one on which the teacher waits for it.
    (term,) = spec["affinity"]["podAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    teacher = only(objects, "Deployment", "claas-teacher")["spec"]["template"]["metadata"]["labels"]
    assert term["labelSelector"]["matchLabels"].items() <= teacher.items()


def test_a_teacher_elsewhere_or_none(helm: Helm) -> None:
    for url in ("https://teacher.example.com", ""):
        objects = helm.render("--set", f"teacher.enabled=false,teacher.url={url}")
        assert not [o for o in objects if o["metadata"]["name"] == "claas-teacher" and o["kind"] != "ServiceAccount"]
        settings = Settings.model_validate(settings_of(objects))
        assert (settings.teacher.url if settings.teacher else "") == url
        assert environment(pod_templates(objects)["pool l40s"]["spec"]["containers"][0])["CLAAS_TEACHER_URL"] == url


def test_network_policies_let_in_those_who_have_business(helm: Helm) -> None:
    """Nothing here enforces them (there is no controller to be had), so their selectors are matched by hand."""
    objects = helm.render("--set", "networkPolicy.enabled=true,seaweedfs.enabled=true")
    policies = {o["metadata"]["name"]: o["spec"] for o in objects if o["kind"] == "NetworkPolicy"}
    pods = {name: template["metadata"]["labels"] for name, template in pod_templates(objects).items()}

    def may(source: str, target: str) -> bool:
        covering = [s for s in policies.values() if s["podSelector"]["matchLabels"].items() <= pods[target].items()]
        assert covering, f"no policy covers {target}"
        peers = [peer["podSelector"] for s in covering for rule in s["ingress"] for peer in rule.get("from", [])]
        return any(_selects(peer, pods[source]) for peer in peers)

    fetch = next(name for name in pods if "fetch-model" in name)
    everyone = set(pods)
    teacher, store = "Deployment claas-teacher", "Deployment claas-seaweedfs"
    operator, shim = "Deployment claas-operator", "Deployment claas-shim"
    assert {name for name in everyone if may(name, teacher)} == {operator, shim, "pool l40s"}
    assert {"pool l40s", "operations", fetch, shim} <= {name for name in everyone if may(name, store)}
    assert policies["claas-shim"]["ingress"] == [{"ports": [{"protocol": "TCP", "port": 8080}]}], "its callers are many"
    assert not may(teacher, store)
    assert not any(may(name, "pool l40s") or may(name, "operations") for name in everyone)


def test_the_operator_may_do_what_its_tests_need_and_nothing_else(helm: Helm) -> None:
    """`operatorstage` runs every operator of the tests with these rights."""
    objects = helm.render()
    cluster = only(objects, "ClusterRole", "claas-system-claas-operator")["rules"]
    home = only(objects, "Role", "claas-operator")["rules"]

    def rights(rules: list[Object]) -> set[tuple[str, str, str]]:
        return {
            (group, resource, verb)
            for rule in rules
            for group in rule["apiGroups"]
            for resource in rule["resources"]
            for verb in rule["verbs"]
        }

    assert rights(cluster) == rights(EVERYWHERE) | {("claas.dev", "distillrequests", "operate")}
    assert rights(home) == rights(AT_HOME)
    assert not [right for right in rights(cluster) | rights(home) if "*" in right or "secrets" in right[1]]


def test_prometheus_reaches_the_operator(helm: Helm) -> None:
    objects = helm.render("--set", "networkPolicy.enabled=true")
    (container,) = only(objects, "Deployment", "claas-operator")["spec"]["template"]["spec"]["containers"]
    (port,) = [port["containerPort"] for port in container["ports"] if port["name"] == "metrics"]
    assert f"--metrics=http://0.0.0.0:{port}/metrics" in container["args"]
    service = only(objects, "Service", "claas-operator")["spec"]
    assert service["ports"][0]["targetPort"] == "metrics"
    labels = only(objects, "Deployment", "claas-operator")["spec"]["template"]["metadata"]["labels"]
    assert service["selector"].items() <= labels.items()
    (rule,) = only(objects, "NetworkPolicy", "claas-operator")["spec"]["ingress"]
    assert "from" not in rule and port in [open_["port"] for open_ in rule["ports"]]


def _selects(selector: Object, labels: dict[str, str]) -> bool:
    return selector.get("matchLabels", {}).items() <= labels.items() and all(
        labels.get(wanted["key"]) in wanted["values"] for wanted in selector.get("matchExpressions", [])
    )


def test_notes_name_the_next_commands(helm: Helm) -> None:
    arguments = ("--dry-run=client", "--namespace", "ml", "--set", "crds.install=false")
    _, notes = helm.run("install", "claas", str(CHART), *arguments).stdout.split("NOTES:")
    assert "kubectl -n ml rollout status deployment/claas-teacher" in notes
    assert "kubectl -n default wait --for=condition=Complete dr/" in notes
    (example,) = re.findall(r"<<'END'\n(.*?)\nEND\n", notes, re.DOTALL)
    adapter, request = yaml.safe_load_all(example)
    assert LoraAdapterSpec.model_validate(adapter["spec"]).base_model == "Qwen/Qwen2.5-Coder-3B-Instruct"
    assert DistillRequestSpec.model_validate(request["spec"]).adapter_ref.name == adapter["metadata"]["name"]


@pytest.mark.parametrize(
    ("pools", "places"),
    [
        ("pools[0].name=a", {"(a)": "HOME"}),
        ("pools[0].name=a,pools[0].isolation=Namespace,pools[0].modelClaim=m", {"(a)": "request.namespace"}),
        (
            "pools[0].name=a,pools[1].name=b,pools[1].isolation=Namespace,pools[1].modelClaim=m,pools[2].name=c",
            {"(a|c)": "HOME", "(b)": "request.namespace"},
        ),
    ],
)
def test_the_admission_policy_knows_where_workers_of_each_pool_run(
    helm: Helm, pools: str, places: dict[str, str]
) -> None:
    """Elsewhere, or in another tenant's namespace, a Pod may have any worker's name."""
    objects = helm.render("--set", pools)
    policies = [o for o in objects if o["kind"] == "ValidatingAdmissionPolicy"]
    policy = next(o for o in policies if o["metadata"]["name"].endswith("request-status"))
    (rule,) = [r["expression"] for r in policy["spec"]["validations"] if "matches" in r["expression"]]
    found = dict(
        re.findall(r"matches\('\^claas-(\S+)-\[0-9\]\+-\[a-z0-9\]\{5\}\$'\) \? variables.account\[2\] == (\S+)", rule)
    )
    assert found == {name: place.replace("HOME", f"'{NAMESPACE}'") for name, place in places.items()}


def test_tenants_patience_and_kueue_s_queue_reach_the_operator(helm: Helm) -> None:
    tenants = (
        '[{"namespace": "*", "maxGpuSecondsPerDay": 3600}, {"namespace": "a", "weight": 2, "maxPendingRequests": 9}]'
    )
    objects = helm.render(
        *("--set-json", f"tenants={tenants}", "--set-json", "poolDefaults.scaleUpSeconds=2.5"),
        *("--set", "poolDefaults.queueName=gpus"),
    )
    settings = Settings.model_validate(settings_of(objects))
    assert (settings.tenant("a").weight, settings.tenant("a").max_gpu_seconds_per_day) == (2, 0)
    assert (settings.tenant("b").weight, settings.tenant("b").max_gpu_seconds_per_day) == (1, 3600)
    assert (settings.pools[0].queue_name, settings.pools[0].scale_up_seconds) == ("gpus", 2.5)
