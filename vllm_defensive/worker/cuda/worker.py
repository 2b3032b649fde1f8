"""The worker on NVIDIA GPUs."""

from __future__ import annotations

from typing import Any

import torch
from vllm.utils.math_utils import cdiv

from vllm_defensive.compat import worker as compat
from vllm_defensive.engine.spec import EvictableSpec
from vllm_defensive.packing import ECHO_OVERHEAD, ECHO_REQUESTS, ECHO_TOKENS
from vllm_defensive.platforms import PLATFORMS
from vllm_defensive.policy import PRESETS
from vllm_defensive.worker.cuda.backend import EvictionImpl
from vllm_defensive.worker.cuda.evictor import CUDAEvictor
from vllm_defensive.worker.cuda.memory import BesideCache, Model, kept_share
from vllm_defensive.worker.cuda.prompt import LayerScales
from vllm_defensive.worker.cuda.runtime import CUDARuntime
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive.worker.worker import EvictionWorker, logger
from vllm_defensive_kernels import PagedKV

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
        specs = {name: spec for name, spec in self.get_kv_cache_spec().items() if isinstance(spec, EvictableSpec)}
        if not specs:
            return available  # such a model is refused later, by the layers that it has
        left = available - self._beside_cache(list(specs)).total
        if self.eviction.again_or_late:
            spec = next(iter(specs.values()))
            left = int(left / (1 + kept_share(spec.head_size, spec.dtype.itemsize)))
        logger.info("KV eviction sets %.2f GiB aside, most of it for the longest prompt", (available - left) / 2**30)
        return left

    def _beside_cache(self, names: list[str]) -> BesideCache:
        """For the layers of these names."""
        context = self.vllm_config.compilation_config.static_forward_context
        readers, names = Readers.find(names, context)
        first, scheduler = context[names[0]], self.vllm_config.scheduler_config
        dtype, page_tokens = self.model_config.dtype, self.cache_config.block_size
        # One step's; but who is repeated waits for its turn with its window.
        waits = any(PRESETS[name].reconstructs and PRESETS[name].needs_window for name in self.eviction.served)
        prompts = max(1, scheduler.max_num_batched_tokens // self.eviction.min_tokens)
        echoes = min(scheduler.max_num_batched_tokens, ECHO_TOKENS + ECHO_OVERHEAD)
        return BesideCache.of(
            Model(
                len(readers.own), first.num_heads, first.num_kv_heads, first.head_size, dtype, page_tokens, len(readers)
            ),
            self._projections(names, first),
            window=self.eviction.window,
            max_tokens=self.model_config.max_model_len,
            max_requests=scheduler.max_num_seqs,
            prompts_at_once=min(prompts + ECHO_REQUESTS * waits, scheduler.max_num_seqs),
            echoes_at_once=echoes if self.eviction.reconstructs else 0,
            classes=len(self._classes),
            answers=self.eviction.again_or_late,
        )

    @property
    def _classes(self) -> tuple[str, ...]:
        """Of the pages that are served."""
        assert self.eviction.classes is not None, "as set at start, on GPUs"
        return self.eviction.classes

    def _projections(self, names: list[str], first: Any) -> Projections:
        """Of the layers of these names, of which `first` is one."""
        return Projections(self.model_runner.get_model(), names, first.num_heads, first.head_size, keep=False)

    @torch.inference_mode()
    def compile_or_warm_up_model(self) -> Any:
        """vLLM's warm-up, before which the kernels of an eviction are compiled, unless the user has warm-ups off."""
        if self.vllm_config.kernel_config.enable_jit_warmup and isinstance(self._evictor, CUDAEvictor):
            self._evictor.warm_up(self.model_config.max_model_len)
        return super().compile_or_warm_up_model()

    def start_eviction(
        self, group: int, readers: Readers, names: list[str], layers: list[Any]
    ) -> tuple[CUDARuntime, CUDAEvictor]:
        first, model, requests = layers[0], self.model_config, self.model_runner.req_states
        block_tokens = self.model_runner.kv_cache_config.kv_cache_groups[group].kv_cache_spec.block_size
        for name, layer in zip(names, layers, strict=True):
            _check(name, layer, block_tokens, self.cache_config.block_size)
        caches = [_typed(layers[reader].kv_cache, first.kv_cache_dtype) for reader in readers.own]
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
            classes=self._classes,
        )
        softmax_A = [Softmax.of(layer.impl) for layer in layers]
        for reader, (cache, layer) in enumerate(zip(readers.caches, layers, strict=True)):
            layer.impl.runtime, layer.impl.layer_index, layer.impl.reader = runtime, cache, reader
            layer.impl.softmax = softmax_A[reader]
        for attention_group in self.model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.runtime = runtime
        compat.keep_out_of_decode_graphs(self.model_runner, lambda: runtime.observing)
        projections = self._projections(names, first)
        scales = [
            LayerScales(softmax, layer._k_scale_float, layer._v_scale_float)
            for softmax, layer in zip(softmax_A, layers, strict=True)
        ]
        logger.info("KV eviction decodes with its own kernel; prompts take %s", first.get_attn_backend().get_name())
        return runtime, CUDAEvictor(
            self.eviction, runtime, scales, readers, projections, self.tensor_rank, self.reduce_heads
        )


def _check(name: str, layer: Any, block_tokens: int, block_size: int) -> None:
    """Refuse caches whose blocks vLLM has split for its own kernels. Raises ValueError.

    block_tokens: of the layer's blocks, a multiple of the block size, so that blocks of all layers are as many bytes.
    """
    assert isinstance(layer.impl, EvictionImpl), f"{name} has another attention backend"
    kernel_block = layer.kv_cache.shape[2]
    if kernel_block != block_tokens:
        wanted, rest = divmod(kernel_block * block_size, block_tokens)
        fits = not rest and wanted % PLATFORMS["cuda"].block_tokens == 0
        way_out = f"block_size={wanted}" if fits else "attention_backend=TRITON_ATTN"
        raise ValueError(
            f"block_size={block_size}: vLLM splits the blocks of layer {name}, {block_tokens} tokens, into such of "
            f"{kernel_block}; choose {way_out} with --kv-eviction"
        )


def _typed(cache: torch.Tensor, kv_cache_dtype: str) -> torch.Tensor:
    """A layer's cache `[blocks, H, N, 2*D]` with its numbers' own dtype; vLLM keeps fp8 as bytes."""
    if not kv_cache_dtype.startswith("fp8"):
        return cache
    return cache.view(torch.float8_e5m2 if kv_cache_dtype == "fp8_e5m2" else torch.float8_e4m3fn)
