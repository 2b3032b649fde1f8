"""Packings that outlive their request: who begins with one answers as if it had packed for itself, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate, metrics_of, random_prompts
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama

pytestmark = pytest.mark.e2e

DOCUMENT = 601
# Log-probabilities in float32 of other batches, or of another cut into chunks: a few roundings of logits up to 16.
BATCHED = 1e-4
HELD = "vllm:kv_eviction_published_packings"
CASES = [
    ("snapkv", "16"),
    ("layer-defensivekv", "16"),
    ("halokv", "k8v4"),
    ("halokv", "8,4"),
    ("echokv", "16"),
    ("kvzip", "4"),
    ("h2o", "16"),
    ("learned-halokv", "8"),
]


def requests(case: tuple[str, str], count: int, **fields: Any) -> tuple[list[list[int]], list[dict[str, Any]]]:
    """Questions about one document, and what they ask for."""
    policy, widths = case
    (document,) = random_prompts([DOCUMENT], seed=3)
    own = {"kv_eviction": policy, "kv_eviction_widths": widths, "kv_eviction_boundary": DOCUMENT, **fields}
    return [document + question for question in random_prompts([40, 25, 33][:count], seed=4)], [own] * count


def assert_same(some: list[Answer], others: list[Answer]) -> None:
    for one, other in zip(some, others, strict=True):
        assert one.tokens == other.tokens
        assert torch.equal(one.logprobs, other.logprobs)


def run(llm: Any, case: tuple[str, str], **fields: Any) -> tuple[list[Answer], list[Answer]]:
    """Answers to the second and third question: by a packing of the first one's, and each by its own."""
    prompts, own = requests(case, 3, **fields)
    assert llm.reset_prefix_cache()
    first = generate(llm, prompts[:1], 24, own[:1])
    adopted = [generate(llm, [prompt], 24, own[:1])[0] for prompt in prompts[1:]]
    assert first[0].cached_tokens == 0
    alone = []
    for prompt in prompts[1:]:
        assert llm.reset_prefix_cache()
        alone += generate(llm, [prompt], 24, own[:1])
    return adopted, alone


@pytest.mark.parametrize(
    "settings",
    [
        {},
        pytest.param({"block_size": 64, "max_num_batched_tokens": 200, "asynchronous": True}, marks=pytest.mark.slow),
        pytest.param({"block_size": 128}, marks=pytest.mark.nightly),
    ],
    ids=["32", "64-chunks-async", "128"],
)
def test_an_adopter_answers_as_if_it_had_packed(tiny_model: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    score = tmp_path / "score.safetensors"
    score_of(ReferenceLlama(tiny_model), tiny_model, score)
    block = settings.get("block_size", 32)
    fields = {"dtype": "float32", "keep": 0.3, "per_request": True, "learned": str(score), "audit": str(tmp_path)}
    with engine(tiny_model, "none", **fields, **settings) as llm:
        for case in CASES:
            before = metrics_of(llm)
            adopted, alone = run(llm, case)
            assert_same(adopted, alone)
            stop = DOCUMENT // block * block
            assert [answer.cached_tokens for answer in adopted] == [stop, stop]
            for one, other in zip(adopted, alone, strict=True):
                kept, own = audit_of(tmp_path, one.request_id), audit_of(tmp_path, other.request_id)
                assert kept.stop == own.stop == stop and kept.policy == case[0]
                assert torch.equal(kept.mask(), own.mask())
            after = metrics_of(llm)
            for name, count in (("adoptions", 2), ("published", 3), ("requests", 3), ("adopted_tokens", 2 * stop)):
                metric = f"vllm:kv_eviction_{name}"
                assert after[metric] - before[metric] == count, name
            assert after[HELD] == 1
        assert_all_returned(llm)


def test_several_at_once_wait_for_one(tiny_model: Path) -> None:
    with engine(tiny_model, "halokv", dtype="float32", keep=0.3) as llm:
        adopted, alone = run(llm, ("halokv", "16"))
        prompts, own = requests(("halokv", "16"), 3)
        assert llm.reset_prefix_cache()
        together = generate(llm, prompts, 24, own)
        assert sorted(answer.cached_tokens for answer in together) == [0, 576, 576]
        worst = max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(together[1:], alone, strict=True))
        assert [a.tokens for a in together[1:]] == [a.tokens for a in alone] and worst < BATCHED
        assert_same(adopted, alone)


