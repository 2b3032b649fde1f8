"""What the CUDA platform is given, and what it is refused, before a model is loaded; and fp8 caches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vllm_defensive
from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import core_of, generate, largest_difference, random_prompts, worker_of
from vllm_defensive.platforms import PLATFORMS

pytestmark = pytest.mark.e2e


def config_of(model: Path, **arguments: Any) -> Any:
    from vllm.engine.arg_utils import EngineArgs

    arguments = {**vllm_defensive.engine_kwargs("snapkv"), **arguments}
    return EngineArgs(model=str(model), **arguments).create_engine_config()


def test_worker_and_block_size_are_chosen(model: Path) -> None:
    config = config_of(model)
    assert config.parallel_config.worker_cls == PLATFORMS["cuda"].worker
    assert config.cache_config.block_size == 16
    assert config_of(model, block_size=48).cache_config.block_size == 48


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block_size": 24}, "block_size=24: .* choose a multiple of 16"),
        ({"attention_backend": "FLASHINFER"}, "attention_backend=FLASHINFER: .* choose FLASH_ATTN or TRITON_ATTN"),
        (
            {"attention_backend": "FLASH_ATTN", "kv_cache_dtype": "fp8"},
            "attention_backend=FLASH_ATTN with an fp8 KV cache: .* choose TRITON_ATTN",
        ),
        ({"kv_cache_dtype": "int8_per_token_head"}, "kv_cache_dtype=int8_per_token_head: .* use bfloat16 or fp8"),
    ],
    ids=["block", "backend", "fp8", "int8"],
)
def test_what_does_not_work_is_refused(model: Path, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_of(model, **arguments)


def test_policies_of_all_queries_are_refused(model: Path) -> None:
    """At the start, and of a request where the server has another policy."""
    from vllm.exceptions import VLLMValidationError

    with pytest.raises(ValueError, match="kv_eviction=h2o: supported on CPUs only"):
        config_of(model, **vllm_defensive.engine_kwargs("h2o"))
    with engine(model, "snapkv", dtype="float32") as llm:
        prompt = random_prompts((140,), seed=4)
        with pytest.raises(
            VLLMValidationError, match="kv_eviction='h2o': choose one of none, random, streamingllm, tova"
        ):
            generate(llm, prompt, 2, extra_args=[{"kv_eviction": "h2o"}])
        assert len(generate(llm, prompt, 2)[0].tokens) == 2


def test_the_old_model_runner_is_refused(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match=r"VLLM_USE_V2_MODEL_RUNNER=0: .* use model runner V2"):
        config_of(model)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_warm_up_runs_an_eviction_and_changes_nothing(model: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    prompts = random_prompts((140,), seed=4)
    with engine(model, "layer-defensivekv", dtype="float32", policies=["none"]) as llm:
        before = generate(llm, prompts, 4)
        kernel_calls.clear()
        worker_of(llm)._evictor.warm_up(1024)
        assert kernel_calls == {"window_scores": 1, "value_norm": 2, "list_kept": 1, "compact": 1}
        # From the cached prefix: a GPU multiplies 44 tokens with other kernels than 140, so that float32 sums of logits
        # up to 16 are rounded otherwise (3.6e-6 seen); 1e-4, as where engines are compared.
        assert largest_difference(generate(llm, prompts, 4), before) <= (0 if MODE == "pretend" else 1e-4)


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_warm_up_runs_every_policy_that_requests_may_name(
    model: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine(model, "snapkv", dtype="float32", policies=["snapkv", "halokv", "none", "random-uneven"]) as llm:
        evictor, warmed = worker_of(llm)._evictor, []
        weigh = evictor._weigh

        def weighed(dummy: Any, *rest: Any) -> Any:
            warmed.append(dummy.policy)
            return weigh(dummy, *rest)

        monkeypatch.setattr(evictor, "_weigh", weighed)
        evictor.warm_up(1024)
    assert warmed == ["snapkv", "halokv", "random-uneven"]


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
@pytest.mark.parametrize(
    "policies, looks, others",
    [
        (["kvzip"], 1, {"value_norm": 2, "window_scores": 1}),
        (["kvzip", "echokv"], 2, {"value_norm": 4, "window_scores": 2}),
    ],
    ids=["kvzip", "both"],
)
def test_warm_up_looks_at_echoes_and_runs_what_serves_those_that_cannot_be_repeated(
    model: Path, kernels: str, kernel_calls: dict[str, int], policies: list[str], looks: int, others: dict[str, int]
) -> None:
    """Once for each softmax; by halokv's kernels where there is no room for an echo."""
    with engine(model, policies[0], dtype="float32", policies=policies) as llm:
        kernel_calls.clear()
        worker_of(llm)._evictor.warm_up(1024)
        every = len(policies) + 1
        assert kernel_calls == {"reconstruction_scores": looks, "list_kept": every, "compact": every, **others}
        (answer,) = generate(llm, random_prompts((1000,), seed=4), 2)
        assert len(answer.tokens) == 2 and kernel_calls["reconstruction_scores"] == looks, "no room: halokv"


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_fp8_pages_are_moved_as_they_are_and_read_with_their_layers_scale(model: Path, kernels: str) -> None:
    """keep-all with a scale for each layer, against stock vLLM with the same."""
    prompts, answers = random_prompts((140, 70), seed=3), []
    for policy in (None, "keep-all"):
        with engine(model, policy, dtype="float32", kv_cache_dtype="fp8") as llm:
            config = core_of(llm).vllm_config.compilation_config
            for index, layer in enumerate(config.static_forward_context.values()):
                layer.query_quant = None  # stock vLLM would round queries to fp8 as well; eviction does not
                layer._k_scale_float, layer._v_scale_float = 0.5 + index, 0.25 + index
                layer._k_scale.fill_(0.5 + index)
                layer._v_scale.fill_(0.25 + index)
            answers.append(generate(llm, prompts, 5))
    assert largest_difference(*answers) <= 1e-4  # the same bytes, summed up in another order
