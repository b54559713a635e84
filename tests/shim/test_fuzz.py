"""Schemathesis over the whole document, authenticated, without rate limits: as its makers' command does it.

A few hundred calls here, ten thousand with `make fuzz-api`: CLAAS_FUZZ_EXAMPLES generated calls an operation, and those
of the other phases (examples, coverage of every keyword, sequences along the document's links).

Two of its checks are left out. `use_after_free`: DELETE cancels a request, which is there to be read afterwards.
`positive_data_acceptance`: that a conversation ends with a user's turn is a rule that JSON schema cannot say.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from shimstage import Shim, ShimStage

pytestmark = [pytest.mark.controlplane, pytest.mark.timeout(3600)]

EXAMPLES = int(os.environ.get("CLAAS_FUZZ_EXAMPLES", "10"))
SEED = os.environ.get("CLAAS_FUZZ_SEED", "7")
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "negative_data_rejection",
    "missing_required_header",
    "unsupported_method",
    "allow_header_conformance",
    "ensure_resource_availability",
    "ignored_auth",
)
ACCEPTED_SHARE = 0.20
MANY = 50


@pytest.fixture(scope="module")
def shim(stage: ShimStage) -> Shim:
    """One that does not keep a generated call waiting."""
    stage.adapter("coder")
    return stage.start_shim(waitSeconds=0.05, maxWaitSeconds=0.05)


@pytest.mark.parametrize("mode", [pytest.param("all", marks=pytest.mark.stress), "positive"])
def test_schemathesis_finds_nothing(stage: ShimStage, shim: Shim, tmp_path: Path, mode: str) -> None:
    """Calls are accepted often enough to reach behind the validation, also where half of them are wrong on purpose."""
    har = tmp_path / "calls.har"
    command = [
        *(sys.executable, "-m", "schemathesis.cli", "run", f"{shim.url}/openapi.json"),
        *("--header", f"Authorization: Bearer {stage.token()}"),
        *("--checks", ",".join(CHECKS), "--max-examples", str(EXAMPLES), "--seed", SEED),
        *("--mode", mode, "--request-timeout", "30", "--continue-on-failure", "--no-color"),
        *("--report", "har", "--report-har-path", str(har)),
    ]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
    )
    calls = Counter(entry["response"]["status"] for entry in json.loads(har.read_text())["log"]["entries"])
    accepted = sum(count for status, count in calls.items() if 200 <= status < 300) / max(1, calls.total())
    print(f"{calls.total()} calls, {accepted:.0%} accepted: {dict(sorted(calls.items()))}")
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert not [status for status in calls if status >= 500]
    assert accepted >= ACCEPTED_SHARE or (mode == "all" and EXAMPLES < MANY), "few calls are mostly of phase coverage"
    assert shim.process.poll() is None
