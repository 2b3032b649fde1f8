"""Packings that outlive their request: who packs, who waits, who begins with what, and what becomes of the blocks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from vllm_defensive.compat.channels import read_message, take_counts
from vllm_defensive.plan import Eviction

DOCUMENT = text(320, 1)


def ask(h: Harness, seed: int, document: list[int] = DOCUMENT, max_tokens: int = 16, **fields: Any) -> str:
    """A question of 20 tokens about the document."""
    own = {"kv_eviction_boundary": len(document), **fields}
    return h.add(document + text(20, seed), max_tokens=max_tokens, extra_args=own)


def of(h: Harness) -> tuple[int, int]:
    """Evictions and adoptions so far."""
    return len(h.evictions), len(h.ghost.adoptions)


def test_a_packing_is_adopted_after_its_request_has_ended(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, keep=0.3, reuse="boundary")
    ask(h, 2)
    h.run()
    assert of(h) == (1, 0) and h.held == 0
    packed = len(h.evictions[0].packing.blocks)
    second, third = ask(h, 3), ask(h, 4)
    h.step()
    assert of(h) == (1, 2) and h.hits[second] == h.hits[third] == 320
    assert h.held == packed + 2, "the packing once, and a block of each one's own"
    assert h.manager.lifecycle.packed_blocks == packed
    h.run()
    assert h.manager.lifecycle.totals.adoptions == 2 and h.manager.lifecycle.totals.adopted_tokens == 640
    h.assert_all_returned()
    assert not len(h.manager.lifecycle.library), "the prefix cache was reset"
    ask(h, 5)
    h.run()
    assert of(h) == (2, 2)


def test_by_default_who_names_a_boundary_publishes_where_that_can_be(tiny_model: Path) -> None:
    for caching, expected in ((True, (1, 1)), (False, (2, 0))):
        h = Harness(tiny_model, num_blocks=100, keep=0.3, caching=caching)
        for seed in (2, 3):
            ask(h, seed, text(330, 1))
            h.run()
        assert of(h) == expected
        assert h.evictions[0].region.stop == (320 if caching else 330)
        states = [increase.state for stats in h.stats for increase in take_counts(stats) if increase.state is not None]
        assert all(state.publishes == caching for state in states) and states
        h.assert_all_returned()


def test_sixty_four_questions_about_eight_documents(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary", max_model_len=640)
    rng = random.Random(1)
    questions = [text(320, 10 + i % 8) for i in range(64)]
    rng.shuffle(questions)
    for i, document in enumerate(questions):
        ask(h, 100 + i, document)
    h.run()
    assert of(h) == (8, 56)
    computed = sum(320 + 20 - h.hits[request_id] for request_id in h.hits)
    assert computed == 8 * 320 + 64 * 20
    h.assert_all_returned()


def test_of_many_at_once_one_packs_and_nobody_behind_them_waits(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary", chunk=64, long_prefill=32)
    asking = [ask(h, i) for i in range(2, 42)]
    stranger = h.add(text(40, 399))
    h.step()
    h.step()
    running = {request.request_id for request in h.scheduler.running}
    assert running == {asking[0], stranger}
    h.run()
    assert of(h) == (1, 39)
    h.assert_all_returned()


def test_who_waits_is_not_looked_at_in_every_step(tiny_model: Path) -> None:
    """They stand beside vLLM's queue, in their order, and are not forgotten: neither by who ends them, nor if the
    packer ends while nobody else runs."""
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary", chunk=64, long_prefill=32, max_num_seqs=4)
    packer = h.add(DOCUMENT, max_tokens=1, extra_args={"kv_eviction_boundary": 320})
    waiting = [ask(h, i) for i in range(3, 43)]
    for _ in range(4):
        h.step()
        h.check()
    assert not h.scheduler.waiting and h.scheduler.get_request_counts() == (1, 40)
    h.abort(waiting[0], waiting[20])
    while packer in h.live:
        h.step()
    assert h.scheduler.has_requests() and h.scheduler.get_request_counts() == (0, 38)
    h.run()
    begun = [e.request_id for e in h.ghost.adoptions]
    assert begun == [r for r in waiting if r not in (waiting[0], waiting[20])]
    assert not len(h.scheduler._parking) and not h.scheduler.deferred_waiting
    h.assert_all_returned()


@pytest.mark.parametrize("fate", ["abort", "decline", "preempt"])
def test_if_the_packer_cannot_the_next_one_does(tiny_model: Path, fate: str) -> None:
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary", chunk=64)
    first, second, _ = ask(h, 2), ask(h, 3), ask(h, 4)
    h.step()
    if fate == "abort":
        h.abort(first)
    elif fate == "decline":
        h.ghost.declines = {first}
    else:
        request = h.scheduler.requests[first]
        h.scheduler.running.remove(request)
        h.scheduler._preempt_request(request, 0.0)
    h.run()
    assert of(h) == ((1, 2) if fate == "preempt" else (1, 1))
    assert h.evictions[0].request_id == (first if fate == "preempt" else second)
    h.assert_all_returned()


def test_others_pack_for_themselves(tiny_model: Path) -> None:
    """Another policy, size or salt, no boundary, or a prompt whose first tokens stay whole."""
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary")
    ask(h, 2)
    h.run()
    ask(h, 3, kv_eviction_keep=0.5)
    ask(h, 4, kv_eviction="h2o")
    ask(h, 5, kv_eviction_protect=32)
    h.add(DOCUMENT + text(20, 6))
    h.add(DOCUMENT + text(20, 7), extra_args={"kv_eviction_boundary": 320}, cache_salt="another tenant")
    h.run()
    assert of(h) == (6, 0)
    ask(h, 8, kv_eviction_reuse="off")
    h.run()
    assert of(h) == (7, 0)
    ask(h, 9)
    h.run()
    assert of(h) == (7, 1)
    h.assert_all_returned()


def test_a_boundary_within_a_block_is_rounded_down(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, keep=0.3, reuse="boundary")
    ask(h, 2, text(330, 1))
    h.run()
    ask(h, 3, text(350, 1))
    h.run()
    assert [e.region.stop for e in h.evictions] == [320] and of(h) == (1, 1)
    assert h.evictions[0].region.tail == 0


def test_one_token_warms_up(tiny_model: Path) -> None:
    """A request whose boundary is its prompt's end, for one token: it publishes, and ends with that very step."""
    h = Harness(tiny_model, num_blocks=100, keep=0.3, reuse="boundary")
    warm = h.add(DOCUMENT, max_tokens=1, extra_args={"kv_eviction_boundary": 320})
    h.run()
    assert of(h) == (1, 0) and h.hits[warm] == 0
    again = h.add(DOCUMENT, max_tokens=1, extra_args={"kv_eviction_boundary": 320})
    h.run()
    assert of(h) == (2, 0) and h.hits[again] == 320 - 32, "a token must be computed: it packs anew, from the originals"
    ask(h, 2)
    h.run()
    assert of(h) == (2, 1)
    h.assert_all_returned()


