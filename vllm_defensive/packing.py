"""Where an eviction takes place and what it makes of a request: the arithmetic that both processes share, once.

Axis letters, used in names all over the project (`score_HT`, `query_WQD`):

    L layers        H KV heads (of this rank)     G query heads a KV head     Q = H*G query heads
    T / S tokens    W observation window          N tokens (rows) of a head page
    D head size     E evicted rows of a batch     P pages
    A attention layers that read the L layers' caches, those included: more than L where caches are shared

Words: a *block* is vLLM's unit of allocation, so many tokens of every layer and head; a *page* is the part of a block
that belongs to one layer and one head; where blocks are as large as the state of a recurrent layer, a head has several
pages in each. A *stop*, `T`, is the number of tokens at which a request is evicted. `g` is the
number of blocks that are full by then, `s` the number of leading ones that stay where they are because others use them,
`K` the number of fresh blocks that the kept pages are packed into. A page may hold more tokens than it has rows, in
fewer bits each (*widths*, `vllm_defensive_kernels.widths`): `keep` counts bytes, whatever they hold.

After an eviction a head reads three segments, one after the other: `s` shared blocks, its own packed pages, and the
ordinary blocks from `g` on.

Nothing here imports vLLM or torch: these values cross process borders and are made on every scheduler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from vllm_defensive_kernels.widths import PageShape

ECHO_TOKENS = 2048
"""Tokens of a prompt that one echo repeats (KVzip's chunk)."""
ECHO_OVERHEAD = 64
"""Room for what else an echo takes: an instruction, a few tokens that say which part is meant, one to be sampled."""
ECHO_REQUESTS = 16
"""How many requests may be there that an echo is still to serve: each holds its whole prompt, and perhaps a window,
until its turn comes. Others wait outside."""
_LEAST_ECHO_TOKENS = 64
MANY_BLOCKS = 8
"""Prompts of fewer blocks gain little: budgets are whole blocks, and the last one, which is not full, stays."""


def echo_tokens(stop: int, max_model_len: int) -> int:
    """Tokens of a prompt that one echo repeats: fewer than `ECHO_TOKENS` where positions run out; 0 if hardly any is
    left."""
    room = min(ECHO_TOKENS, max_model_len - stop - ECHO_OVERHEAD)
    return room if room >= min(_LEAST_ECHO_TOKENS, stop) else 0


def echo_blocks(stop: int, max_model_len: int, block_tokens: int) -> int:
    """Blocks that an echo takes beside those of the request that it serves, at most."""
    tokens = min(stop, echo_tokens(stop, max_model_len))
    return 0 if not tokens else math.ceil((tokens + ECHO_OVERHEAD) / block_tokens)


WIDTHS: dict[str, tuple[tuple[str, float], ...]] = {
    "16": (("16", 1.0),),
    "k8v4": (("k8v4", 1.0),),
    "8": (("8", 1.0),),
    "4": (("4", 1.0),),
    "8,4": (("8", 0.25), ("4", 1.0)),
    "16,8,4": (("16", 0.0), ("8", 0.0), ("4", 1.0)),
}
"""What a request may be packed in: classes of pages, the best tokens' first, and the share of the pages that each gets
of all; the last has the rest."""
LADDER = "16,8,4"
"""Of these widths each head's scores decide how many pages of each class it has, not the shares (RDKV's ladder)."""
OFFERED = tuple(name for name in WIDTHS if name != LADDER)
"""Those that a user may choose: the ladder is its policy's alone."""


@dataclass(frozen=True)
class Part:
    """Pages of one class. tokens: that a page holds. share: of all pages, at least; of the last part, the rest."""

    page_class: str
    tokens: int
    share: float


@dataclass(frozen=True)
class Format:
    """How the pages of a packing are written. widths: a name in `WIDTHS`. page_tokens: `N`, rows of a page."""

    widths: str
    parts: tuple[Part, ...]
    page_tokens: int

    @classmethod
    def of(cls, widths: str, shape: PageShape) -> Format:
        parts = tuple(Part(name, shape.tokens(name), share) for name, share in WIDTHS[widths])
        return cls(widths, parts, shape.rows)

    @classmethod
    def plain(cls, page_tokens: int) -> Format:
        """Pages as the cache has them: as many tokens as rows."""
        return cls("16", (Part("16", page_tokens, 1.0),), page_tokens)

    @property
    def quantised(self) -> bool:
        return self.widths != "16"

    def split(self, pages: int, heads: int, forced_tokens: int) -> list[int]:
        """Pages of each part, of `pages` that so many heads share: whatever the share, each head's forced tokens find
        room in the first."""
        counts: list[int] = []
        for part in self.parts[:-1]:
            least = heads * math.ceil(forced_tokens / part.tokens) if not counts else 0
            counts.append(min(max(round(part.share * pages), least), pages - sum(counts)))
        return [*counts, pages - sum(counts)]

    def tokens(self, pages: int, forced_tokens: int) -> int:
        """Tokens that find room in so many pages of one head; of the ladder, at least."""
        if self.widths == LADDER:
            return pages * self.parts[0].tokens
        counts = self.split(pages, 1, forced_tokens)
        return sum(count * part.tokens for count, part in zip(counts, self.parts, strict=True))

    def pages_for(self, tokens: int, forced_tokens: int) -> int:
        """The fewest pages of one head in which so many tokens find room, whatever becomes of the ladder's."""
        return _pages_for(self, tokens, forced_tokens)

    @property
    def density(self) -> float:
        """Tokens that a page holds, over those that it would hold as the cache has them."""
        shares = [part.share for part in self.parts[:-1]]
        held = zip(self.parts, (*shares, 1 - sum(shares)), strict=True)
        mean = self.parts[0].tokens if self.widths == LADDER else sum(part.tokens * share for part, share in held)
        return mean / self.page_tokens


@lru_cache(maxsize=4096)
def _pages_for(format: Format, tokens: int, forced_tokens: int) -> int:
    # From below: no format holds more in a page than its densest mixture, but for what splits are rounded by.
    pages = max(1, math.floor(tokens / (format.density * format.page_tokens)) - len(format.parts))
    while format.tokens(pages, forced_tokens) < tokens:
        pages += 1
    return pages


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
    def plain(self) -> Format:
        """Its pages as the cache has them."""
        return Format.plain(self.page_tokens)

    @property
    def forced_tokens(self) -> int:
        """Tokens that are chosen from but belong to the window, and are therefore kept."""
        first, last = self.tokens
        return max(0, last - max(first, self.stop - self.window))

    def budget_blocks(
        self, keep: float, format: Format, most_tokens: int | None = None, held_blocks: int | None = None
    ) -> int:
        """`K` for a ratio, or 0 when nothing is to be gained by an eviction.

        The scheduler allocates exactly `K` blocks and the workers fill exactly their pages, so no message has to come
        back. `keep` counts bytes, those of the window and of the tail too, as the papers do; every head is granted at
        least as many pages as hold its forced tokens, and no more blocks are taken than hold all tokens.

        most_tokens: whose bytes are not exceeded either, as they lie in the cache, by these blocks and the leading ones
        that stay. held_blocks: that are chosen from, where what came before is packed already.
        """
        held_blocks = self.blocks if held_blocks is None else held_blocks
        if self.stop <= self.window or held_blocks <= 0:
            return 0
        tokens = keep * (self.stop - self.tokens[0])
        tokens = tokens if most_tokens is None else min(tokens, most_tokens - self.tokens[0])
        wanted = math.ceil((tokens - self.tail) / self.block_tokens)
        forced_pages = math.ceil(self.forced_tokens / format.parts[0].tokens)
        needed = max(wanted, math.ceil(forced_pages / self.pages_per_block), 1)
        needed = min(needed, self.blocks_for_all(format))
        return needed if needed < held_blocks else 0

    def blocks_for_all(self, format: Format) -> int:
        """Blocks whose pages hold every token of the region, in the heads' even share."""
        first, last = self.tokens
        return math.ceil(format.pages_for(last - first, self.forced_tokens) / self.pages_per_block)


@dataclass(frozen=True)
class Packing:
    """What an eviction made, or is about to make, of a request. blocks: ids of the `K` fresh blocks that receive the
    kept pages, in the order in which they are filled: the format's first part, head after head, then the next."""

    region: Region
    blocks: tuple[int, ...]
    format: Format

    @property
    def head_pages(self) -> int:
        """Pages that a head has on average: `K` blocks of `L*H` heads hold `L*H` times as many."""
        return len(self.blocks) * self.region.pages_per_block

    @property
    def saved_blocks(self) -> int:
        """Blocks that go back, net of the packed ones."""
        return self.region.blocks - len(self.blocks)

    @property
    def held_tokens(self) -> int:
        """Tokens before the stop that would take, unpacked, the memory that is left of them."""
        return self.region.stop - self.saved_blocks * self.region.block_tokens

    @property
    def kept_tokens(self) -> int:
        """Tokens before the stop that are kept, on average over layers and heads. Where heads compete for pages of
        several classes, or some keep all of their tokens and leave room, it is a little less; of the ladder, more."""
        first, last = self.region.tokens
        packed = min(self.format.tokens(self.head_pages, self.region.forced_tokens), last - first)
        return self.region.stop - (last - first) + packed

    def length(self, kept: Any, seq_len: Any) -> Any:
        """Tokens that a head with so many packed tokens reads when the request has seen `seq_len`; ints or tensors.

            s * block_tokens + kept + (seq_len - g * block_tokens)

        a function of vLLM's own `seq_len` and of constants, so that nothing can get out of step with it.
        """
        return kept - self.region.blocks * self.region.block_tokens + seq_len
