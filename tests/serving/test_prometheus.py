"""Counts travel on vLLM's stats, are taken off again before others see them, and add up."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client import REGISTRY

from vllm_defensive.compat.channels import attach_counts
from vllm_defensive.counts import Increase, State, Totals
from vllm_defensive.serving import prometheus as metrics
from vllm_defensive.serving import recent
from vllm_defensive.serving.prometheus import EvictionStatLogger


def engine_config(policy: str | None) -> Any:
    additional = {} if policy is None else {"kv_eviction": {"policy": policy}}
    return SimpleNamespace(additional_config=additional, model_config=SimpleNamespace(served_model_name="m"))


@pytest.fixture
def logger() -> Iterator[EvictionStatLogger]:
    """A logger for two engines; its metrics are taken out of the registry again."""
    forget()
    made = metrics.make_logger(engine_config("snapkv"), [0, 1])
    assert made is not None
    yield made
    forget()


def forget() -> None:
    for collector in {c for c in REGISTRY._collector_to_names if "kv_eviction" in getattr(c, "_name", "")}:
        REGISTRY.unregister(collector)


def stats_with(increase: Increase, **others: int) -> Any:
    stats = SimpleNamespace(waiting_lora_adapters=dict(others))
    attach_counts(stats, increase)
    return stats


def value(name: str, engine: int = 0, **labels: str) -> float | None:
    return REGISTRY.get_sample_value(name, {"model_name": "m", "engine": str(engine), **labels})


def test_increases_add_up_engine_by_engine(logger: EvictionStatLogger) -> None:
    for engine, requests in ((0, 1), (1, 5), (0, 2)):
        totals = Totals(requests, 100, 30, prefix_hit_tokens=64, freed_blocks=4)
        stats = stats_with(Increase(totals, 1500, [6, 0, 0, 0, 0, 3, 0, 0, 0, 1]))
        logger.record(stats, None, engine_idx=engine)
        assert stats.waiting_lora_adapters == {}
    assert value("vllm:kv_eviction_requests_total") == 3 and value("vllm:kv_eviction_requests_total", 1) == 5
    assert value("vllm:kv_eviction_prompt_tokens_total") == 200
    assert value("vllm:kv_eviction_kept_tokens_total") == 60
    assert value("vllm:kv_eviction_prefix_hit_tokens_total") == 128
    assert value("vllm:kv_eviction_freed_blocks_total") == 8
    by_decile = [value("vllm:kv_eviction_kept_pages_total", layer_decile=str(i)) for i in range(10)]
    assert by_decile == [12, 0, 0, 0, 0, 6, 0, 0, 0, 2]
    assert value("vllm:kv_eviction_seconds_sum") == pytest.approx(0.003)
    assert value("vllm:kv_eviction_seconds_count") == 2


def test_what_is_not_ours_stays_on_the_stats(logger: EvictionStatLogger) -> None:
    stats = stats_with(Increase(Totals(requests=1)), some_adapter=3)
    assert len(stats.waiting_lora_adapters) == 2
    logger.record(stats, None)
    assert stats.waiting_lora_adapters == {"some_adapter": 3}


def test_an_engine_says_that_nothing_can_outlive_its_request(logger: EvictionStatLogger) -> None:
    assert recent.publishes()
    logger.record(stats_with(Increase(state=State(publishes=False))), None)
    assert not recent.publishes()
    recent.forget()
    assert recent.publishes(), "another engine"


def test_steps_without_an_eviction_carry_nothing(logger: EvictionStatLogger) -> None:
    assert not Increase()
    stats = SimpleNamespace(waiting_lora_adapters={})
    logger.record(stats, None)
    logger.record(None, None)
    assert value("vllm:kv_eviction_requests_total") == 0
    assert value("vllm:kv_eviction_seconds_count") == 0


def test_every_total_is_published(logger: EvictionStatLogger) -> None:
    """A field that is added to Totals or State must not be lost on the way."""
    ones, state = Totals(*(1 for _ in vars(Totals()))), State(*(2 for _ in vars(State())))
    stats = stats_with(Increase(ones, state=state))
    logger.record(stats, None)
    assert stats.waiting_lora_adapters == {}
    assert all(value(f"{name}_total") == 1 for name, _ in metrics.COUNTERS.values())
    assert all(value(name) == 2 for name, _ in metrics.GAUGES.values())


def test_an_engine_without_eviction_gets_no_logger() -> None:
    assert metrics.make_logger(engine_config(None), [0]) is None


def test_totals_subtract_field_by_field() -> None:
    assert Totals(5, 4, 3, 2, 1) - Totals(1, 1, 1, 1, 1) == Totals(4, 3, 2, 1, 0)
