"""What must hold of a block manager at any time between two steps."""

from __future__ import annotations

from vllm_defensive.engine.kv_manager import EvictionBlockManager


def held_blocks(manager: EvictionBlockManager, request_id: str) -> int:
    """Blocks of the pool that the request holds a reference to."""
    positional = sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))
    state = manager._states.get(request_id)
    return positional + (len(state.packed) if state is not None else 0)


def check_integrity(manager: EvictionBlockManager) -> None:
    """Assert that packed blocks have one owner and no hash, and that nothing belongs to an unknown request."""
    owned: set[int] = set()
    for request_id, state in manager._states.items():
        assert request_id in manager.req_to_blocks, f"{request_id} has a state but no blocks"
        for block in state.packed:
            assert block.ref_cnt == 1 and block.block_hash is None and not block.is_null, block
            assert block.block_id not in owned, f"block {block.block_id} packed twice"
            owned.add(block.block_id)
    for request_id, blocks in manager.req_to_blocks.items():
        for block in blocks:
            assert block.is_null or block.block_id not in owned, f"{request_id} holds packed block {block.block_id}"
    assert set(manager._planned) <= set(manager._states)
    assert manager.decided == {request_id for request_id, state in manager._states.items() if state.decided}
    assert manager.hashed <= manager.decided
    for request_id, tokens in manager.settled.items():
        assert request_id in manager.decided
        assert tokens <= len(manager.req_to_blocks[request_id]) * manager.block_size
    released = [state for request_id, state in manager._states.items() if manager.is_released(request_id)]
    assert manager.saved_blocks == sum(state.saved_blocks for state in released)
    assert manager.packed_blocks == len(owned)
    assert set(manager._hit_tokens) <= set(manager.requests)
    assert set(manager._waiting) <= set(manager.requests) - set(manager._states)
