"""Window scores and the unpooled mean attention, against the dense formulas in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.kernels.cases import BENT, WIDE, assert_close, in_float64, make_pages, make_table, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import PagedKV, RaggedTokens, reference, window, window_scores

N = 16


def run_both(
    pages: PagedKV, query: Tensor, counts: list[int], **options: object
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(score, mean) of the op and of the float64 reference."""
    blocks = -(-(max(counts) + query.shape[2]) // N)
    table = make_table(len(counts), blocks, len(counts) * blocks + 1)
    tokens = RaggedTokens.of(counts, DEVICE)
    actual = window_scores(query, pages, table, tokens, **options)
    defaults = {"aggregate": "defensive", "pool": 5, "clamp": True, "scale": query.shape[-1] ** -0.5, "key_scale": 1.0}
    with in_float64():
        expected = reference.window_scores(query, pages, table, tokens, **{**defaults, **options})
    return tuple(actual), expected


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles so small that prompts of a hundred tokens have several spans, tiles and chunks of query rows."""
    for name, value in {"BLOCK_M": 32, "BLOCK_T": 32, "LINES": 16, "BLOCK": 32}.items():
        monkeypatch.setattr(window, name, value)
    monkeypatch.setattr(window, "tiling", lambda longest: (32, 4))


@pytest.mark.parametrize("aggregate", ["defensive", "mean"])
@pytest.mark.parametrize("pool", [1, 3, 5])
def test_scores_equal_the_formulas(aggregate: str, pool: int, small_tiles: None) -> None:
    """Two layers, one of them with one row of several lengths, one row empty, G*W = 56 rows in two chunks."""
    pages, query = make_pages(2, 32, 1, N, 80), randn(2, 3, 8, 7, 80)
    actual, expected = run_both(pages, query, [63, 0, 97], aggregate=aggregate, pool=pool)
    assert_close(actual[0], expected[0], torch.float32, "score")
    assert_close(actual[1], expected[1], torch.float32, "mean")


def test_peak_without_the_clamp(small_tiles: None) -> None:
    actual, expected = run_both(make_pages(1, 32, 2, N, 32), randn(1, 1, 4, 6, 32), [70], clamp=False)
    assert_close(actual[0], expected[0], torch.float32)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 6])
def test_prompts_barely_longer_than_the_window(count: int, small_tiles: None) -> None:
    """Shorter than the pooling kernel: its two ends overlap."""
    actual, expected = run_both(make_pages(1, 8, 2, N, 32), randn(1, 1, 8, 2, 32), [count])
    assert_close(actual[0], expected[0], torch.float32)
    assert_close(actual[1], expected[1], torch.float32)


@pytest.mark.parametrize("layout", ["LBHNC", "BNLHC"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_pages_in_other_layouts(dtype: torch.dtype, layout: str) -> None:
    """The tiles that the GPU gets; products of half-precision numbers are exact, so scores are good to fp32."""
    pages, query = make_pages(1, 10, 2, N, 32, layout=layout, dtype=dtype), randn(1, 1, 32, 8, 32, dtype=dtype)
    actual, expected = run_both(pages, query, [90])
    assert_close(actual[0], expected[0], torch.float32)
    assert_close(actual[1], expected[1], torch.float32)


@pytest.mark.parametrize(("head_size", "dtype"), WIDE)
def test_wide_heads(head_size: int, dtype: torch.dtype) -> None:
    """The tiles that the GPU gets, of fewer tokens; 128 query rows come in two chunks."""
    pages, query = make_pages(1, 9, 1, N, head_size, dtype=dtype), randn(1, 1, 32, 4, head_size, dtype=torch.bfloat16)
    actual, expected = run_both(pages, query, [90])
    assert_close(actual[0], expected[0], torch.float32)
    assert_close(actual[1], expected[1], torch.float32)


@pytest.mark.parametrize("aggregate", ["defensive", pytest.param("mean", marks=pytest.mark.nightly)])
@pytest.mark.parametrize(("cap", "void"), BENT, ids=str)
def test_caps_and_voids(cap: float, void: float | None, aggregate: str, small_tiles: None) -> None:
    """Two layers of two heads, whose query heads have logits of nothing of their own; chunks, spans, an empty row."""
    pages, query = make_pages(2, 12, 2, N, 32), 3 * randn(2, 2, 8, 12, 32)
    void_LQ = None if void is None else void + randn(2, 12)
    actual, expected = run_both(pages, query, [0, 70], aggregate=aggregate, cap=cap, void_LQ=void_LQ)
    assert_close(actual[0], expected[0], torch.float32, "score")
    assert_close(actual[1], expected[1], torch.float32, "mean")
    table, tokens, options = (
        make_table(2, 5, 11),
        RaggedTokens.of([0, 70], DEVICE),
        {"scale": 32**-0.5, "key_scale": 1.0},
    )
    _, plain = reference.window_scores(query, pages, table, tokens, aggregate="mean", pool=1, clamp=False, **options)
    assert float((actual[1] - plain).abs().max()) > 0.01, "else this could not fail"


def test_the_void_of_half_precision_models(small_tiles: None) -> None:
    pages, query = make_pages(1, 10, 2, N, 32, dtype=torch.bfloat16), randn(1, 1, 8, 6, 32, dtype=torch.bfloat16)
    actual, expected = run_both(pages, query, [90], void_LQ=3 + randn(1, 6, dtype=torch.bfloat16), cap=50.0)
    assert_close(actual[0], expected[0], torch.float32)


def test_fp8_keys_are_scaled() -> None:
    pages = make_pages(1, 10, 1, N, 32, dtype=torch.float8_e4m3fn)
    actual, expected = run_both(pages, randn(1, 1, 8, 2, 32, dtype=torch.bfloat16), [63], key_scale=0.25)
    assert_close(actual[0], expected[0], torch.float32)


def test_a_row_whose_mass_lies_in_the_window_scores_zero(small_tiles: None) -> None:
    """Its attention to the prompt underflows; 0 / 0 must not become NaN."""
    pages, query = make_pages(1, 8, 1, N, 32), randn(1, 1, 8, 1, 32)
    table = make_table(1, 5, 8)
    for token in range(64, 72):
        page = pages.page_of(0, 0, table[0, token // N])
        pages.key_PND[page, token % N] = query[0, 0, 0, 0] * 1000
    query[:] = query[0, 0, 0, 0]
    score, mean = window_scores(query, pages, table, RaggedTokens.of([64], DEVICE))
    assert (score == 0).all()
    assert (mean == 0).all()


def test_no_rows_and_no_tokens() -> None:
    pages = make_pages(1, 8, 1, N, 32)
    empty = RaggedTokens.of([0], DEVICE)
    score, _ = window_scores(randn(1, 1, 8, 1, 32), pages, make_table(1, 2, 8), empty)
    assert score.shape == (1, 1, 0)


@pytest.mark.parametrize(("options", "message"), [
    ({"aggregate": "max"}, "aggregate='max': choose 'defensive' or 'mean'"),
    ({"pool": 4}, "pool=4: choose 1 or 3 or 5"),
    ({"void_LQ": torch.zeros(2)}, "void_LQ.shape="),
])  # fmt: skip
def test_wrong_arguments_are_named(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_both(make_pages(1, 8, 1, N, 32), randn(1, 1, 8, 1, 32), [20], **options)


def test_a_table_too_short_for_the_prompt_is_refused() -> None:
    pages, table = make_pages(1, 8, 1, N, 32), make_table(1, 2, 8)
    with pytest.raises(ValueError, match=r"tokens.longest \+ W=33: choose 1 to 32"):
        window_scores(randn(1, 1, 8, 1, 32), pages, table, RaggedTokens.of([25], DEVICE))
