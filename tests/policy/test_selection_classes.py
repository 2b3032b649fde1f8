"""Pages of several classes: budgets to the page, the best tokens in the widest, against loops in plain Python."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.policy.test_selection import layers_of
from vllm_defensive.packing import LADDER, WIDTHS, Format, Part
from vllm_defensive.policy import PRESETS, LayerScores, Policy, Selection, select, select_packed
from vllm_defensive.policy.budget import guarded
from vllm_defensive.policy.ladder import DISTORTION
from vllm_defensive_kernels.widths import PageShape

POLICIES = [policy for policy in PRESETS.values() if policy.name != "keep-all"]
SIMPLE = [p for p in POLICIES if p.layer_budget == "even" and p.head_budget == "scope" and p.stages != "half-budget"]
FAST = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@st.composite
def problems(draw: st.DrawFn, policies: list[Policy]) -> tuple:
    """(policy, scores, format, arguments of `select_packed`); scores come from few values, so ties abound."""
    policy = draw(st.sampled_from(policies))
    layers, heads, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(4, 40))
    sizes = sorted(draw(st.lists(st.integers(2, 9), min_size=1, max_size=3, unique=True)))
    shares = [draw(st.sampled_from([0.0, 0.25, 0.5])) for _ in sizes[:-1]]
    format = Format("any", tuple(Part("8", n, s) for n, s in zip(sizes, [*shares, 1.0], strict=True)), 2)
    forced = draw(st.integers(0, tokens))
    least, most = max(1, math.ceil(forced / sizes[0])), format.pages_for(tokens, forced)
    pages, start = draw(st.integers(min(least, most), most)), draw(st.integers(0, 50))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    both = torch.from_numpy(rng.integers(0, draw(st.sampled_from([1, 3, 1000])), (2, layers, heads, tokens)))
    both = both.float()
    both[..., tokens - forced :] = float("inf")
    scores = layers_of(both[0], both[1] if policy.stages == "half-budget" else None)
    arguments = {"head_pages": pages, "forced_tokens": forced, "evictable": (start, start + tokens)}
    return policy, scores, format, arguments


def kept_lists(selection: Selection) -> list[list[int]]:
    pages = selection.tokens_PN.split(selection.pages_LH.flatten().tolist())
    return [[t for t in some.flatten().tolist() if t >= 0] for some in pages]


@FAST
@given(problems(POLICIES))
def test_budgets_are_spent_to_the_page(problem: tuple) -> None:
    policy, scores, format, arguments = problem
    parts = select_packed(policy, scores, format, **arguments)
    layers, heads, tokens = len(scores), *scores[0].scores_HE.shape
    start, forced = arguments["evictable"][0], arguments["forced_tokens"]
    sharers = {"head": 1, "layer": heads, "model": layers * heads}[policy.scope]
    units = layers * heads // sharers
    split = format.split(arguments["head_pages"] * sharers, sharers, forced)
    taken = [0] * (layers * heads)
    everything: list[list[int]] = [[] for _ in taken]
    assert sum(int(selection.pages_LH.sum()) for selection in parts) == arguments["head_pages"] * layers * heads
    for part, selection, budget in zip(format.parts, parts, split, strict=True):
        if policy.layer_budget == "even":
            assert int(selection.pages_LH.sum()) == budget * units
        assert selection.tokens_PN.shape == (int(selection.pages_LH.sum()), part.tokens)
        for row, (pages, kept) in enumerate(
            zip(selection.pages_LH.flatten().tolist(), kept_lists(selection), strict=True)
        ):
            assert kept == sorted(set(kept)) and all(start <= t < start + tokens for t in kept)
            assert len(kept) == min(pages * part.tokens, tokens - taken[row]), "pages are full while there are tokens"
            taken[row] += len(kept)
            everything[row] += kept
    for kept in everything:
        assert len(set(kept)) == len(kept), "no token is kept twice"
        assert set(range(start + tokens - forced, start + tokens)) <= set(kept), "what is forced stays"


def naive(policy: Policy, scores_RE: list[list[float]], format: Format, heads: int, arguments: dict) -> list[list[set]]:
    """Of each part, what each row keeps: page by page, whichever gains most; the first row wins ties."""
    rows, tokens = len(scores_RE), len(scores_RE[0])
    sharers = {"head": 1, "layer": heads, "model": rows}[policy.scope]
    order = [sorted(range(tokens), key=lambda t, r=row: (-r[t], t)) for row in scores_RE]
    forced, head_pages = arguments["forced_tokens"], arguments["head_pages"]
    budgets = format.split(head_pages * sharers, sharers, forced)
    guards = [guarded(policy.guard, pages) for pages in format.split(head_pages, 1, forced)]
    taken, answer = [0] * rows, []
    for part, budget, guard in zip(format.parts, budgets, guards, strict=True):
        bids: list[list[float]] = []
        for row in range(rows):
            ranked = [scores_RE[row][t] for t in order[row]][taken[row] :]
            pages = [ranked[i * part.tokens : (i + 1) * part.tokens] for i in range(math.ceil(tokens / part.tokens))]
            gains = [sum(page) if page else -math.inf for page in pages]
            bids.append([math.inf if j < guard else gain for j, gain in enumerate(gains)])
        counts = [0] * rows
        for first in range(0, rows, sharers):
            unit = [(-bid, row, j) for row in range(first, first + sharers) for j, bid in enumerate(bids[row])]
            for _, row, _ in sorted(unit)[:budget]:
                counts[row] += 1
        kept = []
        for row in range(rows):
            upto = min(taken[row] + counts[row] * part.tokens, tokens)
            kept.append({order[row][i] + arguments["evictable"][0] for i in range(taken[row], upto)})
            taken[row] = upto
        answer.append(kept)
    return answer


@FAST
@given(problems(SIMPLE))
def test_each_part_takes_what_gains_most(problem: tuple) -> None:
    policy, scores, format, arguments = problem
    parts = select_packed(policy, scores, format, **arguments)
    rows = [row for layer in scores for row in layer.scores_HE.tolist()]
    expected = naive(policy, rows, format, scores[0].scores_HE.shape[0], arguments)
    assert [[set(kept) for kept in kept_lists(selection)] for selection in parts] == expected


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("head_pages", [1, 2, 3, 5])
def test_every_policy_fills_every_page(policy: Policy, head_pages: int) -> None:
    """Three heads, among which a quarter of a layer's pages does not divide: pages that nobody has would lie unread."""
    both = torch.rand(2, 4, 3, 60, generator=torch.Generator().manual_seed(0))
    both[..., 58:] = float("inf")
    scores = layers_of(both[0], both[1] if policy.stages == "half-budget" else None)
    format = Format("any", (Part("8", 5, 0.25), Part("4", 9, 1.0)), 3)
    parts = select_packed(policy, scores, format, head_pages=head_pages, forced_tokens=2, evictable=(0, 60))
    assert sum(len(part.tokens_PN) for part in parts) == head_pages * 4 * 3
    assert sum(int(part.pages_LH.sum()) for part in parts) == head_pages * 4 * 3


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
def test_one_part_of_whole_pages_is_select(policy: Policy) -> None:
    """So 16 bits are kept as ever."""
    both = torch.rand(2, 3, 2, 64, generator=torch.Generator().manual_seed(0))
    both[..., 60:] = float("inf")
    scores = layers_of(both[0], both[1] if policy.stages == "half-budget" else None)
    whole = select(policy, scores, page_size=8, packed_blocks=3, evictable=(16, 80))
    (part,) = select_packed(policy, scores, Format.plain(8), head_pages=3, forced_tokens=4, evictable=(16, 80))
    assert torch.equal(whole.pages_LH, part.pages_LH) and torch.equal(whole.tokens_PN, part.tokens_PN)


