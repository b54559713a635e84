"""`python -m claas_store`: the answers that the operator reads, and the words that people read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from claas_operator.operations import parse_answer
from claas_store import __main__ as command
from claas_store.errors import NotFound
from claas_store.version import ADAPTER, CONFIG, read_version
from store import examples
from store.chains import killed_step, name, request_uid, step, step_uri


@pytest.fixture
def answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The container's termination log."""
    path = tmp_path / "termination-log"
    monkeypatch.setenv("CLAAS_TERMINATION_LOG", str(path))
    return path


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return examples.model_dir(tmp_path / "model")


def create(home: str, model: Path, **more: str) -> int:
    options = {
        "uri": home,
        "base-model": examples.BASE,
        "model-dir": str(model),
        "r": "4",
        "alpha": "8",
        "target-modules": "q_proj,down_proj",
        "adapter-uid": examples.UID,
        **more,
    }
    return command.main(["create", *(word for name, value in options.items() for word in (f"--{name}", value))])


def read(answers: Path) -> dict[str, Any]:
    data = answers.read_bytes()
    assert len(data) <= 4096
    answer: dict[str, Any] = json.loads(data)
    return answer


def test_create_answers_with_the_version(
    home: str, model: Path, answers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for _ in range(2):
        assert create(f"{home}coder", model) == 0
        version = read_version(f"{home}coder")
        assert read(answers) == {
            "ok": True,
            "uri": f"{home}coder/",
            "version": "coder",
            "sha256": version.manifest_sha256,
        }
        assert json.loads(capsys.readouterr().out) == read(answers)
    assert version.config["lora_alpha"] == 8


def test_create_from_another(home: str, model: Path, answers: Path) -> None:
    create(f"{home}coder", model)
    assert create(f"{home}fork", model, **{"init-from": f"{home}coder", "adapter-uid": "fork"}) == 0
    assert read(answers)["version"] == "fork"
    assert read_version(f"{home}fork").manifest.files == read_version(f"{home}coder").manifest.files


@pytest.mark.parametrize(
    ("options", "reason", "said"),
    [
        ({"r": "0"}, "InvalidSpec", "spec.lora is out of bounds: r"),
        ({"alpha": "nan"}, "InvalidSpec", "alpha"),
        ({"r": "four"}, "InvalidSpec", "--r"),
        ({"target-modules": "q_proj,w_pack"}, "InvalidSpec", "w_pack match no linear layer"),
        ({"target-modules": ""}, "InvalidSpec", "target"),
        ({"uri": "s3://bucket/../x"}, "InvalidSpec", "'..' segment"),
        ({"uri": "file:///etc/adapters/"}, "StorageDenied", "outside the file roots"),
        ({"model-dir": "/nowhere"}, "InvalidSpec", "/nowhere"),
        ({"init-from": "file:///etc/adapters/"}, "StorageDenied", "outside the file roots"),
    ],
)
def test_what_cannot_work_is_an_answer(
    root: Path, model: Path, answers: Path, options: dict[str, str], reason: str, said: str
) -> None:
    assert create(f"file://{root}/coder", model, **options) == 1
    answer = read(answers)
    assert (answer["ok"], answer["reason"], answer["retryable"]) == (False, reason, False)
    assert said in answer["message"]


def test_bad_arguments_are_an_answer(answers: Path) -> None:
    for arguments in ([], ["frobnicate"], ["create", "--uri", "s3://bucket/a"]):
        assert command.main(arguments) == 1
        assert read(answers)["reason"] == "InvalidSpec"


def test_the_store_is_down(model: Path, answers: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    assert create("s3://adapters/coder/", model) == 1
    answer = read(answers)
    assert (answer["reason"], answer["retryable"]) == ("StorageUnavailable", True)
    assert "http://127.0.0.1:9" in answer["message"]


def test_an_answer_fits_into_the_termination_log(root: Path, model: Path, answers: Path) -> None:
    """Kubernetes cuts at 4,096 bytes, which would leave no JSON; escapes make a byte of text up to twelve."""
    assert create(f"file://{root}/" + "/".join(["\U0001f600" * 60] * 4), model, **{"target-modules": "q_proj"}) == 0
    assert read(answers)["ok"]
    command._answer(command.failure(command.Reason.INTERNAL_ERROR, "\U0001f600" * 5000, True))
    assert read(answers)["message"].startswith("\U0001f600")


def test_a_uri_is_answered_whole_however_it_is_written(root: Path, model: Path, answers: Path) -> None:
    """The operator goes on with what the answer says, and a uri that was cut would be another's."""
    for uri in (f"file://{root}/" + "/".join(["\u6587" * 84] * 9), f"file://{root}/" + "/".join(['"' * 200] * 4)):
        assert create(uri, model) == 0
        answer = read(answers)
        assert (answer["uri"], answer["version"]) == (f"{uri}/", uri.rpartition("/")[2])
        assert answer["sha256"] == read_version(uri).manifest_sha256
    command._answer({"ok": True, "uri": uri, "done": ["\u6587" * 50] * 99, "dead": ["v" * 50] * 99})
    assert read(answers)["uri"] == uri
    assert read(answers)["done"]


def test_a_uri_that_no_answer_could_hold_is_refused(root: Path, model: Path, answers: Path) -> None:
    assert create(f"file://{root}/" + "/".join(["\U0001f600" * 60] * 14), model) == 1
    assert "longer than 3072 bytes" in read(answers)["message"]


def test_no_text_of_a_file_comes_back_in_an_answer(root: Path, model: Path, answers: Path) -> None:
    """Names that are none, and half a surrogate pair, which the operator's parser refuses."""
    store = command.open_store(f"file://{root}/theirs")
    config = {**examples.CONFIG, "target_modules": ["\ud800", "IGNORE\n\x1b[31m", "k_proj"]}
    store.put(f"file://{root}/theirs/{CONFIG}", json.dumps(config).encode())
    assert create(f"file://{root}/coder", model, **{"init-from": f"file://{root}/theirs"}) == 1
    assert "IGNORE" not in answers.read_text()
    assert "k_proj" in read(answers)["message"]
    assert parse_answer(answers.read_text()) is not None
    for words in ({"peft_type": "IGNORE all"}, {"base_model_name_or_path": "o/" + "\u6587"}):
        store.put(f"file://{root}/theirs/{CONFIG}", json.dumps({**examples.CONFIG, **words}).encode(), if_absent=False)
        assert create(f"file://{root}/coder", model, **{"init-from": f"file://{root}/theirs"}) == 1
        assert not any(word in read(answers)["message"] for word in ("IGNORE", "\u6587"))
    command._answer(command.failure(command.Reason.INTERNAL_ERROR, "half \ud800 a pair", True))
    assert read(answers)["message"] == "half ? a pair"


def test_an_unforeseen_error_is_an_answer_and_a_traceback(
    root: Path, model: Path, answers: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: object) -> None:
        raise ZeroDivisionError("private details")

    monkeypatch.setattr(command, "create_adapter", fails)
    with pytest.raises(ZeroDivisionError):
        create(f"file://{root}/coder", model)
    answer = read(answers)
    assert (answer["reason"], answer["retryable"]) == ("InternalError", True)
    assert "private details" not in answer["message"]


def test_show_verifies(home: str, model: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(f"{home}coder", model)
    capsys.readouterr()
    assert command.main(["show", f"{home}coder"]) == 0
    assert f'"adapterUid": "{examples.UID}"' in capsys.readouterr().out
    store = command.open_store(home)
    store.put(f"{home}coder/{ADAPTER}", b"x", if_absent=False)
    assert command.main(["show", f"{home}coder"]) == 1
    assert ADAPTER in read(answers)["message"]


def test_list_names_every_object(home: str, model: Path, answers: Path, capsys: pytest.CaptureFixture[str]) -> None:
    create(f"{home}coder", model)
    capsys.readouterr()
    assert command.main(["list", home]) == 0
    out = capsys.readouterr().out
    for file in ("adapter_config.json", "adapter_model.safetensors", "claas.json"):
        assert f"{home}coder/{file}" in out


# Operations on versions, as the operator's Jobs start them


def test_collecting_by_command(home: str, model: Path, answers: Path) -> None:
    create(f"{home}coder", model)
    names = f"coder,{name(step(read_version(f'{home}coder'), 1))}"
    assert command.main(["delete", "--root", f"{home}coder", "--versions", names]) == 1
    assert (read(answers)["reason"], read(answers)["retryable"]) == ("VersionConflict", False)
    for act in ("tombstone", "restore", "tombstone", "delete", "delete"):
        assert command.main([act, "--root", f"{home}coder", "--versions", names]) == 0
        assert read(answers).pop("dead", []) == []
        assert (read(answers)["ok"], read(answers)["done"]) == (True, names.split(","))
    assert command.main(["restore", "--root", f"{home}coder", "--versions", "coder"]) == 0
    assert read(answers) == {"ok": True, "done": [], "dead": ["coder"], "collection": 0}
    assert command.main(["tombstone", "--root", f"{home}coder", "--versions", "coder,../x"]) == 1
    assert read(answers)["reason"] == "InvalidSpec"


def test_destroying_and_sweeping_by_command(home: str, model: Path, answers: Path) -> None:
    create(f"{home}coder", model)
    create(f"{home}coder2", model, **{"adapter-uid": "other"})
    root = read_version(f"{home}coder")
    known, orphan = step(root, 1), step(root, 2)
    killed_step(root, 3)
    sweep = ["sweep", "--root", f"{home}coder", "--known", f"coder,{name(known)}"]
    assert command.main([*sweep, "--grace-seconds", "3600"]) == 0
    assert read(answers) == {"ok": True, "interrupted": 0, "orphans": 0, "uploads": 0, "kept": 2}
    assert command.main([*sweep, "--grace-seconds", "0", "--adapter-uid", "another"]) == 0
    assert read(answers) == {"ok": True, "interrupted": 1, "orphans": 0, "uploads": 0, "kept": 0}
    unended = ",".join([request_uid(2), request_uid(3)])
    assert command.main([*sweep, "--grace-seconds", "0", "--unended", unended]) == 0
    assert read(answers) == {"ok": True, "interrupted": 0, "orphans": 0, "uploads": 0, "kept": 1}
    assert command.main([*sweep, "--grace-seconds", "0", "--adapter-uid", examples.UID]) == 0
    assert read(answers)["orphans"] == 1
    with pytest.raises(NotFound):
        read_version(orphan.uri)
    for bad in ("-1", "nan", "inf", "soon"):
        assert command.main([*sweep, "--grace-seconds", bad]) == 1
        assert read(answers)["reason"] == "InvalidSpec"
    assert command.main(["destroy", "--root", f"{home}coder", "--keep", name(known)]) == 0
    assert read(answers) == {"ok": True, "deleted": 1, "kept": [name(known)]}
    for deleted in (2, 0):  # the kept one, and the tombstone of its parent
        assert command.main(["destroy", "--root", f"{home}coder"]) == 0
        assert read(answers) == {"ok": True, "deleted": deleted, "kept": []}
    assert read_version(f"{home}coder2").manifest.adapter_uid == "other"


def test_an_answer_of_many_names_is_cut_and_still_json(root: Path, model: Path, answers: Path) -> None:
    """The operator asks again for what is not in it."""
    names = [name(step_uri(f"file://{root}/coder", number)) for number in range(300)]
    assert command.main(["tombstone", "--root", f"file://{root}/coder", "--versions", ",".join(names)]) == 0
    done = read(answers)["done"]
    assert 0 < len(done) < 300
    assert done == names[: len(done)]


@pytest.mark.parametrize("odd", ["my,adapter", "-coder", "--coder,x"])
def test_names_with_a_comma_or_a_dash_before_them(root: Path, model: Path, answers: Path, odd: str) -> None:
    uri = f"file://{root}/{odd}"
    create(uri, model)
    made = step(read_version(uri), 1)
    both = ["--version", odd, f"--version={name(made)}"]
    for act in ("tombstone", "restore", "tombstone"):
        assert command.main([act, "--root", uri, *both]) == 0
        assert read(answers)["done"] == [odd, name(made)]
    assert command.main(["delete", "--root", uri, "--version", odd]) == 0
    assert read(answers)["done"] == [odd]
    assert command.main(["restore", "--root", uri, *both]) == 0
    assert read(answers) == {"ok": True, "done": [name(made)], "dead": [odd], "collection": 0}
    known = ["--known-version", odd, "--known-version", name(made)]
    assert command.main(["sweep", "--root", uri, "--grace-seconds", "0", *known]) == 0
    assert command.main(["fsck", uri, *known]) == 0
    assert read(answers)["versions"] == 2
    assert command.main(["destroy", "--root", uri, "--keep-version", name(made)]) == 0
    assert read(answers)["kept"] == [name(made)]


def test_both_forms_of_names_add_up_and_one_is_needed(root: Path, model: Path, answers: Path) -> None:
    create(f"file://{root}/coder", model)
    uri, made = f"file://{root}/coder", name(step(read_version(f"file://{root}/coder"), 1))
    assert command.main(["tombstone", "--root", uri, "--versions", f"coder,{made}", "--version", made]) == 0
    assert read(answers)["done"] == ["coder", made]
    for act in (["tombstone"], ["restore"], ["delete"], ["sweep", "--grace-seconds", "0"]):
        assert command.main([*act, "--root", uri]) == 1
        assert read(answers)["reason"] == "InvalidSpec"
        assert "is required" in read(answers)["message"]
