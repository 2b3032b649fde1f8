"""Tables of evicted requests: every head reads its shared, packed and growing pages in this order, and no other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.evictions import eviction
from vllm_defensive.plan import Eviction
from vllm_defensive.worker.cpu.pages import PageView
from vllm_defensive.worker.cpu.tables import BatchTable, Placed, RequestTable
from vllm_defensive_kernels.pages import PageAddresses

L, BLOCKS, H, N, D = 2, 200, 2, 4, 2


@pytest.fixture(scope="module")
def view() -> PageView:
    return PageView.from_layers(list(torch.zeros(L, BLOCKS, H, N, 2 * D)))


def planned(stop: int, shared: int, packed: tuple[int, ...], first_block: int = 10, page_tokens: int = N) -> Eviction:
    source = tuple(range(first_block, first_block + -(-stop // N)))
    return eviction(stop, packed, shared_blocks=shared, source_blocks=source, block_tokens=N, page_tokens=page_tokens)


def table_of(view: PageAddresses, plan: Eviction, pages_LH: Tensor) -> RequestTable:
    return RequestTable(
        view, plan.packing, plan.score.source_blocks[: plan.region.shared_blocks], Placed(pages_LH[None])
    )


def expected_pages(
    view: PageAddresses, plan: Eviction, pages_LH: Tensor, growth: list[int], layer: int, head: int
) -> list:
    """Pages that a head reads: shared blocks, its own of the packed ones, then blocks of later tokens."""
    flat = view.of_packed(torch.tensor(plan.packing.blocks)).tolist()
    before = int(pages_LH.flatten()[: layer * H + head].sum())
    own = flat[before : before + int(pages_LH[layer, head])]

    def positional(blocks: list[int]) -> list[int]:
        parts = range(view.pages_per_block)
        return [int(view.page_of(layer, head, block, part)) for block in blocks for part in parts]

    return [*positional(list(plan.score.source_blocks[: plan.region.shared_blocks])), *own, *positional(growth)]


PLAN = planned(stop=30, shared=1, packed=(100, 101, 102))
PAGES_LH = torch.tensor([[1, 5], [2, 4]], dtype=torch.int32)  # 3 blocks of 4 pages


def test_what_comes_next_takes_the_place_of_a_heads_empty_pages(view: PageView) -> None:
    """Of a head that had fewer tokens to choose from than find room in its pages."""
    held_LH = torch.tensor([[4, 12], [8, 16]])
    shared = PLAN.score.source_blocks[: PLAN.region.shared_blocks]
    table = RequestTable(view, PLAN.packing, shared, Placed(PAGES_LH[None], held_LH[None]))
    blocks = [17, 18]
    table.grow(torch.tensor(blocks))
    for layer in range(L):
        for head in range(H):
            pages = expected_pages(view, PLAN, PAGES_LH, blocks, layer, head)
            empty = int(PAGES_LH[layer, head]) - int(held_LH[layer, head]) // N
            end = len(pages) - len(blocks) * view.pages_per_block
            expected = pages[: end - empty] + pages[end:]
            assert table.pages_LHP[layer, head, : len(expected)].tolist() == expected
            offset = int(table.offset_LH[layer, head])
            assert offset + PLAN.region.stop == N + int(held_LH[layer, head]) + PLAN.region.tail


@pytest.mark.parametrize("growth", [1, 2, 31, 33, 90])
def test_a_table_grows_one_page_a_head_and_block(view: PageView, growth: int) -> None:
    table = table_of(view, PLAN, PAGES_LH)
    blocks = list(range(17, 17 + growth))
    for some in (blocks[: growth // 2], blocks[growth // 2 :]):
        if some:
            table.grow(torch.tensor(some))
    assert table.growth_blocks == growth
    for layer in range(L):
        for head in range(H):
            expected = expected_pages(view, PLAN, PAGES_LH, blocks, layer, head)
            assert table.pages_LHP[layer, head, : len(expected)].tolist() == expected


def test_blocks_of_two_pages_a_head() -> None:
    """As where one model's layers need blocks of other sizes; its packed pages are half a block long."""
    halves = PageAddresses(
        layer_page_L=torch.tensor([0, 2 * H * BLOCKS]), block_pages=2 * H, head_pages=2, num_kv_heads=H,
        page_tokens=N // 2, pages_per_block=2,
    )  # fmt: skip
    pages_LH = torch.tensor([[3, 9], [5, 7]], dtype=torch.int32)  # 3 blocks of 8 pages
    plan = planned(stop=30, shared=1, packed=(100, 101, 102), page_tokens=N // 2)
    table = table_of(halves, plan, pages_LH)
    table.grow(torch.tensor([17]))
    table.grow(torch.tensor([18, 19]))
    assert (table.full_blocks, table.growth_blocks) == (7, 3)
    for layer in range(L):
        for head in range(H):
            expected = expected_pages(halves, plan, pages_LH, [17, 18, 19], layer, head)
            assert table.pages_LHP[layer, head, : len(expected)].tolist() == expected
            # one shared block, the head's pages, and everything after the seven full blocks of the prompt
            assert table.offset_LH[layer, head] == N + pages_LH[layer, head] * N // 2 - 28


def test_lengths_follow_from_vllms_own(view: PageView) -> None:
    table = table_of(view, PLAN, PAGES_LH)
    batch = BatchTable()
    batch.update([table], [None])
    for seq_len in (31, 32, 33, 77):
        lengths = batch.lengths(torch.tensor([seq_len], dtype=torch.int32))
        for layer in range(L):
            for head in range(H):
                # one shared block, the head's pages, and everything after the seven full blocks of the prompt
                assert lengths[layer, head] == (1 + PAGES_LH[layer, head]) * N + seq_len - 28


def test_rows_come_grow_and_go_in_any_order(view: PageView) -> None:
    plans = [PLAN, planned(41, 0, (110, 111), 40), planned(64, 2, (120,), 60)]
    pages = [PAGES_LH, torch.tensor([[2, 2], [3, 1]]), torch.tensor([[1, 1], [1, 1]])]
    rows = [table_of(view, plan, p) for plan, p in zip(plans, pages, strict=True)]
    growth: list[list[int]] = [[], [], []]
    batch = BatchTable()
    next_block = 130
    for step, present in enumerate([[0], [0, 1], [0, 1], [1, 0], [1, 0], [1, 0, 2], [2], [2], [0, 2], [0, 2]] * 5):
        new: list[Tensor | None] = []
        for e in present:
            if (step + e) % 2 or not growth[e]:
                growth[e].append(next_block % BLOCKS)
                new.append(torch.tensor([next_block % BLOCKS]))
                next_block += 1
            else:
                new.append(None)
        batch.update([rows[e] for e in present], new)
        lengths = batch.lengths(torch.tensor([plans[e].region.stop for e in present], dtype=torch.int32))
        for position, e in enumerate(present):
            for layer in range(L):
                for head in range(H):
                    expected = expected_pages(view, plans[e], pages[e], growth[e], layer, head)
                    found = batch.pages_LHEP[layer, head, position, : len(expected)].tolist()
                    assert found == expected, (step, e)
                    assert lengths[layer, head * len(present) + position] <= len(expected) * N


def test_a_batch_that_stays_the_same_keeps_its_tables(view: PageView) -> None:
    rows = [table_of(view, PLAN, PAGES_LH) for _ in range(2)]
    batch = BatchTable()
    batch.update(rows, [torch.tensor([17]), torch.tensor([18])])
    memory = batch.pages_LHEP.data_ptr()
    for block in range(19, 30):
        batch.update(rows, [torch.tensor([block]), None])
    assert batch.pages_LHEP.data_ptr() == memory
