"""Pages of several widths: how many tokens a page of so many bytes holds, and where their numbers lie in it.

A page is `N` rows of `2*D` numbers, as the cache has them. A packed page may instead hold codes of 8 or 4 bits, of more
tokens in the same bytes. From its first byte on, rows one after the other, it then holds

    K steps [D], K minima [D], V steps [n], V minima [n]     fp16, and zeros up to a multiple of 16 bytes
    K codes, then V codes, of n tokens                       8 bits a number, or two numbers a byte

Keys are quantised per channel of the page, values per token, both asymmetrically (KIVI, arXiv 2402.02750): keys have
channels that are always large, values have tokens that are. Of two numbers in a byte the low half is that of channel c,
the high half that of channel c + D/2: what is unpacked are two tiles, and nothing is interleaved.

K codes of a token lie together, except on CPUs, where those of a channel do (`channel_major`), as in vLLM's own pages.

Nothing here imports torch: a scheduler asks too.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

ALIGNMENT = 16  # bytes: what a thread loads at a time


@dataclass(frozen=True)
class PageClass:
    """Bits of a key's and of a value's numbers. 16 stands for whatever the cache has: such a page is not quantised."""

    name: str
    key_bits: int
    value_bits: int

    @property
    def quantised(self) -> bool:
        return self.key_bits < 16

    def token_bytes(self, head_size: int) -> int:
        """Bytes of the codes of one token."""
        return head_size * (self.key_bits + self.value_bits) // 8


CLASSES = {
    each.name: each
    for each in (PageClass("16", 16, 16), PageClass("8", 8, 8), PageClass("k8v4", 8, 4), PageClass("4", 4, 4))
}
"""Every class there is, the widest first: the order in which a packing has them."""


def header_bytes(head_size: int, tokens: int) -> int:
    """Bytes in front of the codes of a page of so many tokens."""
    return -(-4 * (head_size + tokens) // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class PageShape:
    """A page of the cache: `N` rows of one head's key and value. element_bytes: of one number."""

    rows: int
    head_size: int
    element_bytes: int = 2

    @property
    def row_bytes(self) -> int:
        return 2 * self.head_size * self.element_bytes

    @property
    def page_bytes(self) -> int:
        return self.rows * self.row_bytes

    def tokens(self, page_class: str) -> int:
        """Tokens that a page of this class holds, at most. 0: none, the page is too small."""
        return _tokens(self, page_class)


@cache
def _tokens(shape: PageShape, page_class: str) -> int:
    width = CLASSES[page_class]
    if not width.quantised:
        return shape.rows
    # The header grows with the tokens: without its padding first, then down to where that fits as well.
    each = width.token_bytes(shape.head_size)
    tokens = max(0, (shape.page_bytes - 4 * shape.head_size) // (each + 4))
    while tokens and header_bytes(shape.head_size, tokens) + tokens * each > shape.page_bytes:
        tokens -= 1
    return tokens
