"""The capacity planner against hand counts, and its answers to wrong input."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest

from vllm_defensive.settings.engine import EvictionConfig
from vllm_defensive.tools.cache_size import Model, read_model
from vllm_defensive.tools.lru import hit_rate, zipf
from vllm_defensive.tools.planner import Plan, documents, main, parse_bytes, plan

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


RECURRENT = {
    # (configuration, its full and recurrent layers, numbers that a state has: of the convolution, and remembered)
    "qwen3-next": (
        {
            "full_attention_interval": 4,
            "linear_num_value_heads": 32,
            "linear_num_key_heads": 16,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_conv_kernel_dim": 4,
        },
        (8, 24),
        (3 * 8192, 32 * 128 * 128),
    ),
    "nemotron-h": (
        {
            "hybrid_override_pattern": "M-M*" * 8,
            "mamba_num_heads": 128,
            "mamba_head_dim": 64,
            "ssm_state_size": 128,
            "n_groups": 8,
            "conv_kernel": 4,
        },
        (8, 16),
        (3 * (8192 + 2 * 8 * 128), 128 * 64 * 128),
    ),
    "granite": (
        {
            "layer_types": (["mamba"] * 3 + ["attention"]) * 8,
            "mamba_n_heads": 64,
            "mamba_d_head": "auto",
            "mamba_expand": 2,
            "mamba_d_state": 128,
            "mamba_n_groups": 1,
            "mamba_d_conv": 4,
        },
        (8, 24),
        (3 * (8192 + 2 * 128), 8192 * 128),
    ),
    "lfm2": ({"layer_types": ["conv", "full_attention"] * 16, "conv_L_cache": 3}, (16, 16), (2 * 4096, 0)),
}


@pytest.mark.parametrize("name", RECURRENT)
def test_a_block_is_as_large_as_a_state(name: str) -> None:
    more, layers, (convolution, remembered) = RECURRENT[name]
    model = read_model({**LLAMA_8B, **more})
    assert (model.full_layers, model.recurrent_layers) == layers
    assert model.state_bytes == 2 * (convolution + remembered)
    block = model.block_tokens(32)
    assert block % 32 == 0 and (block - 32) * 4096 < model.state_bytes <= block * 4096
    assert model.bytes(1000, 1000) == 4096 * 1000 * layers[0] + 2 * model.state_bytes * layers[1]
    in_float32 = read_model({**LLAMA_8B, **more, "mamba_ssm_dtype": "float32"}, tp=2)
    assert in_float32.state_bytes == (2 * convolution + 4 * remembered) // 2


def test_a_configuration_that_hides_where_its_states_are_is_refused() -> None:
    more = {name: value for name, value in RECURRENT["nemotron-h"][0].items() if name != "hybrid_override_pattern"}
    with pytest.raises(ValueError, match="does not say which of its layers are recurrent"):
        read_model({**LLAMA_8B, **more})


def test_what_a_block_costs_is_said(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, **RECURRENT["granite"][0]}))
    assert main(arguments(folder, context=3000)) == 0
    out = capsys.readouterr().out
    assert "a block has 544 tokens" in out and "prompts below 4352 tokens gain little" in out
    assert main(arguments(folder)) == 0
    out = capsys.readouterr().out
    assert "a block has 544 tokens" in out and "gain little" not in out
    assert main(arguments(folder, documents=9)) == 2
    assert "windows or recurrent layers" in capsys.readouterr().err


def test_every_fourth_layer_of_a_llama_4_sees_everything() -> None:
    model = read_model({**LLAMA_8B, "attention_chunk_size": 8192})
    assert (model.full_layers, model.windowed_layers, model.window) == (8, 24, 8192)


def test_layers_that_read_the_cache_of_others_have_none() -> None:
    kinds = ["sliding_attention", "full_attention"] * 3
    shape = {"num_hidden_layers": 6, "num_kv_shared_layers": 3, "layer_types": kinds, "sliding_window": 100}
    model = read_model({**LLAMA_8B, **shape})
    assert (model.full_layers, model.windowed_layers) == (1, 2)


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


def test_an_answer_that_is_evicted_holds_its_budget_and_an_interval() -> None:
    """A prompt of 4 blocks; looked at at 384 (12 blocks, fewer than the budget's 16), 640, and so on."""
    settings = {"policy": "streamingllm", "keep": 1.0, "budget": 512, "answers": "evict"}
    found = plan(MODEL, 10**7, 128, 2000, EvictionConfig(**settings))
    assert found.full == 20 * 32 * (16 + 8), "just before an eviction"
    assert found.prefill == 20 * 32 * (16 + 8 + 16), "in one"
    assert found.mean == 20 * 32 * (16 + 8), "at token 1,128, eight blocks behind the eviction at 896"


def test_a_bounded_prompt_holds_its_budget_twice_and_a_part() -> None:
    settings = {
        "policy": "streamingllm",
        "keep": 1.0,
        "budget": 96,
        "prompts": "bounded",
        "prompt_interval": 64,
        "min_tokens": 64,
    }
    found = plan(MODEL, 10**7, 1000, 100, EvictionConfig(**settings))
    assert found.prefill == 20 * 32 * (3 + 2 + 3)
    assert found.full == 20 * 32 * (3 + 4), "the answer, and the prompt's last, partial block"


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
        ({"documents": 0}, "--documents 0"),
        ({"documents": 10, "zipf": -1}, "--zipf -1"),
        ({"documents": 10, "running": 0}, "--running 0"),
        ({"documents": 10, "context": 31}, "--context 31"),
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


def test_zipf_shares_fall_with_the_rank() -> None:
    assert zipf(3, 0.0) == pytest.approx([1 / 3] * 3)
    assert zipf(3, 1.0) == pytest.approx([6 / 11, 3 / 11, 2 / 11])


def simulated(shares: list[float], room: float, questions: int, parts: int = 1) -> float:
    """Share of what is asked for that is there, of a cache in which what was used longest ago goes first.

    parts: of a document, each of which can go by itself, the last ones first; a question finds what is left of its
    beginning. room: for so many documents.
    """
    rng = random.Random(0)
    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    found = 0
    for i, document in enumerate(rng.choices(range(len(shares)), shares, k=2 * questions)):
        there = next((part for part in range(parts) if (document, part) not in cache), parts)
        found += there if i >= questions else 0  # the first half fills the cache
        for part in reversed(range(parts)):
            cache[document, part] = None
            cache.move_to_end((document, part))
        while len(cache) > room * parts:
            cache.popitem(last=False)
    return found / questions / parts


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.4])
@pytest.mark.parametrize(("count", "held"), [(10, 1), (10, 4), (10, 9), (300, 7), (300, 60), (300, 290)])
def test_the_hit_rate_is_that_of_a_simulated_cache(count: int, held: int, exponent: float) -> None:
    shares = zipf(count, exponent)
    # 20,000 draws are within 0.011 three times out of a thousand; the approximation is worst in caches of one document.
    assert hit_rate(shares, held) == pytest.approx(simulated(shares, held, 20_000), abs=0.04 if held == 1 else 0.015)


