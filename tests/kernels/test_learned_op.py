"""The learned score: formula and ops against loops in float64, before and after packing."""

from __future__ import annotations

import math
import re

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import LAYOUTS, assert_close, in_float64, int32, make_pages, make_table, randn, select_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import (
    PagedKV,
    RaggedTokens,
    Rotation,
    compact,
    learned_page_scores,
    learned_scores,
    reference,
)

N, L, H = 16, 2, 2
FP32, FP16, BF16, FP8 = torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn


def make_rotation(
    turned: int, interleaved: bool = False, positions: int = 256, dtype: torch.dtype = FP32, base: float = 100.0
) -> Rotation:
    """As YaRN makes them: with a factor, which a table rounded to 16 bits has besides."""
    frequency = base ** (-torch.arange(0, turned, 2, dtype=torch.float64) / turned)
    angle = torch.arange(positions, dtype=torch.float64)[:, None] * frequency
    return Rotation((1.2 * torch.cat([angle.cos(), angle.sin()], dim=1)).to(dtype).to(DEVICE), interleaved)


def make_weights(rows: int, head_size: int, seed: int = 5) -> Tensor:
    """fp32 [rows, X]: for scores from about 1e-3 up, few of them cut off at 1; some rows have larger ones."""
    weight = randn(rows, 2 * head_size + 1, seed=seed) * head_size**-0.5
    weight[:, -1] -= torch.linspace(1, 2.5, rows, device=DEVICE)
    return weight


def naive(key: list, value: list, position: int, weight: list, rotation: Rotation | None) -> float:
    """The score of one token, of one number at a time. A pair of a key is a complex number: RoPE multiplies it."""
    if position < 4:
        return 1.0
    before = list(key)
    if rotation is not None:
        table = rotation.table_PR[position].double().tolist()
        half = len(table) // 2
        for i in range(half):
            a, b = (2 * i, 2 * i + 1) if rotation.interleaved else (i, i + half)
            pair = complex(key[a], key[b]) / complex(table[i], table[half + i])
            before[a], before[b] = pair.real, pair.imag
    return min(math.exp(math.fsum(w * x for w, x in zip(weight, [*before, *value, 1.0], strict=True))), 1.0)


