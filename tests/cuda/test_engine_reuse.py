"""Packings that outlive their request, on the CUDA platform: who adopts one answers as if it had packed for itself."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import graphs
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.cuda.test_engine_waits import guarded, no_waiting
from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    audit_of,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
    worker_of,
)

pytestmark = pytest.mark.e2e

N, TOKENS, POLICY = 16, 6, "layer-defensivekv"
DOCUMENTS = random_prompts((208, 133), seed=1)
STOPS = (208, 128)  # a boundary within a block is rounded down
# (document, tokens of the question). The first two pack. Of the others one is longer than a chunk, and one is a single
# token, which a batch of decode rows takes in.
ASKED = ((0, 20), (1, 9), (0, 1), (1, 150), (0, 33))
QUESTIONS = random_prompts([length for _, length in ASKED], seed=2)
PROMPTS = [DOCUMENTS[document] + question for (document, _), question in zip(ASKED, QUESTIONS, strict=True)]
STRANGERS = random_prompts((70, 61), seed=3)
EAGER: dict[str, Any] = {}
GRAPHS: dict[str, Any] = {"enforce_eager": False}
if MODE == "pretend":  # nothing compiled, so no graphs in pieces
    sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 8]}
    GRAPHS["compilation_config"] = {"custom_ops": ["none"], "mode": 0, **sizes}


def settings(widths: str) -> dict[str, Any]:
    return {"dtype": "float32", "block_size": N, "keep": 0.3 if widths == "16" else 0.12, "widths": widths}


@cache
def packed_for_themselves(model: Path, widths: str) -> list[Answer]:
    """One after the other, each to an empty cache, where no packing outlives its request."""
    with engine(model, POLICY, reuse="off", **settings(widths)) as llm:
        answers = []
        for prompt, (document, _) in zip(PROMPTS, ASKED, strict=True):
            own = [{"kv_eviction_boundary": STOPS[document]}]
            answers += generate(llm, [prompt], TOKENS, extra_args=own)
            assert_all_returned(llm)
        told = metrics_of(llm)
        assert (told["vllm:kv_eviction_requests"], told["vllm:kv_eviction_adoptions"]) == (len(PROMPTS), 0)
    return answers


def throw_one_out(llm: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let vLLM believe once, while four requests decode, that the pool is empty: the last one is preempted, to whom
    nothing happens but that. Returns its id, in a list, as soon as it has one."""
    scheduler, thrown_out = scheduler_of(llm), []
    manager = scheduler.kv_cache_manager
    allocate = manager.allocate_slots

    def allocate_slots(request: Any, *args: Any, **kwargs: Any) -> Any:
        running = scheduler.running
        if not thrown_out and len(running) >= 4 and all(r.num_output_tokens for r in running):
            thrown_out.append(running[-1].request_id)
            return None
        return allocate(request, *args, **kwargs)

    monkeypatch.setattr(manager, "allocate_slots", allocate_slots)
    return thrown_out


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize(
    ("widths", "how"), [("16", EAGER), ("k8v4", EAGER), ("16", GRAPHS)], ids=["16", "k8v4", "graphs"]
)
def test_who_adopts_answers_as_if_it_had_packed(
    model: Path,
    tmp_path: Path,
    kernels: str,
    widths: str,
    how: dict[str, Any],
    kernel_calls: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Several at once, beside requests that are not evicted; one of them is thrown out, and adopts again."""
    from vllm_defensive.worker.cuda.runtime import CUDARuntime

    expected = packed_for_themselves(model, widths)
    fields = [{"kv_eviction_boundary": len(DOCUMENTS[document])} for document, _ in ASKED]
    for name in ("begin", "step"):
        monkeypatch.setattr(CUDARuntime, name, guarded(getattr(CUDARuntime, name), no_waiting))
    with engine(model, POLICY, audit=str(tmp_path), **settings(widths), **how) as llm:
        packers = generate(llm, PROMPTS[:2], TOKENS, extra_args=fields[:2])
        kernel_calls.clear()
        graphs.replays[0] = 0
        thrown_out = throw_one_out(llm, monkeypatch)
        # Strangers first: they take the packers' slots.
        others: list[dict[str, Any]] = [{"kv_eviction": "none"} for _ in STRANGERS]
        _, _, *adopters = generate(llm, STRANGERS + PROMPTS[2:], TOKENS, extra_args=others + fields[2:])
        told, kept, audited = metrics_of(llm), worker_of(llm)._runtime._kept, worker_of(llm)._evictor._audited
        # float32 roundings, in batches of several sizes, of logits up to 16
        assert largest_difference([*packers, *adopters], expected) <= 1e-4
        assert [answer.cached_tokens for answer in adopters] == [STOPS[document] for document, _ in ASKED[2:]]
        assert set(kernel_calls) == {"ragged_paged_decode"}, "nothing is scored or packed again"
        assert thrown_out[0].startswith(f"{adopters[-1].request_id}-") and told["vllm:num_preemptions"] == 1
        assert (told["vllm:kv_eviction_requests"], told["vllm:kv_eviction_adoptions"]) == (2, 3 + 1)
        assert told["vllm:kv_eviction_adopted_tokens"] == sum(
            STOPS[document] for document, _ in [*ASKED[2:], ASKED[-1]]
        )
        assert MODE != "pretend" or bool(graphs.replays[0]) == (how is GRAPHS)
        assert len(kept) == len(audited) == told["vllm:kv_eviction_published_packings"] == 2
        audits = [audit_of(tmp_path, answer.request_id) for answer in (*packers, *adopters)]
        for (document, _), audit in zip(ASKED, audits, strict=True):
            assert torch.equal(audit.mask(), audits[document].mask()) and not bool(audit.mask().all())
        assert_all_returned(llm)
        generate(llm, STRANGERS[1:], 1, extra_args=others[1:])
        assert not kept and not audited, "of what nobody can adopt any more"
