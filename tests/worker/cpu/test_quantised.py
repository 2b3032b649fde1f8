"""The compiled functions against the formulas: bytes of packed pages, and attention over pages of every class."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from vllm_defensive.worker.cpu import native
from vllm_defensive.worker.cpu.native import ClassRows, Quantised, class_shape
from vllm_defensive_kernels import quantised
from vllm_defensive_kernels.widths import CLASSES, PageShape

QUANTISED = [name for name, each in CLASSES.items() if each.quantised]
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}  # one step of the result's own rounding


def orders(shape: PageShape, usual: bool) -> tuple[Tensor, Tensor]:
    """Where numbers lie in the halves of a page: as vLLM has them, or anyhow."""
    numbers = torch.arange(shape.rows * shape.head_size)
    if usual:
        return numbers.view(shape.head_size, shape.rows).T, numbers.view(shape.rows, shape.head_size)
    shuffled = numbers[torch.randperm(len(numbers), generator=torch.Generator().manual_seed(1))]
    return shuffled.view(shape.rows, shape.head_size), shuffled.flip(0).view(shape.rows, shape.head_size)


def awkward(*shape: int, dtype: torch.dtype = torch.float32, seed: int) -> Tensor:
    """Normal numbers; one channel large, as biases of keys make them, one constant, one token of zeros."""
    made = torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    made[..., 3] = made[..., 3] * 5 - 300
    made[..., 5] = 0.7
    made[..., 1, :] = 0
    return made.to(dtype)


@pytest.mark.parametrize("page_class", QUANTISED)
@pytest.mark.parametrize("dtype", native.NUMBERS, ids=str)
@pytest.mark.parametrize("rows, head_size", [(32, 64), (16, 128), (32, 80), (16, 256), (32, 16)])
def test_packed_pages_are_those_of_the_formulas_to_the_bit(
    rows: int, head_size: int, dtype: torch.dtype, page_class: str
) -> None:
    shape, heads, skipped = PageShape(rows, head_size, dtype.itemsize), 2, 40
    n = shape.tokens(page_class)
    tokens = skipped + 2 * n
    key_HTD, value_HTD = (awkward(heads, tokens, head_size, dtype=dtype, seed=s) for s in (0, 1))
    if dtype != torch.float16:
        key_HTD[0, skipped + 7, 2], value_HTD[1, skipped + 9, 4] = 1e6, -3e5  # beyond fp16
    value_HTD = value_HTD[:, skipped:].contiguous()  # those of the first tokens are not needed
    count_P = torch.tensor([n, 3, 0, n, 1])
    generator = torch.Generator().manual_seed(2)
    kept = [(skipped + torch.randperm(2 * n, generator=generator)[:n]).sort().values for _ in count_P]
    token_PN = torch.stack(kept).int().masked_fill(torch.arange(n) >= count_P[:, None], -1)
    head_P, target_P = torch.tensor([0, 1, 0, 1, 1]).int(), torch.tensor([4, 1, 6, 2, 3])
    data = torch.full((8, shape.page_bytes // dtype.itemsize), 7.0).to(dtype)
    Quantised(data, shape, *orders(shape, usual=True)).pack(key_HTD, value_HTD, token_PN, head_P, target_P, page_class)
    row_PN = token_PN.clamp_min(skipped).long()
    key_PnD, value_PnD = key_HTD[head_P.long()[:, None], row_PN], value_HTD[head_P.long()[:, None], row_PN - skipped]
    expected = quantised.pack_pages(key_PnD, value_PnD, count_P, shape, page_class, channel_major=True)
    assert torch.equal(data[target_P].view(torch.uint8), expected)
    assert (data[[0, 5, 7]] == 7).all(), "no other page was touched"


class Sequence:
    """Pages of one sequence, written into a cache, and the keys and values that they stand for."""

    def __init__(self, cache: Cache) -> None:
        self.cache, self.table = cache, list[int]()
        self.keys, self.values = list[Tensor](), list[Tensor]()

    def add_plain(self, count: int) -> None:
        key, value = self.cache.data[self.cache.next_page].view(2, -1)
        self._add(key[self.cache.key_order][:count].float(), value[self.cache.value_order][:count].float())

    def add_quantised(self, page_class: str, count: int) -> None:
        shape, page = self.cache.shape, self.cache.next_page
        key, value = (awkward(1, shape.tokens(page_class), shape.head_size, seed=page + s) / 4 for s in (0, 100))
        packed = quantised.pack_pages(key, value, torch.tensor([count]), shape, page_class, channel_major=True)
        self.cache.data[page] = packed[0].view(self.cache.data.dtype)
        key, value = quantised.unpack_pages(packed, shape, page_class, channel_major=True)
        self._add(key[0, :count], value[0, :count])

    def _add(self, key: Tensor, value: Tensor) -> None:
        self.keys.append(key.double())
        self.values.append(value.double())
        self.table.append(self.cache.next_page)
        self.cache.next_page += 1


class Cache:
    def __init__(self, shape: PageShape, dtype: torch.dtype, usual: bool) -> None:
        numbers = torch.randn(60, shape.page_bytes // dtype.itemsize, generator=torch.Generator().manual_seed(0))
        self.shape, self.data, self.next_page = shape, numbers.to(dtype), 1
        self.key_order, self.value_order = orders(shape, usual)


@pytest.mark.parametrize("usual", [True, False], ids=["vllm-order", "another-order"])
@pytest.mark.parametrize("dtype", native.NUMBERS, ids=str)
@pytest.mark.parametrize("rows, head_size, group", [(32, 64, 3), (16, 128, 1), (32, 80, 5), (16, 256, 8), (32, 64, 20)])
@pytest.mark.parametrize(("cap", "void"), [(0.0, None), (30.0, 20.0)], ids=["plain", "cap and void"])
def test_attention_reads_every_segment(
    rows: int, head_size: int, group: int, dtype: torch.dtype, usual: bool, cap: float, void: float | None
) -> None:
    """Shared pages, pages of each class, some in part, and growing ones; rows of one and of several query tokens. Some
    logits here are hundreds."""
    cache = Cache(PageShape(rows, head_size, dtype.itemsize), dtype, usual)
    classes = [(name, cache.shape.tokens(name)) for name in CLASSES]
    shared_R, growth_R, query_lens = [2, 0, 1], [rows + 5, 9, 3 * rows], [1, 7, 3]
    pages_RC = [[1, 2, 1, 0], [0, 1, 2, 1], [0, 0, 0, 2]]
    room_RC = [[0, 5, 0, 0], [0, 0, 3, 1], [0, 0, 0, cache.shape.tokens("4")]]  # left in the last page of each class
    sequences, tokens_RC = [], []
    for shared, growth, pages_C, room_C in zip(shared_R, growth_R, pages_RC, room_RC, strict=True):
        sequence = Sequence(cache)
        for _ in range(shared):
            sequence.add_plain(rows)
        tokens_RC.append([pages * n - room for (_, n), pages, room in zip(classes, pages_C, room_C, strict=True)])
        for (name, n), pages, tokens in zip(classes, pages_C, tokens_RC[-1], strict=True):
            for page in range(pages):
                held = max(0, min(tokens - page * n, n))
                sequence.add_plain(held) if name == "16" else sequence.add_quantised(name, held)
        for start in range(0, growth, rows):
            sequence.add_plain(min(growth - start, rows))
        sequences.append(sequence)
    width = max(len(sequence.table) for sequence in sequences)
    start_R1 = torch.tensor([0, *query_lens]).cumsum(0).int()
    described = ClassRows(
        query_start_R1=start_R1,
        table_LRP=torch.tensor([[s.table + [0] * (width - len(s.table)) for s in sequences]]).int(),
        shared_pages_R=torch.tensor(shared_R).int(),
        growth_tokens_R=torch.tensor(growth_R).int(),
        class_pages_LRC=torch.tensor([pages_RC]).int(),
        class_tokens_LRC=torch.tensor([tokens_RC]).int(),
        class_shape_C3=class_shape(classes),
    )
    void_RG = (void or 0) + torch.linspace(-3, 3, len(sequences) * group).view(-1, group)
    query_XGD = torch.randn(int(start_R1[-1]), group, head_size, generator=torch.Generator().manual_seed(3)).to(dtype)
    out_XGD, scale = torch.empty_like(query_XGD), head_size**-0.5
    Quantised(cache.data, cache.shape, cache.key_order, cache.value_order).attend(
        query_XGD, out_XGD, described, 0, scale, cap, None if void is None else void_RG
    )
    ends = start_R1[1:].tolist()
    for row, (sequence, begin, end) in enumerate(zip(sequences, start_R1[:-1].tolist(), ends, strict=True)):
        key_TD, value_TD = torch.cat(sequence.keys), torch.cat(sequence.values)
        for token, g in product(range(begin, end), range(group)):
            seen = len(key_TD) - (end - 1 - token)
            logit_T = key_TD[:seen] @ query_XGD[token, g].double() * scale
            if cap:
                logit_T = cap * torch.tanh(logit_T / cap)
            if void is not None:
                logit_T = torch.cat([logit_T, void_RG[row, g, None].double()])
            weight_T = logit_T.softmax(0)[:seen]
            error = (out_XGD[token, g].double() - weight_T @ value_TD[:seen]).abs().max()
            assert error <= TOLERANCE[dtype] * value_TD.abs().max(), (token, g)


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """No library has been asked for yet, nor will one be remembered."""
    native.library.cache_clear()
    yield
    native.library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
@pytest.mark.parametrize(
    "compiler, folder, told",
    [
        (None, "cache", r"no C\+\+ compiler was found"),
        ("/bin/false", "cache", "/bin/false failed: exit code 1"),
        (native.compiler(), "file/cache", "cannot be written"),
    ],
    ids=["no compiler", "one that fails", "no folder"],
)
def test_why_there_are_no_functions_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, compiler: str | None, folder: str, told: str
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(native, "compiler", lambda: compiler)
    monkeypatch.setattr(native, "_folder", lambda: tmp_path / folder)
    with pytest.raises(native.CompileError, match=told):
        native.library(torch.bfloat16)