def test_of_whole_documents_a_part_may_be_left() -> None:
    shares = zipf(50, 1.0)
    assert hit_rate(shares, 3.7) == pytest.approx(simulated(shares, 3.7, 20_000, parts=10), abs=0.015)


def test_all_documents_or_none() -> None:
    shares = zipf(5, 1.0)
    assert hit_rate(shares, 5) == hit_rate(shares, 5.5) == 1.0
    assert hit_rate(shares, 0) == 0.0
    assert hit_rate(shares, 4.999) < 1.0


def test_packings_leave_room_for_what_runs_and_for_one_document() -> None:
    # 1,010 tokens are 31 whole blocks of 32; a fifth of 992 tokens fills 7. A question and its answer take 2 more.
    eviction = EvictionConfig(policy="snapkv", keep=0.2)
    memory, sizes = 20 * 32 * 150, (1010, 40, 3)
    whole, packed = (documents(MODEL, memory, *sizes, e) for e in (None, eviction))
    assert (whole.each, whole.held) == (20 * 32 * 31, (150 - 3 * 2) / 31)
    assert (packed.each, packed.held) == (20 * 32 * 7, (150 - 2 * 2 - 31) // 7)
    assert documents(MODEL, 20 * 32 * 30, *sizes, eviction).held == 0
    # What is not evicted is kept as stock vLLM does.
    assert documents(MODEL, memory, 200, 40, 3, eviction) == documents(MODEL, memory, 200, 40, 3, None)


@pytest.mark.parametrize("keep", [0.2, 0.5])
def test_as_many_packings_stay_as_planned(tiny_model: Path, keep: float) -> None:
    """vLLM's own scheduler, asked about documents in turn: as many as are planned all stay, and of one more none."""
    from tests.engine.harness import Harness, text

    eviction = EvictionConfig(policy="snapkv", keep=keep)
    blocks = 80
    planned = documents(Model(1, 0, 0, 1, None, 32, 2), blocks * 32, 640, 40, 1, eviction).held
    for count in (int(planned), int(planned) + 1):
        # One block is vLLM's own.
        h = Harness(tiny_model, num_blocks=blocks + 1, keep=keep, reuse="boundary")
        for i in range(3 * count):
            own = {"kv_eviction_boundary": 640}
            h.add(text(640, 1 + i % count) + text(20, 50 + i), max_tokens=20, extra_args=own)
            h.run()
        assert (len(h.evictions), len(h.ghost.adoptions)) == (
            (count, 2 * count) if count <= planned else (3 * count, 0)
        )


def test_answer_for_documents(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(folder, documents=1000, zipf=1.0, running=4)) == 0
    out = capsys.readouterr().out
    # Of 60 GiB 4 times 0.125 run; a document has 4 GiB, its 205 packed blocks 0.801; one is read while 3 run.
    assert f"{'that stay beside 4 running requests':<36}{14.9:>10}{69:>10}" in out
    assert "1000 documents, Zipf 1 " in out


def test_documents_of_a_model_with_windows_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kinds = ["sliding_attention", "full_attention"] * 16
    (folder / "config.json").write_text(json.dumps({**LLAMA_8B, "layer_types": kinds, "sliding_window": 512}))
    assert main(arguments(folder, documents=10)) == 2
    assert capsys.readouterr().err.startswith("--documents")
