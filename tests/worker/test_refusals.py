"""Layers whose attention packed pages could not reproduce are refused by name, at start."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vllm_defensive.worker.worker import check_layers

NAMES = ["model.layers.0.attn", "model.layers.1.attn"]


def layer(**different: Any) -> SimpleNamespace:
    impl = {"alibi_slopes": None, "sinks": None, "logits_soft_cap": 0}
    impl.update({k: v for k, v in different.items() if k in impl})
    own = {k: v for k, v in different.items() if k not in impl}
    return SimpleNamespace(
        **{"num_heads": 8, "kv_sharing_target_layer_name": None, **own}, impl=SimpleNamespace(**impl)
    )


def test_ordinary_layers_pass() -> None:
    layers = [layer(), layer(logits_soft_cap=None)]
    check_layers(NAMES, layers, dict(zip(NAMES, layers, strict=True)))


@pytest.mark.parametrize(
    ("different", "what"),
    [
        ({"alibi_slopes": [0.5]}, "uses ALiBi"),
        ({"sinks": [0.0]}, "uses attention sinks"),
        ({"logits_soft_cap": 50.0}, "caps its logits"),
        ({"num_heads": 4}, "another number of query heads"),
    ],
)
def test_each_refusal_names_the_layer_and_the_way_out(different: dict[str, Any], what: str) -> None:
    layers = [layer(), layer(**different)]
    with pytest.raises(ValueError, match=rf"model\.layers\.1\.attn .*{what}.*--kv-eviction"):
        check_layers(NAMES, layers, dict(zip(NAMES, layers, strict=True)))


def test_a_layer_whose_cache_another_reads_is_refused() -> None:
    layers = [layer(), layer()]
    context = dict(zip(NAMES, layers, strict=True))
    context["model.layers.2.attn"] = layer(kv_sharing_target_layer_name=NAMES[1])
    with pytest.raises(ValueError, match=r"layers\.1\.attn shares its KV cache with model\.layers\.2\.attn"):
        check_layers(NAMES, layers, context)
