"""The benchmark of answers that are evicted while they are generated, without an engine: texts, counts, tables."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.answers import report
from benchmarks.answers.__main__ import Choice, batches, counts, first_behind, parse
from benchmarks.answers.texts import FACTS, Asked, ForcedText, forced_texts, longbench, needles, prose
from benchmarks.quality.answers import Forced
from benchmarks.quality.files import FILES, LONGBENCH


def encode(text: str) -> list[int]:
    """A token a character."""
    return [ord(character) for character in text]


def decode(tokens: list[int]) -> str:
    return "".join(map(chr, tokens))


def test_needles_are_told_in_the_answer_and_asked_for_behind_all_of_them() -> None:
    text = needles(3, 700, 8000, encode)
    assert len(text.prompt) == 700 and len(text.answer) == 8000 and len(text.asked) == FACTS
    values = [decode(text.answer[asked.first : asked.last]) for asked in text.asked]
    assert len(set(values)) == FACTS
    for asked, value in zip(text.asked, values, strict=True):
        # Once where it is told, which no prompt gives away, and once where it is asked for.
        assert decode(text.answer).count(value.strip()) == 2 and value.strip() not in decode(text.prompt)
        assert value.strip() in decode(text.answer[asked.told : asked.told + 100])
    assert max(asked.told for asked in text.asked) < 4000 < min(asked.first for asked in text.asked)
    assert needles(3, 700, 8000, encode) == text != needles(4, 700, 8000, encode)


def test_an_answer_too_short_for_its_facts_is_refused() -> None:
    with pytest.raises(ValueError, match="an answer of 1000 tokens: choose a longer one"):
        needles(0, 256, 1000, encode)


def test_running_texts_go_on_where_their_prompt_ends(tmp_path: Path) -> None:
    text = prose(0, 100, 900, encode)
    assert len(text.prompt) == 100 and len(text.answer) == 900
    samples = [("qasper_e", "a" * 999), ("qasper_e", "b" * 1001), ("trec_e", "c" * 1000), ("qasper_e", "d" * 2000)]
    lines = [json.dumps({"dataset": task, "context": context}) + "\n" for task, context in samples]
    (tmp_path / FILES[LONGBENCH]).write_text("".join(lines))
    found = list(longbench(tmp_path, 100, 900, encode))
    assert [decode(text.answer)[0] for text in found] == ["c", "b", "d"], "tasks in turn, what is too short left out"
    both = list(forced_texts(["prose", LONGBENCH], 2, 100, 900, encode, tmp_path))
    assert [text.name for text in both] == ["prose/0", "longbench/0", "prose/1", "longbench/1"]


def test_a_prompt_that_stays_is_part_of_the_budget() -> None:
    choice = Choice("random@prompt", 512)
    asked = choice.setting(256, 64).extra_args()
    assert asked["kv_eviction"] == "random"
    assert (asked["kv_eviction_protect"], asked["kv_eviction_budget"]) == (256, 512)
    assert "kv_eviction_keep" not in asked, "a budget alone"
    assert (asked["kv_eviction_answers"], asked["kv_eviction_interval"]) == ("evict", 64)
    assert choice.leaves_room(256) and not Choice("random@prompt", 256).leaves_room(256)
    assert Choice("none", 0).setting(256, 64).extra_args() == {"kv_eviction": "none"}


def test_widths_behind_a_name_are_the_requests(capsys: pytest.CaptureFixture[str]) -> None:
    asked = Choice("random@k8v4@prompt", 512).setting(256, 64).extra_args()
    assert (asked["kv_eviction"], asked["kv_eviction_widths"], asked["kv_eviction_protect"]) == ("random", "k8v4", 256)
    assert parse(["--policies", "random@k8v4", "--dtype", "bfloat16"]).policies == ["random@k8v4"]
    with pytest.raises(SystemExit):
        parse(["--policies", "random@k8v4"])
    assert "--policies random@k8v4: a budget in tokens of 32 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    "budget, first",
    [
        pytest.param(100, 1, id="at the prompt's end: the first token is read off the full cache"),
        pytest.param(256, 257, id="a prompt as large as the budget"),
        pytest.param(1024, 1025),
        pytest.param(1023, 769),
    ],
)
def test_tokens_count_from_the_first_that_an_eviction_can_change(budget: int, first: int) -> None:
    assert first_behind(Choice("random", budget), 256, 256) == first


def forced(kl: list[float], right: list[bool]) -> Forced:
    made = Forced([7] * len(kl))
    made.kl, made.right = kl, right
    return made


def test_running_texts_count_behind_the_first_eviction_and_facts_at_their_values() -> None:
    text = ForcedText("prose/0", [1] * 4, [2] * 8)
    row = counts(text, Choice("random", 6), forced([0, 0, 0, 0, 0, 1, 2, 6], [True] * 8), 4)
    assert row["first"] == 5 and row["kl"] == 3 and row["kl_before"] == 0 and row["kl_parts"] == [3]
    asking = ForcedText("needles/0", [1] * 4, [2] * 8, (Asked(1, 4, 6), Asked(0, 7, 8)))
    right = [False, False, False, False, True, True, False, False]
    row = counts(asking, Choice("random", 6), forced([9, 9, 9, 9, 1, 2, 9, 6], right), 4)
    assert row["kl"] == 3 and row["each_kl"] == [1.5, 6] and row["each_exact"] == [1, 0] and row["distance"] == [3, 7]


def row(text: str, policy: str, kl: float, budget: int = 512, **more: Any) -> dict[str, Any]:
    return {"text": text, "policy": policy, "budget": budget, "kl": kl, "nll": 1.0, **more}


def test_what_is_there_is_not_measured_again() -> None:
    texts = [ForcedText(f"prose/{number}", [1] * 4, [2] * 8) for number in range(3)]
    choices = [Choice("random", 6), Choice("random@prompt", 4)]
    there = [row("prose/0", "none", 0, 0), row("prose/0", "random", 1, 6), row("prose/1", "none", 0, 0)]
    found = list(batches(iter(texts), choices, there, 2))
    named = [[(text.name, [choice.policy for choice in missing]) for text, missing in batch] for batch in found]
    assert named == [[("prose/1", ["random"]), ("prose/2", ["none", "random"])]]


def test_policies_are_compared_on_the_texts_that_both_have(tmp_path: Path) -> None:
    rows = [
        row("prose/0", "none", 0.0, 0),
        *(row(f"prose/{i}", "learnedkv", kl) for i, kl in enumerate([1.0, 2.0, 30.0])),
        *(row(f"prose/{i}", "random", kl) for i, kl in enumerate([2.0, 4.0])),
    ]
    first, other = (cell for cell in report.cells(rows) if cell["budget"])
    assert first["kl"] == 11 and "difference" not in first
    assert (other["difference"], other["difference_interval"], other["texts_of_both"]) == (1.5, (1.0, 2.0), 2)
    text = report.write(rows, tmp_path)
    assert "| 512 | `random` | 2 | 3 [2, 4] | +1.5 [+1, +2] |" in text
    assert "Full cache beside itself: 0.000000 (1 texts)." in text


def test_longbench_needs_its_file(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse([]).suites == ["prose", "needles"] and "longbench" in parse(["--data", "somewhere"]).suites
    with pytest.raises(SystemExit):
        parse(["--suites", "longbench"])
    assert "longbench with --data" in capsys.readouterr().err
