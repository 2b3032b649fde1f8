"""Texts that are forced as answers: running ones, and such as tell facts and ask for them later."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, zip_longest
from pathlib import Path

from benchmarks.quality import texts
from benchmarks.quality.files import LONGBENCH, read
from benchmarks.quality.needles import WORDINGS

PROSE, NEEDLES = "prose", "needles"
SUITES = (PROSE, LONGBENCH, NEEDLES)
FACTS = 2 * len(WORDINGS)
Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Asked:
    """A fact that the answer tells and asks for later. told: where it is told in the answer. first, last: the value's
    tokens, where it is asked for, are those from `first` to before `last`."""

    told: int
    first: int
    last: int


@dataclass(frozen=True)
class ForcedText:
    """A prompt and the answer that is forced behind it, both tokens."""

    name: str
    prompt: list[int]
    answer: list[int]
    asked: tuple[Asked, ...] = ()


def prose(seed: int, prompt: int, answer: int, encode: Encode) -> ForcedText:
    """Documentation, from a random paragraph on."""
    tokens = encode(texts.running_text(random.Random(f"answers/{PROSE}/{seed}"), 8 * (prompt + answer)))
    return ForcedText(f"{PROSE}/{seed}", tokens[:prompt], tokens[prompt : prompt + answer])


def longbench(folder: Path, prompt: int, answer: int, encode: Encode) -> Iterator[ForcedText]:
    """The beginnings of LongBench-E's documents that are long enough, of its tasks in turn."""
    by_task: dict[str, list[str]] = {}
    for sample in read(folder, LONGBENCH):
        by_task.setdefault(sample["dataset"], []).append(sample["context"])
    in_turn = (context for context in chain(*zip_longest(*by_task.values())) if context is not None)
    long_enough = (tokens for tokens in map(encode, in_turn) if len(tokens) >= prompt + answer)
    for number, tokens in enumerate(long_enough):
        yield ForcedText(f"{LONGBENCH}/{number}", tokens[:prompt], tokens[prompt : prompt + answer])


def needles(seed: int, prompt: int, answer: int, encode: Encode) -> ForcedText:
    """An essay, in the first half of whose generated part facts are told; all are asked for at its end.

    Nothing in the prompt says that there will be any, as nothing does where a model takes notes of its own.
    """
    rng = random.Random(f"answers/{NEEDLES}/{seed}")
    facts = [{"key": key, "value": texts.number(rng)} for key in texts.keys(rng, FACTS)]
    worded = list(zip(WORDINGS * (FACTS // len(WORDINGS)), facts, strict=True))
    told = [encode(" " + wording.needle.format(**fact)) for wording, fact in worded]
    asked = [
        (encode(f"\n\n{wording.question} {wording.prefix}".format(**fact)), encode(f" {fact['value']}"))
        for wording, fact in worded
    ]
    room = answer - sum(map(len, told)) - sum(len(question) + len(value) for question, value in asked)
    if room < answer // 4:
        raise ValueError(f"an answer of {answer} tokens: choose a longer one, {FACTS} facts leave {room} for the essay")
    sentences = _cut((encode(" " + sentence) for sentence in texts.essay(rng)), prompt, room)
    before = next(sentences)
    hay = list(sentences)
    places = sorted(rng.sample(range(1, len(hay) // 2), FACTS))
    tokens, found_at = [], {}
    for place, sentence in enumerate(hay):
        if place in places:
            fact_number = places.index(place)
            found_at[fact_number] = len(tokens)
            tokens += told[fact_number]
        tokens += sentence
    found = []
    for number in rng.sample(range(FACTS), FACTS):
        question, value = asked[number]
        first = len(tokens) + len(question)
        found.append(Asked(found_at[number], first, first + len(value)))
        tokens += question + value
    return ForcedText(f"{NEEDLES}/{seed}", before, tokens, tuple(found))


def _cut(sentences: Iterator[list[int]], prompt: int, room: int) -> Iterator[list[int]]:
    """The first `prompt` tokens of these sentences, then what is left of the last of them, and others, `room` tokens in
    all."""
    before: list[int] = []
    while len(before) < prompt:
        before += next(sentences)
    yield before[:prompt]
    for sentence in chain([before[prompt:]], sentences):
        if room <= 0:
            return
        yield sentence[:room]
        room -= len(sentence)


def forced_texts(
    suites: list[str], count: int, prompt: int, answer: int, encode: Encode, data: Path | None
) -> Iterator[ForcedText]:
    """Number by number, so that a run that is stopped early has some of each suite. ValueError: no such text."""
    files = longbench(data, prompt, answer, encode) if data is not None else iter(())
    for number in range(count):
        for suite in suites:
            if suite == LONGBENCH:
                yield from islice(files, 1)
            elif suite == PROSE:
                yield prose(number, prompt, answer, encode)
            else:
                yield needles(number, prompt, answer, encode)
