"""A place to keep versions, once in the real object store and once in a folder: the same tests run on both."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest

from objectstore import ObjectStore


def use_s3(monkeypatch: pytest.MonkeyPatch, store: ObjectStore) -> None:
    """Points the code under test at `store`."""
    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch, object_store: ObjectStore) -> str:
    """A prefix of the test's own in the object store: s3://adapters/…/."""
    use_s3(monkeypatch, object_store)
    return f"s3://{object_store.bucket}/{uuid.uuid4().hex}/"


@pytest.fixture
def root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A folder that file:// may use."""
    folder = tmp_path / "root"
    folder.mkdir()
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(folder))
    return folder


@pytest.fixture(params=["s3", "file"])
def home(request: pytest.FixtureRequest) -> str:
    """The uri of a folder to keep versions below, in each kind of store."""
    if request.param == "s3":
        return str(request.getfixturevalue("bucket"))
    return f"file://{request.getfixturevalue('root')}/"
