"""The operator's process on the real API server: the protocol from creation to Complete, and what dies on the way."""

from __future__ import annotations

import pytest

from operatorstage import Stage

pytestmark = pytest.mark.controlplane


def test_a_request_goes_through_and_the_head_moves_before_it_is_complete(stage: Stage) -> None:
    stage.start_operator()
    stage.adapter()
    stage.request("r")
    worker = stage.worker()
    uri = stage.run("r")
    status = stage.complete("r")
    head = stage.see_adapter()["status"]
    assert (status["worker"], status["attempt"], status["loraUri"]) == (worker, 1, uri)
    assert (head["uri"], head["headSeq"], head.get("active")) == (uri, 2, None)
    assert status["metadata"]["tokensProcessed"] == 64
    assert set(status["timings"]) >= {"queueMs", "claimMs", "stepMs"}
    assert {c["type"]: c["status"] for c in head["conditions"]} == {"Updating": "False", "Ready": "True"}
