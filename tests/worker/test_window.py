"""The window's queries are complete and in order, however chunks and other requests cut them up."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vllm_defensive.worker.window import IncompleteError, WindowQueries

L, W, Q, D = 2, 8, 3, 2


def queries_of(position: int, layer: int) -> torch.Tensor:
    return torch.full((Q, D), float(position * 10 + layer))


@given(
    stop=st.integers(W, 60),
    cuts=st.lists(st.integers(1, 59), max_size=6),
    row_start=st.integers(0, 5),
)
def test_any_chunks_give_the_last_queries_in_order(stop: int, cuts: list[int], row_start: int) -> None:
    windows = WindowQueries(L, W, Q, D, torch.float32)
    borders = sorted({0, stop, *(c for c in cuts if c < stop)})
    for start, end in pairwise(borders):
        capture = windows.plan("a", (stop - W, stop), (start, end), row_start)
        if end <= stop - W:
            assert capture is None
            continue
        assert capture is not None
        for layer in range(L):
            others = [torch.full((Q, D), -1.0)] * row_start
            capture.take(layer, torch.stack(others + [queries_of(p, layer) for p in range(start, end)]))
    window = windows.pop("a")
    for layer in range(L):
        expected = torch.stack([queries_of(p, layer) for p in range(stop - W, stop)])
        assert torch.equal(window[layer], expected)


def test_tokens_after_the_boundary_are_not_part_of_it() -> None:
    windows = WindowQueries(L, W, Q, D, torch.float32)
    capture = windows.plan("a", (12, 20), (10, 30), 0)
    assert capture is not None and (capture.source, capture.target, capture.count) == (2, 0, 8)


def test_a_step_that_is_planned_twice_is_seen_once() -> None:
    windows = WindowQueries(L, W, Q, D, torch.float32)
    for chunk in ((10, 15), (10, 15), (15, 20), (15, 20)):
        once, twice = (windows.plan("a", (12, 20), chunk, 3) for _ in range(2))
        assert once is not None and once == twice and once.window_AWQD is twice.window_AWQD
    assert windows.pop("a").shape == (L, W, Q, D)
    windows.plan("a", (12, 20), (15, 20), 0)
    windows.plan("a", (12, 20), (15, 20), 0)
    windows.drop_complete()
    with pytest.raises(IncompleteError, match="5 of 8 window queries were seen"):
        windows.pop("a")


def test_an_incomplete_window_is_no_window() -> None:
    windows = WindowQueries(L, W, Q, D, torch.float32)
    windows.plan("a", (12, 20), (15, 20), 0)
    with pytest.raises(IncompleteError, match="5 of 8 window queries were seen"):
        windows.pop("a")


def test_a_dropped_request_starts_anew() -> None:
    windows = WindowQueries(L, W, Q, D, torch.float32)
    windows.plan("a", (12, 20), (10, 18), 0)
    windows.drop("a")
    windows.drop("unknown")
    windows.plan("a", (12, 20), (12, 20), 0)
    assert windows.pop("a").shape == (L, W, Q, D)


def test_windows_that_no_eviction_took_are_forgotten() -> None:
    """A request can turn out to have nothing to evict when it reaches its window's end."""
    windows = WindowQueries(2, 4, 3, 8, torch.float32)
    for request_id, chunk in (("done", (0, 20)), ("half", (0, 18))):
        assert windows.plan(request_id, (16, 20), chunk, 0) is not None
    windows.drop_complete()
    with pytest.raises(IncompleteError, match="0 of 4"):
        windows.pop("done")
    assert windows.plan("half", (16, 20), (18, 20), 0) is not None and windows.pop("half").shape == (2, 4, 3, 8)
