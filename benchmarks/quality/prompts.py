"""From documents and questions to token ids, the boundary between the two known to the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.quality.questions import Document, Question

_MARK = "\x00"
MOST_GOLD = 128


@dataclass(frozen=True)
class Prompt:
    """tokens: what the model is given. document: how many of them are the document and all before it. gold: the right
    answer's tokens."""

    tokens: list[int]
    document: int
    gold: list[int]


class Prompts:
    """Chat prompts of one model: document and question in one user turn, the answer begun for the model."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        turn = tokenizer.apply_chat_template(
            [{"role": "user", "content": _MARK}], add_generation_prompt=True, tokenize=False
        )
        self._before, self._after = turn.split(_MARK)

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False)

    def count(self, text: str) -> int:
        return len(self.encode(text))

    def join(self, context: str, question: str, prefix: str) -> tuple[list[int], int]:
        """All tokens of a turn with the answer begun, and how many of them are `context` and what comes before it. The
        two parts are encoded apart, so that all questions share the context's tokens."""
        head = self.encode(f"{self._before}{context}")
        return head + self.encode(f"{question}{self._after}{prefix}"), len(head)

    def ask(self, document: Document, question: Question) -> Prompt:
        """Of a long answer the first tokens are the right ones to force."""
        tokens, boundary = self.join(f"{document.text}\n\n", question.text, question.prefix)
        return Prompt(tokens, boundary, self.encode(question.gold)[:MOST_GOLD])

    def ask_again(self, first: Prompt, answer: list[int], question: Question) -> Prompt:
        """A second turn after the first one's answer."""
        middle = self.encode(f".{self._end_of_turn}{question.text}{self._after}{question.prefix}")
        return Prompt(first.tokens + answer + middle, first.document, self.encode(question.gold))

    @property
    def _end_of_turn(self) -> str:
        """What stands between the end of an answer and the next question, from the template itself."""
        messages = [
            {"role": "user", "content": _MARK},
            {"role": "assistant", "content": _MARK},
            {"role": "user", "content": _MARK},
        ]
        return self._tokenizer.apply_chat_template(messages, tokenize=False).split(_MARK)[2]
