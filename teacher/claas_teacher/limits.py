"""What one teacher can score, checked by the same words on both sides: before a sample is sent, and when it arrives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from claas_teacher.errors import TeacherRefused
from claas_teacher.wire import Sample


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds of a teacher; None where it does not say (a stock vLLM), and then it is the server that refuses."""

    max_model_len: int | None
    max_logprobs: int | None
    vocab_size: int | None
    request_tokens: int | None = None  # prompt and response tokens of one request


def check(samples: Sequence[Sample], width: int, limits: Limits) -> None:
    """Refuse what this teacher cannot score, in words that name the bound.

    Args:
        width: K, or the number of chosen ids a position.

    Raises:
        TeacherRefused: with the reason.
    """
    most = limits.max_logprobs
    if width < 1 or (most is not None and width > most):
        up_to = f"1 to {most}" if most is not None else "at least 1"
        raise TeacherRefused(
            f"training.teacherTopK is {width}, the teacher gives {up_to}: lower it, or start the teacher with a "
            "larger --max-logprobs",
            "InvalidSpec",
        )
    for number, sample in enumerate(samples):
        _check_sample(sample, limits, f"samples[{number}]: ")


def _check_sample(sample: Sample, limits: Limits, where: str) -> None:
    prompt, response = len(sample.prompt), len(sample.response)
    if not response:
        raise TeacherRefused(f"{where}the response has no tokens", "EmptyResponse")
    if not prompt:
        raise TeacherRefused(f"{where}the prompt has no tokens: the first response token has nothing to follow")
    rooms = [limits.max_model_len - 1] if limits.max_model_len is not None else []  # vLLM generates one token
    rooms += [limits.request_tokens] if limits.request_tokens is not None else []
    if rooms and prompt + response > min(rooms):
        raise TeacherRefused(
            f"{where}{prompt} prompt and {response} response tokens do not fit the teacher's {min(rooms)}",
            "PromptTooLong" if response < min(rooms) else "ResponseTooLong",
        )
    lowest = min(sample.prompt.min(), sample.response.min())
    highest = max(sample.prompt.max(), sample.response.max())
    if sample.chosen is not None:
        highest = max(highest, sample.chosen.max())
        lowest = min(lowest, sample.chosen.min() + 1)  # -1 is padding there
    if lowest < 0 or (limits.vocab_size is not None and highest >= limits.vocab_size):
        of = f"of {limits.vocab_size}" if limits.vocab_size is not None else "(they begin at 0)"
        raise TeacherRefused(f"{where}a token id is outside the teacher's vocabulary {of}", "TokenizerMismatch")
