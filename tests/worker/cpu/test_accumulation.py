"""Attention summed chunk by chunk is that of the whole prompt at once, and is begun anew where a request is."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.policy import naive
from vllm_defensive.worker.cpu.accumulation import Accumulations
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import IncompleteError
from vllm_defensive_kernels import formulas

L, H, G, N, D, T = 2, 2, 3, 8, 4, 37
SCALE, BLOCKS = 0.5, torch.tensor([3, 1, 7, 2, 5, 0], dtype=torch.int32)  # the last is not the prompt's


class Prompt:
    """Random queries and keys of T tokens, the keys in the pages of `BLOCKS`."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.query_LTQD = torch.randn(L, T, H * G, D, generator=generator)
        self.key_LHTD = torch.randn(L, H, T, D, generator=generator) * 3
        buffer = torch.full((8, L, H, N, 2 * D), float("nan"))
        order_ND = torch.arange(N * D).view(N, D)
        for position in range(T):
            page = buffer[int(BLOCKS[position // N])].view(L, H, 2, N, D)
            page[:, :, 0, position % N] = self.key_LHTD[:, :, position]
        view = PageView.from_layers([buffer[:, layer] for layer in range(L)])
        self.sums = Accumulations(view, PageCodec(order_ND, order_ND), [Softmax(SCALE)] * L, Readers.one_each(L))

    def feed(self, begin: int, end: int, row_start: int = 0, builders: int = 1) -> None:
        """builders: how many of them plan the step; they have the layers in turn."""
        parts = [self.sums.plan("a", T, (begin, end), row_start, BLOCKS) for _ in range(builders)]
        for layer in range(L):
            if (part := parts[layer % builders]) is None:
                continue
            others = torch.full((row_start, H * G, D), float("nan"))
            batch = torch.cat([others, self.query_LTQD[layer, begin:end], torch.full((2, H * G, D), float("nan"))])
            self.sums.add(part, layer, batch)

    def expected(self) -> np.ndarray:
        rows = [
            naive.attention(naive.Layer(query.double().numpy(), key.double().numpy(), key.numpy(), None), SCALE)
            for query, key in zip(self.query_LTQD, self.key_LHTD, strict=True)
        ]
        return np.stack([r.sum(axis=2).mean(axis=1) for r in rows])


@settings(max_examples=25, deadline=None)
@given(cuts=st.sets(st.integers(1, T - 1), max_size=6), row_start=st.integers(0, 5))
def test_any_chunks_give_the_sum_over_all_queries(cuts: set[int], row_start: int) -> None:
    prompt = Prompt()
    for begin, end in pairwise(sorted({0, T, *cuts})):
        prompt.feed(begin, end, row_start)
    np.testing.assert_allclose(prompt.sums.pop("a"), prompt.expected(), rtol=1e-5)


@pytest.mark.parametrize("elements", [1, 5 * H * G * T, 2**30])
def test_tiles_do_not_matter(elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One query at a time, a few that do not divide the prompt, and all at once."""
    monkeypatch.setattr(formulas, "ACCUMULATED_ELEMENTS", elements)
    prompt = Prompt()
    prompt.feed(0, T)
    np.testing.assert_allclose(prompt.sums.pop("a"), prompt.expected(), rtol=1e-5)


@pytest.mark.parametrize("dropped", [True, False])
def test_a_request_that_starts_anew_counts_nothing_twice(dropped: bool) -> None:
    prompt = Prompt()
    prompt.feed(0, 20)
    if dropped:
        prompt.sums.drop("a")
        prompt.sums.drop("unknown")
    prompt.feed(0, 30)
    prompt.feed(30, T)
    np.testing.assert_allclose(prompt.sums.pop("a"), prompt.expected(), rtol=1e-5)


def test_a_step_that_is_planned_twice_adds_once() -> None:
    """By two builders, of which each has some of the layers; and if a layer should see it twice."""
    prompt = Prompt()
    for begin, end in ((0, 20), (20, T)):
        prompt.feed(begin, end, builders=2)
        prompt.feed(begin, end)
    np.testing.assert_allclose(prompt.sums.pop("a"), prompt.expected(), rtol=1e-5)


def test_sums_with_a_gap_are_no_sums() -> None:
    """Whatever comes after it: the request is then served whole, and no other hears of it."""
    prompt = Prompt()
    prompt.feed(5, 9)
    with pytest.raises(IncompleteError, match="0 were seen"):
        prompt.sums.pop("a")
    prompt.feed(0, 20)
    prompt.feed(21, T)
    with pytest.raises(IncompleteError, match="20 were seen"):
        prompt.sums.pop("a")
    assert prompt.sums.plan("a", T, (0, T + 1), 0, BLOCKS) is None


def test_sums_that_no_eviction_took_are_forgotten() -> None:
    prompt = Prompt()
    prompt.feed(0, 20)
    prompt.sums.drop_complete()
    prompt.feed(20, T)
    prompt.sums.drop_complete()
    with pytest.raises(IncompleteError):
        prompt.sums.pop("a")
