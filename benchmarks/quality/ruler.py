"""Thirteen tasks with RULER's definitions (arXiv 2404.06654), generated here, word for word our own.

Two more are ours, see `NOT_RULERS`. Sizes are in tokens of the model at hand.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

from benchmarks.quality import needles, texts
from benchmarks.quality.questions import CountTokens, Document, Made, Question, fit, largest, repeat


def generate(task: str, tokens: int, seed: int, count: CountTokens) -> Document:
    """The document of `task` that has about `tokens` tokens, never more. Same arguments, same document."""
    if task not in TASKS:
        raise ValueError(f"task={task!r}: choose one of {', '.join(TASKS)}")
    rng = random.Random(f"{task}/{tokens}/{seed}")
    text, questions = TASKS[task](rng, tokens, count)
    return Document(task, seed, text, tuple(questions))


# -- tracing, counting ------------------------------------------------------------------------------------------------


def _variable_tracking(rng: random.Random, tokens: int, count: CountTokens) -> Made:
    """A chain of assignments hidden in noise; every variable with the first one's value is to be found."""
    names = ["".join(rng.choices("ABCDEFGHIJKLMNOPQRSTUVWXYZ", k=5)) for _ in range(5)]
    value = str(rng.randrange(10_000, 100_000))
    chain = [f"VAR {names[0]} = {value}."] + [f"VAR {b} = VAR {a}." for a, b in itertools.pairwise(names)]
    intro = "Follow the variable assignments that are hidden in the text below.\n\n"
    hay = repeat(texts.NOISE, tokens)
    hay = hay[: fit(hay, tokens - count(intro) - sum(count(" " + link) for link in chain), count)]
    places = sorted(rng.sample(range(len(hay) + 1), len(chain)), reverse=True)
    for place, link in zip(places, reversed(chain), strict=True):  # the chain stays in its order
        hay.insert(place, link)
    question = Question(
        f"Which {len(names)} variables have the value {value}?",
        f"The variables with the value {value} are",
        " " + ", ".join(names),
        tuple(names),
    )
    return intro + " ".join(hay), [question]


def _common_words(rng: random.Random, tokens: int, count: CountTokens) -> Made:
    """A numbered list in which ten words occur often and all others rarely."""
    words = texts.keys(rng, 1500)
    often, rare = (30, 3) if tokens >= 4096 else (10, 1)
    intro = "Below is a numbered list of words. Some words occur more often than the others.\n\n"
    common, others = words[:10], words[10:]

    def listing(num_others: int) -> str:
        chosen = common * often + others[:num_others] * rare
        random.Random(f"{tokens}/{common[0]}").shuffle(chosen)
        return " ".join(f"{index}. {word}" for index, word in enumerate(chosen, 1))

    most = largest(lambda n: count(intro + listing(n)) <= tokens, len(others))
    question = Question(
        "Which 10 words occur most often in the list?",
        "The 10 most common words are:",
        " " + ", ".join(common),
        tuple(common),
    )
    return intro + listing(most), [question]


def _frequent_words(rng: random.Random, tokens: int, count: CountTokens) -> Made:
    """Coded words whose frequencies follow a zeta distribution with exponent 2; the three most frequent are asked."""
    coded = list(dict.fromkeys("".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=6)) for _ in range(200)))
    intro = "Read the coded text below and keep track of how often each coded word occurs.\n\n"
    total = sum(1 / rank**2 for rank in range(1, len(coded) + 1))

    def text(num_words: int) -> str:
        chosen = [w for rank, w in enumerate(coded, 1) for _ in range(round(num_words / rank**2 / total))]
        random.Random(f"{tokens}/{coded[0]}").shuffle(chosen)
        return " ".join(chosen)

    most = largest(lambda n: count(intro + text(n)) <= tokens, tokens)
    question = Question(
        "Which three words occur most often in the coded text?",
        "The three most frequent words are:",
        " " + ", ".join(coded[:3]),
        tuple(coded[:3]),
    )
    return intro + text(most), [question]


# -- questions about passages -----------------------------------------------------------------------------------------

