"""Two ranks on CPUs: each keeps of its own heads what its budget allows, by the scores that one rank would give."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.engines import Answer, engine, generate, largest_difference, metrics_of, pool_of, random_prompts
from tests.reference_model import Layer, ReferenceLlama, decode_logprobs
from vllm_defensive import audit
from vllm_defensive.policy import PRESETS, LayerScores, ReduceHeads, score_layer, select

pytestmark = [pytest.mark.e2e, pytest.mark.slow]

PER_HEAD = ("random", "streamingllm", "h2o", "tova", "snapkv", "pyramidkv", "cake")
SHARED_BUDGET = ("defensivekv", "layer-defensivekv")
PROMPTS = random_prompts((300, 601, 96), seed=4)
KEEP, W, N = 0.3, 32, 32
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16

Run = dict[str, list[tuple[Answer, audit.Audit]]]


def run(model: Path, folder: Path, ranks: int) -> tuple[Run, dict[str, float]]:
    """Of each policy, the answers and what was kept."""
    policies = (*PER_HEAD, *SHARED_BUDGET)
    settings: dict[str, Any] = {"dtype": "float32", "audit": str(folder), "enable_prefix_caching": False}
    with engine(model, "snapkv", tensor_parallel_size=ranks, max_num_batched_tokens=200, **settings) as llm:
        fields = [{"kv_eviction": policy, "kv_eviction_keep": KEEP} for policy in policies for _ in PROMPTS]
        answers = generate(llm, PROMPTS * len(policies), 12, fields)
        found: Run = {policy: [] for policy in policies}
        for own, answer in zip(fields, answers, strict=True):
            files = sorted(folder.glob(f"{answer.request_id}-*"))
            assert len(files) == ranks, "one file a rank"
            found[own["kv_eviction"]].append((answer, audit.load(files[-1])))
        pool = pool_of(llm)
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1
        return found, metrics_of(llm)


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceLlama:
    return ReferenceLlama(tiny_model)


@pytest.fixture(scope="module")
def two(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, float]]:
    return run(tiny_model, tmp_path_factory.mktemp("two"), 2)


@pytest.fixture(scope="module")
def one(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, float]]:
    return run(tiny_model, tmp_path_factory.mktemp("one"), 1)


@pytest.mark.parametrize("policy", PER_HEAD)
def test_policies_with_a_budget_a_head_keep_the_same_tokens_as_one_rank(
    one: tuple[Run, Any], two: tuple[Run, Any], policy: str
) -> None:
    for (_, alone), (_, apart) in zip(one[0][policy], two[0][policy], strict=True):
        assert torch.equal(apart.mask(), alone.mask())
    answers = [[answer for answer, _ in found[0][policy]] for found in (one, two)]
    assert largest_difference(*answers) <= FLOAT_NOISE


@pytest.mark.parametrize("policy", SHARED_BUDGET)
def test_heads_are_weighed_as_on_one_rank_and_compete_within_theirs(
    reference: ReferenceLlama, two: tuple[Run, Any], policy: str
) -> None:
    """What each rank keeps is the selection over its own heads, by scores that know of all heads, of the reference
    model's queries, keys and values.

    At this ratio the heads of the random model get equal budgets: which tokens is seen here, how many is not.
    """
    alone_differs = False
    for prompt, (_, apart) in zip(PROMPTS, two[0][policy], strict=True):
        layers: list[Layer] = []
        reference.forward(prompt, attention=layers)
        for rank in range(2):
            expected = kept_by_rank(policy, reference, layers, rank, apart.packed_blocks, together=True)
            assert torch.equal(apart.mask()[:, rank : rank + 1], expected)
            alone = kept_by_rank(policy, reference, layers, rank, apart.packed_blocks, together=False)
            alone_differs |= not torch.equal(alone, expected)
    assert alone_differs, "had the ranks not talked, nobody would have noticed"


def kept_by_rank(
    policy: str, reference: ReferenceLlama, layers: list[Layer], head: int, blocks: int, together: bool
) -> Tensor:
    """bool `[L, 1, T]`: the selection over one KV head of each layer; together: by sums over both heads."""
    stop = layers[0].key_HTD.shape[1]
    evictable = (0, stop // N * N)

    def score(index: int, head: int, reduce_heads: ReduceHeads) -> LayerScores:
        layer, size = layers[index], reference.query_heads // reference.heads
        group = slice(head * size, (head + 1) * size)
        return score_layer(
            PRESETS[policy],
            layer=index,
            query_WQD=layer.query_TQD[-W:, group],
            window=W,
            key_HSD=layer.key_HTD[head : head + 1],
            value_HSD=layer.value_HTD[head : head + 1],
            output_QDM=reference.output_projection(index)[group],
            factor_QDC=None,
            scale=reference.head_size**-0.5,
            keep_ratio=KEEP,
            evictable=evictable,
            reduce_heads=reduce_heads,
        )

    def sum_of_all(index: int) -> Tensor:
        parts: list[Tensor] = []

        def note(part: Tensor) -> Tensor:
            parts.append(part)
            return part

        for each in range(reference.heads):
            score(index, each, note)
        return torch.stack(parts).sum(dim=0)

    scores = []
    for index in range(len(layers)):
        total = sum_of_all(index)
        scores.append(score(index, head, lambda part, total=total: total if together else part))
    chosen = select(PRESETS[policy], scores, page_size=N, packed_blocks=blocks, evictable=evictable)
    kept = torch.zeros(len(layers), 1, stop, dtype=torch.bool)
    kept[:, :, evictable[1] :] = True
    counts = (chosen.pages_LH.flatten() * N).tolist()
    for index, tokens in enumerate(chosen.tokens_PN.flatten().long().split(counts)):
        kept[index, 0, tokens] = True
    return kept


@pytest.mark.parametrize("policy", [*PER_HEAD, *SHARED_BUDGET])
def test_answers_equal_the_masked_reference(reference: ReferenceLlama, two: tuple[Run, Any], policy: str) -> None:
    for prompt, (answer, apart) in zip(PROMPTS, two[0][policy], strict=True):
        expected = decode_logprobs(reference, prompt, answer.tokens, apart.mask())
        assert float((answer.logprobs - expected).abs().max()) <= FLOAT_NOISE


def test_nothing_is_counted_twice(one: tuple[Run, dict[str, float]], two: tuple[Run, dict[str, float]]) -> None:
    for name in ("requests", "prompt_tokens", "kept_tokens", "freed_blocks"):
        assert one[1][f"vllm:kv_eviction_{name}"] == two[1][f"vllm:kv_eviction_{name}"] > 0
    assert two[1]["vllm:kv_eviction_requests"] == len(PROMPTS) * len(two[0])


def test_pages_of_all_ranks_are_counted(one: tuple[Run, dict[str, float]], two: tuple[Run, dict[str, float]]) -> None:
    """Only the first rank's output reaches the scheduler."""
    files = [apart for found in two[0].values() for _, apart in found]
    packed = sum(apart.packed_blocks * apart.kept_counts.numel() for apart in files)  # K*L*H
    assert one[1]["vllm:kv_eviction_kept_pages"] == two[1]["vllm:kv_eviction_kept_pages"] == packed > 0
