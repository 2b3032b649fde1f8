"""The serving benchmark without its servers: pools, ratios, resumption and the planner's column."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serving import __main__ as program
from benchmarks.serving import measure, report
from benchmarks.serving.dummies import BALANCED, HEAVY, SMOLLM2, _cut_vocabulary
from benchmarks.serving.scenarios import (
    BLOCK_SIZE,
    DOCUMENT_ROWS,
    FP8,
    PRESETS,
    STOCK,
    Row,
    Scenario,
    Sizes,
    document_scenarios,
    evicting,
    reusing,
    scenarios,
)
from benchmarks.serving.texts import Documents, chat_prompts

OURS = evicting("snapkv", 0.2)
SCENARIO = Scenario("a pool", HEAVY, 2048, 256, 16, 4, (STOCK, OURS))


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The planner reads the shape only; the real folder needs a tokenizer."""
    from benchmarks.serving.dummies import HEAVY_CONFIG

    (tmp_path / "config.json").write_text(json.dumps(HEAVY_CONFIG))
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


DOCUMENTS = Documents(count=5, tokens=95, question=7, rounds=3)
ZIPF = replace(DOCUMENTS, zipf=1.0)


def test_questions_go_round_the_documents_in_turn() -> None:
    assert DOCUMENTS.order(seed=1) == DOCUMENTS.order(seed=2) == [0, 1, 2, 3, 4] * 3


def test_questions_by_zipfs_law_are_as_many_and_the_same_for_each_row() -> None:
    many = replace(ZIPF, rounds=4000)
    order = many.order(seed=1)
    assert order == many.order(seed=1) != many.order(seed=2)
    assert len(order) == 20_000 and set(order) == set(range(5))
    # Of a multinomial with p = 0.44 a share's standard deviation is 0.0035; the bound is four of them.
    harmonic = sum(1 / n for n in range(1, 6))
    shares = {document: count / len(order) for document, count in Counter(order).items()}
    assert shares == pytest.approx({n: 1 / (n + 1) / harmonic for n in range(5)}, abs=0.014)


@pytest.mark.parametrize("documents", [DOCUMENTS, ZIPF], ids=["in turn", "zipf"])
def test_prompts_are_documents_and_questions_in_that_order(documents: Documents) -> None:
    prompts = [prompt.split() for prompt in documents.prompts(seed=3)]
    assert documents.prompts(seed=3) == documents.prompts(seed=3)
    assert {len(prompt) for prompt in prompts} == {95 + 7}
    texts = [tuple(prompt[:95]) for prompt in prompts]
    first = dict(zip(documents.order(seed=3), texts, strict=True))
    assert texts == [first[number] for number in documents.order(seed=3)], "a document is the same each time"
    assert len({tuple(prompt[95:]) for prompt in prompts}) == 15, "no question comes twice"


def test_no_two_documents_begin_with_the_same_block() -> None:
    """Nor those of other rounds and loads: their server may still have them."""
    loads = [DOCUMENTS, ZIPF, replace(DOCUMENTS, count=200, rounds=1), replace(DOCUMENTS, rounds=2)]
    begins = []
    for load in loads:
        for seed in range(3):
            texts = {tuple(prompt.split()[:95]) for prompt in load.prompts(seed)}
            begins += [text[:BLOCK_SIZE] for text in texts]
    assert len(set(begins)) == len(begins)
    numbered = replace(DOCUMENTS, count=2000, rounds=1).prompts(seed=0)
    assert len({tuple(prompt.split()[:4]) for prompt in numbered}) == 2000, "four words are enough to tell them apart"


