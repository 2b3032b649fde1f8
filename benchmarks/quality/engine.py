"""One vLLM engine for a whole run: every request chooses its own policy, ratio and boundary.

The exact KV of a prompt stays in the prefix cache, so each further setting on the same prompt costs one observation
window of prefill, the eviction and the answer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from vllm_defensive.packing import Format
from vllm_defensive_kernels.widths import PageShape

NONE = "none"
FP8 = "fp8"  # not a policy: stock vLLM with its cache in fp8, half the memory and nothing evicted


@dataclass(frozen=True)
class Setting:
    """What happens to a prompt's cache. boundary: evict there; None: at the end of the prompt. reuse: whether what is
    kept is for later prompts, too.

    budget: tokens of 16 bits that are kept a head, on average; it takes the place of the ratio. interval: if not 0, the
    answer is evicted as well, each time that it has so many more tokens. protect: leading prompt tokens that stay.
    widths: in which what is kept is packed; None: as the policy's are. part: if not 0, the prompt is read in parts of
    so many tokens, and evicted after each. late: it is evicted when memory is short, and not before.
    """

    policy: str = NONE
    keep: float = 1.0
    boundary: int | None = None
    reuse: str = "off"
    budget: int | None = None
    interval: int = 0
    protect: int = 0
    widths: str | None = None
    part: int = 0
    late: bool = False

    def extra_args(self) -> dict[str, Any]:
        if self.policy == NONE:
            return {"kv_eviction": NONE}
        extra: dict[str, Any] = {"kv_eviction": self.policy}
        extra |= {"kv_eviction_keep": self.keep} if self.budget is None else {"kv_eviction_budget": self.budget}
        if self.reuse != "off":
            extra["kv_eviction_reuse"] = self.reuse
        if self.interval:
            extra |= {"kv_eviction_answers": "evict", "kv_eviction_interval": self.interval}
        if self.part:
            extra |= {"kv_eviction_prompts": "bounded", "kv_eviction_prompt_interval": self.part}
        if self.late:
            extra["kv_eviction_when"] = "full"
        if self.widths is not None:
            extra["kv_eviction_widths"] = self.widths
        if self.protect:
            extra["kv_eviction_protect"] = self.protect
        return extra if self.boundary is None else {**extra, "kv_eviction_boundary": self.boundary}


class Engine:
    """vLLM with our plugin, in this process."""

    def __init__(
        self,
        model: str | Path,
        *,
        dtype: str = "float32",
        cache_gib: int = 2,
        page_tokens: int = 32,
        max_model_len: int = 8192,
        audit: str | None = None,
        learned: str | None = None,
        stock: bool = False,
        **arguments: Any,
    ) -> None:
        # Read when torch and vLLM are imported. One thread: in one process with the engine, more of them wait for each
        # other most of the time.
        for name, value in {
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            "VLLM_CPU_KVCACHE_SPACE": str(cache_gib),
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # bound, all engines of a machine would crowd on its first core
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_LOGGING_LEVEL": "WARNING",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_DEFENSIVE_INTERNAL_POLICIES": "1",  # keep-all is the noise floor
        }.items():
            os.environ.setdefault(name, value)
        import torch
        from vllm import LLM

        import vllm_defensive
        from benchmarks.quality.forced import ForcedAnswers
        from vllm_defensive.settings import engine as config

        torch.set_num_threads(1)
        # Settings measured side by side share their whole prompt; each must be evicted as if it were alone.
        own: dict[str, Any] = {"per_request": True, "shared": "evict", "audit": audit, "learned": learned}
        own["reuse"] = "off"  # and at its boundary, to the token, unless it says otherwise
        self.llm = LLM(
            str(model),
            dtype=dtype,
            block_size=page_tokens,
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_batched_tokens=max(2048, page_tokens),
            max_num_seqs=64,
            disable_log_stats=False,
            logits_processors=[ForcedAnswers],
            **({} if stock else vllm_defensive.engine_kwargs(NONE, **own)),
            **arguments,
        )
        self.tokenizer = self.llm.get_tokenizer()
        self._numbers = count()
        self._page_tokens = page_tokens
        self._settings = config.EvictionConfig(policy=NONE, per_request=True, shared="evict")
        model_config = self.llm.llm_engine.vllm_config.model_config
        self._page = PageShape(page_tokens, model_config.get_head_size(), model_config.dtype.itemsize)

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    def forced(self, jobs: Sequence[tuple[list[int], Any, Setting]], *, skip_prefix_cache: bool = False) -> list[Any]:
        """Run (prompt, `Forced`, setting) jobs in one batch; returns vLLM's outputs, the records fill the `Forced`."""
        if not jobs:
            return []
        from vllm import SamplingParams

        from benchmarks.quality.forced import ARGUMENT, PENDING

        numbers = [next(self._numbers) for _ in jobs]
        PENDING.update((number, forced) for number, (_, forced, _) in zip(numbers, jobs, strict=True))
        params = [
            SamplingParams(
                temperature=0,
                max_tokens=len(forced.tokens),
                ignore_eos=True,
                detokenize=False,
                skip_reading_prefix_cache=skip_prefix_cache,
                extra_args={**setting.extra_args(), ARGUMENT: number},
            )
            for number, (_, forced, setting) in zip(numbers, jobs, strict=True)
        ]
        try:
            return self._generate([prompt for prompt, _, _ in jobs], params)
        finally:
            for number in numbers:
                del PENDING[number]

    def free(self, jobs: Sequence[tuple[list[int], int, Setting]]) -> list[Any]:
        """Run (prompt, most new tokens, setting) jobs greedily in one batch; returns vLLM's outputs."""
        from vllm import SamplingParams

        params = [
            SamplingParams(temperature=0, max_tokens=most, extra_args=setting.extra_args()) for _, most, setting in jobs
        ]
        return self._generate([prompt for prompt, _, _ in jobs], params)

    def _generate(self, prompts: list[list[int]], params: list[Any]) -> list[Any]:
        return self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], params, use_tqdm=False)

    def retention(self, setting: Setting, prompt_tokens: int) -> float:
        """Bytes of the prompt's KV cache that are held after the eviction, as a share of the full cache's."""
        if setting.policy == FP8:
            return 0.5
        evicted_at = prompt_tokens if setting.boundary is None else setting.boundary
        region = self._settings.region(evicted_at, 0, self._page_tokens)
        widths = self._settings.meant_widths(setting.policy)
        packed = self._settings.budget_blocks(region, setting.policy, setting.keep, Format.of(widths, self._page))
        if not packed:
            return 1.0
        full_blocks = evicted_at // self._page_tokens
        return (packed * self._page_tokens + prompt_tokens - full_blocks * self._page_tokens) / prompt_tokens

    def totals(self) -> dict[str, float]:
        """The engine's eviction counters, by their names."""
        return {m.name: m.value for m in self.llm.get_metrics() if "kv_eviction" in m.name and hasattr(m, "value")}
