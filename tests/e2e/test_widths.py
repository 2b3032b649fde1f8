"""Pages of several widths through the engine: what it answers is what a plain model answers whose keys and values,
where the audit says so, have been quantised and back."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate, random_prompts, scheduler_of
from tests.quantised_pages import packed_by
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive.audit import Audit
from vllm_defensive.packing import LADDER, WIDTHS

pytestmark = pytest.mark.e2e

# Log-probabilities in float32 of a request in another batch are the same to the bit here; where a matrix product sums
# in another order for more rows, they may be a few roundings apart.
BATCHED = 1e-4
QUANTISED = [name for name in WIDTHS if name != "16"]
POLICIES = ("snapkv", "criticalkv", "layer-defensivekv", "halokv", "kvzip", "keep-all", "random-uneven", "lava")
LENGTHS = (300, 601, 96, 512)
KEEP = 0.3


@dataclass
class Turn:
    widths: str
    policy: str
    prompt: list[int]
    answer: Answer
    audit: Audit

    def errors(self, reference: ReferenceLlama, quantised: bool = True) -> Tensor:
        """Differences of its log-probabilities from the reference's. quantised: whether that reads such pages."""
        packed = partial(packed_by, self.audit) if quantised else None
        expected = decode_logprobs(reference, self.prompt, self.answer.tokens, self.audit.mask(), packed=packed)
        return (self.answer.logprobs - expected).abs()


def assert_alike(some: list[Answer], others: list[Answer]) -> None:
    """Answers to the same requests in float32, in other batches."""
    worst = max(float((one.logprobs - other.logprobs).abs().max()) for one, other in zip(some, others, strict=True))
    print(f"apart by {worst:.1e}")
    assert [one.tokens for one in some] == [other.tokens for other in others] and worst < BATCHED


def policies_of(widths: str) -> tuple[str, ...]:
    return ("rdkv",) if widths == LADDER else POLICIES


def ask(llm: Any, folder: Path, wanted: list[tuple[str, str, list[int]]], **fields: Any) -> list[Turn]:
    extra = [
        {
            "kv_eviction": policy,
            "kv_eviction_keep": KEEP,
            "kv_eviction_widths": "auto" if widths == LADDER else widths,
            **fields,
        }
        for widths, policy, _ in wanted
    ]
    answers = generate(llm, [prompt for *_, prompt in wanted], 24, extra_args=extra)
    return [Turn(*each, a, audit_of(folder, a.request_id)) for each, a in zip(wanted, answers, strict=True)]


@dataclass
class Run:
    turns: dict[str, list[Turn]]
    reference: ReferenceLlama