@pytest.mark.parametrize(
    "sizes",
    [Sizes(), Sizes(documents=12, document_tokens=2048, pools=(2, 3)), Sizes(document_tokens=1000, concurrency=2)],
    ids=["default", "small", "odd"],
)
def test_a_pool_holds_its_documents_their_last_questions_and_what_runs(sizes: Sizes) -> None:
    for scenario in document_scenarios(sizes):
        asked = -(-(sizes.document_tokens + 64 + 64) // BLOCK_SIZE)
        behind = -(-(64 + 64) // BLOCK_SIZE)
        spare = scenario.pool_blocks - 1 - int(scenario.pool) * asked - sizes.concurrency * behind
        assert 0 <= spare < asked, f"{scenario.pool:g} documents, and not one more"
        assert all(scenario.pool_blocks - 1 >= -(-scenario.max_model_len * 6 // 5 // BLOCK_SIZE) for _ in scenario.rows)


def test_pools_are_a_quarter_of_the_documents_and_all() -> None:
    pools = [(scenario.pool, [row.name for row in scenario.rows]) for scenario in document_scenarios(Sizes())]
    few = ["stock", FP8.name, "halokv 0.2", "halokv 0.2 reuse boundary", "halokv 0.1 k8v4 reuse boundary"]
    all_of_them = ["stock", "halokv 0.2 reuse boundary"]
    assert pools == [(6, few), (6, few), (24, all_of_them), (24, all_of_them)]
    chosen = document_scenarios(Sizes(documents=12, pools=(2,), orders=("zipf",), rows=("reuse",)))
    assert [(scenario.pool, len(scenario.rows), scenario.requests) for scenario in chosen] == [(2, 2, 48)]


def test_documents_of_one_pool_have_the_same_servers() -> None:
    turn, zipf, turn_large, zipf_large = document_scenarios(Sizes())
    assert [turn.engine_args(row) for row in turn.rows] == [zipf.engine_args(row) for row in zipf.rows]
    assert [turn_large.engine_args(row) for row in turn_large.rows] != [turn.engine_args(row) for row in turn.rows[:2]]
    assert zipf_large.rows == turn_large.rows


def test_narrow_rows_are_packed_in_what_auto_picks() -> None:
    from vllm_defensive.settings.engine import EvictionConfig

    narrow = document_scenarios(Sizes())[0].rows[-1]
    auto = EvictionConfig.model_validate({"policy": "auto", "keep": 0.1, "auto_widths": True})
    assert _argument(list(narrow.args), "--kv-eviction-widths") == auto.meant_widths("auto")
    assert _argument(list(narrow.args), "--kv-eviction-keep") == "0.1"


def test_only_rows_that_evict_name_a_boundary() -> None:
    scenario = document_scenarios(Sizes(document_tokens=2048))[0]
    bodies = [scenario.extra_body(row) for row in scenario.rows]
    boundary = {"vllm_xargs": {"kv_eviction_boundary": 2048}}
    assert bodies == [{}, {}, boundary, boundary, boundary]
    assert SCENARIO.extra_body(OURS) == {}


def test_other_sizes_are_other_scenarios() -> None:
    """A record is found by its scenario's name."""
    changed: list[dict[str, Any]] = [
        {}, {"model": SMOLLM2}, {"policy": "auto"}, {"documents": 23}, {"document_tokens": 4095},
        {"question_tokens": 63}, {"answer_tokens": 63}, {"rounds": 5}, {"concurrency": 3}, {"pools": (7,)},
    ]  # fmt: skip
    names = [{scenario.name for scenario in document_scenarios(Sizes(**sizes))} for sizes in changed]
    assert sum(map(len, names)) == len(set().union(*names))


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"model": "gpt"}, "--model gpt: choose from SmolLM2-135M, kv-heavy"),
        ({"orders": ("random",)}, "--orders random: choose from round-robin, zipf"),
        ({"rows": ("reuse", "fp4")}, "--rows fp4: choose from fp8, evict, reuse, narrow"),
        ({"pools": (0,)}, "--pools: choose 1 or more"),
        ({"documents": 0}, "--documents 0: choose 1 to 20,736"),
        ({"document_tokens": 4}, "--document-tokens 4: choose 5 or more"),
        ({"rounds": 0}, "--rounds: choose 1 or more"),
    ],
)
def test_sizes_that_cannot_be_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        document_scenarios(Sizes(**sizes))


def test_flags_are_the_fields_of_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Scenario] = []

    def fake(servers: object, scenario: Scenario, *_: object) -> list[dict[str, Any]]:
        given.append(scenario)
        return []

    monkeypatch.setattr(program, "compare", fake)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    flags = "--documents 12 --document-tokens 2048 --rounds 2 --pools 3 --orders zipf --rows reuse,narrow"
    argv = ["serving", "--preset", "documents", "--out", str(tmp_path), *flags.split()]
    monkeypatch.setattr(sys, "argv", argv)
    program.main()
    sizes = Sizes(documents=12, document_tokens=2048, rounds=2, pools=(3,), orders=("zipf",), rows=("reuse", "narrow"))
    assert given == document_scenarios(sizes)
    assert (tmp_path / "commands.txt").read_text() == (
        f"python -m benchmarks.serving --preset documents --repeats 3 {flags}\n"
    )


def test_help_says_what_each_row_is(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["serving", "--help"])
    with pytest.raises(SystemExit, match="0"):
        program.main()
    text = "".join(capsys.readouterr().out.split())
    assert all("".join(f"{name}:{said}".split()) in text for name, said in DOCUMENT_ROWS.items())


