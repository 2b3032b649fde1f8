"""Layers whose attention packed pages could not reproduce, or whose cache differs, are refused by name, at start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    CrossAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpec,
    MambaSpec,
    SlidingWindowMLASpec,
    SlidingWindowSpec,
    UniformTypeKVCacheSpecs,
)

from vllm_defensive.engine.spec import as_evictable
from vllm_defensive.limits import check_layers, evictable_group, has_states
from vllm_defensive.settings.engine import EvictionConfig

NAMES = ["model.layers.0.attn", "model.layers.1.attn"]


def layer(**different: Any) -> SimpleNamespace:
    impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0, "scale": 0.125}
    impl.update({k: v for k, v in different.items() if k in impl})
    own = {k: v for k, v in different.items() if k not in impl}
    plain = {"num_heads": 8, "kv_sharing_target_layer_name": None, "sliding_window": None}
    return SimpleNamespace(**{**plain, **own}, impl=SimpleNamespace(**impl))


def test_ordinary_layers_pass() -> None:
    layers = [layer(), layer(logits_soft_cap=None), layer(logits_soft_cap=50.0), layer(sinks=[0.0])]
    names = [f"model.layers.{i}.attn" for i in range(len(layers))]
    check_layers(names, layers)


@pytest.mark.parametrize(
    ("different", "what"),
    [
        ({"alibi_slopes": [0.5]}, "uses ALiBi"),
        ({"num_heads": 4}, "another number of query heads"),
    ],
)
def test_each_refusal_names_the_layer_and_the_way_out(different: dict[str, Any], what: str) -> None:
    layers = [layer(), layer(**different)]
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.attn .*{what}.*--kv-eviction"):
        check_layers(NAMES, layers)


def test_a_cache_that_another_layer_reads_is_evicted_unless_that_sees_a_window_of_it() -> None:
    """It would look for the last tokens, and read the last of those that were kept."""
    names = [*NAMES, "model.layers.2.attn"]
    check_layers(names, [layer(), layer(), layer(kv_sharing_target_layer_name=NAMES[1])])
    layers = [layer(), layer(), layer(kv_sharing_target_layer_name=NAMES[1], sliding_window=64)]
    with pytest.raises(ValueError, match=r"layers\.2\.attn sees no more than a window of the KV cache .*--kv-eviction"):
        check_layers(names, layers)


SHAPE: dict[str, Any] = {"block_size": 32, "num_kv_heads": 2, "head_size": 32, "dtype": torch.float32}
EVICTED = as_evictable(FullAttentionSpec(**SHAPE), EvictionConfig(policy="snapkv"))
WINDOW = SlidingWindowSpec(**SHAPE, sliding_window=128)


def group(name: str, spec: KVCacheSpec) -> KVCacheGroupSpec:
    return KVCacheGroupSpec([f"model.layers.{name}.attn"], spec)


STATE = MambaSpec(block_size=32, shapes=((4, 4),), dtypes=(torch.float32,))
CHUNKS = ChunkedLocalAttentionSpec(**SHAPE, attention_chunk_size=64)


def test_what_does_not_grow_may_stand_beside_the_evicted_group() -> None:
    assert evictable_group([group("0", EVICTED)]) == 0
    for other in (WINDOW, STATE, CHUNKS):
        groups = [group("0", other), group("1", other), group("2", EVICTED)]
        assert evictable_group(groups) == 2
        assert has_states(groups) == (other is STATE)


@pytest.mark.parametrize("evicted", [0, 2])
def test_any_number_but_one_of_groups_to_evict_is_refused(evicted: int) -> None:
    groups = [group("0", WINDOW), *(group(str(1 + i), EVICTED) for i in range(evicted))]
    with pytest.raises(ValueError, match=rf"has {evicted} groups of full-attention layers .*--kv-eviction"):
        evictable_group(groups)


@pytest.mark.parametrize(
    "spec",
    [
        CrossAttentionSpec(**SHAPE),
        SlidingWindowMLASpec(**{**SHAPE, "num_kv_heads": 1}, sliding_window=128),
        as_evictable(FullAttentionSpec(**SHAPE, sliding_window=128), EvictionConfig(policy="snapkv")),
    ],
    ids=lambda spec: type(spec).__name__,
)
def test_other_caches_beside_the_evicted_group_are_refused_by_name(spec: KVCacheSpec) -> None:
    with pytest.raises(ValueError, match=rf"layers\.7\.attn .* kind {type(spec).__name__}, .*--kv-eviction"):
        evictable_group([group("0", EVICTED), group("1", WINDOW), group("7", spec)])


def test_layers_of_several_shapes_are_refused_as_such() -> None:
    """vLLM puts them into one group, as of one kind; each head page would be of another size."""
    config = EvictionConfig(policy="snapkv")
    wide = as_evictable(FullAttentionSpec(**{**SHAPE, "num_kv_heads": 8}), config)
    mixed = UniformTypeKVCacheSpecs.from_specs({"0": EVICTED, "1": wide})
    assert mixed is not None
    with pytest.raises(ValueError, match=r"differ in their KV heads \(number x size: 2x32, 8x32\), .*--kv-eviction"):
        evictable_group([group("0", mixed)])
