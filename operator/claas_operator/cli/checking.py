"""`claas doctor`: everything that can be wrong with an installation and be seen from here, each with its remedy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final

import click

from claas_operator.cli.command import Command
from claas_operator.cli.exits import Exit
from claas_operator.cli.options import Target, connection, output
from claas_operator.cli.output import Format, write_json, write_table
from claas_operator.cli.problem import Problem

if TYPE_CHECKING:
    from claas_operator.cli.checks import Check
    from claas_operator.cli.installation import Release
    from claas_operator.cli.kube import Kube, Object
    from claas_operator.cli.needs import Needs

CRDS: Final = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
WAITS_SECONDS: Final = 60  # a request that waits longer is worth a line
MAX_LINES: Final = 10  # of one kind
REACH_SECONDS: Final = 5.0


@click.command(
    cls=Command,
    examples=[
        "claas doctor",
        "claas doctor -o json | jq '.checks[] | select(.level != \"ok\")'",
        "claas doctor --url https://claas.example.com --key $KEY",
    ],
)
@click.option("--release", metavar="NAME", help="The Helm release; found by itself when absent.")
@click.option("--release-namespace", metavar="NAME", help="Its namespace.")
@output
@connection
def doctor(target: Target, release: str | None, release_namespace: str | None, form: Format) -> Exit:
    """What is wrong with an installation, and how to mend it.

    By kubeconfig it looks at the cluster, the kinds, the operator, its workers and their Pods, the teacher, Secrets,
    adapters that are not ready and requests that wait; what you may not see is said, and is not an error. By url it
    asks the server how its parts are. Exit code 1 when something is wrong.
    """
    from claas_operator.cli.checks import Level, worst

    if target.url:
        checks = list(_by_url(target))
    else:
        kube = target.kube("claas doctor")
        try:
            checks = list(_by_cluster(kube, release, release_namespace))
        finally:
            kube.close()
    show(checks, form)
    if worst(checks) is Level.WRONG:
        count = sum(check.level is Level.WRONG for check in checks)
        raise Problem(f"{count} thing(s) wrong", "the FIX column says what to do")
    return Exit.OK


def show(checks: Iterable[Check], form: Format) -> None:
    """The checks on stdout."""
    listed = list(checks)
    if form is Format.JSON:
        write_json({"checks": [check.as_json() for check in listed]})
    else:
        rows = [(check.what, check.level.value, check.says, check.fix) for check in listed]
        write_table(("WHAT", "IS", "SAYS", "FIX"), rows)


def _by_url(target: Target) -> Iterator[Check]:
    from claas_operator.cli.checks import Level, ok, warning, wrong
    from claas_operator.cli.teaching import opened

    fixes = {
        "operator": "on the cluster: kubectl -n claas-system logs deploy/claas-operator",
        "teacher": "on the cluster: kubectl -n claas-system describe deploy/claas-teacher",
        "object_store": "check the store's endpoint, bucket and credentials in the chart's values",
        "api_server": "the server has lost its watch of the API server; it reconnects by itself",
    }
    with opened(target, "claas doctor") as door:
        try:
            found = door.health()
        except Problem as problem:
            yield wrong("server", problem.message, problem.fix)
            return
        yield ok("server", f"{door.way} answers")
        for name in ("operator", "workers", "teacher", "object_store", "api_server"):
            part = getattr(found, name)
            level = {"healthy": Level.OK, "unhealthy": Level.WRONG}.get(part.status, Level.OK)
            if level is Level.WRONG:
                yield wrong(name, part.message, fixes.get(name, "kubectl -n claas-system get pods"))
            else:
                yield ok(name, part.message or part.status)
        try:
            next(iter(door.adapters()), None)
        except Problem as problem:
            yield wrong("credentials", problem.message, problem.fix)
        else:
            yield ok("credentials", "this key or token may read adapters")
        if not target.url or not target.url.startswith("https://"):
            yield warning("transport", "the url is not https: keys and prompts travel readable", "use https")


def _by_cluster(kube: Kube, release: str | None, namespace: str | None) -> Iterator[Check]:
    from claas_operator.cli import checks, installation

    try:
        yield checks.version(kube.get("/version"))
    except Problem as problem:
        yield checks.wrong("API server", problem.message, problem.fix)
        return
    yield from _guarded("kinds", lambda: _kinds(kube))
    where = installation.the_release(kube, release, namespace)
    if release is None and namespace is None:
        found = installation.releases(kube)
        if len(found) > 1:
            others = ", ".join(map(str, found))
            fix = "choose with --release and --release-namespace"
            yield checks.warning("release", f"there are several: {others}; this is about the first", fix)
            where = found[0]
    yield from _guarded("operator", lambda: _operator(kube, where))
    yield from _guarded("settings", lambda: _settings(kube, where))
    yield from _guarded("workers", lambda: _workers(kube, where))
    yield from _guarded("models", lambda: _volumes(kube, where))
    yield from _guarded("adapters", lambda: _adapters(kube))
    yield from _guarded("requests", lambda: _requests(kube))
    yield from _guarded("rights", lambda: _rights(kube))


def _guarded(what: str, look: Callable[[], Iterable[Check]]) -> Iterator[Check]:
    """What was seen; and where something may not be seen, that it may not."""
    from claas_operator.cli.checks import warning, wrong

    try:
        yield from look()
    except Problem as problem:
        if problem.code is Exit.DENIED:
            yield warning(what, f"cannot be seen: {problem.message}", "ask whoever runs the cluster")
        else:
            yield wrong(what, problem.message, problem.fix)


def _kinds(kube: Kube) -> Iterator[Check]:
    from claas_crds.generate import RESOURCES, definition
    from claas_operator.cli import checks

    expected = {resource.name: definition(resource) for resource in RESOURCES}
    found = {name: kube.find(f"{CRDS}/{name}") for name in expected}
    yield from checks.crds(expected, found, will_install=False)


def _operator(kube: Kube, release: Release) -> Iterator[Check]:
    from claas_operator.cli import installation
    from claas_operator.cli.checks import ok, wrong

    name = f"{release.name}-operator"
    deployment = kube.find(f"{installation.APPS}/namespaces/{release.namespace}/deployments/{name}")
    if deployment is None:
        fix = "claas deploy; or name another with --release and --release-namespace"
        yield wrong("operator", f"there is no {release}", fix)
    else:
        wanted, ready = deployment["spec"].get("replicas", 1), installation.ready_replicas(deployment)
        if ready < wanted:
            fix = f"kubectl -n {release.namespace} describe deploy/{name}; … logs deploy/{name}"
            yield wrong("operator", f"{ready} of {wanted} ready", fix)
        else:
            yield ok("operator", f"{release}: {ready} of {wanted} ready")
    part = installation.operator_part(kube, release)
    if part.status != "healthy":
        yield wrong("leader", part.message, f"kubectl -n {release.namespace} logs deploy/{name}")
    else:
        yield ok("leader", part.message)


def _settings(kube: Kube, release: Release) -> Iterator[Check]:
    """The operator's settings, and whether the cluster has what they ask for."""
    from pydantic import ValidationError

    from claas_operator.cli import checks, installation
    from claas_operator.cli.needs import Needs
    from claas_operator.settings import Settings

    content = installation.settings(kube, release)
    try:
        Settings.model_validate(content)
    except ValidationError as error:
        fields = ", ".join(".".join(map(str, problem["loc"])) for problem in error.errors()[:3])
        fix = "chart and command are of different releases: upgrade the older one"
        yield checks.warning("settings", f"this command does not know: {fields}", fix)
    else:
        yield checks.ok("settings", f"{len(content['pools'])} pool(s), base model {content['defaultBaseModel']}")
    part = installation.teacher_part(kube, release, content)
    if part.status == "unhealthy":
        fix = f"kubectl -n {release.namespace} describe pod -l app.kubernetes.io/component=teacher"
        yield checks.wrong("teacher", part.message, fix)
    else:
        yield checks.ok("teacher", part.message)
    needs = Needs()
    needs.add_settings(content)
    nodes = list(kube.list("/api/v1/nodes"))
    for workload in needs.workloads:
        yield checks.nodes(workload, nodes)
    yield from checks.secrets(needs, secrets_of(kube, release.namespace, needs.secrets))
    yield reach_store(needs)


