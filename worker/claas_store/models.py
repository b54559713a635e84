"""A base model's folder, filled once by a Job and awaited by the Pods that share its volume.

A folder is whole when it holds the marker file, which is written last. Only what a safetensors model needs is fetched:
pickled weights never are. Files appear by a rename, so a killed fetch leaves nothing half-written under a model's name,
and the next one goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Final

from claas_store import uris
from claas_store.errors import ArgumentInvalid, NotFound, StorageDenied, StorageUnavailable

MARKER: Final = ".claas-complete"
PROGRESS_SECONDS: Final = 10
POLL_SECONDS: Final = 1

WANTED: Final = ("*.safetensors", "*.json", "*.txt", "*.jinja", "*.model", "*.tiktoken")
UNWANTED: Final = ("*/*", "consolidated*", ".*")  # only the top folder holds what is loaded

log = logging.getLogger(__name__)


def fetch_model(source: str, target: Path) -> None:
    """Fills `target` from `hub:ID` or `hub:ID@REVISION`, `s3://bucket/path/` or `file:///path/`; done already: a no-op.

    A `file://` source is a folder that the administrator mounted for this, so CLAAS_FILE_ROOTS does not apply.

    Raises:
        ArgumentInvalid: no such kind of source, a target with another model, or a source that is no safetensors model.
        NotFound, StorageUnavailable, StorageDenied: the source fails.
    """
    if (target / MARKER).exists():
        present = _marked_source(target)
        if present != source:
            raise ArgumentInvalid(f"{target} holds a model from {present}: use another folder for {source}")
        log.info("%s is complete", target)
        return
    target.mkdir(parents=True, exist_ok=True)
    with _progress(target):
        if source.startswith("hub:"):
            _from_hub(source.removeprefix("hub:"), target)
        elif source.startswith("s3://"):
            _from_s3(source, target)
        elif source.startswith("file://"):
            _from_folder(Path("/", uris.parse(source).key), target)
        else:
            raise ArgumentInvalid(f"--source {source[:200]} must be hub:ID, s3://BUCKET/PATH/ or file:///PATH/")
    if not (target / "config.json").is_file() or not any(target.glob("*.safetensors")):
        raise ArgumentInvalid(f"{source} is no safetensors model: config.json and *.safetensors are needed")
    for path in target.iterdir():
        if path.is_file():
            _sync(path)
    _appear(target / MARKER, lambda scratch: scratch.write_text(json.dumps({"source": source}) + "\n"))
    _sync(target)
    log.info("%s is complete: %d MB", target, _size(target) // 10**6)


def wait_model(target: Path, timeout_seconds: float) -> None:
    """Returns when `target` is whole: a volume shared by nodes sends no events, so the marker is looked for.

    Raises:
        StorageUnavailable: not within the time.
    """
    start = said = time.monotonic()
    while not (target / MARKER).exists():
        now = time.monotonic()
        if now - start >= timeout_seconds:
            raise StorageUnavailable(
                f"{target} is not complete after {timeout_seconds:g} s: look at the Job that fetches the model"
            )
        if now - said >= PROGRESS_SECONDS:
            said = now
            log.info("waiting for %s: %d MB so far", target, _size(target) // 10**6)
        time.sleep(min(POLL_SECONDS, timeout_seconds))
    log.info("%s is complete", target)


def _from_hub(name: str, target: Path) -> None:
    import httpx
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )
    from huggingface_hub.utils import disable_progress_bars

    disable_progress_bars()  # a log is no terminal; `_progress` tells
    repository, _, revision = name.partition("@")
    try:
        snapshot_download(
            repository,
            revision=revision or None,
            local_dir=target,
            allow_patterns=list(WANTED),
            ignore_patterns=list(UNWANTED),
        )
    except GatedRepoError:
        raise StorageDenied(f"hub:{name} is gated: accept its terms and give a token in HF_TOKEN") from None
    except (RepositoryNotFoundError, RevisionNotFoundError):
        raise NotFound(f"hub:{name} does not exist, or is private and HF_TOKEN is not set") from None
    except HFValidationError:
        raise ArgumentInvalid(f"hub:{name} is not the name of a repository") from None
    except HfHubHTTPError as error:
        raise StorageUnavailable(f"hub:{name}: HTTP {error.response.status_code}") from None
    except (LocalEntryNotFoundError, httpx.HTTPError) as error:
        raise StorageUnavailable(f"hub:{name}: the hub does not answer ({type(error).__name__})") from None


def _from_s3(source: str, target: Path) -> None:
    from claas_store.s3 import S3Store

    store = S3Store(os.environ)
    folder = uris.normalise(source)
    for uri, size in store.list(folder):
        name = uri.removeprefix(folder)
        if _wanted(name) and not _same_size(target / name, size):
            _appear(target / name, partial(store.download, uri))


def _from_folder(source: Path, target: Path) -> None:
    if not source.is_dir():
        raise NotFound(f"{source} is no folder here: mount the model there")
    try:
        for path in sorted(source.iterdir()):
            if _wanted(path.name) and path.is_file() and not _same_size(target / path.name, path.stat().st_size):
                _appear(target / path.name, partial(shutil.copyfile, path))
    except PermissionError as error:
        raise StorageDenied(f"{error.filename}: {error.strerror}") from None


def _wanted(name: str) -> bool:
    return any(fnmatch(name, p) for p in WANTED) and not any(fnmatch(name, p) for p in UNWANTED)


def _same_size(path: Path, size: int) -> bool:
    """A file is whole once it has its name, so another size can only be another model's."""
    return path.is_file() and path.stat().st_size == size


def _appear(path: Path, write: Callable[[Path], object]) -> None:
    """Writes `path` beside itself and renames it."""
    scratch = path.with_name(f".{uuid.uuid4().hex}.partial")
    try:
        write(scratch)
        _sync(scratch)
        scratch.rename(path)
    finally:
        scratch.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """The marker must never outlive, after a power cut, the files that it vouches for."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _marked_source(target: Path) -> str:
    try:
        return str(json.loads((target / MARKER).read_text())["source"])
    except (ValueError, KeyError, TypeError):
        return "an unknown source"


def _size(folder: Path) -> int:
    """Bytes on disk now; files may come and go meanwhile."""
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(parent, name)).st_size
    return total


@contextlib.contextmanager
def _progress(target: Path) -> Iterator[None]:
    """One line every few seconds with what has arrived."""
    done = threading.Event()

    def tell() -> None:
        while not done.wait(PROGRESS_SECONDS):
            log.info("%s: %d MB so far", target, _size(target) // 10**6)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
