"""Eviction on top of vLLM's Triton attention: any dtype, fp8 caches, and GPUs that FlashAttention does not run on."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_defensive.worker.capabilities import limited
from vllm_defensive.worker.cuda.backend import EvictionImpl, EvictionMetadataBuilder


@limited
class EvictionTritonMetadataBuilder(EvictionMetadataBuilder, TritonAttentionMetadataBuilder):
    """Our part of the metadata, then Triton attention's."""


@limited
class EvictionTritonImpl(EvictionImpl, TritonAttentionImpl):
    """Our part of a layer, then Triton attention's."""


@limited
class EvictionTritonBackend(TritonAttentionBackend):
    """vLLM's backend with our builder and implementation; layouts, dtypes and head sizes are its own."""

    @staticmethod
    def get_impl_cls() -> type[EvictionTritonImpl]:
        return EvictionTritonImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionTritonMetadataBuilder]:
        return EvictionTritonMetadataBuilder
