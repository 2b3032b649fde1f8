"""Page numbers and offsets beyond 2**31 elements. The buffers are virtual memory: what is not touched costs nothing."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.kernels.cases import assert_close, int32, make_state, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import (
    PagedKV,
    RaggedTokens,
    Rotation,
    addressing,
    compact,
    learned_page_scores,
    learned_scores,
    ragged_paged_decode,
    reconstruction_scores,
    reference,
    value_norm,
    window_scores,
)

N, D, BLOCKS = 16, 32, 2_200_000  # 2.2 M blocks of 16 x 64 numbers: 2.25e9 of them
FAR = BLOCKS - 8


@pytest.fixture(scope="module")
def storage() -> torch.Tensor:
    """A 4.5 GB bf16 buffer that was never written."""
    return torch.empty(BLOCKS * N * 2 * D, dtype=torch.bfloat16, device=DEVICE)


@pytest.fixture
def far_pages(storage: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Iterator[PagedKV]:
    """One layer and head whose last blocks hold random K and V."""
    if addressing.INTERPRETED:
        # The interpreter copies every argument's storage back after a launch; on the CPU that is a copy onto itself,
        # which would commit all 4.5 GB.
        from triton.runtime.interpreter import GridExecutor

        monkeypatch.setattr(GridExecutor, "_restore_args_dev", lambda *args: None)
    pages = PagedKV.from_layers([storage.view(BLOCKS, 1, N, 2 * D)])
    assert pages.key_PND[FAR:].storage_offset() > 2**31
    pages.key_PND[FAR:] = randn(8, N, D, dtype=torch.bfloat16)
    pages.value_PND[FAR:] = randn(8, N, D, dtype=torch.bfloat16, seed=3)
    yield pages


def near(pages: PagedKV) -> PagedKV:
    """The same last eight blocks as a small cache of their own."""
    both = torch.cat([pages.key_PND[FAR:], pages.value_PND[FAR:]], dim=-1)
    return PagedKV.from_layers([both.view(8, 1, N, 2 * D)])


def test_window_scores_and_norms(far_pages: PagedKV) -> None:
    query, weight = randn(1, 1, 8, 2, D, dtype=torch.bfloat16), randn(2, D, 16, dtype=torch.bfloat16)
    table, tokens = int32(3, 1, 2, 0)[None], RaggedTokens.of([50], DEVICE)
    far = window_scores(query, far_pages, table + FAR, tokens)
    assert_close(far.score_LHT, window_scores(query, near(far_pages), table, tokens).score_LHT, torch.float32)
    norm = value_norm(far_pages, 0, table + FAR, tokens, weight)
    assert_close(norm, value_norm(near(far_pages), 0, table, tokens, weight), torch.float32)


def test_reconstruction_scores(far_pages: PagedKV) -> None:
    query, table = randn(4, 2, D, dtype=torch.bfloat16), int32(3, 1, 2, 0)[None]
    far, expected = (torch.zeros(1, 50, device=DEVICE) for _ in range(2))
    options = {"scored": (0, 50), "first": 50, "normalised": "all"}
    reconstruction_scores(query, far_pages, 0, table + FAR, peak_HS=far, **options)
    reconstruction_scores(query, near(far_pages), 0, table, peak_HS=expected, **options)
    assert_close(far, expected, torch.float32)
    assert (far > 0).all()


def test_learned_scores(far_pages: PagedKV) -> None:
    weight, rotation = randn(1, 2 * D + 1) / 8, Rotation(randn(50, D) + 2)
    table, tokens = int32(3, 1, 2, 0)[None], RaggedTokens.of([50], DEVICE)
    far = learned_scores(far_pages, 0, table + FAR, tokens, weight, rotation)
    assert_close(far, learned_scores(near(far_pages), 0, table, tokens, weight, rotation), torch.float32)
    assert far.unique().numel() > 10
    page, row = torch.tensor([5, 0], device=DEVICE), int32(0, 0)
    position = torch.arange(2 * N, dtype=torch.int32, device=DEVICE).view(2, N)
    far = learned_page_scores(far_pages, page + FAR, row, position, weight, rotation)
    assert_close(far, learned_page_scores(near(far_pages), page, row, position, weight, rotation), torch.float32)
    assert far.unique().numel() > 10


def test_compact_and_decode(far_pages: PagedKV) -> None:
    small = near(far_pages)
    offset, kept = int32(0, 1), torch.arange(5, 5 + N, dtype=torch.int32, device=DEVICE)
    compact(far_pages, int32(3, 1) + FAR, offset, kept, far_pages, int32(FAR + 6))
    compact(small, int32(3, 1), offset, kept, small, int32(6))
    assert torch.equal(near(far_pages).key_PND, small.key_PND)
    query, table = randn(1, 4, D, dtype=torch.bfloat16), int32(7, 7, 2)[None]
    rows = int32(0, 1), int32(2 * N + 5), int32(0)
    far = ragged_paged_decode(query, far_pages, 0, table + FAR, *rows, make_state([[1]], [[FAR + 6]], [0], [2]))
    expected = reference.ragged_paged_decode(
        query, small, 0, table, *rows, make_state([[1]], [[6]], [0], [2]),
        out_TQD=torch.zeros_like(query), scale=D**-0.5, key_scale=1.0, value_scale=1.0,
    )  # fmt: skip
    assert_close(far, expected, torch.bfloat16)
