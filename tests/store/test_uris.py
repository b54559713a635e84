"""Uris: one spelling, no way out of a prefix, names of versions that never meet."""

from __future__ import annotations

import os.path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from claas_store.errors import UriInvalid
from claas_store.uris import (
    beside,
    is_beside,
    is_step_output,
    join,
    next_version_uri,
    normalise,
    parent_folder,
    parse,
    version_name,
    within,
)

CREATED = "2026-11-23T19:10:07Z"
UID = "9f2c4d1e-5f7a-4c1b-9d86-3f0e1c2d4b5a"

# Text that an attacker would try: separators, dots, escapes, control characters, and anything else.
HOSTILE = st.text(st.one_of(st.sampled_from("/.%\\?#: ~\0\n\r2eF5cü"), st.characters()), max_size=40)
SEGMENT = st.text(st.sampled_from("abz09-_.% "), min_size=1, max_size=12).filter(lambda s: s not in (".", ".."))
PATHS = st.lists(SEGMENT, min_size=1, max_size=5).map("/".join)


@pytest.mark.parametrize(
    ("uri", "spelled"),
    [
        ("s3://bucket/a/b", "s3://bucket/a/b/"),
        ("s3://bucket/a/b/", "s3://bucket/a/b/"),
        ("file:///a", "file:///a/"),
        ("s3://my.bucket-1/ä/100%/x%20 y", "s3://my.bucket-1/ä/100%/x%20 y/"),  # taken literally: just strange names
    ],
)
def test_one_spelling(uri: str, spelled: str) -> None:
    assert normalise(uri) == spelled


@pytest.mark.parametrize(
    "uri",
    [
        "", "/", "a/b", "s3:/bucket/a", "s3:///a", "s3://b/a", "s3://Bucket/a", "s3://user@bucket/a", "s3://bucket:80/a",
        "s3://bucket", "s3://bucket/", "s3://bucket//", "s3://bucket//a", "s3://bucket/a//", "s3://bucket/a//b",
        "s3://bucket/../a", "s3://bucket/a/..", "s3://bucket/./a", "s3://bucket/a?versionId=1", "s3://bucket/a#b",
        "s3://bucket/a\\..\\b", "s3://bucket/a\nb", "s3://bucket/a\0", "s3://bucket/\ud800", "s3://a..b/c",
        "file://", "file:///", "file://host/a", "file:////a", "file:///a/../../etc", "http://bucket/a", "S3://bucket/a",
        "s3://bucket/" + "a" * 1024, "s3://bucket/" + "ä" * 128,
    ],
)  # fmt: skip
def test_refused(uri: str) -> None:
    with pytest.raises(UriInvalid):
        normalise(uri)


@given(HOSTILE)
def test_what_is_accepted_has_one_spelling_and_stays_where_it_says(text: str) -> None:
    for start in ("s3://bucket/team/", "file:///data/team/"):
        try:
            spelled = normalise(start + text)
        except UriInvalid:
            continue
        assert normalise(spelled) == spelled
        path = spelled.partition("://")[2]
        assert os.path.normpath(path) + "/" == path, "a file system or a proxy would read another path"
        assert path.startswith(("bucket/team/", "/data/team/"))


@given(HOSTILE, HOSTILE)
def test_nothing_hostile_lies_within_a_prefix_unless_its_path_does(first: str, second: str) -> None:
    uri = f"file:///data/{first}/{second}"
    if within(uri, ["file:///data/team/"]):
        assert os.path.commonpath([os.path.normpath(uri.removeprefix("file://")), "/data/team"]) == "/data/team"


@pytest.mark.parametrize(
    ("uri", "inside"),
    [
        ("s3://bucket/team/a/", True),
        ("s3://bucket/team/a/b", True),
        ("s3://bucket/team/", False),  # at least one segment below
        ("s3://bucket/team", False),
        ("s3://bucket/team2/a/", False),  # segments, not characters
        ("s3://bucket/a/team/", False),
        ("s3://other/team/a/", False),
        ("file:///bucket/team/a/", False),
        ("s3://bucket/team/../x/", False),
        ("s3://bucket/team//a", False),
        ("nonsense", False),
    ],
)
def test_within(uri: str, inside: bool) -> None:
    assert within(uri, ["s3://bucket/team"]) is inside
    assert within(uri, ["s3://bucket/team/"]) is inside


def test_within_a_whole_bucket_and_any_of_several() -> None:
    assert within("s3://bucket/a", ["s3://other/", "s3://bucket"])
    assert not within("s3://bucket/a", [])


def test_a_broken_prefix_is_a_broken_setting() -> None:
    with pytest.raises(UriInvalid):
        within("s3://bucket/a", ["bucket/a"])


