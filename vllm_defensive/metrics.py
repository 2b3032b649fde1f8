"""Counters that prove that eviction ran: from the scheduler to `/metrics` and `LLM.get_metrics()`.

vLLM's stats go from each engine to the API server in `SchedulerStats`, whose fields are fixed, so our counts travel as
extra integer entries of one of its dictionaries, and are taken out again by the logger below, the first in line.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

from prometheus_client import Counter, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_defensive.config import from_vllm_config

_PREFIX = "kv_eviction:"


@dataclass
class Totals:
    """What eviction has done so far: requests, tokens, blocks, microseconds."""

    requests: int = 0
    prompt_tokens: int = 0
    kept_tokens: int = 0
    freed_blocks: int = 0
    microseconds: int = 0

    def __sub__(self, other: Totals) -> Totals:
        return Totals(*(a - b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __bool__(self) -> bool:
        return any(astuple(self))


# field of Totals -> (metric, what it counts)
COUNTERS = {
    "requests": ("vllm:kv_eviction_requests", "Requests whose prompt's KV cache was evicted."),
    "prompt_tokens": ("vllm:kv_eviction_prompt_tokens", "Prompt tokens of evicted requests."),
    "kept_tokens": ("vllm:kv_eviction_kept_tokens", "Prompt tokens kept, mean over layers and heads."),
    "freed_blocks": ("vllm:kv_eviction_freed_blocks", "KV cache blocks given back, net of packed ones."),
}
# Seconds are a histogram: `LLM.get_metrics()` cuts counters down to whole numbers.
SECONDS = ("vllm:kv_eviction_seconds", "Seconds that a step spent on scoring and packing.")
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LABELS = ("model_name", "engine")


def attach(stats: Any, increase: Totals) -> None:
    """Put what was added since the last stats on `SchedulerStats`. Increases, because several API servers take
    turns."""
    for name in (*COUNTERS, "microseconds"):
        if value := getattr(increase, name):
            stats.waiting_lora_adapters[_PREFIX + name] = value


class EvictionStatLogger(AggregateStatLoggerBase):
    """Takes our counts off the stats and adds them to Prometheus counters labelled as vLLM's own are."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int]) -> None:
        model = vllm_config.model_config.served_model_name
        counters = {name: Counter(metric, text, _LABELS) for name, (metric, text) in COUNTERS.items()}
        seconds = Histogram(*SECONDS, _LABELS, buckets=_BUCKETS)
        self._counters = {i: {name: c.labels(model, str(i)) for name, c in counters.items()} for i in engine_indexes}
        self._seconds = {i: seconds.labels(model, str(i)) for i in engine_indexes}

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any
    ) -> None:
        """Add what `attach` put on the stats, and take it off."""
        if scheduler_stats is None:
            return
        carried = scheduler_stats.waiting_lora_adapters
        for name, counter in self._counters[engine_idx].items():
            if value := carried.pop(_PREFIX + name, 0):
                counter.inc(value)
        if microseconds := carried.pop(_PREFIX + "microseconds", 0):
            self._seconds[engine_idx].observe(microseconds * 1e-6)

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own lines."""


def make_logger(vllm_config: Any, engine_indexes: list[int]) -> EvictionStatLogger | None:
    """Our logger for an engine with eviction, None for any other."""
    return EvictionStatLogger(vllm_config, engine_indexes) if from_vllm_config(vllm_config) is not None else None
