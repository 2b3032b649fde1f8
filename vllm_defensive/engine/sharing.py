"""How many leading blocks of a prompt are better left in place, because other live requests read them too."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

from vllm.v1.request import Request

from vllm_defensive.engine.life import PREFILL, Life

# Of a thousand requests that wait for one document, this many are compared: the scheduler's step is not the place for
# all of them, and what they share is seldom more than what the first of them do.
_MOST_COMPARED = 64
_MOST_SEEN = 1024  # those that read nobody's blocks, and have nothing to compare, included


class Relatives:
    """Live requests by the hash of their first block: strangers have nothing to share, however many they are."""

    def __init__(self) -> None:
        self._families: dict[Any, dict[str, Request]] = {}
        self._family_of: dict[str, Any] = {}

    def add(self, request: Request) -> None:
        """Take in a live request, once it has a full block."""
        if request.block_hashes and request.request_id not in self._family_of:
            first = self._family_of[request.request_id] = request.block_hashes[0]
            self._families.setdefault(first, {})[request.request_id] = request

    def remove(self, request_id: str) -> None:
        """Forget a request that is no longer alive, if it is known."""
        first = self._family_of.pop(request_id, None)
        family = self._families.get(first)
        if family is not None:
            family.pop(request_id, None)
            if not family:
                del self._families[first]

    def of(self, request: Request) -> Iterator[Request]:
        """Others with the same first block, first come first."""
        family = self._families.get(self._family_of.get(request.request_id), {})
        return (other for other in islice(family.values(), _MOST_SEEN) if other is not request)


def worth_sharing(
    life: Life,
    keep: float,
    full_blocks: int,
    block_tokens: int,
    relatives: Relatives,
    life_of: Callable[[Request], Life],
) -> int:
    """`s`, of the request's first `full_blocks` blocks. keep: the share of its bytes that it keeps.

    A block that somebody keeps for good costs nothing to share. One that `m` requests read, each of which could pack
    its own copy of a `keep` fraction, is cheaper whole as soon as `m * keep >= 1`: twenty copies of a fifth of a system
    prompt cost four times the one original. Waiting requests count, for once admitted they hit these blocks.
    """
    hashes = life.request.block_hashes
    # More than are seen is enough; a tiny ratio must not overflow.
    others_needed = max(2, math.ceil(min(1 / keep, _MOST_SEEN + 2))) - 1
    most = max(_MOST_COMPARED, 2 * others_needed)
    pinned = 0
    could_pack: list[int] = []
    for other in relatives.of(life.request):
        if len(could_pack) >= most:
            break
        if other.skip_reading_prefix_cache:
            continue
        theirs = life_of(other)
        ahead = theirs.phase is PREFILL
        if theirs.brief or theirs.key is not None or (ahead and theirs.sums_attention):
            continue  # reads nobody's blocks, or not for long
        limit = min(full_blocks, len(hashes), len(other.block_hashes))
        if theirs.eviction is not None:
            limit = min(limit, theirs.eviction.region.shared_blocks)
        common = _common_prefix(hashes, other.block_hashes, limit)
        if ahead:
            could_pack.append(min(common, theirs.stop // block_tokens))
        else:  # evicted down to what it shares, or never to be evicted
            pinned = max(pinned, common)
    could_pack.sort(reverse=True)
    return max(pinned, could_pack[others_needed - 1] if len(could_pack) >= others_needed else 0)


def _common_prefix(a: Sequence[Any], b: Sequence[Any], limit: int) -> int:
    """How many of the first `limit` block hashes are equal. A hash covers all before it, so bisection finds the first
    that differs."""
    return bisect_left(range(limit), True, key=lambda i: a[i] != b[i])