TWO_ROUNDS = Scenario(
    "documents", HEAVY, 102, 4, 4, 1, (STOCK, reusing(OURS, "boundary")), concurrency=2,
    documents=Documents(2, 95, 7, 2), rounds=2,
)  # fmt: skip
DETAILS = {
    "ttfts": [2.0, 3.0, 0.5, 0.25], "start_times": [10.0, 10.0, 13.0, 14.0],
    "itls": [[0.5, 0.5], [1.0], [0.25], [0.75]], "total_input_tokens": 4 * 102,
}  # fmt: skip


def test_the_first_round_is_told_apart_from_later_ones() -> None:
    # Answered at 13, 14, 13.75 and 15: two of them by 13.75, 3.75 seconds after the first was asked.
    told = measure._rounds(TWO_ROUNDS, DETAILS, cached_tokens=64)
    assert told["first_throughput"] == pytest.approx(2 / 3.75)
    assert told["later_throughput"] == pytest.approx(2 / 1.25)
    assert (told["median_ttft_ms"], told["p90_ttft_ms"]) == (1250, 3000)
    assert (told["first_median_ttft_ms"], told["later_median_ttft_ms"], told["later_p90_ttft_ms"]) == (2500, 375, 500)
    assert (told["asked_tokens"], told["computed_tokens"]) == (4 * 95, 4 * 95 - 64)
    chats = replace(TWO_ROUNDS, documents=None, turns=2)
    assert measure._rounds(chats, DETAILS, cached_tokens=64)["computed_tokens"] == 4 * 102 - 64


def test_one_round_has_no_later_ones() -> None:
    told = measure._rounds(replace(TWO_ROUNDS, rounds=1), DETAILS, cached_tokens=0)
    assert told["first_requests"] == 4 and told["first_throughput"] == pytest.approx(4 / 5)
    assert told["later_throughput"] is None and told["later_p90_ttft_ms"] is None


class _Up:
    """A server that starts if its arguments do not say `fp8`, and whose every counter is one more at each look."""

    url = "http://nowhere"

    def __init__(self, model: Path, args: list[str], log: Path) -> None:
        self.args = args

    def __enter__(self) -> _Up:
        if "fp8" in self.args:
            raise RuntimeError("the server ended with code 1:\nno such cache")
        return self

    def __exit__(self, *_: object) -> None: ...


@pytest.fixture
def servers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> measure.Servers:
    monkeypatch.setattr(measure, "Server", _Up)
    monkeypatch.setattr(measure, "model_folder", lambda _: tmp_path)
    looks: dict[str, float] = {}

    def values(server: _Up, *names: str) -> list[float]:
        for name in names:
            looks[name] = looks.get(name, 0) + 1
        return [looks[name] for name in names]

    monkeypatch.setattr(measure, "_values", values)
    return measure.Servers(tmp_path)


def test_a_server_that_need_not_start_is_left_out_and_said_to_be(
    servers: measure.Servers, capsys: pytest.CaptureFixture[str]
) -> None:
    scenario = replace(SCENARIO, rows=(STOCK, replace(FP8, optional=True), OURS))
    up = servers.of(scenario)
    assert [row.name for row, _ in up] == ["stock", OURS.name]
    assert up[1][1].args[-4:] == list(OURS.args)  # type: ignore[attr-defined] # it is one of `_Up`
    assert f"a pool: left out {FP8.name}: the server ended" in capsys.readouterr().out
    assert [server for _, server in servers.of(replace(scenario, name="the same"))] == [server for _, server in up]
    with pytest.raises(RuntimeError, match="no such cache"):
        servers.of(replace(scenario, rows=(STOCK, FP8)))


