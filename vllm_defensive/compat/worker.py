"""What workers need of vLLM's insides: attention backends, batches, copies to the device."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from vllm_defensive.compat.base import patch


@contextlib.contextmanager
def cpu_attention_backend(class_path: str) -> Iterator[None]:
    """Let the CPU platform hand out `class_path` as its attention backend while a model is loaded.

    The CPU platform ignores the CUSTOM backend and always returns CPU_ATTN, which can be overridden by registration.
    The override ends with the load, so that another engine in the same process gets the stock backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    register_backend(AttentionBackendEnum.CPU_ATTN, class_path)
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()


@contextlib.contextmanager
def custom_attention_backend(vllm_config: Any, class_path: str) -> Iterator[None]:
    """Let the CUDA platform hand out `class_path` as its attention backend while a model is loaded.

    It does so for CUSTOM, which is a backend by registration in this very process. Afterwards the config says again
    what the user said, and another engine in the process gets the stock backend.
    """
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    from vllm.v1.attention.selector import _cached_get_attn_backend

    attention = vllm_config.attention_config
    chosen = attention.backend
    register_backend(AttentionBackendEnum.CUSTOM, class_path)
    _cached_get_attn_backend.cache_clear()
    attention.backend = AttentionBackendEnum.CUSTOM
    try:
        yield
    finally:
        attention.backend = chosen
        AttentionBackendEnum.CUSTOM.clear_override()
        _cached_get_attn_backend.cache_clear()


def prefers_flash_attention(vllm_config: Any) -> bool:
    """Whether prompts go through vLLM's FlashAttention: as the user chose, else where it runs this model. It takes fp8
    caches with fp8 queries only, which eviction does not want, so these are Triton attention's."""
    from vllm.platforms import current_platform

    chosen = vllm_config.attention_config.backend
    if chosen is not None:
        return bool(chosen.name == "FLASH_ATTN")
    model, cache = vllm_config.model_config, vllm_config.cache_config
    if cache.cache_dtype.startswith("fp8"):
        return False
    try:
        from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
        from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
    except (ImportError, OSError):
        return False
    return get_flash_attn_version() is not None and not FlashAttentionBackend.validate_configuration(
        head_size=model.get_head_size(),
        dtype=model.dtype,
        kv_cache_dtype=cache.cache_dtype,
        block_size=cache.block_size,
        use_mla=False,
        has_sink=_may_have_sinks(model.hf_text_config),
        use_sparse=False,
        use_mm_prefix=model.is_mm_prefix_lm,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type="decoder",
    )


def _may_have_sinks(config: Any) -> bool:
    """Whether layers of this model may have attention sinks, which not every FlashAttention takes. The layers say so
    when they are made; we choose before. If they have none after all, Triton's attention is slower, not wrong."""
    named = any("sink" in name and value for name, value in config.to_dict().items())
    granite = config.model_type.startswith("granite") and getattr(config, "layer_types", None) is not None
    return named or granite or config.model_type == "gpt_oss"


def keep_out_of_decode_graphs(model_runner: Any, when: Callable[[], bool]) -> None:
    """P5, installed only when eviction is on, on the runner of this worker. Why: a prompt whose last chunk is a single
    token counts as decode, and in a graph of the whole model nobody can keep its query. How: while `when()` holds, the
    runner is told that the batch has no uniform length, and takes a graph in pieces, or none. Until: a backend can tell
    the runner so for a step."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def gather_batch_req_state(*args: Any, **kwargs: Any) -> Any:
            batch, uniform_length = original(*args, **kwargs)
            return batch, None if when() else uniform_length

        return gather_batch_req_state

    patch(model_runner, "gather_batch_req_state", make)


def zero_blocks_by(model_runner: Any, clear: Callable[[Sequence[int]], None]) -> None:
    """P11, on the runner of this worker, where blocks are split into parts. Why: beside recurrent layers vLLM zeroes
    blocks before they are used, and on CPUs it takes their numbers for those of the parts, which are of other blocks.
    How: `clear(block_ids)` instead. Until: vLLM counts parts there as it does on GPUs."""

    def make(original: Callable[..., Any]) -> Callable[..., Any]:
        def _zero_block_ids(block_ids: list[int]) -> None:
            clear(block_ids)

        return _zero_block_ids

    patch(model_runner, "_zero_block_ids", make)


def request_ids_of(model_runner: Any) -> Callable[[Any], Sequence[str]]:
    """From a batch's `CommonAttentionMetadata` to the request id of each of its rows, for either model runner."""
    if hasattr(model_runner, "req_states"):
        states = model_runner.req_states

        def v2(common: Any) -> Sequence[str]:
            return [states.index_to_req_id[int(i)] for i in common.req_idx[: common.num_reqs]]

        return v2

    def v1(common: Any) -> Sequence[str]:
        return model_runner.input_batch.req_ids[: common.num_reqs]

    return v1


def to_device(values: Sequence[int], device: Any) -> Any:
    """int32 tensor of these numbers on the device; nobody waits for the copy."""
    import torch
    from vllm.utils.torch_utils import async_tensor_h2d

    return async_tensor_h2d(list(values), device=device, dtype=torch.int32)


def copy_to_device(array: Any, out: Any) -> None:
    """Copy a NumPy array into a device tensor; nobody waits for the copy, and the array may be used again at once."""
    from vllm.utils.torch_utils import async_tensor_h2d

    async_tensor_h2d(array, out=out)
