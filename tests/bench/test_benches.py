"""Every bench runs in small on a processor: both sides give numbers, the same where they should, and a picture.

How fast anything is, is not judged here: see LOG.md and the targets `bench-*` of the Makefile. The benches that need a
teacher are in tests/teacher, where one runs.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from benchkit import BENCHES, assert_drawn, assert_positive, call, result_of

SMALL_LOAD = ("--requests", "24", "--adapters", "8", "--namespaces", "2", "--workers", "2", "--idle", "3")


def test_the_student_step_is_that_of_plain_peft(tmp_path: Path) -> None:
    result = result_of("student_step", tmp_path, "--smoke", "--rounds", "1", "--cases", "1")
    (case,) = result["cases"]
    assert (case["adapters"], case["equal"]) == (3, True)
    assert case["gradient_cosine"] > 0.99999
    assert case["loss_error"] < 1e-5
    assert_positive(case, "ms", "plain_ms", "speed_up")


@pytest.mark.stress  # 220 MB of packages that nothing else needs, from the registry
def test_the_trainer_of_trl_trains_on_our_tokens(tmp_path: Path) -> None:
    result = result_of("step_against_trl", tmp_path, "--smoke", "--rounds", "1", "--cases", "0")
    (case,) = result["cases"]
    assert case["trl_ms"] > case["trl_teacher_ms"] > 0
    assert_positive(case, "ms", "plain_ms", "trl_ms", "trl_gradient_norm", "trl_largest_change", "faster_than_trl")
    assert "trl" in result["packages"]


@pytest.mark.stress  # a real small model: half a minute
def test_the_step_on_a_processor_against_plain_peft(tmp_path: Path) -> None:
    result = result_of("step_against_peft", tmp_path, "--rounds", "1", "--tokens", "80")
    (case,) = result["cases"]
    assert_positive(case, "ms", "plain_ms", "step_of_plain")


def test_a_cold_process_reaches_its_first_step(tmp_path: Path) -> None:
    result = result_of("cold_start", tmp_path, "--small", "--tokens", "32", "--rounds", "1")
    assert_cold(result["processes"])


@pytest.mark.controlplane
@pytest.mark.stress  # a control plane, and two real agents
def test_a_cold_agent_reaches_its_first_step(tmp_path: Path) -> None:
    result = result_of("cold_start", tmp_path, "--small", "--agent", "--tokens", "32", "--rounds", "2")
    assert_cold(result["processes"])
    for one in result["processes"]:
        assert one["loaded_seconds"] <= one["ready_seconds"] < one["result_seconds"]


def assert_cold(processes: list[dict[str, Any]]) -> None:
    """In the order in which things happen; plain PEFT's process has made its step too."""
    for one in processes:
        assert_positive(one["plain"], "imports_seconds", "load_seconds", "step_seconds", "first_step_seconds", "loss")
        assert_positive(one["timings"], "loadMs", "stepMs", "saveMs")
        assert 0 < one["imports_seconds"] < one["load_step_seconds"] < one["loaded_seconds"]
        assert one["loaded_seconds"] < one["first_step_seconds"] <= one["result_seconds"]


@pytest.mark.controlplane
def test_a_few_dozen_requests_through_the_operator(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    call("operator_load", "run", *SMALL_LOAD, "--out", out)
    (record,) = json.loads(out.read_text())
    assert (record["workers"], record["load"]["created_to_bound_seconds"]["count"]) == (2, 24)
    assert_positive(record["raw"], "writes_per_second")
    assert_positive(record["load"], "writes_per_second", "requests_per_second", "rss_bytes", "writes_per_request")
    # Created, bound, claimed, reported, completed, and the head's move; a wait is told where the machine is slow.
    assert 5 <= record["load"]["writes_per_request"] - record["load"]["told_per_request"] <= 7
    call("operator_load", "plot", "--out", out)
    assert_drawn(out.with_suffix(".png"))
    # A machine that does something else is slow: the verdict is tried on numbers that no machine changes.
    record |= {"share_of_raw": 0.7, "idle_created_to_bound_seconds": {"p50": 0.03, "p99": 0.08}}
    out.write_text(json.dumps([record]))
    said = call("operator_load", "verdict", "--out", out)
    assert said.count("within") == len(said.splitlines()) == 5
    record["load"]["rss_bytes"] = 301e6
    out.write_text(json.dumps([record, record]))
    said = call("operator_load", "verdict", "--out", out, code=1)
    (missed,) = [line for line in said.splitlines() if "NOT WITHIN" in line]
    assert "2 runs: load.load.rss_bytes 3.01e+08" in missed
    out.write_text(json.dumps([record | {"requests": 30_000}]))
    assert "rss_bytes" not in call("operator_load", "verdict", "--out", out), "that bound is for up to 10,000 requests"


@pytest.mark.controlplane
@pytest.mark.stress  # steps that take time
def test_a_flood_leaves_another_namespace_its_turn(tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    call("operator_load", "flood", "--requests", "500", "--out", out)
    (record,) = json.loads(out.read_text())
    assert record["created_to_bound_seconds"]["count"] == 20
    assert_positive(record["created_to_bound_seconds"], "p50", "max")


def test_every_bench_says_how_it_is_run() -> None:
    silent = [
        path.name
        for path in BENCHES.glob("*.py")
        if not path.name.startswith("test_")
        and "__main__" in (text := path.read_text())
        and f"python tests/bench/{path.name}" not in (ast.get_docstring(ast.parse(text)) or "")
    ]
    assert silent == []
