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
    later: the policy by which what is kept will be chosen from again; None: it will not.
    since: of a request that was evicted before, what it was evicted from last. Its packed tokens are chosen from again,
        and those behind them: `source_blocks` are those from block `since.full_blocks` on.
    """

    request_id: str
    policy: str
    keep: float
    region: Region
    source_blocks: tuple[int, ...]
    later: str | None = None
    since: Region | None = None


@dataclass(frozen=True)
class Reconstruction:
    """Score a request's tokens by the queries of an echo, a request of our own that repeats some of them.

    request_id: whose tokens. stop: how many they are; the echo's own come after them. part: positions that it repeats.
    end: tokens of the echo in all, those of the request included: then its last query has passed.
    normalisation: see `Policy.reconstruction`. sinks: first tokens that take part whichever chunk is repeated.
    """

    request_id: str
    stop: int
    part: tuple[int, int]
    end: int
    normalisation: str
    sinks: int = 4

    @property
    def scored(self) -> tuple[int, int]:
        """Positions that the echo's queries score: by the plain softmax all of them."""
        return self.part if self.normalisation == "chunk" else (0, self.stop)


@dataclass(frozen=True)
class Eviction:
    """Pack what `score` has weighed into the blocks of `packing`, and attend to that from the next step on.

    token_ids: those before the stop when an audit was asked for, else None.
    number: by which later requests may begin with what is packed; 0: none will.
    repeat: how many evictions of the request came before.
    first_reader: position of the first token that reads what is packed, if that is not the one behind the stop: it may
        have taken some steps until there was room, and drafts may be under way, some of which turn out wrong.
    """

    score: Score
    packing: Packing
    token_ids: tuple[int, ...] | None = None
    number: int = 0
    repeat: int = 0
    first_reader: int | None = None

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
    reconstruct: echo's id -> what its tokens of this step are looked at for.
    held: requests that reached their stop in this step and are scored in a later one.
    released: of these, requests that are served whole after all: nothing has to be kept of them.
    clear: ids of blocks that held quantised pages and have gone back: whoever has them next may read beyond what it
        wrote, times nothing, and must not find what are no numbers.
    adopted: evictions, by their numbers, with which requests begin that enter the batch: these have the same packing
        without one of their own.
    forgotten: numbers of evictions with which nobody else will begin.
    scores, evictions: to be carried out in this order right after this step's forward pass.
    """

    observe: dict[str, tuple[int, int]] = field(default_factory=dict)
    accumulate: dict[str, int] = field(default_factory=dict)
    reconstruct: dict[str, Reconstruction] = field(default_factory=dict)
    held: list[str] = field(default_factory=list)
    released: list[str] = field(default_factory=list)
    clear: list[int] = field(default_factory=list)
    adopted: list[Eviction] = field(default_factory=list)
    forgotten: list[int] = field(default_factory=list)
    scores: list[Score] = field(default_factory=list)
    evictions: list[Eviction] = field(default_factory=list)

    def __bool__(self) -> bool:
        return any(vars(self).values())
