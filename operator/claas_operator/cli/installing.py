"""`claas deploy` checks the cluster and installs the chart with Helm; `claas serve` runs the REST API here."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from claas_operator.cli.command import Command
from claas_operator.cli.exits import Exit
from claas_operator.cli.options import Target, cluster, output
from claas_operator.cli.output import Format, say, write_json
from claas_operator.cli.problem import Problem, missing

if TYPE_CHECKING:
    from claas_operator.cli.checks import Check
    from claas_operator.cli.kube import Kube, Object
    from claas_operator.cli.needs import Needs

RENDER_SECONDS: Final = 120
CRDS: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"


@dataclass(frozen=True)
class Chart:
    """A chart with values, to become a release."""

    path: str
    release: str
    namespace: str
    arguments: tuple[str, ...]  # --values and --set, as Helm takes them
    environment: dict[str, str]
    context: str | None

    def helm(self, *words: str) -> list[str]:
        """Helm's command line for this cluster."""
        chosen = ["--kube-context", self.context] if self.context else []
        return [_program("helm"), *words, *chosen, "--namespace", self.namespace]

    def render(self) -> list[Object]:
        """What Helm would install.

        Raises:
            Problem: the chart refuses the values; in its own words.
        """
        import yaml

        command = self.helm("template", self.release, self.path, *self.arguments)
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                timeout=RENDER_SECONDS,
                check=False,
                env=os.environ | self.environment,
            )
        except subprocess.TimeoutExpired:
            raise Problem(f"helm template has not ended after {RENDER_SECONDS} s") from None
        if done.returncode:
            raise Problem(
                f"the chart cannot be rendered: {_helm_said(done.stderr)}", "correct --set or --values", Exit.USAGE
            )
        return [item for item in yaml.safe_load_all(done.stdout) if isinstance(item, dict)]

    def install(self, *words: str) -> int:
        """Helm's exit code; what it says goes to stderr."""
        command = self.helm(
            "upgrade", "--install", self.release, self.path, "--create-namespace", *words, *self.arguments
        )
        return subprocess.run(command, stdout=2, check=False, env=os.environ | self.environment).returncode


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise Problem(f"{name} is not on the PATH", f"install {name}: https://{name}.sh", Exit.FAILED)
    return found


def _helm_said(stderr: str) -> str:
    lines = [line.removeprefix("Error: ") for line in stderr.strip().splitlines() if not line.startswith("level=")]
    return "\n  ".join(lines) or "helm says nothing"


def find_chart(given: str | None) -> str:
    """The chart: what was given, or that of this checkout.

    Raises:
        Problem: there is none.
    """
    if given:
        if given.startswith(("/", ".")) and not Path(given).exists():
            raise Problem(f"--chart: there is no {given}", "a folder, a .tgz, or oci://…", Exit.USAGE)
        return given
    for root in (Path(__file__).resolve().parents[3], Path.cwd()):
        if (root / "charts" / "claas" / "Chart.yaml").is_file():
            return str(root / "charts" / "claas")
    fix = "name it with --chart: a folder, a .tgz, or oci://…; or run this in a checkout of the project"
    raise Problem("the chart was not found", fix, Exit.USAGE)