def test_originals_of_what_is_published_are_used_first(tiny_model: Path) -> None:
    """Documents in turn, in a pool that holds all packings and one document."""
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="boundary")
    documents = [text(640, i) for i in range(1, 6)]
    for turn in range(3):
        for i, document in enumerate(documents):
            ask(h, 50 + 10 * turn + i, document)
            h.run()
    assert of(h) == (5, 10)
    assert h.manager.lifecycle.library.lost == 0


def test_documents_that_do_not_fit_beside_the_packings_are_read_one_at_a_time(tiny_model: Path) -> None:
    """Four of six at once, in steps that have the tokens of three: as many as there is room for, without those that
    were packed being given up."""
    h = Harness(tiny_model, num_blocks=72, keep=0.3, reuse="boundary", chunk=2048)
    documents = [text(640, i) for i in range(1, 7)]
    asked = [(50 + i, documents[i % 6]) for i in range(24)]
    most = 0
    while asked or h.live:
        while asked and len(h.live) < 4:
            ask(h, *asked.pop(0))
        h.step()
        h.check()
        most = max(most, len(h.manager.lifecycle.packers))
    assert of(h) == (6, 18) and most >= 2
    h.assert_all_returned()


def test_what_is_lost_is_packed_anew(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, reuse="boundary")
    ask(h, 2)
    h.run()
    library = h.manager.lifecycle.library
    h.add(text(1250, 30))
    h.run()
    assert (len(library), library.lost, library.blocks) == (0, 1, 0)
    ask(h, 3)
    h.run()
    assert of(h) == (2, 0) and len(library) == 1
    h.assert_all_returned()
    assert set(h.ghost._kept) <= {e.number for e in h.evictions if e.number}


