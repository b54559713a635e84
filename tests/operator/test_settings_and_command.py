"""Settings, the `claas` command and the Jobs that are built: what a person meets first."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import yaml
from kubernetes.aio.client.exceptions import ApiException
from pydantic import ValidationError

from claas_crds import names
from claas_operator import cli
from claas_operator.jobs import build_worker_job, create_arguments
from claas_operator.permissions import permitted
from claas_operator.release import release
from claas_operator.settings import SettingsError, load
from claas_operator.snapshot import Adapter, Kind
from operatorkit import HOME, MODEL, PREFIX, MemoryApi, Raw, adapter, request, settings, snapshot, template


def write(folder: Path, **changes: object) -> Path:
    """The least settings file, with `changes`."""
    content = {
        "instance": "claas",
        "namespace": HOME,
        "defaultPool": "l40s",
        "defaultBaseModel": MODEL,
        "pools": [{"name": "l40s", "baseModel": MODEL, "template": template("worker")}],
        "operations": {"template": template("operation")},
    } | changes
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_the_least_settings_are_enough(tmp_path: Path) -> None:
    assert load(write(tmp_path)).pools[0].max_workers == 1


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"defaultPol": "x"}, "defaultPol: Extra inputs"),
        ({"defaultPool": "h100"}, "defaultPool 'h100' names no entry of pools (l40s)"),
        ({"pools": [{"name": "l40s", "baseModel": MODEL, "template": template("main")}]}, "one of them named 'worker'"),
        ({"storage": {"prefixes": [{"uri": "adapters/"}]}}, "must be s3://BUCKET/PATH/"),
        ({"timings": {"leaseSeconds": 0}}, "timings.leaseSeconds: Input should be greater than 0"),
        ({"teacher": {"url": "teacher:8000"}}, "teacher.url: String should match"),
        ({"instance": "a" * 30}, "too long for a Job's name"),
        ({"tenants": [{"maxGpuSecondsPerDay": float("inf")}]}, "maxGpuSecondsPerDay: Input should be a finite"),
    ],
)
def test_a_mistake_in_the_settings_is_named(tmp_path: Path, changes: Raw, says: str) -> None:
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, **changes))
    assert says in str(caught.value)


def test_secrets_in_a_template_do_not_show_in_an_error(tmp_path: Path) -> None:
    pod = {"spec": {"containers": [{"name": "main", "env": [{"name": "KEY", "value": "hunter2"}]}]}}
    with pytest.raises(SettingsError) as caught:
        load(write(tmp_path, operations={"template": pod}))
    assert "hunter2" not in str(caught.value)


def test_help_and_validate_need_no_operator_packages(tmp_path: Path) -> None:
    """The base install has pydantic, httpx and PyYAML: everything heavier is refused here."""
    good = tmp_path / "good.yaml"
    good.write_text(yaml.safe_dump_all([{k: v for k, v in adapter().items() if k != "status"}, request("r")]))
    code = (
        "import sys\n"
        "for name in ('kopf', 'kubernetes', 'fastapi', 'boto3', 'numpy', 'torch', 'safetensors'):\n"
        "    sys.modules[name] = None\n"
        "from claas_operator.cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )

    def claas(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        environment = {"PYTHONPATH": ":".join(sys.path)}
        return subprocess.run(command, capture_output=True, text=True, timeout=60, env=environment, check=False)

    assert "validate" in claas("--help").stdout
    assert claas("validate", str(good)).returncode == 0
    assert "kind: CustomResourceDefinition" in claas("crds").stdout
    missing = claas("operator", "run", "--config", str(write(tmp_path)))
    assert missing.returncode == 1
    assert "pip install 'claas[operator]'" in missing.stderr


def test_validate_names_file_document_field_and_fix_and_never_the_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = request("r", spec={"training": {"alpha": 7}, "loraUri": "http://x"})
    bad["spec"]["samples"][0]["response"] = None
    file = tmp_path / "bad.yaml"
    file.write_text(yaml.safe_dump_all([bad, {"kind": "Pod"}]))
    assert cli.main(["validate", str(file)]) == 1
    said = capsys.readouterr().err
    assert f"{file}: document 1: DistillRequest: spec.samples[0]: a sample needs either response or" in said
    assert "spec.training.alpha: Input should be less than or equal to 1" in said
    assert f"{file}: document 2: kind: must be LoraAdapter or DistillRequest" in said
    assert "secret" not in said
    broken = tmp_path / "broken.yaml"
    broken.write_text("a: [1\nb: 2\n")
    assert cli.main(["validate", str(broken), str(tmp_path / "absent.yaml")]) == 1
    said = capsys.readouterr().err
    assert "not YAML" in said
    assert "No such file" in said


def the_adapter(**spec: object) -> Adapter:
    return snapshot(adapter(head=0, spec=dict(spec))).adapters["uid-coder"]


def test_a_worker_job_is_a_lease_on_one_gpu() -> None:
    using = settings(pool={"lingerSeconds": 0, "maxRequests": 1})
    made = build_worker_job(using, using.pools[0], HOME, 3, "uid-of-deployment")
    assert made["metadata"]["name"] == "claas-l40s-3"
    assert made["metadata"]["ownerReferences"][0]["uid"] == "uid-of-deployment"
    assert "blockOwnerDeletion" not in made["metadata"]["ownerReferences"][0], "it would need rights on finalizers"
    assert made["spec"]["backoffLimit"] == 0
    pod = made["spec"]["template"]
    assert pod["spec"]["restartPolicy"] == "Never"
    assert pod["metadata"]["labels"] == made["metadata"]["labels"]
    assert pod["metadata"]["labels"][names.COMPONENT_LABEL] == "worker"
    environment = {
        v["name"]: v.get("value") or v["valueFrom"]
        for v in pod["spec"]["containers"][0]["env"]
        if v["name"] != names.ENV_WATCH_NAMESPACE
    }
    assert environment[names.ENV_LINGER_SECONDS] == "0"
    assert environment[names.ENV_MAX_REQUESTS] == "1"
    assert environment[names.ENV_POD_UID] == {"fieldRef": {"fieldPath": "metadata.uid"}}
    assert using.pools[0].template == template("worker"), "the template itself stays as it was"


def test_the_chart_s_own_environment_stays_and_ours_wins() -> None:
    pool = {
        "template": {
            "spec": {
                "containers": [
                    {"name": "worker", "env": [{"name": "A", "value": "1"}, {"name": names.ENV_POOL, "value": "x"}]}
                ]
            }
        }
    }
    using = settings(pool=pool)
    made = build_worker_job(using, using.pools[0], HOME, 1, None)
    environment = [(v["name"], v.get("value")) for v in made["spec"]["template"]["spec"]["containers"][0]["env"]]
    assert ("A", "1") in environment
    assert [value for name, value in environment if name == names.ENV_POOL] == ["l40s"]


def test_a_create_job_says_all_that_the_store_needs_without_loss() -> None:
    odd = the_adapter(lora={"r": 8, "alpha": 1234.5678, "targetModules": ["q_proj", "v_proj"]})
    args = create_arguments(settings(), odd)
    pairs = dict(zip(args[1::2], args[2::2], strict=True))
    assert args[0] == "create"
    assert pairs["--alpha"] == "1234.5678"
    assert pairs["--target-modules"] == "q_proj,v_proj"
    assert pairs["--adapter-uid"] == "uid-coder"


def test_the_operator_module_takes_the_same_arguments(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "claas_operator", "--config", str(tmp_path / "absent.yaml")],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PYTHONPATH": ":".join(sys.path)},
        check=False,
    )
    assert done.returncode == 1
    assert "absent.yaml" in done.stderr


@pytest.mark.parametrize("uri", ["s3://{namespace}/adapters/", "s3://team-{namespace}/"])
def test_a_namespace_is_no_part_of_a_bucket(uri: str) -> None:
    """Not every namespace's name can be a bucket's: what could not be would stop the loop."""
    with pytest.raises(ValidationError, match="in its bucket"):
        settings(storage={"prefixes": [{"uri": uri}]})


def test_a_release_without_its_definitions_has_nothing_to_let_go() -> None:
    class WithoutDefinition(MemoryApi):
        async def merge(self, path: str, patch: Raw) -> Raw:
            return {}

        async def list(self, kind: Kind, selector: str = "", *, metadata_only: bool = False) -> AsyncIterator[Raw]:
            if kind is Kind.ADAPTER:
                raise ApiException(status=404, reason="NotFound")
            for raw in ():
                yield raw

    assert asyncio.run(release(WithoutDefinition(), HOME, "claas-operator", "a=b")) == 0  # type: ignore[arg-type]


def test_a_name_leaves_room_for_what_steps_add_to_it() -> None:
    assert permitted(f"{PREFIX}{'x' * 224}/", settings(), "team")
    assert not permitted(f"{PREFIX}{'x' * 225}/", settings(), "team")
    assert permitted(f"{PREFIX}{'x' * 224}-20260101-000000-01234567-a11/", settings(), "team")
    assert not permitted(f"{PREFIX}{'é' * 113}/", settings(), "team"), "bytes count, not characters"
