"""What is refused at start: the message names the option and the way out."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from vllm_defensive import limits, platforms
from vllm_defensive.settings import engine as config
from vllm_defensive.settings import request

SETTINGS = config.parse({"policy": "snapkv", "window": 32, "min_tokens": 256})
assert SETTINGS is not None


def vllm_config(**changes: Any) -> Any:
    """A config that is accepted, with changes such as `parallel_config__tensor_parallel_size=2`."""
    made = SimpleNamespace(
        model_config=SimpleNamespace(
            runner_type="generate",
            is_encoder_decoder=False,
            is_diffusion=False,
            dtype=torch.bfloat16,
            max_model_len=4096,
            get_sliding_window=lambda: 512,
            use_mla=False,
            model="some/model",
            get_total_num_kv_heads=lambda: 6,
            get_head_size=lambda: 512,
            is_mm_prefix_lm=False,
            is_hybrid=False,
            attention_chunk_size=None,
        ),
        parallel_config=SimpleNamespace(
            worker_cls=platforms.PLATFORMS["cpu"].worker,
            tensor_parallel_size=1,
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            use_ubatching=False,
        ),
        cache_config=SimpleNamespace(
            cache_dtype="auto", kv_cache_dtype_skip_layers=[], enable_prefix_caching=True, prefix_match_unit=None
        ),
        scheduler_config=SimpleNamespace(max_num_batched_tokens=512, disable_hybrid_kv_cache_manager=False),
        speculative_config=None,
        kv_transfer_config=None,
        ec_transfer_config=None,
    )
    for name, value in changes.items():
        part, _, attribute = name.rpartition("__")
        setattr(getattr(made, part) if part else made, attribute, value)
    return made


ON_GPU = {
    "parallel_config__worker_cls": platforms.PLATFORMS["cuda"].worker,
    "attention_config": SimpleNamespace(backend=None, backend_per_kind=None),
    "use_v2_model_runner": True,
}
REFUSED = [
    ({"parallel_config__tensor_parallel_size": 4}, "tensor_parallel_size=4", "divisor of the model's 6 KV heads"),
    ({"parallel_config__tensor_parallel_size": 12}, "tensor_parallel_size=12", "divisor of the model's 6 KV heads"),
    *(
        ({"speculative_config": SimpleNamespace(method=method)}, f"speculative_config.method={method}", "use ngram")
        for method in ("draft_model", "eagle", "mtp", "medusa", "suffix", "ngram_gpu")
    ),
    ({"parallel_config__pipeline_parallel_size": 2}, "pipeline_parallel_size=2", "use 1"),
    ({"parallel_config__decode_context_parallel_size": 2}, "decode_context_parallel_size=", "use 1"),
    ({"parallel_config__prefill_context_parallel_size": 2}, "prefill_context_parallel_size=", "use 1"),
    ({"parallel_config__use_ubatching": True}, "enable_dbo=True", "turn micro-batching off"),
    ({"kv_transfer_config": object()}, "kv_transfer_config=set", "drop it"),
    ({"cache_config__kv_sharing_fast_prefill": True}, "kv_sharing_fast_prefill=True", "drop it"),
    ({"ec_transfer_config": object()}, "ec_transfer_config=set", "drop it"),
    ({"model_config__runner_type": "pooling"}, "runner=pooling", "use a model that generates text"),
    ({"model_config__is_encoder_decoder": True}, "model=some/model", "use a decoder-only model"),
    ({"model_config__use_mla": True}, "model=some/model (multi-head latent attention)", "use a model with KV heads"),
    ({"cache_config__cache_dtype": "nvfp4"}, "kv_cache_dtype=nvfp4", "use bfloat16, also where it is the"),
    ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype=fp8", "use bfloat16, also where it is the checkpoint"),
    ({"model_config__is_diffusion": True}, "model=some/model (discrete diffusion)", "one token after the other"),
    (
        {"scheduler_config__disable_hybrid_kv_cache_manager": True},
        "disable_hybrid_kv_cache_manager=True",
        "drop --disable-hybrid-kv-cache-manager",
    ),
    ({"cache_config__kv_cache_dtype_skip_layers": ["0"]}, "kv_cache_dtype_skip_layers=['0']", "drop it"),
    ({"scheduler_config__max_num_batched_tokens": 31}, "kv_eviction_window=32", "max_num_batched_tokens=31"),
    (
        {"model_config__is_hybrid": True, "speculative_config": SimpleNamespace(method="ngram")},
        "speculative_config.method=ngram",
        "drop it: a recurrent layer's state",
    ),
    (
        {"model_config__is_hybrid": True, "cache_config__prefix_match_unit": 16},
        "prefix_match_unit=16",
        "drop it: of models with recurrent layers",
    ),
]


@pytest.mark.parametrize("changes, option, way_out", REFUSED, ids=[next(iter(changes)) for changes, _, _ in REFUSED])
def test_unsupported_combinations_name_the_option_and_the_way_out(
    changes: dict[str, Any], option: str, way_out: str
) -> None:
    with pytest.raises(ValueError) as error:
        limits.check(vllm_config(**changes), SETTINGS)
    message = str(error.value)
    assert message.startswith(option) and way_out in message and config.TURN_OFF in message
    assert "\n" not in message


def test_a_plain_config_is_accepted() -> None:
    limits.check(vllm_config(), SETTINGS)
    limits.check(vllm_config(parallel_config__tensor_parallel_size=2), SETTINGS)
    limits.check(vllm_config(speculative_config=SimpleNamespace(method="ngram")), SETTINGS)


def test_the_server_in_rust_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """It would pass wrong fields on to the scheduler, which then evicts nothing, and has no metrics of ours."""
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "0")
    limits.check(vllm_config(), SETTINGS)
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match=r"^VLLM_USE_RUST_FRONTEND=1: .* unset it.*--kv-eviction none"):
        limits.check(vllm_config(), SETTINGS)


def test_batch_invariance_is_not_promised(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match=r"^VLLM_BATCH_INVARIANT=1: .* unset it.*--kv-eviction none"):
        limits.check(vllm_config(), SETTINGS)


@pytest.mark.parametrize("window", [None, 4096])
def test_one_kind_of_cache_needs_no_hybrid_manager(window: int | None) -> None:
    changes = {"scheduler_config__disable_hybrid_kv_cache_manager": True}
    changes["model_config__get_sliding_window"] = lambda: window
    limits.check(vllm_config(**changes), SETTINGS)
    for more in ({"model_config__attention_chunk_size": 128}, {"model_config__is_hybrid": True}):
        with pytest.raises(ValueError, match=r"^disable_hybrid_kv_cache_manager=True: .* drop --disable-hybrid"):
            limits.check(vllm_config(**changes, **more), SETTINGS)


@pytest.mark.parametrize("changes", [{"is_hybrid": True}, {"attention_chunk_size": 128}], ids=repr)
def test_recurrent_layers_and_chunks_are_beside_evicted_ones_on_cpus_alone(changes: dict[str, Any]) -> None:
    named = {f"model_config__{name}": value for name, value in changes.items()}
    limits.check(vllm_config(**named), SETTINGS)
    with pytest.raises(ValueError, match=r"^model=some/model \(.*\): .*; evict such models on CPUs, or turn"):
        limits.check(vllm_config(**ON_GPU, **named), SETTINGS)


def test_a_window_longer_than_the_shortest_prompt_is_refused() -> None:
    settings = config.parse({"policy": "snapkv", "window": 32, "min_tokens": 31})
    assert settings is not None
    with pytest.raises(ValueError, match=r"kv_eviction_window=32: choose at most kv_eviction_min_tokens=31"):
        limits.check(vllm_config(), settings)


def test_a_folder_for_audits_is_made_or_refused_at_start(tmp_path: Path) -> None:
    """Refused later, it would end the engine at its first eviction."""
    file = tmp_path / "file"
    file.touch()
    for folder, allowed in ((tmp_path / "new" / "folder", True), (file, False), (file / "below", False)):
        settings = config.parse({"policy": "snapkv", "audit": str(folder)})
        assert settings is not None
        if allowed:
            limits.check(vllm_config(), settings)
            assert folder.is_dir() and folder.stat().st_mode & 0o77 == 0
        else:
            with pytest.raises(ValueError, match=r"kv_eviction_audit=.*: name a folder that can be written to"):
                limits.check(vllm_config(), settings)


@pytest.mark.parametrize("settings", [{"policy": "h2o"}, {"policy": "snapkv", "policies": "adakv,h2o"}], ids=repr)
def test_policies_that_only_cpus_have_are_refused_on_gpus(settings: dict[str, Any]) -> None:
    parsed = config.parse(settings)
    assert parsed is not None
    limits.check(vllm_config(), parsed)
    field = "kv_eviction_policies" if "policies" in settings else "kv_eviction"
    with pytest.raises(ValueError, match=f"^{field}=h2o: supported on CPUs only"):
        limits.check(vllm_config(**ON_GPU), parsed)


def test_heads_that_no_kernel_has_tiles_for_are_refused_on_gpus() -> None:
    limits.check(vllm_config(**ON_GPU), SETTINGS)
    wide = {"model_config__get_head_size": lambda: 576}
    limits.check(vllm_config(**wide), SETTINGS)
    with pytest.raises(ValueError, match=r"^model=some/model \(heads of 576 numbers\): .* at most 512, or .*none"):
        limits.check(vllm_config(**ON_GPU, **wide), SETTINGS)


def test_vllms_own_classes_get_through_the_check(tiny_model: Path) -> None:
    """`check` reads attributes that vLLM's real config has; a renamed one must not pass unseen."""
    from vllm.engine.arg_utils import EngineArgs

    import vllm_defensive
    from vllm_defensive.plugin import register

    register()
    extra = vllm_defensive.engine_kwargs("snapkv")
    real = EngineArgs(model=str(tiny_model), max_model_len=512, **extra).create_engine_config()
    for name in vars(vllm_config()):
        assert hasattr(real, name), name
        part = getattr(vllm_config(), name)
        for attribute in vars(part) if isinstance(part, SimpleNamespace) else ():
            assert hasattr(getattr(real, name), attribute), f"{name}.{attribute}"


