"""`python -m claas_operator.release`: what `helm uninstall` runs first, so that no adapter waits for who is gone.

It stops the operator (which would set its finalizers again), waits until its Pods are gone, and takes the finalizers
off all adapters that it served. Nothing in the store is touched: whoever deletes an adapter later keeps its versions.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
import time
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Final

from kubernetes.aio.client.exceptions import ApiException

from claas_crds import names
from claas_operator.api import FAILURES, Api, Object, connect, describe
from claas_operator.main import log_as_json
from claas_operator.snapshot import Kind
from claas_operator.territory import survey

log = logging.getLogger("claas_operator.release")  # also when it is the main module

# A Pod of the operator has 15 s to go; a node that does not answer is not waited for.
STOP_SECONDS: Final = 60.0
LOOK_SECONDS: Final = 0.5
TRIES: Final = 5


async def release(
    api: Api,
    namespace: str,
    deployment: str,
    selector: str,
    serves: Callable[[str], bool] = lambda namespace: True,
    stop_seconds: float = STOP_SECONDS,
) -> int:
    """Stops the operator and takes its finalizers off; the number of adapters that had one.

    Args:
        serves: whether it decided about what is in a namespace; another release's adapters stay as they are.

    Raises:
        ApiException, aiohttp.ClientError, TimeoutError, OSError: the API server failed, or refused.
    """
    await _stop(api, namespace, deployment, selector, stop_seconds)
    held_back = 0
    try:
        async for adapter in api.list(Kind.ADAPTER):
            if serves(adapter["metadata"]["namespace"]):
                held_back += await _release(api, adapter)
    except ApiException as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
        # The definition of adapters was deleted first, and all of them with it.
    return held_back


async def _stop(api: Api, namespace: str, deployment: str, selector: str, seconds: float) -> None:
    path = f"/apis/apps/v1/namespaces/{namespace}/deployments/{deployment}/scale"
    try:
        await api.merge(path, {"spec": {"replicas": 0}})
    except ApiException as error:
        if error.status != HTTPStatus.NOT_FOUND:
            raise
    end = time.monotonic() + seconds
    while [pod async for pod in api.list(Kind.POD, selector) if pod["metadata"]["namespace"] == namespace]:
        if time.monotonic() > end:
            log.warning("the operator's Pods are still there", extra={"seconds": seconds})
            return
        await asyncio.sleep(LOOK_SECONDS)


async def _release(api: Api, adapter: Object | None) -> bool:
    """Whether the adapter had our finalizer."""
    for _ in range(TRIES):
        metadata = adapter["metadata"] if adapter else {}
        finalizers = metadata.get("finalizers") or []
        if names.FINALIZER not in finalizers:
            return False
        namespace, name = metadata["namespace"], metadata["name"]
        others = [finalizer for finalizer in finalizers if finalizer != names.FINALIZER]
        patch = {"uid": metadata["uid"], "finalizers": others}
        try:
            await api.patch_metadata(Kind.ADAPTER, namespace, name, int(metadata["resourceVersion"]), patch)
        except ApiException as error:
            if error.status not in (HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND):
                raise
            adapter = await api.get(Kind.ADAPTER, namespace, name)
            continue
        log.info("released", extra={"object": f"{namespace}/{name}", "deleted": "deletionTimestamp" in metadata})
        return True
    raise TimeoutError(f"{metadata['namespace']}/{metadata['name']} changes all the time")


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(prog="python -m claas_operator.release", description=__doc__)
    parser.add_argument("--namespace", required=True, help="of the release")
    parser.add_argument("--deployment", required=True, help="the operator's")
    parser.add_argument("--selector", required=True, help="labels of the operator's Pods")
    parser.add_argument("--cluster-role", default="", help="the operator's")
    parser.add_argument("--watch-namespaces", default="", help="that it served, comma-separated; empty: all")
    options = parser.parse_args(arguments)
    log_as_json("INFO")

    async def run() -> int:
        api = await connect()
        try:
            own = frozenset(name for name in options.watch_namespaces.split(",") if name)
            serves = (await survey(api, own, options.cluster_role)).serves
            return await release(api, options.namespace, options.deployment, options.selector, serves)
        finally:
            await api.close()

    try:
        held_back = asyncio.run(run())
    except FAILURES as error:
        log.error("not released", extra={"error": describe(error)})
        return 1
    log.info("done", extra={"adapters": held_back})
    return 0


if __name__ == "__main__":
    sys.exit(main())