def naive_scores(
    pages: PagedKV, layer: int, table: Tensor, counts: list[int], weight: Tensor, rotation: Rotation | None,
    key_scale: float, value_scale: float,
) -> Tensor:  # fmt: skip
    """float64 [H, total tokens]."""
    key, value = (pages.key_PND.double() * key_scale).tolist(), (pages.value_PND.double() * value_scale).tolist()
    blocks, first, weights = table.tolist(), pages.layer_page_L.tolist()[layer], weight.double().tolist()
    scores: list[list[float]] = []
    for head in range(pages.num_kv_heads):
        scores.append([])
        for row, count in enumerate(counts):
            for t in range(count):
                block, n = blocks[row][t // pages.page_tokens], t % pages.page_tokens
                page = first + block * pages.block_pages + head * pages.head_pages
                scores[-1].append(naive(key[page][n], value[page][n], t, weights[head], rotation))
    return torch.tensor(scores, dtype=torch.float64, device=DEVICE)


STYLES = {
    "halves": make_rotation(32),
    "neighbours": make_rotation(32, interleaved=True),
    "some halves": make_rotation(12),
    "some neighbours": make_rotation(20, interleaved=True, dtype=BF16),
    "a rounded table": make_rotation(32, dtype=FP16),
    "not turned": None,
}


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("dtype", [FP32, FP16, BF16, FP8, torch.float8_e5m2])
def test_op_and_reference_equal_loops(style: str, dtype: torch.dtype) -> None:
    """Rows of several lengths, one of them empty, in both layers; fp8 pages have scales."""
    counts = [17, 0, 70]
    pages, table = make_pages(L, 16, H, N, 32, dtype=dtype), make_table(3, 5, 16)
    tokens = RaggedTokens.of(counts, DEVICE)
    scales = {"key_scale": 0.5, "value_scale": 1.5} if dtype.itemsize == 1 else {"key_scale": 1.0, "value_scale": 1.0}
    for layer in range(L):
        weight = make_weights(H, 32, seed=layer)
        arguments = (pages, layer, table, tokens, weight, STYLES[style])
        expected = naive_scores(pages, layer, table, counts, weight, STYLES[style], **scales)
        assert expected.min() < 0.1
        assert 0.05 < (expected == 1).double().mean() < 0.5
        assert_close(learned_scores(*arguments, **scales), expected, FP32, "op")
        plain = reference.learned_scores(*arguments, **scales, out_HT=torch.empty(H, tokens.total, device=DEVICE))
        assert_close(plain, expected, FP32, "reference")


@pytest.mark.parametrize("interleaved", [False, True])
def test_weights_meet_keys_as_they_were_before_rope(interleaved: bool) -> None:
    """Keys that were turned here, as the layer does it: what is scored is what they were."""
    rotation, weight, before = make_rotation(24, interleaved), make_weights(1, 32), randn(1, 90, 32, seed=7)
    angle = torch.complex(*rotation.table_PR[:90].chunk(2, dim=1))
    order = torch.arange(24, device=DEVICE)
    first, second = (order[::2], order[1::2]) if interleaved else order.chunk(2)
    turned = torch.complex(before[..., first], before[..., second]) * angle
    key = before.clone()
    key[..., first], key[..., second] = turned.real, turned.imag
    pages, table = make_pages(1, 8, 1, N, 32), make_table(1, 6, 8)
    value = randn(90, 32, seed=8)
    where = pages.page_of(0, 0, table[0].repeat_interleave(N)[:90]), torch.arange(90, device=DEVICE) % N
    pages.key_PND[where], pages.value_PND[where] = key[0], value
    expected = (torch.cat([before[0], value, torch.ones(90, 1, device=DEVICE)], dim=1) @ weight[0]).exp().clamp(max=1)
    actual = learned_scores(pages, 0, table, RaggedTokens.of([90], DEVICE), weight, rotation)
    assert_close(actual[0, 4:], expected[4:], FP32)
    assert (actual[0, :4] == 1).all()


@pytest.mark.parametrize(("head_size", "turned", "interleaved"), [
    (64, 64, False), (80, 80, False), (80, 32, True), (96, 96, False), (128, 128, False), (128, 64, True),
    (192, 192, True), (256, 64, False), (512, 512, False), (512, 128, True),
])  # fmt: skip
@pytest.mark.parametrize("dtype", [BF16, FP8])
def test_heads_of_every_size(head_size: int, turned: int, interleaved: bool, dtype: torch.dtype) -> None:
    """Several tiles, the last of them not full."""
    pages, weight = make_pages(1, 10, 2, N, head_size, dtype=dtype), make_weights(2, head_size)
    rotation = make_rotation(turned, interleaved, dtype=BF16)
    table, tokens = make_table(1, 9, 10), RaggedTokens.of([131], DEVICE)
    actual = learned_scores(pages, 0, table, tokens, weight, rotation)
    with in_float64():
        expected = reference.learned_scores(
            pages, 0, table, tokens, weight.double(), rotation, key_scale=1.0, value_scale=1.0,
            out_HT=torch.zeros_like(actual).double(),
        )  # fmt: skip
    assert_close(actual, expected, FP32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_layout_into_a_layer_of_a_larger_buffer(layout: str) -> None:
    counts, rotation, weight = [50], STYLES["halves"], make_weights(L * H, 32).view(L, H, -1)
    pages, table = make_pages(L, 8, H, N, 32, layout=layout, dtype=BF16), make_table(1, 4, 8)
    out = torch.zeros(3, H, 60, device=DEVICE)
    learned_scores(pages, 1, table, RaggedTokens.of(counts, DEVICE), weight[1], rotation, out_HT=out[1, :, 5:55])
    assert_close(out[1, :, 5:55], naive_scores(pages, 1, table, counts, weight[1], rotation, 1.0, 1.0), FP32)
    assert (out[[0, 2]] == 0).all()
    assert (out[1, :, :5] == 0).all()
    assert (out[1, :, 55:] == 0).all()


@pytest.mark.parametrize("turned_by", ["one rotation", "a rotation a layer"])
@pytest.mark.parametrize(("dtype", "page_tokens", "head_size"), [(FP32, 16, 32), (BF16, 24, 64), (FP8, 16, 512)])
def test_packed_tokens_score_what_they_scored_in_place(
    turned_by: str, dtype: torch.dtype, page_tokens: int, head_size: int
) -> None:
    """Pages of any number of tokens, of both layers in a call where these turn their keys alike; wide heads have
    several tiles a page."""
    pages = make_pages(L, 16, H, page_tokens, head_size, dtype=dtype)
    rotations = [make_rotation(head_size)] * L
    if turned_by == "a rotation a layer":
        rotations[1] = make_rotation(head_size // 2, interleaved=True)
    weight, count = make_weights(L * H, head_size), 5 * page_tokens
    scales = {"key_scale": 0.7, "value_scale": 1.3}
    table, tokens = make_table(1, 5, 8), RaggedTokens.of([count], DEVICE)
    in_place = torch.stack([
        learned_scores(pages, layer, table, tokens, weight.view(L, H, -1)[layer], rotation, **scales)
        for layer, rotation in enumerate(rotations)
    ])  # fmt: skip
    selection = select_pages(in_place, 3, page_tokens)
    fresh = int32(12, 9, 14)
    compact(pages, table[0], selection.offset_O, selection.tokens_PN.flatten(), pages, fresh)
    page_P, position_PN = pages.of_packed(fresh), selection.tokens_PN
    row_P = torch.repeat_interleave(torch.arange(L * H, device=DEVICE), selection.offset_O.diff()).int()
    expected_PN = in_place.flatten(0, 1)[row_P[:, None], position_PN]
    assert len({*selection.offset_O.diff().tolist()}) > 1, "heads keep the same number of pages"
    ends = selection.offset_O.tolist()
    together = [(0, L * H)] if turned_by == "one rotation" else [(layer * H, layer * H + H) for layer in range(L)]
    for score in (learned_page_scores, reference.learned_page_scores):
        parts = []
        for (first, last), rotation in zip(together, rotations, strict=False):
            own = slice(ends[first], ends[last])
            parts.append(score(pages, page_P[own], row_P[own], position_PN[own], weight, rotation, **scales))
        assert_close(torch.cat(parts), expected_PN, FP32, score.__module__)


def test_an_empty_slot_scores_nothing_whatever_is_in_it() -> None:
    pages, weight = make_pages(1, 8, 1, N, 32), make_weights(3, 32)
    position = torch.arange(3 * N, dtype=torch.int32, device=DEVICE).view(3, N) + 100
    position[0, 5:] = position[2] = -1
    pages.key_PND[4, 5:], pages.value_PND[4, 7:] = float("nan"), float("nan")
    arguments = pages, torch.tensor([4, 6, 1], device=DEVICE), int32(2, 0, 1), position, weight, STYLES["halves"]
    actual = learned_page_scores(*arguments)
    assert_close(actual, reference.learned_page_scores(*arguments, key_scale=1.0, value_scale=1.0), FP32)
    assert torch.equal(actual > 0, position >= 0)


def test_nothing_to_score() -> None:
    pages, table, weight = make_pages(1, 8, H, N, 32), make_table(2, 2, 8), make_weights(H, 32)
    assert learned_scores(pages, 0, table, RaggedTokens.of([0, 0], DEVICE), weight, None).shape == (H, 0)
    page, position = torch.empty(0, dtype=torch.int64, device=DEVICE), int32()
    assert learned_page_scores(pages, page, position, position.view(0, N), weight, None).shape == (0, N)


TABLE = make_rotation(32).table_PR
WRONG = {
    "layer=1: choose 0 to 0": {"layer": 1},
    "table_RB.dtype=torch.int64": {"table_RB": make_table(1, 4, 8).long()},
    "table_RB.shape=(2, 4): choose [1, any]": {"table_RB": make_table(1, 4, 8).repeat(2, 1)},
    "tokens.longest=65: choose 0 to 64": {"tokens": RaggedTokens.of([65], DEVICE)},
    "tokens.longest=50: choose 0 to 49": {"rotation": Rotation(TABLE[:49])},
    "weight_HX.shape=(2, 64): choose [2, 65]": {"weight_HX": randn(2, 64)},
    "weight_HX.dtype=torch.bfloat16": {"weight_HX": randn(2, 65, dtype=BF16)},
    "weight_HX.stride()=(1, 2)": {"weight_HX": randn(65, 2).T},
    "rotation.table_PR.shape=(1, 256, 32)": {"rotation": Rotation(TABLE[None])},
    "rotation.table_PR.shape[1]=31: choose an even number from 2 to 32": {"rotation": Rotation(TABLE[:, :31])},
    "rotation.table_PR.shape[1]=34": {"rotation": make_rotation(34)},
    "rotation.table_PR.dtype=torch.float64": {"rotation": Rotation(TABLE.double())},
    "rotation.table_PR.stride()=(1, 256)": {"rotation": Rotation(TABLE.T.contiguous().T)},
    "out_HT.shape=(2, 51): choose [2, 50]": {"out_HT": randn(2, 51)},
    "out_HT.dtype=torch.float16": {"out_HT": randn(2, 50, dtype=FP16)},
    "out_HT.stride()=(1, 2)": {"out_HT": randn(50, 2).T},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_argument_is_named(message: str) -> None:
    right = {
        "pages": make_pages(1, 8, H, N, 32), "layer": 0, "table_RB": make_table(1, 4, 8),
        "tokens": RaggedTokens.of([50], DEVICE), "weight_HX": make_weights(H, 32), "rotation": Rotation(TABLE),
    }  # fmt: skip
    learned_scores(**right)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        learned_scores(**right | WRONG[message])


POSITION = torch.arange(2 * N, dtype=torch.int32, device=DEVICE).view(2, N)
WRONG_PAGES = {
    "page_P.dtype=torch.int32": {"page_P": int32(3, 4)},
    "page_P.shape=(1, 2): choose [any]": {"page_P": torch.tensor([[3, 4]], device=DEVICE)},
    "row_P.shape=(3,): choose [2]": {"row_P": int32(0, 1, 1)},
    "row_P.dtype=torch.int64": {"row_P": int32(0, 1).long()},
    "position_PN.shape=(2, 15): choose [2, 16]": {"position_PN": POSITION[:, 1:]},
    "position_PN.dtype=torch.int64": {"position_PN": POSITION.long()},
    "position_PN.stride()=(32, 1): choose contiguous": {"position_PN": POSITION.repeat(1, 2)[:, :N]},
    "weight_RX.shape=(2, 64): choose [any, 65]": {"weight_RX": randn(2, 64)},
    "rotation.table_PR.shape[1]=34": {"rotation": make_rotation(34)},
}


@pytest.mark.parametrize("message", WRONG_PAGES)
def test_a_wrong_argument_for_pages_is_named(message: str) -> None:
    right = {
        "pages": make_pages(1, 8, H, N, 32), "page_P": torch.tensor([3, 4], device=DEVICE), "row_P": int32(0, 1),
        "position_PN": POSITION, "weight_RX": make_weights(H, 32), "rotation": Rotation(TABLE),
    }  # fmt: skip
    learned_page_scores(**right)
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        learned_page_scores(**right | WRONG_PAGES[message])
