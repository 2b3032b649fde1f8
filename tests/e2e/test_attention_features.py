"""Models whose attention is not the plain one: logits are capped (Gemma 2), heads may attend to nothing (gpt-oss,
Granite), layers read the caches of others (Gemma 4 E).

All have layers with sliding windows, which stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests import tiny_model
from tests.e2e.engines import (
    assert_all_returned,
    audit_of,
    engine,
    generate,
    random_prompts,
    worker_of,
)
from tests.masked_transformer import MaskedTransformer

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

# Within and over one chunk of 512, with and without a tail block, beyond the sliding window of 128.
LENGTHS = (300, 601, 160)
FLOAT_NOISE = 2e-4  # a few hundred float32 roundings of logits up to 16
GPT_OSS = pytest.param("gpt_oss", marks=pytest.mark.nightly)


@dataclass
class Case:
    """A model, with an engine in which each request chooses its policy, and where what is kept is written."""

    kind: str
    folder: Path
    reference: MaskedTransformer
    llm: Any
    audits: Path


@pytest.fixture(scope="module", params=["gemma2", "granite_swa", "gemma4_e", GPT_OSS])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    model, audits = tmp_path_factory.mktemp("model"), tmp_path_factory.mktemp("audits")
    getattr(tiny_model, f"write_tiny_{request.param}")(model)
    settings = {"keep": 0.3, "dtype": "float32", "audit": str(audits), "reuse": "off"}
    with engine(model, "snapkv", **settings) as llm:
        yield Case(request.param, model, MaskedTransformer(model), llm, audits)
        assert_all_returned(llm)


def assert_equal_to_masked(case: Case, policy: str, **fields: Any) -> None:
    prompts = random_prompts(LENGTHS, seed=6)
    extra = {"kv_eviction": policy, **fields}
    assert case.llm.reset_prefix_cache()
    for prompt, answer in zip(prompts, generate(case.llm, prompts, 12, [extra] * len(prompts)), strict=True):
        kept = None if policy == "none" else audit_of(case.audits, answer.request_id).mask()
        masked, full = (case.reference.answer_logprobs(prompt, answer.tokens, mask) for mask in (kept, None))
        error, effect = (float((answer.logprobs - expected).abs().max()) for expected in (masked, full))
        print(f"{policy}, {len(prompt)} tokens: {error:.1e} from the masked reference, {effect:.2f} from the full one")
        assert error <= FLOAT_NOISE
        assert policy in ("none", "keep-all") or effect > 100 * FLOAT_NOISE, "else it could not fail"


def test_answers_equal_the_masked_reference(case: Case) -> None:
    for policy in ("none", "keep-all", "layer-defensivekv"):
        assert_equal_to_masked(case, policy)


@pytest.mark.nightly
@pytest.mark.parametrize("policy", ["snapkv", "h2o", "echokv", "random-uneven"])
def test_so_do_those_of_policies_that_look_elsewhere(case: Case, policy: str) -> None:
    assert_equal_to_masked(case, policy)


@pytest.mark.nightly
def test_after_a_boundary_the_rest_of_the_prompt_sees_what_was_kept(case: Case) -> None:
    assert_equal_to_masked(case, "layer-defensivekv", kv_eviction_boundary=140)


@pytest.mark.parametrize(
    "policy",
    ["snapkv", *(pytest.param(name, marks=pytest.mark.nightly) for name in ("layer-defensivekv", "h2o", "echokv"))],
)
def test_what_is_kept_follows_the_models_own_attention(
    case: Case, policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of a plain softmax, or of a cache's own layer alone, would keep other tokens."""
    (prompt,), kept = random_prompts([500], seed=5), []
    evictor = worker_of(case.llm)._evictor
    for plain in (False, True):
        if plain and case.kind == "gemma4_e":
            own = [range(some.start, some.start + 1) for some in evictor._readers.of_layer]
            monkeypatch.setattr(evictor, "_readers", SimpleNamespace(of_layer=own))
        elif plain:
            changed = [replace(softmax, cap=0.0, void_Q=None) for softmax in evictor._softmax_A]
            runtime = evictor._runtime
            for part in (evictor, runtime.accumulations, runtime.reconstructions):
                monkeypatch.setattr(part, "_softmax_A", changed)
        assert case.llm.reset_prefix_cache()
        (answer,) = generate(case.llm, [prompt], 2, [{"kv_eviction": policy}])
        kept.append(audit_of(case.audits, answer.request_id).mask())
    assert bool((kept[0] != kept[1]).any())
    assert int(kept[0].sum()) == int(kept[1].sum())


@pytest.mark.nightly
def test_pages_of_fewer_bits_are_read_by_the_same_softmax(case: Case) -> None:
    """All of a prompt in 8 bits says nearly what the whole cache says."""
    prompts = random_prompts(LENGTHS, seed=6)
    fields = {"kv_eviction": "layer-defensivekv", "kv_eviction_keep": 1.0, "kv_eviction_widths": "8"}
    assert case.llm.reset_prefix_cache()
    for prompt, answer in zip(prompts, generate(case.llm, prompts, 12, [fields] * len(prompts)), strict=True):
        full = case.reference.answer_logprobs(prompt, answer.tokens, None)
        assert audit_of(case.audits, answer.request_id).mask().all()
        assert float((answer.logprobs - full).abs().max()) <= 0.3  # of logits up to 16, by steps of 1/255 of a range
