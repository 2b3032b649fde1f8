"""The engine keeps what the plain formulas choose from a plain model's own queries, keys and values.

Scores come from float64 loops (`tests/policy/naive.py`), pages from the greedy loop below, the tensors from the
reference model in float32; no line of it is the package's. An engine in bf16 is compared on the queries, keys and
values of its own cache: those of another model are off by 2^-9, which decides between many tokens whose scores are as
close. Policies whose layers or heads have budgets of their own are compared with formulas in `tests/policy/` only.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, random_prompts, worker_of
from tests.policy import naive
from tests.reference_model import Layer, ReferenceLlama
from vllm_defensive.audit import Audit
from vllm_defensive.plan import Score, StepMessage
from vllm_defensive.policy import PRESETS, Policy, public_names
from vllm_defensive.worker.cpu import evictor as cpu_evictor
from vllm_defensive.worker.cpu.evictor import Scored

pytestmark = pytest.mark.e2e

# Those with a second look are in `test_echo.py`, learned ones in `test_learned.py`.
POLICIES = tuple(
    name
    for name in public_names()
    if PRESETS[name].layer_budget == "even"
    and PRESETS[name].head_budget == "scope"
    and PRESETS[name].widths == "16"  # pages of other sizes: policy/test_selection_classes.py
    and not (PRESETS[name].reconstructs or PRESETS[name].learned)
)
# Some kinds in bf16: of all queries, with a second stage, of keys alone.
IN_BF16 = ("h2o", "layer-defensivekv", "keydiff")
# Whose float64 loops take longest.
LONG = ("laprox", "dropkv", "obcache", "deletion", "capkv-window", "expected-window")
CASES = [
    *[
        pytest.param("float32", policy, marks=[pytest.mark.slow, pytest.mark.nightly] if policy in LONG else [])
        for policy in POLICIES
    ],
    *[
        pytest.param(
            "bfloat16", policy, marks=[pytest.mark.slow, *([] if policy in IN_BF16 else [pytest.mark.nightly])]
        )
        for policy in POLICIES
    ],
]
PROMPTS = random_prompts((300, 417, 96), seed=5)
KEEP, W, N = 0.35, 32, 32

Scores = list[tuple[np.ndarray, np.ndarray | None]]  # per layer: of the tokens before the window, and their ranks


def complete(values: np.ndarray, tokens: int) -> list[float]:
    """Of the tokens in full pages, the scores of those before the window; the others must stay."""
    full = tokens // N * N
    return [*values.tolist(), *[math.inf] * W][:full]


def greedy_pages(policy: Policy, scores: Scores, tokens: int, blocks: int) -> dict[tuple[int, int], int]:
    """Pages of each head: one by one the best that is left, from a budget of `blocks` pages a head."""
    heads = scores[0][0].shape[0]
    everyone = [(i, h) for i in range(len(scores)) for h in range(heads)]
    units = {
        "head": [[at] for at in everyone],
        "layer": [[at for at in everyone if at[0] == i] for i in range(len(scores))],
        "model": [everyone],
    }[policy.scope]
    guard = int(policy.guard * blocks)
    pages = dict.fromkeys(everyone, guard)
    for unit in units:
        gains = {(i, h): [sum(run) for run in runs(sorted(complete(scores[i][0][h], tokens))[::-1])] for i, h in unit}
        for _ in range((blocks - guard) * len(unit)):
            best = max((at for at in unit if pages[at] < tokens // N), key=lambda at: gains[at][pages[at]])
            pages[best] += 1
    return pages


def best_tokens(policy: Policy, score: np.ndarray, rank: np.ndarray | None, tokens: int, count: int) -> set[int]:
    """What one head keeps if `count` of its tokens in full pages may stay; the tail block stays anyway."""
    by_score = ranked(complete(score, tokens))
    kept = set(by_score[:count])
    if policy.stages == "half-budget" and rank is not None:
        certain = set(by_score[: count // 2])
        rest = [t for t in ranked(complete(rank, tokens)) if t not in certain]
        kept = {*certain, *rest[: count - len(certain)]}
    return kept | set(range(tokens // N * N, tokens))


def ranked(values: list[float]) -> list[int]:
    return sorted(range(len(values)), key=lambda t: (-values[t], t))


def runs(values: list[float]) -> list[list[float]]:
    return [values[i : i + N] for i in range(0, len(values), N)]


@pytest.fixture(scope="module")
def attention(tiny_model: Path) -> tuple[ReferenceLlama, list[list[Layer]]]:
    """The reference model, and what its attention layers computed with for each prompt."""
    reference = ReferenceLlama(tiny_model)
    recorded: list[list[Layer]] = []
    for prompt in PROMPTS:
        layers: list[Layer] = []
        reference.forward(prompt, attention=layers)
        recorded.append(layers)
    return reference, recorded


def naive_scores(policy: Policy, reference: ReferenceLlama, layers: list[Layer], dtype: str = "float32") -> Scores:
    """dtype: of the engine, which rounds the output projection to it."""
    scores = []
    for i, layer in enumerate(layers):
        output = reference.output_projection(i).to(getattr(torch, dtype))
        arrays = (layer.query_TQD[-W:], layer.key_HTD, layer.value_HTD, output)
        inputs = naive.Layer(*(x.double().numpy() for x in arrays), layer.query_TQD[:-W].double().numpy())
        scores.append(naive.scores(policy, inputs, index=i, scale=reference.head_size**-0.5, keep_ratio=KEEP))
    return scores


@dataclass
class Found:
    """What an engine kept, by policy, and the tensors that it chose by (of the window's queries alone)."""

    dtype: str
    audits: dict[str, list[Audit]]
    tensors: dict[str, list[list[Layer]]]


def watch_evictions(evictor: Any) -> dict[str, list[Layer]]:
    """By request, the window's queries, the keys and the values of each layer at the moment of its eviction."""
    seen: dict[str, list[Layer]] = {}
    carry_out = evictor._score

    def score_and_note(score: Score) -> Any:
        if not PRESETS[score.policy].accumulates:
            window_AWQD = evictor._runtime.windows._buffers[score.request_id].clone()
            pages_LHB = evictor._view.of_blocks(torch.tensor(score.source_blocks))
            whole = Scored(score, PRESETS[score.policy], window_AWQD, pages_LHB, first_value=0)
            room = evictor._room(pages_LHB)[0]
            seen[score.request_id.rpartition("-")[0]] = [
                Layer(query_WQD, *(x[:, : score.region.stop].clone() for x in evictor._read(whole, layer, room)))
                for layer, query_WQD in enumerate(window_AWQD)
            ]
        return carry_out(score)

    evictor._score = score_and_note
    return seen


@pytest.fixture(scope="module")
def found(
    request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Found]:
    folder = tmp_path_factory.mktemp("audit")
    result = Found(request.param, {}, {})
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "float32":
            patch.setattr(cpu_evictor, "READ_ONCE_BYTES", 2**18)  # as if the prompts were long: one layer at a time
        yield record(result, folder, tiny_model)


def record(result: Found, folder: Path, tiny_model: Path) -> Found:
    with engine(tiny_model, "snapkv", dtype=result.dtype, audit=str(folder), enable_prefix_caching=False) as llm:
        seen = watch_evictions(worker_of(llm)._evictor)
        for policy in POLICIES:
            fields = {"kv_eviction": policy, "kv_eviction_keep": KEEP}
            answers = generate(llm, PROMPTS, 2, extra_args=[fields] * len(PROMPTS))
            result.audits[policy] = [audit_of(folder, answer.request_id) for answer in answers]
            result.tensors[policy] = [seen.get(answer.request_id, []) for answer in answers]
        assert 0 < worker_of(llm)._evictor._scratch.nbytes <= cpu_evictor.READ_ONCE_BYTES, "the kept room was not used"
    return result


@pytest.mark.parametrize("found, policy", CASES, indirect=["found"])
def test_kept_sets_are_those_of_the_formulas(
    found: Found, attention: tuple[ReferenceLlama, list[list[Layer]]], policy: str
) -> None:
    reference, recorded = attention
    own = found.dtype == "bfloat16" and not PRESETS[policy].accumulates
    same = total = moved = 0
    for prompt, layers, audit in zip(
        PROMPTS, found.tensors[policy] if own else recorded, found.audits[policy], strict=True
    ):
        scores = naive_scores(PRESETS[policy], reference, layers, found.dtype)
        pages = greedy_pages(PRESETS[policy], scores, len(prompt), audit.packed_blocks)
        for (layer, head), count in pages.items():
            ours = audit.positions(layer, head).tolist()
            assert ours == sorted(set(ours))
            packed = len(ours) - len(prompt) % N
            moved += abs(packed // N - count)
            expected = best_tokens(PRESETS[policy], *(of_head(x, head) for x in scores[layer]), len(prompt), packed)
            same += len(expected & set(ours))
            total += len(expected)
    print(
        f"{found.dtype} {policy}: {same / total:.3%} of {total} kept tokens are the same, "
        f"{moved // 2} pages went elsewhere"
    )
    if found.dtype == "float32":
        assert same == total and moved == 0
    elif own:
        # Value norms are rounded to bf16 on their way, by up to 2^-8: a few tokens, and a page, are as close as that.
        assert same >= 0.995 * total
        assert moved // 2 <= 1
    else:
        assert same > 0.99 * total  # another model's tensors
        assert moved // 2 <= len(PROMPTS)


def test_values_that_stay_in_place_are_not_needed(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pages_read: list[int] = []
    with engine(tiny_model, "snapkv", dtype="float32", audit=str(tmp_path), enable_prefix_caching=False) as llm:
        codec = worker_of(llm)._evictor._codec
        read = codec.read_values
        codec.read_values = lambda data, pages_P, out: (pages_read.append(len(pages_P)), read(data, pages_P, out))[1]
        assert_the_same_without_values_in_place(llm, tmp_path, monkeypatch)
    half = len(pages_read) // 2
    assert sum(pages_read[:half]) < sum(pages_read[half:]), "they were read all the same"


def assert_the_same_without_values_in_place(
    llm: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: int = 300, protected: int = 100
) -> None:
    """Behind a protected beginning the same is chosen, whether the values in it are read or not."""
    policies = ("snapkv", "criticalkv", "defensivekv", "halokv")
    fields = [{"kv_eviction": p, "kv_eviction_keep": KEEP, "kv_eviction_protect": protected} for p in policies]
    prompts = random_prompts([tokens] * len(policies), seed=6)
    turns = []
    assert [PRESETS[p].first_value(3) for p in policies] == [3, 3, 0, 3]
    for _ in range(2):
        answers = generate(llm, prompts, 2, extra_args=fields)
        turns.append([audit_of(folder, answer.request_id).mask() for answer in answers])
        monkeypatch.setattr(Policy, "first_value", lambda *_: 0)
    for some_LHT, whole_LHT in zip(*turns, strict=True):
        assert torch.equal(some_LHT, whole_LHT)
        assert some_LHT[..., :protected].all() and not some_LHT.all()


@pytest.mark.parametrize("chunk", [48, 130, 512])
def test_attention_of_all_queries_is_summed_over_any_chunks(
    tiny_model: Path, attention: tuple[ReferenceLlama, list[list[Layer]]], tmp_path: Path, chunk: int
) -> None:
    """Asked of a server of another policy, beside requests that are evicted otherwise or not at all; a second time the
    prefix cache has the prompts, but not their queries."""
    reference, recorded = attention
    fields = [{"kv_eviction": p, "kv_eviction_keep": KEEP} for p in ("h2o", "h2o", "h2o", "snapkv", "none")]
    prompts = PROMPTS + random_prompts((200, 150), seed=8)
    settings = {"dtype": "float32", "audit": str(tmp_path), "max_num_batched_tokens": chunk}
    with engine(tiny_model, "layer-defensivekv", **settings) as llm:
        turns = [generate(llm, prompts, 2, extra_args=fields) for _ in range(2)]
        assert_all_returned(llm)
        runtime = worker_of(llm)._runtime
        runtime.begin(StepMessage(), ())
        assert not runtime.accumulations._masses and not runtime.accumulations._seen
    assert [a.cached_tokens for a in turns[1][:3]] == [0, 0, 0]
    assert turns[1][3].cached_tokens > 0 and turns[1][4].cached_tokens > 0
    for turn in turns:
        for prompt, layers, answer in zip(PROMPTS, recorded, turn, strict=False):
            audit = audit_of(tmp_path, answer.request_id)
            assert audit.policy == "h2o"
            for layer, (scores, _) in enumerate(naive_scores(PRESETS["h2o"], reference, layers)):
                for head, score in enumerate(scores):
                    expected = best_tokens(PRESETS["h2o"], score, None, len(prompt), audit.packed_blocks * N)
                    assert audit.positions(layer, head).tolist() == sorted(expected), (layer, head)


def of_head(values: np.ndarray | None, head: int) -> np.ndarray | None:
    return None if values is None else values[head]
