"""Packings that outlive their request: a document is packed once, and asked about many times.

What was packed at a boundary stays in vLLM's pool when its request ends, found by what it was made of and how, for as
long as nobody needs the memory. A later request with the same tokens before its boundary *adopts* it: it holds the same
blocks once more and starts behind them, with nothing computed and nothing packed.

In a chat a request also leaves its own end: the blocks that it filled behind its packing, which later requests hold on
top of that (`parent`).

There is no memory manager of ours. Blocks that nobody holds are put at the end of vLLM's queue of free blocks, where
those of the prefix cache are too, so that what was used last goes last; vLLM says when it hands one of them out
(`BlockPool.unpin_blocks`), and with that the packing is lost. A packing is held as a whole, or not at all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock

from vllm_defensive.engine.pins import Pins
from vllm_defensive.plan import Eviction

_MOST_PASSED = 500
"""Free blocks that hold nothing, and are passed by when originals are put behind them: where there are more, memory is
no concern."""


class Kind(NamedTuple):
    """How a packing is made: policy, ratio, budget and widths as resolved; later: the policy that can choose from it
    again, None: none can; generation: of weights and learned score."""

    policy: str
    keep: float
    budget: int | None
    widths: str | None
    later: str | None
    generation: int


class Key(NamedTuple):
    """What a packing depends on. tokens: vLLM's hash of all of them, which has adapter, images and salt in it."""

    tokens: Hashable
    kind: Kind


@dataclass(eq=False)
class Published:
    """eviction: that made it; its number names it to the workers. end: tokens that it stands for. blocks: packed ones,
    in the order in which they were filled; or, on top of a parent, those at the positions from its end on.
    holders: requests that hold it now. reused: ids of blocks that others have been given: it is lost."""

    key: Key
    eviction: Eviction
    end: int
    blocks: Sequence[KVCacheBlock]
    parent: Published | None = None
    children: list[Published] = field(default_factory=list)
    holders: int = 0
    lost: bool = False
    reused: set[int] = field(default_factory=set)

    @property
    def line(self) -> list[Published]:
        """It and what it stands on, the packing last."""
        parts = [self]
        while (parent := parts[-1].parent) is not None:
            parts.append(parent)
        return parts

    @property
    def packed(self) -> Sequence[KVCacheBlock]:
        """The packed blocks."""
        return self.line[-1].blocks

    @property
    def growth(self) -> list[KVCacheBlock]:
        """Blocks at the positions behind the packing."""
        return [block for part in self.line[-2::-1] for block in part.blocks] if self.parent is not None else []

    @property
    def unheld(self) -> int:
        """Blocks of it that are among the pool's free ones."""
        return sum(len(part.blocks) for part in self.line if not part.holders)


