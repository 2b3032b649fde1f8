"""What a learned score keeps is what the plain formulas choose from a plain model's keys and values.

Scores are float64 loops over the reference model's tensors in float32; no line of them is the package's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate, random_prompts, worker_of
from tests.e2e.test_kept_sets import KEEP, N, Scores, W, best_tokens, greedy_pages
from tests.learned_scores import peaks, score_of
from tests.policy import naive
from tests.reference_model import Layer, ReferenceLlama
from vllm_defensive.learned import load
from vllm_defensive.policy import PRESETS

pytestmark = pytest.mark.e2e
POLICIES = ("learnedkv", "learned-halokv")
# No token twice: in the first layer a token's key before RoPE and its value are the same wherever it stands, and so is
# its score, to the last bits.
PROMPTS = [torch.randperm(510, generator=torch.Generator().manual_seed(n))[:n].add(2).tolist() for n in (300, 417, 96)]


def naive_scores(policy: str, reference: ReferenceLlama, prompt: list[int], weight_LHX: np.ndarray) -> Scores:
    layers: list[Layer] = []
    reference.forward(prompt, attention=layers)
    scored, found = len(prompt) - W, []
    for i, layer in enumerate(layers):
        arrays = layer.query_TQD[-W:], layer.key_HTD, layer.value_HTD, reference.output_projection(i)
        own = naive.Layer(*(x.double().numpy() for x in arrays))
        foretold = peaks(own.key, own.value, weight_LHX[i], reference._theta)[:, :scored]
        norm = naive.value_norm(own, scored, 2)
        scores = foretold * norm / norm.sum(axis=0)
        if policy == "learned-halokv":
            scale = reference.head_size**-0.5
            window, _ = naive.scores(PRESETS["halokv"], own, index=i, scale=scale, keep_ratio=KEEP)
            scores = np.maximum(window, scores)
        found.append((scores, None))
    return found


def most_cached(policy: str, tokens: int) -> int:
    """Of a prompt that the prefix cache has, how many of its tokens may come from there."""
    return (tokens - (W if PRESETS[policy].needs_queries else 1)) // N * N


def assert_kept(
    folder: Path, reference: ReferenceLlama, score: Path, answers: list[tuple[str, list[int], Answer]]
) -> None:
    """answers: with the policy and the prompt of each, up to where it was evicted."""
    weight_LHX, known = load(score).weight_LHX.double().numpy(), {}
    for policy, prompt, answer in answers:
        audit, name = audit_of(folder, answer.request_id), (policy, len(prompt))
        assert audit.policy == policy and audit.stop == len(prompt)
        if name not in known:
            known[name] = naive_scores(policy, reference, prompt, weight_LHX)
        chosen = greedy_pages(PRESETS[policy], known[name], len(prompt), audit.packed_blocks)
        for (layer, head), pages in chosen.items():
            kept = best_tokens(PRESETS[policy], known[name][layer][0][head], None, len(prompt), pages * N)
            assert audit.positions(layer, head).tolist() == sorted(kept), (policy, layer, head)


@pytest.mark.parametrize(
    "chunk, asynchronous", [(48, False), (130, True), (512, False)], ids=["chunks48", "async-chunks130", "chunks512"]
)
def test_kept_sets_are_those_of_the_formulas(tiny_model: Path, tmp_path: Path, chunk: int, asynchronous: bool) -> None:
    """Of prompts that end there or go on behind a boundary, beside others; a second time the prefix cache has them, and
    nothing is computed again for a policy that reads no queries."""
    reference, path = ReferenceLlama(tiny_model), tmp_path / "score.safetensors"
    score_of(reference, tiny_model, path)
    rest = random_prompts((77,), seed=9)[0]
    rows: list[tuple[str, int, dict[str, Any]]] = [
        *[(policy, i, {}) for policy in POLICIES for i in range(len(PROMPTS))],
        *[(policy, i, {"kv_eviction_boundary": len(PROMPTS[i])}) for policy in POLICIES for i in range(2)],
    ]
    prompts = [PROMPTS[i] + (rest if own else []) for _, i, own in rows] + random_prompts((200, 150), seed=8)
    fields = [{"kv_eviction": policy, "kv_eviction_keep": KEEP, **own} for policy, _, own in rows]
    fields += [{"kv_eviction": "snapkv"}, {"kv_eviction": "none"}]
    settings = {"dtype": "float32", "max_num_batched_tokens": chunk, "shared": "evict", "learned": str(path)}
    settings["reuse"] = "off"
    with engine(tiny_model, "halokv", asynchronous=asynchronous, audit=str(tmp_path), **settings) as llm:
        turns = [generate(llm, prompts, 12, extra_args=fields) for _ in range(2)]
        assert_all_returned(llm)
        assert not worker_of(llm)._runtime.windows._buffers
    for (policy, i, _), answer in zip(rows, turns[1], strict=False):
        assert answer.cached_tokens == most_cached(policy, len(PROMPTS[i]))
    each = [(p, PROMPTS[i], answer) for turn in turns for (p, i, _), answer in zip(rows, turn, strict=False)]
    assert_kept(tmp_path, reference, path, each)
