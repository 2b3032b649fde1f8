"""What the scheduler's process and the workers tell each other about an eviction, and the arithmetic that both share.

Axis letters, used in names all over the project (`score_HT`, `query_WQD`):

    L layers        H KV heads (of this rank)     G query heads a KV head     Q = H*G query heads
    T / S tokens    W observation window          N tokens a page (= vLLM's block size)
    D head size     E evicted rows of a batch     P pages

Words: a *block* is vLLM's unit of allocation (`N` tokens of every layer and head); a *page* is the part of a block that
belongs to one layer and one head; `L*H` pages make a block. `g = T // N` is the number of full prompt blocks, `s` the
number of leading ones that stay where they are because others use them, `K` the number of fresh blocks that the kept
pages are packed into.

Nothing here imports vLLM or torch: these records cross process borders and are built on every scheduler step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Eviction:
    """One request's eviction, decided by the KV manager and carried out by every worker in the same step.

    policy, keep: the request's own, or else the engine's.
    num_tokens: `T`, tokens of the request whose KV exists when the eviction runs.
    shared_blocks: `s`, leading blocks left in place, whole.
    source_blocks: ids of the blocks that hold the `T` tokens, in positional order, a partial tail last.
    packed_blocks: ids of the `K` fresh blocks that receive the kept pages.
    token_ids: the `T` token ids when an audit was asked for, else None.
    """

    request_id: str
    policy: str
    keep: float
    num_tokens: int
    shared_blocks: int
    source_blocks: tuple[int, ...]
    packed_blocks: tuple[int, ...]
    token_ids: tuple[int, ...] | None = None


@dataclass
class StepMessage:
    """What rides on one scheduler output.

    observe: request id -> `T` for each scheduled request whose tokens of this step overlap its observation window; the
        worker keeps their queries.
    accumulate: request id -> `T` for each scheduled request up to `T` whose policy sums the attention of all queries.
    evictions: to be carried out right after this step's forward pass.
    """

    observe: dict[str, int] = field(default_factory=dict)
    accumulate: dict[str, int] = field(default_factory=dict)
    evictions: list[Eviction] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.observe or self.accumulate or self.evictions)


DECILES = 10  # of the layers, by depth: statistics by layer have as many rows for any model


@dataclass
class WorkerReport:
    """What a worker did since its last report, which rides on a step's output: nothing else goes back.

    microseconds: spent on evictions. decile_pages: pages that they packed in each tenth of the layers, the first first.
    """

    microseconds: int = 0
    decile_pages: list[int] = field(default_factory=lambda: [0] * DECILES)

    def __bool__(self) -> bool:
        return bool(self.microseconds or any(self.decile_pages))

    def add(self, microseconds: int, decile_pages: list[int]) -> None:
        self.microseconds += microseconds
        self.decile_pages = [a + b for a, b in zip(self.decile_pages, decile_pages, strict=True)]


def packed_blocks(
    num_tokens: int, shared_blocks: int, *, keep: float, window: int, min_tokens: int, block_size: int
) -> int:
    """`K`, the fresh blocks that an eviction of this prompt fills, or 0 when nothing is to be gained by evicting.

    The scheduler allocates exactly `K` blocks and the workers fill exactly `K*L*H` pages, so no message has to come
    back. `keep` counts the window and the partial tail block, as the papers do; at least as many
    pages as hold the window's part of the packed region are granted to every head.
    """
    full_blocks = num_tokens // block_size
    evictable = full_blocks - shared_blocks
    if num_tokens < min_tokens or num_tokens <= window or evictable <= 0:
        return 0
    tail = num_tokens - full_blocks * block_size
    wanted = math.ceil((keep * (num_tokens - shared_blocks * block_size) - tail) / block_size)
    needed = max(wanted, math.ceil(forced_tokens(num_tokens, shared_blocks, window, block_size) / block_size), 1)
    return needed if needed < evictable else 0


def kept_tokens(num_tokens: int, whole_blocks: int, block_size: int) -> int:
    """How many of `num_tokens` an eviction kept, on average over layers and heads: `K*L*H` pages on `L*H` heads, and
    what every head keeps. whole_blocks: shared and packed ones."""
    return whole_blocks * block_size + num_tokens % block_size


def forced_tokens(num_tokens: int, shared_blocks: int, window: int, block_size: int) -> int:
    """How many tokens of the packed region `[s*N, g*N)` belong to the observation window and are therefore kept."""
    first, last = shared_blocks * block_size, num_tokens // block_size * block_size
    return max(0, last - max(first, num_tokens - window))
