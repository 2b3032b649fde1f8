"""The quality benchmark on a real engine with the tiny model: what it records is what vLLM computes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.quality import contract, files, plan
from benchmarks.quality.prompts import Prompts
from benchmarks.quality.protocols import Choice, Runner
from benchmarks.quality.variants import resolve

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

CONTEXT = 700


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Iterator:
    from benchmarks.quality.engine import Engine

    yield Engine(tiny_model, dtype="float32", max_model_len=2048)


@pytest.fixture(scope="module")
def runner(engine) -> Runner:
    return Runner(engine)


def prompt_of(engine) -> list[int]:
    return [2 + (7 * i * i + i) % 500 for i in range(CONTEXT)]


def test_forced_probabilities_are_those_that_vllm_reports(engine) -> None:
    from vllm import SamplingParams

    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Setting

    prompt, answer = prompt_of(engine), [11, 5, 300, 42]
    forced = Forced(answer)
    (output,) = engine.forced([(prompt, forced, Setting())])
    assert list(output.outputs[0].token_ids) == answer
    # The same, asked of vLLM as the log-probabilities of a longer prompt's own tokens.
    params = SamplingParams(max_tokens=1, prompt_logprobs=0, extra_args={"kv_eviction": "none"})
    (longer,) = engine.llm.generate([{"prompt_token_ids": prompt + answer}], params, use_tqdm=False)
    expected = [-longer.prompt_logprobs[len(prompt) + i][token].logprob for i, token in enumerate(answer)]
    assert forced.nll == pytest.approx(expected, abs=1e-4)  # one token at a time and all at once round differently


def test_keeping_everything_costs_nothing_and_losing_most_costs_something(runner: Runner) -> None:
    (item,) = plan.items(["text"], [CONTEXT], [1], seed=0)
    choices = [Choice("keep-all", 0.5, plan.WINDOW), Choice("streamingllm", 0.1, plan.WINDOW)]
    full, same, less = runner.run(item, choices)
    assert full["policy"] == "none" and full["kl"] == 0 and full["retention"] == 1
    assert abs(same["kl"]) < 1e-6 and same["nll"] == pytest.approx(full["nll"], abs=1e-4)
    assert less["kl"] > 1e-3


@pytest.mark.parametrize("suite", plan.SUITES)
def test_every_suite_runs_both_protocols_it_has(runner: Runner, suite: str) -> None:
    item = next(plan.items([suite], [CONTEXT], [1], seed=0))
    choices = [Choice("snapkv", 0.3, p) for p in (plan.WINDOW, plan.AFTER, plan.NO_PREFIX_CACHE)]
    rows = runner.run(item, choices)
    assert {r["protocol"] for r in rows} == {plan.WINDOW, plan.AFTER, plan.NO_PREFIX_CACHE}
    assert all(0.2 < r["retention"] < 0.6 for r in rows if r["policy"] == "snapkv")
    assert all(("kl_with_first" in r) == ("kl" in r and r["protocol"] == plan.AFTER) for r in rows)
    with_cache, without = ([r for r in rows if r["protocol"] == p] for p in (plan.WINDOW, plan.NO_PREFIX_CACHE))
    if "kl" in rows[0]:
        kl = [[r["kl"] for r in some if r["policy"] == "snapkv"] for some in (with_cache, without)]
        assert kl[0] == pytest.approx(kl[1], abs=1e-4), "the prefix cache changes no result"


def test_a_prompt_read_in_parts_is_evicted_after_each(engine, runner: Runner) -> None:
    item = next(plan.items(["forced"], [1300], [1], seed=3))
    before = engine.totals()["vllm:kv_eviction_repeats"]
    rows = runner.run(item, [Choice("keep-all", 0.3, plan.IN_PARTS), Choice("streamingllm", 0.3, plan.IN_PARTS)])
    probes = len(rows) // 3
    assert engine.totals()["vllm:kv_eviction_repeats"] - before == 2 * 2 * probes, "three parts each"
    assert all(r["kl"] < 1e-6 and r["kl_with_first"] < 1e-6 for r in rows if r["policy"] == "keep-all")
    assert all(r["kl_with_first"] > 1e-3 for r in rows if r["policy"] == "streamingllm")


def test_retention_is_what_the_engine_counts(engine) -> None:
    from benchmarks.quality.answers import Forced
    from benchmarks.quality.engine import Setting

    prompt, before = prompt_of(engine), engine.totals()
    setting = Setting("adakv", 0.25)
    engine.forced([(prompt, Forced([3, 4]), setting)])
    after = engine.totals()
    kept, tokens = (
        after[f"vllm:kv_eviction_{n}"] - before.get(f"vllm:kv_eviction_{n}", 0)
        for n in ("kept_tokens", "prompt_tokens")
    )
    assert tokens == CONTEXT
    assert kept / tokens == pytest.approx(engine.retention(setting, CONTEXT))


def test_a_variant_is_a_row_of_its_own(runner: Runner) -> None:
    name = resolve("defensivekv@pool_kernel=1+window_bias=true")
    (item,) = plan.items(["text"], [CONTEXT], [1], seed=1)
    rows = runner.run(item, [Choice("defensivekv", 0.2, plan.WINDOW), Choice(name, 0.2, plan.WINDOW)])
    assert [r["policy"] for r in rows] == ["none", "defensivekv", name]
    with pytest.raises(ValueError, match="colour"):
        resolve("snapkv@colour=red")


def test_every_cross_of_a_contract_runs_on_the_same_answers(runner: Runner) -> None:
    terms = contract.draw_up("snapkv", "halokv")
    (item,) = plan.items(["text"], [CONTEXT], [1], seed=2)
    rows = runner.run(item, [Choice(name, 0.2, plan.WINDOW) for name in terms.crosses.values()])
    assert [r["policy"] for r in rows[1:]] == list(terms.crosses.values())
    found = {row["slot"]: row for row in contract.margins(rows, terms)}
    kl = {r["policy"]: r["kl"] for r in rows}
    assert found[contract.WHOLE]["margin"] == pytest.approx(kl["halokv"] - kl["snapkv"])
    assert set(found) == {*terms.slots, contract.WHOLE}
    assert abs(found["budget"]["margin"]) > 1e-6, "another choice keeps other tokens"


def test_answers_differ_behind_their_first_eviction_and_not_before(engine) -> None:
    from benchmarks.answers.__main__ import Choice, measure
    from benchmarks.answers.texts import Asked, ForcedText

    tokens = prompt_of(engine)
    running = ForcedText("prose/0", tokens[:256], tokens[256:600])
    asking = ForcedText("needles/0", tokens[:256], tokens[256:600], (Asked(10, 300, 310),))
    choices = [Choice("none", 0), Choice("streamingllm", 320), Choice("random", 448), Choice("random@prompt", 320)]
    rows = list(measure(engine, [(running, choices), (asking, choices)], 64))
    assert [(row["text"], row["policy"]) for row in rows] == [
        (text.name, choice.policy) for text in (running, asking) for choice in choices
    ]
    assert [row.get("first") for row in rows[:4]] == [0, 129, 257, 129]
    for row in rows[1:4]:
        assert row["kl_before"] < 1e-6 and row["kl_parts"][0] > 1e-3, row
    assert rows[0]["kl"] < 1e-6 and rows[4]["kl"] < 1e-6 and all(row["kl"] > 1e-3 for row in rows[5:])


def test_documents_from_files_run_both_protocols(engine, tmp_path: Path) -> None:
    records = [[f"key {i} of {i * i}", f"value {i * 7}"] for i in range(60)]
    sample = {"ordered_kv_records": records, "key": records[7][0], "value": records[7][1]}
    (tmp_path / files.FILES[files.KV_RETRIEVAL]).write_text(json.dumps(sample))
    found = files.Files(tmp_path, Prompts(engine.tokenizer))
    (item,) = plan.items([files.KV_RETRIEVAL], [2000], [3], seed=0, files=found)
    choices = [Choice("snapkv", 0.3, p) for p in (plan.WINDOW, plan.AFTER)]
    rows = Runner(engine, files=found).run(item, choices)
    assert len(rows) == files.KV_QUESTIONS * 3
    assert [r["retention"] < 0.9 for r in rows] == [False, True, True] * files.KV_QUESTIONS
