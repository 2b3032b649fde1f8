"""Norms of projected values."""

from __future__ import annotations

import pytest
import torch

from tests.kernels.cases import LAYOUTS, WIDE, assert_close, in_float64, make_pages, make_table, randn
from tests.kernels.conftest import DEVICE
from vllm_defensive_kernels import RaggedTokens, gram_factor, reference, value_norm

N = 16


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("heads", "group", "head_size", "hidden", "counts"), [
    (1, 7, 80, 100, [63]), (2, 1, 32, 16, [5, 0, 40]), (2, 3, 64, 192, [17, 129]),
])  # fmt: skip
def test_norms_equal_the_formulas(
    order: int, heads: int, group: int, head_size: int, hidden: int, counts: list[int]
) -> None:
    pages, weight = make_pages(2, 32, heads, N, head_size), randn(heads * group, head_size, hidden)
    table, tokens = make_table(len(counts), -(-max(counts) // N), 32), RaggedTokens.of(counts, DEVICE)
    actual = value_norm(pages, 1, table, tokens, weight, order=order)
    with in_float64():
        expected = reference.value_norm(
            pages, 1, table, tokens, weight, order=order, value_scale=1.0, out_HT=torch.zeros_like(actual).double()
        )
    assert_close(actual, expected, torch.float32)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_bf16_values_and_a_strided_projection(layout: str) -> None:
    """Wo as vLLM stores it, [hidden, Q*D]: its slices are views with stride 1 in neither of the usual axes."""
    pages = make_pages(1, 8, 2, N, 32, layout=layout, dtype=torch.bfloat16)
    projection = randn(96, 4 * 32, dtype=torch.bfloat16)
    table, tokens = make_table(1, 4, 8), RaggedTokens.of([50], DEVICE)
    actual = value_norm(pages, 0, table, tokens, projection.view(96, 4, 32).permute(1, 2, 0))
    with in_float64():
        expected = reference.value_norm(
            pages, 0, table, tokens, projection.view(96, 4, 32).permute(1, 2, 0).double(),
            order=1, value_scale=1.0, out_HT=torch.zeros_like(actual).double(),
        )  # fmt: skip
    assert_close(actual, expected, torch.float32)  # products of bf16 numbers are exact in fp32


@pytest.mark.parametrize(("head_size", "dtype"), [*WIDE, (512, torch.float32)])
def test_wide_heads(head_size: int, dtype: torch.dtype) -> None:
    """Several tiles of tokens and of columns, neither of them full at the end."""
    pages, weight = make_pages(1, 10, 1, N, head_size, dtype=dtype), randn(2, head_size, 72)
    weight = weight if dtype == torch.float32 else weight.bfloat16()
    table, tokens = make_table(1, 9, 10), RaggedTokens.of([131], DEVICE)
    actual = value_norm(pages, 0, table, tokens, weight)
    with in_float64():
        expected = reference.value_norm(
            pages, 0, table, tokens, weight.double(), order=1, value_scale=1.0,
            out_HT=torch.zeros_like(actual).double(),
        )  # fmt: skip
    assert_close(actual, expected, torch.float32)


def test_gram_factor_gives_the_norm_of_the_whole_projection() -> None:
    pages, weight = make_pages(1, 8, 2, N, 32), randn(4, 32, 200)
    factor = gram_factor(weight)
    assert factor.shape == (4, 32, 32)
    assert_close(factor @ factor.mT, weight @ weight.mT, torch.float32)
    table, tokens = make_table(1, 4, 8), RaggedTokens.of([50], DEVICE)
    short = value_norm(pages, 0, table, tokens, factor, order=2)
    assert_close(short, value_norm(pages, 0, table, tokens, weight, order=2), torch.float32)


def test_writes_into_a_layer_of_a_larger_buffer() -> None:
    pages, weight = make_pages(1, 8, 2, N, 32), randn(2, 32, 32)
    tokens, out = RaggedTokens.of([20], DEVICE), torch.zeros(3, 2, 20, device=DEVICE)
    value_norm(pages, 0, make_table(1, 2, 8), tokens, weight, out_HT=out[1])
    assert (out[1] > 0).all()
    assert (out[[0, 2]] == 0).all()


def test_wrong_order_is_named() -> None:
    with pytest.raises(ValueError, match="order=3: choose 1 or 2"):
        value_norm(
            make_pages(1, 8, 2, N, 32), 0, make_table(1, 2, 8), RaggedTokens.of([20], DEVICE), randn(2, 32, 32), order=3
        )