def test_other_weights_are_not_asked_of_an_old_packing(tiny_model: Path) -> None:
    """Not even in the step after, whose answer is the first that the workers could say it with."""
    with engine(tiny_model, "snapkv", dtype="float32", keep=0.3) as llm:
        prompts, own = requests(("snapkv", "16"), 3)
        generate(llm, prompts[:1], 4, own[:1])
        assert metrics_of(llm)[HELD] == 1
        llm.collective_rpc("reload_weights")
        assert generate(llm, prompts[1:2], 4, own[:1])[0].request_id
        assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 0
        assert metrics_of(llm)[HELD] == 1, "what the new weights have packed"
        assert generate(llm, prompts[2:], 4, own[:1])[0].cached_tokens == 576
        assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 1


@pytest.mark.slow
def test_drafts(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")  # no engine starts where numba has been: it guesses there
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    with engine(tiny_model, "snapkv", dtype="float32", keep=0.3, speculative_config=drafts) as llm:
        adopted, alone = run(llm, ("snapkv", "16"))
        worst = max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(adopted, alone, strict=True))
        assert [a.tokens for a in adopted] == [a.tokens for a in alone] and worst < BATCHED


@pytest.mark.slow
def test_adapters_and_salts_are_apart(tiny_model: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    from tests.e2e.test_lora import write_adapter

    write_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    adapter = LoRARequest("a", 1, str(tmp_path / "adapter"))
    prompts, own = requests(("snapkv", "16"), 3)
    with engine(tiny_model, "snapkv", dtype="float32", keep=0.3, enable_lora=True) as llm:
        generate(llm, prompts[:1], 4, own[:1])
        assert generate(llm, prompts[1:2], 4, own[:1], adapter)[0].cached_tokens == 0
        assert generate(llm, prompts[2:], 4, own[:1], adapter)[0].cached_tokens == 576
        assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 1
        assert metrics_of(llm)[HELD] == 2
        assert_all_returned(llm)


@pytest.mark.slow
@pytest.mark.nightly  # `test_drafts` has the engine in a process of its own, too
def test_in_two_processes(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    with engine(tiny_model, "halokv", dtype="float32", keep=0.3, widths="8") as llm:
        adopted, alone = run(llm, ("halokv", "8"))
        assert_same(adopted, alone)
        assert [answer.cached_tokens for answer in adopted] == [576, 576]


@pytest.mark.slow
def test_layers_with_windows(tiny_gemma3: Path) -> None:
    """Their caches are vLLM's prefix cache's: who begins with a packing begins with these, too, or packs anew."""
    with engine(tiny_gemma3, "snapkv", dtype="float32", keep=0.3) as llm:
        adopted, alone = run(llm, ("snapkv", "16"))
        assert [answer.cached_tokens for answer in adopted] == [576, 576]
        worst = max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(adopted, alone, strict=True))
        assert [a.tokens for a in adopted] == [a.tokens for a in alone] and worst < BATCHED
        assert metrics_of(llm)["vllm:kv_eviction_adoptions"] == 2
        assert_all_returned(llm)


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize("widths", ["16", "k8v4"])
def test_on_two_ranks(tiny_model: Path, widths: str) -> None:
    """Each rank keeps the table of its own heads; pages of fewer bits are packed by each for itself, too."""
    settings = {"dtype": "float32", "keep": 0.3, "widths": widths, "tensor_parallel_size": 2}
    with engine(tiny_model, "halokv", **settings) as llm:
        adopted, alone = run(llm, ("halokv", widths))
        assert_same(adopted, alone)
        assert [answer.cached_tokens for answer in adopted] == [576, 576]
