"""What must hold of a block manager at any time between two steps."""

from __future__ import annotations

from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_defensive.engine.kv_manager import EvictionBlockManager
from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.published import Published


def held_blocks(manager: EvictionBlockManager, request_id: str) -> int:
    """Blocks of the pool that the request holds a reference to."""
    positional = sum(not block.is_null for block in manager.req_to_blocks.get(request_id, ()))
    life = manager.lifecycle.lives.get(request_id)
    return positional + (0 if life is None else len(own_blocks(life)) + len(shared_blocks(life)))


def own_blocks(life: Life) -> list[KVCacheBlock]:
    """Packed blocks that are a request's alone."""
    return life.blocks + life.replaced if life.published is None or life.former is not None else []


def shared_blocks(life: Life) -> list[KVCacheBlock]:
    """Those that others may hold as well: what it is packed into, or, while it is packed anew, was before."""
    return [] if life.published is None else list(life.published.packed)


def released(manager: EvictionBlockManager, request_id: str) -> bool:
    """Whether the request was evicted and its originals have gone back to the pool."""
    life = manager.lifecycle.lives.get(request_id)
    return life is not None and life.phase is Phase.PACKED


def check_integrity(manager: EvictionBlockManager) -> None:
    """Assert the invariants of every life, that each packed block has one owner, and that the sums are right."""
    lifecycle, owned = manager.lifecycle, dict[int, Published | str]()
    for request_id, life in lifecycle.lives.items():
        assert life.request.request_id == request_id and request_id in manager.req_to_blocks
        check_life(manager, life)
        for block in own_blocks(life):
            assert block.block_id not in owned, f"{request_id} packs into a block of another"
            owned[block.block_id] = request_id
        for block in shared_blocks(life):
            owner = life.published.line[-1]
            assert owned.setdefault(block.block_id, owner) is owner, f"{request_id} holds a packed block of another"
    held = [life.published for life in lifecycle.lives.values() if life.published is not None]
    check_library(manager, held + list(lifecycle.library.pins))
    for request_id, blocks in manager.req_to_blocks.items():
        for block in blocks:
            assert block.is_null or block.block_id not in owned, f"{request_id} holds packed block {block.block_id}"
    by_phase = {phase: [r for r, life in lifecycle.lives.items() if life.phase is phase] for phase in Phase}
    assert set(lifecycle.packing) == set(by_phase[Phase.PACKING])
    assert set(lifecycle.echoing) == set(by_phase[Phase.ECHOING])
    assert not lifecycle._held and not lifecycle._passed and not lifecycle._observe and not lifecycle._reconstruct
    assert not lifecycle._planned, "the message of the step has taken them"
    assert lifecycle._watched <= set(by_phase[Phase.PREFILL])
    assert set(lifecycle.waiting) <= set(manager.requests) - set(lifecycle.lives)
    released = [
        life.former or life.eviction for life in lifecycle.lives.values() if life.phase is Phase.PACKED or life.former
    ]
    assert lifecycle.saved_blocks == sum(eviction.packing.saved_blocks for eviction in released)
    assert lifecycle.packed_blocks == len(owned)


def check_library(manager: EvictionBlockManager, held: list[Published]) -> None:
    """Published packings: who may be adopted has all of its blocks, which nobody else holds. held: by a life each."""
    library, lost = manager.lifecycle.library, manager.lifecycle.library._broken
    whole = list(library._by_key.values())
    for packing in {id(p): p for p in (*whole, *held, *lost)}.values():
        assert packing.holders == sum(packing in other.line for other in held)
        assert packing.lost == (packing not in whole)
        assert all(block.ref_cnt == packing.holders for block in packing.blocks if block.block_id not in packing.reused)
        assert not packing.holders or not packing.reused, "what is held is nobody else's"
        assert packing.lost or all(library._by_block[block.block_id] is packing for block in packing.blocks)
    for packing in whole:
        assert all(not part.lost for part in packing.line) and all(packing is c.parent for c in packing.children)
    assert {(p.key.kind, p.end) for p in whole} == {(k, end) for k, ends in library._ends.items() for end in ends}
    assert library.pins.blocks == sum(len(packing.blocks) for packing in library.pins) <= library.pins.most_blocks
    assert library.unheld_blocks == sum(len(packing.blocks) for packing in whole if not packing.holders)
    assert library.blocks == sum(len(packing.blocks) for packing in whole)
    assert library.published == len(library) + library.lost + library.dropped
    assert set(manager.lifecycle.packers.values()) <= set(manager.lifecycle.lives)


def check_life(manager: EvictionBlockManager, life: Life) -> None:
    """One request: its packed blocks, its originals and its notes are those of its phase."""
    blocks = manager.req_to_blocks[life.request.request_id]
    evicted = life.phase in (Phase.ECHOING, Phase.PACKING, Phase.PACKED)
    assert (life.packing is not None) == bool(life.blocks) == evicted
    assert bool(life.replaced) == (life.former is not None and life.published is None)
    assert life.former is None or life.phase is Phase.PACKING
    if life.published is not None:
        holding = life.eviction if life.former is None else life.former
        assert holding.packing.blocks == tuple(block.block_id for block in shared_blocks(life))
    for block in own_blocks(life):
        assert block.ref_cnt == 1 and block.block_hash is None and not block.is_null, block
    for block in shared_blocks(life):
        assert block.ref_cnt == life.published.line[-1].holders and block.block_hash is None, block
    if life.packing is not None:
        region = life.packing.region
        assert life.packing.blocks == tuple(block.block_id for block in life.blocks)
        assert region.stop == life.stop and len(life.blocks) > 0
        gone = region.shared_blocks if life.former is None else life.former.region.full_blocks
        assert all(block.is_null for block in blocks[region.shared_blocks : gone])
        originals = blocks[gone : region.full_blocks]
        assert all(block.is_null == (life.phase is Phase.PACKED) for block in originals)
    assert life.ready_tokens <= len(blocks) * manager.block_size
    assert not life.ready_tokens or life.phase in (Phase.PACKED, Phase.WHOLE)
    assert not life.cached or evicted or life.is_echo
