"""Decode attention over shared blocks, packed pages and growth blocks."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import BENT, WIDE, assert_close, in_float64, int32, make_pages, make_state, make_table, randn
from vllm_defensive_kernels import PackedState, PagedKV, formulas, ragged_paged_decode, reference

L, H, N = 2, 3, 16
# Rows: evicted with a shared block, evicted, un-evicted, one whose first head keeps no page. Pages by (layer, head).
PAGES = [[2, 0, 5, 1, 1, 3], [9, 1, 2, 2, 3, 1], [0] * 6, [0, 3, 1, 4, 2, 2]]
FRESH = [[40, 44], [41, 47, 50], [], [45, 49]]
SHARED, GROWTH = [1, 0, 0, 0], [8, 10, 0, 9]
SEQ_LENS = [8 * N + 7, 10 * N + N, 63, 9 * N + 1]
SLOTS = [2, 0, -1, 1]  # slot of the state that each row has; the state's own order differs from the batch's


def state_of_rows() -> PackedState:
    """State whose slot i belongs to the row with SLOTS == i."""
    rows = [SLOTS.index(slot) for slot in range(3)]
    return make_state(
        [PAGES[row] for row in rows], [FRESH[row] for row in rows], [SHARED[r] for r in rows], [GROWTH[r] for r in rows]
    )


def run_both(
    pages: PagedKV, query: Tensor, starts: list[int], seq_lens: list[int], layer: int, splits: int, **scales: Any
) -> tuple[Tensor, Tensor]:
    """The op's result and the float64 reference's."""
    table = make_table(len(seq_lens), 12, 64)
    rows = int32(*starts), int32(*seq_lens), int32(*SLOTS[: len(seq_lens)])
    args = (query, pages, layer, table, *rows, state_of_rows())
    longest = max(end - begin for begin, end in itertools.pairwise(starts))
    actual = ragged_paged_decode(*args, max_query_len=longest, splits=splits, **scales)
    scales = {"scale": query.shape[-1] ** -0.5, "key_scale": 1.0, "value_scale": 1.0, **scales}
    with in_float64():
        expected = reference.ragged_paged_decode(*args, out_TQD=torch.zeros_like(query.double()), **scales)
    return actual, expected


@pytest.mark.parametrize("splits", [1, 2, 4])
@pytest.mark.parametrize(("group", "head_size", "dtype"), [
    (7, 80, torch.float32), (1, 32, torch.float32), (4, 64, torch.bfloat16), (3, 64, torch.float16),
])  # fmt: skip
def test_three_segments_equal_dense_attention(
    group: int, head_size: int, dtype: torch.dtype, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)  # so that rows this short are split at all
    pages = make_pages(L, 64, H, N, head_size, dtype=dtype)
    query = randn(4, H * group, head_size, dtype=dtype)
    actual, expected = run_both(pages, query, [0, 1, 2, 3, 4], SEQ_LENS, 1, splits)
    assert actual.dtype == dtype
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(("head_size", "dtype"), WIDE)
def test_wide_heads(head_size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 1 and 5 query tokens, for which 512 take two tiles of queries, and splits that are merged."""
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)
    pages, query = make_pages(L, 64, H, N, head_size, dtype=dtype), randn(6, H * 4, head_size, dtype=torch.bfloat16)
    actual, expected = run_both(pages, query, [0, 1, 6], SEQ_LENS[:2], 1, 2)
    assert_close(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.nightly), 4])
@pytest.mark.parametrize(("cap", "void"), BENT, ids=str)
def test_caps_and_voids(cap: float, void: float | None, splits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each query head has a logit of nothing of its own, which takes its share once, however many splits are merged."""
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)
    pages, query, void_Q = make_pages(L, 64, H, N, 32), 3 * randn(10, H * 4, 32), None
    if void is not None:
        void_Q = void + randn(H * 4)
    rows = [0, 3, 4, 9, 10], SEQ_LENS, 1, splits
    actual, expected = run_both(pages, query, *rows, cap=cap, void_Q=void_Q)
    assert_close(actual, expected, torch.float32)
    monkeypatch.setattr("vllm_defensive_kernels.decode.runs_triton", lambda tensor: False)
    without, _ = run_both(pages, query, *rows)
    assert float((actual - without).abs().max()) > 0.1, "else this could not fail"


def test_caps_and_voids_of_half_precision_models() -> None:
    pages, query = make_pages(L, 64, H, N, 64, dtype=torch.bfloat16), randn(4, H * 4, 64, dtype=torch.bfloat16)
    void_Q = 2 + randn(H * 4, dtype=torch.bfloat16)
    actual, expected = run_both(pages, query, [0, 1, 2, 3, 4], SEQ_LENS, 1, 2, cap=50.0, void_Q=void_Q)
    assert_close(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("layout", ["LBHNC", "LBNHC"])
def test_layouts_and_layers_give_the_same_attention(layout: str) -> None:
    query = randn(4, H * 2, 32)
    actual, expected = run_both(make_pages(L, 64, H, N, 32, layout=layout), query, [0, 1, 2, 3, 4], SEQ_LENS, 0, 2)
    assert_close(actual, expected, torch.float32)


def test_layers_at_uneven_distances_give_the_same_attention() -> None:
    """As where other tensors lie between the layers' caches: page numbers are then read, not computed."""
    even, query = make_pages(L, 64, H, N, 32), randn(4, H * 2, 32)
    assert even.layer_pages is not None
    args = (query, [0, 1, 2, 3, 4], SEQ_LENS, 1, 2)
    actual, expected = run_both(dataclasses.replace(even, layer_pages=None), *args)
    assert_close(actual, expected, torch.float32)


def test_several_query_tokens_are_causal_among_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)
    starts = [0, 3, 4, 9, 10]  # 3, 1, 5 and 1 tokens: rows of a mixed batch
    actual, expected = run_both(make_pages(L, 64, H, N, 32), randn(10, H * 2, 32), starts, SEQ_LENS, 1, 4)
    assert_close(actual, expected, torch.float32)


