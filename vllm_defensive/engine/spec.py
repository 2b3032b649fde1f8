"""The KV cache spec that makes vLLM use our block manager, and the way it gets registered.

The workers turn every evictable full-attention spec into this one (`evictable_specs`); vLLM then counts its memory,
merges it into a KV cache group and looks its manager up by class. Unpickling the spec in the scheduler's process
imports this module, so the registration at the bottom is in place wherever a spec of ours is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from vllm.utils.math_utils import cdiv
from vllm.v1.kv_cache_interface import AttentionSpec, FullAttentionSpec, KVCacheSpec, MambaSpec, SlidingWindowSpec

from vllm_defensive.compat.scheduling import register_spec
from vllm_defensive.packing import ECHO_OVERHEAD, Format
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive_kernels.widths import PageShape


@dataclass(frozen=True, kw_only=True)
class EvictableSpec(FullAttentionSpec):
    """Full attention whose blocks may be repacked after prefill. `eviction` travels with it to the block manager.
    page_tokens: rows of a head page, if a block has several of each layer and head."""

    eviction: EvictionConfig
    page_tokens: int | None = None

    @property
    def page(self) -> PageShape:
        """Of one head."""
        return PageShape(self.page_tokens or self.block_size, self.head_size, self.dtype.itemsize)

    def max_memory_usage_bytes(self, vllm_config: Any) -> int:
        """Blocks of the longest request at its peak: all originals and the packed blocks, in bytes; where prompts are
        bounded, what one packs, twice, and what it reads in between.

        vLLM's start-up check and its length auto-fit call this, so a pool in which the longest prompt could not be
        evicted is refused before the first request.
        """
        # The longest prompt is not always the one that packs most, as a long tail counts as kept: try `N` lengths.
        max_tokens = vllm_config.model_config.max_model_len
        lengths = range(max(1, max_tokens - self.block_size), max_tokens + 1)
        eviction = self.eviction
        regions = [eviction.region(length, 0, self.block_size, self.page_tokens) for length in lengths]
        # In 16 bits too, in which a request may be packed that names another policy.
        formats = [Format.of(widths, self.page) for widths in dict.fromkeys((*eviction.own_widths, "16"))]
        packed = max(eviction.budget_blocks(region, format=format) for region in regions for format in formats)
        if any(name in PRESETS and PRESETS[name].reconstructs for name in eviction.stands_for(eviction.policy)):
            # An echo's positions end where the model's do: it and the prompt are no longer than the longest prompt.
            packed += cdiv(ECHO_OVERHEAD, self.block_size)
        whole = super().max_memory_usage_bytes(vllm_config) + packed * self.page_size_bytes
        if eviction.prompts == "whole":
            return whole
        part = eviction.prompt_interval or vllm_config.scheduler_config.max_num_batched_tokens
        if eviction.answers == "evict":
            part = max(part, eviction.interval)
        most = eviction.blocks_between(packed, part, self.block_size)
        return min(whole, (most + packed) * self.page_size_bytes)

    @classmethod
    def merge(cls, specs: list[EvictableSpec]) -> EvictableSpec:
        """One spec for a whole group. The base class rebuilds from a fixed list of fields and would drop ours."""
        # An AssertionError is how vLLM is told that layers form no common group.
        assert all(isinstance(spec, cls) for spec in specs), "only evictable layers form an evictable group"
        assert all(spec.eviction == specs[0].eviction for spec in specs), "one engine has one eviction config"
        base = FullAttentionSpec.merge([_plain(spec) for spec in specs])
        merged = as_evictable(base, specs[0].eviction, specs[0].page_tokens)
        assert isinstance(merged, cls)
        return merged


def evictable_specs(
    specs: Mapping[str, KVCacheSpec],
    eviction: EvictionConfig,
    max_model_len: int,
    block_size: int,
    page_tokens: int | None = None,
) -> dict[str, KVCacheSpec]:
    """The specs of a model's layers, by name, as `EvictableSpec` where the layer attends to the whole prefix.

    A window that no request can outgrow is no window: a model that has nothing but such layers is evicted in them.
    page_tokens: rows of a page, where vLLM makes blocks as large as the states of other layers.
    """
    with_states = any(isinstance(spec, MambaSpec) for spec in specs.values())
    page_tokens = page_tokens if with_states else None
    ours = {name: as_evictable(spec, eviction, page_tokens) for name, spec in specs.items()}
    if any(isinstance(spec, EvictableSpec) for spec in ours.values()):
        return ours
    return {name: as_evictable(_unwindowed(spec, max_model_len, block_size), eviction) for name, spec in ours.items()}


def _unwindowed(spec: KVCacheSpec, max_model_len: int, block_size: int) -> KVCacheSpec:
    """`spec` as full attention if it is a window of `max_model_len` tokens or more, else unchanged."""
    if type(spec) is not SlidingWindowSpec or spec.sliding_window < max_model_len or spec.page_size_padded is not None:
        return spec
    common = {f.name: getattr(spec, f.name) for f in fields(AttentionSpec) if f.init}
    return FullAttentionSpec(**{**common, "block_size": block_size})


def as_evictable(spec: KVCacheSpec, eviction: EvictionConfig, page_tokens: int | None = None) -> KVCacheSpec:
    """`spec` as an `EvictableSpec` if its layer attends to the whole prefix, else unchanged."""
    if type(spec) is not FullAttentionSpec or spec.sliding_window is not None or spec.attention_chunk_size is not None:
        return spec
    if spec.non_causal or spec.tokens_per_state != 1 or spec.head_size_v != spec.head_size:
        return spec
    return EvictableSpec(**_fields(spec), eviction=eviction, page_tokens=page_tokens)


def _fields(spec: FullAttentionSpec) -> dict[str, Any]:
    return {f.name: getattr(spec, f.name) for f in fields(FullAttentionSpec) if f.init}


def _plain(spec: EvictableSpec) -> FullAttentionSpec:
    return FullAttentionSpec(**_fields(spec))


def _register() -> None:
    from vllm_defensive.engine.kv_manager import EvictionBlockManager

    register_spec(EvictableSpec, EvictionBlockManager, base=FullAttentionSpec)


_register()