def test_half_budgets_count_the_tokens_of_all_parts() -> None:
    """CriticalKV: half of what a head keeps by score, the rest by rank; the first half is in the wider pages."""
    scores = torch.tensor([[[9.0, 8, 7, 6, 5, 4, 3, 2, 1, 0]]])
    format = Format("any", (Part("8", 2, 0.5), Part("4", 4, 1.0)), 2)
    parts = select_packed(
        PRESETS["criticalkv"],
        layers_of(scores, scores.flip(-1)),
        format,
        head_pages=2,
        forced_tokens=0,
        evictable=(0, 10),
    )
    assert [kept_lists(part) for part in parts] == [[[0, 1]], [[2, 7, 8, 9]]]


def test_of_half_budgets_too_the_window_is_in_the_widest_pages() -> None:
    scores = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(0))
    scores[..., 36:] = float("inf")
    ranks = torch.rand(1, 2, 40, generator=torch.Generator().manual_seed(1))
    ranks[..., 36:] = float("inf")
    format = Format("any", (Part("8", 5, 0.25), Part("4", 9, 1.0)), 3)
    parts = select_packed(
        PRESETS["criticalkv"], layers_of(scores, ranks), format, head_pages=4, forced_tokens=4, evictable=(0, 40)
    )
    assert all({36, 37, 38, 39} <= set(kept) for kept in kept_lists(parts[0]))


