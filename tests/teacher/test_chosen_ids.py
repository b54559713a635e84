"""The ids that the worker chooses, scored by an engine that gathers them: `spec.teacher.support: student`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import models
from claas_crds.adapter import Lora
from claas_store.create import create_adapter
from claas_store.version import read_version
from claas_teacher.client import TeacherClient
from claas_teacher.errors import TeacherRefused
from claas_worker.score import Question, Scorer
from claas_worker.student import Context, Student
from vllmserver import SMOLLM2_FLAGS, TeacherServer, chosen_ids_environment, vllm_server

pytestmark = [pytest.mark.vllm, pytest.mark.stress, pytest.mark.timeout(600)]
TOLERANCE = 1e-4
WIDTH = 7


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TeacherServer]:
    folder = tmp_path_factory.mktemp("chosen")
    environment = chosen_ids_environment(folder)
    with vllm_server(models.smollm2_dir(), *SMOLLM2_FLAGS, log=folder / "log", environment=environment) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: TeacherServer) -> Iterator[TeacherClient]:
    with TeacherClient(server.url) as running:
        yield running


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(models.smollm2_dir(), dtype=torch.float32).eval()


def rows(model: Any, prompt: list[int], response: list[int]) -> np.ndarray:
    """(N, V) log-softmax of a forward pass on the response's rows."""
    with torch.inference_mode():
        logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1]
    return np.asarray(logits.log_softmax(-1))


def test_it_says_that_it_can(client: TeacherClient) -> None:
    assert client.info().chosen_ids


def test_chosen_ids_have_the_forward_passs_logprobs(client: TeacherClient, model: Any) -> None:
    rng = np.random.default_rng(0)
    asked = [([5, 6, 7], [50, 60]), (list(range(100, 240)), list(range(1000, 1100))), ([9], [11])]  # over one step, too
    chosen = [rng.permuted(np.tile(np.arange(200, 40_000), (len(y), 1)), axis=1)[:, :WIDTH] for _, y in asked]
    chosen[0][1, 4:] = -1  # fewer at one position
    chosen[1][7, 3] = asked[1][1][7]  # the response's own token among them
    chosen[1][8, 3] = chosen[1][8, 2]  # one of them twice

    found = client.score_batch(asked, WIDTH, chosen=[ids.tolist() for ids in chosen])

    for (prompt, response), ids, scores in zip(asked, chosen, found, strict=True):
        expected = rows(model, prompt, response)
        np.testing.assert_allclose(scores.chosen, expected[np.arange(len(response)), response], atol=TOLERANCE, rtol=0)
        for t, token in enumerate(response):
            real = scores.ids[t] >= 0
            assert set(scores.ids[t][real].tolist()) == {token, *ids[t][ids[t] >= 0].tolist()}
            assert len(set(scores.ids[t][real].tolist())) == real.sum(), "each id once"
            np.testing.assert_allclose(
                scores.logprobs[t][real], expected[t][scores.ids[t][real]], atol=TOLERANCE, rtol=0
            )
            tail = 1 - np.exp(expected[t][scores.ids[t][real]]).sum()
            np.testing.assert_allclose(scores.tail[t], tail, atol=TOLERANCE)


def test_top_k_is_still_to_be_had(client: TeacherClient, model: Any) -> None:
    prompt, response = list(range(100, 240)), [50, 60, 70]
    (scores,) = client.score_batch([(prompt, response)], 20)
    expected = rows(model, prompt, response)
    for t, token in enumerate(response):
        real = scores.ids[t] >= 0
        assert set(scores.ids[t][real].tolist()) == {token, *np.argsort(-expected[t])[:20].tolist()}
        np.testing.assert_allclose(scores.logprobs[t][real], expected[t][scores.ids[t][real]], atol=TOLERANCE, rtol=0)


def test_an_id_outside_the_vocabulary_is_refused(client: TeacherClient) -> None:
    with pytest.raises(TeacherRefused, match="outside"):
        client.score_batch([([5], [6])], 2, chosen=[[[1, 10**6]]])


def test_the_worker_takes_the_students_top_k(
    client: TeacherClient, model: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CLAAS_FILE_ROOTS", str(tmp_path))
    uri = create_adapter(f"file://{tmp_path}/a/", "smollm2", models.smollm2_dir(), Lora(), "0b6c7d6e").uri
    version = read_version(uri)
    student = Student.load(models.smollm2_dir(), base_model="smollm2", device="cpu", threads=2)
    resident = student.bank.add("a", version.config, version.tensors)
    short, long, response = [500, 600, 700], [500, 600, 700, 900], [1000, 1001]
    question = Question(Context(short, response), Context(long, response))

    (scored,), _ = Scorer(student, client).server([question], 5, resident)

    students, teachers = rows(model, short, response), rows(model, long, response)
    for t, token in enumerate(response):
        ids, logprobs = scored.support_ids[t].numpy(), scored.logprobs[t].numpy()
        real = ids >= 0
        assert set(ids[real].tolist()) == {token, *np.argsort(-students[t])[:5].tolist()}, "by the student's context"
        np.testing.assert_allclose(logprobs[real], teachers[t][ids[real]], atol=TOLERANCE, rtol=0)
