"""Scoring with vLLM's engine: ids in, numpy rows out. vLLM is imported only where it is used.

vLLM carries prompt logprobs as tensors from the GPU to the server's process, and there makes a Python object of every
number (`LogprobsProcessor`: 25 ms for 1,024 x 101, a fifth of a 32B's prefill). For our own requests `keep_tensors`
keeps the tensors instead. Where a version of vLLM has not the parts for that, its `flat_logprobs` are read: lists of
numbers, no dicts; the values are the same.
"""

from __future__ import annotations

import uuid
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from claas_teacher.errors import TeacherAnswerInvalid
from claas_teacher.scores import Scores, canonical, without_repetitions
from claas_teacher.wire import Sample

REQUEST_PREFIX = "claas-"


class Engine:
    """As much of vLLM's engine client as a scoring needs.

    Attributes:
        arrays: whether tensors are kept; the warm-up may find out that they are not.
        chosen_ids: whether chosen ids can be scored: `prompt_logprob_token_ids`, vLLM >= 0.32 with the V2 runner.
    """

    def __init__(self, client: Any) -> None:
        self.client = client
        self.arrays = keep_tensors(client)
        self.chosen_ids = can_score_chosen_ids(client)

    @property
    def dead(self) -> bool:
        """Whether the engine's process is gone; vLLM's server then ends by itself within seconds."""
        return bool(self.client.errored)

    async def score(self, sample: Sample, width: int) -> Scores:
        """The scores of one response; cancelling this aborts the request in the engine.

        Raises:
            TeacherAnswerInvalid: the engine gave rows of another shape.
            TeacherNonFinite: NaN or a logprob above zero.
        """
        ids = np.concatenate([sample.prompt, sample.response]).tolist()
        (prompt,) = await self.client.renderer.render_cmpl_async([{"prompt_token_ids": ids}])
        final: Any = None
        async for output in self.client.generate(
            prompt, self._parameters(sample, width), f"{REQUEST_PREFIX}{uuid.uuid4()}"
        ):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise TeacherAnswerInvalid("the engine answered without prompt logprobs")
        p, n = len(sample.prompt), len(sample.response)
        if sample.chosen is None:
            return canonical(*response_rows(final.prompt_logprobs, p, n, width))
        own_ids, own_logprobs = response_rows(final.prompt_logprobs, p, n, 0)
        logprobs = np.asarray(final.prompt_token_id_logprobs)
        if logprobs.shape != (n, width):
            raise TeacherAnswerInvalid(f"the engine scored chosen ids of shape {logprobs.shape}, not {(n, width)}")
        return canonical(
            np.concatenate([own_ids, without_repetitions(sample.chosen)], axis=1),
            np.concatenate([own_logprobs, logprobs], axis=1),
        )

    def _parameters(self, sample: Sample, width: int) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        # Chosen ids: 0 logprobs beside them are the response's own tokens.
        chosen: dict[str, Any] = {}
        if sample.chosen is not None:
            chosen = {
                "prompt_logprob_token_ids": np.ascontiguousarray(sample.chosen),
                "prompt_logprob_start": len(sample.prompt) - 1,  # the row that predicts the first response token
            }
        return SamplingParams(
            max_tokens=1,  # the least that vLLM takes
            temperature=0,
            prompt_logprobs=width if sample.chosen is None else 0,
            flat_logprobs=True,
            detokenize=False,
            output_kind=RequestOutputKind.FINAL_ONLY,
            **chosen,
        )


def keep_tensors(client: Any) -> bool:
    """Have the engine client hand out the tensors of our requests' prompt logprobs; False where it cannot.

    A request's `LogprobsProcessor` is made in `OutputProcessor.add_request`, in this process and before the engine
    hears of the request; there, and for our requests alone, the method that would turn tensors into Python is replaced.
    """
    processor: Any = getattr(client, "output_processor", None)
    add, states = getattr(processor, "add_request", None), getattr(processor, "request_states", None)
    if add is None or states is None:
        return False

    def add_request(request: Any, *arguments: Any, **named: Any) -> None:
        add(request, *arguments, **named)
        if str(getattr(request, "external_req_id", None) or request.request_id).startswith(REQUEST_PREFIX):
            logprobs: Any = getattr(states.get(request.request_id), "logprobs_processor", None)
            if hasattr(logprobs, "_update_prompt_logprobs"):
                logprobs._update_prompt_logprobs = partial(_keep, logprobs)

    processor.add_request = add_request
    return True


def _keep(processor: Any, tensors: Any) -> None:
    """Instead of `LogprobsProcessor._update_prompt_logprobs`: called once, with all of the prompt's rows."""
    processor.prompt_logprobs = tensors


def can_score_chosen_ids(client: Any) -> bool:
    """Whether this engine gathers chosen ids: the parameter exists and the V2 model runner runs."""
    from vllm import SamplingParams

    fields = getattr(SamplingParams, "__struct_fields__", ())
    return "prompt_logprob_token_ids" in fields and bool(getattr(client.vllm_config, "use_v2_model_runner", False))


def response_rows(
    prompt_logprobs: Any, prompt_tokens: int, rows: int, k: int
) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Ids and logprobs (N, K+1) of the response, each row's own token first, from either of vLLM's forms.

    Tensors have a row for every token but the first; flat logprobs have an empty one for that, too.

    Raises:
        TeacherAnswerInvalid: other rows than were asked for.
    """
    if hasattr(prompt_logprobs, "logprob_token_ids"):
        all_ids, all_logprobs = (
            np.asarray(prompt_logprobs.logprob_token_ids),
            np.asarray(prompt_logprobs.logprobs),
        )
        if all_ids.shape != (prompt_tokens + rows - 1, k + 1) or all_logprobs.shape != all_ids.shape:
            raise TeacherAnswerInvalid(f"the engine's rows are {all_ids.shape}")
        return all_ids[prompt_tokens - 1 :], all_logprobs[prompt_tokens - 1 :]
    starts, ends = prompt_logprobs.start_indices, prompt_logprobs.end_indices
    if len(starts) != prompt_tokens + rows or ends[-1] - starts[prompt_tokens] != rows * (k + 1):
        raise TeacherAnswerInvalid(f"the engine's rows are {len(starts)}")
    part = slice(starts[prompt_tokens], ends[-1])
    ids = np.array(prompt_logprobs.token_ids[part], np.int64).reshape(rows, k + 1)
    return ids, np.array(prompt_logprobs.logprobs[part], np.float32).reshape(rows, k + 1)