def secrets_of(kube: Kube, namespace: str, wanted: Iterable[str]) -> dict[str, Object | str | None]:
    """The Secrets as far as they may be read: the object, None when absent, the API server's words when refused."""
    found: dict[str, Object | str | None] = {}
    for name in wanted:
        try:
            found[name] = kube.find(f"/api/v1/namespaces/{namespace}/secrets/{name}")
        except Problem as problem:
            if problem.code is not Exit.DENIED:
                raise
            found[name] = problem.message
    return found


def _workers(kube: Kube, release: Release) -> Iterator[Check]:
    """Pods that do not start, and Leases that nobody renews."""
    from claas_crds import names
    from claas_operator.cli import installation
    from claas_operator.cli.checks import ok, warning, wrong

    bad = 0
    pods = list(kube.list(f"/api/v1/namespaces/{release.namespace}/pods", labelSelector=release.selector))
    for pod in pods:
        name = pod["metadata"]["name"]
        if said := trouble(pod):
            bad += 1
            if bad <= MAX_LINES:
                fix = _POD_FIXES.get(said.partition(":")[0], f"kubectl -n {release.namespace} describe pod {name}")
                yield wrong(f"Pod {name}", said, fix)
    running = {pod["metadata"]["name"] for pod in pods if (pod.get("status") or {}).get("phase") == "Running"}
    for lease in installation.worker_leases(kube, release):
        name = lease["metadata"]["name"]
        if name in running and not installation.fresh(lease):
            bad += 1
            fix = "the operator replaces it by itself; if not: see `leader` above"
            yield warning(f"worker {name}", "runs and does not renew its Lease", fix)
    if not bad:
        part = installation.workers_part(kube, release)
        counts = f"{part.ready} {names.STATE_READY}, {part.starting} {names.STATE_STARTING}"
        yield ok("workers", "; ".join(filter(None, (counts, part.message))))


