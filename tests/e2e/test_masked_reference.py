"""What the engine answers after an eviction is what a plain model answers that cannot see the evicted entries."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate, random_prompts
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive.audit import Audit
from vllm_defensive.policy import PRESETS, public_names

pytestmark = pytest.mark.e2e

# Of the one whose pages are quantised, and of all in such pages, see test_widths.py.
POLICIES = (*(name for name in public_names() if PRESETS[name].widths == "16"), "random-uneven")
LENGTHS = (300, 601, 96, 512)  # within and over one chunk, with and without a tail block
KEEP = 0.3


@dataclass
class Turn:
    """One request of a batch and what came of it."""

    policy: str
    prompt: list[int]
    answer: Answer
    audit: Audit | None

    def errors(self, reference: ReferenceLlama, masked: bool = True) -> Tensor:
        """Differences of its log-probabilities from the reference's."""
        kept = self.audit.mask() if self.audit is not None and masked else None
        return (self.answer.logprobs - decode_logprobs(reference, self.prompt, self.answer.tokens, kept)).abs()


@dataclass
class Run:
    """Batches of every policy and prompt, un-evicted ones ("none") among them."""

    turns: dict[str, list[Turn]]
    reference: ReferenceLlama

    @cached_property
    def errors(self) -> dict[tuple[str, str], Tensor]:
        """(batch, policy) -> differences from the reference, of all tokens of its answers."""
        return {
            (name, policy): torch.cat([t.errors(self.reference) for t in turns if t.policy == policy])
            for name, turns in self.turns.items()
            for policy in {t.policy for t in turns}
        }

    @cached_property
    def unevicted(self) -> Tensor:
        return torch.cat([errors for (_, policy), errors in self.errors.items() if policy == "none"])


def ask(llm: Any, folder: Path, prompts: list[tuple[str, list[int]]], **fields: Any) -> list[Turn]:
    extra = [{"kv_eviction": policy, "kv_eviction_keep": KEEP, **fields} for policy, _ in prompts]
    answers = generate(llm, [prompt for _, prompt in prompts], 24, extra_args=extra)
    return [
        Turn(policy, prompt, answer, None if policy == "none" else audit_of(folder, answer.request_id))
        for (policy, prompt), answer in zip(prompts, answers, strict=True)
    ]


@pytest.fixture(scope="module", params=["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("audit")
    prompts = [
        # By its name, so that a policy's prompts are the same whoever else is in the table.
        (policy, prompt)
        for policy in ("none", *POLICIES)
        for prompt in random_prompts(LENGTHS, seed=crc32(policy.encode()))
    ]
    score, reference = folder / "score.safetensors", ReferenceLlama(tiny_model)
    score_of(reference, tiny_model, score)
    with engine(tiny_model, "snapkv", dtype=request.param, audit=str(folder), learned=str(score), reuse="off") as llm:
        first = ask(llm, folder, prompts)
        more = random_prompts([60] * len(first), seed=99)
        next_prompts = [(t.policy, t.prompt + t.answer.tokens + x) for t, x in zip(first, more, strict=True)]
        second = ask(llm, folder, next_prompts)
        some = [(policy, p) for policy, p in next_prompts if policy in ("snapkv", "layer-defensivekv", "h2o")]
        boundary = ask(llm, folder, some, kv_eviction_boundary=141)
        protect = ask(llm, folder, some, kv_eviction_protect=50)
        assert_all_returned(llm)
    turns = {"first": first, "second": second, "boundary": boundary, "protect": protect}
    return Run(turns, reference)


def assert_as_good_as_unevicted(run: Run, batch: str, policy: str) -> None:
    """Rounding is all that is left: it is as large for requests that were not evicted.

    The factors are the spread of such noise among prompts, whose logits differ; a wrong entry costs far more, as the
    test of the mask shows.
    """
    ours, allowed = run.errors[batch, policy], run.unevicted
    print(f"max {ours.max():.1e} of {allowed.max():.1e}, rms {rms(ours):.1e} of {rms(allowed):.1e}")
    assert rms(ours) <= 2 * rms(allowed)
    assert ours.max() <= 3 * allowed.max()


def rms(errors: Tensor) -> float:
    return float(errors.pow(2).mean().sqrt())


@pytest.mark.parametrize("policy", POLICIES)
def test_answers_equal_the_masked_reference(run: Run, policy: str) -> None:
    assert_as_good_as_unevicted(run, "first", policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_next_turns_equal_the_reference_too(run: Run, policy: str) -> None:
    """They hit the exact originals of the turn before, and are evicted as a whole."""
    for before, after in zip(run.turns["first"], run.turns["second"], strict=True):
        assert after.audit is None or after.audit.stop == len(after.prompt)
        if PRESETS.get(after.policy, PRESETS["snapkv"]).accumulates:
            assert after.answer.cached_tokens == 0, "nobody caches queries, and it needs them all"
        else:
            assert after.answer.cached_tokens >= len(before.prompt) // 32 * 32
    assert_as_good_as_unevicted(run, "second", policy)


@pytest.mark.parametrize("policy", ["snapkv", "layer-defensivekv", "h2o"])
def test_after_a_boundary_the_rest_of_the_prompt_sees_what_was_kept(run: Run, policy: str) -> None:
    evicted = [t for t in run.turns["boundary"] if t.policy == policy]
    assert all(t.audit is not None and t.audit.stop == 141 < len(t.prompt) for t in evicted)
    assert_as_good_as_unevicted(run, "boundary", policy)


@pytest.mark.parametrize("policy", ["snapkv", "layer-defensivekv", "h2o"])
def test_protected_tokens_are_all_kept(run: Run, policy: str) -> None:
    evicted = [t for t in run.turns["protect"] if t.policy == policy]
    assert all(t.audit is not None and t.audit.mask()[:, :, :50].all() for t in evicted)
    assert_as_good_as_unevicted(run, "protect", policy)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_mask_matters(run: Run, policy: str) -> None:
    """The reference without a mask is far off, so that the tests above can fail."""
    unmasked = torch.cat([t.errors(run.reference, False) for t in run.turns["first"] if t.policy == policy])
    assert rms(unmasked) > 4 * rms(run.errors["first", policy])


def test_ratios_and_windows_are_kept(run: Run) -> None:
    for turn in (t for turns in run.turns.values() for t in turns):
        if (audit := turn.audit) is None:
            continue
        assert audit.policy == turn.policy and audit.keep_ratio == KEEP
        assert audit.token_ids.tolist() == turn.prompt[: audit.stop]
        mask_LHT = audit.mask()
        assert mask_LHT[:, :, -audit.window :].all() or not PRESETS[turn.policy].keeps_window
        full, tail = divmod(audit.stop, audit.block_size)
        kept = audit.shared_blocks * audit.block_size + audit.packed_blocks * audit.block_size + tail
        assert mask_LHT.sum() == kept * mask_LHT.shape[0] * mask_LHT.shape[1]
        assert audit.shared_blocks + audit.packed_blocks < full
