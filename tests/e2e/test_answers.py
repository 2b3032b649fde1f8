"""Requests that are evicted again while they generate: what they answer is what a model answers that cannot see what is
gone, from when it is gone; and keeping everything changes nothing, however often it is packed."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    audits_of,
    engine,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
)
from tests.e2e.test_speculative import DRAFTS
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive.policy import PRESETS, public_names

pytestmark = pytest.mark.e2e

EVICT = {"answers": "evict", "interval": 64}
PROMPTS = random_prompts((100, 300, 33, 517))
TOKENS = 230
# Repetitive, so that drafts are sometimes right.
LOOPS = [(random_prompts((20,), seed=n)[0] * 30)[:length] for n, length in enumerate((250, 90))]
ROUNDING = 1e-4  # a few hundred float32 roundings of logits up to 16
ABLE = [name for name in public_names() if PRESETS[name].evicts_answers_by is not None]


@pytest.fixture(scope="module")
def stock(tiny_model: Path) -> list[Answer]:
    with engine(tiny_model, dtype="float32") as llm:
        return generate(llm, PROMPTS, TOKENS)


@pytest.mark.parametrize(
    "arguments",
    [
        pytest.param({}, id="sync"),
        pytest.param({"asynchronous": True}, id="async"),
        pytest.param({"max_num_batched_tokens": 96, "asynchronous": True}, id="chunks", marks=pytest.mark.slow),
        pytest.param({"block_size": 128, "interval": 200}, id="blocks128", marks=pytest.mark.nightly),
        pytest.param({"interval": 33}, id="uneven", marks=pytest.mark.nightly),
    ],
)
def test_keep_all_equals_stock(tiny_model: Path, stock: list[Answer], arguments: dict[str, Any]) -> None:
    with engine(tiny_model, "keep-all", dtype="float32", **{**EVICT, **arguments}) as llm:
        for turn in range(2):  # the second time prompts come from the prefix cache
            answers = generate(llm, PROMPTS, TOKENS)
            assert largest_difference(answers, stock) <= ROUNDING
            assert (sum(a.cached_tokens for a in answers) > 500) == bool(turn)
        repeats = scheduler_of(llm).eviction_manager.lifecycle.totals.repeats
        assert repeats >= (4 if "block_size" in arguments else 24)
        assert_all_returned(llm)


@pytest.mark.slow
def test_keep_all_equals_stock_with_drafts(tiny_model: Path) -> None:
    with engine(tiny_model, dtype="float32", speculative_config=DRAFTS) as llm:
        expected = generate(llm, LOOPS, TOKENS)
    with engine(tiny_model, "keep-all", dtype="float32", speculative_config=DRAFTS, **EVICT) as llm:
        answers = generate(llm, LOOPS, TOKENS)
        assert largest_difference(answers, expected) <= ROUNDING
        assert metrics_of(llm)["vllm:spec_decode_num_accepted_tokens"] > 0
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.repeats >= 6
        assert_all_returned(llm)


def test_answers_equal_the_masked_reference(tiny_model: Path, tmp_path: Path) -> None:
    """Every policy that can, all in one batch, from one that nothing is evicted of."""
    reference, score, folder = ReferenceLlama(tiny_model), tmp_path / "score.safetensors", tmp_path / "audits"
    score_of(reference, tiny_model, score)
    settings = {"per_request": True, "policies": ABLE, "learned": str(score), "audit": str(folder), "budget": 128}
    policies = ["none", *ABLE]
    prompts = [random_prompts(((100, 300, 70)[i % 3],), seed=i)[0] for i in range(len(policies))]
    with engine(tiny_model, "none", dtype="float32", **settings, **EVICT) as llm:
        own = [{"kv_eviction": policy} for policy in policies]
        answers = generate(llm, prompts, 200, extra_args=own)
        assert_all_returned(llm)
    errors = {}
    for policy, prompt, answer in zip(policies, prompts, answers, strict=True):
        audits = audits_of(folder, answer.request_id) if policy != "none" else []
        assert policy == "none" or len(audits) > 1
        assert all(a.policy == PRESETS[policy].evicts_answers_by for a in audits if a.stop > len(prompt))
        assert all(a.packed_blocks == 4 for a in audits)
        seen = [(a.first_reader, a.mask()) for a in audits]
        expected = decode_logprobs(reference, prompt, answer.tokens, None, again=seen)
        errors[policy] = float((answer.logprobs - expected).abs().max())
        if policy != "none":  # that the last eviction is seen, too
            without = decode_logprobs(reference, prompt, answer.tokens, None, again=seen[:-1])
            assert float((answer.logprobs - without).abs().max()) > 0.1, policy
    print(errors)
    # Both are noise of float32, and maxima of few samples, which vary.
    assert max(errors.values()) <= 5 * errors["none"] <= 5 * ROUNDING


@pytest.mark.parametrize("policy", ["halokv", pytest.param("streamingllm", marks=pytest.mark.nightly)])
def test_behind_a_packing_that_others_hold_answers_equal_the_masked_reference(
    tiny_model: Path, tmp_path: Path, policy: str
) -> None:
    """Of three who ask about one document two begin with what the first has packed, one of them while that one still
    generates; all are evicted again, each by itself."""
    reference, (document,) = ReferenceLlama(tiny_model), random_prompts((320,))
    prompts = [document + random_prompts((20 + 9 * i,), seed=i)[0] for i in range(3)]
    own = [{"kv_eviction_boundary": 320}] * 3
    with engine(tiny_model, policy, dtype="float32", budget=128, audit=str(tmp_path), **EVICT) as llm:
        answers = generate(llm, prompts[:2], 150, extra_args=own[:2]) + generate(
            llm, prompts[2:], 150, extra_args=own[2:]
        )
        metrics = metrics_of(llm)
        assert metrics["vllm:kv_eviction_adoptions"] == 2 and metrics["vllm:kv_eviction_requests"] == 1
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.repeats == 3 * 2
        assert_all_returned(llm)
    for prompt, answer in zip(prompts, answers, strict=True):
        audits = audits_of(tmp_path, answer.request_id)
        assert [a.stop for a in audits] == [320, len(prompt) + 64, len(prompt) + 128]
        seen = [(a.first_reader, a.mask()) for a in audits]
        expected = decode_logprobs(reference, prompt, answer.tokens, None, again=seen)
        assert float((answer.logprobs - expected).abs().max()) <= ROUNDING


@pytest.mark.slow
@pytest.mark.parametrize("widths", ["8", pytest.param("k8v4", marks=pytest.mark.nightly)])
def test_in_fewer_bits_answers_are_near_the_masked_reference(tiny_model: Path, tmp_path: Path, widths: str) -> None:
    """As near as those of requests that are packed once, but for a factor: their keys are quantised six times. And
    nearer than to a model that has not been told of the last eviction. To this one, whose numbers are drawn, bits are
    much."""
    reference, policies = ReferenceLlama(tiny_model), ["streamingllm", "halokv", "snapkv"]
    settings = {"per_request": True, "audit": str(tmp_path), "budget": 64, "widths": widths}
    prompts = [random_prompts((length,), seed=length)[0] for length in (100, 300, 70)]
    with engine(tiny_model, "none", dtype="float32", **settings, **EVICT) as llm:
        own = [{"kv_eviction": policy} for policy in policies]
        answers = generate(llm, prompts, 330, extra_args=own)
        prompt, once = random_prompts((400,))[0], {"kv_eviction_answers": "keep", "kv_eviction_budget": 64}
        (packed_once,) = generate(llm, [prompt], 100, extra_args=[{**own[0], **once}])
        assert_all_returned(llm)
    mask = audits_of(tmp_path, packed_once.request_id)[0].mask()
    bits = packed_once.logprobs - decode_logprobs(reference, prompt, packed_once.tokens, None, again=[(400, mask)])
    for policy, prompt, answer in zip(policies, prompts, answers, strict=True):
        audits = audits_of(tmp_path, answer.request_id)
        assert len(audits) > 3 and all(a.widths == widths and a.packed_blocks == 2 for a in audits if a.stop > 320)
        seen = [(a.first_reader, a.mask()) for a in audits]
        error, without = (
            (answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, None, again=masks)).abs().mean()
            for masks in (seen, seen[:-1])
        )
        assert error < without and error < 2 * bits.abs().mean(), policy


@pytest.mark.slow
@pytest.mark.parametrize(
    "policy, asynchronous", [("halokv", True), pytest.param("streamingllm", False, marks=pytest.mark.nightly)]
)
def test_thrown_out_and_evicted_anew_it_keeps_the_same(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, policy: str, asynchronous: bool
) -> None:
    """All at once, when each was evicted several times: what they had generated follows from what they keep."""
    prompts = random_prompts((90, 200, 60), seed=3)
    found: dict[bool, list[Answer]] = {}
    for throw in (False, True):
        folder = str(tmp_path / str(throw))
        settings = {"budget": 96, "dtype": "float32", "audit": folder, "asynchronous": asynchronous, **EVICT}
        with engine(tiny_model, policy, **settings) as llm:
            if throw:
                scheduler = scheduler_of(llm)
                monkeypatch.setattr(scheduler, "schedule", throwing_out(scheduler, 210))
            found[throw] = generate(llm, prompts, 300)
            assert metrics_of(llm)["vllm:num_preemptions"] == (len(prompts) if throw else 0)
            assert_all_returned(llm)
    assert largest_difference(found[True], found[False]) <= ROUNDING
    for pair in zip(found[True], found[False], strict=True):
        one, other = (audits_of(tmp_path / name, a.request_id) for name, a in zip(("True", "False"), pair, strict=True))
        assert [(a.stop, a.first_reader) for a in one] == [(a.stop, a.first_reader) for a in other]
        assert all(torch.equal(a.kept_indices, b.kept_indices) for a, b in zip(one, other, strict=True))


def throwing_out(scheduler: Any, step: int) -> Any:
    """Its `schedule`, which throws everybody out at one step."""
    schedule, steps = scheduler.schedule, itertools.count()

    def call(*args: Any) -> Any:
        if next(steps) == step:
            scheduler.reset_prefix_cache(reset_running_requests=True)
        return schedule(*args)

    return call


def test_memory_is_bounded(tiny_model: Path) -> None:
    """Three answers of 400 tokens where stock vLLM has room for one and a half."""
    settings = {"budget": 64, "max_model_len": 512, "num_gpu_blocks_override": 24, **EVICT}
    with engine(tiny_model, "streamingllm", **settings) as llm:
        generate(llm, random_prompts((90, 60, 33)), 400)
        found = metrics_of(llm)
        assert found["vllm:num_preemptions"] == 0
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.repeats > 3 * 4
        assert_all_returned(llm)


BOUNDED = {"prompts": "bounded", "prompt_interval": 64, "budget": 96}


@pytest.mark.parametrize("asynchronous", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["sync", "async"])
def test_prompts_of_three_times_the_pool(tiny_model: Path, tmp_path: Path, asynchronous: bool) -> None:
    """Each token sees what had been kept when its part was read."""
    reference, score, folder = ReferenceLlama(tiny_model), tmp_path / "score.safetensors", tmp_path / "audits"
    score_of(reference, tiny_model, score)
    policies = ["streamingllm", "halokv", "learnedkv"]
    settings = {"per_request": True, "policies": policies, "learned": str(score), "audit": str(folder), **BOUNDED}
    prompts = [random_prompts((length,), seed=i)[0] for i, length in enumerate((900, 700, 65))]
    arguments = {"num_gpu_blocks_override": 10, "max_model_len": 1280, "asynchronous": asynchronous}
    with engine(tiny_model, "none", dtype="float32", **arguments, **settings, **EVICT) as llm:
        answers = generate(llm, prompts, 100, extra_args=[{"kv_eviction": policy} for policy in policies])
        assert metrics_of(llm)["vllm:num_preemptions"] == 0
        assert_all_returned(llm)
    for prompt, answer in zip(prompts, answers, strict=True):
        audits = audits_of(folder, answer.request_id)
        assert [a.stop for a in audits][:1] == ([128] if len(prompt) > 65 else [129])
        seen = [(a.first_reader, a.mask()) for a in audits]
        expected = decode_logprobs(reference, prompt, answer.tokens, None, again=seen)
        assert float((answer.logprobs - expected).abs().max()) <= ROUNDING
        at_once = decode_logprobs(reference, prompt, answer.tokens, None, again=seen[-1:])
        assert len(prompt) == 65 or float((answer.logprobs - at_once).abs().max()) > 0.1


def test_what_would_not_fit_is_refused_or_ends(tiny_model: Path) -> None:
    from vllm.exceptions import VLLMValidationError

    arguments = {"num_gpu_blocks_override": 10, "max_model_len": 1280}
    (long, short) = random_prompts((900, 100))
    with engine(tiny_model, "streamingllm", **arguments, **BOUNDED) as llm:
        for own in ({"kv_eviction": "none"}, {"kv_eviction_prompts": "whole"}):
            with pytest.raises(VLLMValidationError, match=r"kv_eviction_prompts.*larger than the KV cache"):
                generate(llm, [long], 10, extra_args=[own])
        with pytest.raises(VLLMValidationError, match="kv_eviction_prompt_interval=8: choose 32 or more"):
            generate(llm, [long], 10, extra_args=[{"kv_eviction_prompt_interval": 8}])
        answers = generate(llm, [short], 400, extra_args=[{"kv_eviction": "none"}])
        assert len(answers[0].tokens) == 9 * 32 - 4 * 32, "its answer ends where the memory does"
        assert len(generate(llm, [long], 20)[0].tokens) == 20
        assert_all_returned(llm)
