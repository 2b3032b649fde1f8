"""`--kv-eviction-admission`: who is let in, by the formula and by a scheduler."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.integrity import held_blocks
from tests.engine.test_random_walk import walk
from vllm_defensive.engine import scheduler
from vllm_defensive.engine.admission import ExpectedLength, Load, fits

MODES = pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])


def least_pool(*loads: Load) -> int:
    """The fewest usable blocks of 10 tokens that do. Iterables of blocks are read once, so each try has its own."""
    fresh = [(rest, own, list(leading)) for rest, own, leading in loads]
    return next(
        n
        for n in range(1000)
        if fits([Load(rest, own, iter(leading)) for rest, own, leading in fresh], n, block_size=10)
    )


@pytest.mark.parametrize(
    "loads, blocks",
    [
        ([], 0),
        ([Load(0, 5)], 5),
        ([Load(1, 5)], 6),
        ([Load(100, 5)], 15),
        ([Load(100, 5), Load(100, 5)], 30),
        ([Load(100, 5), Load(20, 5)], 15),  # 14 when the short one ends, 15 when the long one does
        ([Load(20, 7), Load(100, 5)], 16),  # the order does not matter; 16 at first, 15 later
        ([Load(30, 1), Load(20, 1), Load(10, 1)], 6),  # 1 + 3, 2 + 2 * 2, 3 + 3 * 1
        ([Load(0, 3, [2, 1, 0]), Load(0, 3, [2, 1, 0])], 9),  # three of six shared
        ([Load(0, 3, [2, 1, 0]), Load(0, 0, [9, 1, 0])], 7),  # they part at the third block
        ([Load(50, 0, [1, 0]), Load(10, 0, [2, 1, 0])], 7),  # the two leading ones stay with the one that stays
    ],
)
def test_demand_by_hand(loads: list[Load], blocks: int) -> None:
    assert least_pool(*loads) == blocks


def test_more_load_never_fits_where_less_did_not() -> None:
    loads = [Load(7 * i % 60, i % 4 + 1) for i in range(12)]
    pools = [least_pool(*loads[:count]) for count in range(len(loads) + 1)]
    assert pools == sorted(pools)


def test_the_expected_length_is_a_mean_that_moves() -> None:
    answers = ExpectedLength(block_size=32)
    assert not answers
    for length in (100, 200, 300):
        answers.add(length)
    assert answers and answers.mean == pytest.approx(200), "a plain mean at first"
    for _ in range(13):
        answers.add(200)
    answers.add(360)
    assert answers.mean == pytest.approx(210), "then the latest weighs a sixteenth"


@pytest.mark.parametrize(
    "generated, limit, rest",
    [(0, 1000, 200), (150, 1000, 50), (0, 60, 60), (190, 1000, 32), (200, 1000, 32), (500, 1000, 32), (500, 510, 10),
     (60, 60, 0), (61, 60, 0)],
)  # fmt: skip
def test_what_is_left_of_an_answer(generated: int, limit: int, rest: int) -> None:
    answers = ExpectedLength(block_size=32)
    answers.add(200)
    assert answers.rest(generated, limit) == rest


def served(h: Harness, count: int, max_tokens: int) -> tuple[int, int]:
    """(preemptions, most that ran at once) of equal requests that come after a first of the kind has been answered."""
    h.add(text(300, 399), max_tokens=max_tokens)
    h.run()
    for i in range(count):
        h.add(text(300, i), max_tokens=max_tokens)
    preempted = most = 0
    while h.scheduler.has_requests():
        output = h.step()
        h.check()
        preempted += len(output.preempted_req_ids or ())
        most = max(most, len(h.scheduler.running))
    h.assert_all_returned()
    return preempted, most


@MODES
@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
def test_steady_admission_throws_nobody_out(tiny_model: Path, scheduling: str, asynchronous: bool) -> None:
    """A request packs 10 blocks into 3 and grows to 12: three fit until they end, six by what they are at first."""
    common: dict[str, Any] = {
        "num_blocks": 40, "keep": 0.3, "asynchronous": asynchronous, "scheduling": scheduling, "max_model_len": 1024
    }  # fmt: skip
    eager = served(Harness(tiny_model, **common), 12, max_tokens=260)
    steady = served(Harness(tiny_model, **common, admission="steady"), 12, max_tokens=260)
    assert eager[0] > 3 and steady[0] == 0
    assert 3 <= steady[1] < eager[1]


def test_the_limit_of_an_answer_is_not_what_is_expected(tiny_model: Path) -> None:
    """Answers end after a few tokens, though they might have had hundreds."""
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady", max_model_len=1024)
    h.scheduler._answers.add(16)
    for i in range(6):
        h.add(text(300, i), max_tokens=700)
    for _ in range(12):
        h.step()
    assert len(h.scheduler.running) == 6
    h.abort(*h.live)
    assert h.scheduler._answers.mean == 16, "an answer that was cut off tells nothing"
    h.assert_all_returned()


@MODES
def test_an_absurd_expectation_serves_one_after_the_other(tiny_model: Path, asynchronous: bool) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady", asynchronous=asynchronous, max_model_len=4096)
    h.scheduler._answers.add(10**9)
    for i in range(4):
        h.add(text(300, i), max_tokens=2000 if i < 3 else 10)
    h.abort("r0")
    h.step()
    assert len(h.scheduler.running) == 1
    for _ in range(3):
        h.step()
        assert len(h.scheduler.running) == 1 and len(h.scheduler.waiting) == 2
        h.check()
    while h.live:  # none may hinder the next for ever
        first = h.scheduler.running[0].request_id
        h.abort(first)
        h.step()
        assert not h.live or (h.scheduler.running and h.scheduler.running[0].request_id != first)
    h.run()
    h.assert_all_returned()


def test_nothing_is_held_back_while_nothing_is_known(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady", max_model_len=1024)
    for i in range(6):
        h.add(text(300, i), max_tokens=700)
    for _ in range(8):
        h.step()
    assert len(h.scheduler.running) >= 5


def test_shared_blocks_count_once(tiny_model: Path) -> None:
    """Ten questions about one document of 20 blocks: 20 of it and, for each, 2 of its own and 1 of growth."""
    h = Harness(tiny_model, num_blocks=54, keep=0.2, admission="steady", max_model_len=1024)
    h.scheduler._answers.add(16)
    for i in range(10):
        h.add(text(640, 0) + text(40, i + 1), max_tokens=16)
    most = 0
    while h.scheduler.has_requests():
        h.step()
        h.check()
        most = max(most, len(h.scheduler.running))
    assert most == 10
    h.assert_all_returned()


def test_what_a_request_lasts_at_is_what_it_holds_later(tiny_model: Path) -> None:
    """Foreseen while it waits and while it is read, and true once its originals are gone."""
    h = Harness(tiny_model, num_blocks=100, keep=0.3, chunk=128, admission="steady")
    for prompt in (text(600, 0), text(20, 1)):  # evicted, and too short for it
        request = h.scheduler.requests[h.add(prompt, max_tokens=8)]
        foreseen = h.manager.lasting_blocks(request)
        h.step()
        assert h.manager.lasting_blocks(request) == foreseen
        while request.num_output_tokens < 4:
            h.step()
        assert h.manager.lasting_blocks(request) == foreseen
        assert held_blocks(h.manager, request.request_id) == foreseen[0]
        h.run()


@pytest.mark.parametrize("asynchronous, drafts", [(False, 0), (True, 0), (False, 4)], ids=["sync", "async", "drafts"])
@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
def test_random_work_comes_to_its_end(
    tiny_model: Path, scheduling: str, asynchronous: bool, drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Harness(
        tiny_model, num_blocks=30, keep=0.3, admission="steady", asynchronous=asynchronous, scheduling=scheduling,
        drafts=drafts, chunk=96, max_model_len=640,
    )  # fmt: skip
    said = list[bool]()
    monkeypatch.setattr(scheduler, "fits", lambda *args: said.append(fits(*args)) or said[-1])
    walk(h, seed=1, steps=500, max_len=640, abort=0.05)
    assert len(h.evictions) > 10
    assert not all(said)


def test_other_cache_groups_count(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady")
    request = h.scheduler.requests[h.add(text(300, 0), max_tokens=8)]
    alone = h.scheduler._load(request, ()).own
    by_length = SimpleNamespace(
        get_num_blocks_to_allocate=lambda _, num_tokens, *args, **kwargs: num_tokens, kv_cache_spec=None
    )
    h.manager.outlook.beside([by_length], lambda spec: 0)
    assert h.scheduler._load(request, ()).own == alone + 308  # what they take at its expected end


def test_a_refusal_is_not_worked_out_again_until_something_changes(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady", max_model_len=1024)
    asked: list[int] = []

    def counted(loads: list[Load], usable_blocks: int, block_size: int) -> bool:
        asked.append(len(loads))
        return fits(loads, usable_blocks, block_size)

    monkeypatch.setattr(scheduler, "fits", counted)
    preempted, most = served(h, 12, max_tokens=260)
    assert (preempted, most) == (0, 3)
    assert 12 <= len(asked) < 60  # of some thousand steps


def test_a_classifier_says_nothing_of_how_long_answers_are(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, admission="steady")
    for max_tokens, mean in ((1, 0), (20, 20), (1, 20)):
        h.add(text(100, max_tokens), max_tokens=max_tokens)
        h.run()
        assert h.scheduler._answers.mean == mean


def test_eager_admission_is_not_even_asked(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, max_model_len=1024)
    assert h.eviction is not None and h.eviction.admission == "eager"
    monkeypatch.setattr(type(h.scheduler), "_admits", None)  # to call it would raise
    assert h.scheduler._answers is None
    assert served(h, 6, max_tokens=260)[0] > 0
