"""Beside recurrent layers, whose states vLLM caches at the ends of some blocks only, and layers that attend in chunks:
nothing leaks, nobody goes on from a state that is not his own, and a packing is adopted where the state at its end is
still there."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from tests.engine.harness import Harness, text
from tests.engine.test_random_walk import walk
from tests.learned_scores import random_score

DOCUMENT = text(200, 1)
BOUNDARY = {"kv_eviction_boundary": len(DOCUMENT), "kv_eviction_keep": 0.3}


@pytest.fixture(scope="module")
def score(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("score") / "score.safetensors"
    random_score(tiny_model, path, 2, 2, 32)
    return str(path)


def ask(h: Harness, seed: int, **fields: Any) -> str:
    """A question about the document, answered."""
    request_id = h.add(DOCUMENT + text(40, seed), extra_args={**BOUNDARY, **fields})
    h.run()
    return request_id


def forget_states(pool: Any, group: int) -> int:
    """Have the prefix cache lose what it has of a KV cache group. Returns how many blocks that are."""
    from vllm.v1.core.kv_cache_utils import get_group_id

    hashed = [b for b in pool.blocks if b.block_hash is not None and get_group_id(b.block_hash) == group]
    for block in hashed:
        pool._maybe_evict_cached_block(block)
    return len(hashed)


@pytest.mark.parametrize("beside", [{"states": 2}, {"chunks": 2}], ids=["states", "chunks"])
def test_a_question_begins_with_what_the_first_one_packed(tiny_model: Path, beside: dict[str, int]) -> None:
    h = Harness(tiny_model, num_blocks=60, **beside)
    packed, adopted = ask(h, 2), ask(h, 3)
    assert (h.hits[packed], h.hits[adopted]) == (0, 192)
    assert [e.request_id for e in h.evictions] == [packed]
    assert [e.request_id for e in h.ghost.adoptions] == [adopted]
    h.assert_all_returned()


def test_nothing_is_adopted_without_the_state_at_its_end(tiny_model: Path) -> None:
    """Of one group of two: the document is packed once more, and then the state is there again."""
    h = Harness(tiny_model, num_blocks=60, states=2)
    ask(h, 2)
    assert forget_states(h.pool, 2)
    packed = ask(h, 3)
    assert h.ghost.adoptions == [] and h.evictions[-1].request_id == packed and h.hits[packed] == 0
    adopted = ask(h, 4)
    assert [e.request_id for e in h.ghost.adoptions] == [adopted]
    h.assert_all_returned()


def test_the_state_where_a_packing_ends_is_kept_whoever_else_shares_the_document(tiny_model: Path) -> None:
    """One that is not evicted has read the document before, of which its states were kept at its own end alone: vLLM
    would keep the next one where the two part, and nobody could begin with what is packed."""
    h = Harness(tiny_model, num_blocks=60, states=1)
    h.add(DOCUMENT + text(40, 9), extra_args={"kv_eviction": "none"})
    h.run()
    ask(h, 2)
    adopted = ask(h, 3)
    assert [e.request_id for e in h.ghost.adoptions] == [adopted]


def test_a_repetition_would_move_states_and_the_window_scores_instead(tiny_model: Path) -> None:
    h = Harness(tiny_model, num_blocks=60, states=1)
    request_id = ask(h, 2, kv_eviction="kvzip")
    assert [(e.request_id, e.policy) for e in h.evictions] == [(request_id, "halokv")]
    assert h.scheduler.eviction_manager.lifecycle.totals.echo_tokens == 0


def test_two_states_are_counted_where_one_is_made_of_the_other(tiny_model: Path) -> None:
    """And one where none is cached. A request that does not fit beside them is served whole, and does not wait for
    ever."""
    for caching, each in ((True, 2), (False, 1)):
        h = Harness(tiny_model, num_blocks=60, states=3, caching=caching)
        assert h.manager.outlook.blocks_beside(1) == h.manager.outlook.blocks_beside(4000) == 3 * each
    for spare, evicted in ((0, True), (-1, False)):
        # 200 tokens are 7 blocks, of which 6 are packed into 2.
        h = Harness(tiny_model, num_blocks=7 + 2 + 3 * 2 + spare, max_model_len=256, states=3, keep=0.3, reuse="off")
        h.add(text(200, 1), max_tokens=4)
        h.run()
        assert bool(h.evictions) == evicted
        h.assert_all_returned()


@pytest.mark.parametrize("policy", ["snapkv", "streamingllm"])
def test_answers_are_evicted_and_prompts_bounded(tiny_model: Path, policy: str) -> None:
    """A prompt of twice the pool; who is thrown out passes the same stops again."""
    settings = {"answers": "evict", "interval": 64, "prompts": "bounded", "prompt_interval": 64, "budget": 96}
    h = Harness(tiny_model, num_blocks=30, states=2, policy=policy, keep=1.0, chunk=96, **settings)
    ids = [h.add(text(length, seed), max_tokens=150) for seed, length in enumerate((1900, 300, 70))]
    for _ in range(40):
        h.step()
        h.check()
    h.scheduler.reset_prefix_cache(reset_running_requests=True)
    h.run()
    h.assert_all_returned()
    assert {e.request_id for e in h.evictions} == set(ids)
    assert sum(e.request_id == ids[0] for e in h.evictions) >= 1900 // 64


REUSE = ("off", "boundary", "prefix", "chat")


@pytest.mark.parametrize("beside", [{"states": 2}, {"chunks": 1}], ids=["states", "chunks"])
@pytest.mark.parametrize(
    "seed, caching, reuse",
    [
        (0, True, "off"),
        (1, True, "boundary"),
        (2, False, "off"),
        *(pytest.param(seed, True, REUSE[seed % 4], marks=pytest.mark.slow) for seed in range(3, 11)),
    ],
)
def test_random_work(
    tiny_model: Path, score: str, beside: dict[str, int], seed: int, caching: bool, reuse: str
) -> None:
    rng = random.Random(seed)
    h = Harness(
        tiny_model,
        num_blocks=rng.choice([48, 56]),
        keep=rng.choice([0.2, 0.4]),
        chunk=rng.choice([50, 96, 512]),
        max_num_seqs=32,
        max_model_len=640,
        scheduling=rng.choice(["fcfs", "priority"]),
        caching=caching,
        learned=score,
        reuse=reuse,
        **beside,
    )
    happened = walk(h, seed, steps=800, max_len=640, abort=0.05)
    assert len(h.evictions) > 10 and happened["aborted"] and happened["second turns"] and happened["boundaries"]
    assert "chunks" in beside or not happened["echoes"]
