"""Contexts: one sample becomes the token ids that student and teacher are scored on.

    student   [ chat template of the messages, generation prompt              ] [ response ]
    teacher   [ the same, the last user turn extended by a hindsight block    ] [ response ]

Ids are the interface, text is display. The response's ids are made once, apart from any prefix, and follow both: no
merge at the boundary can shift a position, and row `len(prefix) - 1 + t` predicts response token t on either side.

Texts of a sample never become markup. A special token spelled out in a prompt, a response or a feedback ("<|im_end|>")
would end its turn and let the rest speak as another role; here it is cut after its first character, so the tokenizer
sees ordinary text, which decodes to what was written. Text without such spelling gets exactly the ids of
`apply_chat_template`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from claas_crds.request import Sample
from claas_worker.errors import EmptyResponse, PromptTooLong, ResponseTooLong, TokenizerMismatch

CUT_MARK = "\n[...]\n"  # stands where the middle of a feedback or a solution was cut out


@dataclass(frozen=True)
class Block:
    """One part of the hindsight block; a changed wording is another version."""

    id: str
    version: int
    text: str  # {text} is what the sample says
    closing: str  # follows the last part

    @property
    def name(self) -> str:
        """As the manifest records it."""
        return f"{self.id}-{self.version}"


# The paper's wording for a failed attempt, and for a better one (Hübotter et al. 2026, arXiv:2601.20802, Table 2).
ENVIRONMENT = Block(
    "environment",
    1,
    "\n\nThe following is feedback from your unsuccessful earlier attempt:\n\n{text}",
    "\n\nCorrectly solve the original question.",
)
SOLUTION = Block("solution", 1, "\n\nCorrect solution:\n\n{text}", "\n\nCorrectly solve the original question.")
# Ours, for what people say: praise must not read as a failure, nor blame as praise.
PERSON = Block(
    "person",
    1,
    "\n\nSomeone who read an earlier answer to this message said about it:\n\n{text}",
    "\n\nAnswer the message above with this in mind: keep what was liked, change what was not.",
)
# What people say who say nothing in particular: it was read, it was blamed, it was praised. What the teacher makes of
# these is the block's own effect (small models answer more briefly under any block), which `teacher.contrast` removes.
NEUTRAL_WORDS = ("I have read it.", "I do not like it. Change it.", "Good. Always do that.")
NEUTRAL = "neutral-1"


class Limits(NamedTuple):
    """What one sample may hold, in tokens."""

    max_prompt_tokens: int  # either prefix
    max_response_tokens: int
    vocabulary_rows: int | None = None  # of the student's embedding: ids at or beyond it cannot be run


@dataclass(frozen=True)
class Rendered:
    """The ids of one sample. A truncated response holds its first tokens only: no later one bears on their rows."""

    prefix_student_ids: tuple[int, ...]
    prefix_teacher_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    dropped_response_tokens: int  # behind response_ids; logprobs that came with the sample cover them too
    truncated: bool  # the response's end, or the middle of the feedback or the solution, was left out
    template_id: str  # blocks of the teacher's context by name, joined by "+"; "none" without feedback and solution
    # As prefix_teacher_ids, with each of NEUTRAL_WORDS for what a person said; none where no person said anything.
    prefixes_neutral_ids: tuple[tuple[int, ...], ...]


def render(
    sample: Sample,
    tokenizer: Any,
    limits: Limits,
    *,
    truncate_response: Literal["head"] | None = None,
    where: str = "sample",
) -> Rendered:
    """Token ids of both contexts.

    Args:
        tokenizer: of the student, fast, with a chat template.
        truncate_response: "head" keeps the first tokens of a too long response instead of refusing it.
        where: names the sample in errors, for example "samples[2]".

    Raises:
        EmptyResponse, ResponseTooLong, PromptTooLong: see section 6 of the design; a prompt is too long when it does
            not fit even with everything cut out of feedback and solution.
        TokenizerMismatch: the tokenizer ends no turn with a token, or the model lacks a row for `responseTokenIds`.
    """
    markup = _markup(tokenizer)
    response = _response_ids(sample, tokenizer, markup, limits, where)
    kept = response[: limits.max_response_tokens]
    dropped = len(response) - len(kept)
    if dropped and truncate_response != "head":
        raise ResponseTooLong(
            f"{where}.response has {len(response)} tokens, the limit is {limits.max_response_tokens}: "
            "shorten it, or set training.truncateResponse: head"
        )

    messages = (
        [{"role": "user", "content": sample.prompt or ""}]
        if sample.messages is None
        else [{"role": message.role, "content": message.content} for message in sample.messages]
    )
    student = _prefix_ids(messages, tokenizer, markup)
    if len(student) > limits.max_prompt_tokens:
        raise PromptTooLong(
            f"{where}: the prompt has {len(student)} tokens with its chat template, "
            f"the limit is {limits.max_prompt_tokens}: shorten prompt or messages"
        )
    parts = _parts(sample)
    neutral = [
        [(block, words if block is PERSON else text) for block, text in parts]
        for words in NEUTRAL_WORDS
        if any(block is PERSON for block, _ in parts)
    ]

    def shown(characters: int) -> list[tuple[int, ...]]:
        """The teacher's context, and those in which the person says nothing in particular."""
        if not parts:
            return [student]
        return [_prefix_ids(_extended(messages, said, characters), tokenizer, markup) for said in (parts, *neutral)]

    longest = max((len(text) for said in (parts, *neutral) for _, text in said), default=0)
    characters = _most_that_fits(lambda count: max(map(len, shown(count))) <= limits.max_prompt_tokens, longest)
    if characters is None:
        raise PromptTooLong(
            f"{where}: the teacher's prompt exceeds the limit of {limits.max_prompt_tokens} tokens "
            "even with everything cut out of feedback and solution: shorten prompt or messages"
        )
    teacher, *neutrals = shown(characters)
    return Rendered(
        prefix_student_ids=student,
        prefix_teacher_ids=teacher,
        prefixes_neutral_ids=tuple(neutrals),
        response_ids=kept,
        dropped_response_tokens=dropped,
        truncated=dropped > 0 or any(len(text) > characters for _, text in parts),
        template_id="+".join(block.name for block, _ in parts) or "none",
    )


