"""Kept tokens packed into the whole pages of fresh blocks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import LAYOUTS, WIDE, int32, make_pages, make_table, randn, select_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PagedKV, compact, reference

L, H, N, D = 2, 3, 16, 80
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def bits(pages: PagedKV) -> torch.Tensor:
    """Every page's K and V as integers, so that NaN equals itself."""
    both = torch.cat([pages.key_PND, pages.value_PND], dim=-1)
    return both.contiguous().view(torch.uint8)


def blank(layout: str, dtype: torch.dtype) -> PagedKV:
    """A cache of 8 blocks filled with values that no kept token has."""
    pages = make_pages(L, 8, H, N, D, layout=layout, dtype=dtype)
    pages.key_PND.fill_(100.0)
    pages.value_PND.fill_(200.0)
    return pages


def chosen(tokens: int, packed_blocks: int) -> tuple[Tensor, Tensor]:
    """(first page of each head, kept tokens) of random scores."""
    selection = select_pages(randn(L, H, tokens).abs(), packed_blocks, N)
    return selection.offset_O, selection.tokens_PN.flatten()


@pytest.mark.parametrize("target_layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "target_dtype", "key_scale", "value_scale"), [
    (torch.bfloat16, torch.bfloat16, 1.0, 1.0), (torch.float32, torch.float16, 0.5, 3.0), (FP8[0], FP8[0], 1.0, 1.0),
    (torch.bfloat16, FP8[0], 128.0, 256.0), (FP8[1], torch.bfloat16, 2.0, 0.5),
    (torch.float32, torch.float32, 1.0, 1.0),
])  # fmt: skip
def test_kept_tokens_land_in_order_and_nothing_else_changes(
    dtype: torch.dtype, target_dtype: torch.dtype, key_scale: float, value_scale: float, target_layout: str
) -> None:
    source = make_pages(L, 12, H, N, D, layout="LBNHC", dtype=dtype)
    if target_dtype in FP8 and DEVICE == "cpu":
        # The interpreter loses the carry when it rounds to fp8: give it numbers that need no rounding. Some saturate.
        for view in (source.key_PND, source.value_PND):
            view.copy_(view.to(target_dtype).to(dtype))
    table, fresh = make_table(1, 6, 12)[0], int32(5, 2)
    offset, token = chosen(6 * N, 2)
    actual, expected = blank(target_layout, target_dtype), blank(target_layout, target_dtype)
    scales = {"key_scale": key_scale, "value_scale": value_scale}
    compact(source, table, offset, token, actual, fresh, **scales)
    reference.compact(source, table, offset, token, expected, fresh, **scales)
    assert torch.equal(bits(actual), bits(expected))


def test_reference_follows_the_definition_token_by_token() -> None:
    source, target = make_pages(L, 12, H, N, D), blank("BLHNC", torch.float32)
    table, fresh = make_table(1, 6, 12)[0], int32(5, 2, 7)
    offset, token = chosen(6 * N, 3)
    compact(source, table, offset, token, target, fresh)
    for row, (first, last) in enumerate(itertools.pairwise(offset.tolist())):
        for flat in range(first, last):
            slot_layer, slot_head = divmod(flat % (L * H), H)
            to = target.page_of(slot_layer, slot_head, fresh[flat // (L * H)])
            for place in range(N):
                kept = int(token[flat * N + place])
                origin = source.page_of(row // H, row % H, table[kept // N])
                assert torch.equal(target.key_PND[to, place], source.key_PND[origin, kept % N])
                assert torch.equal(target.value_PND[to, place], source.value_PND[origin, kept % N])


def test_pages_of_another_length_and_the_same_cache() -> None:
    source, table = make_pages(L, 12, H, 8, D), make_table(1, 6, 12)[0]
    offset, token = chosen(48, 1)
    actual, expected = blank("LBHNC", torch.float32), blank("LBHNC", torch.float32)
    compact(source, table, offset, token, actual, int32(4))
    reference.compact(source, table, offset, token, expected, int32(4), key_scale=1.0, value_scale=1.0)
    assert torch.equal(bits(actual), bits(expected))
    cache = make_pages(L, 12, H, N, D)
    free = next(block for block in range(1, 12) if block not in table.tolist())
    offset, token = chosen(6 * N, 1)
    before = cache.key_PND.clone()
    compact(cache, table, offset, token, cache, int32(free))
    changed = (cache.key_PND != before).flatten(1).any(1).nonzero().flatten().tolist()
    assert set(changed) == {int(cache.page_of(layer, head, free)) for layer in range(L) for head in range(H)}


@pytest.mark.parametrize(("head_size", "dtype"), WIDE)
def test_wide_heads(head_size: int, dtype: torch.dtype) -> None:
    source, table = make_pages(L, 12, H, N, head_size, dtype=dtype), make_table(1, 6, 12)[0]
    offset, token = chosen(6 * N, 2)
    actual, expected = (make_pages(L, 8, H, N, head_size, dtype=torch.bfloat16, seed=7) for _ in range(2))
    scale = 1.0 if dtype == torch.bfloat16 else 0.5
    compact(source, table, offset, token, actual, int32(5, 2), key_scale=scale)
    reference.compact(source, table, offset, token, expected, int32(5, 2), key_scale=scale, value_scale=1.0)
    assert torch.equal(bits(actual), bits(expected))


def test_nothing_to_pack() -> None:
    target = blank("LBHNC", torch.float32)
    before = bits(target)
    empty = torch.zeros(0, dtype=torch.int32, device=before.device)
    compact(make_pages(L, 12, H, N, D), int32(1), int32(*[0] * (L * H + 1)), empty, target, empty)
    assert torch.equal(bits(target), before)


def test_mismatched_caches_are_refused() -> None:
    empty = int32(1)
    with pytest.raises(ValueError, match=r"source \(L, H, D\)=\(2, 3, 64\): choose \(2, 3, 80\), as target has"):
        compact(make_pages(L, 8, H, N, 64), empty, empty, empty, blank("LBHNC", torch.float32), empty)
