"""Tokens that are packed already, and some behind them, packed anew."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import LAYOUTS, int32, make_pages, make_table
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PackedSource, PagedKV, compact, reference

L, H = 2, 3
POOL = 24


def bits(pages: PagedKV) -> Tensor:
    """Every page's K and V as integers, so that NaN equals itself."""
    return torch.cat([pages.key_PND, pages.value_PND], dim=-1).contiguous().view(torch.uint8)


def offsets(pages_R: Tensor) -> Tensor:
    return torch.nn.functional.pad(pages_R.cumsum(0), (1, 0)).int()


class Case:
    """Heads with 0 to 4 packed pages and so many blocks behind; each keeps some pages' worth of what it has, and behind
    the last one's there may be pages left. blocks: ids in the same pool, disjoint."""

    def __init__(self, page_tokens: int, behind: int, unused: int, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        packed_R = torch.randint(0, 5, (L * H,), generator=generator)
        packed_R[1], packed_R[2] = 0, 4
        self.most, total = int(packed_R.max()), int(packed_R.sum())
        kept_R = torch.tensor([int(torch.randint(0, int(p) + behind + 1, (1,), generator=generator)) for p in packed_R])
        kept_R[3] = packed_R[3] + behind  # everything
        blocks = make_table(1, 4 + behind + 8, POOL)[0]
        self.table = blocks[:behind].clone()
        self.packed_fresh = blocks[behind : behind + -(-total // (L * H))].clone()
        count = -(-(int(kept_R.sum()) + unused) // (L * H))
        self.fresh = blocks[behind + 4 : behind + 4 + count].clone()
        self.offset = offsets(kept_R).to(DEVICE)
        self.packed = PackedSource(self.packed_fresh, offsets(packed_R).to(DEVICE), self.most)
        token_PN = torch.full((count * L * H, page_tokens), -1, dtype=torch.int32)
        at = 0
        for has, keeps in zip(packed_R.tolist(), kept_R.tolist(), strict=True):
            places = torch.cat([
                torch.arange(has * page_tokens), self.most * page_tokens + torch.arange(behind * page_tokens)
            ])  # fmt: skip
            some = torch.randperm(len(places), generator=generator)[: keeps * page_tokens].sort().values
            token_PN[at : at + keeps] = places[some].view(keeps, page_tokens)
            at += keeps
        self.token = token_PN.flatten().to(DEVICE)

    def run(self, function: object, source: PagedKV, target: PagedKV, **scales: float) -> None:
        arguments = source, self.table, self.offset, self.token, target, self.fresh
        function(*arguments, packed=self.packed, **scales)  # type: ignore[operator]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("dtype", "page_tokens", "head_size"), [
    (torch.bfloat16, 16, 64), (torch.float16, 32, 128), (torch.float16, 16, 80), (torch.float32, 16, 64),
    (torch.float8_e4m3fn, 16, 128),
])  # fmt: skip
@pytest.mark.parametrize(("behind", "unused"), [(1, 0), (4, 7)])
def test_kernel_equals_reference(
    dtype: torch.dtype, page_tokens: int, head_size: int, behind: int, unused: int, layout: str
) -> None:
    """In the cache where all of it lies; no page changes but those that somebody was chosen for."""
    case = Case(page_tokens, behind, unused, seed=behind)
    actual, expected = (make_pages(L, POOL, H, page_tokens, head_size, layout=layout, dtype=dtype) for _ in range(2))
    case.run(compact, actual, actual)
    case.run(reference.compact, expected, expected, key_scale=1.0, value_scale=1.0)
    assert torch.equal(bits(actual), bits(expected))


@pytest.mark.parametrize("function", [compact, reference.compact])
def test_token_by_token(function: object) -> None:
    page_tokens, behind = 16, 2
    case = Case(page_tokens, behind, unused=8)
    pages, before = (make_pages(L, POOL, H, page_tokens, 32) for _ in range(2))
    case.run(function, pages, pages, key_scale=1.0, value_scale=1.0)
    written = set()
    for row, (first, last) in enumerate(itertools.pairwise(case.offset.tolist())):
        for flat, place in itertools.product(range(first, last), range(page_tokens)):
            to = int(pages.of_packed(case.fresh)[flat])
            nth, slot = divmod(int(case.token[flat * page_tokens + place]), page_tokens)
            if nth < case.most:
                origin = before.of_packed(case.packed_fresh)[int(case.packed.offset_O[row]) + nth]
            else:
                origin = before.page_of(row // H, row % H, case.table[nth - case.most])
            assert torch.equal(pages.key_PND[to, place], before.key_PND[origin, slot])
            assert torch.equal(pages.value_PND[to, place], before.value_PND[origin, slot])
            written.add(to)
    changed = (pages.key_PND != before.key_PND).any(2) | (pages.value_PND != before.value_PND).any(2)
    assert set(changed.any(1).nonzero().flatten().tolist()) == written
    assert len(written) < len(case.fresh) * L * H, "so that some pages were left alone"


def test_widening_on_the_way() -> None:
    case = Case(16, 2, 0)
    source = make_pages(L, POOL, H, 16, 64, dtype=torch.float16)
    actual, expected = (make_pages(L, POOL, H, 16, 64, seed=5) for _ in range(2))
    case.run(compact, source, actual, key_scale=0.5)
    case.run(reference.compact, source, expected, key_scale=0.5, value_scale=1.0)
    assert torch.equal(bits(actual), bits(expected))


def test_a_packed_source_that_does_not_fit_is_named() -> None:
    case, pages = Case(16, 1, 0), make_pages(L, POOL, H, 16, 64)
    for packed, message in (
        (PackedSource(case.packed_fresh, int32(0, 1), 4), r"^packed.offset_O.shape=\(2,\): choose \[7\]"),
        (PackedSource(case.packed_fresh, case.offset, -1), "^packed.most_pages=-1: choose 0 or more"),
        (PackedSource(case.packed_fresh.long(), case.offset, 4), "^packed.fresh_K.dtype=torch.int64"),
    ):
        case.packed = packed
        with pytest.raises(ValueError, match=message):
            case.run(compact, pages, pages)
