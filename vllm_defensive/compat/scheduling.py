"""What the scheduler's process needs of vLLM's insides."""

from __future__ import annotations


def register_spec(spec_cls: type, manager_cls: type, base: type) -> None:
    """Make `manager_cls` the block manager of groups whose spec is `spec_cls`.

    The registry fills itself only while it is empty, so it must have been filled before anything of ours goes in.
    """
    from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

    KVCacheSpecRegistry._ensure_registered()
    KVCacheSpecRegistry.register(spec_cls, manager_cls, uniform_type_base_spec=base)