_FIRST = (
    "Ada Bruno Clara Dmitri Elena Felix Greta Hugo Irene Jonas Karin Leo Mara Nils Olga Pavel Rosa Stefan Tilda Viktor"
)
_LAST = (
    "Abbott Brandt Castell Dorsey Eklund Fontaine Garner Holm Ibsen Jarvis Keller Lindqvist Moreau Novak Orlov Paget"
)
_TOWNS = "Aldbury Brackwell Corvane Dunmere Eastholt Farrowby Glenholm Harwick Ivernay Kestrel Lowmoor Marlby Oakford"
_TRADES = "baker carpenter doctor engineer farmer gardener lawyer musician painter pilot sailor teacher weaver writer"
_PETS = "cat dog goat hawk horse lizard owl pony rabbit raven sheep tortoise"


def _passages(rng: random.Random, tokens: int, count: CountTokens, *, hops: int) -> Made:
    """Short lives of invented people. One hop: a fact about a person. Two: a fact about that person's neighbour."""
    names = [f"{first} {last}" for first in _FIRST.split() for last in _LAST.split()]
    rng.shuffle(names)
    towns, trades, pets = _TOWNS.split(), _TRADES.split(), _PETS.split()
    facts = [(rng.choice(towns), rng.choice(trades), rng.choice(pets)) for _ in names]
    intro = "Answer a question about the people in these passages.\n\n"

    def passage(i: int) -> str:
        town, trade, pet = facts[i]
        neighbour = names[i ^ 1]
        return (
            f"Passage {i + 1}: {names[i]} was born in {town} and works as a {trade}. At home there is a {pet}. "
            f"The next house belongs to {neighbour}.\n"
        )

    people = [passage(i) for i in range(len(names))]
    kept = fit(people, tokens - count(intro), count) // 2 * 2
    order = rng.sample(range(kept), kept)
    questions = []
    for i in rng.sample(range(kept), min(4, kept)):
        who = i if hops == 1 else i ^ 1
        town, _trade, _pet = facts[who]
        about = names[i] if hops == 1 else f"the neighbour of {names[i]}"
        questions.append(
            Question(
                f"In which town was {about} born?",
                f"{about[0].upper()}{about[1:]} was born in",
                f" {town}",
                (town,),
                "any",
            )
        )
    return intro + "".join(people[i] for i in order).rstrip(), questions


def _copy(rng: random.Random, tokens: int, count: CountTokens) -> Made:
    """Repeat a sentence of the text word for word, given its first words."""
    intro = "Read the text below. You will be asked to repeat parts of it word for word.\n\n"
    hay = texts.essay(rng)
    hay = hay[: fit(hay, tokens - count(intro), count)]
    long = [sentence for sentence in hay if 18 <= len(sentence.split()) <= 30]
    questions = []
    for sentence in rng.sample(long, min(2, len(long))):
        words = sentence.split()
        start, rest = " ".join(words[:6]), " ".join(words[6:])
        questions.append(
            Question("Repeat the sentence that begins like this, word for word.", start, f" {rest}", (rest,))
        )
    return intro + " ".join(hay), questions


def _task(make: Callable[..., Made], **kind: object) -> Callable[[random.Random, int, CountTokens], Made]:
    return lambda rng, tokens, count: make(rng, tokens, count, **kind)


TASKS: dict[str, Callable[[random.Random, int, CountTokens], Made]] = {
    "niah_single_1": _task(needles.alike, haystack="noise", value="number"),
    "niah_single_2": _task(needles.alike, haystack="essay", value="number"),
    "niah_single_3": _task(needles.alike, haystack="essay", value="uuid"),
    "niah_multikey_1": _task(needles.alike, haystack="essay", value="number", keys=4),
    "niah_multikey_2": _task(needles.alike, haystack="needles", value="number"),
    "niah_multikey_3": _task(needles.alike, haystack="needles", value="uuid", key="uuid"),
    "niah_multivalue": _task(needles.alike, haystack="essay", value="number", values=4),
    "niah_multiquery": _task(needles.alike, haystack="essay", value="number", keys=4, ask_all=True),
    "vt": _task(_variable_tracking),
    "cwe": _task(_common_words),
    "fwe": _task(_frequent_words),
    "qa_1": _task(_passages, hops=1),
    "qa_2": _task(_passages, hops=2),
    "niah_worded": _task(needles.worded),
    "copy": _task(_copy),
}
NOT_RULERS = ("niah_worded", "copy")
"""Tasks of our own: their answers are forced, and no free answers are scored beside RULER's."""
JUDGE_NOTHING = ("vt", "cwe", "fwe")
"""Tasks beyond a model of 135M parameters: reported, but no policy is judged by them."""
