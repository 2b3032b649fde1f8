"""The serving benchmark without its servers: pools, ratios, resumption and the planner's column."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import __main__ as program
from benchmarks.serving import report
from benchmarks.serving.scenarios import BLOCK_SIZE, HEAVY, PRESETS, STOCK, Scenario, chat_prompts, evicting, scenarios

OURS = evicting("snapkv", 0.2)
SCENARIO = Scenario("a pool", HEAVY, 2048, 256, 16, 4, (STOCK, OURS))


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner reads the shape only; the real folder needs a tokenizer."""
    from benchmarks.serving.scenarios import _HEAVY_CONFIG

    (tmp_path / "config.json").write_text(json.dumps(_HEAVY_CONFIG))
    monkeypatch.setattr(report, "model_folder", lambda _: tmp_path)


def record(row: str, repeat: int, **changed: Any) -> dict[str, Any]:
    """A record whose figures are all 1, but for those given."""
    figures = (
        "output_throughput", "request_throughput", "mean_ttft_ms", "median_ttft_ms", "p99_ttft_ms", "median_tpot_ms",
        "p99_tpot_ms", "median_itl_ms", "p99_itl_ms", "duration", "eviction_seconds", "peak_running", "peak_pool",
        "preemptions", "evicted", "freed_blocks", "total_output_tokens",
    )  # fmt: skip
    return {
        **{"scenario": "a pool", "row": row, "repeat": repeat, "model": HEAVY, "prompt": 2048, "output": 256},
        **{
            "requests": 16,
            "offered": 16,
            "shares": False,
            "pool": 4,
            "pool_tokens": 4 * 2336,
            "samples": [[0.5, 1, 0.1]],
        },
        **dict.fromkeys(figures, 1.0),
        "prefill_seconds": 0.5,
        **changed,
    }


@pytest.mark.parametrize("preset", PRESETS)
def test_every_scenario_has_a_stock_row_and_a_pool_that_holds_a_request(preset: str) -> None:
    for scenario in scenarios(preset):
        assert scenario.rows[0] == STOCK
        assert (scenario.pool_blocks - 1) * BLOCK_SIZE >= scenario.pool * (scenario.prompt + scenario.output)


def test_names_of_scenarios_are_unique() -> None:
    """A record is found by its scenario's name."""
    names = [scenario.name for preset in PRESETS for scenario in scenarios(preset)]
    assert len(names) == len(set(names))


def test_ratios_are_taken_round_by_round() -> None:
    records = [
        *(record("stock", i, output_throughput=speed) for i, speed in enumerate((1.0, 10.0, 100.0))),
        *(record(OURS.name, i, output_throughput=speed) for i, speed in enumerate((3.0, 20.0, 400.0))),
    ]
    stock, ours = report.cells(records)
    assert stock["throughput_ratio"] == [1, 1, 1]
    assert ours["throughput_ratio"] == [3, 2, 4]


def test_the_bound_is_what_prompts_alone_leave_of_stocks_time() -> None:
    stock, ours = report.cells(
        [
            record("stock", 0, duration=10.0, prefill_seconds=4.0),
            record(OURS.name, 0, duration=7.0, prefill_seconds=5.0),
        ]
    )
    assert ours["bound"] == [10 / 5]
    assert ours["decode_ratio"] == [pytest.approx(6 / 2)] * 3
    assert stock["decode_ratio"] == [1, 1, 1]


def test_each_turn_of_a_chat_begins_with_the_one_before() -> None:
    prompts = chat_prompts(4, 5, 3072, seed=1)
    assert [len(prompt.split()) for prompt in prompts[::4]] == [2048, 2304, 2560, 2816, 3072]
    for before, after in zip(prompts, prompts[4:], strict=False):
        assert after.startswith(before) and after != before
    assert len(set(prompts)) == 20
    assert prompts != chat_prompts(4, 5, 3072, seed=2)


def test_planned_requests_are_those_of_the_planner() -> None:
    # 72 blocks a request at its end for stock vLLM; 13 packed and 8 of growth for ours, 64 and 13 while it is computed.
    assert report.planned(record("stock", 0)) == [4, 4]
    assert report.planned(record(OURS.name, 0)) == [1 + (292 - 77) // 21, 1 + (292 - 77) // 17]


def test_measured_rounds_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[str] = []

    def measure(servers: object, scenario: Scenario, repeats: int, folder: Path, seed: int) -> Iterator[dict[str, Any]]:
        runs.append(scenario.name)
        for i in range(repeats):
            yield from (record(row.name, i, scenario=scenario.name) for row in scenario.rows)

    monkeypatch.setattr(program, "compare", measure)
    monkeypatch.setattr(sys, "argv", ["serving", "--preset", "quick", "--repeats", "2", "--out", str(tmp_path)])
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own stay
    program.main()
    program.main()
    assert runs == ["quick"]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 4
    assert (
        "| kv-heavy | quick: 16 x (2,048 + 256) | 4 | `halokv 0.2` | 1.00 [1.00, 1.00] | 2.00 | 1.00"
        in (tmp_path / "report.md").read_text()
    )


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--preset all: choose from quick, pressure"):
        scenarios("all")
