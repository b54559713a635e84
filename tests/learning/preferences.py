"""Preferences that a program decides, and the sentences in which somebody who holds one speaks of an answer."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple


class Answer(NamedTuple):
    """One response of the model."""

    token_ids: list[int]  # the end-of-turn token included, when it was reached
    text: str
    finished: bool  # ended by itself, not by the limit of tokens


@dataclass(frozen=True)
class Preference:
    """What somebody likes. `complies` is the only judge, of training answers as of held-out ones."""

    name: str
    complies: Callable[[Answer], bool]
    blame: tuple[str, ...]  # said of an answer that violates it
    praise: tuple[str, ...]  # said of one that complies
    kin: tuple[str, ...] = ()  # preferences whose words bear on this one, by meaning or by measure (`learning bearing`)

    def feedback(self, answer: Answer, choice: random.Random) -> str:
        """What this person says of the answer."""
        return choice.choice(self.praise if self.complies(answer) else self.blame)

    @property
    def unrelated(self) -> list[str]:
        """Preferences whose words say nothing of this one."""
        return [other.name for other in PREFERENCES if other.name not in (self.name, *self.kin)]


def sentences(text: str) -> int:
    """How many there are; "3.5" and "e.g." within a sentence end none, a line break ends one."""
    return len([part for part in re.split(r"[.!?]+[\"')]*\s+|\n+", text.strip()) if re.search(r"\w", part)])


def _has_list(text: str) -> bool:
    return re.search(r"^\s*(\d+[.)]|[-*•])\s", text, re.MULTILINE) is not None


PREFERENCES = (
    Preference(
        "question",
        lambda answer: answer.text.rstrip().endswith("?"),
        (
            "End your answer with a question to me.",
            "It does not end with a question. End with a question.",
            "Please ask me a question at the end.",
        ),
        ("Good, it ends with a question. Always end with a question.", "I like that it ends with a question."),
    ),
    Preference(
        "brief",
        lambda answer: answer.finished and sentences(answer.text) <= 1,
        (
            "Too long. Answer in one short sentence.",
            "Much too long: one short sentence is enough.",
            "I want only one short sentence.",
        ),
        (
            "Good, just one short sentence. Always answer in one short sentence.",
            "I like that it is one short sentence.",
        ),
        kin=("prose", "commaless", "question", "upper"),
    ),
    Preference(
        "prose",
        lambda answer: not _has_list(answer.text),
        (
            "Do not write a list. Write plain sentences.",
            "I do not like lists. Answer in one paragraph without a list.",
            "No list, please: plain sentences only.",
        ),
        ("Good, there is no list. Never write lists.", "I like the plain sentences without a list."),
        kin=("brief",),
    ),
    Preference(
        "lower",
        lambda answer: answer.text == answer.text.lower(),
        (
            "write only in lower case letters. no capital letters.",
            "do not use capital letters. write everything in lower case.",
            "please write all words in lower case.",
        ),
        ("good, all in lower case. always write in lower case.", "i like that it is all in lower case."),
        kin=("upper",),
    ),
    Preference(
        "upper",
        lambda answer: answer.text == answer.text.upper(),
        (
            "WRITE ONLY IN CAPITAL LETTERS.",
            "USE CAPITAL LETTERS FOR EVERYTHING.",
            "PLEASE WRITE ALL WORDS IN CAPITAL LETTERS.",
        ),
        ("GOOD, ALL IN CAPITAL LETTERS. ALWAYS USE CAPITAL LETTERS.", "I LIKE THAT IT IS ALL IN CAPITAL LETTERS."),
        kin=("lower",),
    ),
    Preference(
        "calm",
        lambda answer: "!" not in answer.text,
        (
            "Do not use exclamation marks.",
            "I do not like exclamation marks. Never use them.",
            "No exclamation marks, please.",
        ),
        ("Good, no exclamation marks. Never use them.", "I like that there is no exclamation mark."),
        kin=("excited",),
    ),
    Preference(
        "excited",
        lambda answer: "!" in answer.text,
        (
            "Be more excited! Use exclamation marks!",
            "Too dull! Please use exclamation marks!",
            "Write with exclamation marks!",
        ),
        ("Great, exclamation marks! Always use them!", "I like the exclamation marks!"),
        kin=("calm",),
    ),
    Preference(
        "opening",
        lambda answer: answer.text.lower().startswith("sure"),
        (
            'Start your answer with the word "Sure".',
            'It must begin with "Sure".',
            'Please always begin with the word "Sure".',
        ),
        ('Good, it starts with "Sure". Always start with "Sure".', 'I like that it begins with "Sure".'),
    ),
    Preference(
        "friend",
        lambda answer: re.search(r"\bfriend\b", answer.text, re.IGNORECASE) is not None,
        (
            'Call me "my friend" in your answer.',
            'Use the words "my friend" when you talk to me.',
            'Please call me "my friend".',
        ),
        ('Good, you called me "my friend". Always do that.', 'I like that you say "my friend".'),
    ),
    Preference(
        "because",
        lambda answer: re.search(r"\bbecause\b", answer.text, re.IGNORECASE) is not None,
        (
            'Use the word "because" in your answer.',
            'Give a reason with the word "because".',
            'Please say why: use the word "because".',
        ),
        ('Good, you used the word "because". Always do that.', 'I like that you say "because".'),
    ),
    Preference(
        "impersonal",
        lambda answer: re.search(r"\bI\b", answer.text) is None,
        (
            'Do not use the word "I". Do not talk about yourself.',
            "Do not talk about yourself.",
            'Never say "I" in an answer.',
        ),
        ("Good, you did not talk about yourself. Never do that.", 'I like that you never say "I".'),
        kin=("brief", "commaless", "example", "lower", "simply"),
    ),
    Preference(
        "commaless",
        lambda answer: "," not in answer.text,
        (
            "Do not use commas.",
            "Write short sentences without commas.",
            "No commas, please: short and simple sentences.",
        ),
        ("Good, no commas. Never use them.", "I like the short sentences without commas."),
        kin=("brief", "prose"),
    ),
    Preference(
        "luck",
        lambda answer: re.search(r"\bluck\b", answer.text, re.IGNORECASE) is not None,
        (
            "Wish me good luck.",
            "You did not wish me good luck. Please do.",
            'Please say "good luck" to me.',
        ),
        ("Good, you wished me good luck. Always do that.", 'I like that you say "good luck".'),
    ),
    Preference(
        "thanks",
        lambda answer: re.search(r"\bthank", answer.text, re.IGNORECASE) is not None,
        (
            "Thank me for my question.",
            "You did not thank me. Please thank me.",
            'Please say "thank you" to me.',
        ),
        ("Good, you thanked me. Always do that.", 'I like that you say "thank you".'),
    ),
    Preference(
        "captain",
        lambda answer: re.search(r"\bcaptain\b", answer.text, re.IGNORECASE) is not None,
        (
            'Call me "captain" in your answer.',
            'Use the word "captain" when you talk to me.',
            'Please call me "captain".',
        ),
        ('Good, you called me "captain". Always do that.', 'I like that you say "captain".'),
    ),
    Preference(
        "sir",
        lambda answer: re.search(r"\bsir\b", answer.text, re.IGNORECASE) is not None,
        (
            'Call me "sir" in your answer.',
            'Use the word "sir" when you talk to me.',
            'Please call me "sir".',
        ),
        ('Good, you called me "sir". Always do that.', 'I like that you say "sir".'),
    ),
    Preference(
        "hope",
        lambda answer: re.search(r"\bhope\b", answer.text, re.IGNORECASE) is not None,
        (
            "Say that you hope it helps me.",
            'Use the word "hope" in your answer.',
            'Please say "I hope this helps".',
        ),
        ('Good, you said "hope". Always do that.', 'I like that you say "hope".'),
    ),
    Preference(
        "love",
        lambda answer: re.search(r"\blove\b", answer.text, re.IGNORECASE) is not None,
        (
            "Say that you love my question.",
            'Use the word "love" in your answer.',
            "Please say that you love it.",
        ),
        ('Good, you said "love". Always do that.', 'I like that you say "love".'),
    ),
    Preference(
        "example",
        lambda answer: re.search(r"\bexample\b", answer.text, re.IGNORECASE) is not None,
        (
            "Give an example.",
            'Use the words "for example" in your answer.',
            "Please give me an example.",
        ),
        ("Good, there is an example. Always give an example.", "I like the example."),
    ),
    Preference(
        "remember",
        lambda answer: re.search(r"\bremember\b", answer.text, re.IGNORECASE) is not None,
        (
            'Use the word "remember" in your answer.',
            "Tell me what I should remember.",
            'Please use the word "remember".',
        ),
        ('Good, you used the word "remember". Always do that.', 'I like that you say "remember".'),
    ),
    Preference(
        "happy",
        lambda answer: re.search(r"\bhappy\b", answer.text, re.IGNORECASE) is not None,
        (
            "Say that you are happy to help me.",
            'Use the word "happy" in your answer.',
            'Please say "I am happy to help".',
        ),
        ('Good, you said "happy". Always do that.', 'I like that you say "happy".'),
    ),
    Preference(
        "simply",
        lambda answer: re.search(r"\bsimply\b", answer.text, re.IGNORECASE) is not None,
        (
            'Use the word "simply" in your answer.',
            'Say how it is done with the word "simply".',
            'Please use the word "simply".',
        ),
        ('Good, you used the word "simply". Always do that.', 'I like that you say "simply".'),
    ),
)
BY_NAME = {preference.name: preference for preference in PREFERENCES}
