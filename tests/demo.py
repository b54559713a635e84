"""`make demo`: the whole story, with its proof. Ends non-zero when anything is off."""

from __future__ import annotations

import os
import sys
import time

import yaml

import deployment
import models
from claas_crds.request import Metadata
from claas_store.stores import open_store
from cluster import nodes
from cluster.process import ClusterError
from deployment import NAMESPACE, ROOT, USER, Deployment, say
from kubectl import CommandFailed, Object, condition
from proof import Judge

NINE = (
    "totalLoss",
    "pgLoss",
    "jsdReg",
    "meanAdvantage",
    "fracPositiveAdvantage",
    "meanIsRatio",
    "clipFraction",
    "gradNorm",
    "tokensProcessed",
)
EXAMPLES = ROOT / "examples" / "cpu"
FIRST_SECONDS, WARM_SECONDS = 240, 60


class Off(RuntimeError):
    """Something that should hold does not."""


def check(holds: bool, what: str) -> None:
    """Say what was checked, or end."""
    if not holds:
        raise Off(what)
    print(f"  ok   {what}", flush=True)


def step(where: Deployment, file: str, seconds: float) -> Object:
    """`kubectl apply` a request and follow it to its end; returns it."""
    name = yaml.safe_load((EXAMPLES / file).read_text())["metadata"]["name"]
    print(f"\n$ kubectl apply -f examples/cpu/{file}", flush=True)
    started = time.monotonic()
    print("  " + where.kubectl("apply", "-f", str(EXAMPLES / file)).strip())
    shown = ""
    for seen in where.kubectl.follow(f"dr/{name}", namespace=USER, seconds=seconds):
        status = seen.get("status", {})
        phase = status.get("progress", {}).get("phase", "")
        line = " ".join(
            filter(None, [status.get("state", "Pending"), status.get("reason", ""), phase, status.get("worker", "")])
        )
        if line != shown:
            print(f"  {time.monotonic() - started:6.1f} s  {line}", flush=True)
            shown = line
        if condition(seen, "Failed").get("status") == "True":
            raise Off(f"the request failed: {condition(seen, 'Failed').get('message')}")
        if condition(seen, "Complete").get("status") == "True":
            print(f"  complete after {time.monotonic() - started:.1f} s")
            return seen
    raise Off(f"dr/{name} did not end")


def story(where: Deployment) -> None:
    """Create, train twice, prove."""
    print("\n$ kubectl apply -f examples/cpu/adapter.yaml")
    print("  " + where.kubectl("apply", "-f", str(EXAMPLES / "adapter.yaml")).strip())
    print(f"  Ready after {where.kubectl.wait('la/terse', 'condition=Ready', namespace=USER, seconds=180):.1f} s")
    before = where.kubectl.get("la", "terse", "-n", USER)["status"]

    first = step(where, "request.yaml", FIRST_SECONDS)
    after = where.kubectl.get("la", "terse", "-n", USER)["status"]
    print("\nWhat the step did")
    numbers = first["status"]["metadata"]
    for name in NINE:
        print(f"  {name:24}{numbers[name]:.6g}")
    Metadata.model_validate(numbers)
    total = numbers["pgLoss"] + numbers["jsdReg"]
    check(abs(numbers["totalLoss"] - total) < 1e-6, "totalLoss = pgLoss + jsdReg")
    check(numbers["gradNorm"] > 0 and numbers["tokensProcessed"] > 0, "a gradient flowed")
    check(
        after["headSeq"] == before["headSeq"] + 1 and after["uri"] == first["status"]["loraUri"],
        "the adapter's head moved once",
    )

    with where.store():
        print("\nThe version in S3")
        for uri, size_bytes in open_store(after["uri"]).list(after["uri"]):
            print(f"  {size_bytes:>10}  {uri}")
        prompt, response, better = _sample("request.yaml")
        judge = Judge(models.smollm2_dir())
        old, new = (judge.log_probabilities(uri, prompt, [response, better]) for uri in (before["uri"], after["uri"]))
    print("\nLog-probabilities by plain PEFT       before      after")
    print(f"  the response as it was          {old[0]:10.3f} {new[0]:10.3f}")
    print(f"  the better one                  {old[1]:10.3f} {new[1]:10.3f}")
    check(new[1] > old[1], "the better response became likelier")
    check(new[1] - old[1] > new[0] - old[0], "by more than the one that was criticised")

    second = step(where, "second-request.yaml", WARM_SECONDS)
    check(second["status"]["worker"] == first["status"]["worker"], "the same warm worker took it")
    check(second["status"]["parent"]["uri"] == after["uri"], "it trained the head that the first one made")
    print("  phases: " + ", ".join(f"{name[:-2]} {value} ms" for name, value in second["status"]["timings"].items()))
    print("\n" + where.kubectl("get", "la,dr", "-n", USER))


def _sample(file: str) -> tuple[str, str, str]:
    sample = yaml.safe_load((EXAMPLES / file).read_text())["spec"]["samples"][0]
    return sample["prompt"], sample["response"], sample["solution"]


def main() -> None:
    """Run the story; the cluster ends with it unless KEEP=1 or it was given."""
    started, keep = time.monotonic(), bool(os.environ.get("KEEP"))
    where, given = None, bool(os.environ.get("KUBECONFIG"))
    try:
        cluster = deployment.reach()
        where = deployment.install(cluster, given=given)
        # Left by an earlier run with KEEP=1: a demo tells its story from the start.
        where.kubectl("delete", "dr,la", "--all", "-n", USER, "--wait", seconds=120)
        story(where)
        print(f"demo done in {time.monotonic() - started:.0f} s")
    except (Off, CommandFailed, ClusterError) as error:
        print(f"\nOFF: {error}", file=sys.stderr)
        if where:
            print(where.logs(), file=sys.stderr)
        _end(where, given, keep)
        sys.exit(1)
    _end(where, given, keep)


def _end(where: Deployment | None, given: bool, keep: bool) -> None:
    if keep and where:
        print(
            "It stays up (KEEP=1). Go on with:\n"
            f"  export KUBECONFIG={where.kubectl.kubeconfig} PATH={where.tools}:$PATH\n"
            f"  kubectl get la,dr -n {USER}\n  kubectl logs -n {NAMESPACE} deploy/claas-operator"
        )
        if not given:
            print("End it with: make cluster-down")
    elif not keep and not given:
        nodes.down()
        say("the cluster is down")
    elif not keep and where:
        deployment.uninstall(where)


if __name__ == "__main__":
    main()
