"""Which query token each sequence of a batch's evicted rows has: head by head, row by row, token by token."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from vllm_defensive.worker.cpu.pages import PageView
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.window import WindowQueries


@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize(
    "lengths, rows",
    [
        ([1], [0]),
        ([1, 1, 1], [0, 1, 2]),
        ([1, 1, 1], [0, 2]),
        ([4], [0]),
        ([2, 1, 3], [0, 1, 2]),
        ([5, 1, 2, 7, 1], [1, 2, 4]),
    ],
)
def test_queries_come_head_by_head(heads: int, lengths: list[int], rows: list[int]) -> None:
    view = PageView.from_layers(list(torch.zeros(1, 2, heads, 4, 4)))
    runtime = CPURuntime(view, WindowQueries(1, 4, heads, 2, torch.float32), None, lambda _: ())
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    common = SimpleNamespace(
        num_reqs=len(lengths),
        num_actual_tokens=starts[-1],
        query_start_loc_cpu=torch.tensor(starts, dtype=torch.int32),
    )
    query_lens_E, token_head_X, query_start_R = runtime._queries(rows, common)
    assert query_lens_E.tolist() == [lengths[row] for row in rows]
    assert query_lens_E.dtype == query_start_R.dtype == torch.int32
    expected = [[t * heads + h for t in range(starts[r], starts[r + 1])] for h in range(heads) for r in rows]
    flat = [x for sequence in expected for x in sequence]
    assert query_start_R.tolist() == [sum(map(len, expected[:i])) for i in range(len(expected) + 1)]
    if token_head_X is None:
        assert flat == list(range(starts[-1] * heads)), "nothing is reordered"
    else:
        assert token_head_X.tolist() == flat