def test_on_a_gpu_answers_are_evicted_where_the_server_says_so_and_nowhere_else() -> None:
    """It takes kernels and memory, which are there from the start or not at all."""
    gpu, asks = platforms.PLATFORMS["cuda"], {"kv_eviction_answers": "evict"}
    for answers in ("keep", "evict"):
        settings = config.parse({"policy": "streamingllm", "answers": answers, "policies": ["snapkv"]})
        assert settings is not None
        assert request.resolve(settings, asks, 300).answers == "evict"
        on_gpu = platforms.choose_repeats(settings, gpu)
        limits.check(vllm_config(**ON_GPU), on_gpu)
        assert platforms.choose_repeats(settings, platforms.PLATFORMS["cpu"]) == settings
        if answers == "keep":
            with pytest.raises(
                ValueError, match=r"^kv_eviction_answers='evict': this server, on a GPU, was started without"
            ):
                request.resolve(on_gpu, asks, 300)
            assert request.resolve(on_gpu, {"kv_eviction_keep": 0.5}, 300).answers == "keep"
            continue
        assert request.resolve(on_gpu, asks, 300).answers == "evict"
        with pytest.raises(ValueError, match=r"snapkv evicts a request once; choose from streamingllm$"):
            request.resolve(on_gpu, {**asks, "kv_eviction": "snapkv"}, 300)
        assert request.resolve(on_gpu, {"kv_eviction": "snapkv"}, 300).answers == "keep"