class Library:
    """All published packings of one scheduler."""

    def __init__(self, pool: BlockPool, codes_freed: Callable[[Sequence[int]], None], most_pinned: float) -> None:
        """codes_freed: is told of blocks that held quantised pages and are another's now. most_pinned: share of the
        pool that may be."""
        self._pool, self._codes_freed = pool, codes_freed
        self.pins: Pins[Published] = Pins(int(most_pinned * (pool.num_gpu_blocks - 1)), self.hold, self.leave)
        self._by_key: dict[Key, Published] = {}
        self._ends: dict[Kind, Counter[int]] = {}  # how many there are that stand for so many tokens
        self._by_block: dict[int, Published] = {}  # those that may still be handed out
        self._broken: list[Published] = []  # lost since the last step, and not all of their blocks are gone
        self._gone: list[int] = []
        self._last = 0
        self.generation = 0
        self.published = self.lost = self.dropped = (
            0  # all that were; whose memory others took; the others that are gone
        )
        self.blocks = 0  # of all that are whole, held or not
        self.unheld_blocks = 0  # those of them that nobody holds

    def __len__(self) -> int:
        return len(self._by_key)

    def find(self, key: Key) -> Published | None:
        return self._by_key.get(key)

    def of_prefix(
        self, kind: Kind, block_hashes: Sequence[Hashable], block_tokens: int, ends: tuple[int, int]
    ) -> Iterator[Published]:
        """Those that stand for the first tokens of a prompt, so many at least and at most; the longest first."""
        there, (least, most) = self._ends.get(kind, Counter()), ends
        for count in range(most // block_tokens, max(0, -(-least // block_tokens) - 1), -1) if there else ():
            found = self._by_key.get(Key(block_hashes[count - 1], kind)) if count * block_tokens in there else None
            if found is not None:
                yield found

    def next_number(self) -> int:
        """Of an eviction whose packing is to be published."""
        self._last += 1
        return self._last

    def publish(self, key: Key, eviction: Eviction, blocks: Sequence[KVCacheBlock]) -> Published | None:
        """Let others adopt these blocks, which their request holds; None if there is such a packing already."""
        there = self._by_key.get(key)
        if (there is not None and there.parent is None) or key.kind.generation != self.generation:
            self.forget(eviction.number)
            return None
        if there is not None:  # and larger, for it is a turn's end
            self._lose(there, needed=False)
        return self._add(Published(key, eviction, eviction.region.stop, blocks))

    def extend(self, parent: Published, tokens: Hashable, end: int, blocks: Sequence[KVCacheBlock]) -> Published:
        """Let others adopt what a request, which holds `parent`, has computed over it, up to a block's end. Returns
        what the request holds now. tokens: vLLM's hash of all up to there."""
        key = Key(tokens, parent.key.kind)
        if parent.lost or key in self._by_key:
            return parent
        made = self._add(Published(key, parent.eviction, end, blocks, parent))
        parent.children.append(made)
        return made

    def _add(self, made: Published) -> Published:
        self._by_key[made.key] = made
        self._ends.setdefault(made.key.kind, Counter())[made.end] += 1
        for block in made.blocks:
            self._by_block[block.block_id] = made
        made.holders = 1
        self.published += 1
        self.blocks += len(made.blocks)
        return made

    def hold(self, packing: Published) -> None:
        """One more request has it."""
        for part in packing.line:
            self._pool.touch(part.blocks)
            if not part.holders and not part.lost:
                self.unheld_blocks -= len(part.blocks)
            part.holders += 1

    def leave(self, packing: Published) -> None:
        """One request less has it."""
        for part in packing.line:
            part.holders -= 1
            if not part.lost:
                self._pool.unpin_blocks(part.blocks, self._reused)
                if not part.holders:
                    self.unheld_blocks += len(part.blocks)
                continue
            self._pool.free_blocks(part.blocks)
            if not part.holders:
                self._note_codes(part, [block.block_id for block in part.blocks])

    def free_originals(self, blocks: Sequence[KVCacheBlock]) -> None:
        """Give blocks back such that they are used again before all others of the prefix cache, and all packings, and
        after those that hold nothing. They keep their hashes until then. What they are good for, a packing is: by last
        use they would outlive the packings of all documents before, and nothing would ever be adopted."""
        pool, queue = self._pool, self._pool.free_block_queue
        pool.free_blocks(blocks)
        unheld = [block for block in blocks if not block.ref_cnt and block.block_hash is not None]
        for block in unheld:
            queue.remove(block)
        passed, found = 0, queue.fake_free_list_head.next_free_block
        while passed < min(_MOST_PASSED, queue.num_free_blocks) and found is not None:
            if found.block_hash is not None or found.block_id in self._by_block:
                break
            passed, found = passed + 1, found.next_free_block
        empty = queue.popleft_n(passed)
        queue.prepend_n(unheld)
        queue.prepend_n(empty)

    def forget(self, number: int) -> None:
        """The workers need not know this packing any longer."""
        self._gone.append(number)

    def take_gone(self) -> list[int]:
        gone, self._gone = self._gone, []
        return gone

    def forget_all(self) -> None:
        """Nothing that was packed so far may be adopted: the model has other weights, say. Who holds one keeps it."""
        self.generation += 1
        self.pins.drop_all()
        for packing in list(self._by_key.values()):
            if not packing.lost:
                self._lose(packing, needed=False)

    def settle(self) -> None:
        """Before a step: what was pinned for long enough is free like others. What is left of lost packings is of no
        use to anybody, and goes before all that may be."""
        self.pins.end()
        for packing in self._broken:
            left = [block for block in packing.blocks if block.block_id not in packing.reused]
            for block in left:
                self._pool.free_block_queue.remove(block)
            self._pool.free_block_queue.prepend_n(left)
        self._broken.clear()

    def _reused(self, block: KVCacheBlock) -> None:
        packing = self._by_block.pop(block.block_id, None)
        if packing is None:  # it was free like any other
            return
        if not packing.lost:
            self._lose(packing, needed=True)
        packing.reused.add(block.block_id)
        self._note_codes(packing, [block.block_id])

    def _lose(self, packing: Published, *, needed: bool) -> None:
        """Nobody will find it any more, nor what stands on it. needed: for others have been given its memory."""
        self.pins.drop(packing)
        packing.lost = True
        if needed:
            self.lost += 1
        else:
            self.dropped += 1
        for child in packing.children:
            if not child.lost:
                self._lose(child, needed=needed)
        del self._by_key[packing.key]
        ends = self._ends[packing.key.kind]
        ends[packing.end] -= 1
        if not ends[packing.end]:
            del ends[packing.end]
            if not ends:
                del self._ends[packing.key.kind]
        self.blocks -= len(packing.blocks)
        if packing.parent is None:
            self.forget(packing.eviction.number)
        elif not packing.parent.lost:
            packing.parent.children.remove(packing)
        if not packing.holders:
            self.unheld_blocks -= len(packing.blocks)
            self._broken.append(packing)
            return
        for block in packing.blocks:
            self._by_block.pop(block.block_id, None)

    def _note_codes(self, packing: Published, blocks: Sequence[int]) -> None:
        if packing.parent is None and packing.eviction.packing.format.quantised:
            self._codes_freed(blocks)
