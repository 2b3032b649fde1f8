"""The steps benchmark's load, its arithmetic, and what it times."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks.steps import growth, simulate
from benchmarks.steps.overhead import Spent


@pytest.fixture(scope="module")
def rows(tiny_model: Path) -> dict[str, simulate.Row]:
    hasher = simulate.block_hasher()
    made = {
        name: simulate.Row(simulate.make_scheduler(tiny_model, False, **settings), hasher, seed=0)
        for name, settings in simulate.ROWS.items()
    }
    for row in made.values():
        row.block = row.run(120)  # type: ignore[attr-defined]
    return made


def test_all_rows_carry_the_same_load(rows: dict[str, Any]) -> None:
    """Step times are comparable only at equal numbers of requests a step."""
    assert len({row.block.running for row in rows.values()}) == 1
    assert len({row._added for row in rows.values()}) == 1
    assert all(row.block.seconds > 0 for row in rows.values())


def test_only_the_evicting_row_evicts(rows: dict[str, Any]) -> None:
    evicted = {
        name: row.scheduler.eviction_manager.lifecycle.totals.requests
        for name, row in rows.items()
        if hasattr(row.scheduler, "eviction_manager")
    }
    assert evicted.pop("ours, nothing evicted") == 0
    assert evicted.pop("ours, all evicted") >= simulate.RUNNING
    assert not evicted


def test_with_a_queue_somebody_always_waits_for_memory_and_shares_nothing(tiny_model: Path) -> None:
    scheduler = simulate.make_scheduler(tiny_model, False, 200, **simulate.QUEUE_ROWS["ours, eager"])
    row = simulate.Row(scheduler, simulate.block_hasher(), seed=0, queue=50)
    for _ in range(30):
        row.run(1)
        assert len(scheduler.waiting) >= 40
    families = scheduler.eviction_manager.outlook.relatives._families
    assert max(map(len, families.values())) == 1 and len(families) == len(scheduler.requests)


def test_ratios_are_to_the_first_row_of_the_same_round() -> None:
    rounds = [
        {"a": simulate.Block(1.0, 10, 20), "b": simulate.Block(2.0, 10, 20)},
        {"a": simulate.Block(10.0, 10, 20), "b": simulate.Block(15.0, 10, 20)},
    ]
    row = simulate.compare(rounds)["rows"]["b"]
    assert (row["ratio_min"], row["ratio"], row["ratio_max"]) == (1.5, 1.75, 2.0)
    assert row["requests_a_step"] == 2


@pytest.mark.parametrize("power", [1, 2])
def test_the_fit_tells_linear_from_quadratic_growth(power: int) -> None:
    line = growth.fit([(x, 3.0 * x**power) for x in (1.0, 2.0, 4.0, 8.0)])
    assert line["exponent"] == pytest.approx(power)
    assert (line["r2"] == pytest.approx(1.0)) == (power == 1)


def test_only_our_own_time_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The method that ours calls is subtracted."""
    now = 0.0

    def work(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr("benchmarks.steps.overhead.time.thread_time", lambda: now)

    class Stock:
        def step(self) -> None:
            work(5.0)

    class Ours(Stock):
        def step(self) -> None:
            super().step()
            work(2.0)

    Ours.__module__ = "vllm_defensive.somewhere"
    spent = Spent()
    spent.watch("part", Ours, "step")
    Ours().step()
    assert spent.seconds["part"] == pytest.approx(2.0)
