"""Answers that are evicted, too: what is packed and what lies behind is chosen from again while a request generates."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.cuda import graphs
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import (
    Answer,
    assert_all_returned,
    audits_of,
    generate,
    largest_difference,
    metrics_of,
    random_prompts,
    scheduler_of,
    worker_of,
)
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive import audit
from vllm_defensive.plan import Eviction
from vllm_defensive.settings.engine import EvictionConfig

pytestmark = pytest.mark.e2e
REFERENCE = pytest.mark.parametrize("kernels", ["reference"], indirect=True)
FLOAT32 = 1e-4  # a few hundred float32 roundings of logits up to 16
PROMPTS = random_prompts((100, 20, 129), seed=3)
TOKENS = 150
SETTINGS = {"dtype": "float32", "answers": "evict"}


@REFERENCE
@pytest.mark.nightly
def test_keeping_all_of_an_answer_equals_stock(model: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    """Packed at the end of the prompts that are long enough, and every 32 tokens."""
    with engine(model, dtype="float32") as llm:
        expected = generate(llm, PROMPTS, 70)
    with engine(model, "keep-all", interval=32, **SETTINGS) as llm:
        assert "Async" in type(scheduler_of(llm)).__name__
        answers = generate(llm, PROMPTS, 70)
        assert largest_difference(answers, expected) <= FLOAT32
        assert kernel_calls["compact"] == 2 + 2 * len(PROMPTS)
        assert_all_returned(llm)
        generate(llm, PROMPTS[1:2], 1)
        assert not len(worker_of(llm)._evictor._known), "what was known of them went with them"


def assert_follows(reference: ReferenceLlama, folder: Path, prompt: list[int], answer: Answer) -> list[Any]:
    """The plain model sees, of each token, what the last audit before it says."""
    events = audits_of(folder, answer.request_id)
    masks = [event.mask() for event in events]
    seen = [(event.first_reader, mask) for event, mask in zip(events, masks, strict=True)]
    expected = decode_logprobs(reference, prompt, answer.tokens, None, again=seen)
    assert (answer.logprobs - expected).abs().max() <= FLOAT32
    for earlier, later in itertools.pairwise(masks):
        assert not (later[..., : earlier.shape[2]] & ~earlier).any(), "what is gone is gone"
    return events


def settings(reference: ReferenceLlama, model: Path, folder: Path, policy: str) -> dict[str, Any]:
    learned = {}
    if "learned" in policy:
        score_of(reference, model, folder / "score")
        learned["learned"] = str(folder / "score")
    return {**SETTINGS, "interval": 48, "budget": 64, "audit": str(folder), "policies": [policy], **learned}


@REFERENCE
@pytest.mark.parametrize(
    "policy",
    [
        "random-uneven",
        *(
            pytest.param(name, marks=pytest.mark.nightly)
            for name in ("random", "streamingllm", "learnedkv", "learned-halokv")
        ),
    ],
)
def test_answers_follow_the_plain_model(model: Path, tmp_path: Path, kernels: str, policy: str) -> None:
    reference = ReferenceLlama(model)
    with engine(model, policy, **settings(reference, model, tmp_path, policy)) as llm:
        answers = generate(llm, PROMPTS, TOKENS)
        assert_all_returned(llm)
    told = [assert_follows(reference, tmp_path, *pair) for pair in zip(PROMPTS, answers, strict=True)]
    # At 33 tokens or more a request can be evicted: the second prompt is looked at 48 tokens after its end.
    assert [[event.repeat for event in events] for events in told] == [[0, 1, 2, 3], [0, 1], [0, 1, 2, 3]]
    assert max(event.packed_blocks for events in told for event in events) == 64 // 16


@REFERENCE
@pytest.mark.parametrize(
    "ahead",
    [pytest.param(False, id="one step at a time"), pytest.param(True, id="a step ahead")],
)
@pytest.mark.nightly
def test_requests_that_are_thrown_out_pass_the_same_evictions_again(
    model: Path, tmp_path: Path, kernels: str, ahead: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep is what they kept: else what they had generated would not follow from it."""
    reference = ReferenceLlama(model)
    kept: dict[tuple[str, int], list[torch.Tensor]] = {}
    record = audit.record

    def noting(folder: str, event: Eviction, parts: Any, rank: tuple[int, int]) -> None:
        record(folder, event, parts, rank)
        mask_LHT = audit.load(audit.path_of(folder, event.request_id, rank, event.repeat)).mask()
        kept.setdefault((event.request_id, event.repeat), []).append(mask_LHT)

    monkeypatch.setattr(audit, "record", noting)
    options = settings(reference, model, tmp_path, "random-uneven") | {"async_scheduling": ahead}
    with engine(model, "random-uneven", **options) as llm:
        scheduler, steps = scheduler_of(llm), iter(range(1000))
        schedule = scheduler.schedule

        def throwing_out(*args: Any) -> Any:
            if next(steps) == 110:
                scheduler.reset_prefix_cache(reset_running_requests=True)
            return schedule(*args)

        monkeypatch.setattr(scheduler, "schedule", throwing_out)
        answers = generate(llm, PROMPTS, TOKENS)
        assert metrics_of(llm)["vllm:num_preemptions"] == len(PROMPTS)
        assert_all_returned(llm)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert_follows(reference, tmp_path, prompt, answer)
    assert sorted(repeat for (_, repeat), masks in kept.items() if len(masks) == 2) == [0, 0, 0, 1, 1, 2, 2]
    for masks in kept.values():
        assert all(torch.equal(masks[0], mask) for mask in masks)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_the_kernels_keep_the_same_and_nothing_waits_for_them(
    model: Path, tmp_path: Path, kernels: str, kernel_calls: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """From graphs, where there are any: a replay finds what has become of a request since."""
    from tests.cuda.test_engine_waits import guarded, no_waiting
    from vllm_defensive.worker.cuda.evictor import CUDAEvictor
    from vllm_defensive_kernels import formulas

    reference = ReferenceLlama(model)
    arguments = settings(reference, model, tmp_path, "learnedkv") | {
        "interval": 16,
        "window": 16,
        "enforce_eager": False,
    }
    audited = arguments.pop("audit")
    if MODE == "pretend":  # nothing compiled, so no graphs in pieces
        sizes = {"cudagraph_mode": "FULL_DECODE_ONLY", "cudagraph_capture_sizes": [1, 2]}
        arguments["compilation_config"] = {"custom_ops": ["none"], "mode": 0, **sizes}
        monkeypatch.setattr(formulas, "on_host", lambda tensor: False)
    prompts = random_prompts((70, 85), seed=8)
    with engine(model, "learnedkv", max_num_seqs=2, audit=audited, **arguments) as llm:
        if MODE == "gpu":  # the first call compiles
            worker_of(llm)._evictor.warm_up(1024)
        for name in ("score", "pack"):  # an audit does wait
            monkeypatch.setattr(CUDAEvictor, name, guarded(getattr(CUDAEvictor, name), no_waiting))
        kernel_calls.clear()
        graphs.replays[0] = 0
        answers = generate(llm, prompts, 36)
    events = [assert_follows(reference, tmp_path, *pair) for pair in zip(prompts, answers, strict=True)]
    repeats = [len(some) - 1 for some in events]
    assert min(repeats) > 0 and max(repeats) == 2
    # All layers in one launch, of what lies behind; of prompts, one a layer.
    assert kernel_calls["learned_page_scores"] == sum(repeats) and kernel_calls["learned_scores"] == 2 * 2
    assert MODE != "pretend" or graphs.replays[0] >= 30


@REFERENCE
@pytest.mark.parametrize("policy", ["random-uneven", pytest.param("learnedkv", marks=pytest.mark.nightly)])
def test_when_memory_is_short_answers_follow_the_plain_model(
    model: Path, tmp_path: Path, kernels: str, policy: str
) -> None:
    """Three that need 65 blocks in 40, packed when somebody needs one, and again with nothing behind what is packed."""
    reference, prompts = ReferenceLlama(model), random_prompts((260, 300, 280), seed=4)
    own = settings(reference, model, tmp_path, policy) | {"answers": "keep", "when": "full"}
    del own["interval"], own["budget"]
    with engine(model, policy, keep=0.2, num_gpu_blocks_override=41, max_model_len=400, **own) as llm:
        answers = generate(llm, prompts, 60)
        totals = scheduler_of(llm).eviction_manager.lifecycle.totals
        assert totals.late == totals.requests + totals.repeats and totals.repeats > 0
        assert metrics_of(llm)["vllm:num_preemptions"] == 0
        assert_all_returned(llm)
    told = [assert_follows(reference, tmp_path, *pair) for pair in zip(prompts, answers, strict=True)]
    assert sum(map(len, told)) == totals.late
    assert all(event.stop == len(prompt) for prompt, events in zip(prompts, told, strict=True) for event in events)


@REFERENCE
def test_a_worker_that_knows_nothing_of_a_packing_leaves_it_as_it_is(
    model: Path, tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm_defensive.worker.cuda.evictor import CUDAEvictor

    reference = ReferenceLlama(model)
    options = settings(reference, model, tmp_path, "random-uneven")
    with engine(model, "random-uneven", may_decline=True, **options) as llm:
        monkeypatch.setattr(CUDAEvictor, "_score", forgetful(CUDAEvictor._score))
        answers = generate(llm, PROMPTS[:1], 60)
        assert scheduler_of(llm).eviction_manager.lifecycle.totals.cancelled == 1
        assert_all_returned(llm)
    (event,) = assert_follows(reference, tmp_path, PROMPTS[0], answers[0])
    assert event.repeat == 0


def forgetful(score: Any) -> Any:
    def call(self: Any, wanted: Any) -> Any:
        self._known.forget([wanted.request_id])
        return score(self, wanted)

    return call


@REFERENCE
def test_what_is_compiled_and_set_aside_at_start(model: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    """By the engine's settings, and then a request may say otherwise; without them it cannot."""
    from vllm.exceptions import VLLMValidationError

    reserved = []
    for answers in ("keep", "evict"):
        with engine(model, "random", dtype="float32", answers=answers, policies=["random"]) as llm:
            kernel_calls.clear()
            worker_of(llm)._evictor.warm_up(1024)
            assert kernel_calls["compact"] == (1 if answers == "keep" else 3)
            names = worker_of(llm)._evictor._projections._names
            reserved.append(worker_of(llm)._beside_cache(names).scores)
            assert not len(worker_of(llm)._evictor._known)
            asks = [{"kv_eviction_answers": "evict"}]
            if answers == "keep":
                with pytest.raises(
                    VLLMValidationError, match="kv_eviction_answers='evict': this server, on a GPU, was"
                ):
                    generate(llm, PROMPTS[1:2], 1, extra_args=asks)
            else:
                generate(llm, PROMPTS[1:2], 1, extra_args=asks)
    assert reserved[1] > reserved[0]


def test_policies_that_go_on_by_another_have_that_one_compiled() -> None:
    config = EvictionConfig(policy="learned-halokv", policies=("learned-halokv",), learned="a file", answers="evict")
    assert config.served == ["learned-halokv", "halokv", "learnedkv"]
