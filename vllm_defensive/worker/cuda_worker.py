"""The worker on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from vllm_defensive import vllm_compat
from vllm_defensive.worker.cuda_backend import EvictionImpl
from vllm_defensive.worker.cuda_evictor import CUDAEvictor, LayerScales
from vllm_defensive.worker.cuda_runtime import CUDARuntime
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive.worker.worker import EvictionWorker, logger
from vllm_defensive_kernels import PagedKV

_FLASH = "vllm_defensive.worker.cuda_flash.EvictionFlashBackend"
_TRITON = "vllm_defensive.worker.cuda_triton.EvictionTritonBackend"


class EvictionGPUWorker(EvictionWorker):
    """vLLM's GPU worker, with model runner V2, and eviction."""

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with our attention backend, on top of the one that the user asked for or that fits."""
        path = _FLASH if vllm_compat.prefers_flash_attention(self.vllm_config) else _TRITON
        with vllm_compat.custom_attention_backend(self.vllm_config, path):
            super().load_model(*args, **kwargs)

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
        vllm_compat.keep_out_of_decode_graphs(self.model_runner, lambda: runtime.observing)
        projections = Projections(self.model_runner.get_model(), names, first.num_heads, first.head_size)
        scales = [LayerScales(layer._k_scale_float, layer._v_scale_float) for layer in layers]
        logger.info("KV eviction decodes with its own kernel; prompts take %s", first.get_attn_backend().get_name())
        return runtime, CUDAEvictor(self.eviction, runtime, first.impl.scale, scales, projections, self.rank == 0)


def _check(name: str, layer: Any, block_size: int) -> None:
    """Refuse what the decode kernel does not compute. Raises ValueError."""
    impl = layer.impl
    assert isinstance(impl, EvictionImpl), f"{name} has another attention backend"
    for wrong, what in (
        (impl.alibi_slopes is not None, "ALiBi"),
        (impl.sinks is not None, "attention sinks"),
        (impl.logits_soft_cap not in (None, 0), "a soft cap on logits"),
        (layer.kv_sharing_target_layer_name is not None, "another layer's KV cache"),
        (layer.kv_cache.shape[2] != block_size, f"kernel blocks of {layer.kv_cache.shape[2]} tokens"),
    ):
        if wrong:
            raise ValueError(f"kv_eviction: layer {name} uses {what}, which is not supported on CUDA; set it to none")


def _typed(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """A layer's cache `[blocks, H, N, 2*D]` with its numbers' own dtype; vLLM keeps fp8 as bytes."""
    if not kv_cache_dtype.startswith("fp8"):
        return cache
    return cache.view(torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)
