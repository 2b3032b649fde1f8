"""The serving benchmark without its servers: pools, ratios, resumption and the planner's column."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import __main__ as program
from benchmarks.serving import measure, report
from benchmarks.serving.scenarios import (
    BALANCED,
    BLOCK_SIZE,
    FP8,
    HEAVY,
    PRESETS,
    SMOLLM2,
    STOCK,
    Scenario,
    _cut_vocabulary,
    chat_prompts,
    evicting,
    scenarios,
)

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
    runs: list[list[int]] = []

    def fake(
        servers: object, scenario: Scenario, rounds: Sequence[int], folder: Path, seed: int
    ) -> Iterator[dict[str, Any]]:
        runs.append(list(rounds))
        for i in rounds:
            yield from (record(row.name, i, scenario=scenario.name) for row in scenario.rows)

    monkeypatch.setattr(program, "compare", fake)
    monkeypatch.setattr("signal.signal", lambda *_: None)  # pytest's own stay
    for repeats in ("2", "2", "3"):
        monkeypatch.setattr(sys, "argv", ["serving", "--preset", "quick", "--repeats", repeats, "--out", str(tmp_path)])
        program.main()
    assert runs == [[0, 1], [2]]
    assert len((tmp_path / "records.jsonl").read_text().splitlines()) == 6
    assert (
        "| kv-heavy | quick: 16 x (2,048 + 256) | 4 | `halokv 0.2` | 1.00 [1.00, 1.00] | 2.00 | 1.00"
        in (tmp_path / "report.md").read_text()
    )


LOG = """
Processed prompts:   0%|  | 0/1 [00:00<?] INFO Engine 000: Running: 1 reqs, Waiting: 0 reqs, CPU KV cache usage: 9.0%
Processed prompts:   0%|  | 0/16 [00:00<?] INFO Engine 000: Running: 4 reqs, Waiting: 12 reqs, CPU KV cache usage: 91.3%
INFO Engine 000: Running: 16 reqs, Waiting: 0 reqs, Deferred: 1 reqs, CPU KV cache usage: 99.5%, Prefix
INFO Engine 000: Running: 3 reqs, Waiting: 0 reqs, CPU KV cache usage: 20.0%, Prefix cache hit rate: 1%
"""


def test_offline_runs_are_read_from_their_result_and_their_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], stdout: Any, env: dict[str, str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert env["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
        commands.append(command)
        stdout.write(LOG)
        Path(command[command.index("--output-json") + 1]).write_text('{"elapsed_time": 8.0}')
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(measure.subprocess, "run", run)
    monkeypatch.setattr(measure, "model_folder", lambda _: tmp_path)
    scenario = replace(SCENARIO, offline=True, concurrency=8)
    stock, ours = measure.compare(measure.Servers(tmp_path), scenario, [0], tmp_path)
    assert (ours["peak_running"], ours["peak_pool"]) == (16, 0.995)
    assert [sample[0] for sample in ours["samples"]] == [0, 2.67, 5.33]
    assert (ours["duration"], ours["output_throughput"], ours["request_throughput"]) == (8, 512, 2)
    assert (stock["row"], ours["row"], ours["prefill_seconds"]) == ("stock", OURS.name, 8)
    lengths = [command[command.index("--random-output-len") + 1] for command in commands]
    assert lengths == ["2", "2", "256", "256"], "who asks for one token is not evicted"
    assert all(command[command.index("--max-num-seqs") + 1] == "8" for command in commands)
    for missing in ("mean_ttft_ms", "median_tpot_ms", "eviction_seconds", "preemptions"):
        assert missing not in ours
    table = report.cells([stock, ours])
    assert table[1]["throughput_ratio"] == [1, 1, 1] and table[1]["ttft_ratio"] == []
    assert report.markdown(table, []).count("| - |") >= 2


@pytest.mark.parametrize(
    "code, log, message",
    [
        (1, "ValueError: no such model", "ended with 1:\nValueError: no such model"),
        (0, "INFO no line of statistics", "logged no statistics:\nINFO no line"),
    ],
)
def test_an_offline_run_that_is_no_record_says_why(
    code: int, log: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(command: list[str], stdout: Any, **_: Any) -> subprocess.CompletedProcess[str]:
        stdout.write(log)
        Path(command[command.index("--output-json") + 1]).write_text('{"elapsed_time": 8.0}')
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(measure.subprocess, "run", run)
    monkeypatch.setattr(measure, "model_folder", lambda _: tmp_path)
    with pytest.raises(RuntimeError, match=message):
        list(measure.compare(measure.Servers(tmp_path), replace(SCENARIO, offline=True), [0], tmp_path))


def test_each_model_runs_in_its_own_dtype() -> None:
    dtypes = {
        m: _argument(replace(SCENARIO, model=m).engine_args(STOCK), "--dtype") for m in (HEAVY, BALANCED, SMOLLM2)
    }
    assert dtypes == {HEAVY: "bfloat16", BALANCED: "float32", SMOLLM2: "bfloat16"}


def test_a_smaller_dtype_holds_more_tokens_in_the_same_bytes() -> None:
    blocks = {row.name: _argument(SCENARIO.engine_args(row), "--num-gpu-blocks-override") for row in (STOCK, FP8, OURS)}
    assert blocks == {"stock": "293", FP8.name: "585", OURS.name: "293"}


def test_a_cut_vocabulary_still_writes_and_reads_any_text(tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False)
    whole.train_from_iterator(["the cat and the hat and the mat of the cat"] * 3, trainer)
    whole.save(str(tmp_path / "whole.json"))
    size = whole.get_vocab_size() - 5
    (tmp_path / "cut.json").write_text(json.dumps(_cut_vocabulary(tmp_path / "whole.json", size)))
    cut = Tokenizer.from_file(str(tmp_path / "cut.json"))
    ids = cut.encode("the cat and a dög").ids
    assert cut.get_vocab_size() == size and max(ids) < size
    assert cut.decode(ids) == "the cat and a dög"


def _argument(args: list[str], name: str) -> str:
    return args[args.index(name) + 1]


def test_unknown_preset_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="--preset all: choose from quick, pressure"):
        scenarios("all")
