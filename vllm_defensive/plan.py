"""What the scheduler's process tells the workers of an eviction. The words are `packing.py`'s.

To score and to pack are two records. Today both ride on one step, as the size is known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from vllm_defensive.packing import Packing, Region


@dataclass(frozen=True)
class Score:
    """Weigh a request's tokens, right after this step's forward pass.

    policy, keep: the request's own, or else the engine's.
    source_blocks: ids of the blocks that hold the tokens before the stop, in positional order, a partial tail last.
    """

    request_id: str
    policy: str
    keep: float
    region: Region
    source_blocks: tuple[int, ...]


@dataclass(frozen=True)
class Eviction:
    """Pack what `score` has weighed into the blocks of `packing`, and attend to that from the next step on.

    token_ids: those before the stop when an audit was asked for, else None.
    """

    score: Score
    packing: Packing
    token_ids: tuple[int, ...] | None = None

    @property
    def request_id(self) -> str:
        return self.score.request_id

    @property
    def policy(self) -> str:
        return self.score.policy

    @property
    def region(self) -> Region:
        return self.packing.region


@dataclass
class StepMessage:
    """What rides on one scheduler output.

    observe: request id -> positions `[first, last)` of its observation window, for each scheduled request whose tokens
        of this step overlap it; the worker keeps their queries.
    accumulate: request id -> stop, for each scheduled request up to there whose policy sums the attention of all
        queries.
    scores, evictions: to be carried out in this order right after this step's forward pass.
    """

    observe: dict[str, tuple[int, int]] = field(default_factory=dict)
    accumulate: dict[str, int] = field(default_factory=dict)
    scores: list[Score] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.observe or self.accumulate or self.scores or self.evictions)
