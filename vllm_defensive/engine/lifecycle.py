"""The lives of one scheduler's requests, whose phases are in `life.py`: transitions, and what others are told."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import KVCacheBlock
from vllm.v1.request import Request

from vllm_defensive.counts import REMEMBERED, Totals
from vllm_defensive.engine.life import Life, Phase
from vllm_defensive.engine.published import Key, Library, Published
from vllm_defensive.packing import Format, Packing, Region
from vllm_defensive.plan import Eviction, Reconstruction, Score, StepMessage
from vllm_defensive.policy import PRESETS
from vllm_defensive.settings.engine import NONE
from vllm_defensive.settings.request import RequestSettings


class Lifecycle:
    """The lives of one scheduler's requests, and what happened to them since it was last asked."""

    def __init__(self, window: int, with_token_ids: bool, pool: BlockPool, most_pinned: float) -> None:
        """window: the engine's. with_token_ids: evictions tell the workers their prompts, for audits. pool: that the
        blocks come from. most_pinned: share of it."""
        self._window, self._with_token_ids = window, with_token_ids
        self.library = Library(pool, self._note_codes, most_pinned)
        self._in_use: Counter[int] = Counter()  # requests that hold a published packing, by its number
        self.totals = Totals()
        self.saved_blocks = 0  # sum over the live requests that were released
        self.packed_blocks = 0  # that live requests hold
        self.lives: dict[str, Life] = {}
        self.waiting: dict[str, Life] = {}  # of requests without an allocation, since the last look at them
        # Those of `lives` in these phases: few, and asked for in every step.
        self.echoing: dict[str, Life] = {}
        self.packing: dict[str, Life] = {}
        # Those that are to give memory back when it is wanted, and how often that, or what they can give, has changed.
        self.ripe: dict[str, Life] = {}
        self.ripe_changes = 0
        self.scheduled = self.processed = 0  # steps
        # Since the workers were last told: windows of requests that generate, and who has passed its own and is evicted
        # in a later step; requests that began to stand still, and that were given up.
        self._observe: dict[str, tuple[int, int]] = {}
        self._passed: list[str] = []
        self._held: list[str] = []
        self._released: list[str] = []
        self._clear: list[int] = []  # blocks of quantised pages that have gone back
        self._reconstruct: dict[str, Reconstruction] = {}
        self._adopted: dict[str, Eviction] = {}
        self.packers: dict[Key, str] = {}  # who is on its way to a packing that others may wait for
        self._watched: set[str] = set()  # in `lives`, and their last tokens before the stop are still to be scheduled
        self._planned: dict[str, Eviction] = {}
        # Since somebody asked; bounded, because nobody does where statistics are off.
        self._done: deque[tuple[Eviction, bool]] = deque(maxlen=REMEMBERED)  # and whether it was adopted
        self._reports: dict[str, dict[str, Any]] = {}  # of requests that were preempted

    def get(self, request_id: str) -> Life | None:
        return self.lives.get(request_id) or self.waiting.get(request_id)

    # -- transitions --------------------------------------------------------------------------------------------------

    def admit(self, request_id: str) -> None:
        """The request is about to get its first blocks; nothing happens if it has some."""
        if (life := self.waiting.pop(request_id, None)) is not None:
            self.lives[request_id] = life
            if life.ahead:
                self._watched.add(request_id)
                if life.key is not None and self.library.find(life.key) is None:
                    self.packers.setdefault(life.key, request_id)
            elif life.full and life.settings.answers == "evict" and not life.brief:
                self.ripen(life)

    @property
    def still_read(self) -> list[Life]:
        """Those whose stop lies ahead, or was reached in the step that is being scheduled."""
        return [self.lives[request_id] for request_id in self._watched]

    def ripen(self, life: Life) -> None:
        """The request may be asked for memory from now on, and is whole until then."""
        if life.ahead:
            life.turn(Phase.WHOLE)
            if life.reads_window:
                self.hold(life.request.request_id)
        self.ripe[life.request.request_id] = life
        self.ripe_changes += 1

    def spare(self, request_id: str) -> None:
        """The request is asked for no memory any more."""
        self.ripe.pop(request_id, None)
        self.ripe_changes += 1

    def is_being_packed(self, key: Key) -> bool:
        """Whether a request is on its way to the packing of this key."""
        return key in self.packers

    def adopt(self, request_id: str) -> list[KVCacheBlock] | None:
        """The request is about to get its first blocks: if it was found to begin with a packing, it holds that now.
        Returns the blocks at the positions behind it, the last ones that the request begins with; None if it was not.
        """
        life = self.waiting.get(request_id)
        if life is None or life.published is None:
            return None
        self.lives[request_id] = self.waiting.pop(request_id)
        self.library.hold(life.published)
        made, packed = life.published.eviction, life.published.packed
        self._in_use[made.number] += 1
        if self._in_use[made.number] == 1:
            self.packed_blocks += len(packed)
        life.stop, life.exact_tokens = made.region.stop, made.region.tokens[1]
        self._pin(life)
        score = replace(made.score, request_id=request_id, source_blocks=())
        life.eviction = replace(made, score=score, token_ids=self._token_ids(life, life.stop))
        life.blocks, life.adopted, life.echo_tokens, life.evictions = list(packed), True, 0, 1
        life.turn(Phase.PACKED)
        self._adopted[request_id] = life.eviction
        self.saved_blocks += life.eviction.packing.saved_blocks
        self.totals.adoptions += 1
        self.totals.adopted_tokens += life.published.end
        self._done.append((life.eviction, True))
        return life.published.growth

    def pack(
        self, life: Life, region: Region, blocks: list[KVCacheBlock], source_blocks: Sequence[int], format: Format
    ) -> None:
        """The request's stop is reached by what was allocated just now: it holds packed blocks beside its originals."""
        request_id, settings = life.request.request_id, life.settings
        token_ids = self._token_ids(life, life.stop)
        # What is published must serve those who generate more than this one.
        later = PRESETS[settings.policy].evicts_answers_by if life.again else None
        later = later if life.key is None else life.key.kind.later
        score = Score(request_id, settings.policy, settings.keep, region, tuple(source_blocks), later)
        packing = Packing(region, tuple(block.block_id for block in blocks), format)
        number = self.library.next_number() if life.key is not None else 0
        life.eviction, life.blocks = Eviction(score, packing, token_ids, number), blocks
        life.exact_tokens, life.evictions = region.tokens[1], 1
        self.packed_blocks += len(blocks)
        if not life.echo_tokens:
            self._plan(life)
            return
        life.turn(Phase.ECHOING)
        self.echoing[request_id] = life
        self._held.append(request_id)

    def pack_again(
        self,
        life: Life,
        policy: str,
        region: Region,
        blocks: list[KVCacheBlock],
        source_blocks: Sequence[int],
        format: Format,
        *,
        lasts: bool = True,
    ) -> None:
        """A request has generated enough, by the step that was scheduled just now, or its memory is wanted: what it
        holds packed, if anything, and what lies in `source_blocks` is packed into these blocks. lasts: so that it can
        be chosen from again."""
        token_ids = self._token_ids(life, region.stop)
        # What others may hold too is theirs: it is read, and left.
        life.former, life.replaced = life.eviction, life.blocks if life.published is None else []
        since = None if life.former is None else life.former.region
        later = policy if lasts else None
        score = Score(life.request.request_id, policy, life.settings.keep, region, tuple(source_blocks), later, since)
        packing = Packing(region, tuple(block.block_id for block in blocks), format)
        reader = life.request.num_computed_tokens
        life.eviction = Eviction(score, packing, token_ids, repeat=life.evictions, first_reader=reader)
        life.blocks = blocks
        life.evictions += 1
        life.stop, life.fence, life.ready_tokens = region.stop, self.scheduled + 1, 0
        if life.former is None:
            life.exact_tokens = region.tokens[1]
        self.packed_blocks += len(blocks)
        self._plan(life)

    def _token_ids(self, life: Life, stop: int) -> tuple[int, ...] | None:
        """For an audit, if there is to be one."""
        return tuple(life.request.all_token_ids[:stop]) if self._with_token_ids else None

    def _plan(self, life: Life) -> None:
        """The step that was scheduled, or is being scheduled, packs this request."""
        assert life.eviction is not None
        life.turn(Phase.PACKING)
        self._planned[life.request.request_id] = life.eviction
        self.packing[life.request.request_id] = life

    def observe(self, request_id: str, window: tuple[int, int]) -> None:
        """The step that was scheduled computes tokens of this window of a request that generates."""
        self._observe[request_id] = window

    def hold(self, request_id: str) -> None:
        """A request that generates is evicted in a later step, by the window that it has passed."""
        self._passed.append(request_id)

    def serve(self, echo: Request) -> None:
        """An echo begins, over the blocks of the request that it serves: it is never evicted itself, nor hashed."""
        settings = RequestSettings.model_construct(policy=NONE, keep=1.0)
        self.lives[echo.request_id] = Life(
            echo, settings, echo.num_prompt_tokens, Phase.WHOLE, is_echo=True, cached=True
        )

    def reconstruct(self, life: Life, echo_id: str, part: Reconstruction, *, last: bool) -> None:
        """The step that was scheduled runs tokens of an echo. last: and none is to come, for this request."""
        self._reconstruct[echo_id] = part
        if last:
            del self.echoing[life.request.request_id]
            self._plan(life)
            life.fence = self.scheduled + 1

    def give_up(self, life: Life) -> list[KVCacheBlock]:
        """There is no room for echoes: the request goes on over its originals. Returns blocks that are to go back."""
        del self.echoing[life.request.request_id]
        self._released.append(life.request.request_id)
        return self._leave_whole(life)

    def _leave_packed(self, life: Life) -> list[KVCacheBlock]:
        """What it was packed into before is still there."""
        assert life.former is not None
        self.totals.cancelled += 1
        life.evictions -= 1
        life.turn(Phase.PACKED)
        held = life.replaced if life.published is None else list(life.published.packed)
        blocks, life.blocks, life.replaced = life.blocks, held, []
        self._note_codes_of(life.eviction)
        life.eviction, life.former = life.former, None
        life.stop = life.eviction.region.stop
        self.packed_blocks -= len(blocks)
        return blocks

    def _leave_whole(self, life: Life) -> list[KVCacheBlock]:
        self.totals.cancelled += 1
        life.evictions = 0
        life.cached = False  # what is computed from now on may be hashed like any other
        self.stay_whole(life)
        blocks, life.blocks, life.eviction = self._give_back(life), [], None
        return blocks

    def stay_whole(self, life: Life) -> None:
        """Nothing of the request is evicted."""
        life.turn(Phase.WHOLE)
        self._pass_on(life)
        life.key = None

    def _packing_of(self, life: Life) -> Published | None:
        """What the request holds, or what was there before it, of which others know."""
        return life.published or (None if life.key is None else self.library.find(life.key))

    def _pin(self, life: Life) -> None:
        packing = None if life.settings.pin is None else self._packing_of(life)
        if packing is not None and packing.parent is None:  # a turn's end goes with its chat
            self.library.pins.set(packing, life.settings.pin or 0)

    def _pass_on(self, life: Life) -> None:
        """Nobody has to wait any longer for what this request was making."""
        if life.key is not None and self.packers.get(life.key) == life.request.request_id:
            del self.packers[life.key]

    def _give_back(self, life: Life) -> list[KVCacheBlock]:
        """The request holds no packed blocks any more. Returns those that are to go back, and are nobody else's."""
        if life.published is not None and life.eviction is not None:
            self._leave(life.published)
            if life.former is None:
                return []
            self.packed_blocks -= len(life.blocks)
            self._note_codes_of(life.eviction)
            return life.blocks
        self.packed_blocks -= len(life.blocks) + len(life.replaced)
        self._note_codes_of(life.eviction)
        self._note_codes_of(life.former)
        if life.eviction is not None and life.eviction.number:
            self.library.forget(life.eviction.number)
        return life.blocks + life.replaced

    def _leave(self, packing: Published) -> None:
        """A request holds it no longer."""
        self.library.leave(packing)
        number = packing.eviction.number
        self._in_use[number] -= 1
        if not self._in_use[number]:
            del self._in_use[number]
            self.packed_blocks -= len(packing.packed)

    def _note_codes_of(self, eviction: Eviction | None) -> None:
        if eviction is not None and eviction.packing.format.quantised:
            self._note_codes(eviction.packing.blocks)

    def _note_codes(self, blocks: Sequence[int]) -> None:
        """What is in these blocks, which others may have now, is no number to them."""
        self._clear += blocks

    def release(self, life: Life) -> Region:
        """The step that packed has been processed: the originals of this region are to go back. From now on others may
        hold the packed blocks, too."""
        assert life.packing is not None and life.eviction is not None
        life.turn(Phase.PACKED)
        self.ripe_changes += life.full
        del self.packing[life.request.request_id]
        if life.key is not None and life.former is None:
            life.published = self.library.publish(life.key, life.eviction, life.blocks)
            if life.published is not None:
                self._in_use[life.eviction.number] += 1
            self._pin(life)
            self._pass_on(life)
        self._count(life)
        saved = life.packing.saved_blocks - (0 if life.former is None else life.former.packing.saved_blocks)
        self.totals.freed_blocks += saved
        self.saved_blocks += saved
        return life.packing.region

    def take_replaced(self, life: Life) -> list[KVCacheBlock]:
        """A request that was packed anew has been released: what it was packed into before is to go back, unless that
        is a published packing, which is one request less's."""
        if life.published is not None:
            self._leave(life.published)
            life.published, life.former = None, None
            return []
        self._note_codes_of(life.former)
        blocks, life.replaced, life.former = life.replaced, [], None
        self.packed_blocks -= len(blocks)
        return blocks

    def cancel(self, eviction: Eviction) -> list[KVCacheBlock]:
        """The workers could not pack: the request goes on over its originals. Returns blocks that are to go back.

        Nothing happens if the request has ended since, or was preempted and is being evicted anew.
        """
        life = self.packing.get(eviction.request_id)
        if life is None or life.eviction is not eviction:
            return []
        del self.packing[eviction.request_id]
        self.spare(eviction.request_id)
        return self._leave_whole(life) if life.former is None else self._leave_packed(life)

    def end(self, request_id: str) -> list[KVCacheBlock]:
        """Finish, abort or preemption. Returns the packed blocks, which are to go back like all others."""
        if (report := self.report(request_id)) is not None:
            self._reports[request_id] = report  # a step that was under way may still end the answer
        self.waiting.pop(request_id, None)
        self._planned.pop(request_id, None)
        self._watched.discard(request_id)
        self.packing.pop(request_id, None)
        self.echoing.pop(request_id, None)
        self._adopted.pop(request_id, None)
        self.spare(request_id)
        life = self.lives.pop(request_id, None)
        if life is None:
            return []
        self._pass_on(life)
        if life.phase is Phase.PACKING:
            self._count(life)
        released = life.former if life.phase is Phase.PACKING else life.eviction
        if life.phase in (Phase.PACKED, Phase.PACKING) and released is not None:
            self.saved_blocks -= released.packing.saved_blocks
        return self._give_back(life)

    # -- what the workers and others are told -------------------------------------------------------------------------

    def take_message(self, num_scheduled_tokens: Mapping[str, int]) -> StepMessage:
        """What the workers must know of the step that was just scheduled.

        num_scheduled_tokens: tokens of each request in the step; `request.num_computed_tokens` includes them already.
        Evictions planned for a request that was preempted later in the same pass are gone by now.
        """
        self.scheduled += 1
        evictions, self._planned = list(self._planned.values()), {}
        message = StepMessage(scores=[eviction.score for eviction in evictions], evictions=evictions)
        message.reconstruct, self._reconstruct = self._reconstruct, {}
        message.held, self._held = [r for r in self._held if r in self.echoing] + self._passed, []
        message.released, self._released = self._released, []
        message.clear, self._clear = self._clear, []
        message.adopted, self._adopted = list(self._adopted.values()), {}
        message.forgotten = self.library.take_gone()
        message.observe, self._observe, self._passed = self._observe, {}, []
        for request_id in [r for r in self._watched if r in num_scheduled_tokens]:
            life = self.lives[request_id]
            end = life.request.num_computed_tokens
            if life.sums_attention:
                message.accumulate[request_id] = life.stop
            elif life.reads_window and end > life.stop - self._window:
                message.observe[request_id] = (life.stop - self._window, life.stop)
            if end >= life.stop:
                self._watched.discard(request_id)
        return message

    def _count(self, life: Life) -> None:
        """An eviction can be declined until its step has been processed; from then on it counts."""
        assert life.eviction is not None
        self._done.append((life.eviction, False))
        self.totals.late += life.full
        if life.former is not None:
            self.totals.repeats += 1
            return
        self.totals.requests += 1
        self.totals.prefix_hit_tokens += life.hit_tokens
        self.totals.prompt_tokens += life.eviction.region.stop
        self.totals.kept_tokens += life.eviction.packing.kept_tokens
        self.totals.held_tokens += life.eviction.packing.held_tokens

    def take_done(self) -> list[tuple[Eviction, bool]]:
        """Evictions that were carried out since the last call, and whether it was for another request before."""
        done = list(self._done)
        self._done.clear()
        return done

    def cacheable_tokens(self, request_id: str, num_tokens: int) -> int:
        """How many of the first `num_tokens` tokens may be hashed: none of a block filled after the eviction."""
        life = self.lives.get(request_id)
        if life is None or life.packing is None:
            return num_tokens
        limit = life.exact_tokens
        life.cached = num_tokens >= limit
        return min(num_tokens, limit)

    def forget(self, request_id: str) -> None:
        """The request will not come again."""
        self._reports.pop(request_id, None)

    def report(self, request_id: str) -> dict[str, Any] | None:
        """For the response of a request that asks for it: its policy and widths; tokens of its whole prompt, all and
        kept (a mean over layers and heads), and how many would take, unpacked, the memory that is left; whether that
        was packed for an earlier request; where a request wants it pinned, whether it is; where it was looked at again,
        tokens that this took."""
        life = self.lives.get(request_id)
        if life is None:
            return self._reports.get(request_id)
        if not life.settings.report:
            return None
        prompt, packing = life.request.num_prompt_tokens, life.packing
        if packing is None or life.phase is Phase.ECHOING:  # a request may end before its echoes do: nothing is packed
            return {"policy": NONE, "prompt_tokens": prompt, "kept_tokens": prompt, "held_tokens": prompt}
        behind = max(0, prompt - packing.region.stop)
        report = {
            "policy": life.settings.policy,
            "widths": packing.format.widths,
            "prompt_tokens": prompt,
            "kept_tokens": behind + packing.kept_tokens,
            "held_tokens": behind + packing.held_tokens,
            "adopted": life.adopted,
        }
        if life.settings.answers == "evict" or life.full:
            report["evictions"], report["tokens"] = life.evictions, max(prompt, packing.region.stop)
        if life.settings.pin is not None:
            report["pinned"] = (found := self._packing_of(life)) is not None and found in self.library.pins
        return report if not life.echo_tokens else {**report, "echo_tokens": life.repeated}