def test_rows_that_were_left_out_are_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs: list[Sequence[int]] = []

    def fake(servers: object, scenario: Scenario, rounds: Sequence[int], *_: object) -> Iterator[dict[str, Any]]:
        runs.append(rounds)
        for row in (row for row in scenario.rows if not row.optional):
            yield from (asked_again(row.name, i, scenario=scenario.name) for i in rounds)

    monkeypatch.setattr(program, "compare", fake)
    monkeypatch.setattr("signal.signal", lambda *_: None)
    argv = ["serving", "--preset", "documents", "--pools", "6", "--orders", "zipf", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    for _ in range(2):
        program.main()
    assert runs == [[0, 1, 2]]


@pytest.mark.parametrize("tokens, refused", [(102, False), (103, True)])
def test_documents_are_measured_by_their_details(
    tokens: int, refused: bool, servers: measure.Servers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        asked = int(_argument(command, "--num-prompts"))
        figures = {**dict.fromkeys(measure._KEPT, 1.0), "completed": asked, "total_input_tokens": asked * tokens}
        details = {name: values[:asked] for name, values in DETAILS.items() if isinstance(values, list)}
        (tmp_path / "logs" / "bench.json").write_text(json.dumps({**figures, **details}))
        return subprocess.CompletedProcess(command, 0, "", "")

    (tmp_path / "logs").mkdir()
    monkeypatch.setattr(measure.subprocess, "run", run)
    if refused:
        with pytest.raises(RuntimeError, match="prompts have 206 tokens instead of 204: a word is not a token"):
            list(measure.compare(servers, TWO_ROUNDS, [0], tmp_path))
        return
    stock, ours = measure.compare(servers, TWO_ROUNDS, [0], tmp_path)
    assert [int(_argument(command, "--num-prompts")) for command in commands] == [2, 2, 4, 4], "no prefill by itself"
    assert all("--save-detailed" in command and "--disable-shuffle" in command for command in commands)
    assert ["--extra-body" in command for command in commands] == [False, True, False, True]
    assert json.loads(_argument(commands[-1], "--extra-body")) == {"vllm_xargs": {"kv_eviction_boundary": 95}}
    assert (ours["adoptions"], ours["cached_tokens"], ours["computed_tokens"]) == (1, 1, 4 * 95 - 1)
    assert stock["prefill_seconds"] is None and stock["rounds"] == 2 and stock["shares"]


def asked_again(row: str, repeat: int, **changed: Any) -> dict[str, Any]:
    """A `record` of texts that come again."""
    told = measure._rounds(TWO_ROUNDS, DETAILS, cached_tokens=95)
    counted = dict.fromkeys(("adoptions", "published", "lost", "echo_tokens"), 2.0)
    return {**record(row, repeat), "prefill_seconds": None, **told, **counted, **changed}


def test_texts_that_come_again_have_a_table_of_their_own(tmp_path: Path) -> None:
    records = [
        record("stock", 0),
        *(asked_again("stock", i, scenario="documents", later_throughput=0.5 + i) for i in range(2)),
        *(asked_again("ours", i, scenario="documents", later_throughput=2.0) for i in range(2)),
        asked_again("stock", 0, scenario="one round", rounds=1, later_throughput=None),
    ]
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    text = report.write(tmp_path).read_text()
    above, below = text.split("## Texts that come again")
    assert above.count("| kv-heavy |") == 1 and below.count("| kv-heavy |") == 3
    line = next(line for line in below.splitlines() if "`ours`" in line).split("|")
    assert line[2].strip() == "documents"
    assert line[6].strip() == "2.67 [1.33, 4.00] (2)"  # of 0.5 and 1.5
    assert line[7].strip() == "1.00 [1.00, 1.00] (1.25)"
    assert line[11].strip() == "285 (75%)"
    assert next(line for line in below.splitlines() if "one round" in line).split("|")[6].strip() == "-"
    assert len(json.loads((tmp_path / "results.json").read_text())) == 4
    assert below.splitlines()[-1].startswith("Made by") or "Made by:" in below


def test_a_report_without_such_texts_has_no_such_table() -> None:
    assert "come again" not in report.markdown(report.cells([record("stock", 0)]), [])


def test_answers_are_evicted_to_a_budget_in_a_pool_of_so_many_tokens() -> None:
    (full,) = scenarios("answers")
    assert (full.requests, full.prompt, full.output, (full.pool_blocks - 1) * BLOCK_SIZE) == (64, 128, 4096, 16384)
    sizes = Sizes(model=SMOLLM2, requests=8, generated_tokens=512, pool_tokens=2048, budget=128, interval=64)
    (few,) = scenarios("answers", sizes)
    assert (few.requests, few.output, (few.pool_blocks - 1) * BLOCK_SIZE) == (8, 512, 2048)
    flags = "--kv-eviction learnedkv --kv-eviction-budget 128 --kv-eviction-answers evict --kv-eviction-interval 64"
    assert [" ".join(row.args) for row in few.rows] == ["", flags]
    assert full.rows[1].args[:2] == ("--kv-eviction", "streamingllm"), "a dummy has no learned score"
    with pytest.raises(ValueError, match="--budget"):
        Sizes(budget=0)


def test_the_mean_of_running_requests_leaves_out_when_none_runs() -> None:
    rows = [record("stock", 0, samples=[[0.5, 0, 0], [1, 4, 0.1], [1.5, 2, 0.1], [2, 0, 0]])]
    (cell,) = report.cells(rows)
    assert cell["mean_running"] == 3
    assert "| 1 | 3.0 | " in report.markdown([cell], [])


def test_reuse_is_a_flag_of_the_row() -> None:
    row = reusing(OURS, "chat")
    assert row == Row(f"{OURS.name} reuse chat", (*OURS.args, "--kv-eviction-reuse", "chat"))
    assert row.evicts and not STOCK.evicts