_POD_FIXES: Final = {
    "Unschedulable": "no node fits: see the pool's and the teacher's lines, or add nodes",
    "ImagePullBackOff": "push the images (make push REGISTRY=…), or set image.registry, image.tag and pullSecrets",
    "ErrImagePull": "push the images (make push REGISTRY=…), or set image.registry, image.tag and pullSecrets",
    "OOMKilled": "raise its memory limit (pools[].resources, teacher.resources)",
    "CreateContainerConfigError": "a Secret or ConfigMap that it names is missing, or lacks a key",
}


def trouble(pod: Object) -> str:
    """Why a Pod does not run, as `Reason: message`; empty while all is well."""
    status = pod.get("status") or {}
    for condition in status.get("conditions") or []:
        if condition.get("type") == "PodScheduled" and condition.get("status") == "False":
            return f"{condition.get('reason', 'Unschedulable')}: {condition.get('message', '')}"
    containers = [*(status.get("initContainerStatuses") or []), *(status.get("containerStatuses") or [])]
    for container in containers:
        waiting = (container.get("state") or {}).get("waiting") or {}
        last = (container.get("lastState") or {}).get("terminated") or {}
        if waiting.get("reason") == "CrashLoopBackOff" and last.get("reason") == "OOMKilled":
            return f"OOMKilled: container {container.get('name')} needs more memory"
        if waiting.get("reason") not in (None, "ContainerCreating", "PodInitializing"):
            return f"{waiting['reason']}: {waiting.get('message', '')}"
    for container in containers:
        ended = (container.get("state") or {}).get("terminated") or {}
        if status.get("phase") == "Failed" and ended.get("exitCode"):
            return f"{ended.get('reason', 'Error')}: container {container.get('name')} ended with {ended['exitCode']}"
    return ""


