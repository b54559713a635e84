"""The command line: what it refuses, and that every flag has its variable."""

from __future__ import annotations

from pathlib import Path

import pytest

from claas_worker import config

POD = {"POD_NAME": "w", "POD_NAMESPACE": "n", "POD_UID": "u", "BASE_MODEL": "m", "MODEL_PATH": "/models"}


@pytest.fixture
def pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in POD.items():
        monkeypatch.setenv(f"CLAAS_{name}", value)


@pytest.mark.usefixtures("pod")
def test_the_environment_is_the_default_and_flags_win(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLAAS_LINGER_SECONDS", "0")
    monkeypatch.setenv("CLAAS_MAX_REQUESTS", "")  # as a template leaves it: the default
    arguments = config.parse(["--max-prompt-tokens", "7"])
    assert arguments.agent is not None
    assert (arguments.agent.linger_seconds, arguments.agent.max_requests, arguments.agent.pod_uid) == (0, 1000, "u")
    assert (arguments.step.max_prompt_tokens, arguments.step.model_path) == (7, Path("/models"))


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize("missing", ["POD_NAME", "POD_NAMESPACE", "POD_UID", "BASE_MODEL", "MODEL_PATH"])
def test_what_is_missing_is_named(
    missing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv(f"CLAAS_{missing}")
    with pytest.raises(SystemExit):
        config.parse([])
    assert f"CLAAS_{missing}" in capsys.readouterr().err


@pytest.mark.usefixtures("pod")
@pytest.mark.parametrize(
    "flags",
    [
        ["--max-requests", "0"],
        ["--linger-seconds", "-1"],
        ["--linger-seconds", "nan"],
        ["--device", "tpu"],
        ["--lease-seconds", "0"],
    ],
)
def test_what_makes_no_sense_is_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(flags)


def test_run_request_needs_no_pod(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in POD:
        monkeypatch.delenv(f"CLAAS_{name}", raising=False)
    arguments = config.parse(["run-request", "request.yaml", "--model-path", "/models", "--out-uri", "s3://b/c/"])
    assert arguments.agent is None
    assert arguments.run_request == config.RunRequest(Path("request.yaml"), "s3://b/c/")


def test_help_names_every_variable(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        config.parse(["--help"])
    text = capsys.readouterr().out
    for name in (*POD, "TEACHER_URL", "DEVICE", "MAX_PROMPT_TOKENS", "MAX_RESPONSE_TOKENS", "LINGER_SECONDS"):
        assert f"CLAAS_{name}" in text
    assert "run-request" in text
    assert "AWS_ENDPOINT_URL" in text
