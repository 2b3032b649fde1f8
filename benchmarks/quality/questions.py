"""A document and the questions that can be asked about it, and what their makers share. Sizes are in tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

Match = Literal["all", "any"]
CountTokens = Callable[[str], int]


@dataclass(frozen=True)
class Question:
    """text: asked after the document. prefix: how the answer begins, given to the model. gold: how a right answer
    goes on. answers: strings that the answer must contain (all of them, or any)."""

    text: str
    prefix: str
    gold: str
    answers: tuple[str, ...]
    match: Match = "all"


@dataclass(frozen=True)
class Document:
    task: str
    seed: int
    text: str
    questions: tuple[Question, ...]


def score(question: Question, output: str) -> float:
    """RULER's string match: the share of the answers that occur in the output, or whether any does."""
    found = [answer.lower() in output.lower() for answer in question.answers]
    return sum(found) / len(found) if question.match == "all" else float(any(found))


Made = tuple[str, Sequence[Question]]
"""A document's text and its questions, as a task makes them."""


def repeat(sentences: Sequence[str], tokens: int) -> list[str]:
    return list(sentences) * (tokens // len(sentences))


def fit(sentences: Sequence[str], tokens: int, count: CountTokens) -> int:
    """How many leading sentences fit into `tokens` tokens."""
    used = 0
    for index, sentence in enumerate(sentences):
        used += count(" " + sentence)
        if used > tokens:
            return index
    return len(sentences)


def largest(fits: Callable[[int], bool], limit: int) -> int:
    """The largest n in [0, limit] that fits, where fitting is monotone."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low
