"""Eviction on top of vLLM's Triton attention: any dtype, fp8 caches, and GPUs that FlashAttention does not run on."""

from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_defensive.worker.cuda.backend import EvictionImpl, EvictionMetadataBuilder


class EvictionTritonMetadataBuilder(EvictionMetadataBuilder, TritonAttentionMetadataBuilder):
    """Our part of the metadata, then Triton attention's."""


class EvictionTritonImpl(EvictionImpl, TritonAttentionImpl):
    """Our part of a layer, then Triton attention's."""


class EvictionTritonBackend(TritonAttentionBackend):
    """vLLM's backend with our builder and implementation; layouts, dtypes and head sizes are its own."""

    @staticmethod
    def get_impl_cls() -> type[EvictionTritonImpl]:
        return EvictionTritonImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionTritonMetadataBuilder]:
        return EvictionTritonMetadataBuilder
