"""What one plan costs, by how many requests wait: `make bench-plan`. CPU time, so that other processes matter less.

200 adapters in 20 namespaces, eight idle workers, as many ended requests with a time to live as waiting ones. "told":
all know that they wait; "new": none does yet; "bare": none has an adapter, and each could run now. Prints one JSON
object a line; all of them are the result.

    python tests/bench/plan_cost.py --out build/plan.json     this repository's environment; half a minute
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import record

from claas_crds.reasons import Reason, describe
from claas_operator.plan import plan
from claas_operator.snapshot import Kind, Snapshot
from operatorkit import NOW, PREFIX, Raw, adapter, bound, ended, format_time, kind_of, later, request, settings, workers

ADAPTERS, NAMESPACES, WORKERS, ROUNDS = 200, 20, 8, 5
COUNTS = (1_000, 10_000, 30_000)


def busy() -> Raw:
    """Status of a request that was told that it waits for its adapter."""
    said = {"status": "False", "reason": Reason.ADAPTER_BUSY, "message": describe(Reason.ADAPTER_BUSY)}
    assigned = said | {"type": "Assigned", "lastTransitionTime": format_time(NOW), "observedGeneration": 1}
    return {"reason": Reason.ADAPTER_BUSY, "state": "Pending", "observedGeneration": 1, "conditions": [assigned]}


def world(kind: str, count: int) -> tuple[Snapshot, float]:
    """The snapshot, and CPU microseconds for each object that came into it."""
    raws: list[Raw] = workers(*(f"claas-l40s-{i}-w" for i in range(1, WORKERS + 1)))
    for i in range(ADAPTERS):
        team = f"n{i % NAMESPACES}"
        uri = f"{PREFIX}{i}/".replace("/team/", f"/{team}/")
        made = adapter(f"a{i}", namespace=team, spec={"storage": {"uri": uri}})
        raws.append(made | {"status": made["status"] | {"uri": uri}})
    for i in range(count):
        a = i % ADAPTERS
        team, name = f"n{a % NAMESPACES}", "" if kind == "bare" else f"a{a}"
        spec = {"loraUri": f"s3://adapters/{team}/b{i}/"} if kind == "bare" else {}
        status = busy() if kind == "told" and i >= ADAPTERS else {}
        raws.append(request(f"r{i}", name, namespace=team, spec=spec, status=status, created=later(i // 1000)))
        over = bound("claas-l40s-1-w") | {"gpuMs": 1500} | ended("Complete", "Succeeded")
        raws.append(request(f"e{i}", f"a{a}", namespace=team, spec={"ttlSecondsAfterFinished": 86_400}, status=over))
    seen, started = Snapshot(), time.process_time()
    for raw in raws:
        seen.put(kind_of(raw), raw, later(60))
    assert not seen.broken
    assert len(seen.table(Kind.REQUEST)) == 2 * count
    return seen, (time.process_time() - started) * 1e6 / len(raws)


def main() -> None:
    """One JSON object a line."""
    options = record.parser(__doc__).parse_args()
    result = record.circumstances("plan_cost") | {"plans": []}
    using = settings(pool={"maxWorkers": WORKERS})
    for kind in ("told", "new", "bare"):
        for count in COUNTS:
            seen, put_us = world(kind, count)
            took = []
            for _ in range(ROUNDS):
                started = time.process_time()
                actions = len(plan(seen, using, later(61)).actions)
                took.append((time.process_time() - started) * 1000)
            cost = {"plan_ms": round(min(took), 1), "worst_ms": round(max(took), 1), "put_us": round(put_us)}
            result["plans"].append({"requests": count, "kind": kind, **cost, "actions": actions})
            print(json.dumps(result["plans"][-1]), flush=True)
            record.write(options.out, result)


if __name__ == "__main__":
    main()
