"""A version that an earlier attempt made, and whose report was lost with its worker. No torch."""

from __future__ import annotations

import logging

from claas_store import uris
from claas_store.limits import MAX_ADAPTER_BYTES
from claas_store.version import Version, find_manifest, read_version
from claas_worker.job import Job

log = logging.getLogger(__name__)


def made_before(job: Job, max_bytes: int = MAX_ADAPTER_BYTES) -> Version | None:
    """The complete version, checked file by file, that an earlier attempt at this request made of the same parent.

    Args:
        max_bytes: as of `read_version`; whoever may write below the prefix may claim anything in a manifest.

    Raises:
        StoreError: the store fails, or what lies there is damaged or being collected.
    """
    for earlier in range(1, job.attempt):
        uri = uris.next_version_uri(job.parent.uri, job.created, job.uid, earlier)
        manifest = find_manifest(uri)
        if manifest is None or manifest.request_uid != job.uid or manifest.parent is None:
            continue
        if uris.normalise(manifest.parent.uri) != uris.normalise(job.parent.uri):
            continue
        version = read_version(uri, max_bytes=max_bytes)
        log.info("adopted", extra={"uid": job.uid, "attempt": earlier})
        return version
    return None
