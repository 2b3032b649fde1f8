"""What will become of a request: whether it is evicted, where, and how many blocks that takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from vllm.utils.math_utils import cdiv
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.core.single_type_kv_cache_manager import SingleTypeKVCacheManager
from vllm.v1.kv_cache_interface import MambaSpec
from vllm.v1.request import Request, RequestStatus

from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.published import Key, Kind, Library, Published
from vllm_defensive.engine.sharing import Relatives, worth_sharing
from vllm_defensive.packing import WIDTHS, Format, Region, echo_blocks, echo_tokens
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.settings.request import RequestSettings, items_of, settings_or_none
from vllm_defensive_kernels.widths import PageShape


class Outlook:
    """Judges requests by their settings, by who else is there, and by what the pool can hold."""

    def __init__(
        self,
        settings: EvictionConfig,
        page: PageShape,
        block_tokens: int,
        pool: BlockPool,
        library: Library,
        can_share: bool,
    ) -> None:
        """page: of one head. library: of what may be found there. can_share: blocks are hashed, in the size in which
        they are allocated."""
        self.settings, self.block_tokens, self._page_tokens = settings, block_tokens, page.rows
        self._formats = {widths: Format.of(widths, page) for widths in WIDTHS}
        self.relatives = Relatives()
        # Block managers of the model's other KV cache groups: they take from the same pool. Those of recurrent layers
        # hold states, so many blocks of each request, whatever its length.
        self.other_managers: Sequence[SingleTypeKVCacheManager] = ()
        self._windows: Sequence[SingleTypeKVCacheManager] = ()
        self._state_blocks = 0
        # The scheduler's, set by it: the longest request, and whether images have positions of their own.
        self.max_model_len, self.own_positions = 0, False
        self.library, self._pool, self._can_share = library, pool, can_share
        self._sessions: dict[str, Request] = {}  # that stream their input, by id

    def beside(self, managers: Sequence[SingleTypeKVCacheManager], state_blocks: Callable[[MambaSpec], int]) -> None:
        """These are the block managers of the model's other KV cache groups. state_blocks: what a request holds at most
        of a group of recurrent layers."""
        self.other_managers = managers
        self._windows = [other for other in managers if not isinstance(other.kv_cache_spec, MambaSpec)]
        states = (other.kv_cache_spec for other in managers if isinstance(other.kv_cache_spec, MambaSpec))
        self._state_blocks = sum(state_blocks(spec) for spec in states)

    def foresee(self, request: Request, blocks_of: Callable[[str], Iterable[KVCacheBlock]]) -> Life:
        """The life that a request without blocks begins with. blocks_of: those that a request holds."""
        settings = settings_or_none(self.settings, request)
        if request.resumable:
            self._sessions[request.request_id] = request
        stop = request.num_prompt_tokens if settings.boundary is None else settings.boundary
        publishes = self.may_publish and settings.outlives
        if publishes:
            # What comes later sees the same state then, whoever computed it.
            stop = stop // self.block_tokens * self.block_tokens
            while cut := [
                b for b, e in items_of((f.modality, f.mm_position) for f in request.mm_features) if b < stop < e
            ]:
                stop = cut[0] // self.block_tokens * self.block_tokens  # no image is evicted in half
        policy = PRESETS.get(settings.policy)  # there is none called "none"
        repeats = self._echo_tokens(request, stop) if policy is not None and policy.reconstructs else 0
        if policy is not None and policy.fallback:
            # The keys of an image, and of what follows it, may have been turned by other positions than their places.
            apart = bool(request.mm_features) and self.own_positions
            if apart if policy.learned else not repeats:
                settings = settings.model_copy(update={"policy": policy.fallback})
                if self.settings.evicts_late(policy.fallback, settings.answers) != policy.fallback:
                    settings = settings.model_copy(update={"when": "always"})
        # A prefill yields the answer's first token: if no other is asked for (a classifier, a beam search step),
        # nobody reads what is kept, unless an audit shows it.
        brief = request.max_tokens == 1 and request.num_prompt_tokens == stop and not request.resumable
        key = None
        if publishes and stop:
            key = Key(request.block_hashes[stop // self.block_tokens - 1], self._kind(settings))
        life = Life(request, settings, stop, Phase.PREFILL, brief and key is None, echo_tokens=repeats, key=key)
        count = 0 if life.brief and self.settings.audit is None else self._budget(life, 0)[1]
        beside = count
        if repeats:
            beside += echo_blocks(stop, self.max_model_len, self.block_tokens) + self.blocks_beside(repeats)
        life.fits = not count or self._fits(request, beside, blocks_of)
        # Who begins with a packing has no originals.
        if not count or not (life.fits or any(self.may_begin_with(life, 1))):
            life.turn(Phase.WHOLE)
            life.key = None
        return life

    @property
    def may_publish(self) -> bool:
        """Whether packings can be found again: by vLLM's hashes, which are those of the other groups' blocks, too."""
        return self._can_share and all(other.block_size == self.block_tokens for other in self.other_managers)

    def windows_before(self, request: Request, end: int) -> dict[int, list[KVCacheBlock]] | None:
        """By KV cache group, what the other ones have of a request that goes on behind its first `end` tokens: cached
        blocks of the window before them, of its chunk, or the one with the state at its end, and null blocks in place
        of all others. None if some are not cached."""
        found: dict[int, list[KVCacheBlock]] = {}
        for other in self.other_managers:
            first, group = other.get_num_skipped_tokens(end) // self.block_tokens, other.kv_cache_group_id
            found[group] = [self._pool.null_block] * first
            for block_hash in request.block_hashes[first : end // self.block_tokens]:
                if (cached := self._pool.get_cached_block(block_hash, [group])) is None:
                    return None
                found[group] += cached
        return found

    def _kind(self, settings: RequestSettings) -> Kind:
        again = settings.answers == "evict" and self.settings.evicts_again(settings.policy)
        later = PRESETS[settings.policy].evicts_answers_by if again else None
        return Kind(settings.policy, settings.keep, settings.budget, settings.widths, later, self.library.generation)

    def may_begin_with(self, life: Life, at_least: int) -> Iterator[Published]:
        """What was packed for earlier requests, and this one, whose stop lies ahead, may begin with; best first.
        at_least: so many tokens of a request must be left to compute."""
        request, settings = life.request, life.settings
        if request.skip_reading_prefix_cache:
            return
        most = request.num_tokens - at_least
        own = self.library.find(life.key) if life.key is not None and life.stop <= most else None
        if own is not None and own.parent is not None and settings.answers == "evict":
            own = None  # what was computed over a packing is not chosen from as part of it
        as_named = own is not None and own.parent is None and settings.boundary is not None
        if own is not None and (as_named or self._mostly_packed(request, own)):
            yield own
        if settings.takes_any and self.may_publish:
            ends = request.num_tokens // 2, most
            for found in self.library.of_prefix(self._kind(settings), request.block_hashes, self.block_tokens, ends):
                if self._mostly_packed(request, found):
                    yield found

    @staticmethod
    def _mostly_packed(request: Request, found: Published) -> bool:
        """What is not packed stays as it is: a prompt that is more than half of that is packed anew, as a whole."""
        return 2 * (request.num_tokens - found.eviction.region.stop) <= request.num_tokens

    def _echo_tokens(self, request: Request, stop: int) -> int:
        """How many tokens of its prompt one echo of this request repeats; 0: none, or there is no room, or its prompt
        cannot be repeated as tokens, or a repetition would not leave the model's states as they are."""
        if request.mm_features or request.prompt_token_ids is None or self._state_blocks:
            return 0
        return echo_tokens(stop, self.max_model_len)

    def _fits(self, request: Request, beside: int, blocks_of: Callable[[str], Iterable[KVCacheBlock]]) -> bool:
        """Whether the pool can hold originals and these blocks side by side, as they are for a step or more. If it
        never can, the request is served whole: to refuse it, or to let it wait for ever, would be worse."""
        needed = cdiv(request.num_tokens, self.block_tokens) + beside + self.blocks_beside(request.num_tokens)
        if needed <= self._pool.get_num_free_blocks():
            return True
        usable = self._pool.num_gpu_blocks - 1  # one is vLLM's null block
        if needed > usable:
            return False
        # A session that waits for its next input gives nothing back, however long that takes.
        idle = (r for r, s in self._sessions.items() if s.status is RequestStatus.WAITING_FOR_STREAMING_REQ)
        pinned = {block.block_id for request_id in idle for block in blocks_of(request_id) if not block.is_null}
        return needed <= usable - len(pinned)

    def forget(self, request_id: str) -> None:
        """The request will not come again."""
        self.relatives.remove(request_id)
        self._sessions.pop(request_id, None)

    def blocks_beside(self, num_tokens: int) -> int:
        """Blocks that a request of so many tokens takes in the other KV cache groups, at most."""
        return self._state_blocks + sum(
            other.get_num_blocks_to_allocate("", num_tokens, [], 0, 0, num_tokens, apply_admission_cap=True)
            for other in self._windows
        )

    def plan(self, life: Life, life_of: Callable[[Request], Life]) -> tuple[Region, int]:
        """What an eviction of this request, whose stop lies ahead, would choose from now, and `K`, 0 if it is not worth
        it. life_of: the life of any live request."""
        shared = 0
        # A request that may not read the prefix cache computes copies of its own, which nobody shares.
        reads = not life.accumulates and not life.request.skip_reading_prefix_cache and life.key is None
        if self._can_share and self.settings.shared == "keep" and reads:
            full_blocks = life.stop // self.block_tokens
            # Nobody takes more than holds all tokens.
            keep = min(life.settings.keep, 1 / self.format(life.settings).density)
            shared = worth_sharing(life, keep, full_blocks, self.block_tokens, self.relatives, life_of)
        return self._budget(life, shared)

    def least_blocks(self, life: Life) -> int:
        """Blocks that a request whose stop lies ahead, and that shares nothing, is packed into."""
        return self._budget(life, 0)[1]

    def blocks_to_pack(self, life: Life) -> int:
        """Blocks that a request whose stop lies ahead, and that shares nothing, takes until it is packed, at most."""
        num_tokens = life.request.num_tokens
        return cdiv(num_tokens, self.block_tokens) + self.least_blocks(life) + self.blocks_beside(num_tokens)

    def _budget(self, life: Life, shared_blocks: int) -> tuple[Region, int]:
        protected = min(cdiv(life.settings.protect, self.block_tokens), life.stop // self.block_tokens)
        region = self.region(life.stop, max(shared_blocks, protected))
        return region, self.budget_blocks(life.settings, region)

    def budget_blocks(
        self, settings: RequestSettings, region: Region, policy: str | None = None, held_blocks: int | None = None
    ) -> int:
        """`K` of a request with these settings, by another policy if one is named. held_blocks: see
        `Region.budget_blocks`."""
        policy, format = policy or settings.policy, self.format(settings)
        return self.settings.budget_blocks(region, policy, settings.keep, format, settings.budget, held_blocks)

    def region(self, stop: int, shared_blocks: int) -> Region:
        """What an eviction at `stop` chooses from."""
        return self.settings.region(stop, shared_blocks, self.block_tokens, self._page_tokens)

    def format(self, settings: RequestSettings) -> Format:
        """How a request with these settings is packed."""
        return self._formats[settings.widths or "16"]
