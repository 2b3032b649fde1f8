"""The reconstruction score: the formula against loops in float64, the op against the formula."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import BENT, assert_close, in_float64, make_pages, make_table, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PagedKV, echo, formulas, reconstruction, reconstruction_scores, reference
from vllm_defensive_kernels.echo import reconstruct_attention

BF16, FP8 = torch.bfloat16, torch.float8_e4m3fn


def loops(
    query: list, key: list, scale: float, document: int, *, scored: tuple[int, int], first: int, normalised: str,
    sink: int, cap: float = 0.0, void: list | None = None,
) -> Tensor:  # fmt: skip
    """The formula once more, of one number at a time; query [T][Q][D], key [H][X][D], lists of Python's floats."""
    peak = [[0.0] * document for _ in key]
    group = len(query[0]) // len(key)
    for place, heads in enumerate(query):
        for q, vector in enumerate(heads):
            row = key[q // group]
            taking_part = [
                t
                for t in range(first + place + 1)
                if normalised == "all" or t < sink or scored[0] <= t < scored[1] or t >= document
            ]
            logits = {t: scale * math.fsum(map(float.__mul__, vector, row[t])) for t in taking_part}
            weights = {t: math.exp(cap * math.tanh(z / cap) if cap else z) for t, z in logits.items()}
            total = math.fsum(weights.values()) + (0.0 if void is None else math.exp(void[q]))
            for t in range(*scored):
                peak[q // group][t] = max(peak[q // group][t], weights[t] / total)
    return torch.tensor(peak, dtype=torch.float64)


CASES = {  # document, echoes before these, echoes, scored, sink
    "whole": (37, 0, 5, (0, 37), 0),
    "chunk": (37, 4, 6, (9, 22), 4),
    "sinks reach into the chunk": (30, 0, 3, (2, 15), 8),
    "last token alone": (21, 3, 1, (20, 21), 2),
}


@pytest.mark.parametrize("normalised", ["all", "chunk"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("elements", [2**20, 100])
def test_formula_equals_loops(case: tuple, normalised: str, elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two KV heads of three query heads, of uneven spread; in one tile and in many."""
    monkeypatch.setattr(echo, "TILE_ELEMENTS", elements)
    document, before, count, scored, sink = case
    query, key = randn(count, 6, 8), randn(2, document + before + count + 3, 8, seed=3) * 2  # three keys too many
    options = {"scored": scored, "first": document + before, "normalised": normalised, "sink": sink}
    peak = torch.zeros(2, document, device=DEVICE)
    reconstruct_attention(peak, query, key, 0.4, **options)
    expected = loops(query.double().tolist(), key.double().tolist(), 0.4, document, **options)
    assert_close(peak.cpu(), expected, torch.float32)
    assert (peak[:, : scored[0]] == 0).all()
    assert (peak[:, scored[1] :] == 0).all()


@pytest.mark.parametrize(("cap", "void"), BENT, ids=str)
def test_caps_and_voids_of_the_formula(cap: float, void: float | None) -> None:
    query, key = randn(3, 6, 8), randn(2, 40, 8, seed=3) * 2
    void_Q = None if void is None else void + randn(6)
    options = {"scored": (9, 22), "first": 37, "normalised": "chunk", "sink": 4, "cap": cap}
    peak = torch.zeros(2, 30, device=DEVICE)
    reconstruct_attention(peak, query, key, 0.4, **options, void_Q=void_Q)
    void_list = None if void_Q is None else void_Q.tolist()
    expected = loops(query.double().tolist(), key.double().tolist(), 0.4, 30, **options, void=void_list)
    assert_close(peak.cpu(), expected, torch.float32)


def test_a_temporary_never_holds_all_queries_times_all_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    tiles: list[int] = []
    attend = formulas.window_attention

    def counted(*arguments: Any) -> Tensor:
        attention = attend(*arguments)
        tiles.append(attention.numel())
        return attention

    monkeypatch.setattr(formulas, "window_attention", counted)
    monkeypatch.setattr(echo, "TILE_ELEMENTS", 2000)
    peak = torch.zeros(2, 300, device=DEVICE)
    query, key = randn(40, 4, 8), randn(2, 340, 8)
    reconstruct_attention(peak, query, key, 1.0, scored=(0, 300), first=300, normalised="all")
    assert max(tiles) <= 2000
    assert sum(tiles) > 40 * 4 * 300


@pytest.fixture(params=[False, True], ids=["tiles of the GPU", "small tiles"])
def tiles_of_two_sizes(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Also tiles so small that a document of a hundred tokens has several of each kind, and several spans."""
    if request.param:
        monkeypatch.setattr(reconstruction, "tiles", lambda *sizes: (64, 16, 32, 32))
        for name, value in {"MIN_STEPS": 2, "MIN_TILES": 2, "MERGE_BLOCK": 16}.items():
            monkeypatch.setattr(reconstruction, name, value)


def run_both(pages: PagedKV, query: Tensor, document: int, before: int = 0, **options: object) -> tuple[Tensor, Tensor]:
    """peak_HS of the op, and of the reference in float64, of layer 1."""
    first = document + before
    blocks = -(-(first + len(query)) // pages.page_tokens)
    table = make_table(1, blocks, blocks + 1)
    results = [torch.zeros(pages.num_kv_heads, document, device=DEVICE) for _ in range(2)]
    reconstruction_scores(query, pages, 1, table, peak_HS=results[0], first=first, **options)
    with in_float64():
        defaults = {"sink": 0, "scale": pages.head_size**-0.5, "key_scale": 1.0}
        reference.reconstruction_scores(
            query, pages, 1, table, peak_HS=results[1], first=first, **{**defaults, **options}
        )
    return results[0], results[1]


OPTIONS = {
    "all": {"scored": (0, 83), "normalised": "all"},
    "chunk": {"scored": (21, 70), "normalised": "chunk", "sink": 4},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize(("page_tokens", "head_size"), [(16, 64), (32, 80), (16, 128), (32, 256)])
@pytest.mark.parametrize("dtype", [torch.float32, BF16, FP8])
def test_op_equals_the_formula(
    name: str, page_tokens: int, head_size: int, dtype: torch.dtype, tiles_of_two_sizes: None
) -> None:
    """Products of half-precision numbers are exact, so scores are good to fp32; fp8 keys have a scale."""
    pages = make_pages(2, 12, 2, page_tokens, head_size, dtype=dtype)
    query = randn(5, 6, head_size, dtype=torch.float32 if dtype == torch.float32 else BF16)
    key_scale = {"key_scale": 0.5} if dtype == FP8 else {}
    actual, expected = run_both(pages, query, 83, before=9, **OPTIONS[name], **key_scale)
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("tiles_of_two_sizes", [True], ids=["small tiles"], indirect=True)
@pytest.mark.parametrize(("cap", "void"), BENT, ids=str)
@pytest.mark.parametrize("name", ["chunk", pytest.param("all", marks=pytest.mark.nightly)])
def test_caps_and_voids(
    name: str, cap: float, void: float | None, tiles_of_two_sizes: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each query head has a logit of nothing of its own, which takes its share once, however many spans are merged."""
    pages, query = make_pages(2, 12, 2, 16, 32, dtype=BF16), 3 * randn(5, 6, 32, dtype=BF16)
    void_Q = None if void is None else void + randn(6)
    actual, expected = run_both(pages, query, 83, before=9, cap=cap, void_Q=void_Q, **OPTIONS[name])
    assert_close(actual, expected, torch.float32)
    monkeypatch.setattr(reconstruction, "runs_triton", lambda tensor: False)
    without, _ = run_both(pages, query, 83, before=9, **OPTIONS[name])
    assert float((actual - without).abs().max()) > 0.01, "else this could not fail"


@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("count", [1, 5, 130])
def test_any_number_of_echoes_and_any_group(count: int, group: int, tiles_of_two_sizes: None) -> None:
    pages, query = make_pages(2, 20, 1, 16, 64, dtype=BF16), randn(count, group, 64, dtype=BF16)
    actual, expected = run_both(pages, query, 83, **OPTIONS["chunk"])
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("layout", ["LBHNC", "BNLHC"])
def test_other_layouts_and_queries_beside_keys(layout: str) -> None:
    """Queries as they come out of the projection, with K and V between one echo's and the next's."""
    pages = make_pages(2, 12, 2, 16, 32, layout=layout, dtype=BF16)
    query = randn(7, 10, 32, dtype=BF16)[:, :6]
    actual, expected = run_both(pages, query, 83, **OPTIONS["chunk"])
    assert_close(actual, expected, torch.float32)


def test_scores_of_many_steps_and_chunks_are_those_of_one(tiles_of_two_sizes: None) -> None:
    """A pass over the whole document in three steps, and in two chunks by the plain softmax, bit by bit but for the
    order of a sum."""
    pages, query = make_pages(2, 12, 2, 16, 32, dtype=BF16), randn(40, 4, 32, dtype=BF16)
    table, at_once, in_steps = make_table(1, 8, 12), *(torch.zeros(2, 61, device=DEVICE) for _ in range(2))
    whole = {"scored": (0, 61), "normalised": "all"}
    reconstruction_scores(query, pages, 0, table, peak_HS=at_once, first=61, **whole)
    for begin, end in ((0, 1), (1, 30), (30, 40)):
        for scored in ((0, 35), (35, 61)):
            reconstruction_scores(
                query[begin:end], pages, 0, table, peak_HS=in_steps, first=61 + begin, scored=scored, normalised="all"
            )
    assert_close(in_steps, at_once, torch.float32)


def test_each_chunk_is_scored_over_itself_and_the_others_stay() -> None:
    """Chunks in a row into one tensor equal chunks alone; the whole document as one chunk is the plain softmax."""
    pages, query = make_pages(2, 12, 2, 16, 32, dtype=BF16), randn(9, 4, 32, dtype=BF16)
    table, chunks = make_table(1, 8, 12), ((0, 20), (20, 40), (40, 61))

    def score(peak: Tensor, scored: tuple[int, int], normalised: str = "chunk") -> Tensor:
        reconstruction_scores(
            query, pages, 0, table, peak_HS=peak, first=61, scored=scored, normalised=normalised, sink=4
        )
        return peak

    together, alone = torch.zeros(2, 61, device=DEVICE), []
    for chunk in chunks:
        score(together, chunk)
        alone.append(score(torch.zeros(2, 61, device=DEVICE), chunk)[:, slice(*chunk)])
    assert torch.equal(together, torch.cat(alone, dim=1))
    whole = score(torch.zeros(2, 61, device=DEVICE), (0, 61))
    assert torch.equal(whole, score(torch.zeros(2, 61, device=DEVICE), (0, 61), "all"))
    assert (together >= whole * (1 - 1e-5)).all()  # fewer keys share a chunk's attention; 1e-5: the order of a sum
    assert not torch.allclose(together, whole)


def test_what_is_there_is_only_raised() -> None:
    pages, query, table = make_pages(2, 12, 1, 16, 32), randn(3, 2, 32), make_table(1, 5, 12)
    fresh, high = torch.zeros(1, 50, device=DEVICE), torch.full((1, 50), 0.04, device=DEVICE)
    for peak in (fresh, high):
        reconstruction_scores(query, pages, 0, table, peak_HS=peak, first=50, scored=(0, 50), normalised="all")
    assert torch.equal(high, fresh.clamp_min(0.04))
    assert 0 < (fresh > 0.04).sum() < 50


def test_later_echoes_and_other_requests_change_nothing() -> None:
    """What lies in the cache after these echoes is unwritten memory: NaN here."""
    pages, query = make_pages(2, 12, 1, 16, 32), randn(3, 2, 32)
    table, peaks = make_table(1, 5, 12), [torch.zeros(1, 50, device=DEVICE) for _ in range(2)]
    options = {"first": 52, "scored": (10, 40), "normalised": "chunk"}
    reconstruction_scores(query, pages, 0, table, peak_HS=peaks[0], **options)
    kept = [(pages.page_of(0, 0, table[0, t // 16]), t % 16) for t in (*range(10, 40), *range(50, 55))]
    keys = [pages.key_PND[place].clone() for place in kept]
    pages.key_PND[:] = float("nan")
    for place, key in zip(kept, keys, strict=True):
        pages.key_PND[place] = key
    reconstruction_scores(query, pages, 0, table, peak_HS=peaks[1], **options)
    assert torch.equal(*peaks)


@pytest.mark.parametrize(("head_size", "key_bytes"), [(64, 2), (128, 2), (128, 1), (512, 2)])
@pytest.mark.parametrize(("heads", "group"), [(1, 1), (2, 7), (8, 4), (64, 1)])
def test_a_call_never_takes_more_than_it_says(heads: int, group: int, head_size: int, key_bytes: int) -> None:
    """The log-sum-exp of every row and span: of few echoes over many keys, and of many."""
    block_m, block_t, _, _ = reconstruction.tiles(head_size, key_bytes, 2)
    for echoes in (1, 7, 64, 127, 512, 2112):
        rows, most = echoes * group, reconstruction.bytes_at_most(echoes, heads * group)
        for keys in (echoes, 4000, 131072, 1 << 20):
            _, spans = reconstruction.spans_of(keys, -(-rows // block_m), heads, block_t)
            assert 4 * spans * heads * rows <= most, (echoes, keys)


def test_no_echoes_change_nothing() -> None:
    pages, peak = make_pages(2, 8, 1, 16, 32), torch.zeros(1, 20, device=DEVICE)
    reconstruction_scores(
        randn(0, 2, 32), pages, 0, make_table(1, 2, 8), peak_HS=peak, first=20, scored=(0, 20), normalised="all"
    )
    assert (peak == 0).all()


@pytest.mark.parametrize(("wrong", "message"), [
    ({"normalised": "none"}, "normalised='none': choose 'all' or 'chunk'"),
    ({"scored": (0, 21)}, r"scored\[1\]=21: choose 1 to 20"),
    ({"scored": (8, 8)}, r"scored\[0\]=8: choose 0 to 7"),
    ({"first": 19}, "first=19: choose 20 or more"),
    ({"first": 30}, r"first \+ T=33: choose 0 to 32"),
    ({"peak_HS": torch.zeros(2, 20, device=DEVICE)}, r"peak_HS.shape=\(2, 20\): choose \[1, any\]"),
])  # fmt: skip
def test_wrong_arguments_are_named(wrong: dict[str, object], message: str) -> None:
    right = {"peak_HS": torch.zeros(1, 20, device=DEVICE), "first": 20, "scored": (0, 20), "normalised": "all"}
    with pytest.raises(ValueError, match=message):
        reconstruction_scores(
            randn(3, 2, 32), make_pages(2, 8, 1, 16, 32), 0, make_table(1, 2, 8), **{**right, **wrong}
        )
