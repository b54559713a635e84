"""The chart as Helm renders it, and ways to look into it."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parents[2] / "charts" / "claas"
NAMESPACE = "claas-system"
LIMIT_SECONDS = 60

Object = dict[str, Any]

# Each values file, with what must be given beside it to install it.
VARIANTS: dict[str, list[str]] = {
    "gpu": [],
    "gpu, everything on": [
        *("--set", "networkPolicy.enabled=true,operator.replicas=2,shim.replicas=3,teacher.podDisruptionBudget=true"),
        *("--set", "fetch.hubTokenSecret=hub,storage.credentials.existingSecret=mine"),
        *("--set", "pools[0].name=shared,pools[1].name=own,pools[1].isolation=Namespace,pools[1].modelClaim=model"),
    ],
    "cpu": ["-f", f"{CHART}/values-cpu.yaml"],
    "cpu, slim, SeaweedFS": [
        *("-f", f"{CHART}/values-cpu.yaml", "-f", f"{CHART}/values-slim.yaml", "--set", "seaweedfs.enabled=true"),
        *("--set", "storage.credentials.accessKeyId=key,storage.credentials.secretAccessKey=secret"),
    ],
}


@dataclass(frozen=True)
class Helm:
    """`helm` with the chart."""

    program: Path

    def run(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Any helm command; raises with its own words when it fails and `check` is set."""
        command = [str(self.program), *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT_SECONDS, check=False)
        assert not check or done.returncode == 0, f"{' '.join(arguments)}: {done.stderr or done.stdout}"
        return done

    def text(self, *arguments: str, release: str = "claas") -> str:
        """What `helm template` prints."""
        return self.run("template", release, str(CHART), "--namespace", NAMESPACE, *arguments).stdout

    def render(self, *arguments: str, release: str = "claas") -> list[Object]:
        """The objects that the chart consists of with these arguments."""
        return [found for found in yaml.safe_load_all(self.text(*arguments, release=release)) if found]

    def refusal(self, *arguments: str, release: str = "claas") -> str:
        """What helm says when it refuses the arguments."""
        done = self.run("template", release, str(CHART), *arguments, check=False)
        assert done.returncode != 0, f"accepted: {arguments}"
        return done.stderr


def only(objects: list[Object], kind: str, name: str = "") -> Object:
    """The one object of that kind (and name)."""
    (found,) = [o for o in objects if o["kind"] == kind and name in ("", o["metadata"]["name"])]
    return found


def settings_of(objects: list[Object]) -> Object:
    """The operator's settings file, parsed."""
    (content,) = [o["data"]["config.yaml"] for o in objects if o["kind"] == "ConfigMap" and "config.yaml" in o["data"]]
    settings: Object = yaml.safe_load(content)
    return settings


def shim_settings_of(objects: list[Object]) -> Object:
    """The shim's settings file, parsed."""
    settings: Object = yaml.safe_load(only(objects, "ConfigMap", "claas-shim")["data"]["shim.yaml"])
    return settings


def pod_templates(objects: list[Object]) -> dict[str, Object]:
    """Every Pod template, also those in the operator's settings, by what it is of."""
    workloads = [o for o in objects if o["kind"] in ("Deployment", "Job")]
    found = {f"{o['kind']} {o['metadata']['name']}": o["spec"]["template"] for o in workloads}
    settings = settings_of(objects)
    found |= {f"Pod {o['metadata']['name']}": o for o in objects if o["kind"] == "Pod"}
    found |= {f"pool {pool['name']}": pool["template"] for pool in settings["pools"]}
    found |= {
        f"operations of pool {pool['name']}": pool["operationTemplate"]
        for pool in settings["pools"]
        if "operationTemplate" in pool
    }
    return found | {"operations": settings["operations"]["template"]}


def containers(template: Object) -> list[Object]:
    """Its containers, init containers included."""
    return [*template["spec"].get("initContainers", []), *template["spec"]["containers"]]


def environment(container: Object) -> dict[str, Any]:
    """Variable -> its value, or where it comes from."""
    names = [variable["name"] for variable in container.get("env", [])]
    assert len(names) == len(set(names)), f"set twice: {names}"
    return {variable["name"]: variable.get("value", variable.get("valueFrom")) for variable in container.get("env", [])}
