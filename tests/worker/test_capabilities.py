"""What our backends say that they can do. `tests/cuda` asks the same of those for GPUs."""

from __future__ import annotations

import pytest

from tests.compat.overrides import NOT_OURS, promises
from vllm_defensive.compat.worker import _may_have_sinks
from vllm_defensive.worker.capabilities import limited
from vllm_defensive.worker.cpu.backend import EvictionCPUBackend, EvictionCPUImpl, EvictionCPUMetadataBuilder


def test_the_cpu_backend_promises_nothing_that_is_not_listed() -> None:
    assert not any(promises(EvictionCPUBackend).values())
    assert not any(promises(EvictionCPUImpl).values()) and not any(promises(EvictionCPUMetadataBuilder).values())


def test_whatever_vllm_may_ask_of_a_backend_was_looked_at() -> None:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    assert set(promises(CPUAttentionBackend)) <= NOT_OURS
    assert any(promises(CPUAttentionBackend).values()), "else the test above would see nothing"


@pytest.mark.parametrize("value", [True, classmethod(lambda cls: True)], ids=["attribute", "method"])
def test_what_vllm_learns_tomorrow_is_not_promised(value: object) -> None:
    stock = type("Stock", (), {"supports_tomorrow": value, "supports_dtype": value})
    ours = limited(type("Ours", (stock,), {}))
    assert promises(stock) == {"supports_tomorrow": True}
    assert promises(ours) == {"supports_tomorrow": False}
    assert ours.supports_dtype, "what it lists is the stock backend's to answer"


def test_models_with_attention_sinks_are_known_by_their_configuration() -> None:
    """FlashAttention has sinks since Hopper only, and is chosen before the layers are made."""
    from transformers import GptOssConfig, GraniteConfig, GraniteSWAConfig, LlamaConfig

    with_sinks = GptOssConfig(), GraniteSWAConfig(), LlamaConfig(swa_attention_sink_enabled=True)
    assert all(_may_have_sinks(config) for config in with_sinks)
    without = LlamaConfig(), GraniteConfig(), LlamaConfig(swa_attention_sink_enabled=False)
    assert not any(_may_have_sinks(config) for config in without)
