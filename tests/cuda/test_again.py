"""Packed tokens chosen from again, event after event, on plain tensors: each head then reads what was chosen."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_defensive_kernels as kernels
from vllm_defensive.packing import Packing, Region
from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import PRESETS, Policy
from vllm_defensive.worker.cuda import again, launches
from vllm_defensive.worker.cuda.again import Candidates, Kept
from vllm_defensive.worker.cuda.runtime import CUDARuntime, Placed
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive_kernels import PagedKV, reference

L, H, N, D, POOL, WINDOW = 2, 3, 4, 8, 96, 6
R = L * H
SLOT = 2
# Of heads that gain unlike.
UNLIKE = torch.rand(R, 120, generator=torch.Generator().manual_seed(4))
UNLIKE *= torch.tensor([1.0, 9.0, 2.0, 0.1, 1.0, 3.0])[:, None]
RANDOM, UNEVEN, KEEP_ALL = PRESETS["random"], PRESETS["random-uneven"], PRESETS["keep-all"]
GUARDED = replace(UNEVEN, guard=0.9)
BY_LAYER = replace(UNEVEN, scope="layer", sinks=6)
UNFORCED = replace(UNEVEN, keeps_window=False)


@pytest.fixture(autouse=True)
def listed_as_the_kernel_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """What nobody's pages hold is whatever was there before."""

    def list_kept(score_RE: Tensor, last_R1: Tensor, offset_O: Tensor, **options: Any) -> Tensor:
        place_PN = kernels.list_kept(score_RE, last_R1, offset_O, **options)
        place_PN[int(offset_O[-1]) :] = 7
        return place_PN

    monkeypatch.setattr(launches, "list_kept", list_kept)


