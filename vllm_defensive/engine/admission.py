"""Whether one more request is let in, if room is to last until those that run have ended.

vLLM lets a request in as soon as its prompt fits. An evicted request is small after its prefill and then grows by its
answer, so that of many let in by their present size some are thrown out later, and pay for prefill and eviction again.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import NamedTuple

_REMEMBERED = 16  # answers, about, that the expected length goes by


class Load(NamedTuple):
    """What a request asks of the pool from now on.

    rest: tokens that it is still expected to generate.
    own: blocks that it holds, at its present length and once its originals are released, beside the leading ones.
    leading: ids of blocks that it holds from its prompt's first on, the last of them first. Others may hold them too.
    """

    rest: int
    own: int
    leading: Iterable[int] = ()


def fits(loads: Sequence[Load], usable_blocks: int, block_size: int) -> bool:
    """Whether the requests never need more than `usable_blocks` together, if each ends when its `rest` is generated.

    All grow at one pace, and what they need is most just before one of them ends: with each that has as much left, or
    more, still there. A block that several hold counts once, for the one that stays longest.
    """
    held, seen = 0, set[int]()
    for count, load in enumerate(sorted(loads, key=lambda load: load.rest, reverse=True), 1):
        held += load.own
        for block in load.leading:
            if (
                block in seen
            ):  # and so, but for rare copies, are all before it: who holds a block holds what precedes it
                break
            seen.add(block)
            held += 1
        if held + count * -(-load.rest // block_size) > usable_blocks:
            return False
    return True


class ExpectedLength:
    """How long answers are: a moving mean over those that ended by themselves. `max_tokens` often says far more."""

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        self._seen = 0
        self.mean = 0.0

    def __bool__(self) -> bool:
        """Whether there is anything to go by."""
        return self._seen > 0

    def add(self, num_tokens: int) -> None:
        """Note the length of an answer that has ended. The first few weigh the same."""
        self._seen = min(self._seen + 1, _REMEMBERED)
        self.mean += (num_tokens - self.mean) / self._seen

    def rest(self, generated: int, limit: int) -> int:
        """Tokens expected after the first `generated`, of an answer of at most `limit`.

        One that has outlived the mean may end at any step; for it a block is kept in hand, time and again.
        """
        return max(0, min(max(round(self.mean) - generated, self._block_size), limit - generated))
