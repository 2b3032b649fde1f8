"""What the engine answers after an eviction is what a plain model answers that cannot see the evicted entries, and what
it evicts is what the formulas say."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from tests.cuda.engines import engine
from tests.e2e import test_kept_sets as formulas
from tests.e2e.engines import Answer, assert_all_returned, audit_of, generate, random_prompts
from tests.reference_model import Layer, ReferenceLlama, decode_logprobs
from vllm_defensive.audit import Audit
from vllm_defensive.platforms import only_on_cpus
from vllm_defensive.policy import PRESETS
from vllm_defensive.worker.cuda import launches as cuda_launches
from vllm_defensive.worker.cuda.prompt import kernels_know

pytestmark = pytest.mark.e2e

POLICIES = (
    "random-uneven",
    "streamingllm",
    "pyramidkv",
    "cake",
    "lava",
    "criticalkv",
    "headkv",
    "layer-defensivekv",
    "halokv",
    "kvzip",
    "echokv",
)
# Formulas that the kernels do not have. The budgets of lava and headkv are compared in `tests/policy/` only; h2o is for
# CPUs.
IN_TORCH = tuple(
    name
    for name in formulas.POLICIES
    if name not in POLICIES and not kernels_know(PRESETS[name]) and not only_on_cpus(name)
)
KEEP, TOKENS = 0.35, 6
FLOAT32 = 1e-4  # a few hundred float32 roundings of logits up to 16


def ask(llm, folder: Path, prompts: list[list[int]], policy: str, **fields) -> list[tuple[Answer, Audit]]:
    extra = {"kv_eviction": policy, "kv_eviction_keep": KEEP, **fields}
    answers = generate(llm, prompts, TOKENS, extra_args=[extra] * len(prompts))
    return [(answer, audit_of(folder, answer.request_id)) for answer in answers]


def error(reference: ReferenceLlama, prompt: list[int], answer: Answer, kept_LHT: Tensor | None) -> float:
    return float((answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, kept_LHT)).abs().max())


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_answers_equal_the_masked_reference(model: Path, tmp_path: Path, kernels: str) -> None:
    """All policies in one batch with requests that are left alone; then a boundary, over what the first turn cached."""
    reference = ReferenceLlama(model)
    alone = random_prompts((70, 129), seed=9)
    batch = [(policy, p) for i, policy in enumerate(POLICIES) for p in random_prompts((141, 257), seed=i)]
    fields = [{"kv_eviction": policy, "kv_eviction_keep": KEEP} for policy, _ in batch] + [{"kv_eviction": "none"}] * 2
    settings = {"dtype": "float32", "audit": str(tmp_path), "max_num_seqs": 2 * len(POLICIES), "reuse": "off"}
    with engine(model, "snapkv", **settings) as llm:
        answers = generate(llm, [p for _, p in batch] + alone, TOKENS, extra_args=fields)
        longer = [p + q for (_, p), q in zip(batch, random_prompts([40] * len(batch), seed=77), strict=True)]
        fields = [{**extra, "kv_eviction_boundary": len(p)} for extra, (_, p) in zip(fields, batch, strict=False)]
        continued = generate(llm, longer, TOKENS, extra_args=fields)
        assert_all_returned(llm)
    for prompt, answer in zip(alone, answers[-2:], strict=True):
        assert error(reference, prompt, answer, None) <= FLOAT32
    for turn, prompts in ((answers[:-2], [p for _, p in batch]), (continued, longer)):
        unmasked = 0.0
        for (policy, document), prompt, answer in zip(batch, prompts, turn, strict=True):
            audit = audit_of(tmp_path, answer.request_id)
            assert (audit.policy, audit.stop) == (policy, len(document))
            assert error(reference, prompt, answer, audit.mask()) <= FLOAT32, (policy, len(prompt))
            unmasked = max(unmasked, error(reference, prompt, answer, None))
        assert unmasked > 1000 * FLOAT32  # the masks matter, so the test can fail


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("policy", ["layer-defensivekv", "criticalkv"])
def test_kept_sets_are_those_of_the_formulas(
    model: Path, tmp_path: Path, kernels: str, policy: str, kernel_calls: dict[str, int]
) -> None:
    """With pages of 32 tokens, as those formulas are written for."""
    reference, prompt = ReferenceLlama(model), random_prompts((130,), seed=5)[0]
    with engine(model, policy, dtype="float32", audit=str(tmp_path), block_size=32, keep=formulas.KEEP) as llm:
        (answer,) = generate(llm, [prompt], 2)
    assert set(kernel_calls) >= {"window_scores", "value_norm", "compact", "ragged_paged_decode"}
    audit = audit_of(tmp_path, answer.request_id)
    assert_kept_by_formulas(reference, prompt, audit)
    assert error(reference, prompt, answer, audit.mask()) <= FLOAT32


def assert_kept_by_formulas(reference: ReferenceLlama, prompt: list[int], audit: Audit) -> None:
    layers: list[Layer] = []
    reference.forward(prompt, attention=layers)
    policy = PRESETS[audit.policy]
    scores = formulas.naive_scores(policy, reference, layers)
    pages = formulas.greedy_pages(policy, scores, len(prompt), audit.packed_blocks)
    for (layer, head), count in pages.items():
        of_head = [None if x is None else x[head] for x in scores[layer]]
        expected = formulas.best_tokens(policy, *of_head, len(prompt), count * formulas.N)
        assert audit.positions(layer, head).tolist() == sorted(expected), (policy.name, layer, head)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_formulas_without_a_kernel_choose_what_they_say(model: Path, tmp_path: Path, kernels: str) -> None:
    """A prompt each: what they share would stay where it is."""
    reference, prompts = ReferenceLlama(model), random_prompts((130,) * len(IN_TORCH), seed=5)
    fields = [{"kv_eviction": policy, "kv_eviction_keep": formulas.KEEP} for policy in IN_TORCH]
    with engine(model, "snapkv", dtype="float32", audit=str(tmp_path), block_size=32, max_num_seqs=16) as llm:
        answers = generate(llm, prompts, 2, extra_args=fields)
    for policy, prompt, answer in zip(IN_TORCH, prompts, answers, strict=True):
        audit = audit_of(tmp_path, answer.request_id)
        assert audit.policy == policy
        assert_kept_by_formulas(reference, prompt, audit)
        assert error(reference, prompt, answer, audit.mask()) <= FLOAT32


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_values_that_stay_in_place_are_not_needed(
    model: Path, tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, "snapkv", dtype="float32", audit=str(tmp_path), enable_prefix_caching=False) as llm:
        formulas.assert_the_same_without_values_in_place(llm, tmp_path, monkeypatch, tokens=140, protected=40)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize("policy", ["snapkv", "criticalkv", "layer-defensivekv", "halokv"])
def test_layers_are_weighed_together_or_apart(
    model: Path,
    tmp_path: Path,
    kernels: str,
    policy: str,
    monkeypatch: pytest.MonkeyPatch,
    kernel_calls: dict[str, int],
) -> None:
    """What is kept does not depend on how many layers' scores there is room for."""
    prompt, kept = random_prompts((140,), seed=6)[0], []
    with engine(model, policy, dtype="float32", audit=str(tmp_path), enable_prefix_caching=False) as llm:
        for room, launches in ((2**22, 1), (1, 2)):
            monkeypatch.setattr(cuda_launches, "SCORES_AT_A_TIME", room)
            kernel_calls.clear()
            (answer,) = generate(llm, [prompt], 2)
            assert kernel_calls["window_scores"] == launches
            kept.append(audit_of(tmp_path, answer.request_id).mask())
    assert bool((kept[0] == kept[1]).all())
    assert 0 < kept[0].float().mean() < 1
