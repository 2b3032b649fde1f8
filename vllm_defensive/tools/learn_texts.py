"""What a score is learned from: the user's texts, or what every Python has and what the model itself writes.

All of it is the same each time for the same seed, model and Python.
"""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
import sysconfig
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

_OPEN: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".xz": lzma.open, ".bz2": bz2.open}
_FIELDS = ("text", "context")
_CHUNK = 8
"""Characters of a document that are encoded at once, for each token of a text: fewer make a token in most languages."""

DEFAULTS = ("pydoc_data.topics", "Python's standard library", "the model's own writing")
KINDS = ("prose", "written", "code", "chat")
_BEGINNINGS = ("The", "In", "A", "I", "It was", "1.", "#", "How", "When", "def", "This is", "There", "To", "If", '"')
_REQUESTS = (
    "Tell me a story.",
    "Explain how something works.",
    "Write a program.",
    "Describe a place.",
    "Make a list.",
    "Write a letter.",
    "What happened next?",
    "Compare two things.",
)


class Encoder:
    """A tokenizer, asked for what comes first in every prompt once only."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        with_start, without = tokenizer.encode("a"), self.encode("a")
        count = len(with_start) - len(without)
        self.start: list[int] = list(with_start[:count]) if with_start[count:] == without else []

    def encode(self, text: str) -> list[int]:
        """Without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def turn(self, message: str) -> tuple[list[int], list[int]] | None:
        """What comes before and behind a user's message where the model is to answer, or None: it has no template
        that shows the message as it is."""
        mark = "\x00"
        try:
            shown = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": mark}], add_generation_prompt=True, tokenize=False
            )
        except Exception:  # no template, or one that wants something else; a template is a program
            return None
        before, found, behind = shown.partition(mark)
        return (self.encode(before + message), self.encode(behind)) if found else None


# -- the user's own ---------------------------------------------------------------------------------------------------


def read(path: str) -> list[str]:
    """A file's texts: one, or of `.jsonl` one a line; `.gz`, `.xz` and `.bz2` are unpacked. ValueError: one line."""
    suffixes = Path(path).suffixes
    packed = bool(suffixes) and suffixes[-1] in _OPEN
    try:
        with (_OPEN[suffixes[-1]] if packed else open)(path, "rt", encoding="utf-8") as file:
            whole = file.read()
    except (OSError, EOFError, UnicodeDecodeError, lzma.LZMAError, zlib.error) as error:
        raise ValueError(f"--texts {path}: {getattr(error, 'strerror', None) or error}") from None
    if (suffixes[:-1] if packed else suffixes)[-1:] != [".jsonl"]:
        return [whole]
    return [_text_of(line, f"--texts {path}: line {i}") for i, line in enumerate(whole.split("\n"), 1) if line.strip()]


def _text_of(line: str, where: str) -> str:
    try:
        row = json.loads(line)
    except json.JSONDecodeError:
        raise ValueError(f"{where} is not JSON") from None
    found = [row[field] for field in _FIELDS if isinstance(row.get(field), str)] if isinstance(row, dict) else []
    if not found:
        raise ValueError(f"{where} has none of the fields {', '.join(_FIELDS)}")
    return str(found[0])


def cut(documents: Sequence[str], encoder: Encoder, length: int, rng: random.Random) -> Iterator[list[int]]:
    """Texts of `length` tokens: one of each document in turn, as long as any has more, each from anywhere in it."""
    waiting = [_cut(document, encoder, length, rng) for document in rng.sample(documents, len(documents))]
    while waiting:
        further = []
        for texts in waiting:
            if (text := next(texts, None)) is not None:
                yield text
                further.append(texts)
        waiting = further


def _cut(document: str, encoder: Encoder, length: int, rng: random.Random) -> Iterator[list[int]]:
    size = length - len(encoder.start)
    begins = list(range(0, len(document), _CHUNK * length))
    for begin in rng.sample(begins, len(begins)):
        tokens = encoder.encode(document[begin : begin + _CHUNK * length])
        for i in range(0, len(tokens) - size + 1, size):
            yield encoder.start + tokens[i : i + size]


# -- what is there without any ----------------------------------------------------------------------------------------


def prose(rng: random.Random) -> list[str]:
    """Python's reference documentation: paragraphs of running text, its topics in any order."""
    from pydoc_data.topics import topics

    names = rng.sample(sorted(topics), len(topics))
    paragraphs = (" ".join(each.split()) for name in names for each in topics[name].split("\n\n"))
    once = dict.fromkeys(each for each in paragraphs if len(each) > 120 and each.endswith("."))
    return ["\n\n".join(once)]


def code() -> list[str]:
    """Modules of the standard library, with their docstrings; none where they are not there as sources."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return [file.read_text(encoding="utf-8", errors="replace") for file in files]


def beginning(kind: str, number: int, encoder: Encoder) -> list[int]:
    """What the model's own text of this kind and number begins with: a word or two, or a user's message of a few."""
    if kind == "chat" and (turn := encoder.turn(_REQUESTS[number % len(_REQUESTS)])) is not None:
        return turn[0] + turn[1]
    return encoder.start + encoder.encode(_BEGINNINGS[number % len(_BEGINNINGS)])


def kind_of(number: int) -> str:
    """Of a default text. Every tenth is held back: of each ten, another kind."""
    return KINDS[(number + number // 10) % len(KINDS)]


def defaults(
    encoder: Encoder, length: int, count: int, seed: int, write: Callable[[list[list[int]]], list[list[int]]]
) -> list[list[int]]:
    """At most `count` texts of `length` tokens, half of them Python's and half the model's own.

    write: goes on from each of these beginnings, up to `length` tokens.
    """
    rng = random.Random(seed)
    kinds = [kind_of(i) for i in range(count)]
    own = [i for i, kind in enumerate(kinds) if kind in ("written", "chat")]
    texts = dict(zip(own, write([beginning(kinds[i], i // 2, encoder) for i in own]), strict=True))
    found = {"prose": cut(prose(rng), encoder, length, rng), "code": cut(code(), encoder, length, rng)}
    for i, kind in enumerate(kinds):
        if i not in texts:
            other = found["code" if kind == "prose" else "prose"]
            text = next(found[kind], None) or next(other, None)
            if text is not None:
                texts[i] = text
    return [texts[i] for i in sorted(texts)]


def given(
    paths: Sequence[str], documents: Sequence[str], encoder: Encoder, length: int, count: int, seed: int
) -> list[list[int]]:
    """At most `count` texts of `length` tokens out of documents that were read from these files. ValueError if there
    are no two."""
    texts = [text for text, _ in zip(cut(documents, encoder, length, random.Random(seed)), range(count), strict=False)]
    if len(texts) < 2:
        raise ValueError(
            f"--texts {' '.join(paths)}: no two texts of {length} tokens in it; give longer ones, or a smaller --length"
        )
    return texts
