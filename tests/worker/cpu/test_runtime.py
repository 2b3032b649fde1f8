"""Which query token each sequence of a batch's evicted rows has: head by head, row by row, token by token; and that a
step may be asked for as often as there are metadata builders."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from tests.evictions import eviction
from vllm_defensive.plan import Reconstruction, StepMessage
from vllm_defensive.worker.cpu.accumulation import Accumulations
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.reconstruction import CPUReconstructions
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.cpu.tables import Placed
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.softmax import Softmax
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
    runtime = CPURuntime(view, WindowQueries(1, 4, heads, 2, torch.float32), None, None, lambda _: ())
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


SCORED_BY = [Softmax(1.0)] * 2, Readers.one_each(2)


def test_a_step_asked_twice_answers_the_same() -> None:
    """An evicted row that grows by a block in it, a window that is cut by chunks, and sums over all queries."""
    view = PageView.from_layers(list(torch.zeros(2, 60, 3, 4, 4)))
    order_ND = torch.arange(8).view(4, 2)
    codec = PageCodec(order_ND, order_ND)
    sums, echoes = (kind(view, codec, *SCORED_BY) for kind in (Accumulations, CPUReconstructions))
    ids = ("gone", "seen", "summed", "echo")
    runtime = CPURuntime(view, WindowQueries(2, 4, 6, 2, torch.float32), sums, echoes, lambda _: ids)
    runtime.install(eviction(30, (50, 51), block_tokens=4, request_id="gone"), Placed(torch.full((1, 2, 3), 2)))
    echo = Reconstruction("seen", 10, (0, 10), 24, "all")
    message = StepMessage(observe={"seen": (6, 10)}, accumulate={"summed": 12}, reconstruct={"echo": echo})
    runtime.begin(message, ())
    common = SimpleNamespace(
        num_reqs=4,
        num_actual_tokens=22,
        query_start_loc_cpu=torch.tensor([0, 1, 11, 17, 22], dtype=torch.int32),
        seq_lens=torch.tensor([33, 10, 6, 15], dtype=torch.int32),
        block_table_tensor=torch.arange(48, dtype=torch.int32).view(4, 12),
    )
    once, twice = (runtime.step(common) for _ in range(2))
    assert once is not None and twice is not None and len(once.evicted) == len(twice.evicted) == 1
    assert once.captures == twice.captures and len(once.captures) == 1
    for ours, other in zip(once.accumulations, twice.accumulations, strict=True):
        assert ours.mass_AHT is other.mass_AHT and (ours.tokens, ours.end) == (other.tokens, other.end)
    (ours,), (other,) = once.echoes, twice.echoes
    assert ours.peak_LHT is other.peak_LHT and (ours.tokens, ours.begin, ours.end) == (slice(17, 22), 10, 15)
    assert ours.pages_LHB.shape == (2, 3, 4), "of the blocks that hold its tokens"
    for name, value in vars(once.evicted[0]).items():
        assert value is None or torch.equal(value, getattr(twice.evicted[0], name)), name
    assert runtime.tables["gone"].growth_blocks == 2  # tokens 28 to 32
    assert runtime.windows.pop("seen").shape == (2, 4, 6, 2)


def test_a_table_of_parts_is_read_as_one_of_blocks() -> None:
    view = PageView.from_layers(list(torch.zeros(1, 8, 3, 4, 4)), pages_per_block=2)
    runtime = CPURuntime(view, WindowQueries(1, 4, 3, 2, torch.float32), None, None, lambda _: ())
    common = SimpleNamespace(block_table_tensor=torch.tensor([[0, 1, 6, 7], [4, 5, 2, 3]], dtype=torch.int32))
    assert runtime._blocks(common, 0).tolist() == [0, 3]
    assert runtime._blocks(common, 1, 1, 2).tolist() == [1]


def test_what_is_kept_of_a_request_that_stands_still_goes_when_it_is_given_up() -> None:
    """A complete window stays while it is held, though no eviction has taken it, and peaks do."""
    view = PageView.from_layers(list(torch.zeros(2, 60, 3, 4, 4)))
    codec = PageCodec(torch.arange(8).view(4, 2), torch.arange(8).view(4, 2))
    echoes = CPUReconstructions(view, codec, *SCORED_BY)
    windows = WindowQueries(2, 4, 6, 2, torch.float32)
    runtime = CPURuntime(view, windows, Accumulations(view, codec, *SCORED_BY), echoes, lambda _: ())
    windows.plan("served", (6, 10), (6, 10), 0)
    runtime.begin(StepMessage(held=["served"]), ())
    echoes.plan(Reconstruction("served", 10, (0, 10), 24, "all"), (10, 15))
    runtime.end()
    runtime.drop_untaken()
    assert "served" in windows._buffers and "served" in echoes._seen
    runtime.begin(StepMessage(released=["served"]), ())
    runtime.drop_untaken()
    assert not windows._buffers and not echoes._seen and not runtime._held
