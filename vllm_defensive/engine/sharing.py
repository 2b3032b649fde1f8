"""How many leading blocks of a prompt are better left in place, because other live requests read them too."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vllm.v1.request import Request

from vllm_defensive.engine.lifecycle import RequestState

# Of a thousand requests that wait for one document, this many are compared: the scheduler's step is not the place for
# all of them, and what they share is seldom more than what the first of them do.
_MOST_COMPARED = 64


def worth_sharing(
    request: Request,
    keep: float,
    full_blocks: int,
    block_size: int,
    live: Mapping[str, Request],
    state_of: Callable[[str], RequestState | None],
) -> int:
    """`s`, of the request's first `full_blocks` blocks. keep: its ratio. live: all requests, waiting ones included.

    A block that somebody keeps for good costs nothing to share. One that `m` requests read, each of which could pack
    its own copy of a `keep` fraction, is cheaper whole as soon as `m * keep >= 1`: twenty copies of a fifth of a system
    prompt cost four times the one original. Waiting requests count, for once admitted they hit these blocks.
    """
    hashes = request.block_hashes
    # More than all live requests is enough; a tiny ratio must not overflow.
    others_needed = max(2, math.ceil(min(1 / keep, len(live) + 1))) - 1
    most = max(_MOST_COMPARED, 2 * others_needed)
    pinned = 0
    could_pack: list[int] = []
    for other_id, other in live.items():
        if len(could_pack) >= most:
            break
        theirs = other.block_hashes
        if not theirs or theirs[0] != hashes[0] or other is request or other.skip_reading_prefix_cache:
            continue  # most live requests are strangers, and this runs in the scheduler's step
        state = state_of(other_id)
        assert state is not None
        if state.accumulates or state.fleeting:
            continue  # reads nobody's blocks, or not for long
        evicted = state.full_blocks > 0
        limit = min(full_blocks, len(hashes), state.shared_blocks if evicted else len(theirs))
        common = _common_prefix(hashes, theirs, limit)
        if state.decided:  # evicted down to what it shares, or never to be evicted
            pinned = max(pinned, common)
        else:
            could_pack.append(min(common, state.num_tokens // block_size))
    could_pack.sort(reverse=True)
    return max(pinned, could_pack[others_needed - 1] if len(could_pack) >= others_needed else 0)


def _common_prefix(a: Sequence[Any], b: Sequence[Any], limit: int) -> int:
    """How many of the first `limit` block hashes are equal. A hash covers all before it, so bisection finds the first
    that differs."""
    return bisect_left(range(limit), True, key=lambda i: a[i] != b[i])