def test_next_version_lies_beside_its_parent() -> None:
    first = next_version_uri("s3://bucket/team/coder-v1", CREATED, UID, 1)
    assert first == "s3://bucket/team/coder-v1-20261123-191007-9f2c4d1e/"
    assert next_version_uri(first, CREATED, UID, 2) == "s3://bucket/team/coder-v1-20261123-191007-9f2c4d1e-a2/"
    assert next_version_uri(first, "2026-11-23T21:10:07.5+02:00", UID, 1) == first
    assert version_name(first) == "coder-v1-20261123-191007-9f2c4d1e"


@given(PATHS, st.integers(1, 300), st.integers(1, 300))
def test_versions_never_nest_never_meet_and_never_grow(path: str, one: int, other: int) -> None:
    parent = normalise(f"s3://bucket/{path}")
    uri = next_version_uri(parent, CREATED, UID, one)
    assert parse(uri).segments[:-1] == parse(parent).segments[:-1]
    assert is_step_output(uri)
    assert next_version_uri(uri, CREATED, UID, one) == uri, "our own suffix is replaced, not repeated"
    assert (uri == next_version_uri(parent, CREATED, UID, other)) == (one == other)
    assert uri != next_version_uri(parent, CREATED, UID.replace("9f", "00"), one)


@pytest.mark.parametrize(
    "name", ["-20261123-191007-9f2c4d1e", "a-20261123-191007-9F2C4D1E", "a-20261123-9f2c4d1e", "a-a2"]
)
def test_a_users_own_name_is_kept(name: str) -> None:
    assert next_version_uri(f"s3://bucket/{name}/", CREATED, UID, 1) == f"s3://bucket/{name}-20261123-191007-9f2c4d1e/"


def test_a_name_too_long_for_a_file_system_is_refused() -> None:
    with pytest.raises(UriInvalid, match="255 bytes"):
        next_version_uri("s3://bucket/" + "a" * 240, CREATED, UID, 1)


@pytest.mark.parametrize(
    ("created", "uid", "attempt", "said"),
    [
        ("yesterday", UID, 1, "yesterday"),
        ("2026-11-23T19:10:07", UID, 1, "time zone"),
        (CREATED, "../../etc", 1, "8 hexadecimal digits"),
        (CREATED, "", 1, "8 hexadecimal digits"),
        (CREATED, UID, 0, "attempt 0"),
    ],
)
def test_what_cannot_be_named(created: str, uid: str, attempt: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        next_version_uri("s3://bucket/a/", created, uid, attempt)


def test_join() -> None:
    assert join("s3://bucket/a", "claas.json") == "s3://bucket/a/claas.json"
    for name in ("", "..", "b/c", "/b", "b?"):
        with pytest.raises(UriInvalid):
            join("s3://bucket/a/", name)


@pytest.mark.parametrize(
    ("uri", "name", "beside_it"),
    [
        ("s3://bucket/team/coder/", "coder", True),
        ("s3://bucket/team/coder", "coder-20261123-191007-9f2c4d1e", True),
        ("s3://bucket/team/coder", "coder-20261123-191007-9f2c4d1e-a12", True),
        ("s3://bucket/team/coder-20261123-191007-9f2c4d1e", "coder-20261124-191007-9f2c4d1e", True),
        ("s3://bucket/team/coder-20261123-191007-9f2c4d1e", "coder", False),  # another's own uri
        ("s3://bucket/team/coder", "coder-v2", False),
        ("s3://bucket/team/coder", "code-20261123-191007-9f2c4d1e", False),
        ("s3://bucket/team/coder", "coder-v2-20261123-191007-9f2c4d1e", False),
        ("s3://bucket/team/coder", "..", False),
        ("s3://bucket/team/coder", "", False),
        ("s3://bucket/team/coder", "x/coder", False),
    ],
)
def test_names_of_versions_beside_an_adapter(uri: str, name: str, beside_it: bool) -> None:
    assert is_beside(uri, name) is beside_it
    if beside_it:
        assert beside(uri, name) == f"s3://bucket/team/{name}/"
    else:
        with pytest.raises(UriInvalid, match="no name of a version"):
            beside(uri, name)


@given(PATHS, HOSTILE)
def test_what_lies_beside_never_lies_elsewhere(path: str, text: str) -> None:
    uri = normalise(f"s3://bucket/{path}")
    for name in (text, f"{version_name(uri)}{text}", f"{text}-20261123-191007-9f2c4d1e"):
        try:
            found = beside(uri, name)
        except UriInvalid:
            continue
        assert parse(found).segments[:-1] == parse(uri).segments[:-1]
        assert parent_folder(found) == parent_folder(uri)


def test_the_folder_above() -> None:
    assert parent_folder("s3://bucket/team/coder") == "s3://bucket/team/"
    assert parent_folder("s3://bucket/coder") == "s3://bucket/"
    assert parent_folder("file:///data/coder") == "file:///data/"
