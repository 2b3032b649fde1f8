"""The capacity planner against hand counts, and its answers to wrong input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.tools.planner import Model, Plan, main, parse_bytes, plan, read_model

LLAMA_8B = {
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_size": 4096,
    "torch_dtype": "bfloat16",
}
MODEL = Model(full_layers=2, windowed_layers=0, window=0, token_bytes=10)


def test_llama_8b_takes_128_kib_a_token() -> None:
    assert read_model(LLAMA_8B).bytes(1, 1) == 128 * 1024
    assert read_model(LLAMA_8B, tp=4).bytes(1, 1) == 32 * 1024
    assert read_model(LLAMA_8B, kv_dtype="fp8").bytes(1, 1) == 64 * 1024


def test_only_full_layers_grow_with_the_prompt() -> None:
    kinds = ["sliding_attention"] * 3 + ["full_attention"] + ["linear_attention"]
    config = {**LLAMA_8B, "num_hidden_layers": 5, "layer_types": kinds, "sliding_window": 100}
    model = read_model({"text_config": config})
    assert (model.full_layers, model.windowed_layers, model.window) == (1, 3, 100)
    assert model.bytes(50, 1000) == 4096 * (50 + 3 * 100)
    assert model.bytes(50, 60) == 4096 * (50 + 3 * 60)


@pytest.mark.parametrize(("switch", "full"), [({}, 0), ({"use_sliding_window": False}, 32)])
def test_a_window_without_layer_types_holds_for_all_layers_unless_switched_off(
    switch: dict[str, bool], full: int
) -> None:
    assert read_model({**LLAMA_8B, "sliding_window": 4096, **switch}).full_layers == full


def test_an_evicted_request_holds_packed_blocks_tail_and_growth() -> None:
    # 1,000 tokens are 31 blocks of 32 and a tail of 8; 0.2 of them less the tail fill 6 blocks.
    eviction = EvictionConfig(policy="snapkv", keep=0.2)
    after = plan(MODEL, 10**6, 1000, 100, eviction)
    assert after.prefill == 20 * 32 * (32 + 6)
    assert after.mean == 20 * 32 * (33 - 31 + 6)
    assert after.full == 20 * 32 * (35 - 31 + 6)


def test_widths_are_more_tokens_in_as_many_bytes() -> None:
    sixteen, eight, four = (
        plan(MODEL, 10**6, 1000, 100, EvictionConfig(policy="snapkv", keep=0.2, widths=widths))
        for widths in ("16", "8", "4")
    )
    assert (sixteen.kept, eight.kept, four.kept) == (6 * 32 + 8, 6 * 61 + 8, 6 * 120 + 8)
    assert sixteen.full == eight.full == four.full
    # Nobody needs more pages than hold all tokens: 992 of them fill 9 pages of 120.
    all_of_it = plan(MODEL, 10**6, 1000, 100, EvictionConfig(policy="snapkv", keep=0.5, widths="4"))
    assert all_of_it.kept == 1000 and all_of_it.full == 20 * 32 * (35 - 31 + 9)


def test_a_short_prompt_is_planned_as_stock() -> None:
    eviction = EvictionConfig(policy="snapkv", keep=0.2)
    assert plan(MODEL, 10**6, 200, 10, eviction) == plan(MODEL, 10**6, 200, 10, None)


def test_the_last_request_needs_room_for_its_prompt_beside_the_others() -> None:
    assert Plan(prefill=60, mean=10, full=20, memory=100).at_once == 3
    assert Plan(prefill=60, mean=10, full=20, memory=100).at_once_mean == 5
    assert Plan(prefill=60, mean=10, full=20, memory=59).at_once == 0
    assert Plan(prefill=40, mean=45, full=50, memory=100).at_once == 2


@pytest.mark.parametrize(("text", "size"), [("2GiB", 2**31), ("1.5kb", 1500), ("7", 7)])
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
    return tmp_path


def arguments(folder: Path, **changed: Any) -> list[str]:
    given = {"model": folder, "memory": "60GiB", "context": 32768, "output": 1024, "keep": 0.2} | changed
    return [str(part) for name, value in given.items() for part in (f"--{name.replace('_', '-')}", value)]


def test_answer_for_an_8b_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder)) == 0
    out = capsys.readouterr().out
    # 33,792 tokens are 4.125 GiB; 205 packed blocks and 32 of growth are 7,584 slots, 0.926 GiB.
    assert "4.125     0.926" in out
    assert f"{'requests at once, none preempted':<36}{14:>10}{60:>10}" in out


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"memory": "much"}, "--memory much"),
        ({"memory": "0GiB"}, "--memory 0GiB"),
        ({"keep": 1.5}, "--keep 1.5"),
        ({"context": 0}, "--context 0"),
        ({"tp": 3}, "--tp 3"),
        ({"tp": 16}, "--tp 16"),  # more than there are KV heads
        ({"kv_dtype": "int3"}, "--kv-dtype int3"),
    ],
)
def test_wrong_input_ends_with_2_and_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], changed: dict[str, Any], words: str
) -> None:
    assert main(arguments(folder, **changed)) == 2
    error = capsys.readouterr().err
    assert error.startswith(words) and error.count("\n") == 1


@pytest.mark.parametrize(("context", "noted"), [(7168, False), (7169, True)])
def test_more_tokens_than_the_model_has_positions_are_noted(
    folder: Path, capsys: pytest.CaptureFixture[str], context: int, noted: bool
) -> None:
    config = {**LLAMA_8B, "max_position_embeddings": 8192}
    (folder / "config.json").write_text(json.dumps(config))
    assert main(arguments(folder, context=context, output=1024)) == 0
    assert ("8192 positions" in capsys.readouterr().out) == noted


@pytest.mark.parametrize("content", ["{", "[]", "{}", json.dumps({**LLAMA_8B, "kv_lora_rank": 512})])
def test_unusable_configuration_ends_with_2_and_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], content: str
) -> None:
    (folder / "config.json").write_text(content)
    assert main(arguments(folder)) == 2
    error = capsys.readouterr().err
    assert error.startswith("--model") and error.count("\n") == 1


@pytest.mark.parametrize("pool", [2, 4, 8])
@pytest.mark.parametrize("policy, widths", [(None, "16"), ("snapkv", "16"), ("snapkv", "8"), ("snapkv", "8,4")])
def test_as_many_requests_run_as_planned(tiny_model: Path, policy: str | None, widths: str, pool: int) -> None:
    """vLLM's own scheduler, without a model: the plan is what is safe, and a peak goes beyond it by a quarter at most.

    At a peak most requests have just begun to grow, and those that meet the end of the memory later are preempted.
    """
    from tests.engine.harness import Harness, text

    settings = {"keep": 0.2, "widths": widths} if policy else {}
    h = Harness(tiny_model, num_blocks=pool * 73, policy=policy, chunk=2048, max_num_seqs=128, **settings)
    for i in range(6 * pool):
        h.add(text(2048, i), max_tokens=256)
    peak = 0
    while h.scheduler.has_requests():
        h.step()
        peak = max(peak, len(h.scheduler.running))
    eviction = EvictionConfig.model_validate({"policy": policy, **settings}) if policy else None
    planned = plan(Model(1, 0, 0, 1, None, 32, 2), pool * 73 * 32, 2048, 256, eviction)
    assert planned.at_once <= peak <= 1.25 * planned.at_once_mean


@pytest.mark.parametrize(("context", "evicted"), [(3072, True), (3073, False)])
def test_a_model_of_windows_is_evicted_where_no_request_outgrows_them(
    folder: Path, capsys: pytest.CaptureFixture[str], context: int, evicted: bool
) -> None:
    assert main(arguments(folder, context=context)) == 0
    full = capsys.readouterr().out
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "sliding_window": 4096}))
    assert main(arguments(folder, context=context)) == 0
    out = capsys.readouterr().out
    note = "choose no more for --max-model-len" if evicted else "--kv-eviction is refused"
    assert "window of 4096 tokens" in out and note in out
    assert out.startswith(full) == evicted
