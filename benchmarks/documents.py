"""Long documents with facts hidden in them, made from a seed: what the demonstration asks about."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

_SUBJECTS = (
    "The harbour master", "A retired teacher", "The night train", "Our neighbour", "The old library",
    "A young botanist", "The town council", "The baker on the corner",
    "A travelling orchestra", "The river", "The mountain path",
    "An apprentice carpenter", "The lighthouse", "The weekly market", "A group of students", "The museum",
)  # fmt: skip
_VERBS = (
    "remembers", "describes", "slowly changes", "quietly admires", "often returns to", "cannot forget", "looks after",
    "wrote a letter about", "is known for", "takes great care of", "was surprised by", "learned a lot from",
)  # fmt: skip
_OBJECTS = (
    "the colour of the evening sky", "a song from the north", "the smell of fresh bread",
    "the garden behind the school", "a box of faded photographs", "the first snow of the year",
    "an unfinished wooden boat", "the clock above the square",
    "a map of forgotten roads", "the sound of rain on the roof", "a long row of apple trees", "the stories of sailors",
)  # fmt: skip
_ENDS = (
    "every autumn.", "without saying a word.", "and nobody knows why.", "as if time had stopped.", "before sunrise.",
    "with great patience.", "for as long as anyone can say.", "in a small notebook.", "whenever the wind turns.",
    "and smiles.", "after a long day of work.", "more than most people think.",
)  # fmt: skip
_KEYS = (
    "amber", "basil", "cobalt", "dahlia", "ebony", "falcon", "garnet", "hazel", "indigo", "jasper", "kestrel", "lilac",
)  # fmt: skip


@dataclass(frozen=True)
class Question:
    """A document, what is asked about it, and the number that the answer must contain."""

    document: str
    question: str
    answer: str

    @property
    def prompt(self) -> str:
        """The user's message."""
        return (
            f"A special magic number is hidden within the following text. Make sure to memorize it. "
            f"I will quiz you about the number afterwards.\n{self.document}\n{self.question}"
        )


def make_question(seed: int, num_tokens: int, count: Callable[[str], int]) -> Question:
    """A question whose prompt has about `num_tokens` tokens. count: text -> tokens. The fact lies in its middle."""
    rng = random.Random(seed)
    key, answer = rng.choice(_KEYS), str(rng.randint(1_000_000, 9_999_999))
    fact = f"One of the special magic numbers for {key} is: {answer}."
    question = (
        f"What is the special magic number for {key} mentioned in the provided text? Answer with the number only."
    )

    def sentence() -> str:
        return " ".join(rng.choice(part) for part in (_SUBJECTS, _VERBS, _OBJECTS, _ENDS))

    sample = [sentence() for _ in range(40)]
    per_sentence = count(" ".join(sample)) / len(sample)
    length = max(4, int((num_tokens - 120) / per_sentence))
    sentences = [sentence() for _ in range(length)]
    sentences.insert(rng.randint(length // 4, 3 * length // 4), fact)
    return Question(" ".join(sentences), question, answer)
