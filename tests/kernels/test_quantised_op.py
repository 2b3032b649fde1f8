"""Kept tokens packed as codes: the formulas against loops in float64, the kernel against the formulas, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.kernels.cases import LAYOUTS, int32, make_pages, make_table, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PagedKV, compact_quantised, quantised, reference
from vllm_defensive_kernels.widths import CLASSES, PageShape, header_bytes

L, H = 2, 2
QUANTISED = [name for name, each in CLASSES.items() if each.quantised]
SHAPES = [
    pytest.param(rows, head_size, id=f"N={rows}-D={head_size}", marks=[pytest.mark.nightly] if large else [])
    for rows in (16, 32)
    for head_size in (64, 80, 128, 256)
    for large in [rows * head_size > 2048]
]
DTYPES = {64: torch.bfloat16, 80: torch.float32, 128: torch.float16, 256: torch.bfloat16}


def awkward(*shape: int, seed: int = 0) -> Tensor:
    """Normal numbers; one channel always large, as biases of keys make them, one constant; one token of zeros."""
    made = randn(*shape, seed=seed)
    made[..., 3] = made[..., 3] * 5 - 300
    made[..., 5] = 0.7
    made[..., 1, :] = 0
    return made


# -- the formulas -----------------------------------------------------------------------------------------------------


def assert_quantised(number: np.ndarray, step: float, minimum: float, code: np.ndarray, bits: int) -> None:
    """float64 numbers that share a step and a minimum, by the definition. Codes of numbers halfway between two may be
    either: the formulas compute in fp32."""
    levels, most = 2**bits - 1, 65504.0
    lowest, highest = float(number.min()), float(number.max())
    with np.errstate(over="ignore"):
        assert minimum == np.float16(min(max(lowest, -most), most))
        expected = min(max((highest - minimum) / levels, 0.0), most)
        rounded = np.float16(expected)
    assert step == (rounded or 1.0) or abs(step - expected) <= 1.01 * np.spacing(rounded) / 2
    exact = np.clip((number - minimum) / step, 0, levels)
    assert np.abs(code - exact).max() <= 0.5 + 1e-4


def assert_page(page_Y: np.ndarray, key_TD: np.ndarray, value_TD: np.ndarray, shape: PageShape, name: str) -> None:
    """Every byte of a page that holds these tokens, read as `widths` describes it."""
    width, (count, size), n = CLASSES[name], key_TD.shape, shape.tokens(name)
    assert page_Y.shape == (shape.page_bytes,)
    halves = page_Y[: 4 * (size + n)].view(np.float16).astype(np.float64)
    key_step, key_min, value_step, value_min = np.split(halves, np.cumsum([size, size, n]))
    start = header_bytes(size, n)
    assert start % 16 == 0 and not page_Y[4 * (size + n) : start].any()
    codes: list[np.ndarray] = []
    for bits in (width.key_bits, width.value_bits):
        code_nD = np.zeros((n, size))
        for token in range(n):
            for c in range(size):
                if bits == 8:
                    code_nD[token, c] = page_Y[start + token * size + c]
                else:
                    byte = page_Y[start + token * (size // 2) + c % (size // 2)]
                    code_nD[token, c] = byte >> 4 if c >= size // 2 else byte & 15
        codes.append(code_nD)
        start += n * size * bits // 8
        assert not code_nD[count:].any(), "tokens that are not there have codes"
    assert not page_Y[start:].any(), "what is not used is not zero"
    assert (value_step[count:] == 1).all() and not value_min[count:].any()
    if not count:
        assert (key_step == 1).all() and not key_min.any()
        return
    for c in range(size):
        assert_quantised(key_TD[:, c], key_step[c], key_min[c], codes[0][:count, c], width.key_bits)
    for t in range(count):
        assert_quantised(value_TD[t], value_step[t], value_min[t], codes[1][t], width.value_bits)


@pytest.mark.parametrize("page_class", QUANTISED)
@pytest.mark.parametrize(("rows", "head_size"), SHAPES)
def test_pages_follow_the_definition_number_by_number(rows: int, head_size: int, page_class: str) -> None:
    """Full and partial pages, and one with nothing; numbers beyond fp16."""
    shape = PageShape(rows, head_size)
    n = shape.tokens(page_class)
    key_PnD, value_PnD = (awkward(4, n, head_size, seed=seed) for seed in (0, 1))
    key_PnD[0, 2, 7], key_PnD[0, 3, 7], key_PnD[1, 0, 9], value_PnD[1, 1, 4] = 1e6, -1e8, 9e4, -3e5
    counts = [n, 3, 0, n - 1]
    page_PY = quantised.pack_pages(key_PnD, value_PnD, int32(*counts), shape, page_class, channel_major=False)
    for page_Y, key_nD, value_nD, count in zip(page_PY, key_PnD, value_PnD, counts, strict=True):
        numbers = (data_nD[:count].double().cpu().numpy() for data_nD in (key_nD, value_nD))
        assert_page(page_Y.cpu().numpy(), *numbers, shape, page_class)
    key, value = quantised.unpack_pages(page_PY, shape, page_class, channel_major=False)
    for unpacked, data_PnD, keys in ((key, key_PnD, True), (value, value_PnD, False)):
        expected = quantised.requantised(data_PnD, int32(*counts), CLASSES[page_class], keys=keys)
        for some, other, count in zip(unpacked, expected, counts, strict=True):
            assert torch.equal(some[:count], other[:count])


@pytest.mark.parametrize("page_class", QUANTISED)
@pytest.mark.parametrize(("rows", "head_size"), [(16, 64), (16, 80), (32, 128), (16, 256), (32, 16)])
@pytest.mark.parametrize("element_bytes", [2, 4])
def test_a_page_holds_as_many_tokens_as_fit(rows: int, head_size: int, element_bytes: int, page_class: str) -> None:
    shape, each = PageShape(rows, head_size, element_bytes), CLASSES[page_class].token_bytes(head_size)
    fits = [n for n in range(1000) if header_bytes(head_size, n) + n * each <= shape.page_bytes]
    assert shape.tokens(page_class) == max(fits) > rows


# -- the kernel -------------------------------------------------------------------------------------------------------


def bits(pages: PagedKV) -> Tensor:
    return torch.cat([pages.key_PND, pages.value_PND], dim=-1).contiguous().view(torch.uint8)


def source_of(
    rows: int, head_size: int, dtype: torch.dtype, tokens: int, layout: str = "LBNHC"
) -> tuple[PagedKV, Tensor]:
    """A prompt's cache and its block table."""
    blocks = -(-tokens // rows)
    pages = make_pages(L, blocks + 4, H, rows, head_size, layout=layout, dtype=dtype)
    for seed, view in enumerate((pages.key_PND, pages.value_PND)):
        view.copy_(awkward(*view.shape, seed=seed).to(dtype))
    if dtype != torch.float16:
        pages.key_PND[:, 2, 9], pages.value_PND[:, 4, 7] = 1e6, -3e5  # beyond fp16
    return pages, make_table(1, blocks, blocks + 4)[0]


def listed(pages_of_head: list[int], n: int, tokens: int) -> Tensor:
    """Random kept tokens of each head, ascending; the last page of the first head has room left, and that of the last
    head nothing at all."""
    generator, rows = torch.Generator().manual_seed(3), []
    for head, count in enumerate(pages_of_head):
        held = count * n - (0 if not count else n // 3 if head == 0 else n if head == len(pages_of_head) - 1 else 0)
        kept = torch.randperm(tokens, generator=generator)[:held].sort().values
        rows.append(torch.cat([kept, torch.full((count * n - len(kept),), -1)]).view(count, n))
    return torch.cat(rows).int().to(DEVICE)


def assert_same_bytes(
    source: PagedKV, table: Tensor, layout: str, dtype: torch.dtype, page_class: str, counts: list[int], tokens: int
) -> None:
    rows, head_size = source.page_tokens, source.head_size
    made = [make_pages(L, 6, H, rows, head_size, layout=layout, dtype=dtype, seed=7) for _ in range(2)]
    token_Pn = listed(counts, made[0].page_shape.tokens(page_class), tokens)
    args = (source, table, torch.nn.functional.pad(int32(*counts).cumsum(0), (1, 0)).int(), token_Pn)
    for op, target in zip((compact_quantised, reference.compact_quantised), made, strict=True):
        op(*args, target, int32(5, 2), page_class=page_class, first_page=3)
    assert torch.equal(*map(bits, made))
    untouched = make_pages(L, 6, H, rows, head_size, layout=layout, dtype=dtype, seed=7)
    every = made[0].of_blocks(torch.arange(6, device=DEVICE)).flatten()
    written = made[0].of_packed(int32(5, 2))[3 : 3 + sum(counts)]
    changed = (bits(made[0])[every] != bits(untouched)[every]).flatten(1).any(1)
    assert set(every[changed].tolist()) == set(written.tolist())


@pytest.mark.parametrize("page_class", QUANTISED)
@pytest.mark.parametrize(("rows", "head_size"), SHAPES)
def test_kernel_writes_the_bytes_of_the_formulas(rows: int, head_size: int, page_class: str) -> None:
    dtype, layout = DTYPES[head_size], LAYOUTS[(rows + QUANTISED.index(page_class)) % len(LAYOUTS)]
    tokens = PageShape(rows, head_size, dtype.itemsize).tokens(page_class) + 5
    source, table = source_of(rows, head_size, dtype, tokens)
    assert_same_bytes(source, table, layout, dtype, page_class, [1, 0, 1, 1], tokens)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("page_class", QUANTISED)
def test_pages_lie_as_the_layout_has_them(layout: str, page_class: str) -> None:
    """Heads with several pages, over two blocks; from pages of another length."""
    source, table = source_of(8, 32, torch.bfloat16, 90, layout)
    made = make_pages(L, 6, H, 16, 32, layout=layout, dtype=torch.bfloat16, seed=7)
    expected = make_pages(L, 6, H, 16, 32, layout=layout, dtype=torch.bfloat16, seed=7)
    token_Pn = listed([2, 1, 0, 2], made.page_shape.tokens(page_class), 90)
    for op, target in ((compact_quantised, made), (reference.compact_quantised, expected)):
        op(source, table, int32(0, 2, 3, 3, 5), token_Pn, target, int32(5, 2), page_class=page_class, first_page=2)
    assert torch.equal(bits(made), bits(expected))


def test_nothing_to_pack_and_what_cannot_be() -> None:
    source, table = source_of(16, 32, torch.float32, 60)
    target = make_pages(L, 4, H, 16, 32)
    before = bits(target)
    token_Pn = torch.zeros(0, target.page_shape.tokens("4"), dtype=torch.int32, device=DEVICE)
    args = (source, table, int32(0, 0, 0, 0, 0), token_Pn, target, int32(1))
    compact_quantised(*args, page_class="4", first_page=4)
    assert torch.equal(bits(target), before)
    for change, message in (
        ({"first_page": 5}, "first_page=5: choose 0 to 4"),
        ({"page_class": "16"}, "page_class='16': choose '8' or 'k8v4' or '4'"),
        ({"page_class": "8"}, r"token_Pn.shape=\(0, \d+\): choose \[0, \d+\]"),
    ):
        with pytest.raises(ValueError, match=message):
            compact_quantised(*args, **{"page_class": "4", "first_page": 0, **change})


def test_caches_that_hold_no_codes_are_refused() -> None:
    fp8 = make_pages(L, 4, H, 16, 32, dtype=torch.float8_e4m3fn)
    with pytest.raises(ValueError, match=r"key_PND.dtype=torch.float8_e4m3fn: choose fp32, fp16 or bf16"):
        _ = fp8.row_PNY
    apart = torch.zeros(2, 4, 16, 32)
    pages = make_pages(1, 4, 1, 16, 32)
    split = PagedKV(
        key_PND=apart[0], value_PND=apart[1], layer_page_L=pages.layer_page_L[:1].cpu(), block_pages=1, head_pages=1,
        num_kv_heads=1, page_tokens=16,
    )  # fmt: skip
    with pytest.raises(ValueError, match="choose values right behind their keys"):
        _ = split.row_PNY
