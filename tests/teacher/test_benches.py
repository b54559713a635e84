"""The benches that need a teacher, in small, on the server that runs here anyway; how fast, is not judged."""

from __future__ import annotations

from pathlib import Path

import pytest

import models
from benchkit import assert_positive, result_of
from vllmserver import TeacherServer

pytestmark = pytest.mark.vllm


def test_frames_and_stock_json_say_the_same(teacher_server: TeacherServer, tmp_path: Path) -> None:
    shapes = ("--shapes", "1x64,2x40", "--rounds", "2", "--stock-rounds", "1")
    result = result_of("teacher_scoring", tmp_path, "--url", teacher_server.url, *shapes)
    assert [case["case"] for case in result["cases"]] == ["1x64", "2x40"]
    for case in result["cases"]:
        assert_positive(case, "prefill_ms", "frames_ms", "json_ms", "frames_of_prefill", "json_of_frames")
        assert [len(case[f"{side}_all_ms"]) for side in ("prefill", "frames", "json")] == [2, 2, 1]
        assert case["largest_logprob_difference"] < 1e-4


@pytest.mark.controlplane
def test_a_warm_request_is_timed_from_end_to_end(teacher_server: TeacherServer, tmp_path: Path) -> None:
    teacher = ("--teacher-url", teacher_server.url, "--tokenizer", models.smollm2_dir())
    result = result_of("warm_request", tmp_path, "--small", "--tokens", "64", "--rounds", "2", *teacher)
    assert_positive(result, "teacher_alone_ms", "student_alone_ms")
    assert_positive(result["first"], "ready_s", "process_to_result_s")
    assert len(result["rounds_ms"]) == 2
    for one in result["rounds_ms"]:
        assert_positive(one, "created to bound", "teacher", "step", "save", "reported to complete")
        parts = [value for name, value in one.items() if name not in ("created to bound", "bound to complete")]
        assert sum(parts) == pytest.approx(one["bound to complete"])