def _volumes(kube: Kube, release: Release) -> Iterator[Check]:
    """The volumes of the models, and the Jobs that fill them."""
    from claas_operator.cli.checks import ok, wrong

    selector = f"{release.selector},app.kubernetes.io/component=fetch"
    for claim in kube.list(f"/api/v1/namespaces/{release.namespace}/persistentvolumeclaims", labelSelector=selector):
        name, phase = claim["metadata"]["name"], (claim.get("status") or {}).get("phase", "Pending")
        if phase == "Bound":
            yield ok(f"volume {name}", "bound")
        else:
            fix = f"kubectl -n {release.namespace} describe pvc {name}"
            yield wrong(f"volume {name}", f"is {phase}: Pods that mount it wait", fix)
    for job in kube.list(f"/apis/batch/v1/namespaces/{release.namespace}/jobs", labelSelector=selector):
        name = job["metadata"]["name"]
        for condition in (job.get("status") or {}).get("conditions") or []:
            if condition.get("type") == "Failed" and condition.get("status") == "True":
                fix = f"kubectl -n {release.namespace} logs job/{name}; then upgrade the release"
                yield wrong(f"Job {name}", f"the model was not fetched: {condition.get('message', '')}", fix)


def _everywhere(kube: Kube, plural: str) -> Iterator[Object]:
    """Objects of all namespaces, or of the own one where only that may be seen."""
    from claas_crds import names

    base = f"/apis/{names.API_VERSION}"
    try:
        yield from kube.list(f"{base}/{plural}")
    except Problem as problem:
        if problem.code is not Exit.DENIED:
            raise
        yield from kube.list(f"{base}/namespaces/{kube.namespace}/{plural}")


def _adapters(kube: Kube) -> Iterator[Check]:
    from claas_crds import names
    from claas_operator.cli.checks import ok, warning

    unready, count = [], 0
    for raw in _everywhere(kube, names.ADAPTER_PLURAL):
        count += 1
        ready = _condition(raw, "Ready")
        if ready.get("status") == "False" and not (raw.get("status") or {}).get("headSeq"):
            unready.append((raw, ready))
    for raw, ready in unready[:MAX_LINES]:
        reason = str(ready.get("reason"))
        yield warning(f"adapter {_place(raw)}", f"{reason}: {ready.get('message', '')}", remedy(reason))
    yield (
        ok("adapters", f"{count - len(unready)} of {count} ready")
        if not unready
        else warning("adapters", f"{len(unready)} of {count} have no version", "see above")
    )


def _requests(kube: Kube) -> Iterator[Check]:
    """What waits for long, by reason: one line each."""
    from claas_crds import names
    from claas_operator.cli.checks import ok, warning

    waiting: dict[str, list[tuple[float, Object]]] = {}
    pending, now = 0, datetime.now(UTC)
    for raw in _everywhere(kube, names.REQUEST_PLURAL):
        status = raw.get("status") or {}
        if status.get("state", "Pending") != "Pending":
            continue
        pending += 1
        seconds = (now - datetime.fromisoformat(raw["metadata"]["creationTimestamp"])).total_seconds()
        if seconds > WAITS_SECONDS:
            waiting.setdefault(status.get("reason") or "Pending", []).append((seconds, raw))
    for reason, items in sorted(waiting.items()):
        seconds, oldest = max(items, key=lambda item: item[0])
        says = f"{len(items)} wait; the oldest, {_place(oldest)}, for {seconds:.0f} s"
        yield warning(f"requests: {reason}", says, remedy(reason))
    if not waiting:
        yield ok("requests", f"{pending} pending, none for more than {WAITS_SECONDS} s")


def remedy(reason: str) -> str:
    """What to do about a reason of a request or an adapter."""
    return _REMEDIES.get(reason, f"claas reasons {reason}")