@pytest.fixture(scope="module")
def run(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("audit")
    wanted = [
        (widths, policy, prompt)
        for number, (widths, policy) in enumerate((w, p) for w in QUANTISED for p in policies_of(w))
        for prompt in random_prompts(LENGTHS, seed=number)
    ]
    with engine(tiny_model, "snapkv", dtype="float32", audit=str(folder)) as llm:
        first = ask(llm, folder, wanted)
        more = random_prompts([60] * len(first), seed=99)
        longer = [(t.widths, t.policy, t.prompt + t.answer.tokens + x) for t, x in zip(first, more, strict=True)]
        boundary = ask(
            llm, folder, [each for each in longer if each[1] in ("snapkv", "halokv", "rdkv")], kv_eviction_boundary=141
        )
        assert_all_returned(llm)
    return Run({"first": first, "boundary": boundary}, ReferenceLlama(tiny_model))


@pytest.mark.parametrize("batch", ["first", "boundary"])
@pytest.mark.parametrize("widths", QUANTISED)
def test_answers_equal_a_model_whose_pages_are_quantised(run: Run, widths: str, batch: str) -> None:
    """In float32. A number that lies between two codes may fall to either side, hence the few larger errors; with codes
    left out of the reference all are an order of magnitude larger."""
    turns = [turn for turn in run.turns[batch] if turn.widths == widths]
    errors = torch.cat([turn.errors(run.reference) for turn in turns])
    without = torch.cat([turn.errors(run.reference, quantised=False) for turn in turns])
    print(f"{widths}: median {errors.median():.1e} of {without.median():.1e}, max {errors.max():.1e}")
    assert errors.median() <= 1e-4 and errors.median() < 0.1 * without.median()
    assert errors.max() <= 0.05


@pytest.mark.parametrize("widths", QUANTISED)
def test_more_tokens_are_kept_in_the_same_bytes(run: Run, widths: str) -> None:
    for turn in (t for t in run.turns["first"] if t.widths == widths):
        audit = turn.audit
        assert audit.widths == widths and set(audit.page_classes) == {"16", *(name for name, _ in WIDTHS[widths])}
        packed = audit.packed_blocks * audit.kept_counts.numel()  # pages
        tokens = dict(zip(audit.page_classes, audit.page_tokens, strict=True))
        room = packed * max(tokens[name] for name, _ in WIDTHS[widths])
        full, tail = divmod(audit.stop, audit.block_size)
        kept = (
            int(audit.kept_counts.sum()) - (audit.shared_blocks * audit.block_size + tail) * audit.kept_counts.numel()
        )
        assert packed * 32 < kept <= min(room, full * audit.block_size * audit.kept_counts.numel())
        if turn.policy == "keep-all":
            assert audit.mask().all()
        if turn.policy not in ("kvzip", "rdkv", "keep-all"):
            assert audit.mask()[:, :, -32:].all(), "the window"


def test_of_the_mixed_widths_the_best_are_wider(run: Run) -> None:
    """The window is forced, hence above all others: it is in pages of 8 bits."""
    for turn in (t for t in run.turns["first"] if t.widths == "8,4" and t.policy == "halokv"):
        audit = turn.audit
        eight, full = audit.page_classes.index("8"), audit.stop // audit.block_size * audit.block_size
        for layer in range(audit.kept_counts.shape[0]):
            for head in range(audit.kept_counts.shape[1]):
                positions, classes = audit.positions(layer, head), audit.classes(layer, head)
                window = (positions >= audit.stop - audit.window) & (positions < full)
                assert (classes[window] == eight).all()


@pytest.fixture(scope="module")
def small_pool(tiny_model: Path) -> Iterator[Any]:
    small = {"num_gpu_blocks_override": 80, "max_model_len": 1024, "enable_prefix_caching": False}
    with engine(tiny_model, "snapkv", keep=0.2, min_tokens=256, widths="k8v4", **small) as llm:
        yield llm


def test_blocks_of_quantised_pages_are_clean_when_others_get_them(small_pool: Any) -> None:
    """Stock attention reads whole pages, and weighs what lies beyond a sequence's end by zero: codes there may read as
    NaN. Blocks all over the pool are packed, then requests come that fill theirs in part; they answer as before."""
    prompts = random_prompts([33, 65, 1, 5, 40, 100], seed=100)
    fresh = generate(small_pool, prompts, 8)
    for seed in range(6):
        generate(small_pool, random_prompts([700, 650, 600], seed=seed), 40)
        for before, after in zip(fresh, generate(small_pool, prompts, 8), strict=True):
            assert after.tokens == before.tokens and torch.equal(after.logprobs, before.logprobs)
    assert_all_returned(small_pool)


def test_counters_tell_bytes_and_tokens(small_pool: Any) -> None:
    totals = scheduler_of(small_pool).eviction_manager.lifecycle.totals
    assert totals.requests >= 18 and totals.cancelled == 0
    assert totals.held_tokens < totals.kept_tokens < totals.prompt_tokens
    assert totals.prompt_tokens - totals.held_tokens == 32 * totals.freed_blocks


def test_without_widths_nothing_changes(tiny_model: Path) -> None:
    """The engine's default is 16 bits, and the request that says so is answered alike."""
    prompts = random_prompts((300, 601), seed=5)
    with engine(tiny_model, "layer-defensivekv", keep=KEEP) as llm:
        default = generate(llm, prompts, 24)
        said = generate(llm, prompts, 24, extra_args=[{"kv_eviction_widths": "16"}] * 2)
    for one, other in zip(default, said, strict=True):
        assert one.tokens == other.tokens and torch.equal(one.logprobs, other.logprobs)


def test_asynchronous_scheduling_gives_the_same(tiny_model: Path) -> None:
    prompts = random_prompts((300, 601, 512), seed=6)
    answers = []
    for asynchronous in (False, True):
        with engine(tiny_model, "halokv", keep=KEEP, widths="8,4", dtype="float32", asynchronous=asynchronous) as llm:
            answers.append(generate(llm, prompts, 24))
            assert_all_returned(llm)
    assert_alike(*answers)


def test_in_one_batch_each_has_its_own(tiny_model: Path) -> None:
    """Rows of 16 bits, of several widths and un-evicted ones decode side by side as alone."""
    widths = ["16", "k8v4", "8,4", "auto", "4", "8", "16"]
    policies = ["halokv", "snapkv", "kvzip", "rdkv", "criticalkv", "none", "none"]
    extra = [{"kv_eviction": p, "kv_eviction_widths": w} for p, w in zip(policies, widths, strict=True)]
    prompts = random_prompts([400, 500, 450, 420, 610, 300, 390], seed=8)
    with engine(tiny_model, "snapkv", keep=KEEP, dtype="float32") as llm:
        together = generate(llm, prompts, 40, extra_args=extra)
        llm.reset_prefix_cache()
        alone = [generate(llm, [p], 40, extra_args=[e])[0] for p, e in zip(prompts, extra, strict=True)]
    assert_alike(together, alone)


def test_preempted_requests_are_packed_again_as_before(tiny_model: Path) -> None:
    prompts = random_prompts([400] * 6, seed=9)
    settings = {"keep": KEEP, "widths": "k8v4", "dtype": "float32", "max_model_len": 1024}
    with engine(tiny_model, "snapkv", **settings) as llm:
        roomy = generate(llm, prompts, 150)
    with engine(tiny_model, "snapkv", num_gpu_blocks_override=48, **settings) as llm:
        tight = generate(llm, prompts, 150)
        preemptions = next(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
        assert_all_returned(llm)
    assert preemptions > 0, "the pool is too large for this test"
    assert_alike(roomy, tight)


@pytest.fixture(scope="module")
def uneven_model(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with one layer that looks at hardly anything but a few tokens, and one at all alike."""
    folder = tmp_path_factory.mktemp("uneven")
    for file in tiny_model.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, folder)
            continue
        weights = load_file(file)
        for layer, factor in ((0, 30.0), (1, 0.01)):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            weights[name] = weights[name] * factor
        save_file(weights, folder / file.name, metadata={"format": "pt"})
    return folder


def test_heads_may_split_their_pages_as_they_like(uneven_model: Path, tmp_path: Path) -> None:
    with engine(uneven_model, "rdkv", keep=KEEP, dtype="float32", audit=str(tmp_path)) as llm:
        wanted = [(LADDER, "rdkv", prompt) for prompt in random_prompts((601, 512), seed=3)]
        turns = ask(llm, tmp_path, wanted)
    for turn in turns:
        assert len(set(turn.audit.kept_counts.flatten().tolist())) > 1, "all split alike: the test shows nothing"
    reference = ReferenceLlama(uneven_model)
    errors = torch.cat([turn.errors(reference) for turn in turns])
    assert errors.median() <= 1e-4 and errors.max() <= 0.05
