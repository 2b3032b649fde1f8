"""What only a GPU can show: no wait for the device, graphs that replay, rounding to fp8."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import assert_close, int32, make_pages, make_state, make_table, randn, select_pages
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import (
    DecodeWorkspace,
    PagedKV,
    RaggedTokens,
    Rotation,
    compact,
    learned_page_scores,
    learned_scores,
    ragged_paged_decode,
    reconstruction_scores,
    reference,
    value_norm,
    window_scores,
)

pytestmark = pytest.mark.skipif(DEVICE != "cuda", reason="needs KERNELS_DEVICE=cuda")

L, H, G, N, D = 2, 4, 4, 16, 128


def evict(pages: PagedKV, query: torch.Tensor, weight: torch.Tensor, table: torch.Tensor, fresh: torch.Tensor) -> None:
    """A whole eviction of 6 blocks to 2, as the engine does it."""
    tokens = RaggedTokens.of([6 * N - 32], DEVICE)
    scores = window_scores(query, pages, table, tokens).score_LHT
    for layer in range(L):
        scores[layer] *= value_norm(pages, layer, table, tokens, weight)
    selection = select_pages(torch.nn.functional.pad(scores, (0, 32), value=float("inf")), 3, N)
    compact(pages, table[0], selection.offset_O, selection.tokens_PN.flatten(), pages, fresh)


def test_an_eviction_and_a_decode_step_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # filling every torch.empty is no part of a step
    pages, query = make_pages(L, 32, H, N, D, dtype=torch.bfloat16), randn(L, 1, 32, H * G, D, dtype=torch.bfloat16)
    weight, table, fresh = randn(H * G, D, 256, dtype=torch.bfloat16), make_table(1, 6, 16), int32(20, 21, 22)
    state, rows = make_state([[3] * L * H], [[20, 21, 22]], [0], [6]), (int32(0, 1), int32(6 * N + 1), int32(0))
    last = make_table(1, 7, 16)
    evict(pages, query, weight, table, fresh)  # compiles
    ragged_paged_decode(query[0, 0, :1], pages, 0, last, *rows, state)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        evict(pages, query, weight, table, fresh)
        ragged_paged_decode(query[0, 0, :1], pages, 0, last, *rows, state)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_scoring_echoes_never_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pages, table = make_pages(L, 32, H, N, D, dtype=torch.bfloat16), make_table(1, 31, 32)
    query, peak = randn(300, H * G, D, dtype=torch.bfloat16), torch.zeros(H, 161, device=DEVICE)
    options = {"peak_HS": peak, "scored": (16, 160), "normalised": "chunk"}
    reconstruction_scores(query[:33], pages, 1, table, first=161, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        reconstruction_scores(query[33:], pages, 1, table, first=161 + 33, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (peak[:, 16:160] > 0).all()


def test_learned_scores_never_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    pages, table, weight = make_pages(L, 32, H, N, D, dtype=torch.bfloat16), make_table(1, 31, 32), randn(H, 2 * D + 1)
    rotation, row = Rotation(randn(512, D, dtype=torch.bfloat16) + 3), int32(0, 1, 2)
    page, position = torch.tensor([3, 9, 40], device=DEVICE), int32(*range(3 * N)).view(3, N)
    tokens = [RaggedTokens.of([count], DEVICE) for count in (33, 444)]
    learned_scores(pages, 0, table, tokens[0], weight, rotation)  # compiles
    learned_page_scores(pages, page[1:], row[1:], position[1:], weight, rotation)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        in_place = learned_scores(pages, 1, table, tokens[1], weight, rotation)
        packed = learned_page_scores(pages, page, row, position, weight, rotation)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert in_place.isfinite().all()
    assert packed.isfinite().all()


def test_a_captured_decode_follows_lengths_and_state() -> None:
    pages, query = make_pages(L, 64, H, N, D, dtype=torch.bfloat16), randn(3, H * G, D, dtype=torch.bfloat16)
    table, starts, lens, slots = make_table(3, 12, 40), int32(0, 1, 2, 3), int32(50, 60, 70), int32(-1, -1, -1)
    state = make_state([[2] * L * H, [1, 3] * (L * H // 2)], [[50, 51], [52, 53]], [0, 1], [8, 9])
    out, space = torch.empty_like(query), DecodeWorkspace.empty(3, H * G, 16, D, torch.device(DEVICE))
    arguments = (query, pages, 1, table, starts, lens, slots, state)
    ragged_paged_decode(*arguments, out_TQD=out, splits=16, workspace=space)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ragged_paged_decode(*arguments, out_TQD=out, splits=16, workspace=space)
    for new_lens, new_slots in (
        ((50, 60, 70), (-1, -1, -1)),
        ((130, 150, 190), (0, 1, -1)),
        ((1, 145, 129), (-1, 1, 0)),
    ):
        lens.copy_(int32(*new_lens))
        slots.copy_(int32(*new_slots))
        out.fill_(float("nan"))
        graph.replay()
        expected = torch.empty_like(query)
        reference.ragged_paged_decode(*arguments, out_TQD=expected, scale=D**-0.5, key_scale=1.0, value_scale=1.0)
        assert_close(out, expected, torch.bfloat16)