_REMEDIES: Final = {
    "Pending": "does an operator lead? see `leader`",
    "NoCapacity": "add nodes, or raise the pool's maxWorkers; see the pool's line",
    "AdapterBusy": "nothing: requests on one adapter run one after the other",
    "AdapterNotReady": "see the adapter's line",
    "AdapterNotFound": "create the adapter (claas init-lora), or correct spec.adapterRef.name in a new request",
    "TeacherUnavailable": "see `teacher`",
    "StorageUnavailable": "check the store's endpoint and credentials (storage.* in the chart's values)",
    "QuotaExceeded": "wait, or raise the namespace's quota",
    "StorageDenied": "choose a uri below the namespace's storage prefixes (storage.prefixes in the chart's values)",
    "BaseModelMismatch": "create the adapter for a base model that a pool holds",
    "UnknownPool": "name a pool of this installation, or none",
    "CreateFailed": "the message says why; delete the adapter and make it again",
    "Creating": "nothing yet; if it lasts: kubectl get jobs -l app.kubernetes.io/component=operation -A",
}


def _rights(kube: Kube) -> Iterator[Check]:
    """What this kubeconfig may do in its namespace."""
    from claas_crds import names
    from claas_operator.cli.checks import ok, warning

    lacking = []
    for verb, plural in (
        ("create", names.REQUEST_PLURAL),
        ("create", names.ADAPTER_PLURAL),
        ("get", names.REQUEST_PLURAL),
    ):
        attributes = {"namespace": kube.namespace, "verb": verb, "group": names.GROUP, "resource": plural}
        body = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SelfSubjectAccessReview",
            "spec": {"resourceAttributes": attributes},
        }
        answer = kube.create("/apis/authorization.k8s.io/v1/selfsubjectaccessreviews", body)
        if not (answer.get("status") or {}).get("allowed"):
            lacking.append(f"{verb} {plural}")
    if lacking:
        fix = f"kubectl -n {kube.namespace} create rolebinding …: --clusterrole=edit includes them"
        yield warning("rights", f"in namespace {kube.namespace} you may not {', '.join(lacking)}", fix)
    else:
        yield ok("rights", f"you may teach in namespace {kube.namespace}")


def _condition(raw: Object, kind: str) -> dict[str, Any]:
    conditions = (raw.get("status") or {}).get("conditions") or []
    return next((c for c in conditions if c.get("type") == kind), {})


def _place(raw: Object) -> str:
    return f"{raw['metadata']['namespace']}/{raw['metadata']['name']}"


def reach_store(needs: Needs) -> Check:
    """Whether the object store answers from here. The cluster's own network may see it otherwise: never an error."""
    import httpx

    from claas_operator.cli.checks import ok, warning

    s3 = [prefix for prefix in needs.prefixes if prefix.startswith("s3://")]
    if needs.ours:
        return ok("store", "comes with the release (SeaweedFS, to try it out)")
    if not s3:
        return ok("store", "no s3:// prefix is configured")
    if ".svc" in needs.endpoint:
        return ok("store", f"{needs.endpoint} is inside the cluster: not looked at from here")
    bucket = s3[0].removeprefix("s3://").partition("/")[0]
    amazon = f"https://{bucket}.s3.{needs.region or 'us-east-1'}.amazonaws.com"
    url = f"{needs.endpoint.rstrip('/')}/{bucket}" if needs.endpoint else amazon
    try:
        status = httpx.head(url, timeout=REACH_SECONDS).status_code
    except (httpx.HTTPError, httpx.InvalidURL, UnicodeError) as error:  # UnicodeError: no name of a host
        said = f"{url} does not answer from here ({type(error).__name__})"
        return warning("store", said, "is storage.endpoint right, and will the cluster reach it?")
    if status == httpx.codes.NOT_FOUND:
        return warning("store", f"{url} answers, and has no such bucket", f"create the bucket {bucket}")
    return ok("store", f"{url} answers")
