"""Where an eviction takes place and what it makes of a request: the arithmetic that both processes share, once.

Axis letters, used in names all over the project (`score_HT`, `query_WQD`):

    L layers        H KV heads (of this rank)     G query heads a KV head     Q = H*G query heads
    T / S tokens    W observation window          N tokens (rows) of a head page
    D head size     E evicted rows of a batch     P pages

Words: a *block* is vLLM's unit of allocation, so many tokens of every layer and head; a *page* is the part of a block
that belongs to one layer and one head. Today a page has as many rows as its block has tokens; the arithmetic allows for
several pages of a head in a block. A *stop*, `T`, is the number of tokens at which a request is evicted. `g` is the
number of blocks that are full by then, `s` the number of leading ones that stay where they are because others use them,
`K` the number of fresh blocks that the kept pages are packed into.

After an eviction a head reads three segments, one after the other: `s` shared blocks, its own packed pages, and the
ordinary blocks from `g` on.

Nothing here imports vLLM or torch: these values cross process borders and are made on every scheduler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

ECHO_TOKENS = 2048
"""Tokens of a prompt that one echo repeats (KVzip's chunk)."""
ECHO_OVERHEAD = 64
"""Room for what else an echo takes: an instruction, a few tokens that say which part is meant, one to be sampled."""
ECHO_REQUESTS = 16
"""How many requests may be there that an echo is still to serve: each holds its whole prompt, and perhaps a window,
until its turn comes. Others wait outside."""
_LEAST_ECHO_TOKENS = 64


def echo_tokens(stop: int, max_model_len: int) -> int:
    """Tokens of a prompt that one echo repeats: fewer than `ECHO_TOKENS` where positions run out; 0 if hardly any is
    left."""
    room = min(ECHO_TOKENS, max_model_len - stop - ECHO_OVERHEAD)
    return room if room >= min(_LEAST_ECHO_TOKENS, stop) else 0


def echo_blocks(stop: int, max_model_len: int, block_tokens: int) -> int:
    """Blocks that an echo takes beside those of the request that it serves, at most."""
    tokens = min(stop, echo_tokens(stop, max_model_len))
    return 0 if not tokens else math.ceil((tokens + ECHO_OVERHEAD) / block_tokens)


@dataclass(frozen=True)
class Region:
    """What one eviction chooses from: blocks `[s, g)` of a request.

    stop: `T`, tokens whose KV exists when the eviction runs. shared_blocks: `s`, leading blocks left in place, whole.
    window: `W`, the last tokens before the stop, whose queries score all others, and which are kept themselves.
    block_tokens: tokens of a block. page_tokens: `N`, rows of a head page, a divisor of it.
    """

    stop: int
    shared_blocks: int
    window: int
    block_tokens: int
    page_tokens: int

    @property
    def full_blocks(self) -> int:
        """`g`: whole blocks up to the stop. From this one on blocks stay at their positions, and grow."""
        return self.stop // self.block_tokens

    @property
    def blocks(self) -> int:
        """How many blocks are chosen from."""
        return self.full_blocks - self.shared_blocks

    @property
    def tokens(self) -> tuple[int, int]:
        """Positions `[first, last)` of the tokens that are chosen from."""
        return self.shared_blocks * self.block_tokens, self.full_blocks * self.block_tokens

    @property
    def tail(self) -> int:
        """Tokens before the stop in a block that is not full: they stay where they are."""
        return self.stop % self.block_tokens

    @property
    def pages_per_block(self) -> int:
        """Pages that a block holds of each layer and head."""
        return self.block_tokens // self.page_tokens

    @property
    def forced_tokens(self) -> int:
        """Tokens that are chosen from but belong to the window, and are therefore kept."""
        first, last = self.tokens
        return max(0, last - max(first, self.stop - self.window))

    def budget_blocks(self, keep: float) -> int:
        """`K` for a ratio, or 0 when nothing is to be gained by an eviction.

        The scheduler allocates exactly `K` blocks and the workers fill exactly their pages, so no message has to come
        back. `keep` counts the window and the tail, as the papers do; every head is granted at least as many pages as
        hold its forced tokens.
        """
        if self.stop <= self.window or self.blocks <= 0:
            return 0
        wanted = math.ceil((keep * (self.stop - self.tokens[0]) - self.tail) / self.block_tokens)
        forced_pages = math.ceil(self.forced_tokens / self.page_tokens)
        needed = max(wanted, math.ceil(forced_pages / self.pages_per_block), 1)
        return needed if needed < self.blocks else 0


@dataclass(frozen=True)
class Packing:
    """What an eviction made, or is about to make, of a request. blocks: ids of the `K` fresh blocks that receive the
    kept pages, in the order in which they are filled."""

    region: Region
    blocks: tuple[int, ...]

    @property
    def head_pages(self) -> int:
        """Pages that a head has on average: `K` blocks of `L*H` heads hold `L*H` times as many."""
        return len(self.blocks) * self.region.pages_per_block

    @property
    def saved_blocks(self) -> int:
        """Blocks that go back, net of the packed ones."""
        return self.region.blocks - len(self.blocks)

    @property
    def kept_tokens(self) -> int:
        """Tokens before the stop that are kept, on average over layers and heads."""
        return self.region.stop - self.saved_blocks * self.region.block_tokens

    def length(self, pages: Any, seq_len: Any) -> Any:
        """Tokens that a head with so many packed pages reads when the request has seen `seq_len`; ints or tensors.

            s * block_tokens + pages * N + (seq_len - g * block_tokens)

        a function of vLLM's own `seq_len` and of constants, so that nothing can get out of step with it.
        """
        return pages * self.region.page_tokens - self.region.blocks * self.region.block_tokens + seq_len
