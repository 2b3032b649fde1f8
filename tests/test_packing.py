"""The arithmetic that both processes share: exact counts, and what holds for every prompt."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_defensive.packing import WIDTHS, Format, Packing, Region
from vllm_defensive.plan import StepMessage
from vllm_defensive_kernels.widths import PageShape


@pytest.mark.parametrize(
    "tokens, shared, keep, block_size, expected",
    [
        (1000, 0, 0.25, 32, 8),  # ceil((250 - 8) / 32)
        (1000, 0, 0.2, 32, 6),  # ceil((200 - 8) / 32) = 6 exactly
        (1000, 31, 0.2, 32, 0),  # nothing is left to evict
        (1000, 20, 0.5, 32, 6),  # ceil((0.5 * 360 - 8) / 32) = ceil(5.375)
        (640, 0, 0.01, 32, 1),  # the window alone fills a block
        (641, 0, 0.01, 32, 1),  # 31 of its tokens are in full blocks
        (645, 0, 0.01, 128, 1),
        (640, 0, 0.99, 32, 0),  # 20 blocks for 20 would free none
        (640, 0, 1.0, 32, 0),
        (63, 0, 0.2, 32, 0),  # one full block cannot become fewer
        (64, 0, 0.2, 32, 1),
        (5, 0, 0.2, 32, 0),
    ],
)
def test_budgets_by_hand(tokens: int, shared: int, keep: float, block_size: int, expected: int) -> None:
    assert Region(tokens, shared, 32, block_size, block_size).budget_blocks(keep, Format.plain(block_size)) == expected


@pytest.mark.parametrize(
    "tokens, shared, window, block_size, expected",
    [
        (64, 0, 32, 32, 32),
        (70, 0, 32, 32, 26),  # six of the window are in the tail
        (95, 0, 31, 32, 0),  # all of it is
        (96, 2, 70, 32, 32),  # a wide window reaches into the shared blocks
        (96, 3, 70, 32, 0),
    ],
)
def test_forced_tokens_by_hand(tokens: int, shared: int, window: int, block_size: int, expected: int) -> None:
    assert Region(tokens, shared, window, block_size, block_size).forced_tokens == expected


@st.composite
def regions(draw: st.DrawFn, pages_per_block: tuple[int, ...] = (1, 2, 4)) -> Region:
    block_tokens = draw(st.sampled_from([16, 32, 128]))
    stop = draw(st.integers(1, 20_000))
    return Region(
        stop,
        shared_blocks=draw(st.integers(0, stop // block_tokens)),
        window=draw(st.integers(1, 300)),
        block_tokens=block_tokens,
        page_tokens=block_tokens // draw(st.sampled_from(pages_per_block)),
    )


ratios = st.floats(0.001, 1)


@given(regions(), ratios)
@example(Region(64, 0, 1, 32, 32), 1.0)
@example(Region(64, 0, 1, 32, 16), 1.0)
def test_an_eviction_frees_at_least_one_block_and_holds_what_must_stay(region: Region, keep: float) -> None:
    packed = region.budget_blocks(keep, region.plain)
    if packed == 0:
        return
    assert region.stop > region.window
    assert 1 <= packed < region.blocks
    packing = Packing(region, tuple(range(packed)), region.plain)
    assert packing.saved_blocks >= 1
    assert packing.head_pages * region.page_tokens >= region.forced_tokens
    evictable = region.stop - region.tokens[0]
    kept = packing.kept_tokens - region.tokens[0]
    assert kept >= keep * evictable - 1e-6, "at least the ratio is kept"
    # Never a block more than the ratio, the window or the one block that a request needs anyway ask for.
    excess = kept - max(keep * evictable, region.forced_tokens + region.tail)
    assert excess < region.block_tokens + region.tail + 1e-6


@given(regions(), ratios, st.integers(1, 200))
def test_longer_prompts_are_never_evicted_less_readily(region: Region, keep: float, blocks: int) -> None:
    """Growing by whole blocks never needs fewer packed ones: start-up relies on it (see EvictableSpec)."""
    longer = replace(region, stop=region.stop + blocks * region.block_tokens)
    assert longer.budget_blocks(keep, longer.plain) >= region.budget_blocks(keep, region.plain)


@given(regions())
def test_a_region_is_counted_token_by_token(region: Region) -> None:
    first, last = region.tokens
    blocks = [t // region.block_tokens for t in range(region.stop)]
    full = [block for block in set(blocks) if blocks.count(block) == region.block_tokens] if region.stop < 500 else None
    if full is not None:
        assert (region.full_blocks, region.tail) == (len(full), region.stop - len(full) * region.block_tokens)
    assert last - first == region.blocks * region.block_tokens
    observed = range(max(0, region.stop - region.window), region.stop)
    assert region.forced_tokens == sum(t in observed for t in range(first, last))


@given(regions(), st.integers(1, 40), st.integers(0, 500))
def test_what_a_head_reads_is_its_three_segments(region: Region, pages: int, later: int) -> None:
    """Shared blocks, its packed pages, and what follows the last full block."""
    seq_len = region.stop + later
    segments = region.shared_blocks * region.block_tokens, pages * region.page_tokens
    assert (
        Packing(region, (), region.plain).length(pages * region.page_tokens, seq_len)
        == sum(segments) + seq_len - region.tokens[1]
    )


def test_two_pages_a_block_by_hand() -> None:
    """The budget is in blocks, for these are allocated; what heads compete for are their pages, twice as many."""
    region = Region(stop=1000, shared_blocks=0, window=40, block_tokens=64, page_tokens=32)
    assert (region.full_blocks, region.tail, region.tokens) == (15, 40, (0, 960))
    assert region.forced_tokens == 0, "the window is all in the tail"
    packed = region.budget_blocks(0.25, region.plain)  # ceil((250 - 40) / 64)
    packing = Packing(region, tuple(range(packed)), region.plain)
    assert (packed, packing.head_pages, packing.saved_blocks, packing.kept_tokens) == (4, 8, 11, 4 * 64 + 40)
    assert packing.length(kept=3 * 32, seq_len=1005) == 3 * 32 + 45


def test_a_message_without_contents_is_false() -> None:
    assert not StepMessage()
    assert StepMessage(observe={"a": (0, 1)})


@pytest.mark.parametrize("widths, blocks", [("16", 0), ("8", 17), ("k8v4", 13), ("4", 9), ("8,4", 10), ("16,8,4", 0)])
def test_to_keep_all_is_to_pack_all_in_fewer_bits(widths: str, blocks: int) -> None:
    """31 blocks of 32 tokens; pages of 32 rows of 64 numbers hold 60, 79 or 116."""
    region = Region(1000, 0, 32, 32, 32)
    format = Format.of(widths, PageShape(32, 64))
    assert region.budget_blocks(1.0, format) == blocks
    packing = Packing(region, tuple(range(blocks)), format)
    assert not blocks or packing.kept_tokens == 1000


@given(regions((1,)), ratios, st.sampled_from(list(WIDTHS)), st.sampled_from([64, 80, 128]))
def test_widths_take_no_more_than_their_share_and_no_less_than_a_page(
    region: Region, keep: float, widths: str, head_size: int
) -> None:
    format = Format.of(widths, PageShape(region.page_tokens, head_size))
    packed, plain = (region.budget_blocks(keep, each) for each in (format, region.plain))
    if not packed:
        return
    assert packed < region.blocks and (not plain or packed <= plain)
    packing = Packing(region, tuple(range(packed)), format)
    assert region.tail + region.tokens[0] < packing.kept_tokens <= region.stop
    assert packing.held_tokens <= packing.kept_tokens or packing.kept_tokens == region.stop


@pytest.mark.parametrize("shared", [0, 4])
def test_a_budget_counts_what_stays_in_place(shared: int) -> None:
    """In blocks of 32: 1,000 tokens, of which a ratio of 1 would keep all and a budget of 512 keeps 16 blocks, those
    that stay in place, and the tail of 8 tokens, among them."""
    region = Region(1000, shared, 32, 32, 32)
    packed = region.budget_blocks(1.0, region.plain, most_tokens=512)
    assert (shared + packed) * 32 == 512 and region.budget_blocks(0.1, region.plain, most_tokens=512) < packed
    assert region.budget_blocks(1.0, region.plain, most_tokens=512, held_blocks=packed) == 0, "that many are held"
    assert region.budget_blocks(1.0, region.plain, most_tokens=512, held_blocks=packed + 1) == packed
