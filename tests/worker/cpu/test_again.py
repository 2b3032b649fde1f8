"""What was packed is chosen from again: against the same said in loops, on a cache of plain pages."""

from __future__ import annotations

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from vllm_defensive.packing import Format, Packing, Region
from vllm_defensive.plan import Eviction, Score
from vllm_defensive.policy import PRESETS, Selection, score_layer
from vllm_defensive.worker.cpu.again import Candidates, Kept, Repeats
from vllm_defensive.worker.cpu.native import Quantised
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.tables import Placed, RequestTable
from vllm_defensive.worker.known import Known
from vllm_defensive_kernels.quantised import requantised, unpack_pages
from vllm_defensive_kernels.widths import CLASSES, PageShape

L, H, G, N, D, W = 2, 2, 2, 4, 8, 3
SCALE = 0.4
FP16_MINIMUM = 2e-3  # half of the distance between fp16 numbers from 4 on


class Cache:
    """Blocks of pages whose tokens lie one after the other, and a request that was packed once.

    Its text has `stop` tokens at its next eviction; of those before `first`, each head kept `kept[layer][head]`.
    """

    def __init__(self, stop: int, first: int, pages: list[list[int]], shared: int = 0, spare: int = 0) -> None:
        generator = torch.Generator().manual_seed(stop)
        caches = torch.randn(L, 64, H, N, 2 * D, generator=generator)
        self.view = PageView.from_layers(list(caches))
        order = torch.arange(N * D).view(N, D)
        self.codec = PageCodec(order, order)
        self.key_LHSD, self.value_LHSD = torch.randn(2, L, H, stop, D, generator=generator)
        self.stop, self.first, self.shared = stop, first, shared
        count = sum(map(sum, pages)) // (L * H)
        self.region = Region(first + 1, shared, W, N, N)  # one token behind the last whole block
        self.packing = Packing(self.region, tuple(range(40, 40 + count)), Format.plain(N))
        self.pages_LH = torch.tensor(pages, dtype=torch.int32)
        rows = []
        for held in self.pages_LH.flatten().tolist():
            chosen = torch.randperm(first - shared * N, generator=generator)[: held * N - spare].sort().values
            rows.append(torch.cat([chosen + shared * N, torch.full((spare,), -1)]).view(-1, N))
        self.position_PN = torch.cat(rows).int()
        self.growth = tuple(range(10, 10 + math.ceil((stop - first) / N)))
        self.shared_blocks = tuple(range(30, 30 + shared))
        layers = torch.arange(L)[:, None].expand(L, H).flatten().repeat_interleave(self.pages_LH.flatten())
        heads = torch.arange(H).repeat(L).repeat_interleave(self.pages_LH.flatten())
        packed = self.view.of_packed(torch.tensor(self.packing.blocks))
        for page, layer, head, positions in zip(packed, layers, heads, self.position_PN.long(), strict=True):
            self.write(int(page), int(layer), int(head), positions)
        for blocks, start in ((self.growth, first), (self.shared_blocks, 0)):
            pages_LHB = self.view.of_blocks(torch.tensor(blocks, dtype=torch.int64))
            for layer in range(L):
                for head in range(H):
                    for index, page in enumerate(pages_LHB[layer, head]):
                        at = torch.arange(start + index * N, start + (index + 1) * N)
                        self.write(int(page), layer, head, at.where(at < stop, -1))

    def write(self, page: int, layer: int, head: int, positions: Tensor) -> None:
        """Where there is no token, what is there stays, whatever it is."""
        halves = self.view.data[page].view(2, N, D)
        for slot, position in enumerate(positions.tolist()):
            if position >= 0:
                halves[0, slot], halves[1, slot] = (
                    self.key_LHSD[layer, head, position],
                    self.value_LHSD[layer, head, position],
                )

    def there(self, layer: int, head: int) -> list[int]:
        """Positions that a head still has, up to the stop."""
        pages = self.position_PN.split(self.pages_LH.flatten().tolist())[layer * H + head]
        return [
            *range(self.shared * N),
            *(p for p in pages.flatten().tolist() if p >= 0),
            *range(self.first, self.stop),
        ]


