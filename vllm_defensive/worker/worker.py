"""The worker: vLLM's own, which is told what to keep, evicts after the forward pass and reports what it took."""

from __future__ import annotations

from typing import Any

import torch
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_defensive import vllm_compat
from vllm_defensive.config import from_vllm_config
from vllm_defensive.engine.spec import EvictableSpec, as_evictable
from vllm_defensive.worker.evictor import Evictor
from vllm_defensive.worker.pages import PageView
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.runtime import Runtime
from vllm_defensive.worker.window import WindowQueries

logger = vllm_compat.get_logger("kv_eviction")

_CPU_BACKEND = "vllm_defensive.worker.cpu_backend.EvictionCPUBackend"


class EvictionCPUWorker(CPUWorker):
    """vLLM's CPU worker with eviction."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        config = from_vllm_config(self.vllm_config)
        assert config is not None
        self._eviction = config
        self._runtime: Runtime | None = None
        self._evictor: Evictor | None = None

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        with vllm_compat.cpu_attention_backend(_CPU_BACKEND):
            super().load_model(*args, **kwargs)

    def get_kv_cache_spec(self) -> dict[str, Any]:
        """The layers' specs, those of evictable layers as `EvictableSpec`."""
        return {name: as_evictable(spec, self._eviction) for name, spec in super().get_kv_cache_spec().items()}

    def initialize_from_config(self, kv_cache_config: Any) -> None:
        """Allocate the KV cache, then number its pages and find out what scoring needs of each layer."""
        super().initialize_from_config(kv_cache_config)
        (group,) = (
            i for i, g in enumerate(kv_cache_config.kv_cache_groups) if isinstance(g.kv_cache_spec, EvictableSpec)
        )
        names = kv_cache_config.kv_cache_groups[group].layer_names
        context = self.vllm_config.compilation_config.static_forward_context
        layers = [context[name] for name in names]
        impls = [layer.impl for layer in layers]
        first = layers[0]

        from vllm_defensive.worker.cpu_backend import EvictionCPUImpl, discover_codec

        view = PageView([layer.kv_cache for layer in layers])
        codec = discover_codec(first.kv_cache, first.isa, self.model_config.dtype, first.kv_cache_dtype)
        windows = WindowQueries(
            len(layers), self._eviction.window, first.num_heads, first.head_size, self.model_config.dtype
        )
        self._runtime = Runtime(view, windows, vllm_compat.request_ids_of(self.model_runner))
        for index, impl in enumerate(impls):
            assert isinstance(impl, EvictionCPUImpl)
            impl.runtime, impl.layer_index = self._runtime, index
        for attention_group in self.model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.runtime = self._runtime
        projections = Projections(self.model_runner.get_model(), names, first.num_heads, first.head_size)
        self._evictor = Evictor(
            self._eviction, self._runtime, view, codec, first.impl.scale, projections, writes_audit=self.rank == 0
        )
        logger.info(
            "KV eviction is on: policy %s keeps %g of each prompt of %d tokens or more (window %d); "
            "pages of %d tokens, %d layers x %d KV heads = %d pages a block",
            self._eviction.policy,
            self._eviction.keep,
            self._eviction.min_tokens,
            self._eviction.window,
            view.page_tokens,
            view.num_layers,
            view.num_heads,
            view.num_layers * view.num_heads,
        )

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any) -> Any:
        if self._runtime is None or self._evictor is None:
            return super().execute_model(scheduler_output)
        message = vllm_compat.read_message(scheduler_output)
        self._runtime.begin(message, vllm_compat.reset_requests(scheduler_output))
        try:
            output = super().execute_model(scheduler_output)
        finally:
            self._runtime.end()
        self._evictor.evict(message.evictions)
        return self._report(output)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        return self._report(super().sample_tokens(*args, **kwargs))

    def _report(self, output: Any) -> Any:
        if output is not None and self._evictor is not None:
            vllm_compat.attach_microseconds(output, self._evictor.take_microseconds())
        return output
