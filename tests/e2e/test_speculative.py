"""n-gram drafts: an evicted request's guesses are verified over its packed pages and what it grew since, and change
nothing but the number of steps.

The engine that guesses runs in a process of its own: with numba, which finds the n-grams, in this process vLLM could
start no further engine here.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import Answer, audit_of, engine, generate, largest_difference, metrics_of
from tests.reference_model import ReferenceLlama, decode_logprobs

# Two engines answer everything before the first test: half a minute, and more on a machine that has other work.
pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(600)]

DRAFTS = {"method": "ngram", "num_speculative_tokens": 4, "prompt_lookup_max": 4, "prompt_lookup_min": 1}
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16
# With so few tokens to choose from the random model repeats itself, and some guesses are right.
ALPHABET = [30, 77, 211, 400, 401]

Cases = tuple[tuple[int, dict[str, Any]], ...]  # (prompt tokens, fields of the request)
# Long and short, whole blocks and not, over several chunks, and two that are left alone.
MIXED: Cases = (
    (700, {}),
    (601, {"kv_eviction_boundary": 333}),
    (40, {}),
    (320, {"kv_eviction": "none"}),
    (641, {"kv_eviction_protect": 64}),
    (400, {"kv_eviction_boundary": 399}),
    (999, {"kv_eviction": "streamingllm", "kv_eviction_keep": 0.1}),
)
REPEATED = (1, 3, 4)  # of them, asked before: the others must leave their blocks in the prefix cache
CROWD: Cases = ((300, {}), (280, {"kv_eviction": "none"}), (310, {"kv_eviction_boundary": 200})) * 4
POOL_BLOCKS = 100  # which the answers of the crowd outgrow


def repetitive(length: int, seed: int) -> list[int]:
    """A prompt of a few phrases in random order."""
    rng = random.Random(seed)
    phrases = [[rng.randrange(2, 512) for _ in range(rng.randrange(3, 9))] + rng.sample(ALPHABET, 3) for _ in range(6)]
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += rng.choice(phrases)
    return tokens[:length]


MIXED_PROMPTS = [repetitive(length, seed) for seed, (length, _) in enumerate(MIXED)]
CROWD_PROMPTS = [repetitive(length, 100 + seed) for seed, (length, _) in enumerate(CROWD)]


@dataclass(frozen=True)
class Run:
    """What one engine answered, where its audits are, what it counted, and whether all its blocks came back."""

    mixed: list[Answer]
    crowd: list[Answer]
    audits: Path
    metrics: dict[str, float]
    all_returned: bool


def ask(llm: Any, prompts: Sequence[list[int]], cases: Cases, num_tokens: int) -> list[Answer]:
    return generate(llm, prompts, num_tokens, [own for _, own in cases], allowed_token_ids=ALPHABET)


def run(model: Path, audits: Path, **arguments: Any) -> Run:
    settings = {"keep": 0.3, "min_tokens": 64, "audit": str(audits), "max_num_batched_tokens": 200, "reuse": "off"}
    with engine(model, "layer-defensivekv", dtype="float32", max_model_len=1152, **settings, **arguments) as llm:
        ask(llm, [MIXED_PROMPTS[i] for i in REPEATED], tuple(MIXED[i] for i in REPEATED), 2)
        return Run(
            ask(llm, MIXED_PROMPTS, MIXED, 70),  # beyond two block borders at least
            ask(llm, CROWD_PROMPTS, CROWD, 150),
            audits,
            metrics_of(llm),
            llm.reset_prefix_cache(),  # which vLLM does only when no block is in use
        )


@pytest.fixture(scope="module")
def plain(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Without drafts, and with memory for everybody."""
    return run(tiny_model, tmp_path_factory.mktemp("plain"))


@pytest.fixture(scope="module")
def drafted(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
        patch.setenv("NUMBA_DISABLE_JIT", "1")  # to compile takes longer than all else here
        folder = tmp_path_factory.mktemp("drafted")
        return run(tiny_model, folder, speculative_config=DRAFTS, num_gpu_blocks_override=POOL_BLOCKS)


def evicted(cases: Cases) -> list[int]:
    return [i for i, (length, own) in enumerate(cases) if length >= 64 and own.get("kv_eviction") != "none"]


def test_guesses_were_right_and_wrong_and_memory_short(plain: Run, drafted: Run) -> None:
    """Else the tests below would compare little."""
    guessed, right = (drafted.metrics[f"vllm:spec_decode_num_{kind}_tokens"] for kind in ("draft", "accepted"))
    print(f"{right:.0f} of {guessed:.0f} guesses were right, {drafted.metrics['vllm:num_preemptions']:.0f} preemptions")
    assert right > 500 and guessed - right > 500
    assert drafted.metrics["vllm:num_preemptions"] > 0 == plain.metrics["vllm:num_preemptions"]
    assert drafted.all_returned and plain.all_returned


@pytest.mark.parametrize("batch", ["mixed", "crowd"])
def test_answers_are_those_without_drafts(plain: Run, drafted: Run, batch: str) -> None:
    assert largest_difference(getattr(drafted, batch), getattr(plain, batch)) <= FLOAT_NOISE


@pytest.mark.parametrize("batch, cases", [("mixed", MIXED), ("crowd", CROWD)], ids=["mixed", "crowd"])
def test_what_is_kept_is_what_is_kept_without_drafts(plain: Run, drafted: Run, batch: str, cases: Cases) -> None:
    for i in evicted(cases):
        ours, theirs = (audit_of(r.audits, getattr(r, batch)[i].request_id) for r in (drafted, plain))
        assert ours.stop == theirs.stop == cases[i][1].get("kv_eviction_boundary", cases[i][0])
        assert ours.shared_blocks == theirs.shared_blocks
        assert bool((ours.mask() == theirs.mask()).all()), (batch, i)


def test_repeated_prompts_hit_as_without_drafts(plain: Run, drafted: Run) -> None:
    hits = [answer.cached_tokens for answer in drafted.mixed]
    assert hits == [answer.cached_tokens for answer in plain.mixed]
    # Whole blocks that leave a window of 32 before the eviction, or the last token of a prompt that is left alone.
    assert [hits[i] for i in REPEATED] == [288, 288, 608]


def test_drafts_are_verified_over_what_was_kept(drafted: Run, tiny_model: Path) -> None:
    """Each token of an answer, guessed or drawn, is as likely as a plain model finds it that sees the kept alone."""
    reference = ReferenceLlama(tiny_model)
    differs = 0.0
    for i in evicted(MIXED):
        prompt, answer = MIXED_PROMPTS[i], drafted.mixed[i]
        mask = audit_of(drafted.audits, answer.request_id).mask()
        expected = decode_logprobs(reference, prompt, answer.tokens, mask)
        assert float((answer.logprobs - expected).abs().max()) <= FLOAT_NOISE
        full = decode_logprobs(reference, prompt, answer.tokens, None)
        differs = max(differs, float((expected - full).abs().max()))
    assert differs > 0.1  # else the comparison could not fail
