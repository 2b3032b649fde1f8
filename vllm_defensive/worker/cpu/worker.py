"""The worker on CPUs."""

from __future__ import annotations

from typing import Any

from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_defensive.compat import worker as compat
from vllm_defensive.packing import WIDTHS
from vllm_defensive.platforms import PLATFORMS
from vllm_defensive.settings.engine import option_name
from vllm_defensive.worker.cpu.accumulation import Accumulations
from vllm_defensive.worker.cpu.backend import EvictionCPUBackend, EvictionCPUImpl, discover_codec
from vllm_defensive.worker.cpu.evictor import CPUEvictor
from vllm_defensive.worker.cpu.generators import without_discarded
from vllm_defensive.worker.cpu.native import CompileError, Quantised
from vllm_defensive.worker.cpu.pages import PageCodec, PageView
from vllm_defensive.worker.cpu.reconstruction import CPUReconstructions
from vllm_defensive.worker.cpu.runtime import CPURuntime
from vllm_defensive.worker.projections import Projections
from vllm_defensive.worker.readers import Readers
from vllm_defensive.worker.softmax import Softmax
from vllm_defensive.worker.window import WindowQueries
from vllm_defensive.worker.worker import EvictionWorker, logger


class EvictionCPUWorker(EvictionWorker, CPUWorker):
    """vLLM's CPU worker with eviction."""

    page_tokens = PLATFORMS["cpu"].block_tokens

    def load_model(self, *args: Any, **kwargs: Any) -> None:
        """Load the model with our attention backend in the place of the CPU platform's."""
        with compat.cpu_attention_backend(f"{EvictionCPUBackend.__module__}.{EvictionCPUBackend.__qualname__}"):
            super().load_model(*args, **kwargs)

    def sample_tokens(self, *args: Any, **kwargs: Any) -> Any:
        """With a seed, the same draws for any chunking."""
        with without_discarded(self.model_runner):
            return super().sample_tokens(*args, **kwargs)

    def _quantised(self, view: PageView, codec: PageCodec) -> Quantised | None:
        """The functions for quantised pages. Raises ValueError if they cannot be had, and the server's own settings ask
        for them; None if only a request might."""
        if not any(self.eviction.allows_widths(widths) for widths in WIDTHS if widths != "16"):
            return None
        try:
            return Quantised(view.data, view.page_shape, *codec.orders)
        except CompileError as error:
            if any(widths != "16" for widths in self.eviction.own_widths):
                raise ValueError(f"{option_name('widths')}: {error}; choose 16, or install one") from None
            logger.warning("KV eviction: requests that choose their widths are served whole: %s", error)
            return None

    def start_eviction(
        self, group: int, readers: Readers, names: list[str], layers: list[Any]
    ) -> tuple[CPURuntime, CPUEvictor]:
        first, dtype = layers[0], self.model_config.dtype
        spec = self.model_runner.kv_cache_config.kv_cache_groups[group].kv_cache_spec
        caches = [layers[reader].kv_cache for reader in readers.own]
        view = PageView.from_layers(caches, spec.block_size // spec.page.rows)
        codec = discover_codec(first.kv_cache, first.isa, dtype, first.kv_cache_dtype)
        windows = WindowQueries(len(layers), self.eviction.window, first.num_heads, first.head_size, dtype)
        softmax_A = [Softmax.of(layer.impl) for layer in layers]
        accumulations = Accumulations(view, codec, softmax_A, readers)
        reconstructions = CPUReconstructions(view, codec, softmax_A, readers)
        runtime = CPURuntime(view, windows, accumulations, reconstructions, compat.request_ids_of(self.model_runner))
        runtime.quantised = self._quantised(view, codec)
        if view.pages_per_block > 1:
            compat.zero_blocks_by(self.model_runner, runtime.clear)
        for reader, (cache, layer) in enumerate(zip(readers.caches, layers, strict=True)):
            assert isinstance(layer.impl, EvictionCPUImpl)
            layer.impl.runtime, layer.impl.layer_index, layer.impl.reader = runtime, cache, reader
        for attention_group in self.model_runner.attn_groups[group]:
            for builder in attention_group.metadata_builders:
                builder.runtime = runtime
        projections = Projections(self.model_runner.get_model(), names, first.num_heads, first.head_size)
        return runtime, CPUEvictor(
            self.eviction,
            runtime,
            view,
            codec,
            softmax_A,
            readers,
            projections,
            self.tensor_rank,
            self.reduce_heads,
        )
