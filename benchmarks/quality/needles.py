"""Needles: facts hidden in a haystack, and the questions that ask for them.

Needles that share their wording look for one another: the document's own queries then find what only a question should,
and a policy that scores by such queries looks better than it is. `worded` has needles that share no words.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from benchmarks.quality import texts
from benchmarks.quality.questions import CountTokens, Made, Question, fit, repeat


@dataclass(frozen=True)
class Wording:
    """How a fact is told, asked for, and its answer begun, with `{key}` and `{value}` left open."""

    needle: str
    question: str
    prefix: str


WORDINGS = (
    Wording(
        "The secret number of {key} is {value}.",
        "What is the secret number of {key} that the text above mentions?",
        "The secret number of {key} that the text above mentions is",
    ),
    Wording(
        "Anyone who wants to telephone {key} dials {value} first.",
        "What does anyone who wants to telephone {key} dial first?",
        "Anyone who wants to telephone {key} dials",
    ),
    Wording(
        "Our warehouse holds {value} crates from {key}.",
        "How many crates from {key} does our warehouse hold?",
        "Of the crates from {key} our warehouse holds",
    ),
    Wording(
        "Last winter, ticket {value} went to {key}.",
        "Which ticket went to {key} last winter?",
        "The one that went to {key} last winter was ticket",
    ),
)
"""Values stand after their keys and before them; no two wordings share a word that means something."""


def worded(rng: random.Random, tokens: int, count: CountTokens) -> Made:
    """One needle of each wording, hidden in an essay; any of them can be asked for."""
    facts = [{"key": key, "value": texts.number(rng)} for key in texts.keys(rng, len(WORDINGS))]
    needles = [wording.needle.format(**fact) for wording, fact in zip(WORDINGS, facts, strict=True)]
    intro = "The text below mentions a few odd facts. Read it with care: you will be asked about them.\n\n"
    hay, room = texts.essay(rng), tokens - count(intro) - sum(count(" " + needle) for needle in needles)
    questions = [
        Question(w.question.format(**fact), w.prefix.format(**fact), f" {fact['value']}", (fact["value"],))
        for w, fact in zip(WORDINGS, facts, strict=True)
    ]
    return intro + _hide(rng, needles, hay[: fit(hay, room, count)]), questions


def alike(rng: random.Random, tokens: int, count: CountTokens, **kind: object) -> Made:
    """Needles in a haystack: `ruler.TASKS` has the kinds."""
    haystack, value_kind = kind["haystack"], kind["value"]
    num_keys, num_values, ask_all = kind.get("keys", 1), kind.get("values", 1), kind.get("ask_all", False)
    make_value = texts.uuid if value_kind == "uuid" else texts.number
    noun = "code" if value_kind == "uuid" else "number"
    intro = f"The text below hides some secret {noun}s. Read it with care: you will be asked about them.\n\n"

    def line(key: str, value: str) -> str:
        return f"The secret {noun} of {key} is {value}."

    if haystack == "needles":
        make_key = texts.uuid if kind.get("key") == "uuid" else None
        names = [make_key(rng) for _ in range(400)] if make_key else texts.keys(rng, 400)
        pairs = [(name, (make_value(rng),)) for name in names]
        sentences = [line(name, values[0]) for name, values in pairs]
        kept = fit(sentences, tokens - count(intro), count)
        text, asked = " ".join(sentences[:kept]), rng.sample(pairs[:kept], min(4, kept))
    else:
        pairs = [
            (name, tuple(make_value(rng) for _ in range(int(str(num_values)))))
            for name in texts.keys(rng, int(str(num_keys)))
        ]
        needles = [line(name, value) for name, values in pairs for value in values]
        hay = texts.essay(rng) if haystack == "essay" else repeat(texts.NOISE, tokens)
        room = tokens - count(intro) - sum(count(" " + needle) for needle in needles)
        text, asked = _hide(rng, needles, hay[: fit(hay, room, count)]), pairs
    if ask_all:
        names = ", ".join(name for name, _ in asked[:-1]) + f" and {asked[-1][0]}"
        gold = ", ".join(values[0] for _, values in asked)
        question = Question(
            f"What are the secret {noun}s of {names} that the text above mentions?",
            f"The secret {noun}s of {names} that the text above mentions are",
            f" {gold}",
            tuple(values[0] for _, values in asked),
        )
        return intro + text, [question]
    plural = f"{noun}s" if int(str(num_values)) > 1 else noun
    verb, ask = ("are", "What are all") if int(str(num_values)) > 1 else ("is", "What is")
    return intro + text, [
        Question(
            f"{ask} the secret {plural} of {name} that the text above mentions?",
            f"The secret {plural} of {name} that the text above mentions {verb}",
            f" {', '.join(values)}",
            values,
        )
        for name, values in asked
    ]


def _hide(rng: random.Random, needles: Sequence[str], hay: Sequence[str]) -> str:
    """Put the needles, in random order, at different random places between sentences."""
    places = sorted(rng.sample(range(len(hay) + 1), len(needles)), reverse=True)
    sentences = list(hay)
    for place, needle in zip(places, rng.sample(list(needles), len(needles)), strict=True):
        sentences.insert(place, needle)
    return " ".join(sentences)
