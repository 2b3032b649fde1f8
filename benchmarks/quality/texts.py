"""Text for haystacks and for the natural-text protocol: the prose of Python's own reference documentation.

It comes with every Python (`pydoc_data.topics`, PSF-2.0 licence), so nothing has to be downloaded. Its wording changes
a little from one Python version to the next; `fingerprint()` goes into every result.
"""

from __future__ import annotations

import hashlib
import random
import re
from functools import cache

SOURCE = "pydoc_data.topics of the Python standard library, PSF-2.0"

# Said over and over, the plainest haystack; ours, in the manner of RULER's.
NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)

_ADJECTIVES = (
    "amber brave calm clever cosmic crimson dusty eager fancy frozen gentle golden grumpy hidden hollow humble icy "
    "jolly keen lively lonely lucky mellow misty modern noble odd pale polite proud quick quiet rapid rusty shiny "
    "silent silver sleepy snowy solid spicy steady stormy sunny tender tiny vivid warm wild witty"
)
_NOUNS = (
    "anchor apple arrow badger basket beacon bottle bridge button candle canyon castle cherry comet cradle dolphin "
    "dragon engine falcon feather forest garden hammer harbor island jacket kettle ladder lantern lemon magnet "
    "marble meadow mirror monkey needle ocean orchid parrot pepper pillow planet puzzle rabbit ribbon river saddle "
    "salmon shadow shovel spider statue teapot temple thunder tiger tunnel turtle violin walnut"
)


@cache
def topics() -> tuple[str, ...]:
    """The prose of each documentation topic, in a fixed order: whole paragraphs, one line each."""
    from pydoc_data.topics import topics as sources

    kept: set[str] = set()
    found = []
    for name in sorted(sources):
        prose = []
        for raw in sources[name].split("\n\n"):
            paragraph = " ".join(raw.split())
            if _is_prose(paragraph) and paragraph not in kept:
                kept.add(paragraph)
                prose.append(paragraph)
        if prose:
            found.append("\n\n".join(prose))
    return tuple(found)


def _is_prose(paragraph: str) -> bool:
    """Whether a paragraph is running text: not a heading, a table, a grammar rule or a listing."""
    return (
        len(paragraph) > 120
        and paragraph[0].isupper()
        and paragraph[-1] == "."
        and not any(mark in paragraph for mark in ("::", ">>>", "=", "|", "+--"))
    )


@cache
def paragraphs() -> tuple[str, ...]:
    return tuple(paragraph for topic in topics() for paragraph in topic.split("\n\n"))


def essay(rng: random.Random) -> list[str]:
    """All sentences of the documentation, its paragraphs in random order: more than 4,000 tokens need."""
    shuffled = list(paragraphs())
    rng.shuffle(shuffled)
    return [sentence for paragraph in shuffled for sentence in re.split(r"(?<=[.!?]) (?=[A-Z\"])", paragraph)]


def running_text(rng: random.Random, min_characters: int) -> str:
    """Documentation in its own order, from a random paragraph on; wraps around at the end."""
    everything = paragraphs()
    first, chosen = rng.randrange(len(everything)), []
    for index in range(len(everything)):
        chosen.append(everything[(first + index) % len(everything)])
        min_characters -= len(chosen[-1]) + 2
        if min_characters <= 0:
            break
    return "\n\n".join(chosen)


def keys(rng: random.Random, count: int) -> list[str]:
    """Different names such as "misty-anchor"."""
    adjectives, nouns = _ADJECTIVES.split(), _NOUNS.split()
    numbers = rng.sample(range(len(adjectives) * len(nouns)), count)
    return [f"{adjectives[n // len(nouns)]}-{nouns[n % len(nouns)]}" for n in numbers]


def number(rng: random.Random) -> str:
    return str(rng.randrange(1_000_000, 10_000_000))


def uuid(rng: random.Random) -> str:
    digits = f"{rng.getrandbits(128):032x}"
    return "-".join(digits[a:b] for a, b in ((0, 8), (8, 12), (12, 16), (16, 20), (20, 32)))


def fingerprint() -> str:
    """First half of the SHA-256 of all haystack text."""
    return hashlib.sha256("\n".join(paragraphs()).encode()).hexdigest()[:32]
