"""The worker on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from vllm_defensive.compat import worker as compat
from vllm_defensive.worker.cuda.backend import EvictionImpl
from vllm_defensive.worker.cuda.evictor import CUDAEvictor, LayerScales
from vllm_defensive.worker.cuda.launches import SCORES_AT_A_TIME
from vllm_defensive.worker.cuda.runtime import CUDARuntime, widest_launch
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive.worker.worker import EvictionWorker, logger
from vllm_defensive_kernels import PagedKV

SCORE_COPIES = 8  # of all layers' scores: weighed, stacked, sorted (with int64 indices), and what sorting takes
SETTLE_COPIES = 16  # of those of the layers that are weighed in one go: temporaries, those of another sort among them
_FLASH = "vllm_defensive.worker.cuda.flash.EvictionFlashBackend"
_TRITON = "vllm_defensive.worker.cuda.triton.EvictionTritonBackend"


class EvictionGPUWorker(EvictionWorker):
    """vLLM's GPU worker, with model runner V2, and eviction."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with our attention backend, on top of the one that the user asked for or that fits."""
        path = _FLASH if compat.prefers_flash_attention(self.vllm_config) else _TRITON
        with compat.custom_attention_backend(self.vllm_config, path):
            super().load_model(*args, **kwargs)

    def determine_available_memory(self) -> int:
        """What vLLM found, less what eviction takes beside the KV cache, unless the user has set the cache's size."""
        available: int = super().determine_available_memory()
        if self.cache_config.kv_cache_memory_bytes:
            return available
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [layer for layer in context.values() if isinstance(getattr(layer, "impl", None), EvictionImpl)]
        model, scheduler = self.model_config, self.vllm_config.scheduler_config
        prompts = max(1, scheduler.max_num_batched_tokens // self.eviction.min_tokens)
        reserved = memory_beside_cache(
            num_layers=len(layers),
            num_query_heads=layers[0].num_heads,
            num_kv_heads=layers[0].num_kv_heads,
            head_size=layers[0].head_size,
            window_bytes=self.eviction.window * torch.finfo(model.dtype).bits // 8,
            max_tokens=model.max_model_len,
            max_requests=scheduler.max_num_seqs,
            prompts_at_once=min(prompts, scheduler.max_num_seqs),
        )
        logger.info("KV eviction sets %.2f GiB aside, most of it for the longest prompt", reserved / 2**30)
        return available - reserved

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up, before which the kernels of an eviction are compiled, unless the user has warm-ups off."""
        if self.vllm_config.kernel_config.enable_jit_warmup and isinstance(self._evictor, CUDAEvictor):
            self._evictor.warm_up(self.model_config.max_model_len)
        return super().compile_or_warm_up_model()

    def start_eviction(self, group: int, names: list[str], layers: list[Any]) -> tuple[CUDARuntime, CUDAEvictor]:
        first, model, requests = layers[0], self.model_config, self.model_runner.req_states
        for name, layer in zip(names, layers, strict=True):
            _check(name, layer, self.cache_config.block_size)
        caches = [_typed(layer.kv_cache, first.kv_cache_dtype) for layer in layers]
        pages = PagedKV.from_layers(caches)
        device = pages.key_PND.device
        windows = WindowQueries(
            len(layers), self.eviction.window, first.num_heads, first.head_size, model.dtype, device
        )
        runtime = CUDARuntime(
            pages,
            windows,
            requests.req_id_to_index,
            max_requests=requests.max_num_reqs,
            max_blocks=cdiv(model.max_model_len, pages.page_tokens),
            num_query_heads=first.num_heads,
        )
        for index, layer in enumerate(layers):
            layer.impl.runtime, layer.impl.layer_index = runtime, index
        for attention_group in self.model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.runtime = runtime
        compat.keep_out_of_decode_graphs(self.model_runner, lambda: runtime.observing)
        projections = Projections(self.model_runner.get_model(), names, first.num_heads, first.head_size)
        scales = [LayerScales(layer.impl.scale, layer._k_scale_float, layer._v_scale_float) for layer in layers]
        logger.info("KV eviction decodes with its own kernel; prompts take %s", first.get_attn_backend().get_name())
        return runtime, CUDAEvictor(self.eviction, runtime, scales, projections, self.tensor_rank, self.reduce_heads)


def memory_beside_cache(
    *,
    num_layers: int,
    num_query_heads: int,
    num_kv_heads: int,
    head_size: int,
    window_bytes: int,
    max_tokens: int,
    max_requests: int,
    prompts_at_once: int,
) -> int:
    """Bytes that eviction allocates at most, by count of its tensors; vLLM's profile run has no prompt to evict.

    window_bytes: of one query entry in each token of the window. prompts_at_once: whose windows are kept in one step.
    """
    rows, splits = widest_launch(max_requests, num_query_heads, num_kv_heads)
    decode = rows * splits * num_query_heads * (head_size + 1) * 4
    windows = prompts_at_once * num_layers * num_query_heads * head_size * window_bytes
    layer = num_kv_heads * max_tokens
    at_a_time = min(num_layers * layer, max(SCORES_AT_A_TIME, layer))
    scores = (SCORE_COPIES * num_layers * layer + SETTLE_COPIES * at_a_time) * 4
    return decode + windows + scores


def _check(name: str, layer: Any, block_size: int) -> None:
    """Refuse caches whose blocks vLLM has split for its own kernels. Raises ValueError."""
    assert isinstance(layer.impl, EvictionImpl), f"{name} has another attention backend"
    if (kernel_block := layer.kv_cache.shape[2]) != block_size:
        raise ValueError(f"block_size={block_size}: layer {name} splits it; choose {kernel_block} with --kv-eviction")


def _typed(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """A layer's cache `[blocks, H, N, 2*D]` with its numbers' own dtype; vLLM keeps fp8 as bytes."""
    if not kv_cache_dtype.startswith("fp8"):
        return cache
    return cache.view(torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)
