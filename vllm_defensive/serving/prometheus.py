"""Counters that prove that eviction ran: from the scheduler to `/metrics` and `LLM.get_metrics()`.

vLLM's stats go from each engine to the API server in `SchedulerStats`; our counts travel on them (`channels.py`), and
are taken off again by the logger below, the first in line.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import Counter, Gauge, Histogram
from vllm.v1.metrics.loggers import AggregateStatLoggerBase

from vllm_defensive.compat.channels import take_counts
from vllm_defensive.counts import DECILES, Increase
from vllm_defensive.serving import recent
from vllm_defensive.settings.engine import from_vllm_config

# field of Totals -> (metric, what it counts)
COUNTERS = {
    "requests": ("vllm:kv_eviction_requests", "Evictions of a request's prompt; a preempted request's counts again."),
    "prompt_tokens": (
        "vllm:kv_eviction_prompt_tokens",
        "Prompt tokens of evicted requests, up to where they were evicted.",
    ),
    "kept_tokens": ("vllm:kv_eviction_kept_tokens", "Prompt tokens kept, mean over layers and heads."),
    "held_tokens": (
        "vllm:kv_eviction_held_tokens",
        "Memory left of evicted prompts, in tokens as the cache has them unpacked.",
    ),
    "prefix_hit_tokens": (
        "vllm:kv_eviction_prefix_hit_tokens",
        "Prompt tokens of evicted requests that came from the prefix cache.",
    ),
    "freed_blocks": ("vllm:kv_eviction_freed_blocks", "KV cache blocks given back, net of packed ones."),
    "cancelled": ("vllm:kv_eviction_cancelled", "Evictions that could not be carried out; nothing was dropped."),
    "echo_tokens": ("vllm:kv_eviction_echo_tokens", "Tokens computed to look at a prompt again, for its scores."),
    "adoptions": ("vllm:kv_eviction_adoptions", "Requests that began with what was packed for an earlier one."),
    "adopted_tokens": ("vllm:kv_eviction_adopted_tokens", "Tokens of their prompts that they did not compute."),
    "repeats": ("vllm:kv_eviction_repeats", "Evictions of requests that had been evicted before."),
    "late": ("vllm:kv_eviction_late", "Evictions of requests that stay whole until their memory is wanted."),
    "published": ("vllm:kv_eviction_published", "Packings that outlived their request."),
    "lost": ("vllm:kv_eviction_published_lost", "Those of them whose memory was needed by others."),
    "dropped": (
        "vllm:kv_eviction_published_dropped",
        "Those of them that were forgotten: replaced, or by new weights, or with the prefix cache.",
    ),
}
# Seconds are a histogram: `LLM.get_metrics()` cuts counters down to whole numbers.
SECONDS = ("vllm:kv_eviction_seconds", "Seconds that a step spent on scoring and packing.")
# The heads of the first tensor-parallel rank stand for those of all: nothing comes back from the others.
KEPT_PAGES = ("vllm:kv_eviction_kept_pages", "Head pages that evictions kept, by tenth of the layers, 0 the first.")
BY_POLICY = ("vllm:kv_eviction_requests_by_policy", "Evictions, by the policy that chose.")
KEEP_SHARE = (
    "vllm:kv_eviction_keep_share",
    "Share of the memory of its prompt, up to where it was evicted, that a request kept.",
)
# field of State -> (metric, what it says)
GAUGES = {
    "used_blocks": ("vllm:kv_eviction_used_blocks", "KV cache blocks that requests hold."),
    "packed_blocks": ("vllm:kv_eviction_packed_blocks", "Those of them that hold the packed pages of evicted prompts."),
    "saved_blocks": ("vllm:kv_eviction_saved_blocks", "Blocks that these requests would hold more without eviction."),
    "published": ("vllm:kv_eviction_published_packings", "Packings that later requests may begin with."),
    "published_blocks": (
        "vllm:kv_eviction_published_blocks",
        "Blocks of these, whether a request holds them now or they wait among the free ones.",
    ),
    "pinned_blocks": ("vllm:kv_eviction_pinned_blocks", "Those of them that stay, whether a request uses them or not."),
}
LEARNED = (
    "vllm:kv_eviction_learned",
    "The learned score that evictions go by, by its file: 1, or 0 once the model has other weights.",
)
_SHARES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
_BUCKETS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_LABELS = ("model_name", "engine")


class EvictionStatLogger(AggregateStatLoggerBase):
    """Takes our counts off the stats and adds them to Prometheus counters labelled as vLLM's own are."""

    def __init__(self, vllm_config: Any, engine_indexes: list[int], learned: str | None = None) -> None:
        """learned: file of the learned score."""
        model = vllm_config.model_config.served_model_name
        counters = {name: Counter(metric, text, _LABELS) for name, (metric, text) in COUNTERS.items()}
        seconds = Histogram(*SECONDS, _LABELS, buckets=_BUCKETS)
        self._counters = {i: {name: c.labels(model, str(i)) for name, c in counters.items()} for i in engine_indexes}
        self._seconds = {i: seconds.labels(model, str(i)) for i in engine_indexes}
        self._model = model
        self._pages = Counter(*KEPT_PAGES, (*_LABELS, "layer_decile"))
        self._by_policy = Counter(*BY_POLICY, (*_LABELS, "policy"))
        self._shares = Histogram(*KEEP_SHARE, (*_LABELS, "policy"), buckets=_SHARES)
        # Several API servers take turns at an engine's stats: the latest of them knows.
        self._gauges = {
            name: Gauge(metric, text, _LABELS, multiprocess_mode="mostrecent")
            for name, (metric, text) in GAUGES.items()
        }
        for i in engine_indexes:
            for decile in range(DECILES):
                self._pages.labels(model, str(i), str(decile))
            for gauge in self._gauges.values():
                gauge.labels(model, str(i))
        fresh = Gauge(*LEARNED, (*_LABELS, "file"), multiprocess_mode="mostrecent")
        self._fresh = {i: fresh.labels(model, str(i), learned) for i in engine_indexes if learned is not None}
        for gauge in self._fresh.values():
            gauge.set(1)

    def record(
        self, scheduler_stats: Any, iteration_stats: Any, *args: Any, engine_idx: int = 0, **kwargs: Any
    ) -> None:
        """Add what `attach_counts` put on the stats, and take it off."""
        if scheduler_stats is None:
            return
        for increase in take_counts(scheduler_stats):
            self._add(increase, engine_idx)

    def _add(self, increase: Increase, engine: int) -> None:
        if increase.totals is not None:
            for name, counter in self._counters[engine].items():
                counter.inc(getattr(increase.totals, name))
        if increase.microseconds:
            self._seconds[engine].observe(increase.microseconds * 1e-6)
        for decile, pages in enumerate(increase.decile_pages):
            self._pages.labels(self._model, str(engine), str(decile)).inc(pages)
        if increase.state is not None:
            recent.note_publishing(increase.state.publishes)
            for name, gauge in self._gauges.items():
                gauge.labels(self._model, str(engine)).set(getattr(increase.state, name))
            if engine in self._fresh:
                self._fresh[engine].set(not increase.state.stale_score)
        for record in increase.records:
            self._record_one(record, str(engine))

    def _record_one(self, record: dict[str, Any], engine: str) -> None:
        labels = (self._model, engine, record["policy"])
        if not record["adopted"] and not record["repeat"]:
            self._by_policy.labels(*labels).inc()
            self._shares.labels(*labels).observe(record["held_tokens"] / record["prompt_tokens"])
        recent.remember(record)

    def log_engine_initialized(self) -> None:
        """Nothing to add to vLLM's own lines."""


def make_logger(vllm_config: Any, engine_indexes: list[int]) -> EvictionStatLogger | None:
    """Our logger for an engine with eviction, None for any other."""
    settings = from_vllm_config(vllm_config)
    if settings is None:
        return None
    recent.count()
    return EvictionStatLogger(vllm_config, engine_indexes, settings.score_file)


def score_is_stale() -> bool:
    """Whether an engine has said that its learned score is."""
    return any(sample.value == 0 for sample in _samples() if sample.name == LEARNED[0])


def read_totals() -> dict[str, int]:
    """Totals over engines and API server processes, by field of `Totals`, as `/metrics` has them."""
    sums: dict[str, float] = {}
    for sample in _samples():
        sums[sample.name] = sums.get(sample.name, 0) + sample.value
    return {name: int(sums.get(f"{metric}_total", 0)) for name, (metric, _) in COUNTERS.items()}


def _samples() -> Iterator[Any]:
    """Of all engines and API server processes."""
    from vllm.v1.metrics.prometheus import get_prometheus_registry

    for metric in get_prometheus_registry().collect():
        yield from metric.samples
