"""Decode attention over packed pages of several classes is that over a plain cache of what their codes stand for."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import assert_close, in_float64, int32, make_pages, make_table, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PackedState, PagedKV, quantised, ragged_paged_decode, reference
from vllm_defensive_kernels.decode import step_tokens
from vllm_defensive_kernels.widths import CLASSES

L, H, N = 2, 2, 16
# Rows: packed in k8v4 behind a shared block, plain, in 8 and 4, un-evicted, in every class. Pages of each class, by
# (layer, head); where they have more room than a head has tokens, its last page is not full, or empty.
PAGES = [
    {"k8v4": [1, 3, 0, 2]},
    {"16": [2, 0, 5, 1]},
    {"8": [1, 0, 2, 1], "4": [1, 2, 0, 1]},
    {},
    {"16": [1, 0, 2, 1], "8": [1, 1, 0, 0], "k8v4": [0, 1, 1, 1], "4": [1, 0, 2, 0]},
]
FRESH = [[70, 74], [71, 77], [72, 75, 79], [], [81, 83, 80]]
SHARED, GROWTH = [1, 0, 0, 0, 0], [9, 8, 10, 0, 9]
SEQ_LENS = [9 * N + 7, 8 * N + N, 10 * N + 5, 63, 9 * N + 6]
SLOTS = [2, 0, 3, -1, 1]  # of the state, whose order differs from the batch's
ALL = tuple(CLASSES)


def state_of(rows: list[int], classes: tuple[str, ...]) -> PackedState:
    """State of these rows, each in the slot that SLOTS says."""
    state = PackedState.empty(max(SLOTS) + 1, 4, L, H, DEVICE, classes)
    for row in rows:
        slot, counts = SLOTS[row], [PAGES[row].get(name, [0] * (L * H)) for name in classes]
        state.fresh_SK[slot, : len(FRESH[row])] = int32(*FRESH[row])
        state.offset_SO[slot, 1:] = int32(*itertools.accumulate(itertools.chain(*counts)))
        state.shared_S[slot], state.growth_S[slot] = SHARED[row], GROWTH[row]
    return state


def held_tokens(pages: PagedKV, row: int, head: int) -> dict[str, int]:
    """Tokens of each class that a (layer, head) of a row holds."""
    left, held = (GROWTH[row] - SHARED[row]) * N, {}
    for name, counts in PAGES[row].items():
        held[name] = min(counts[head] * pages.page_shape.tokens(name), left)
        left -= held[name]
    return held


def fill(pages: PagedKV, row: int) -> None:
    """Write random codes into the row's pages of codes."""
    flat, target_P = 0, pages.of_packed(int32(*FRESH[row]))
    for name, counts in PAGES[row].items():
        for head, count in enumerate(counts):
            left, n = held_tokens(pages, row, head)[name], pages.page_shape.tokens(name)
            for _ in range(count):
                if name != "16":
                    numbers = (randn(1, n, pages.head_size, seed=1000 * row + flat + more) for more in (0, 500))
                    page = quantised.pack_pages(
                        *numbers, int32(max(min(left, n), 0)), pages.page_shape, name, channel_major=False
                    )
                    pages.row_PNY[target_P[flat]] = page.view(pages.row_PNY.shape[1:])
                left -= n
                flat += 1


