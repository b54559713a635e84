"""What other engines answer when they are asked for the logprobs of a response: `samples[].teacherLogprobs`' shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple


class Row(NamedTuple):
    """One response token as a teacher sees it."""

    token: int
    logprob: float
    top: dict[int, float]  # the likeliest others by id


def floats(rows: Sequence[Row], tokenizer: Any) -> list[float]:
    """The chosen tokens alone."""
    return [row.logprob for row in rows]


def vllm(rows: Sequence[Row], tokenizer: Any) -> list[Any]:
    """vLLM's `prompt_logprobs`, each with the token itself, ranked or not."""
    return [
        {
            str(token): {"logprob": logprob, "rank": rank, "decoded_token": tokenizer.decode([token])}
            for rank, (token, logprob) in enumerate({row.token: row.logprob, **row.top}.items(), 1)
        }
        for row in rows
    ]


def legacy(rows: Sequence[Row], tokenizer: Any) -> dict[str, Any]:
    """OpenAI's legacy completions object with `echo`: texts, no ids."""
    words = [tokenizer.decode([row.token]) for row in rows]
    return {
        "tokens": words,
        "token_logprobs": floats(rows, tokenizer),
        "top_logprobs": [
            {tokenizer.decode([token]): logprob for token, logprob in {row.token: row.logprob, **row.top}.items()}
            for row in rows
        ],
        "text_offset": [sum(map(len, words[:index])) for index in range(len(words))],
    }


def fireworks(rows: Sequence[Row], tokenizer: Any) -> dict[str, Any]:
    """Fireworks' object with `token_ids` and `content`."""
    content = [
        {
            "token": tokenizer.decode([row.token]),
            "token_id": row.token,
            "logprob": row.logprob,
            "top_logprobs": [
                {"token": tokenizer.decode([token]), "token_id": token, "logprob": logprob}
                for token, logprob in row.top.items()
            ],
        }
        for row in rows
    ]
    return {"token_ids": [row.token for row in rows], "content": content}


SHAPES: dict[str, Callable[[Sequence[Row], Any], Any]] = {
    "floats": floats,
    "legacy": legacy,
    "fireworks": fireworks,
    "vllm": vllm,
}