def test_what_does_not_fit_to_be_packed_can_begin_with_a_packing(tiny_model: Path) -> None:
    """The document and a long question fit the pool, and not what would be packed of the document beside them."""
    h = Harness(tiny_model, num_blocks=16, keep=0.3, reuse="boundary", max_model_len=480)
    ask(h, 2)
    h.run()
    long = {"prompt": DOCUMENT + text(130, 3), "max_tokens": 4, "extra_args": {"kv_eviction_boundary": 320}}
    adopter = h.add(**long)
    h.run()
    assert of(h) == (1, 1) and h.hits[adopter] == 320
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(h.manager.outlook, "windows_before", lambda request, end: None)  # of other layers, which are lost
        h.add(**long)
        h.run()
    assert of(h) == (1, 1), "it is served whole"
    h.add(text(480 - 16, 5), max_tokens=4, extra_args={"kv_eviction": "none"})
    h.run()
    assert not len(h.manager.lifecycle.library)
    h.add(**long)
    h.run()
    assert of(h) == (1, 1), "nothing is there to begin with"
    h.assert_all_returned()


def test_other_weights_forget_everything(tiny_model: Path) -> None:
    """Who holds a packing keeps it; nobody begins with it, nor with one that is being made."""
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="boundary", chunk=64)
    holder = ask(h, 2, max_tokens=100)
    while not len(h.manager.lifecycle.library):
        h.step()
    packer = ask(h, 3, text(320, 60))
    h.step()
    library = h.manager.lifecycle.library
    library.forget_all()
    assert (len(library), library.published, library.lost, library.dropped) == (0, 1, 0, 1)
    ask(h, 4), ask(h, 5, text(320, 60))
    assert holder in h.live and packer in h.live
    h.run()
    assert of(h) == (4, 0)
    h.assert_all_returned()


def test_codes_are_cleared_when_others_get_their_blocks(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, reuse="boundary", widths="8")
    ask(h, 2)
    h.run()
    packed: Eviction = h.evictions[0]
    assert packed.packing.format.quantised
    assert not h.manager.lifecycle._clear, "they are still of use"
    h.add(text(1250, 30), extra_args={"kv_eviction": "none"})
    cleared: set[int] = set()
    while h.scheduler.has_requests():
        cleared.update(read_message(h.step()).clear)
    assert cleared == set(packed.packing.blocks)


def say(h: Harness, said: list[int], seed: int, max_tokens: int = 40, **fields: Any) -> str:
    """A turn of a chat: what was said so far, and 20 tokens more."""
    return h.add(said + text(20, seed), max_tokens=max_tokens, extra_args=fields or None)


def test_a_turn_of_a_chat_costs_its_new_tokens(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="chat")
    said, hits = text(620, 1), []
    for turn in range(4):
        request_id = say(h, said, 10 + turn)
        h.run()
        said = h.tokens(request_id)
        hits.append(h.hits[request_id])
    # What the last token of an answer would have added is not computed; whole blocks only.
    assert of(h) == (1, 3) and hits == [0, 672, 736, 800 - 32]
    library = h.manager.lifecycle.library
    assert len(library) == 5 and h.held == 0
    fork = say(h, h.tokens("r1"), 30)
    h.run()
    assert h.hits[fork] == 736, "another answer to an earlier turn"
    assert len(library) == 6
    h.assert_all_returned()


def test_a_chat_that_is_mostly_not_packed_is_packed_anew(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="chat")
    first = say(h, text(300, 1), 2, max_tokens=360)
    h.run()
    again = say(h, h.tokens(first), 3, max_tokens=10)
    h.run()
    assert of(h) == (2, 0) and h.hits[again] <= 320, "of the originals"
    h.assert_all_returned()


