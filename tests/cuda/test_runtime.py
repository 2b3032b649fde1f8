"""What a step's batch asks for, from what the host knows of it; on plain tensors, no platform needed."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.evictions import eviction
from vllm_defensive.packing import Format, Packing
from vllm_defensive.plan import Eviction, Reconstruction, StepMessage
from vllm_defensive.worker.cuda import launches
from vllm_defensive.worker.cuda.runtime import NOBODY, CUDARuntime, Placed
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive_kernels import PagedKV

L, H, Q, N, D, W = 2, 2, 4, 16, 8, 32
INDEX = {"a": 3, "b": 0, "c": 5, "d": 1}


@pytest.fixture
def runtime() -> CUDARuntime:
    pages = PagedKV.from_layers(list(torch.zeros(L, 20, H, N, 2 * D)))
    windows = WindowQueries(L, W, Q, D, torch.float32)
    return CUDARuntime(pages, windows, INDEX, max_requests=8, max_blocks=10, num_query_heads=Q)


def batch(lens: dict[str, tuple[int, int]], padding: int = 0) -> Any:
    """Rows (new tokens, tokens in all) in the order given, and rows that pad a graph."""
    new = [n for n, _ in lens.values()] + [0] * padding
    starts = torch.tensor([0, *np.cumsum(new)], dtype=torch.int32)
    ends = torch.tensor([t for _, t in lens.values()] + [0] * padding, dtype=torch.int32)
    return SimpleNamespace(
        num_reqs=len(new),
        max_query_len=max(new),
        query_start_loc_cpu=starts,
        seq_lens_cpu_upper_bound=ends,
        req_idx=np.array([INDEX[name] for name in lens]),
        block_table_tensor=torch.arange(len(new) * 12, dtype=torch.int32).view(-1, 12),
    )


def planned(request_id: str, blocks: int = 2, number: int = 0) -> Eviction:
    """number: others may begin with it, so that it shares no block."""
    event = eviction(
        7 * N + 3,
        tuple(range(10, 10 + blocks)),
        shared_blocks=0 if number else 1,
        source_blocks=tuple(range(8)),
        request_id=request_id,
        block_tokens=N,
    )
    return dataclasses.replace(event, number=number)


def evict(runtime: CUDARuntime, request_id: str, blocks: int = 2, number: int = 0) -> None:
    event = planned(request_id, blocks, number)
    runtime.place(event, placed([[[blocks] * H] * L], event.packing.blocks))


def placed(pages: list[list[list[int]]], blocks: tuple[int, ...]) -> Placed:
    """pages: of each part, so many of each layer and head."""
    offsets = []
    for part in pages:
        offset_O = torch.tensor([0, *np.cumsum(part)], dtype=torch.int32)
        offsets.append((offset_O, int(offset_O[-1])))
    return Placed(tuple(offsets), torch.tensor(blocks, dtype=torch.int32))


@pytest.mark.parametrize("tokens, apart, groups", [(10, False, [(0, 5)]), (30, False, [(0, 3), (3, 5)]),
                                                   (10**9, False, [(i, i + 1) for i in range(5)]),
                                                   (10, True, [(i, i + 1) for i in range(5)])])  # fmt: skip
def test_layers_are_scored_in_groups_of_one_size(
    tokens: int, apart: bool, groups: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(launches, "SCORES_AT_A_TIME", 4 * H * 30 + 1)  # four layers' of 30 tokens
    pages = PagedKV.from_layers(list(torch.zeros(5, 2, H, N, 2 * D)))
    assert [(g.start, g.stop) for g in launches.layer_groups(pages, tokens, apart=apart)] == groups


def test_state_is_written_where_the_runner_keeps_the_request(runtime: CUDARuntime) -> None:
    evict(runtime, "c")
    state = runtime.state
    assert state.fresh_SK[5].tolist() == [10, 11] + [0] * 8
    assert state.offset_SO[5].tolist() == [0, 2, 4, 6, 8]
    assert (int(state.shared_S[5]), int(state.growth_S[5])) == (1, 7)
    assert not state.fresh_SK[[0, 1, 2, 3, 4, 6, 7]].any()


def test_pages_of_every_class_that_is_served_have_their_offsets() -> None:
    """Of a class that a request has no pages of, all heads' begin where the next class's do."""
    pages = PagedKV.from_layers(list(torch.zeros(L, 20, H, N, 2 * D)))
    sizes = {"max_requests": 8, "max_blocks": 10, "num_query_heads": Q}
    windows, classes = WindowQueries(L, W, Q, D, torch.float32), ("16", "8", "k8v4", "4")
    runtime = CUDARuntime(pages, windows, INDEX, **sizes, classes=classes)
    plain = eviction(7 * N + 3, (10, 11), request_id="a", block_tokens=N)
    mixed = dataclasses.replace(
        plain,
        score=dataclasses.replace(plain.score, request_id="b"),
        packing=Packing(plain.region, (12, 13), Format.of("8,4", pages.page_shape)),
    )
    runtime.install(plain, placed([[[3, 1], [2, 2]]], (10, 11)))
    runtime.install(mixed, placed([[[1, 0], [2, 0]], [[0, 3], [1, 1]]], (12, 13)))
    assert runtime.state.offset_SO[INDEX["a"]].tolist() == [0, 3, 4, 6] + [8] * 13
    assert runtime.state.offset_SO[INDEX["b"]].tolist() == [0] * 4 + [0, 1, 1, 3] + [3] * 4 + [3, 3, 6, 7, 8]


def test_blocks_are_cleared_whole_and_no_others(runtime: CUDARuntime) -> None:
    runtime.pages.key_PND.fill_(float("nan"))
    runtime.pages.value_PND.fill_(float("nan"))
    runtime.clear([3, 7])
    cleared = runtime.pages.of_blocks(torch.tensor([3, 7])).flatten()
    for data in (runtime.pages.key_PND, runtime.pages.value_PND):
        assert not data[cleared].any()
        assert set((~data.isnan()).flatten(1).any(1).nonzero().flatten().tolist()) == set(cleared.tolist())


def test_rows_find_their_slots_and_padding_has_none(runtime: CUDARuntime) -> None:
    evict(runtime, "c")
    evict(runtime, "a")
    runtime.begin(StepMessage(), ())
    step = runtime.step(batch({"b": (1, 9), "c": (1, 120), "a": (1, 130)}, padding=2))
    assert runtime.slot_R[:5].tolist() == [NOBODY, 5, 3, NOBODY, NOBODY]
    assert (step.decode_rows, step.packed_runs, step.captures) == (5, (), ())


def test_requests_that_are_gone_are_forgotten(runtime: CUDARuntime) -> None:
    evict(runtime, "a")
    runtime.begin(StepMessage(), ())
    runtime.step(batch({"a": (1, 130), "b": (1, 9)}))
    runtime.begin(StepMessage(), {"a", "b"})
    runtime.step(batch({"a": (1, 130)}))
    assert (runtime.slot_R == NOBODY).all()  # of all rows: a graph may be wider than the batch


def test_dummy_batches_have_no_evicted_rows(runtime: CUDARuntime) -> None:
    evict(runtime, "a")
    runtime.begin(StepMessage(), ())
    runtime.step(batch({"a": (1, 130)}))
    runtime.end()
    runtime.step(batch({"a": (1, 130)}))
    assert (runtime.slot_R == NOBODY).all()


def test_who_adopts_reads_what_was_packed_for_another(runtime: CUDARuntime) -> None:
    """Two rows at once, whose slots the model runner gives them after `begin`, when the packer is gone."""
    evict(runtime, "a", blocks=3, number=4)
    slot_of = {name: runtime._index_of[name] for name in "bc"}
    runtime._index_of = {}
    runtime.begin(StepMessage(adopted=[planned("b", 3, 4), planned("c", 3, 4)]), {"a", "b", "c"})
    runtime._index_of = slot_of
    step = runtime.step(batch({"d": (1, 9), "b": (5, 117), "c": (9, 121)}))
    assert (step.decode_rows, step.packed_runs) == (1, ((1, 3),))
    assert runtime.slot_R[:3].tolist() == [NOBODY, INDEX["b"], INDEX["c"]]
    state = runtime.state
    for slot in slot_of.values():
        assert state.fresh_SK[slot].tolist() == [10, 11, 12] + [0] * 7
        assert state.offset_SO[slot].tolist() == [0, 3, 6, 9, 12]
        assert (int(state.shared_S[slot]), int(state.growth_S[slot])) == (0, 7)
    runtime.begin(StepMessage(), {"b"})
    runtime.step(batch({"b": (1, 30), "c": (1, 122)}))
    assert runtime.slot_R[:2].tolist() == [NOBODY, INDEX["c"]], "one is gone, the other goes on"


def test_adopted_packings_are_installed_by_real_steps_alone(runtime: CUDARuntime) -> None:
    evict(runtime, "a", number=4)
    runtime.begin(StepMessage(adopted=[planned("b", number=4)]), {"a", "b"})
    runtime.end()
    runtime._index_of = {}
    runtime.step(batch({"c": (1, 9)}))
    assert (runtime.slot_R == NOBODY).all()


def test_who_is_gone_before_its_step_has_adopted_nothing(runtime: CUDARuntime) -> None:
    evict(runtime, "a", number=4)
    runtime.begin(StepMessage(adopted=[planned("b", number=4)]), {"b"})
    runtime.begin(StepMessage(), {"b"})
    runtime.step(batch({"b": (1, 9), "a": (1, 130)}))
    assert runtime.slot_R[:2].tolist() == [NOBODY, INDEX["a"]]
    assert not runtime.state.fresh_SK[INDEX["b"]].any()


def test_who_was_thrown_out_adopts_again_in_the_slot_that_it_gets(runtime: CUDARuntime) -> None:
    """In its old one is somebody who was not evicted."""
    evict(runtime, "a", number=4)
    runtime.begin(StepMessage(adopted=[planned("b", number=4)]), {"a", "b"})
    runtime.step(batch({"b": (5, 117)}))
    runtime._index_of = {"b": INDEX["c"], "e": INDEX["b"]}
    runtime.begin(StepMessage(adopted=[planned("b", number=4)]), {"b", "e"})
    runtime.step(batch({"b": (9, 9), "c": (7, 119)}))  # by the names of their slots: "e" and "b"
    assert runtime.slot_R[:2].tolist() == [NOBODY, INDEX["c"]]


def test_packings_are_kept_by_number_until_a_message_forgets_them(runtime: CUDARuntime) -> None:
    """Those without a number not at all; and who holds one goes on."""
    evict(runtime, "a", number=4)
    evict(runtime, "c")
    evict(runtime, "d", blocks=1, number=5)
    runtime.begin(StepMessage(forgotten=[3]), {"d"})
    assert set(runtime._kept) == {4, 5}
    runtime.begin(StepMessage(forgotten=[4], adopted=[planned("b", 1, 5)]), {"b"})
    assert set(runtime._kept) == {5}
    runtime.step(batch({"a": (1, 130), "b": (1, 113)}))
    assert runtime.slot_R[:2].tolist() == [INDEX["a"], INDEX["b"]]
    assert runtime.state.fresh_SK[INDEX["b"], :2].tolist() == [10, 0]


def test_decode_rows_lead_and_evicted_prompts_form_runs(runtime: CUDARuntime) -> None:
    evict(runtime, "a")
    evict(runtime, "c")
    runtime.begin(StepMessage(), ())
    together = runtime.step(batch({"b": (1, 9), "a": (5, 130), "c": (9, 140), "d": (40, 40)}))
    assert (together.decode_rows, together.packed_runs) == (1, ((1, 3),))
    apart = runtime.step(batch({"a": (5, 130), "b": (6, 9), "c": (9, 140)}))
    assert (apart.decode_rows, apart.packed_runs) == (0, ((0, 1), (2, 3)))


def test_a_step_asked_twice_answers_the_same(runtime: CUDARuntime) -> None:
    """As where a group has two metadata builders."""
    evict(runtime, "a")
    runtime.begin(StepMessage(observe={"d": (68, 100)}), ())
    for end in (80, 100):
        rows = batch({"b": (1, 9), "a": (5, 130), "d": (20, end)})
        once = runtime.step(rows)
        slots = runtime.slot_R.tolist()
        assert runtime.step(rows) == once and runtime.slot_R.tolist() == slots
    assert runtime.windows.pop("d").shape == (L, W, Q, D)


def test_window_queries_are_taken_where_the_chunk_overlaps_the_window(runtime: CUDARuntime) -> None:
    runtime.begin(StepMessage(observe={"d": (68, 100)}), ())
    assert runtime.observing
    (capture,) = runtime.step(batch({"b": (1, 9), "d": (20, 80)})).captures
    assert (capture.source, capture.target, capture.count) == (1 + 8, 0, 12)  # tokens 68 to 79 of 60 to 79
    runtime.begin(StepMessage(observe={"d": (68, 100)}), ())
    (capture,) = runtime.step(batch({"d": (20, 100)})).captures
    assert (capture.source, capture.target, capture.count) == (0, 12, 20)
    query = torch.randn(20, Q, D)
    capture.take(1, query)
    assert torch.equal(capture.window_AWQD[1, 12:], query)
    runtime.end()
    assert not runtime.observing


@pytest.mark.parametrize("normalisation, scored", [("chunk", (40, 90)), ("all", (0, 100))])
def test_echoes_are_looked_at_where_their_rows_are(
    runtime: CUDARuntime, normalisation: str, scored: tuple[int, int]
) -> None:
    """ "d" repeats positions 40 to 89 of "a", whose prompt of 100 tokens stands still; its last token comes alone."""
    wanted = Reconstruction("a", 100, (40, 90), 141, normalisation)
    place = {"b": (1, 9)}
    for chunk, first_row in (((100, 140), 1), ((140, 141), 0)):
        begin, end = chunk
        rows = {**place, "d": (end - begin, end)} if first_row else {"d": (end - begin, end), **place}
        runtime.begin(StepMessage(reconstruct={"d": wanted}), ())
        assert runtime.observing, "such a step takes no graph of the whole model"
        step = runtime.step(batch(rows))
        (row,) = step.echoes
        assert (row.tokens, row.first) == (slice(first_row, first_row + end - begin), begin)
        assert row.table_1B.tolist() == [list(range(12 * first_row, 12 * first_row + 12))]
        assert (row.scored, row.normalised, row.sink) == (scored, normalisation, 4)
        assert row.peak_LHS.shape == (L, H, 100)
        assert step.decode_rows == (1 if first_row else 2) and not step.captures
    assert runtime.reconstructions._seen["a"].whole == {(40, 90)}
    runtime.end()
    assert not runtime.observing
    runtime.begin(StepMessage(), {"a"})
    assert not runtime.reconstructions._seen
    assert not runtime.step(batch({"d": (1, 141)})).echoes
