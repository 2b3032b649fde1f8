"""What a second look keeps is what the plain formulas choose from a plain model that repeats the prompt.

The reference model runs prompt, instruction and repetition as one text in float32; scores are float64 loops.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.e2e.engines import (
    assert_all_returned,
    audit_of,
    engine,
    generate,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.e2e.test_kept_sets import KEEP, PROMPTS, Scores, best_tokens, greedy_pages
from tests.policy import naive
from tests.reference_model import Layer, ReferenceLlama
from vllm_defensive import packing
from vllm_defensive.plan import StepMessage
from vllm_defensive.policy import PRESETS

pytestmark = pytest.mark.e2e

PART, OVERLAP, W, SINK = 150, 8, 32, 4


def repeat(prompt: list[int], instruction: list[int], tokens: int) -> list[tuple[tuple[int, int], list[int]]]:
    """(positions, the whole text) of every part, of so many tokens, of a prompt's repetition."""
    texts = []
    for first in range(0, len(prompt), tokens):
        part = (first, min(first + tokens, len(prompt)))
        again = prompt[first - OVERLAP : first] if first else []
        texts.append((part, prompt + instruction + again + prompt[slice(*part)]))
    return texts


def peaks(layer: Layer, tokens: int, part: tuple[int, int], chunk: bool) -> np.ndarray:
    """float64 [H, T]: the largest attention that a query behind the first `tokens` pays each of them."""
    query, key = layer.query_TQD.double().numpy(), layer.key_HTD.double().numpy()
    heads, length, size = key.shape
    group = query.shape[1] // heads
    found = np.zeros((heads, tokens))
    for head in range(heads):
        for at in range(tokens, length):
            seen = [*range(min(SINK, part[0])), *range(*part), *range(tokens, at + 1)] if chunk else [*range(at + 1)]
            for q in query[at, head * group : (head + 1) * group]:
                weight = np.exp((key[head, seen] @ q) * size**-0.5)
                weight /= weight.sum()
                for position, share in zip(seen, weight, strict=True):
                    if position < tokens and (not chunk or part[0] <= position < part[1]):
                        found[head, position] = max(found[head, position], share)
    return found


def naive_scores(
    policy: str, reference: ReferenceLlama, prompt: list[int], instruction: list[int], part_tokens: int = PART
) -> Scores:
    tokens, chunk = len(prompt), PRESETS[policy].reconstruction == "chunk"
    found: list[np.ndarray] = [np.zeros((reference.heads, tokens))] * reference.layers
    for part, text in repeat(prompt, instruction, part_tokens):
        layers: list[Layer] = []
        reference.forward(text, attention=layers)
        found = [np.maximum(f, peaks(layer, tokens, part, chunk)) for f, layer in zip(found, layers, strict=True)]
    if chunk:
        return [(scores, None) for scores in found]
    joined: Scores = []
    for i, (peak, layer) in enumerate(zip(found, layers, strict=True)):
        arrays = (
            layer.query_TQD[tokens - W : tokens],
            layer.key_HTD[:, :tokens],
            layer.value_HTD[:, :tokens],
            reference.output_projection(i),
        )
        own = naive.Layer(*(x.double().numpy() for x in arrays))
        window, _ = naive.scores(PRESETS["halokv"], own, index=i, scale=reference.head_size**-0.5, keep_ratio=KEEP)
        norm = naive.value_norm(own, tokens - W, 2)
        joined.append((np.maximum(window, peak[:, : tokens - W] * norm / norm.sum(axis=0)), None))
    return joined


def instruction_of(model: Path) -> list[int]:
    from vllm.tokenizers import get_tokenizer

    from vllm_defensive.engine.echo import instruction_ids

    instruction = list(instruction_ids(get_tokenizer(str(model))))
    assert instruction
    return instruction


@pytest.fixture(scope="module")
def expected(tiny_model: Path) -> dict[str, list[Scores]]:
    """By policy, the scores of each prompt."""
    reference, instruction = ReferenceLlama(tiny_model), instruction_of(tiny_model)
    return {p: [naive_scores(p, reference, prompt, instruction) for prompt in PROMPTS] for p in ("kvzip", "echokv")}


def assert_kept(folder: Path, policy: str, prompt: list[int], scores: Scores, request_id: str) -> None:
    audit = audit_of(folder, request_id)
    assert audit.policy == policy and audit.stop == len(prompt)
    full = len(prompt) // 32
    for (layer, head), pages in greedy_pages(PRESETS[policy], scores, len(prompt), audit.packed_blocks).items():
        kept = best_tokens(PRESETS[policy], scores[layer][0][head], None, len(prompt), min(pages, full) * 32)
        assert audit.positions(layer, head).tolist() == sorted(kept), (policy, layer, head)


@pytest.mark.parametrize(
    "chunk, asynchronous", [(48, False), (130, True), (512, False)], ids=["chunks48", "async-chunks130", "chunks512"]
)
def test_kept_sets_are_those_of_a_model_that_repeats_the_prompt(
    tiny_model: Path,
    expected: dict[str, list[Scores]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    chunk: int,
    asynchronous: bool,
) -> None:
    """Of prompts that end there or go on behind a boundary, beside requests that are evicted otherwise or not at all;
    a second time the prefix cache has them."""
    monkeypatch.setattr(packing, "ECHO_TOKENS", PART)
    rest = random_prompts((77,), seed=9)[0]
    rows = [
        *[(policy, i, {}) for policy in expected for i in range(len(PROMPTS))],
        *[(policy, i, {"kv_eviction_boundary": len(PROMPTS[i])}) for policy in expected for i in range(2)],
    ]
    prompts = [PROMPTS[i] + (rest if own else []) for _, i, own in rows] + random_prompts((200, 150), seed=8)
    fields: list[dict[str, Any]] = [{"kv_eviction": policy, "kv_eviction_keep": KEEP, **own} for policy, _, own in rows]
    fields += [{"kv_eviction": "snapkv"}, {"kv_eviction": "none"}]
    settings = {"dtype": "float32", "audit": str(tmp_path), "max_num_batched_tokens": chunk, "shared": "evict"}
    settings["reuse"] = "off"
    with engine(tiny_model, "halokv", asynchronous=asynchronous, **settings) as llm:
        turns = [generate(llm, prompts, 12, extra_args=fields) for _ in range(2)]
        assert_all_returned(llm)
        runtime = worker_of(llm)._runtime
        runtime.begin(StepMessage(), ())
        assert not runtime.reconstructions._seen and not runtime._held and not runtime.windows._buffers
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.echo_tokens > 2 * sum(map(len, PROMPTS))
    assert all(a.cached_tokens > 0 for a in turns[1][: len(rows)])
    for turn in turns:
        for (policy, i, _), answer in zip(rows, turn, strict=False):
            assert_kept(tmp_path, policy, PROMPTS[i], expected[policy][i], answer.request_id)
