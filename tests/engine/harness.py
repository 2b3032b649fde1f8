"""vLLM's real scheduler and block pool without a model: steps are scheduled, "run" on a ghost worker, and processed."""

from __future__ import annotations

import math
import random
from collections import Counter, deque
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch

import vllm_defensive
from tests.engine.ghost import GhostWorker
from tests.engine.integrity import check_integrity, own_blocks, shared_blocks
from vllm_defensive.compat.channels import attach_report
from vllm_defensive.counts import WorkerReport
from vllm_defensive.plan import Eviction

MAX_TOKENS = 16


@lru_cache
def _block_hasher(block_size: int) -> Callable[[Any], Any]:
    from vllm.utils.hashing import get_hash_fn_by_name
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

    hash_fn = get_hash_fn_by_name("sha256")
    init_none_hash(hash_fn)
    return get_request_block_hasher(block_size, hash_fn)


class Harness:
    """One scheduler over `num_blocks` usable blocks: with eviction if `policy` is given, else stock vLLM's.

    drafts: how many tokens are guessed of each answer in each step, at most: some right, some wrong.
    states, chunks: KV cache groups of recurrent layers, and of layers that attend within chunks of 2.5 blocks.
    settings: those of `vllm_defensive.engine_kwargs`, with min_tokens 33 unless given.
    """

    def __init__(
        self,
        model: Any,
        *,
        num_blocks: int,
        block_size: int = 32,
        policy: str | None = "snapkv",
        asynchronous: bool = False,
        chunk: int = 512,
        max_num_seqs: int = 64,
        max_model_len: int = 4096,
        scheduling: str = "fcfs",
        long_prefill: int = 0,
        caching: bool = True,
        drafts: int = 0,
        states: int = 0,
        chunks: int = 0,
        **settings: Any,
    ) -> None:
        from vllm.engine.arg_utils import EngineArgs
        from vllm.v1.core.sched.async_scheduler import AsyncScheduler
        from vllm.v1.core.sched.scheduler import Scheduler
        from vllm.v1.kv_cache_interface import (
            ChunkedLocalAttentionSpec,
            FullAttentionSpec,
            KVCacheConfig,
            KVCacheGroupSpec,
            KVCacheSpec,
            MambaSpec,
        )
        from vllm.v1.structured_output import StructuredOutputManager

        from vllm_defensive.engine.scheduler import make_scheduler
        from vllm_defensive.engine.spec import as_evictable
        from vllm_defensive.settings.engine import from_vllm_config

        extra = {} if policy is None else vllm_defensive.engine_kwargs(policy, **{"min_tokens": 33, **settings})
        config = EngineArgs(
            model=str(model),
            block_size=block_size,
            max_num_batched_tokens=chunk,
            max_num_seqs=max_num_seqs,
            max_model_len=max_model_len,
            scheduling_policy=scheduling,
            long_prefill_token_threshold=long_prefill,
            enable_prefix_caching=caching,
            speculative_config={"method": "ngram", "num_speculative_tokens": drafts} if drafts else None,
            **extra,
        ).create_engine_config()
        # The CPU platform turns asynchronous scheduling off; a scheduler does not care who runs its steps.
        config.scheduler_config.async_scheduling = asynchronous
        config.cache_config.num_gpu_blocks = num_blocks + 1  # one is vLLM's null block
        if states:
            config.cache_config.mamba_cache_mode = "align" if caching else "none"
        shape: dict[str, Any] = {
            "block_size": block_size, "num_kv_heads": 2, "head_size": 32, "dtype": torch.bfloat16,
        }  # fmt: skip
        spec: KVCacheSpec = FullAttentionSpec(**shape)
        self.eviction = from_vllm_config(config)
        if self.eviction is not None:
            spec = as_evictable(spec, self.eviction, block_size // 2 if states else None)
        state = MambaSpec(
            block_size=block_size if caching else max_model_len,
            shapes=((4, 32),),
            dtypes=(torch.float32,),
            mamba_cache_mode=config.cache_config.mamba_cache_mode,
        )
        chunked = ChunkedLocalAttentionSpec(**shape, attention_chunk_size=5 * block_size // 2)
        specs = [spec, *[state] * states, *[chunked] * chunks]
        groups = [
            KVCacheGroupSpec([f"model.layers.{2 * g + i}.attn" for i in range(2)], s) for g, s in enumerate(specs)
        ]
        lcm = math.lcm(*(s.block_size for s in specs))
        make = make_scheduler if policy is not None else AsyncScheduler if asynchronous else Scheduler
        self.scheduler = make(
            vllm_config=config,
            kv_cache_config=KVCacheConfig(
                num_blocks=num_blocks + 1,
                kv_cache_tensors=[],
                kv_cache_groups=groups,
                prefix_cache_retention_interval=0 if states else None,
            ),
            structured_output_manager=StructuredOutputManager(config),
            block_size=lcm,
            hash_block_size=lcm,
            log_stats=True,
        )
        self.manager, *self._beside = self.scheduler.kv_cache_manager.coordinator.single_type_managers
        self.pool = self.scheduler.kv_cache_manager.block_pool
        self.num_blocks, self.block_size, self.asynchronous = num_blocks, block_size, asynchronous
        self._tokens_of: dict[str, list[int]] = {}
        self._asked: set[str] = set()
        window = self.eviction.window if self.eviction is not None else 0
        self.ghost = GhostWorker(num_blocks + 1, block_size, window, self._tokens_of, [state.block_size] * states)
        self._in_flight: deque[Any] = deque()
        self._max_drafts, self._guesses = drafts, random.Random(drafts)
        self.accepted: Counter[int] = Counter()
        """How often so many drafts of a row were right, among rows that had any."""
        self.stats: list[Any] = []
        """Every `SchedulerStats` that went out."""
        self.hits: dict[str, int] = {}
        """Prefix-cache hit, in tokens, of each request's first admission."""

    # -- driving ------------------------------------------------------------------------------------------------------

    def add(
        self,
        prompt: Iterable[int],
        max_tokens: int = MAX_TOKENS,
        priority: int = 0,
        extra_args: dict[str, Any] | None = None,
        stop: list[str] | None = None,
        **others: Any,
    ) -> str:
        """Queue a request; returns its id. The token that it draws at a position depends on both. extra_args: its
        `kv_eviction*` fields. others: of vLLM's `Request`."""
        from vllm import SamplingParams
        from vllm.v1.request import Request

        prompt, request_id = list(prompt), f"r{len(self._tokens_of)}"
        request = Request(
            request_id,
            prompt,
            SamplingParams(max_tokens=max_tokens, ignore_eos=True, temperature=0, stop=stop, extra_args=extra_args),
            None,
            block_hasher=_block_hasher(self.block_size) if self.pool.enable_caching else None,
            priority=priority,
            arrival_time=float(len(self._tokens_of)),
            **others,
        )
        drawn = [(len(self._tokens_of) * 131 + i * 17) % 500 + 2 for i in range(max_tokens)]
        self._tokens_of[request_id] = prompt + drawn
        self._asked.add(request_id)
        self.scheduler.add_request(request)
        return request_id

    def abort(self, *request_ids: str) -> None:
        from vllm.v1.request import RequestStatus

        self.scheduler.finish_requests(request_ids, RequestStatus.FINISHED_ABORTED)

    def step(self) -> Any:
        """Schedule and run one step; process it at once, or under asynchronous scheduling one step later."""
        output = self.scheduler.schedule()
        for new in output.scheduled_new_reqs:
            self.hits.setdefault(new.req_id, new.num_computed_tokens)
            if new.req_id not in self._tokens_of:  # one of the scheduler's own, whose answer nobody reads
                self._tokens_of[new.req_id] = [*new.prompt_token_ids, 0]
        accepted = {r: self._count_right(r, drafts) for r, drafts in output.scheduled_spec_decode_tokens.items()}
        self.accepted.update(accepted.values())
        rejected = {r: len(output.scheduled_spec_decode_tokens[r]) - count for r, count in accepted.items()}
        self.ghost.execute(output, rejected)
        self._in_flight.append((output, self._draw(output, rejected)))
        while len(self._in_flight) > (1 if self.asynchronous and output.total_num_scheduled_tokens else 0):
            outputs = self.scheduler.update_from_output(*self._in_flight.popleft())
            told = {o.request_id for of_client in outputs.values() for o in of_client.outputs}
            assert told <= self._asked, f"nobody has asked {told - self._asked}"
            self.stats += [o.scheduler_stats for o in outputs.values() if o.scheduler_stats is not None]
        if self._max_drafts:
            self._guess(output)
        return output

    def _count_right(self, request_id: str, drafts: list[int]) -> int:
        """How many of the drafts that end the request's tokens of this step are right, up to the first that is not."""
        first = self.scheduler.requests[request_id].num_computed_tokens - len(drafts)
        true = self._tokens_of[request_id][first : first + len(drafts)]
        return next((i for i, (a, b) in enumerate(zip(drafts, true, strict=False)) if a != b), len(true))

    def _guess(self, output: Any) -> None:
        """Hand the scheduler drafts for the next step."""
        from vllm.v1.outputs import DraftTokenIds

        ids = [r for r in output.num_scheduled_tokens if r in self.scheduler.requests]
        drafts = []
        for request_id in ids:
            known = self.scheduler.requests[request_id].num_tokens
            right = self._tokens_of[request_id][known : known + self._guesses.randrange(self._max_drafts + 1)]
            right = right[: self._guesses.randrange(self._max_drafts + 1)]
            drafts.append(right + [0] * self._guesses.randrange(self._max_drafts + 1 - len(right)))  # nobody draws 0
        self.scheduler.update_draft_token_ids(DraftTokenIds(ids, drafts))

    def _draw(self, output: Any, rejected: dict[str, int]) -> Any:
        from vllm.v1.outputs import ModelRunnerOutput

        ids = list(output.num_scheduled_tokens)
        tokens: list[list[int]] = []
        for request_id in ids:
            request = self.scheduler.requests[request_id]
            drafts = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            computed = request.num_computed_tokens
            first, last = computed - drafts, computed - rejected.get(request_id, 0)
            tokens.append([] if request.is_prefill_chunk else self._tokens_of[request_id][first : last + 1])
        drawn = ModelRunnerOutput(ids, {r: i for i, r in enumerate(ids)}, sampled_token_ids=tokens)
        attach_report(drawn, WorkerReport(cancelled=self.ghost.cancelled))
        return drawn

    def run(self, max_steps: int = 2000) -> int:
        """Step until nobody is left, checking as we go; returns the number of steps."""
        for steps in range(max_steps):
            if not self.scheduler.has_requests():
                return steps
            self.step()
            self.check()
        raise AssertionError(f"requests are stuck: {self.scheduler.get_request_counts()} running and waiting")

    # -- looking ------------------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self.pool.get_num_free_blocks()

    @property
    def held(self) -> int:
        return self.num_blocks - self.free

    @property
    def evictions(self) -> list[Eviction]:
        return self.ghost.evictions

    @property
    def live(self) -> list[str]:
        return list(self.scheduler.requests)

    def tokens(self, request_id: str) -> list[int]:
        """Prompt and answer of a request."""
        return self._tokens_of[request_id]

    def check(self) -> None:
        """Count every reference to every block and compare with what the pool believes."""
        owners: Counter[int] = Counter()
        for manager in (self.manager, *self._beside):
            for blocks in manager.req_to_blocks.values():
                owners.update(block.block_id for block in blocks if not block.is_null)
        if self.eviction is not None:
            check_integrity(self.manager)
            families = self.manager.outlook.relatives._families
            assert {r for family in families.values() for r in family} <= set(self.scheduler.requests)
            assert all(families.values()), "no family without members is kept"
            assert set(self.manager.outlook._sessions) <= set(self.scheduler.requests)
            amendments = self.scheduler._amendments
            assert amendments._silent | amendments._reporting <= set(self.scheduler.requests)
            assert set(self.manager.lifecycle._reports) <= set(self.scheduler.requests)
            for life in self.manager.lifecycle.lives.values():
                owners.update(block.block_id for block in own_blocks(life) + shared_blocks(life))
            for packing in self.manager.lifecycle.library.pins:
                owners.update(block.block_id for part in packing.line for block in part.blocks)
        null = self.pool.null_block.block_id
        for block in self.pool.blocks:
            if block.block_id != null:
                assert block.ref_cnt == owners[block.block_id], f"{block} has {owners[block.block_id]} owners"
        queued = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(queued) == len(set(queued)) == self.num_blocks - len(owners), "free list and owners disagree"
        assert not set(queued) & set(owners)

    def assert_all_returned(self) -> None:
        """Every block is back, and vLLM itself agrees: it resets its prefix cache only when no block is in use."""
        self.check()
        assert not self.scheduler.requests
        if self.eviction is not None:
            self.manager.lifecycle.library.pins.drop_all()
        assert self.free == self.num_blocks
        assert self.scheduler.reset_prefix_cache()


def text(length: int, seed: int) -> list[int]:
    """A prompt whose tokens occur in no prompt of another seed at the same place (seeds below 400)."""
    return [(seed + 7 * i * i + 3 * i) % 500 + 2 for i in range(length)]
