"""What our backends say that they can do. `tests/cuda` asks the same of those for GPUs."""

from __future__ import annotations

import pytest

from vllm_defensive.worker.capabilities import STOCKS, limited
from vllm_defensive.worker.cpu.backend import EvictionCPUBackend, EvictionCPUImpl, EvictionCPUMetadataBuilder

# Looked at, and not done by our kernels. What vLLM adds belongs here or into `STOCKS`.
NOT_OURS = {
    "supports_alibi_sqrt",
    "supports_batch_invariance",
    "supports_dcp",
    "supports_device_cpu_query_lens_mismatch",  # of drafts that are cut on the device
    "supports_kv_cache_update_bypass",  # since 0.33: attention without keys and values, which are in the cache already
    "supports_kv_connector",
    "supports_non_causal",
    "supports_non_causal_dcp",
    "supports_pcp",
    "supports_per_head_quant_scales",
    "supports_rswa",
    "supports_sink",
}


def promises(backend: type) -> dict[str, bool]:
    """What it says of everything that vLLM may ask and we do not leave to its own backend."""
    names = {name for name in dir(backend) if name.startswith("supports_")} - STOCKS
    values = {name: getattr(backend, name) for name in names}
    return {name: value() if callable(value) else value for name, value in values.items()}


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