def _parts(sample: Sample) -> list[tuple[Block, str]]:
    """What the teacher is shown, in the paper's order: solution, then feedback. Blank texts say nothing."""
    feedback = PERSON if sample.feedback_source == "Person" else ENVIRONMENT
    given = ((SOLUTION, sample.solution), (feedback, sample.feedback))
    return [(block, text) for block, text in given if text and text.strip()]


def _extended(messages: list[dict[str, str]], parts: list[tuple[Block, str]], characters: int) -> list[dict[str, str]]:
    """The messages with the hindsight block behind the last user turn, each of its texts cut to `characters`."""
    block = "".join(part.text.replace("{text}", _without_middle(text, characters)) for part, text in parts)
    block += parts[-1][0].closing
    users = [index for index, message in enumerate(messages) if message["role"] == "user"]
    last = users[-1] if users else len(messages) - 1
    extended = {**messages[last], "content": messages[last]["content"] + block}
    return [*messages[:last], extended, *messages[last + 1 :]]


def _without_middle(text: str, characters: int) -> str:
    """The first and last characters of a text, `characters` in all, and a mark between them."""
    if len(text) <= characters:
        return text
    head = (characters + 1) // 2
    return text[:head] + CUT_MARK + text[len(text) - (characters - head) :]


def _most_that_fits(fits: Callable[[int], bool], most: int) -> int | None:
    """The largest count in [0, most] that fits, None if not even 0 does; `fits` is tried about log2(most) times."""
    if fits(most):
        return most
    if not fits(0):
        return None
    low, high = 0, most  # fits(low), not fits(high)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


