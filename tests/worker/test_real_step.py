"""One step from a request file on the real SmolLM2, taught by a real vLLM, in a real object store; and its speed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
import yaml

import models
from claas_crds.adapter import Lora
from claas_crds.request import DistillRequestStatus, Sample
from claas_store.create import create_adapter
from claas_store.version import read_version
from claas_teacher.client import TeacherClient
from claas_worker.render import Limits, render
from objectstore import ObjectStore
from proof import Judge
from trainee import FRENCH, SAMPLE, SHORT
from vllmserver import TeacherServer

pytestmark = pytest.mark.vllm

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
PROMPT = "What is the capital of France?"
SAID = "The capital of France is the beautiful and famous city of Paris, which is known for many things."
BETTER = "Paris."
LESSON = {"prompt": PROMPT, "response": SAID, "feedback": "Too long. Answer with one word only.", "solution": BETTER}


@pytest.fixture
def adapter(object_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A new adapter's uri in the object store."""
    for name, value in object_store.environment.items():
        monkeypatch.setenv(name, value)
    uri = f"s3://{object_store.bucket}/{request.node.name}/a/"
    return create_adapter(uri, BASE_MODEL, models.smollm2_dir(), Lora(), "0b6c7d6e").uri


def run_request(folder: Path, teacher: TeacherServer | None, spec: dict[str, Any]) -> DistillRequestStatus:
    """`python -m claas_worker run-request`, which must succeed; its status."""
    manifest = {"apiVersion": "claas.dev/v1alpha1", "kind": "DistillRequest", "metadata": {"name": "dr"}, "spec": spec}
    file = folder / "request.yaml"
    file.write_text(yaml.safe_dump(manifest, allow_unicode=True))
    command = [sys.executable, "-m", "claas_worker", "run-request", str(file), "--threads", "2"]
    command += ["--model-path", str(models.smollm2_dir()), "--base-model", BASE_MODEL, "--device", "cpu"]
    command += ["--teacher-url", teacher.url] if teacher else []
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=240, check=False)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout
    for line in done.stderr.splitlines():
        assert json.loads(line)["level"] in ("info", "warning")  # JSON, and nothing else
    assert SAID not in done.stderr
    return DistillRequestStatus.model_validate(json.loads(done.stdout))


