"""vLLM's schedulers, with a message for the workers on every output of which they must know."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler

from vllm_defensive import metrics, vllm_compat
from vllm_defensive.config import from_vllm_config
from vllm_defensive.engine.kv_manager import EvictionBlockManager


class _EvictionMixin(Scheduler):
    """The whole addition; it works the same on top of the sync and of the async scheduler."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        managers = self.kv_cache_manager.coordinator.single_type_managers
        self.eviction_managers = [m for m in managers if isinstance(m, EvictionBlockManager)]
        if not self.eviction_managers:
            raise ValueError(
                "kv_eviction: this model has no full-attention layer whose KV cache can be evicted; "
                "drop --kv-eviction (or set it to none)"
            )
        for manager in self.eviction_managers:
            manager.requests = self.requests
        self._reported = metrics.Totals()

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        for manager in self.eviction_managers:
            manager.release_processed()
        output = super().schedule(*args, **kwargs)
        (manager,) = self.eviction_managers
        vllm_compat.attach_message(output, manager.take_message(output.num_scheduled_tokens))
        return output

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        (manager,) = self.eviction_managers
        manager.totals.microseconds += vllm_compat.read_microseconds(model_runner_output)
        return super().update_from_output(scheduler_output, model_runner_output)

    def make_stats(self, *args: Any, **kwargs: Any) -> Any:
        stats = super().make_stats(*args, **kwargs)
        if stats is not None:
            (manager,) = self.eviction_managers
            metrics.attach(stats, manager.totals - self._reported)
            self._reported = replace(manager.totals)
        return stats


class EvictionScheduler(_EvictionMixin, Scheduler):
    """Synchronous scheduling with eviction."""


class EvictionAsyncScheduler(_EvictionMixin, AsyncScheduler):
    """Asynchronous scheduling with eviction."""


def make_scheduler(*args: Any, **kwargs: Any) -> Scheduler:
    """What vLLM calls as its scheduler class: the platform decides last whether scheduling is asynchronous."""
    vllm_config = kwargs["vllm_config"]
    assert from_vllm_config(vllm_config) is not None
    scheduler_cls = EvictionAsyncScheduler if vllm_config.scheduler_config.async_scheduling else EvictionScheduler
    return scheduler_cls(*args, **kwargs)
