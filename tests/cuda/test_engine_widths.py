"""Pages of several widths on the CUDA platform: what is kept is what plain scores choose for such pages, and what is
answered is what a plain model answers whose keys and values have been quantised and back."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_defensive
from tests.cuda.engines import engine
from tests.e2e import test_kept_sets as formulas
from tests.e2e.engines import Answer, assert_all_returned, audit_of, generate, random_prompts, worker_of
from tests.quantised_pages import packed_by
from tests.reference_model import Layer, ReferenceLlama, decode_logprobs
from vllm_defensive.audit import Audit
from vllm_defensive.packing import WIDTHS, Format, Region
from vllm_defensive.policy import PRESETS, LayerScores, Selection, select_packed
from vllm_defensive_kernels.widths import PageShape

pytestmark = pytest.mark.e2e

KEEP, W, N = 0.15, 32, 32


def errors(
    reference: ReferenceLlama, prompt: list[int], answer: Answer, audit: Audit, quantised: bool = True
) -> Tensor:
    """Differences of the log-probabilities from the reference's. quantised: whether that reads such pages."""
    packed = partial(packed_by, audit) if quantised else None
    return (answer.logprobs - decode_logprobs(reference, prompt, answer.tokens, audit.mask(), packed=packed)).abs()


def chosen(reference: ReferenceLlama, prompt: list[int], audit: Audit, shape: PageShape) -> tuple[Selection, ...]:
    """What scores of plain loops choose for pages of such widths, on the host."""
    layers: list[Layer] = []
    reference.forward(prompt, attention=layers)
    policy, region = PRESETS[audit.policy], Region(len(prompt), 0, W, N, N)
    scores = []
    for score, rank in formulas.naive_scores(policy, reference, layers):
        whole = (
            None if x is None else torch.tensor([formulas.complete(row, len(prompt)) for row in x])
            for x in (score, rank)
        )
        scores.append(LayerScores(*whole))
    return select_packed(
        policy, scores, Format.of(audit.widths, shape), head_pages=audit.packed_blocks,
        forced_tokens=region.forced_tokens, evictable=region.tokens,
    )  # fmt: skip


def assert_kept(audit: Audit, expected: tuple[Selection, ...]) -> None:
    """Positions of each head, class by class."""
    tail = audit.stop // N * N
    for place, ((name, _), part) in enumerate(zip(WIDTHS[audit.widths], expected, strict=True)):
        assert audit.page_classes[place + 1] == name, "after 16, which the tail has"
        rows = part.tokens_PN.split(part.pages_LH.flatten().tolist())
        for row, token_PN in enumerate(rows):
            layer, head = divmod(row, part.pages_LH.shape[1])
            positions, classes = audit.positions(layer, head), audit.classes(layer, head)
            held = positions[(classes == place + 1) & (positions < tail)]
            assert held.tolist() == token_PN[token_PN >= 0].tolist(), (name, layer, head)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize(("widths", "policy"), [("k8v4", "layer-defensivekv"), ("8,4", "criticalkv")])
