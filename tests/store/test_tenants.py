"""Who can read and write what, with real credentials of a real store: two tenants with a place each, and one shared.

Two ways to keep tenants apart are tried: prefixes of one bucket, and buckets of their own. What keeps them apart is the
store, which knows each tenant by its key; the operator's own comparison of uris comes before it and is tested apart.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from claas_store import collect
from claas_store.create import init_adapter
from claas_store.errors import StorageDenied
from claas_store.fsck import Kind, fsck
from claas_store.stores import open_store
from claas_store.version import read_version
from objectstore import ObjectStore, running, secret_of
from store import examples
from store.chains import first, killed_step, name, step

# By access key, as SeaweedFS names rights. `al` is a prefix of another's name, and must not be one of its rights.
RIGHTS = {
    "alice": [f"{act}:adapters/alice/*" for act in ("Read", "Write", "List")]
    + ["Read:adapters/shared/*", "List:adapters/shared/*"],
    "al": [f"{act}:adapters/al/*" for act in ("Read", "Write", "List")],
    "bob": [f"{act}:bob" for act in ("Read", "Write", "List")] + ["Read:adapters/shared/*", "List:adapters/shared/*"],
    "pool": ["Read", "Write", "List"],  # of a Shared pool, which all its tenants trust
}
PLACES = {
    "alice": "s3://adapters/alice/",
    "al": "s3://adapters/al/",
    "bob": "s3://bob/",
    "shared": "s3://adapters/shared/",
}
READ = {"alice": {"alice", "shared"}, "al": {"al"}, "bob": {"bob", "shared"}, "pool": set(PLACES)}
WRITE = {"alice": {"alice"}, "al": {"al"}, "bob": {"bob"}, "pool": set(PLACES)}


@pytest.fixture(scope="module")
def store() -> Iterator[ObjectStore]:
    """A store with the tenants' identities, and a version in each place."""
    with tempfile.TemporaryDirectory(prefix="claas-tenants-", ignore_cleanup_errors=True) as folder:
        with running(Path(folder), rights=RIGHTS) as found:
            found.client().create_bucket(Bucket="bob")
            yield found


@pytest.fixture
def act_as(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """From then on the code under test has that tenant's credentials and no others."""

    def act(tenant: str) -> None:
        for variable, value in store.environment.items():
            monkeypatch.setenv(variable, value)
        if tenant != "admin":
            monkeypatch.setenv("AWS_ACCESS_KEY_ID", tenant)
            monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", secret_of(tenant))

    return act


def allowed(act: Callable[[], object]) -> bool:
    """Whether the store lets it happen; anything but its own refusal is an error."""
    denied: StorageDenied | None = None
    try:
        act()
    except StorageDenied as error:
        denied = error
    assert denied is None or (not denied.retryable and "secret-of" not in str(denied))
    return denied is None


@pytest.mark.parametrize("tenant", RIGHTS)
@pytest.mark.parametrize("place", PLACES)
def test_who_can_do_what_where(act_as: Callable[[str], None], tmp_path: Path, tenant: str, place: str) -> None:
    act_as("admin")
    home = f"{PLACES[place]}{tenant}-visits-{place}/"
    root = first(f"{home}coder")
    later = step(root, 1)
    killed_step(later, 2)
    first(f"{home}dead")
    collect.tombstone(f"{home}dead", ["dead"], "retention")
    act_as(tenant)
    may_read, may_write = place in READ[tenant], place in WRITE[tenant]
    names = [name(root), name(later)]

    assert allowed(lambda: read_version(later.uri)) == may_read
    assert allowed(lambda: fsck(later.uri)) == may_read
    assert allowed(lambda: open_store(home).list(home)) == may_read
    assert allowed(lambda: first(f"{home}new")) == may_write
    assert allowed(lambda: step(root, 3)) == may_write
    assert allowed(lambda: collect.sweep(root.uri, names, 0)) == may_write
    assert allowed(lambda: collect.tombstone(root.uri, ["coder"], "retention")) == may_write
    assert allowed(lambda: collect.delete(f"{home}dead", ["dead"])) == may_write
    assert allowed(lambda: collect.destroy(root.uri)) == may_write

    act_as("admin")
    left = {uri.removeprefix(home).split("/")[0] for uri, _ in open_store(home).list(home)}
    assert (name(later) in left) != may_write, "a destruction happened where it may, and only there"


@pytest.mark.parametrize("tenant", ["alice", "bob"])
def test_a_fork_takes_what_its_maker_may_read_to_where_it_may_write(
    act_as: Callable[[str], None], tmp_path: Path, tenant: str
) -> None:
    model = examples.model_dir(tmp_path / "model")

    def fork(source: str, where: str) -> object:
        return init_adapter(where, examples.BASE, model, source, examples.LORA, f"{tenant}-{where}")

    act_as("admin")
    sources = {place: step(first(f"{PLACES[place]}{tenant}-forks/a"), 1).uri for place in PLACES}
    act_as(tenant)
    mine = PLACES[tenant]
    for place, source in sources.items():
        assert allowed(lambda at=source, to=f"{mine}fork-of-{place}": fork(at, to)) == (place in READ[tenant])
    for place in sorted(PLACES.keys() - {tenant}):
        assert not allowed(lambda to=f"{PLACES[place]}{tenant}s-fork": fork(sources[tenant], to))
    # The origin is shared, so it is followed; when its tenant can no longer be read, the fork is whole all the same.
    assert fsck(f"{mine}fork-of-shared").ok


def test_an_origin_that_may_not_be_read_breaks_nothing(act_as: Callable[[str], None], tmp_path: Path) -> None:
    """A pool that all trust forked across tenants; the fork's owner cannot see where it came from."""
    act_as("pool")
    origin = first("s3://adapters/al/origin")
    model = examples.model_dir(tmp_path / "model")
    fork = init_adapter("s3://adapters/alice/from-al", examples.BASE, model, origin.uri, examples.LORA, "fork")
    act_as("alice")
    report = fsck(fork.uri)
    assert report.ok
    assert [finding.kind for finding in report.findings] == [Kind.UNREACHABLE]
