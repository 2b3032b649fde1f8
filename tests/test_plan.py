"""The arithmetic that both processes share: exact counts, and what holds for every prompt."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vllm_defensive.plan import StepMessage, forced_tokens, packed_blocks


@pytest.mark.parametrize(
    "tokens, shared, keep, block_size, expected",
    [
        (1000, 0, 0.25, 32, 8),  # ceil((250 - 8) / 32)
        (1000, 0, 0.2, 32, 6),  # ceil((200 - 8) / 32) = 6 exactly
        (1000, 31, 0.2, 32, 0),  # nothing is left to evict
        (1000, 20, 0.5, 32, 6),  # ceil((0.5 * 360 - 8) / 32) = ceil(5.375)
        (640, 0, 0.01, 32, 1),  # the window alone fills a block
        (641, 0, 0.01, 32, 1),  # 31 of its tokens are in full blocks
        (645, 0, 0.01, 128, 1),
        (640, 0, 0.99, 32, 0),  # 20 blocks for 20 would free none
        (640, 0, 1.0, 32, 0),
        (63, 0, 0.2, 32, 0),  # one full block cannot become fewer
        (64, 0, 0.2, 32, 1),
        (5, 0, 0.2, 32, 0),
    ],
)
def test_packed_blocks_by_hand(tokens: int, shared: int, keep: float, block_size: int, expected: int) -> None:
    assert packed_blocks(tokens, shared, keep=keep, window=32, min_tokens=33, block_size=block_size) == expected


@pytest.mark.parametrize(
    "tokens, shared, window, block_size, expected",
    [
        (64, 0, 32, 32, 32),
        (70, 0, 32, 32, 26),  # six of the window are in the tail
        (95, 0, 31, 32, 0),  # all of it is
        (96, 2, 70, 32, 32),  # a wide window reaches into the shared blocks
        (96, 3, 70, 32, 0),
    ],
)
def test_forced_tokens_by_hand(tokens: int, shared: int, window: int, block_size: int, expected: int) -> None:
    assert forced_tokens(tokens, shared, window, block_size) == expected


@st.composite
def prompts(draw: st.DrawFn) -> dict[str, int | float]:
    block_size = draw(st.sampled_from([16, 32, 128]))
    tokens = draw(st.integers(1, 20_000))
    return {
        "num_tokens": tokens,
        "shared_blocks": draw(st.integers(0, tokens // block_size)),
        "keep": draw(st.floats(0.001, 1)),
        "window": draw(st.integers(1, 300)),
        "min_tokens": draw(st.sampled_from([1, 256])),
        "block_size": block_size,
    }


@given(prompts())
@example({"num_tokens": 64, "shared_blocks": 0, "keep": 1.0, "window": 1, "min_tokens": 1, "block_size": 32})
def test_an_eviction_frees_at_least_one_block_and_holds_what_must_stay(prompt: dict[str, int | float]) -> None:
    packed = packed_blocks(**prompt)
    full = prompt["num_tokens"] // prompt["block_size"]
    tail = prompt["num_tokens"] - full * prompt["block_size"]
    if packed == 0:
        return
    assert prompt["num_tokens"] >= prompt["min_tokens"] and prompt["num_tokens"] > prompt["window"]
    assert 1 <= packed < full - prompt["shared_blocks"]
    window = forced_tokens(prompt["num_tokens"], prompt["shared_blocks"], prompt["window"], prompt["block_size"])
    assert packed * prompt["block_size"] >= window
    evictable = prompt["num_tokens"] - prompt["shared_blocks"] * prompt["block_size"]
    kept = packed * prompt["block_size"] + tail
    assert kept >= prompt["keep"] * evictable - 1e-6, "at least the ratio is kept"
    # Never a block more than the ratio, the window or the one block that a prompt needs anyway ask for.
    excess = kept - max(prompt["keep"] * evictable, window + tail)
    assert excess < prompt["block_size"] + tail + 1e-6


@given(prompts(), st.integers(1, 200))
def test_longer_prompts_are_never_evicted_less_readily(prompt: dict[str, int | float], blocks: int) -> None:
    """Growing by whole blocks never needs fewer packed ones: start-up relies on it (see EvictableSpec)."""
    longer = {**prompt, "num_tokens": prompt["num_tokens"] + blocks * prompt["block_size"]}
    assert packed_blocks(**longer) >= packed_blocks(**prompt)


@given(prompts())
def test_window_tokens_are_counted_one_by_one(prompt: dict[str, int | float]) -> None:
    tokens, shared, size = prompt["num_tokens"], prompt["shared_blocks"], prompt["block_size"]
    packed_region = range(shared * size, tokens // size * size)
    counted = sum(t >= tokens - prompt["window"] for t in packed_region)
    assert forced_tokens(tokens, shared, prompt["window"], size) == counted


def test_a_message_without_contents_is_false() -> None:
    assert not StepMessage()
    assert StepMessage(observe={"a": 1})