@click.command(
    cls=Command,
    examples=[
        "# is this cluster fit for it? nothing is changed",
        "claas deploy --dry-run --set image.registry=registry.example.com/team",
        "# a GPU cluster, S3 credentials from a Secret",
        "claas deploy --set image.registry=registry.example.com/team --set storage.credentials.existingSecret=s3 \\",
        '    --set-json \'storage.prefixes=[{"namespace":"*","uri":"s3://my-bucket/loras/{namespace}/"}]\'',
        "# no GPU: small models, the embedded store, to try it out",
        "claas deploy -f charts/claas/values-cpu.yaml --set seaweedfs.enabled=true",
    ],
)
@click.option("--chart", metavar="PATH|REF", help="The chart; that of this checkout when absent.")
@click.option("--release", default="claas", show_default=True, metavar="NAME", help="Of the Helm release.")
@click.option("-n", "--namespace", default="claas-system", show_default=True, metavar="NAME", help="Of the release.")
@click.option("-f", "--values", multiple=True, metavar="FILE", help="Values for Helm; again for more.")
@click.option("--set", "sets", multiple=True, metavar="K=V", help="One value for Helm; again for more.")
@click.option("--set-json", multiple=True, metavar="K=JSON", help="The same, as JSON.")
@click.option("--dry-run", is_flag=True, help="Check only; also asks the API server whether it would take the objects.")
@click.option("--render", is_flag=True, help="Print the manifests, and do nothing else.")
@click.option("--force", is_flag=True, help="Install although a check says that it will not work.")
@click.option("--wait", is_flag=True, help="Return when everything is Ready (a large teacher takes long).")
@click.option("--timeout", default=1800, show_default=True, type=click.IntRange(1), help="Seconds, with --wait.")
@output
@cluster
def deploy(
    target: Target,
    chart: str | None,
    release: str,
    namespace: str,
    values: tuple[str, ...],
    sets: tuple[str, ...],
    set_json: tuple[str, ...],
    dry_run: bool,
    render: bool,
    force: bool,
    wait: bool,
    timeout: int,
    form: Format,
) -> Exit:
    """Install CLaaS, or upgrade it: checks the cluster, then runs Helm.

    Checked are: the server's version, the kinds, nodes with the pools' and the teacher's labels and room for them,
    storage classes, Secrets, quotas, your rights, and whether the store can be reached from here. Exit code 1 when
    something will not work; then nothing is installed.
    """
    from claas_operator.cli.checking import show
    from claas_operator.cli.checks import Level, worst

    arguments = [word for file in values for word in ("--values", file)]
    arguments += [word for pair in sets for word in ("--set", pair)]
    arguments += [word for pair in set_json for word in ("--set-json", pair)]
    environment = {"KUBECONFIG": target.kubeconfig} if target.kubeconfig else {}
    wanted = Chart(find_chart(chart), release, namespace, tuple(arguments), environment, target.context)
    objects = wanted.render()
    if render:
        _print(objects)
        return Exit.OK
    kube = target.kube("claas deploy")
    try:
        checks = list(check_cluster(kube, wanted, objects))
    finally:
        kube.close()
    level = worst(checks)
    if dry_run and level is not Level.WRONG:
        checks.append(_server_dry_run(wanted))
        level = worst(checks)
    installed = not dry_run and (force or level is not Level.WRONG)
    if form is Format.TABLE:
        show(checks, form)
    code = wanted.install(*(["--wait", f"--timeout={timeout}s"] if wait else [])) if installed else 0
    if form is Format.JSON:
        done = installed and code == 0
        write_json({"checks": [check.as_json() for check in checks], "installed": done, "objects": len(objects)})
    if code:
        raise Problem(f"helm has failed (exit code {code})", "what it says is above; claas doctor looks closer")
    if level is Level.WRONG and not installed:
        raise Problem("this cluster is not fit for it", "mend what is wrong above, or insist with --force")
    if dry_run:
        say(f"{len(objects)} objects would be installed as release {release} in namespace {namespace}")
    else:
        say(f"release {release} is installed in namespace {namespace}; look: claas health; claas doctor")
    return Exit.OK


def _print(objects: Sequence[Object]) -> None:
    import yaml

    click.echo(yaml.safe_dump_all(objects, sort_keys=False, explicit_start=True), nl=False)


def _server_dry_run(chart: Chart) -> Check:
    """What the API server would say to the objects; nothing is kept."""
    from claas_operator.cli.checks import ok, wrong

    command = chart.helm(
        "upgrade", "--install", chart.release, chart.path, "--create-namespace", "--dry-run=server", *chart.arguments
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | chart.environment)
    if done.returncode:
        return wrong(
            "API server", _helm_said(done.stderr), "correct the values, or ask for the rights that are missing"
        )
    return ok("API server", "would take the objects")


def check_cluster(kube: Kube, chart: Chart, objects: Sequence[Object]) -> Iterator[Check]:
    """Everything that can be known before the installation."""
    from claas_operator.cli import checks
    from claas_operator.cli.checking import reach_store, secrets_of
    from claas_operator.cli.needs import Needs

    needs = Needs.of(objects, chart.release)
    yield checks.version(kube.get("/version"))
    home = f"/api/v1/namespaces/{chart.namespace}"
    looks: list[tuple[str, Any]] = [
        ("rights", lambda: _rights(kube, needs)),
        ("kinds", lambda: _kinds(kube, needs, chart)),
        ("nodes", lambda: _placements(kube, needs)),
        (
            "volumes",
            lambda: checks.storage_classes(
                needs,
                list(kube.list("/apis/storage.k8s.io/v1/storageclasses")),
                [claim["metadata"]["name"] for claim in kube.list(f"{home}/persistentvolumeclaims")],
            ),
        ),
        ("secrets", lambda: checks.secrets(needs, secrets_of(kube, chart.namespace, needs.secrets))),
        ("quota", lambda: checks.quotas(needs, list(kube.list(f"{home}/resourcequotas")))),
        ("store", lambda: [reach_store(needs)]),
    ]
    for what, look in looks:
        try:
            yield from look()
        except Problem as problem:
            if problem.code is not Exit.DENIED:
                raise
            yield checks.warning(what, f"cannot be seen: {problem.message}", "ask whoever runs the cluster")


def _placements(kube: Kube, needs: Needs) -> Iterator[Check]:
    from claas_operator.cli import checks

    found = list(kube.list("/api/v1/nodes"))
    for workload in needs.workloads:
        yield checks.nodes(workload, found)