def test_a_prompt_that_goes_on_over_packed_pages_spans_several_query_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)
    starts = [0, 2, 14]  # 12 tokens x 7 heads need two tiles of 64 rows
    actual, expected = run_both(make_pages(L, 64, H, N, 32), randn(14, H * 7, 32), starts, SEQ_LENS[:2], 1, 2)
    assert_close(actual, expected, torch.float32)


def test_unevicted_row_equals_formula_of_window_attention() -> None:
    """The last query's row of the formula that scores prompts is plain decode attention."""
    pages, table, query = make_pages(1, 12, 2, N, 32), make_table(1, 5, 12), randn(1, 6, 32)
    state = PackedState.empty(1, 1, 1, 2, query.device)
    actual = ragged_paged_decode(query, pages, 0, table, int32(0, 1), int32(63), int32(-1), state)
    heads = [reference.gather_head(pages.key_PND, pages, 0, head, table[0], 63) for head in range(2)]
    weight = formulas.window_attention(query, torch.stack(heads), 32**-0.5)[:, :, 0]
    values = [reference.gather_head(pages.value_PND, pages, 0, head, table[0], 63) for head in range(2)]
    assert_close(actual[0], (weight @ torch.stack(values)).flatten(0, 1), torch.float32)


def test_padding_rows_of_a_graph_touch_nothing() -> None:
    pages, query = make_pages(L, 64, H, N, 32), randn(6, H * 2, 32)
    out = torch.full_like(query, 7.0)
    table = make_table(6, 9, 64)
    lens, slots = int32(*SEQ_LENS[:2], 0, 0, 0, 0), int32(*SLOTS[:2], -1, -1, -1, -1)
    starts = int32(0, 1, 2, 2, 2, 2, 2)
    ragged_paged_decode(query, pages, 0, table, starts, lens, slots, state_of_rows(), out_TQD=out, splits=2)
    assert (out[2:] == 7.0).all()
    assert not (out[:2] == 7.0).any()


def test_row_without_keys_gives_zeros() -> None:
    pages, query = make_pages(1, 4, 1, N, 32), randn(1, 2, 32)
    state = PackedState.empty(1, 1, 1, 1, query.device)
    out = ragged_paged_decode(query, pages, 0, make_table(1, 1, 4), int32(0, 1), int32(0), int32(-1), state, splits=2)
    assert (out == 0).all()


def test_fp8_pages_are_scaled_when_read() -> None:
    pages = make_pages(L, 64, H, N, 32, dtype=torch.float8_e4m3fn)
    query = randn(4, H * 2, 32, dtype=torch.bfloat16)
    actual, expected = run_both(pages, query, [0, 1, 2, 3, 4], SEQ_LENS, 1, 2, key_scale=0.5, value_scale=2.0)
    assert_close(actual, expected, torch.bfloat16)


def test_launch_grid_does_not_depend_on_lengths() -> None:
    from vllm_defensive_kernels.decode import choose_splits

    assert choose_splits(rows=1, group=4, num_kv_heads=8, max_query_len=1) == 64
    assert choose_splits(rows=256, group=4, num_kv_heads=8, max_query_len=1) == 16
    assert choose_splits(rows=1, group=4, num_kv_heads=8, max_query_len=8192) == 1
    wide = {head_size: choose_splits(1, 8, 1, 512, head_size) for head_size in (128, 256, 512)}
    assert wide == {128: 32, 256: 16, 512: 8}  # query tiles are smaller, so there are more of them to split


@pytest.mark.parametrize(("change", "message"), [
    ({"splits": 3}, "splits=3: choose a power of two"),
    ({"max_query_len": 0}, "max_query_len=0: choose 1 or more"),
    ({"layer": 2}, "layer=2: choose 0 to 1"),
])  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, int], message: str) -> None:
    pages, query = make_pages(L, 64, H, N, 32), randn(1, H * 2, 32)
    args = {"layer": 0, "splits": 1, "max_query_len": 1, **change}
    with pytest.raises(ValueError, match=message):
        ragged_paged_decode(
            query, pages, args["layer"], make_table(1, 9, 64), int32(0, 1), int32(5), int32(-1), state_of_rows(),
            splits=args["splits"], max_query_len=args["max_query_len"],
        )  # fmt: skip