def test_a_step_by_a_real_teacher_makes_the_better_response_likelier(
    adapter: str, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    training = {"learningRate": 1e-3, "preset": "paper"}
    status = run_request(tmp_path, teacher_server, {"loraUri": adapter, "samples": [LESSON], "training": training})
    metadata = status.metadata
    assert (status.state, status.version) == ("Complete", status.lora_uri.rstrip("/").rpartition("/")[2])
    assert metadata is not None
    assert metadata.jsd is not None
    assert metadata.jsd > 1e-3
    assert metadata.teacher_topk_mass is not None
    assert 0.9 < metadata.teacher_topk_mass <= 1.0001
    assert (metadata.teacher_mode, metadata.teacher_id) == ("Server", teacher_server.model)
    assert read_version(status.lora_uri).manifest.template_id == "solution-1+person-1"

    judge = Judge(models.smollm2_dir())  # plain PEFT
    (before_better, before_said), (after_better, after_said) = (
        judge.log_probabilities(uri, PROMPT, [BETTER, SAID]) for uri in (adapter, status.lora_uri)
    )
    assert after_better > before_better
    assert after_better - before_better > after_said - before_said


def test_mixed_samples_have_the_same_response_ids_on_both_sides(
    adapter: str, teacher_server: TeacherServer, tmp_path: Path
) -> None:
    """Two lengths, a chat of several turns, a response that is not ASCII. The teacher's logprob of every response token
    is what the same model says, run here on the student's ids: were one side a position off, or encoded anew, it
    would not be."""
    path = models.smollm2_dir()
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    samples = [SAMPLE, SHORT, FRENCH]
    lengths = set()
    with TeacherClient(teacher_server.url) as client:
        for sample in samples:
            one = render(Sample.model_validate(sample), tokenizer, Limits(1024, 512))
            n = len(one.response_ids)
            lengths.add(n)
            assert tokenizer.decode(one.response_ids, skip_special_tokens=True) == sample["response"]
            scores = client.score(one.prefix_teacher_ids, one.response_ids, 100)
            with torch.no_grad():
                ids = torch.tensor([[*one.prefix_teacher_ids, *one.response_ids]])
                rows = model(ids).logits[0, -n - 1 : -1].log_softmax(-1)  # (N, V)
            chosen = rows.gather(1, torch.tensor(one.response_ids)[:, None]).squeeze(1)
            np.testing.assert_allclose(scores.chosen, chosen.numpy(), atol=2e-2)
            assert all(token in row for token, row in zip(one.response_ids, scores.ids, strict=True))
    assert len(lengths) == 3

    status = run_request(tmp_path, teacher_server, {"loraUri": adapter, "samples": samples})
    assert status.metadata is not None
    assert status.metadata.tokens_processed == sum(
        len(render(Sample.model_validate(sample), tokenizer, Limits(1024, 512)).response_ids) for sample in samples
    )


def test_a_teacher_of_another_tokenizer_is_refused(
    teacher_server: TeacherServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from claas_worker.errors import TokenizerMismatch
    from trainee import Trainee, tiny_student

    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    with TeacherClient(teacher_server.url) as client:
        trainee = Trainee(tiny_student(), tmp_path, client)
        with pytest.raises(TokenizerMismatch, match="another tokenizer"):
            trainee.run(trainee.adapter("a"), teacher={"mode": "Server"})


def test_support_student_needs_a_teacher_that_can(adapter: str, teacher_server: TeacherServer) -> None:
    from claas_worker.job import InvalidSpec
    from claas_worker.score import Question, Scorer
    from claas_worker.student import Context, Student

    student = Student.load(models.smollm2_dir(), base_model=BASE_MODEL, device="cpu", threads=2)
    version = read_version(adapter)
    resident = student.bank.add("a", version.config, version.tensors)
    context = Context([1, 2, 3], [4, 5])
    with TeacherClient(teacher_server.url) as client:
        scorer = Scorer(student, client)
        with pytest.raises(InvalidSpec, match=r"spec\.teacher\.support student"):
            scorer.server([Question(context, context)], 5, resident)
        (scored,), model = scorer.server([Question(context, context)], 5)
    assert model == teacher_server.model
    assert scored.support_ids.shape == (2, 6)


def test_a_warm_step_of_64_tokens_is_fast(adapter: str, teacher_server: TeacherServer, record_property: Any) -> None:
    """Two cores, teacher and object store included."""
    from claas_crds.request import DistillRequestSpec, Parent
    from claas_worker.__main__ import load_step
    from claas_worker.config import StepSettings
    from claas_worker.job import Job

    settings = StepSettings(models.smollm2_dir(), BASE_MODEL, teacher_server.url, "cpu", 2, 1024, 512, 4096)
    step = load_step(settings)
    tokenizer = transformers.AutoTokenizer.from_pretrained(models.smollm2_dir())
    response = tokenizer.encode("The quick brown fox jumps over the lazy dog. " * 8)[:64]
    sample = {"prompt": PROMPT, "responseTokenIds": response, "feedback": "Answer with one word only."}
    uri, seconds = adapter, []
    for number in range(3):
        spec = DistillRequestSpec.model_validate({"loraUri": uri, "samples": [sample]})
        job = Job(f"0000000{number}", "dr", "team", "2026-11-23T19:10:00Z", 1, Parent(uri=uri, adapter_uid="a"), spec)
        started = time.monotonic()
        result = step(job, lambda phase: None)
        seconds.append(time.monotonic() - started)
        uri = result.lora_uri
        assert result.metadata is not None
        assert result.metadata.tokens_processed == 64
        print(f"step {number}: {seconds[-1]:.2f} s {result.timings}")
    record_property("warm_step_seconds", min(seconds[1:]))
    assert min(seconds[1:]) < 10
