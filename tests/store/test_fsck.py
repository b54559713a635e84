"""fsck: says of every kind of damage what and where it is, and calls nothing damaged that is not."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.numpy

from claas_store import __main__ as command
from claas_store import collect
from claas_store.create import init_adapter
from claas_store.errors import UriInvalid
from claas_store.fsck import Kind, Report, fsck
from claas_store.stores import open_store
from claas_store.tombstone import MANIFEST, TOMBSTONE
from claas_store.version import ADAPTER, CONFIG, OPTIMIZER, Version
from store import examples
from store.chains import first, killed_step, name, step, step_uri


def chain(home: str, length: int = 4) -> list[Version]:
    versions = [first(f"{home}coder")]
    for number in range(1, length):
        versions.append(step(versions[-1], number))
    return versions


def kinds(report: Report) -> list[tuple[Kind, str]]:
    """What was found, and in whose folder."""
    return [(finding.kind, finding.uri.rstrip("/").rpartition("/")[2]) for finding in report.findings]


def test_a_healthy_chain_is_clean_from_any_version_and_as_a_whole(home: str) -> None:
    versions = chain(home)
    for number, version in enumerate(versions):
        report = fsck(version.uri, everything=False)
        assert (report.ok, report.versions, report.findings) == (True, number + 1, [])
    whole = fsck(f"{home}coder")
    assert (whole.ok, whole.versions, whole.findings) == (True, 4, [])
    assert whole.size_bytes == sum(
        size for version in versions for uri, size in open_store(home).list(version.uri) if not uri.endswith(MANIFEST)
    )
    assert fsck(versions[-1].uri).versions == 4, "a version's own uri: its chain"


@pytest.mark.parametrize("file", [CONFIG, ADAPTER, OPTIMIZER])
@pytest.mark.parametrize(
    ("damage", "kind", "said"),
    [
        (lambda data: data[:-1] + bytes([data[-1] ^ 1]), Kind.BROKEN, "its sha256 is not what the manifest says"),
        (lambda data: data[:-1], Kind.BROKEN, "bytes, the manifest says"),
        (lambda data: data + b"\0", Kind.BROKEN, "more than the"),
        (None, Kind.MISSING, "the manifest lists it"),
    ],
    ids=["bit", "short", "long", "gone"],
)
def test_damage_to_an_old_versions_file_is_found_from_the_head(
    home: str, file: str, damage: Callable[[bytes], bytes] | None, kind: Kind, said: str
) -> None:
    versions = chain(home, 3)
    store, uri = open_store(home), f"{versions[1].uri}{file}"
    if damage is None:
        store.delete(uri)
    else:
        store.put(uri, damage(store.get(uri)), if_absent=False)
    report = fsck(versions[2].uri)
    assert not report.ok
    assert kinds(report) == [(kind, file)]
    assert report.findings[0].uri == uri
    assert said in report.findings[0].message


def test_a_parents_manifest_that_was_changed_is_found_although_it_fits_its_files(home: str) -> None:
    versions = chain(home)
    store, uri = open_store(home), f"{versions[1].uri}{MANIFEST}"
    changed = json.loads(store.get(uri)) | {"requestUid": "somebody-elses"}
    store.put(uri, json.dumps(changed).encode(), if_absent=False)
    report = fsck(versions[3].uri)
    assert kinds(report) == [(Kind.BROKEN, name(versions[1]))]
    assert f"is not the one that {versions[2].uri} names" in report.findings[0].message
    assert not report.ok
    assert fsck(versions[1].uri).ok, "alone it is whole"


def test_a_manifest_that_is_none_is_broken(home: str) -> None:
    versions = chain(home)
    open_store(home).put(f"{versions[1].uri}{MANIFEST}", b"[]", if_absent=False)
    assert (Kind.BROKEN, name(versions[1])) in kinds(fsck(versions[3].uri))
    assert (Kind.BROKEN, name(versions[1])) in kinds(fsck(f"{home}coder"))


def test_a_parent_that_is_gone_is_missing_and_a_collected_one_is_not(home: str) -> None:
    versions = chain(home)
    collect.tombstone(f"{home}coder", [name(versions[0]), name(versions[1])], "retention")
    assert kinds(fsck(versions[3].uri)) == [(Kind.COLLECTING, name(versions[1])), (Kind.COLLECTING, "coder")]
    collect.delete(f"{home}coder", [name(versions[0]), name(versions[1])])
    report = fsck(versions[3].uri)
    assert kinds(report) == [(Kind.COLLECTED, name(versions[1])), (Kind.COLLECTED, "coder")]
    assert report.ok
    assert report.versions == 4, "the chain is verified to its beginning, through what was collected"
    assert "retention" in report.findings[0].message

    open_store(home).delete(f"{versions[1].uri}{TOMBSTONE}")
    report = fsck(versions[3].uri)
    assert not report.ok
    assert kinds(report) == [(Kind.MISSING, name(versions[1]))]
    assert f"the parent of {versions[2].uri} is not there, and was not collected" in report.findings[0].message


def test_a_tombstone_that_quotes_another_manifest_is_broken(home: str) -> None:
    versions = chain(home)
    collect.tombstone(f"{home}coder", [name(versions[1])], "retention")
    collect.delete(f"{home}coder", [name(versions[1])])
    store, uri = open_store(home), f"{versions[1].uri}{TOMBSTONE}"
    stone = json.loads(store.get(uri))
    stone["manifest"] = stone["manifest"].replace('"attempt": 1', '"attempt": 2')
    store.put(uri, json.dumps(stone).encode(), if_absent=False)
    assert kinds(fsck(versions[3].uri)) == [(Kind.BROKEN, name(versions[1]))]


def test_what_was_interrupted_or_orphaned_is_told_and_breaks_nothing(home: str) -> None:
    versions = chain(home, 3)
    leftover = killed_step(versions[2], 20)
    lost = step(versions[1], 21)
    report = fsck(f"{home}coder", known=[name(version) for version in versions])
    assert sorted(kinds(report)) == sorted([(Kind.INTERRUPTED, name(leftover)), (Kind.ORPHANED, name(lost))])
    assert report.ok
    assert kinds(fsck(f"{home}coder")) == [(Kind.INTERRUPTED, name(leftover))]


def test_a_known_version_that_is_gone_or_has_lost_its_manifest_is_found(home: str) -> None:
    versions = chain(home, 4)
    store, known = open_store(home), [name(version) for version in versions]
    for uri, _ in store.list(versions[3].uri):
        store.delete(uri)
    store.delete(f"{versions[2].uri}{MANIFEST}")
    report = fsck(f"{home}coder", known=known)
    assert not report.ok
    assert sorted(kinds(report)) == sorted([(Kind.MISSING, known[3]), (Kind.BROKEN, known[2])])
    assert fsck(f"{home}coder", known=known[:2]).ok, "who does not know of them takes them for a killed step's"
    collect.tombstone(f"{home}coder", [known[0]], "retention")
    collect.delete(f"{home}coder", [known[0]])
    assert fsck(f"{home}coder", known=known[:2]).ok, "what was collected is not missing"
    with pytest.raises(UriInvalid):
        fsck(f"{home}coder", known=["coder2"])


def test_an_adapter_that_begins_at_a_steps_uri_is_checked_as_a_whole(home: str) -> None:
    versions = chain(home, 3)
    later = step(versions[1], 7, adapter_uid="other")  # of an adapter that adopted versions[1] where it lies
    store = open_store(home)
    store.put(f"{later.uri}{ADAPTER}", b"damaged", if_absent=False)
    report = fsck(versions[1].uri, known=[name(versions[1]), name(later)])
    assert not report.ok
    assert (Kind.BROKEN, ADAPTER) in kinds(report)
    assert fsck(versions[1].uri).ok, "without what is known it is a version, and its chain is whole"


def test_a_version_whose_parents_lead_elsewhere_is_an_orphan(home: str) -> None:
    versions = chain(home, 2)
    other = first(f"{home}other", "other")
    stray = step(other, 5)
    # Moved by hand to where it looks like one of coder's.
    store, moved = open_store(home), step_uri(versions[0].uri, 5)
    for uri, _ in store.list(stray.uri):
        store.put(moved + uri.removeprefix(stray.uri), store.get(uri))
    assert (Kind.ORPHANED, name(moved)) in kinds(fsck(f"{home}coder"))


def test_a_fork_is_followed_to_its_origin_and_whole_without_it(home: str, tmp_path: Path) -> None:
    versions = chain(home, 3)
    model = examples.model_dir(tmp_path / "model")
    fork = init_adapter(f"{home}forks/mine", examples.BASE, model, versions[1].uri, examples.LORA, "fork")
    later = step(fork, 9, adapter_uid="fork")
    assert fsck(later.uri).versions == 4
    store = open_store(home)
    uri = f"{versions[0].uri}{ADAPTER}"
    store.put(uri, store.get(uri)[:-1] + b"x", if_absent=False)
    assert kinds(fsck(later.uri)) == [(Kind.BROKEN, ADAPTER)]
    collect.destroy(f"{home}coder")
    report = fsck(later.uri)
    assert (report.ok, kinds(report)) == (True, [(Kind.UNREACHABLE, name(versions[1]))])
    assert "the copy is whole" in report.findings[0].message


def test_a_fork_of_somebodys_folder_is_checked_against_it(home: str, tmp_path: Path) -> None:
    store = open_store(home)
    store.put(f"{home}theirs/{CONFIG}", json.dumps(examples.CONFIG).encode())
    store.put(f"{home}theirs/{ADAPTER}", safetensors.numpy.save(examples.tensors()))
    model = examples.model_dir(tmp_path / "model")
    fork = init_adapter(f"{home}mine", examples.BASE, model, f"{home}theirs", examples.LORA, "fork")
    assert (fsck(fork.uri).ok, fsck(fork.uri).findings) == (True, [])
    init_adapter(f"{home}theirs", examples.BASE, model, f"{home}theirs", examples.LORA, "theirs")
    assert (fsck(fork.uri).ok, fsck(fork.uri).versions) == (True, 2)
    store.put(f"{home}theirs/{ADAPTER}", safetensors.numpy.save(examples.tensors(7)), if_absent=False)
    assert not fsck(fork.uri).ok


def test_an_origin_out_of_reach_is_told(root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    origin = first(f"file://{root}/a/coder")
    model = examples.model_dir(tmp_path / "model")
    (root / "b").mkdir()
    fork = init_adapter(f"file://{root}/b/fork", examples.BASE, model, origin.uri, examples.LORA, "fork")
    monkeypatch.setenv("CLAAS_FILE_ROOTS", f"{root}/b")
    report = fsck(fork.uri)
    assert (report.ok, kinds(report)) == (True, [(Kind.UNREACHABLE, "fork")])
    assert "outside the file roots" in report.findings[0].message


def test_a_circle_of_parents_ends(home: str) -> None:
    """No digest can allow it, but whoever may write may try."""
    versions = chain(home, 2)
    store, uri = open_store(home), f"{versions[0].uri}{MANIFEST}"
    said = json.loads(store.get(uri)) | {"parent": {"uri": versions[1].uri, "sha256": "0" * 64}, "requestUid": "x"}
    store.put(uri, json.dumps(said).encode(), if_absent=False)
    assert not fsck(versions[1].uri).ok
    assert not fsck(f"{home}coder").ok


def test_nothing_there_is_missing(home: str) -> None:
    for uri in (f"{home}coder", step_uri(f"{home}coder", 1)):
        report = fsck(uri)
        assert not report.ok
        assert {kind for kind, _ in kinds(report)} == {Kind.MISSING}


def test_the_command_says_it_in_lines_and_in_json_and_by_its_exit_code(
    home: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "log"
    monkeypatch.setenv("CLAAS_TERMINATION_LOG", str(log))
    versions = chain(home, 3)
    assert command.main(["fsck", f"{home}coder"]) == 0
    assert capsys.readouterr().out.startswith(f"clean: {home}coder/, 3 versions, ")
    assert json.loads(log.read_text())["versions"] == 3
    open_store(home).delete(f"{versions[1].uri}{ADAPTER}")
    killed_step(versions[2], 8)
    assert command.main(["fsck", f"{home}coder"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert f"missing     {versions[1].uri}{ADAPTER}: the manifest lists it, and it is not there" in out
    assert any(line.startswith("BROKEN: ") for line in out)
    answer = json.loads(log.read_text())
    assert (answer["ok"], answer["reason"]) == (False, "AdapterInvalid")
    assert answer["findings"] == {"missing": 1, "interrupted": 1}
    assert command.main(["fsck", "--json", f"{home}coder"]) == 1
    report, _ = json.JSONDecoder().raw_decode(capsys.readouterr().out)
    assert {finding["kind"] for finding in report["findings"]} == {"missing", "interrupted"}
    assert command.main(["fsck", versions[2].uri, "--all", "--known", name(versions[2])]) == 1