@dataclass
class Request:
    """A request in a cache whose numbers say which token of which head they belong to. At position p stands block
    `table[p // N]`."""

    scores: Tensor
    table: list[int] = field(default_factory=lambda: list(range(1, 31)))
    fresh: int = 31

    def __post_init__(self) -> None:
        cache_BHNC = torch.full((L, POOL, H, N, 2 * D), -1.0)
        for row in range(R):
            for position in range(len(self.table) * N):
                page = cache_BHNC[row // H, self.table[position // N], row % H]
                page[position % N] = 1000 * row + position
        self.pages = PagedKV.from_layers(list(cache_BHNC))
        windows = WindowQueries(L, WINDOW, 2 * H, D, torch.float32)
        self.runtime = CUDARuntime(
            self.pages, windows, {"r": SLOT}, max_requests=4, max_blocks=30, num_query_heads=2 * H,
            classes=("16", "8"),
        )  # fmt: skip
        self.kept = Kept.nothing(R, N, torch.device("cpu"))
        self.since: Region | None = None

    def evict(self, policy: Policy, stop: int, shared: int, blocks: int) -> Region:
        """As the evictor does."""
        region = Region(stop, shared, WINDOW, N, N)
        fresh = tuple(range(self.fresh, self.fresh + blocks))
        self.fresh += blocks
        packing = Packing(region, fresh, region.plain)
        begin = shared if self.since is None else self.since.full_blocks
        behind_RB = self.scores[:, begin * N : region.full_blocks * N].contiguous()
        table_B = torch.tensor(self.table[begin : region.full_blocks], dtype=torch.int32)
        fresh_K, candidates = torch.tensor(fresh, dtype=torch.int32), Candidates(self.kept, begin * N, behind_RB)
        offset_O, place_PN = candidates.choose(policy, packing, L)
        launches.pack_again(self.pages, table_B, self.kept.source, offset_O, place_PN, fresh_K)
        self.kept = candidates.follow(policy, packing, L, offset_O, place_PN, fresh_K)
        score = Score("r", policy.name, 0.5, region, (), policy.name, self.since)
        self.runtime.place(Eviction(score, packing), Placed(((offset_O, len(place_PN)),), fresh_K))
        self.since = region
        return region

    def read(self, row: int, seq_len: int) -> list[int]:
        """The numbers that a head's keys and values are made of, in the order in which it reads them."""
        table_B = torch.tensor(self.table, dtype=torch.int32)
        where = reference.packed_rows(self.pages, row // H, row % H, table_B, seq_len, SLOT, self.runtime.state)
        key_TD, value_TD = self.pages.key_PND[where], self.pages.value_PND[where]
        assert torch.equal(key_TD, value_TD)
        return key_TD[:, 0].int().tolist()


def naive(policy: Policy, had: list[list[tuple[int, float]]], region: Region, blocks: int) -> list[list[int]]:
    """Positions that each row keeps of what it had, (position, score) each."""
    lifted = []
    for row in had:
        scores = [score for _, score in row]
        top = max(scores) + 1
        for i, (position, _) in enumerate(row):
            if position < policy.sinks:
                scores[i] = top
            if policy.keeps_window and i >= len(row) - region.forced_tokens:
                scores[i] = float("inf")
        lifted.append(scores)
    granted = []
    units = {"head": [[r] for r in range(R)], "layer": [[0, 1, 2], [3, 4, 5]], "model": [list(range(R))]}
    for unit in units[policy.scope]:
        bids = []
        for row in unit:
            down = sorted(lifted[row], reverse=True)
            guarded = int(policy.guard * blocks)  # whether there are as many or not
            for page in range(max(len(down) // N, guarded)):
                gain = float("inf") if page < guarded else sum(down[page * N : page * N + N])
                bids.append((-gain, row, page))
        granted += [row for _, row, _ in sorted(bids)[: blocks * len(unit)]]
    kept = []
    for row in range(R):
        order = sorted(range(len(had[row])), key=lambda i: (-lifted[row][i], i))[: granted.count(row) * N]
        kept.append(sorted(had[row][i][0] for i in order))
    return kept


# (policy, stop, packed blocks) of each event.
EVENTS: dict[str, list[tuple[Policy, int, int]]] = {
    "alike": [(RANDOM, 41, 5), (RANDOM, 60, 6), (RANDOM, 66, 3), (RANDOM, 90, 4)],
    "uneven": [(UNEVEN, 43, 4), (UNEVEN, 62, 5), (UNEVEN, 65, 5), (UNEVEN, 80, 3)],
    "by layer, with sinks": [(BY_LAYER, 43, 4), (BY_LAYER, 60, 3), (BY_LAYER, 100, 6)],
    "no window": [(UNFORCED, 40, 4), (UNFORCED, 44, 4), (UNFORCED, 80, 4)],
    "everything": [(KEEP_ALL, 41, 10), (KEEP_ALL, 60, 15), (KEEP_ALL, 66, 16)],
    "less for who has it": [(UNEVEN, 43, 4), (RANDOM, 51, 5), (UNEVEN, 70, 8)],
    "a window longer than what lies behind": [(UNFORCED, 80, 1), (UNEVEN, 84, 2), (UNEVEN, 88, 3)],
    "guarded": [(UNEVEN, 80, 4), (GUARDED, 84, 5), (GUARDED, 110, 9)],
}  # fmt: skip


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("tokens_at_a_time", [2**21, 10], ids=["at once", "in parts"])
@pytest.mark.parametrize("events", EVENTS.values(), ids=EVENTS)
def test_heads_read_what_was_chosen_and_what_lies_behind(
    events: list[tuple[Policy, int, int]], tokens_at_a_time: int, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(again, "TOKENS_AT_A_TIME", tokens_at_a_time)
    scores, request = UNLIKE, Request(UNLIKE)
    held: list[list[int]] = [[] for _ in range(R)]
    for policy, stop, blocks in events:
        blocks -= shared if policy is KEEP_ALL else 0
        begin = shared * N if request.since is None else request.since.full_blocks * N
        region = request.evict(policy, stop, shared, blocks)
        for row in range(R):
            held[row] += range(begin, region.full_blocks * N)
        held = naive(policy, [[(p, float(scores[r, p])) for p in held[r]] for r in range(R)], region, blocks)
        positions = request.kept.position_PN[request.kept.position_PN >= 0].tolist()
        assert positions == [p for row in held for p in row]
        found = request.kept.score_PN[request.kept.position_PN >= 0]
        assert torch.equal(found, torch.cat([scores[r, torch.tensor(held[r], dtype=torch.long)] for r in range(R)]))
        for seq_len in (stop, stop + 9):
            for row in range(R):
                expected = [*range(shared * N), *held[row], *range(region.full_blocks * N, seq_len)]
                assert request.read(row, seq_len) == [1000 * row + p for p in expected], (policy.name, stop, row)
        assert request.runtime.state.offset_SO[SLOT, R:].unique().numel() == 1, "no pages of the other class"


@pytest.mark.parametrize("events", ["less for who has it", "guarded"])
def test_who_has_fewer_pages_than_it_was_granted_leaves_them_to_nobody(events: str) -> None:
    """And above it was seen that the others' places are right."""
    request, unused = Request(UNLIKE), []
    for policy, stop, blocks in EVENTS[events]:
        request.evict(policy, stop, 0, blocks)
        unused.append(len(request.kept.position_PN) - int(request.kept.source.offset_O[-1]))
    assert unused[0] == 0 < unused[1], unused


def test_only_so_many_places_as_a_head_may_have_pages() -> None:
    request = Request(torch.rand(R, 120))
    most: list[Any] = []
    for policy, stop in ((RANDOM, 60), (RANDOM, 90), (UNEVEN, 100), (UNEVEN, 110)):
        request.evict(policy, stop, 0, 5)
        most.append(request.kept.source.most_pages)
        assert int(request.kept.pages_R.max()) <= most[-1]
    assert most == [5, 5, 5 + 3, 5 + 3 + 2], "where heads compete, one may get all that it had"