def test_a_prefix_is_taken_by_requests_without_a_boundary(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="prefix")
    ask(h, 2)
    h.run()
    taken = h.add(DOCUMENT + text(200, 9))
    too_long = h.add(DOCUMENT + text(400, 9))
    own = h.add(text(400, 8))
    h.run()
    assert [e.request_id for e in h.ghost.adoptions] == [taken] and h.hits[taken] == 320
    assert {e.request_id for e in h.evictions} == {"r0", too_long, own}
    assert len(h.manager.lifecycle.library) == 1, "only what a boundary names is left for others"
    h.assert_all_returned()


def test_what_stands_on_a_lost_packing_is_lost(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=40, keep=0.3, reuse="chat")
    said = h.tokens(say(h, text(300, 1), 2))
    h.run()
    library = h.manager.lifecycle.library
    assert len(library) == 2
    h.add(text(1250, 30), extra_args={"kv_eviction": "none"})
    h.run()
    assert (len(library), library.lost, library.blocks) == (0, 2, 0)
    say(h, said, 3)
    h.run()
    assert of(h) == (2, 0)
    h.assert_all_returned()


class Clock:
    def __init__(self, h: Harness) -> None:
        self.now = 0.0
        h.manager.lifecycle.library.pins.clock = lambda: self.now


def test_what_is_pinned_stays(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="boundary")
    clock, library = Clock(h), h.manager.lifecycle.library
    ask(h, 2, kv_eviction_pin=60, max_tokens=1)
    h.run()
    packed = len(h.evictions[0].packing.blocks)
    assert h.held == library.pins.blocks == packed and h.manager.lifecycle.packed_blocks == 0
    clock.now = 59
    for seed in (30, 31):
        h.add(text(1650, seed), extra_args={"kv_eviction": "none"})  # all but what is pinned
        h.run()
    ask(h, 3)
    h.run()
    assert of(h) == (1, 1) and library.lost == 0
    clock.now = 60
    h.add(text(40, 7))
    h.step()
    assert library.pins.blocks == 0 and len(library) == 1, "it is like any other now"
    h.run()
    h.assert_all_returned()


def test_pins_are_renewed_and_taken_back(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="boundary")
    clock, library = Clock(h), h.manager.lifecycle.library
    ask(h, 2, kv_eviction_pin=10)
    h.run()
    clock.now = 9
    ask(h, 3, kv_eviction_pin=10.5)
    h.run()
    clock.now = 19
    ask(h, 4)
    h.run()
    assert library.pins.blocks
    ask(h, 5, kv_eviction_pin=0)
    h.run()
    assert not library.pins.blocks and of(h) == (1, 3)
    h.assert_all_returned()


@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
@pytest.mark.parametrize("there", [True, False], ids=["there", "lost"])
def test_a_pin_is_taken_back_without_a_step(tiny_model: Path, there: bool, asynchronous: bool) -> None:
    """And what was lost is not packed anew for it."""
    h = Harness(tiny_model, num_blocks=60, keep=0.3, asynchronous=asynchronous, admission="steady")
    library = h.manager.lifecycle.library
    ask(h, 2, kv_eviction_pin=60)
    h.run()
    assert library.pins.blocks
    if not there:
        library.forget_all()
    unpinning = h.add([*DOCUMENT, 5], max_tokens=9, extra_args={"kv_eviction_boundary": 320, "kv_eviction_pin": -1})
    assert not h.live and h.scheduler.has_requests(), "a step tells its client"
    output = h.scheduler.schedule()
    assert not output.num_scheduled_tokens
    outputs = h.scheduler.update_from_output(output, h._draw(output, {}))
    (told,) = [told for of_client in outputs.values() for told in of_client.outputs]
    assert (told.request_id, told.new_token_ids, str(told.finish_reason)) == (unpinning, [], "stop")
    assert not library.pins.blocks and len(library) == there
    assert h.scheduler._answers.mean == 16, "an empty answer says nothing of the next one's length"
    ask(h, 3)
    h.run()
    assert of(h) == ((1, 1) if there else (2, 0))
    h.assert_all_returned()


