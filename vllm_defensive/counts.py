"""What was counted, on its way from workers and scheduler to whoever shows it."""

from __future__ import annotations

import json
from dataclasses import astuple, dataclass, field
from typing import Any

from vllm_defensive.plan import Eviction

DECILES = 10  # of the layers, by depth: statistics by layer have as many rows for any model
REMEMBERED = 1000  # evictions that can be asked for by the id of their request

WEIGHT_CALLS = (
    "reload_weights", "update_weights", "finish_weight_update", "reset_weights", "apply_model", "load_learned"
)  # fmt: skip
"""Methods of workers after which `WorkerReport.other_weights` holds. The engine hears of each call as well, before it
schedules anything more."""


@dataclass
class WorkerReport:
    """What a worker did since its last report, which rides on a step's output: nothing else goes back.

    microseconds: spent on evictions. decile_pages: pages that they packed in each tenth of the layers, the first first.
    cancelled: request id -> why this step's eviction of it was not carried out. Its blocks are all still there.
    stale_score: whether the model has other weights than its learned score was made for; None: as before.
    other_weights: whether the model or its learned score may be another one since: what was packed so far is not for
    others any more.
    """

    microseconds: int = 0
    decile_pages: list[int] = field(default_factory=lambda: [0] * DECILES)
    cancelled: dict[str, str] = field(default_factory=dict)
    stale_score: bool | None = None
    other_weights: bool = False

    def __bool__(self) -> bool:
        done = self.microseconds or any(self.decile_pages) or self.cancelled or self.other_weights
        return bool(done) or self.stale_score is not None

    def add(self, microseconds: int, decile_pages: list[int]) -> None:
        self.microseconds += microseconds
        self.decile_pages = [a + b for a, b in zip(self.decile_pages, decile_pages, strict=True)]


@dataclass
class Totals:
    """What eviction has done so far: requests, tokens, blocks. held_tokens: those that would take, unpacked, the memory
    that kept ones take. adoptions: requests that began with another's packing; adopted_tokens: of their prompts, before
    its stop. repeats: evictions of requests that had been evicted before, which count there alone. late: evictions of
    requests that were asked for their memory. published: packings that outlive their request; lost: those that others
    were given the memory of; dropped: those that were replaced or forgotten. The others are there."""

    requests: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    prefix_hit_tokens: int = 0
    freed_blocks: int = 0
    cancelled: int = 0
    echo_tokens: int = 0
    held_tokens: int = 0
    adoptions: int = 0
    adopted_tokens: int = 0
    repeats: int = 0
    late: int = 0
    published: int = 0
    lost: int = 0
    dropped: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))


@dataclass(frozen=True)
class State:
    """What is the case now. Blocks: of the pool; saved ones are counted request by request, so that originals that two
    requests would share count twice. published, published_blocks: packings that others may adopt, held or not, and
    their blocks; pinned_blocks: those of them that stay, used or not. stale_score: see `WorkerReport`.
    publishes: whether packings can be found again at all."""

    used_blocks: int = 0
    packed_blocks: int = 0
    saved_blocks: int = 0
    published: int = 0
    published_blocks: int = 0
    pinned_blocks: int = 0
    stale_score: bool = False
    publishes: bool = True


@dataclass
class Increase:
    """What is new since the last statistics; as JSON it rides on vLLM's own after nearly every step: what is not new is
    left out. records: `record_of` each eviction. state: None if it is as it was. The others as in `WorkerReport`."""

    totals: Totals | None = None
    microseconds: int = 0
    decile_pages: list[int] = field(default_factory=list)
    state: State | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())

    def dumps(self) -> str:
        parts = {name: part for name, part in vars(self).items() if part}
        for name in ("totals", "state"):
            if name in parts:
                parts[name] = vars(parts[name])
        return json.dumps(parts)

    @classmethod
    def loads(cls, text: str) -> Increase:
        read = json.loads(text)
        for name, kind in (("totals", Totals), ("state", State)):
            if name in read:
                read[name] = kind(**read[name])
        return cls(**read)


def record_of(eviction: Eviction, adopted: bool = False) -> dict[str, Any]:
    """The JSON entry of one eviction. Tokens are means over layers and heads; held are those that
    would take, unpacked, the memory that is left. Blocks are net of the packed ones. adopted: it was for another
    request before. repeat: evictions of the request before."""
    return {
        "request_id": eviction.request_id,
        "policy": eviction.policy,
        "prompt_tokens": eviction.region.stop,
        "kept_tokens": eviction.packing.kept_tokens,
        "held_tokens": eviction.packing.held_tokens,
        "widths": eviction.packing.format.widths,
        "freed_blocks": eviction.packing.saved_blocks,
        "adopted": adopted,
        "repeat": eviction.repeat,
    }