def candidates(cache: Cache, score_LHS: Tensor) -> Candidates:
    behind = cache.stop // N * N - cache.first
    scores = [
        score_LHS.flatten(0, 1)[r, p] for r, p in enumerate(cache.position_PN.split(cache.pages_LH.flatten().tolist()))
    ]
    kept = Kept(
        cache.packing.blocks, "16", cache.pages_LH, cache.position_PN, torch.cat([s.view(-1, N) for s in scores])
    )
    return Candidates.of(kept, cache.first, score_LHS[:, :, cache.first : cache.first + behind])


PAGES = [[3, 1], [1, 3]]


@pytest.mark.parametrize("spare", [0, 2])
def test_candidates_are_what_is_packed_and_then_what_is_behind(spare: int) -> None:
    cache = Cache(stop=30, first=20, pages=PAGES, spare=spare)
    score_LHS = torch.rand(L, H, 31)
    found = candidates(cache, score_LHS)
    for r in range(L * H):
        expected = cache.there(r // H, r % H)
        expected = [p for p in expected if p < 28]  # whole blocks
        assert found.position_RC[r, : len(expected)].tolist() == expected
        assert (found.position_RC[r, len(expected) :] == -1).all() and found.there_R[r] == len(expected)
        assert torch.equal(found.score_RC[r, : len(expected)], score_LHS.flatten(0, 1)[r, expected])


@pytest.mark.parametrize("policy", ["streamingllm", "random", "learnedkv", "keep-all"])
@pytest.mark.parametrize("spare", [0, 2])
def test_what_is_chosen_is_best_and_every_page_is_used(policy: str, spare: int) -> None:
    cache = Cache(stop=30, first=20, pages=PAGES, spare=spare)
    row = PRESETS[policy]
    score_LHS = torch.rand(L, H, 31, generator=torch.Generator().manual_seed(5))
    found = candidates(cache, score_LHS)
    region = Region(30, 0, W, N, N)
    count = 4 if policy == "keep-all" else 3
    if row.scope == "head":  # heads of its own have packed as much as each other
        cache = Cache(stop=30, first=20, pages=[[2, 2], [2, 2]], spare=spare)
        found = candidates(cache, score_LHS)
    chosen = found.select(row, Format.plain(N), region, count, L)
    assert int(chosen.pages_LH.sum()) == count * L * H
    kept = found.kept(chosen, replace_packing(cache, region, count))
    by_row = kept.position_Pn.split(chosen.pages_LH.flatten().tolist())
    worst_kept, best_gone = [], []
    for r, pages in enumerate(by_row):
        listed = [p for p in pages.flatten().tolist() if p >= 0]
        there = [p for p in cache.there(r // H, r % H) if p < 28]
        assert listed == sorted(listed) and set(listed) <= set(there)
        assert pages.flatten()[: len(listed)].min() >= 0, "room is left at the end alone"
        assert len(listed) == min(pages.numel(), len(there))
        assert {p for p in there if p >= 30 - W} <= set(listed), "the window stays"
        assert {p for p in there if p < row.sinks} <= set(listed)
        scores = score_LHS.flatten(0, 1)[r]
        free = [p for p in listed if p < 30 - W and p >= row.sinks]
        gone = [p for p in there if p not in listed]
        if free and gone:
            assert min(scores[p] for p in free) >= max(scores[p] for p in gone)
        worst_kept.append(len(listed))
        best_gone.append(len(gone))
    assert policy == "keep-all" or any(best_gone)


def replace_packing(cache: Cache, region: Region, count: int) -> Packing:
    return replace(cache.packing, region=region, blocks=tuple(range(50, 50 + count)))


def test_falling_budgets_keep_what_one_small_budget_keeps() -> None:
    """Scores that last: first to 4 blocks, then to 3; or at once."""
    cache = Cache(stop=30, first=20, pages=[[4, 2], [2, 4]])
    found = candidates(cache, torch.rand(L, H, 31, generator=torch.Generator().manual_seed(8)))
    region, row, format = Region(30, 0, W, N, N), PRESETS["learnedkv"], Format.plain(N)
    first = found.kept(found.select(row, format, region, 4, L), replace_packing(cache, region, 4))
    behind = Candidates.of(first, 28, torch.empty(L, H, 0))
    twice = behind.kept(behind.select(row, format, region, 3, L), replace_packing(cache, region, 3))
    once = found.kept(found.select(row, format, region, 3, L), replace_packing(cache, region, 3))
    assert torch.equal(twice.pages_LH, once.pages_LH) and torch.equal(twice.position_Pn, once.position_Pn)


class Runtime:
    """What of a runtime is asked."""

    def __init__(self, cache: Cache, query_LWQD: Tensor) -> None:
        table = RequestTable(cache.view, cache.packing, cache.shared_blocks, Placed(cache.pages_LH[None]))
        self.tables, self.windows, self.placed = {"r": table}, {"r": query_LWQD}, {}

    def place(self, eviction: Eviction, placed: Placed) -> None:
        self.placed[eviction.request_id] = placed


@pytest.mark.parametrize("policy", ["snapkv", "halokv", "tova", "layer-defensivekv"])
@pytest.mark.parametrize("shared, spare", [(0, 0), (0, 2), (2, 1)])
def test_a_window_looks_at_what_is_there(policy: str, shared: int, spare: int) -> None:
    """Scores of a layer in which what is gone never was, head by head, each token at its place."""
    stop, first = 33, 24
    cache = Cache(stop=stop, first=first, pages=[[2, 2], [2, 2]], shared=shared, spare=spare)
    query_LWQD = torch.randn(L, W, H * G, D, generator=torch.Generator().manual_seed(3))
    runtime, row = Runtime(cache, query_LWQD), PRESETS[policy]
    output_QDM = torch.randn(H * G, D, 5, generator=torch.Generator().manual_seed(4))

    def weigh(policy, layer, tokens, *, seen_A, **more):  # type: ignore[no-untyped-def]
        arguments = {"output_QDM": output_QDM, "factor_QDC": None, "scale": SCALE, "query_WQD": seen_A[layer]}
        return score_layer(policy, layer=layer, key_HSD=tokens[0], value_HSD=tokens[1], **arguments, **more)

    repeats = Repeats(cache.view, cache.codec, runtime, weigh, Known())  # type: ignore[arg-type]
    kept = Kept(cache.packing.blocks, "16", cache.pages_LH, cache.position_PN, torch.zeros(cache.position_PN.shape))
    repeats._known.note(Eviction(Score("r", policy, 0.5, cache.region, ()), cache.packing), kept)
    region = Region(stop, shared, W, N, N)
    score = Score("r", policy, 0.5, region, cache.growth, policy, cache.region)
    scored = repeats.score(score, row)
    for layer in range(L):
        # The same layer, whole, with keys that no query looks at in the place of what is gone, and values of nothing.
        there_HS = torch.zeros(H, stop, dtype=torch.bool)
        for head in range(H):
            there_HS[head, cache.there(layer, head)] = True
        key_HSD = cache.key_LHSD[layer].clone()
        value_HSD = cache.value_LHSD[layer] * there_HS[..., None]
        found = naive(row, query_LWQD[layer], key_HSD, value_HSD, there_HS, output_QDM, region)
        for head in range(H):
            r = layer * H + head
            count = int(scored.candidates.there_R[r])
            at = scored.candidates.position_RC[r, :count].long()
            assert at.tolist() == [p for p in cache.there(layer, head) if shared * N <= p < region.tokens[1]]
            assert torch.allclose(scored.candidates.score_RC[r, :count], found[head, at - shared * N], rtol=1e-5)
    eviction = Eviction(score, replace_packing(cache, region, 2))
    (chosen,) = repeats.pack(scored, eviction)
    # What is in the packed pages is what they are said to hold.
    pages = cache.view.of_packed(torch.tensor(eviction.packing.blocks))
    rows = torch.arange(L * H).repeat_interleave(chosen.pages_LH.flatten())
    for page, r, positions in zip(pages, rows.tolist(), chosen.tokens_PN.long(), strict=True):
        halves = cache.view.data[page].view(2, N, D)
        at = positions[positions >= 0]
        assert torch.equal(halves[0, : len(at)], cache.key_LHSD[r // H, r % H, at])
        assert torch.equal(halves[1, : len(at)], cache.value_LHSD[r // H, r % H, at])
    counts = [int((p >= 0).sum()) for p in chosen.tokens_PN.split(chosen.pages_LH.flatten().tolist())]
    assert runtime.placed["r"].tokens_CLH.flatten().tolist() == counts


def test_a_page_with_room_left_has_the_steps_of_its_own_tokens(
    wide_pages: tuple[PageView, PageCodec, PageShape],
) -> None:
    """All of 320 tokens, in five pages of 76."""
    view, codec, shape = wide_pages
    runtime = SimpleNamespace(quantised=Quantised(view.data, shape, *codec.orders), place=lambda eviction, placed: None)
    repeats = Repeats(view, codec, runtime, scored_by_place, Known())  # type: ignore[arg-type]
    region, format = Region(320, 0, W, shape.rows, shape.rows), Format.of("k8v4", shape)
    score = Score("r", "keep-all", 1.0, region, tuple(range(20)), "keep-all")
    eviction = Eviction(score, Packing(region, tuple(range(40, 45)), format))
    (chosen,) = repeats.pack(repeats.score(score, PRESETS["keep-all"]), eviction)
    count_P = (chosen.tokens_PN >= 0).sum(dim=1)
    assert sorted(set(count_P.tolist())) == [320 - 4 * 76, 76]
    pages_LHB = view.of_blocks(torch.arange(20))
    raw = view.data[pages_LHB].unflatten(-1, (2, shape.rows, -1)).transpose(2, 3).flatten(3, 4)  # L H 2 T D
    packed = view.data[view.of_packed(torch.arange(40, 45))].view(torch.uint8)
    row_P = torch.arange(L * H).repeat_interleave(chosen.pages_LH.flatten())
    for half, found_PnD in enumerate(unpack_pages(packed, shape, "k8v4", channel_major=True)):
        true_PnD = raw.flatten(0, 1)[:, half][row_P[:, None], chosen.tokens_PN.clamp_min(0).long()]
        expected_PnD = requantised(true_PnD, count_P, CLASSES["k8v4"], keys=half == 0)
        there_Pn = chosen.tokens_PN >= 0
        assert torch.allclose(found_PnD[there_Pn], expected_PnD[there_Pn], rtol=0, atol=1e-5)  # roundings of float32


def test_what_is_known_of_a_first_packing_is_scored_by_the_policy_that_goes_on() -> None:
    """Behind 24 shared blocks, of which more come before than are chosen from; the last page has room left."""
    cache, stop, shared = Cache(stop=112, first=104, pages=[[1, 1], [1, 1]]), 112, 24
    region = Region(stop, shared, W, N, N)
    known: Known[Kept] = Known()
    repeats = Repeats(cache.view, cache.codec, SimpleNamespace(), scored_by_place, known)  # type: ignore[arg-type]
    tokens_PN = torch.tensor([[97, 99, 103, 110], [96, 104, -1, -1], [98, 99, 100, 101], [111, -1, -1, -1]]).int()
    chosen = Selection(torch.ones(L, H, dtype=torch.int32), tokens_PN)
    eviction = Eviction(Score("r", "halokv", 0.5, region, (), "random"), Packing(region, (40,), Format.plain(N)))
    empty_HTD = torch.empty(H, 16, D)
    repeats.note(eviction, (chosen,), lambda layer: (empty_HTD, empty_HTD))
    kept = known.of("r")
    assert torch.equal(kept.position_Pn, tokens_PN) and kept.blocks == (40,)
    for layer in range(L):
        whole = scored_by_place(
            replace(PRESETS["random"], sinks=0), layer, (torch.empty(H, stop, D),) * 2, keep_ratio=0.5,
            evictable=(0, stop), window=0,
        ).scores_HE  # fmt: skip
        for head in range(H):
            at = tokens_PN[layer * H + head].long()
            assert torch.equal(kept.score_Pn[layer * H + head][at >= 0], whole[head, at[at >= 0]])


def scored_by_place(policy, layer, tokens, **more):  # type: ignore[no-untyped-def]
    arguments = {"query_WQD": None, "output_QDM": None, "factor_QDC": None, "scale": SCALE}
    return score_layer(policy, layer=layer, key_HSD=tokens[0], value_HSD=tokens[1], **arguments, **more)


@pytest.mark.parametrize("policy", ["random", "streamingllm", "random-uneven"])
def test_what_lasts_is_scored_by_its_place_in_the_text(policy: str) -> None:
    """Behind what is packed, and at the first time: as if all were scored at once."""
    cache, row = Cache(stop=33, first=24, pages=[[2, 2], [2, 2]], shared=1), PRESETS[policy]
    repeats = Repeats(cache.view, cache.codec, Runtime(cache, torch.empty(0)), scored_by_place, Known())  # type: ignore[arg-type]
    nothing = torch.zeros(cache.position_PN.shape)
    kept = Kept(cache.packing.blocks, "16", cache.pages_LH, cache.position_PN, nothing)
    repeats._known.note(Eviction(Score("r", policy, 0.5, cache.region, ()), cache.packing), kept)
    region = Region(33, 1, W, N, N)
    again = repeats.score(Score("r", policy, 0.5, region, cache.growth, policy, cache.region), row).candidates
    blocks = (*cache.shared_blocks, *range(20, 25), *cache.growth)  # of which no policy here reads anything
    first = repeats.score(Score("r", policy, 0.5, region, blocks, policy), row).candidates
    empty_HSD = torch.empty(H, 32, D)
    for layer in range(L):
        whole = scored_by_place(
            replace(row, sinks=0), layer, (empty_HSD, empty_HSD), keep_ratio=0.5, evictable=(0, 32), window=0
        )
        for head in range(H):
            r = layer * H + head
            assert torch.equal(again.score_RC[r, 2 * N : 4 * N], whole.scores_HE[head, 24:])
            assert torch.equal(first.score_RC[r], whole.scores_HE[head, N:])
            assert first.position_RC[r].tolist() == list(range(N, 32))


@pytest.fixture(scope="module")
def wide_pages() -> tuple[PageView, PageCodec, PageShape]:
    """Pages of 16 rows of 32 dimensions, on which the compiled functions work."""
    rows, head_size = 16, 32
    caches = torch.randn(L, 64, H, rows, 2 * head_size, generator=torch.Generator().manual_seed(1))
    order = torch.arange(rows * head_size).view(rows, head_size)
    return PageView.from_layers(list(caches)), PageCodec(order, order), PageShape(rows, head_size, 4)


@pytest.mark.parametrize("widths", ["8", "k8v4"])
@pytest.mark.parametrize("policy", ["random", "snapkv"])
def test_quantised_pages_are_read_and_quantised_anew(
    wide_pages: tuple[PageView, PageCodec, PageShape], policy: str, widths: str
) -> None:
    """Packed twice, from 320 tokens and then 112 more. A key is off by half a step of each page that it was in; a
    value comes out of the second as it came out of the first; and a window looks at what comes out."""
    view, codec, shape = wide_pages
    rows, row, format = shape.rows, PRESETS[policy], Format.of(widths, shape)
    page_tokens = format.parts[0].tokens
    blocks = tuple(range(27))
    pages_LHB = view.of_blocks(torch.tensor(blocks))
    raw = view.data[pages_LHB].unflatten(-1, (2, rows, -1)).transpose(2, 3).flatten(3, 4)  # L H 2 T D
    query_LWQD = torch.randn(L, W, H * G, shape.head_size, generator=torch.Generator().manual_seed(3))
    looked: list[tuple[Tensor, Tensor]] = []

    def weigh(policy, layer, tokens, *, seen_A=None, **more):  # type: ignore[no-untyped-def]
        looked.append(tokens)
        arguments = {"output_QDM": None, "factor_QDC": None, "scale": SCALE}
        arguments["query_WQD"] = None if seen_A is None else seen_A[layer]
        return score_layer(policy, layer=layer, key_HSD=tokens[0], value_HSD=tokens[1], **arguments, **more)

    runtime = SimpleNamespace(
        quantised=Quantised(view.data, shape, *codec.orders),
        windows={"r": query_LWQD},
        tables={"r": SimpleNamespace(shared_blocks=())},
        place=lambda eviction, placed: None,
    )
    repeats, came_out = Repeats(view, codec, runtime, weigh, Known()), []  # type: ignore[arg-type]
    before: Region | None = None
    for stop, packed_blocks in ((320, (40, 41)), (432, (50, 51))):
        region = Region(stop, 0, W, rows, rows)
        source = blocks[0 if before is None else before.full_blocks : region.full_blocks]
        if before is None and not row.lasting:  # whose first eviction is an ordinary one: packed by another's scores
            score = Score("r", "random", 0.5, region, source, "random")
            scored = repeats.score(score, PRESETS["random"])
        else:
            score = Score("r", policy, 0.5, region, source, policy, before)
            scored = repeats.score(score, row)
        eviction = Eviction(score, Packing(region, packed_blocks, format))
        (chosen,) = repeats.pack(scored, eviction)
        pages_P = view.of_packed(torch.tensor(packed_blocks))
        found = unpack_pages(view.data[pages_P].view(torch.uint8), shape, widths, channel_major=True)
        came_out.append((chosen, found))
        before = region
        runtime.windows["r"] = query_LWQD
    values_at_first: dict[tuple[int, int], Tensor] = {}
    for turn, (chosen, (key_PnD, value_PnD)) in enumerate(came_out):
        assert chosen.tokens_PN.shape[1] == page_tokens
        row_P = torch.arange(L * H).repeat_interleave(chosen.pages_LH.flatten())
        seen_twice = 0
        for r, at_n, keys, values in zip(row_P.tolist(), chosen.tokens_PN.long(), key_PnD, value_PnD, strict=True):
            there = at_n >= 0
            true_key, true_value = raw[r // H, r % H][:, at_n[there]]
            # Half a step each time, and what minima and steps lose as fp16 numbers.
            step = (true_key.amax(0) - true_key.amin(0)).max() / 255
            assert (keys[there] - true_key).abs().max() <= step * (0.51 if turn == 0 else 1.1)
            levels = 255 if widths == "8" else 15
            spread = (true_value.amax(1) - true_value.amin(1)) / levels
            assert ((values[there] - true_value).abs().amax(1) <= 0.51 * spread + FP16_MINIMUM).all()
            for position, value in zip(at_n[there].tolist(), values[there], strict=True):
                first = values_at_first.setdefault((r, position), value)
                assert torch.allclose(first, value, rtol=0, atol=1e-5)  # roundings of float32
                seen_twice += turn
        assert not turn or seen_twice > L * H * page_tokens
    if not row.lasting:
        chosen, (key_PnD, value_PnD) = came_out[0]
        row_P = torch.arange(L * H).repeat_interleave(chosen.pages_LH.flatten())
        for r, at_n, keys, values in zip(row_P.tolist(), chosen.tokens_PN.long(), key_PnD, value_PnD, strict=True):
            key_HSD, value_HSD = looked[-L + r // H]
            there = at_n >= 0
            assert torch.equal(key_HSD[r % H, at_n[there]], keys[there])
            assert torch.equal(value_HSD[r % H, at_n[there]], values[there])
            assert torch.equal(key_HSD[r % H, 320:], raw[r // H, r % H, 0, 320:432])


def naive(row, query_WQD, key_HSD, value_HSD, there_HS, output_QDM, region):  # type: ignore[no-untyped-def]
    """Each head's keys moved far away from all queries where they are gone: their attention is nothing, whatever reads
    it. An axis of its own makes room for that."""
    away = torch.where(there_HS, 0.0, -1e4)[..., None]
    query_WQD = torch.nn.functional.pad(query_WQD, (0, 1), value=1.0)
    key_HSD = torch.cat([key_HSD, away], dim=-1)
    value_HSD = torch.nn.functional.pad(value_HSD, (0, 1))
    output_QDM = torch.nn.functional.pad(output_QDM, (0, 0, 0, 1))
    return score_layer(
        row,
        layer=0,
        query_WQD=query_WQD,
        key_HSD=key_HSD,
        value_HSD=value_HSD,
        output_QDM=output_QDM,
        factor_QDC=None,
        scale=SCALE,
        keep_ratio=0.5,
        evictable=region.tokens,
        window=W,
    ).scores_HE
