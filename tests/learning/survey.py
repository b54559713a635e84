"""Before any training: how often the base complies, and how often once it is shown the feedback.

The second number is what a self-teacher knows: a preference that the hindsight block does not bring out cannot be
learnt from it. So this is where a wording of the block is judged, at a few seconds each.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from claas_crds.request import Sample
from claas_worker import render
from learning.experiment import LIMITS, Settings, World, sample, share
from learning.preferences import PREFERENCES, Preference
from learning.prompts import TRAINED

WORDINGS = {  # (text, closing)
    "person-1": (render.PERSON.text, render.PERSON.closing),
    "bare": ("\n\n{text}", ""),
    "said-then-follow": (
        "\n\nYou answered this before, and I said about your answer:\n\n{text}",
        "\n\nNow answer again and do what I said.",
    ),
    "feedback-colon": ("\n\nFeedback on an earlier answer: {text}", "\n\nAnswer again, following the feedback."),
    "no-closing": ("\n\nSomeone who read an earlier answer to this message said about it:\n\n{text}", ""),
    "feedback-last": ("\n\nAnswer with this feedback on an earlier answer in mind:\n\n{text}", ""),
    "reader-wishes": (
        "\n\nThis is what the reader of an earlier answer said about it, and wishes for the next one:\n\n{text}",
        "\n\nNow answer the message above as the reader wishes.",
    ),
}


@contextmanager
def wording(name: str) -> Iterator[None]:
    """Production's block for people's words, in another wording."""
    before = render.PERSON
    text, closing = WORDINGS[name]
    render.PERSON = dataclasses.replace(before, text=text, closing=closing)
    try:
        yield
    finally:
        render.PERSON = before


def survey(world: World, preference: Preference, settings: Settings, names: list[str]) -> dict[str, Any]:
    """Shares of compliant answers to the training prompts: as it is, and with what was said of each answer."""
    speaker, choice = world.speaker, random.Random(preference.name)
    answers = speaker.respond(
        [speaker.prefix(prompt) for prompt in TRAINED],
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=1,
    )
    said = [preference.feedback(answer, choice) for answer in answers]
    shares: dict[str, Any] = {"preference": preference.name, "base": share(preference, answers)}
    shares["held out"] = share(preference, world.start(settings)[0])
    for name in names:
        with wording(name):
            prefixes = [
                render.render(
                    Sample.model_validate(sample(prompt, answer, feedback)), speaker.tokenizer, LIMITS
                ).prefix_teacher_ids
                for prompt, answer, feedback in zip(TRAINED, answers, said, strict=True)
            ]
        again = speaker.respond(prefixes * 2, temperature=settings.temperature, max_tokens=settings.max_tokens, seed=2)
        shares[name] = share(preference, again)
    return shares


def bearing(world: World, teller: Preference | None, settings: Settings) -> dict[str, Any]:
    """How often answers comply with each preference, once the model is shown the words of one; None: neutral words.

    What the words of one bring out of another has to be known before they can serve as its control.
    """
    speaker, choice = world.speaker, random.Random("bearing")
    answers = speaker.respond(
        [speaker.prefix(prompt) for prompt in TRAINED],
        temperature=settings.temperature,
        max_tokens=settings.max_tokens,
        seed=1,
    )
    prefixes = []
    for draw in range(settings.draws):
        for prompt, answer in zip(TRAINED, answers, strict=True):
            said = teller.feedback(answer, choice) if teller else render.NEUTRAL_WORDS[draw % len(render.NEUTRAL_WORDS)]
            shown = Sample.model_validate(sample(prompt, answer, said))
            prefixes.append(render.render(shown, speaker.tokenizer, LIMITS).prefix_teacher_ids)
    again = speaker.respond(prefixes, temperature=settings.temperature, max_tokens=settings.max_tokens, seed=2)
    shares = {preference.name: share(preference, again) for preference in PREFERENCES}
    return {"words": teller.name if teller else "neutral", "shares": shares, "answers": len(again)}


def kin(records: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Of each preference the others whose words bring it out: beyond three standard errors over neutral words."""
    (neutral,) = (record for record in records if record["words"] == "neutral")
    found = {}
    for name, base in neutral["shares"].items():

        def brings_out(record: Mapping[str, Any], name: str = name, base: float = base) -> bool:
            share, n = record["shares"][name], record["answers"]
            return share - base > 3 * math.sqrt((share * (1 - share) + base * (1 - base)) / n)

        tellers = [record for record in records if record["words"] not in ("neutral", name)]
        found[name] = sorted(record["words"] for record in tellers if brings_out(record))
    return found
