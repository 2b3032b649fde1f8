"""What must hold of a block manager at any time between two steps."""

from __future__ import annotations

from vllm_defensive.engine.kv_manager import EvictionBlockManager
from vllm_defensive.engine.life import Life, Phase


def held_blocks(manager: EvictionBlockManager, request_id: str) -> int:
    """Blocks of the pool that the request holds a reference to."""
    positional = sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))
    life = manager.lifecycle.lives.get(request_id)
    return positional + (len(life.blocks) if life is not None else 0)


def released(manager: EvictionBlockManager, request_id: str) -> bool:
    """Whether the request was evicted and its originals have gone back to the pool."""
    life = manager.lifecycle.lives.get(request_id)
    return life is not None and life.phase is Phase.PACKED


def check_integrity(manager: EvictionBlockManager) -> None:
    """Assert the invariants of every life, that each packed block has one owner, and that the sums are right."""
    lifecycle, owned = manager.lifecycle, set[int]()
    for request_id, life in lifecycle.lives.items():
        assert life.request.request_id == request_id and request_id in manager.req_to_blocks
        check_life(manager, life)
        ids = {block.block_id for block in life.blocks}
        assert not owned & ids, f"{request_id} packs into a block of another"
        owned |= ids
    for request_id, blocks in manager.req_to_blocks.items():
        for block in blocks:
            assert block.is_null or block.block_id not in owned, f"{request_id} holds packed block {block.block_id}"
    by_phase = {phase: [r for r, life in lifecycle.lives.items() if life.phase is phase] for phase in Phase}
    assert set(lifecycle.packing) == set(by_phase[Phase.PACKING])
    assert set(lifecycle.echoing) == set(by_phase[Phase.ECHOING])
    assert not lifecycle._held and not lifecycle._reconstruct
    assert not lifecycle._planned, "the message of the step has taken them"
    assert lifecycle._watched <= set(by_phase[Phase.PREFILL])
    assert set(lifecycle.waiting) <= set(manager.requests) - set(lifecycle.lives)
    packed = [life.packing for life in lifecycle.lives.values() if life.phase is Phase.PACKED]
    assert lifecycle.saved_blocks == sum(packing.saved_blocks for packing in packed)
    assert lifecycle.packed_blocks == len(owned)


def check_life(manager: EvictionBlockManager, life: Life) -> None:
    """One request: its packed blocks, its originals and its notes are those of its phase."""
    blocks = manager.req_to_blocks[life.request.request_id]
    evicted = life.phase in (Phase.ECHOING, Phase.PACKING, Phase.PACKED)
    assert (life.packing is not None) == bool(life.blocks) == evicted
    for block in life.blocks:
        assert block.ref_cnt == 1 and block.block_hash is None and not block.is_null, block
    if life.packing is not None:
        region = life.packing.region
        assert life.packing.blocks == tuple(block.block_id for block in life.blocks)
        assert region.stop == life.stop and len(life.blocks) > 0
        originals = blocks[region.shared_blocks : region.full_blocks]
        assert all(block.is_null == (life.phase is Phase.PACKED) for block in originals)
    assert life.ready_tokens <= len(blocks) * manager.block_size
    assert not life.ready_tokens or life.phase in (Phase.PACKED, Phase.WHOLE)
    assert not life.cached or evicted or life.is_echo
