"""Prompts in which each word is a token: scripted chats, and questions about documents."""

from __future__ import annotations

import random
from dataclasses import dataclass

_TURN = 256  # tokens that an answer and the next question add to a chat
_WORDS = (
    " time",
    " year",
    " people",
    " way",
    " day",
    " man",
    " thing",
    " woman",
    " life",
    " child",
    " world",
    " school",
)
_NUMBER = 4  # words that number a document


def chat_prompts(chats: int, turns: int, last: int, seed: int) -> list[str]:
    """Prompts of all chats' first turn, then of all their second, and so on; `last` words, each a token, in the last.

    Answers are part of the script, so that each row's server is sent the same.
    """
    draw = random.Random(seed)
    texts = ["".join(draw.choices(_WORDS, k=last)) for _ in range(chats)]
    words = [text.split(" ")[1:] for text in texts]
    lengths = [last - (turns - 1 - turn) * _TURN for turn in range(turns)]
    return [" " + " ".join(chat[:length]) for length in lengths for chat in words]


@dataclass(frozen=True)
class Documents:
    """Documents of so many tokens each, and questions about them, `rounds` times as many as documents.

    zipf: None asks about each document in turn; else the n-th is asked about with weight 1 / n ** zipf, and a round is
    as many questions as there are documents.
    """

    count: int
    tokens: int
    question: int
    rounds: int
    zipf: float | None = None

    def __post_init__(self) -> None:
        most = len(_WORDS) ** _NUMBER
        if not 1 <= self.count <= most:
            raise ValueError(f"--documents {self.count}: choose 1 to {most:,}")
        if self.tokens <= _NUMBER:
            raise ValueError(f"--document-tokens {self.tokens}: choose {_NUMBER + 1} or more")
        if self.question < 1 or self.rounds < 1:
            raise ValueError("--question-tokens, --rounds: choose 1 or more")

    def order(self, seed: int) -> list[int]:
        """The document of each question."""
        if self.zipf is None:
            return [i % self.count for i in range(self.count * self.rounds)]
        weights = [1 / rank**self.zipf for rank in range(1, self.count + 1)]
        draw = random.Random(f"order {seed} of {self}")
        return draw.choices(range(self.count), weights, k=self.count * self.rounds)

    def prompts(self, seed: int) -> list[str]:
        """A document and a question each. No two documents begin with the same block, neither those of another seed
        nor those of another load: servers outlive a round, and must not know any of it."""
        draw = random.Random(f"texts {seed} of {self}")
        texts = [_number(i) + "".join(draw.choices(_WORDS, k=self.tokens - _NUMBER)) for i in range(self.count)]
        return [texts[i] + "".join(draw.choices(_WORDS, k=self.question)) for i in self.order(seed)]


def _number(number: int) -> str:
    """So many words that say it, the last digit first."""
    words = ""
    for _ in range(_NUMBER):
        number, digit = divmod(number, len(_WORDS))
        words += _WORDS[digit]
    return words