SHAPES = [PageShape(*each) for each in product((16, 32), (64, 80, 128, 256), (2, 4))]


@pytest.mark.parametrize("widths", WIDTHS)
@given(st.sampled_from(SHAPES), st.integers(1, 4000), st.integers(1, 300), st.integers(0, 40))
def test_formats_split_and_hold(widths: str, shape: PageShape, tokens: int, heads: int, forced: int) -> None:
    format = Format.of(widths, shape)
    forced = min(forced, tokens)
    pages = format.pages_for(tokens, forced)
    assert format.tokens(pages, forced) >= tokens and (pages == 1 or format.tokens(pages - 1, forced) < tokens)
    for total in (pages * heads, max(1, pages // 3) * heads):
        split = format.split(total, heads, forced)
        assert sum(split) == total and min(split) >= 0
        if total >= heads * math.ceil(forced / format.parts[0].tokens):
            assert split[0] * format.parts[0].tokens >= heads * forced


LADDER_FORMAT = Format.of(LADDER, PageShape(4, 16, 8))


@FAST
@given(st.integers(1, 4), st.integers(20, 60), st.integers(0, 2**32 - 1))
def test_the_ladder_distorts_least(head_pages: int, tokens: int, seed: int) -> None:
    """No way to hand a head's tokens whole pages of 16, 8 or 4 bits, in any order, leaves less undone."""
    format = LADDER_FORMAT
    scores_HE = torch.from_numpy(np.random.default_rng(seed).pareto(1, (3, tokens))).float()
    parts = select_packed(
        PRESETS["rdkv"],
        [LayerScores(scores_HE)],
        format,
        head_pages=head_pages,
        forced_tokens=0,
        evictable=(0, tokens),
    )
    kept = [kept_lists(part) for part in parts]
    for row, scores in enumerate(scores_HE.double().tolist()):
        held = [[scores[t] for t in part[row]] for part in kept]
        undone = sum(scores) - sum(
            (1 - DISTORTION[part.page_class]) * sum(some) for part, some in zip(format.parts, held, strict=True)
        )
        ranked, least = sorted(scores, reverse=True), math.inf
        for split in product(range(head_pages + 1), repeat=3):
            if sum(split) == head_pages:
                upto, gain = 0, 0.0
                for part, pages in zip(format.parts, split, strict=True):
                    some = ranked[upto : upto + pages * part.tokens]
                    gain, upto = gain + (1 - DISTORTION[part.page_class]) * sum(some), upto + len(some)
                least = min(least, sum(scores) - gain)
        assert undone == pytest.approx(least, abs=1e-9)
        pages = [int(part.pages_LH[0, row]) for part in parts]
        assert sum(pages) == head_pages
        assert not held[0] or not held[1] or min(held[0]) >= max(held[1]), "the best are the widest"
        assert not held[1] or not held[2] or min(held[1]) >= max(held[2])