def test_no_more_is_pinned_than_may_be(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="boundary", pinned=0.1)
    reports = []
    for seed in (1, 2, 3):
        request_id = ask(h, 50 + seed, text(320, seed), kv_eviction_pin=60, kv_eviction_report=1)
        while not h.scheduler.requests[request_id].num_output_tokens:
            h.step()
        reports.append(h.manager.lifecycle.report(request_id))
        h.run()
    assert [report["pinned"] for report in reports] == [True, True, False]
    assert h.manager.lifecycle.library.pins.blocks == 6
    h.assert_all_returned()


def test_a_replaced_end_takes_those_that_stand_on_it_along(tiny_model: Path) -> None:
    """Three answers to one turn stand on its end, which is then packed anew."""
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="chat")
    said = h.tokens(say(h, text(300, 1), 2, max_tokens=193))
    h.run()
    for seed in (3, 4, 5):
        say(h, said, seed, max_tokens=50)
        h.run()
    library = h.manager.lifecycle.library
    (end,) = [p for p in library._by_key.values() if p.end == 512]
    assert len(end.children) == 3
    again = h.add(said[:512] + text(188, 9), extra_args={"kv_eviction_boundary": 512})
    h.run()
    assert [e.request_id for e in h.evictions] == ["r0", again]
    assert sorted(p.end for p in library._by_key.values())[:2] == [320, 512] and len(library) == 3
    assert (library.published, library.lost, library.dropped) == (7, 0, 4), "the end, and three answers"
    h.assert_all_returned()


def test_a_pin_ends_with_what_it_holds(tiny_model: Path) -> None:
    """A turn's end is not pinned, nor does a pin outlast its packing's place."""
    h = Harness(tiny_model, num_blocks=200, keep=0.3, reuse="chat")
    clock, library = Clock(h), h.manager.lifecycle.library
    said = h.tokens(say(h, text(300, 1), 2, max_tokens=193))
    h.run()
    for tokens in (20, 188):
        h.add(said[:512] + text(tokens, 9), extra_args={"kv_eviction_boundary": 512, "kv_eviction_pin": 10})
        h.run()
    assert library.pins.blocks == len(h.evictions[1].packing.blocks)
    clock.now = 11
    h.add(text(40, 7))
    h.run()
    assert not library.pins.blocks
    h.assert_all_returned()


@pytest.mark.parametrize("pool", [48, 60, 90])
def test_originals_never_stand_behind_packings(tiny_model: Path, pool: int) -> None:
    """One document after the other, more of them than fit: what is given up is as much as is needed."""
    h = Harness(tiny_model, num_blocks=pool, keep=0.2, reuse="boundary")
    room = (pool - 26) // 4
    for turn in range(3):
        for i in range(12):
            ask(h, 50 + 12 * turn + i, text(640, 1 + i), max_tokens=4)
            h.run()
            if turn:
                assert len(h.manager.lifecycle.library) >= min(room, 12) - 1
    h.assert_all_returned()


def test_a_first_chunk_before_the_stop_counts_what_it_holds(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="chat", chunk=64)
    h.scheduler.scheduler_reserve_full_isl = False
    said = h.tokens(say(h, text(620, 1), 2, max_tokens=10))
    h.run()
    for seed in range(3, 9):
        say(h, said + text(200, seed), seed, max_tokens=30)
    h.run()
    assert len(h.ghost.adoptions) >= 6
    h.assert_all_returned()


def test_who_cannot_adopt_is_not_waited_for(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=400, keep=0.3, reuse="boundary", chunk=64, long_prefill=32)
    ask(h, 2)
    h.run()
    h.add(DOCUMENT, max_tokens=1, extra_args={"kv_eviction_boundary": 320})
    h.step()
    question = ask(h, 3)
    h.step()
    assert h.hits[question] == 320
    h.run()
    h.assert_all_returned()


def test_a_warm_up_pins_what_is_there(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, keep=0.3, reuse="boundary")
    for _ in range(2):
        h.add(DOCUMENT, max_tokens=1, extra_args={"kv_eviction_boundary": 320, "kv_eviction_pin": 60})
        h.run()
        assert h.manager.lifecycle.library.pins.blocks == 3
        h.manager.lifecycle.library.pins.drop_all()
    h.assert_all_returned()


