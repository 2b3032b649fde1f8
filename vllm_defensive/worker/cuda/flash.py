"""Eviction on top of vLLM's FlashAttention, which needs its compiled extension to be imported."""

from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from vllm_defensive.worker.capabilities import limited
from vllm_defensive.worker.cuda.backend import EvictionImpl, EvictionMetadataBuilder


@limited
class EvictionFlashMetadataBuilder(EvictionMetadataBuilder, FlashAttentionMetadataBuilder):
    """Our part of the metadata, then FlashAttention's."""


@limited
class EvictionFlashImpl(EvictionImpl, FlashAttentionImpl):
    """Our part of a layer, then FlashAttention's."""


@limited
class EvictionFlashBackend(FlashAttentionBackend):
    """vLLM's backend with our builder and implementation; layouts, dtypes and head sizes are its own."""

    @staticmethod
    def get_impl_cls() -> type[EvictionFlashImpl]:
        return EvictionFlashImpl

    @staticmethod
    def get_builder_cls() -> type[EvictionFlashMetadataBuilder]:
        return EvictionFlashMetadataBuilder