class _Markup(NamedTuple):
    """What a tokenizer's chat template is made of."""

    reserved: re.Pattern[str]  # spellings that a sample's text must not turn into tokens
    end_of_turn_id: int | None


@lru_cache(maxsize=8)
def _markup(tokenizer: Any) -> _Markup:
    """Read off a rendered assistant turn: the end of turn is the added token that follows its content.

    `eos_token` alone would not do: in some families it ends the document and another token ends the turn. Reserved are
    all special tokens, and added tokens that the template itself writes, special or not. Other added tokens, such as
    <think> or <tool_call>, are words that models write and read.
    """
    probe = "probe"
    turns = [{"role": "user", "content": probe}, {"role": "assistant", "content": probe}]
    text: str = tokenizer.apply_chat_template(turns, tokenize=False)
    added = {str(token): (id_, token.special) for id_, token in tokenizer.added_tokens_decoder.items()}
    reserved = [token for token, (_, special) in added.items() if (special or token in text) and len(token) > 1]
    longest_first = sorted(reserved, key=len, reverse=True)
    end = tokenizer.eos_token_id
    after = text[text.rindex(probe) + len(probe) :].lstrip()
    for token in longest_first:
        if after.startswith(token):
            end = added[token][0]
            break
    return _Markup(re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"), end)


def _response_ids(sample: Sample, tokenizer: Any, markup: _Markup, limits: Limits, where: str) -> tuple[int, ...]:
    """The caller's ids as they are; or the text encoded alone, and the end of turn unless it was cut by length."""
    if sample.response_token_ids is not None:
        ids = tuple(sample.response_token_ids)
        if limits.vocabulary_rows is not None and any(not 0 <= id_ < limits.vocabulary_rows for id_ in ids):
            raise TokenizerMismatch(
                f"{where}.responseTokenIds must lie in [0, {limits.vocabulary_rows}), the base model's"
            )
        if not ids:
            raise EmptyResponse(f"{where}.responseTokenIds is empty")
        return ids
    if not sample.response:
        raise EmptyResponse(f"{where}.response is empty")
    ids = tuple(_encode(sample.response, tokenizer, markup))
    if sample.finish_reason == "length":
        return ids
    if markup.end_of_turn_id is None:
        raise TokenizerMismatch(
            "the tokenizer has neither an eos token nor a chat template that ends a turn with a token"
        )
    return (*ids, markup.end_of_turn_id)


def _encode(text: str, tokenizer: Any, markup: _Markup) -> list[int]:
    """Ids of a sample's own text: spelled-out markup stays text."""
    cut = _unused_character([text])
    return _encode_pieces(_disarm(text, markup, cut).split(cut), tokenizer)


def _prefix_ids(messages: list[dict[str, str]], tokenizer: Any, markup: _Markup) -> tuple[int, ...]:
    """Ids of the chat template with the generation prompt. Cuts go through the template as a character of no text."""
    cut = _unused_character([message["content"] for message in messages])
    disarmed = [{**message, "content": _disarm(message["content"], markup, cut)} for message in messages]
    text: str = tokenizer.apply_chat_template(disarmed, tokenize=False, add_generation_prompt=True)
    return tuple(_encode_pieces(text.split(cut), tokenizer))


def _unused_character(texts: list[str]) -> str:
    """A private-use character that none of the texts holds."""
    used = set().union(*texts)
    return next(character for character in map(chr, range(0xF0000, 0xFFFFE)) if character not in used)


def _disarm(text: str, markup: _Markup, cut: str) -> str:
    """The text with `cut` behind the first character of every spelled-out reserved token, overlapping ones included."""
    pieces, start = [], 0
    while found := markup.reserved.search(text, start):
        pieces.append(text[start : found.start() + 1])
        start = found.start() + 1
    return cut.join([*pieces, text[start:]])


def _encode_pieces(pieces: list[str], tokenizer: Any) -> list[int]:
    return [id_ for piece in pieces if piece for id_ in tokenizer(piece, add_special_tokens=False)["input_ids"]]