def test_pins_make_way_where_nobody_could_go_on(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, keep=0.3, reuse="boundary")
    ask(h, 2, kv_eviction_pin=60)
    h.run()
    assert h.manager.lifecycle.library.pins.blocks
    h.add(text(1850, 30), extra_args={"kv_eviction": "none"})
    h.run()
    assert not h.manager.lifecycle.library.pins.blocks
    h.assert_all_returned()


@pytest.mark.parametrize("scheduling", ["fcfs", "priority"])
@pytest.mark.parametrize("asynchronous, drafts", [(False, 0), (True, 0), (False, 4)], ids=["sync", "async", "drafts"])
@pytest.mark.parametrize(
    "num_blocks, abort, widths, policy, reuse",
    [
        (26, 0.05, "16", "snapkv", "boundary"),
        (40, 0.02, "8", "snapkv", "chat"),
        (60, 0.02, "16", "kvzip", "prefix"),
        (200, 0.2, "8,4", "snapkv", "chat"),
    ],
)
def test_random_walk(
    tiny_model: Path,
    asynchronous: bool,
    drafts: int,
    scheduling: str,
    num_blocks: int,
    abort: float,
    widths: str,
    policy: str,
    reuse: str,
) -> None:
    rng = random.Random(f"{num_blocks}{scheduling}{asynchronous}{drafts}")
    h = Harness(
        tiny_model,
        num_blocks=num_blocks,
        policy=policy,
        keep=0.3,
        reuse=reuse,
        widths=widths,
        chunk=96,
        max_model_len=640,
        asynchronous=asynchronous,
        scheduling=scheduling,
        drafts=drafts,
    )
    documents = [text(n, seed) for seed, n in enumerate((300, 320, 250, 128, 399, 290))]
    ended: list[list[int]] = []
    for _ in range(700):
        if len(h.live) < 10 and rng.random() < 0.4:
            document = documents[min(rng.randrange(6), rng.randrange(6))]
            question = text(rng.choice([0, 1, 20, 60, 33]), rng.randrange(400))
            own: dict[str, Any] | None = {"kv_eviction_boundary": len(document)}
            assert own is not None
            if rng.random() < 0.1:
                own["kv_eviction_keep"] = 0.6
            if rng.random() < 0.1:
                own["kv_eviction"] = rng.choice(["none", "h2o", "layer-defensivekv"])
            if rng.random() < 0.05:
                own["kv_eviction_protect"] = 64
            if rng.random() < 0.1:
                own["kv_eviction_reuse"] = "off"
            elif rng.random() < 0.1 and "kv_eviction_protect" not in own and own.get("kv_eviction") != "none":
                own["kv_eviction_pin"] = rng.choice([0, 0.01, 10])
            if rng.random() < 0.2 or (reuse != "boundary" and rng.random() < 0.6):
                own = None
                if ended and rng.random() < 0.7:
                    document = rng.choice(ended[-5:])
            if len(document) + len(question) > 480:
                continue
            h.add(document + question, max_tokens=rng.choice([1, 20, 150]), priority=rng.randrange(3), extra_args=own)
        if h.live and rng.random() < abort:
            h.abort(rng.choice(h.live))
        if rng.random() < 0.003:
            h.scheduler.reset_prefix_cache(reset_running_requests=not asynchronous)
        if rng.random() < 0.003:
            h.manager.lifecycle.library.forget_all()
        before = set(h.live)
        h.step()
        ended += [h.tokens(r) for r in sorted(before.difference(h.live)) if "echo" not in r]
        h.check()
    h.run()
    assert h.ghost.adoptions and len(h.evictions) > 5
    h.assert_all_returned()
    h.add(text(40, 7))  # a step that tells the workers what is left to be told
    h.run()
    assert not h.ghost._kept


def test_a_budget_and_what_comes_of_the_answer_are_part_of_how_it_is_packed(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=100, policy="streamingllm", keep=0.9, reuse="boundary", interval=64)
    for number, fields in enumerate(({}, {"budget": 128}, {"budget": 96}, {"answers": "evict"})):
        for seed in (2, 3):
            ask(h, seed, **{f"kv_eviction_{name}": value for name, value in fields.items()})
            h.run()
        assert of(h) == (number + 1, number + 1), fields
    assert [len(e.packing.blocks) for e in h.evictions][1:3] == [4, 3]