def test_kernels_keep_and_read_what_the_formulas_say(
    model: Path,
    tmp_path: Path,
    kernels: str,
    widths: str,
    policy: str,
    kernel_calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reference, prompt = ReferenceLlama(model), random_prompts((420,), seed=5)[0]
    monkeypatch.setattr(formulas, "KEEP", KEEP)  # by which one of them is scored
    settings = {"dtype": "float32", "audit": str(tmp_path), "block_size": N, "keep": KEEP, "widths": widths}
    with engine(model, policy, **settings) as llm:
        (answer,) = generate(llm, [prompt], 3)
        assert_all_returned(llm)
    parts = len(WIDTHS[widths])
    assert (kernel_calls["compact_quantised"], kernel_calls["list_kept"]) == (parts, parts)
    assert "compact" not in kernel_calls
    audit = audit_of(tmp_path, answer.request_id)
    assert audit.widths == widths and 0 < audit.mask().float().mean() < 0.9
    assert_kept(audit, chosen(reference, prompt, audit, PageShape(N, reference.head_size, 4)))
    found, without = (errors(reference, prompt, answer, audit, quantised) for quantised in (True, False))
    # A number that lies between two codes may fall to either side; with codes left out of the reference all are off.
    assert found.median() <= 1e-4 and found.max() <= 0.05 and found.median() < 0.1 * without.median()


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize("widths", ["k8v4", "8,4"])
def test_requests_of_all_widths_that_are_served_share_batches(
    model: Path, tmp_path: Path, kernels: str, widths: str
) -> None:
    """Several policies, then a prompt that goes on over packed pages; blocks are used again."""
    reference = ReferenceLlama(model)
    served = {"k8v4": ("k8v4", "16"), "8,4": ("8,4", "16", "8", "4")}[widths]
    wanted = [(w, p) for w in served for p in ("snapkv", "halokv", "layer-defensivekv", "keep-all")]
    prompts = random_prompts((257, 301, 190, 140) * len(served), seed=3)
    fields: list[dict[str, Any]] = [
        {"kv_eviction": policy, "kv_eviction_keep": 0.25, **({} if w == widths else {"kv_eviction_widths": w})}
        for w, policy in wanted
    ]
    settings = {"dtype": "float32", "audit": str(tmp_path), "widths": widths, "max_num_seqs": 6}
    with engine(model, "snapkv", num_gpu_blocks_override=160, **settings) as llm:
        answers = generate(llm, prompts, 6, extra_args=fields)
        longer = [p + q for p, q in zip(prompts, random_prompts([40] * len(prompts), seed=7), strict=True)]
        fields = [{**extra, "kv_eviction_boundary": 130} for extra in fields]
        continued = generate(llm, longer, 6, extra_args=fields)
        assert_all_returned(llm)
    for turn, texts in ((answers, prompts), (continued, longer)):
        for name in served:
            audits = [audit_of(tmp_path, answer.request_id) for answer in turn]
            rows = [row for row in zip(texts, turn, audits, strict=True) if row[2].widths == name]
            assert len(rows) == 4
            found = torch.cat([errors(reference, *row) for row in rows])
            assert found.median() <= 1e-4 and found.max() <= (1e-4 if name == "16" else 0.05), name
            assert all(bool(audit.mask().all()) for *_, audit in rows if audit.policy == "keep-all")
            if name != "16":
                without = torch.cat([errors(reference, *row, quantised=False) for row in rows])
                assert found.median() < 0.1 * without.median(), name


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_other_widths_are_refused_and_those_that_are_served_warmed_up(
    model: Path, kernels: str, kernel_calls: dict[str, int]
) -> None:
    from vllm.exceptions import VLLMValidationError

    prompt = random_prompts((140,), seed=4)
    with engine(model, "snapkv", dtype="float32", widths="8,4", policies=["none"]) as llm:
        for widths in ("k8v4", "2"):
            with pytest.raises(
                VLLMValidationError, match=f"kv_eviction_widths='{widths}': choose one of auto, 16, 8, 4, \"8,4\""
            ):
                generate(llm, prompt, 2, extra_args=[{"kv_eviction_widths": widths}])
        kernel_calls.clear()
        worker_of(llm)._evictor.warm_up(1024)
        assert kernel_calls == {"window_scores": 1, "list_kept": 5, "compact": 1, "compact_quantised": 4}
    with engine(model, "snapkv", dtype="float32", policies=["none"]) as llm:
        with pytest.raises(VLLMValidationError, match="kv_eviction_widths='4': choose one of auto, 16"):
            generate(llm, prompt, 2, extra_args=[{"kv_eviction_widths": "4"}])
        assert worker_of(llm)._runtime.state.classes == ("16",)


def test_codes_and_fp8_do_not_go_together(model: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    def config(**settings: Any) -> Any:
        arguments = vllm_defensive.engine_kwargs("snapkv", **settings)
        return EngineArgs(model=str(model), kv_cache_dtype="fp8", **arguments).create_engine_config()

    with pytest.raises(ValueError, match="kv_eviction_widths=8,4: not supported with kv_cache_dtype=fp8; choose 16"):
        config(widths="8,4")
    assert config(widths="16").cache_config.cache_dtype == "fp8"