def tokens_of(pages: PagedKV, table_B: Tensor, row: int, layer: int, head: int) -> tuple[Tensor, Tensor]:
    """Keys and values of one head of a row, what grows last: fp32 `[T, D]` each."""
    parts: list[tuple[Tensor, Tensor]] = []

    def add(page_B: Tensor, tokens: int) -> None:
        parts.append(tuple(data[page_B].flatten(0, 1)[:tokens].float() for data in (pages.key_PND, pages.value_PND)))

    shared, growth, seq_len = SHARED[row], GROWTH[row], SEQ_LENS[row]
    add(pages.page_of(layer, head, table_B[:shared]), shared * N)
    flat, own, target_P = 0, layer * H + head, pages.of_packed(int32(*FRESH[row]))
    for name, held in held_tokens(pages, row, own).items():
        counts = PAGES[row][name]
        page_P = target_P[flat + sum(counts[:own]) :][: counts[own]]
        flat += sum(counts)
        if name == "16":
            add(page_P, held)
            continue
        page_PY = pages.row_PNY[page_P].flatten(1)
        unpacked = quantised.unpack_pages(page_PY, pages.page_shape, name, channel_major=False)
        parts.append(tuple(data.flatten(0, 1)[:held] for data in unpacked))
    add(pages.page_of(layer, head, table_B[growth : -(-seq_len // N)]), seq_len - growth * N)
    key, value = zip(*parts, strict=True)
    return torch.cat(key), torch.cat(value)


def over_plain_cache(
    query_TQD: Tensor, starts: list[int], layer: int, pages: PagedKV, table_RB: Tensor, cap: float,
    void_Q: Tensor | None,
) -> Tensor:  # fmt: skip
    """The same op, un-evicted, a head of a row at a time, over what its codes stand for in the queries' dtype."""
    out, group = torch.empty_like(query_TQD), query_TQD.shape[1] // H
    for row, (begin, end) in enumerate(itertools.pairwise(starts)):
        for head in range(H):
            key_TD, value_TD = tokens_of(pages, table_RB[row], row, layer, head)
            blocks = -(-len(key_TD) // N)
            plain = make_pages(1, blocks + 1, 1, N, pages.head_size, dtype=query_TQD.dtype)
            for data, numbers in ((plain.key_PND, key_TD), (plain.value_PND, value_TD)):
                data[1:].flatten(0, 1)[: len(numbers)] = numbers.to(query_TQD.dtype)
            args = torch.arange(1, blocks + 1, device=DEVICE).int()[None], int32(0, end - begin), int32(len(key_TD))
            heads = slice(head * group, (head + 1) * group)
            out[begin:end, heads] = ragged_paged_decode(
                query_TQD[begin:end, heads].contiguous(), plain, 0, *args, int32(-1),
                PackedState.empty(1, 1, 1, 1, DEVICE), max_query_len=end - begin, splits=1, cap=cap,
                void_Q=None if void_Q is None else void_Q[heads],
            )  # fmt: skip
    return out


def assert_as_plain(
    head_size: int, group: int, dtype: torch.dtype, starts: list[int], *, splits: int, layer: int = 1,
    layout: str = "BLHNC", even_layers: bool = True, cap: float = 0.0, void: float | None = None,
) -> None:  # fmt: skip
    """By the kernel, and by the reference in float64. That rounds none of the numbers, and the interpreter rounds to
    bf16 towards zero, which is more than a step together: of bf16 the plain cache says enough."""
    rows = list(range(len(PAGES)))
    pages = make_pages(L, 84, H, N, head_size, layout=layout, dtype=dtype)
    for row in rows:
        fill(pages, row)
    if not even_layers:
        pages = dataclasses.replace(pages, layer_pages=None)
    query, table = randn(starts[-1], H * group, head_size, dtype=dtype), make_table(len(rows), 12, 70)
    state = state_of([row for row in rows if SLOTS[row] >= 0], ALL)
    args = (query, pages, layer, table, int32(*starts), int32(*SEQ_LENS), int32(*SLOTS), state)
    longest = max(end - begin for begin, end in itertools.pairwise(starts))
    void_Q = None if void is None else void + randn(H * group)
    softmax = {"cap": cap, "void_Q": void_Q}
    actual = ragged_paged_decode(*args, max_query_len=longest, splits=splits, **softmax)
    assert_close(actual, over_plain_cache(query, starts, layer, pages, table, cap, void_Q), dtype, "plain cache")
    if dtype == torch.bfloat16:
        return
    scales = {"scale": head_size**-0.5, "key_scale": 1.0, "value_scale": 1.0, **softmax}
    with in_float64():
        expected = reference.ragged_paged_decode(*args, out_TQD=torch.zeros_like(query.double()), **scales)
    assert_close(actual, expected, dtype, "reference")


@pytest.fixture(autouse=True)
def short_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm_defensive_kernels.decode.MIN_STEPS", 1)  # so that rows this short are split at all


@pytest.mark.parametrize(
    ("head_size", "group", "dtype", "splits"),
    [
        (32, 2, torch.float32, 1),
        (64, 4, torch.bfloat16, 4),
        (80, 3, torch.float16, 1),
        *(
            pytest.param(*each, splits, marks=pytest.mark.nightly)
            for splits in (1, 4)
            for each in (
                (80, 7, torch.float32),
                (64, 3, torch.float16),
                (128, 4, torch.bfloat16),
                (256, 2, torch.bfloat16),
                (512, 1, torch.bfloat16),
            )
        ),
    ],
)
def test_rows_of_every_kind_in_one_batch(head_size: int, group: int, dtype: torch.dtype, splits: int) -> None:
    assert_as_plain(head_size, group, dtype, [0, 1, 2, 3, 4, 5], splits=splits)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_several_query_tokens_see_all_packed_tokens_and_are_causal_among_themselves(splits: int) -> None:
    assert_as_plain(32, 2, torch.float32, [0, 3, 4, 9, 10, 14], splits=splits)


@pytest.mark.parametrize("splits", [pytest.param(1, marks=pytest.mark.nightly), 4])
def test_caps_and_voids_over_all_pages_of_a_row(splits: int) -> None:
    assert_as_plain(32, 2, torch.float32, [0, 1, 2, 3, 4, 5], splits=splits, cap=1.0, void=1.0)


def test_rows_of_pages_that_lie_apart_and_layers_at_uneven_distances() -> None:
    assert_as_plain(32, 2, torch.float32, [0, 1, 2, 3, 4, 5], splits=2, layer=0, layout="LBNHC", even_layers=False)


def test_pages_as_the_cache_has_them_are_read_alike_whatever_other_classes_there_are() -> None:
    """To the bit: a slot and a row without codes take the same steps."""
    pages, table = make_pages(L, 84, H, N, 32), make_table(2, 12, 40)
    query, rows = randn(2, H * 2, 32), [1, 3]
    lens, slots = int32(*(SEQ_LENS[r] for r in rows)), int32(*(SLOTS[r] for r in rows))
    plain, coded = (
        ragged_paged_decode(query, pages, 1, table, int32(0, 1, 2), lens, slots, state_of([1], classes), splits=2)
        for classes in (("16",), ("16", "8", "4"))
    )
    assert torch.equal(plain, coded)


def test_steps_begin_with_pages_and_waste_little() -> None:
    assert [step_tokens(n) for n in (29, 39, 58, 80, 64, 130)] == [32, 16, 64, 32, 64, 32]
    assert [step_tokens(58, size) for size in (128, 256, 512)] == [64, 32, 16]


def test_caches_that_hold_no_codes_are_refused() -> None:
    pages, query = make_pages(L, 84, H, N, 32, dtype=torch.float8_e4m3fn), randn(1, H, 32)
    args = (query, pages, 0, make_table(1, 12, 40), int32(0, 1), int32(5), int32(-1))
    ragged_paged_decode(*args, state_of([], ("16",)), splits=1)
    with pytest.raises(ValueError, match="choose fp32, fp16 or bf16 for quantised pages"):
        ragged_paged_decode(*args, state_of([], ("16", "4")))
    with pytest.raises(ValueError, match=r"state.offset_SO.shape=\(4, 5\): choose \[any, 9\]"):
        state = dataclasses.replace(state_of([], ("16",)), classes=("16", "4"))
        ragged_paged_decode(query, make_pages(L, 84, H, N, 32), *args[2:], state)