def _kinds(kube: Kube, needs: Needs, chart: Chart) -> Iterator[Check]:
    from claas_crds.generate import RESOURCES, definition
    from claas_operator.cli import checks

    expected = needs.crds or {resource.name: definition(resource) for resource in RESOURCES}
    found = {name: kube.find(f"{CRDS}/{name}") for name in expected}
    release = (chart.release, chart.namespace)
    yield from checks.crds(expected, found, will_install=bool(needs.crds), release=release)


def _rights(kube: Kube, needs: Needs) -> Iterator[Check]:
    """Whether this kubeconfig may create what reaches beyond a namespace."""
    from claas_operator.cli.checks import ok, wrong

    group = "rbac.authorization.k8s.io"
    wanted = [("create", group, "clusterroles"), ("create", group, "clusterrolebindings"), ("create", "", "namespaces")]
    wanted += [("create", "apiextensions.k8s.io", "customresourcedefinitions")] if needs.crds else []
    lacking = []
    for verb, group, resource in wanted:
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": {"verb": verb, "group": group, "resource": resource}},
        }
        answer = kube.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        if not (answer.get("status") or {}).get("allowed"):
            lacking.append(f"{verb} {resource}")
    if lacking:
        yield wrong("rights", f"you may not {', '.join(lacking)}", "an administrator of the cluster must install it")
    else:
        yield ok("rights", "you may install it")


@click.command(
    cls=Command,
    examples=[
        "# for yourself: no key is asked for, everything happens in one namespace",
        "claas serve --auth None --auth-namespace user123",
        "curl -s localhost:8080/v1/health",
        "# as the chart runs it: bearer tokens of the cluster",
        "claas serve --host 0.0.0.0 --port 8443",
    ],
)
@click.option("--config", type=click.Path(path_type=Path), help="Settings; made from the release's own when absent.")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at.")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(0, 65535), help="Port to listen at.")
@click.option(
    "--auth",
    type=click.Choice(["Kubernetes", "ApiKey", "None"]),
    help="Who may call: bearer tokens of the cluster (default), keys, or everybody, as one namespace.",
)
@click.option("--auth-namespace", metavar="NAME", help="With --auth None: whose requests they are.")
@click.option("--release", metavar="NAME", help="The Helm release; found by itself when absent.")
@click.option("--release-namespace", metavar="NAME", help="Its namespace.")
@click.option("--kubeconfig", metavar="FILE", help="Default: KUBECONFIG, then ~/.kube/config.")
@click.option(
    "--log-level", default="INFO", show_default=True, type=click.Choice(["DEBUG", "INFO", "WARNING", "ERROR"])
)
def serve(
    config: Path | None,
    host: str,
    port: int,
    auth: str | None,
    auth_namespace: str | None,
    release: str | None,
    release_namespace: str | None,
    kubeconfig: str | None,
    log_level: str,
) -> int:
    """Run the REST API on this machine, for the cluster of a kubeconfig, until Ctrl-C. It logs to stderr, as JSON.

    It acts with the kubeconfig's rights. Payloads over 4 KiB go to the store, for which AWS_* must be set.
    """
    if auth == "None" and not auth_namespace:
        raise Problem("--auth None needs a namespace", "add --auth-namespace NAME", Exit.USAGE)
    if auth != "None" and auth_namespace:
        raise Problem("--auth-namespace goes with --auth None", "leave it out", Exit.USAGE)
    try:
        from claas_operator.shim.app import run
    except ModuleNotFoundError as error:
        raise missing(error.name, "operator", "claas serve") from None
    if kubeconfig:
        os.environ["KUBECONFIG"] = kubeconfig
    settings = _shim_settings(config, release, release_namespace, kubeconfig)
    if auth:
        chosen = {"mode": auth} | ({"namespace": auth_namespace} if auth == "None" else {})
        settings = type(settings).model_validate(settings.model_dump() | {"auth": chosen})
    if settings.auth.mode == "None" and host not in ("127.0.0.1", "::1", "localhost"):
        say(f"claas: whoever reaches {host}:{port} may teach in namespace {settings.auth.namespace}")
    try:
        return int(run(settings, host=host, port=port, log_level=log_level))
    except KeyboardInterrupt:  # told again, after everybody who waited was answered
        return Exit.OK


def _shim_settings(config: Path | None, release: str | None, namespace: str | None, kubeconfig: str | None) -> Any:
    from pydantic import ValidationError

    from claas_operator.cli import installation
    from claas_operator.cli.kube import Cluster, Kube
    from claas_operator.settings import Settings, SettingsError
    from claas_operator.shim.settings import ShimSettings, load

    if config is not None:
        try:
            return load(config)
        except SettingsError as error:
            raise Problem(str(error), "", Exit.USAGE) from None
    kube = Kube(Cluster(kubeconfig), "claas serve")
    try:
        where = installation.the_release(kube, release, namespace)
        return ShimSettings.of(Settings.model_validate(installation.settings(kube, where)))
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        fix = "give settings with --config, or upgrade the older of chart and command"
        raise Problem(f"the settings of {where} are of another release: {fields}", fix) from None
    finally:
        kube.close()
