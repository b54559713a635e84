"""A process that writes and collects versions as it is told, one line of JSON at a time, until somebody kills it.

    {"op": "step", "parent": …, "number": …, "attempt": …, "adopt": true}, {"op": "fork", …}, {"op": "collect", …} …

What a worker and the operation Jobs do, without torch: a second attempt first adopts an earlier one's complete version.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from claas_store import collect
from claas_store.create import init_adapter
from claas_store.version import find_manifest, read_version
from store import examples
from store.chains import first, step, step_uri


def obey(order: dict[str, Any]) -> dict[str, Any]:
    """Carries one order out."""
    match order["op"]:
        case "first":
            return {"uri": first(order["uri"], order["uid"]).uri}
        case "step":
            parent = read_version(order["parent"])
            for attempt in range(1, order["attempt"]) if order["adopt"] else ():
                if find_manifest(uri := step_uri(parent.uri, order["number"], attempt)):
                    return {"uri": read_version(uri).uri}
            return {"uri": step(parent, order["number"], adapter_uid=order["uid"], attempt=order["attempt"]).uri}
        case "fork":
            model = Path(order["model"])
            made = init_adapter(order["uri"], examples.BASE, model, order["source"], examples.LORA, order["uid"])
            return {"uri": made.uri}
        case "collect":
            collect.tombstone(order["root"], order["names"], "retention")
            return {"done": collect.delete(order["root"], order["names"])}
        case "sweep":
            return collect.sweep(order["root"], order["known"], 0)._asdict()
        case "destroy":
            return collect.destroy(order["root"])._asdict()
    raise AssertionError(order)


def main() -> None:
    """Orders from stdin, answers to stdout."""
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(obey(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