@pytest.mark.parametrize(
    "given, on_gpu, told",
    [
        ({"policy": "kvzip", "answers": "evict"}, False, "kv_eviction_answers=evict: kvzip evicts a request once"),
        ({"policy": "rdkv", "prompts": "bounded"}, False, "kv_eviction_prompts=bounded: rdkv evicts a request once"),
        ({"policy": "snapkv", "answers": "evict"}, True, "kv_eviction_answers=evict: snapkv evicts a request once"),
        ({"policy": "random", "prompts": "bounded"}, True, "kv_eviction_prompts=bounded: supported on CPUs only"),
        (
            {"policy": "random", "answers": "evict", "widths": "4"},
            False,
            "goes with kv_eviction_widths 16, 8, k8v4, not 4",
        ),
        ({"policy": "random", "answers": "evict", "widths": "8"}, True, "goes with kv_eviction_widths 16, not 8"),
        ({"policy": "random", "answers": "evict", "interval": 16}, False, "kv_eviction_interval=16: choose at least"),
        ({"policy": "random", "prompts": "bounded", "prompt_interval": 9}, False, "prompt_interval=9: choose at least"),
    ],
)
def test_what_cannot_be_evicted_more_than_once_is_refused(given: dict[str, Any], on_gpu: bool, told: str) -> None:
    settings = config.parse(given)
    assert settings is not None
    settings = platforms.choose_repeats(settings, platforms.PLATFORMS["cuda" if on_gpu else "cpu"])
    with pytest.raises(ValueError, match=told):
        limits.check(vllm_config(**(ON_GPU if on_gpu else {})), settings)


@pytest.mark.parametrize(
    "given, on_gpu, told",
    [
        ({"policy": "kvzip"}, False, "kv_eviction_when=full: kvzip cannot evict so late; choose one of auto, random"),
        ({"policy": "h2o"}, False, "h2o cannot evict so late"),
        ({"policy": "snapkv"}, True, "snapkv cannot evict so late; choose one of random, streamingllm"),
        (
            {"policy": "snapkv", "answers": "evict"},
            False,
            "snapkv cannot evict so late; choose one of random, streamingllm",
        ),
        ({"policy": "random", "prompts": "bounded"}, False, "leave kv_eviction_prompts out"),
        ({"policy": "random", "widths": "4"}, False, "goes with kv_eviction_widths 16, 8, k8v4, not 4"),
    ],
)
def test_what_cannot_be_evicted_when_memory_is_short_is_refused(given: dict[str, Any], on_gpu: bool, told: str) -> None:
    settings = config.parse({"when": "full", **given})
    assert settings is not None
    settings = platforms.choose_repeats(settings, platforms.PLATFORMS["cuda" if on_gpu else "cpu"])
    with pytest.raises(ValueError, match=told):
        limits.check(vllm_config(**(ON_GPU if on_gpu else {})), settings)
    limits.check(
        vllm_config(**(ON_GPU if on_gpu else {})),
        settings.model_copy(update={"when": "always", "answers": "keep", "prompts": "whole"}),
    )
