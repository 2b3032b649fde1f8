"""The quality benchmark without a model: documents, scores, metrics, records, report."""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch

from benchmarks.quality import metrics, needles, paired, plan, questions, report, ruler, texts
from benchmarks.quality.__main__ import parse
from benchmarks.quality.answers import Forced
from benchmarks.quality.protocols import Choice
from benchmarks.quality.records import Records, choices_for


def count_words(text: str) -> int:
    """A tokenizer that knows words only: quick, and additive like the real one."""
    return len(text.split())


@pytest.mark.parametrize("task", ruler.TASKS)
def test_documents_fit_their_size_and_hold_their_answers(task: str) -> None:
    document = ruler.generate(task, 700, 3, count_words)
    assert 0.6 * 700 < count_words(document.text) <= 710
    assert document.questions
    for question in document.questions:
        assert questions.score(question, question.prefix + question.gold) == 1.0
        assert questions.score(question, "I do not know.") == 0.0
        assert all(answer in document.text for answer in question.answers)


@pytest.mark.parametrize("task", ruler.TASKS)
def test_a_seed_names_one_document(task: str) -> None:
    first, again, other = (ruler.generate(task, 500, seed, count_words) for seed in (1, 1, 2))
    assert first == again
    assert first.text != other.text


def test_every_needle_can_be_asked_for() -> None:
    document = ruler.generate("niah_multikey_1", 600, 0, count_words)
    assert len(document.questions) == 4
    assert len({q.answers for q in document.questions}) == 4


@pytest.mark.parametrize("task", ["niah_single_2", "niah_worded"])
def test_a_needle_is_there_once_and_its_question_names_it(task: str) -> None:
    document = ruler.generate(task, 700, 5, count_words)
    keys = [key for key in texts.keys(random.Random(0), 50 * 60) if key in document.text]
    assert len(keys) == len(document.questions) == {"niah_single_2": 1, "niah_worded": 4}[task]
    for question in document.questions:
        (key,) = [key for key in keys if key in question.text]
        (value,) = question.answers
        assert document.text.count(key) == document.text.count(value) == 1
        (needle,) = [s for s in re.split(r"(?<=[.]) |\n\n", document.text) if key in s]
        assert value in needle and key in question.prefix and value not in question.text + question.prefix
        assert question.gold == f" {value}"


def test_needles_of_different_wording_share_no_word_that_means_something() -> None:
    plain = set(
        re.findall("[a-z]+", "the of is that what does to who has how many from our last which one was above text")
    )
    words = [set(re.findall(r"[a-z]+", w.needle.format(key="", value="").lower())) - plain for w in needles.WORDINGS]
    assert all(words) and not any(a & b for a, b in itertools.combinations(words, 2))
    asked = [set(re.findall(r"[a-z]+", w.question.format(key="").lower())) - plain for w in needles.WORDINGS]
    assert all(
        len(q & own) > 1 and not any(q & o for o in words if o is not own) for q, own in zip(asked, words, strict=True)
    )
    hay = set(re.findall(r"[a-z]+", " ".join(texts.paragraphs()).lower()))
    assert not {"secret", "telephone", "warehouse", "crates", "winter", "ticket"} & hay


def test_both_kinds_of_needles_stand_beside_the_four_alike() -> None:
    assert {"niah_single_2", "niah_worded", plan.YARDSTICK} <= set(plan.tasks_of("forced"))
    assert "niah_worded" not in plan.tasks_of("ruler"), "it is not RULER's"


def spoken(full_AV: torch.Tensor, other_AV: torch.Tensor, tokens: list[int]) -> Forced:
    """What an engine fills in while these tokens are forced."""
    forced = Forced(tokens, full_AV=full_AV)
    for position, logprobs_V in enumerate(other_AV):
        forced.record(position, logprobs_V)
    return forced


def test_the_first_token_counts_where_what_was_kept_decides_it() -> None:
    generator = torch.Generator().manual_seed(3)
    full_AV, other_AV = (torch.randn(4, 9, generator=generator).log_softmax(-1) for _ in range(2))
    tokens = [int(other_AV[0].argmax()), 5, 0, 8]
    forced = spoken(full_AV, other_AV, tokens)
    pairs = zip(full_AV.tolist(), other_AV.tolist(), strict=True)
    kl = [sum(math.exp(p) * (p - q) for p, q in zip(full, other, strict=True)) for full, other in pairs]
    nll = [-float(other_AV[i, token]) for i, token in enumerate(tokens)]
    later, before = forced.counts(first_counts=True), forced.counts(first_counts=False)
    assert later.pop("kl_with_first") == pytest.approx(sum(kl) / 4, rel=1e-5)  # fp32
    assert later == before, "what all settings share is the old count"
    assert before["kl"] == pytest.approx(sum(kl[1:]) / 3, rel=1e-5)
    assert before["nll"] == pytest.approx(sum(nll[1:]) / 3, rel=1e-5)
    assert before["exact"] == 0.0


def test_all_counts_shares_and_any_counts_one() -> None:
    every = questions.Question("?", "", "", ("12", "Ab"))
    assert questions.score(every, "it is aB") == 0.5
    assert questions.score(questions.Question("?", "", "", ("12", "Ab"), "any"), "it is aB") == 1.0


def test_haystacks_come_with_python() -> None:
    assert len(texts.paragraphs()) > 200
    assert len(texts.fingerprint()) == 32
    assert "PSF" in texts.SOURCE


def test_an_unknown_task_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'haystack'.*niah_single_1"):
        ruler.generate("haystack", 100, 0, count_words)


def test_divergence_is_zero_for_equals_and_the_formula_for_others() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    assert metrics.divergence(p, p).item() == 0
    expected = 0.5 * torch.log(torch.tensor(0.5 / 0.25)) + 0.5 * torch.log(torch.tensor(0.5 / 0.75))
    torch.testing.assert_close(metrics.divergence(p, q)[0], expected)


def test_the_interval_draws_whole_documents() -> None:
    """Ten copies of each question tell nothing new: the interval stays as wide as that of the documents."""
    means = [0.0, 1.0, 2.0, 3.0]
    single = metrics.interval(means, range(4))
    copied = metrics.interval([m for m in means for _ in range(10)], [g for g in range(4) for _ in range(10)])
    assert copied == single
    assert single[0] < 1.5 < single[1]
    assert metrics.interval([2.0] * 6, range(6)) == (2.0, 2.0)


def test_the_worst_share_is_at_least_one() -> None:
    assert metrics.worst([1.0, 5.0, 2.0]) == 5.0
    assert metrics.worst([float(n) for n in range(100)]) == 97.0


def row(item: plan.Item, choice: Choice, **values: float) -> dict:
    return {
        "item": item.name,
        "probe": 0,
        "policy": choice.policy,
        "keep": choice.keep,
        "protocol": choice.protocol,
        "prompt_tokens": 100,
        "retention": 0.25,
        **values,
    }


def test_an_interrupted_run_measures_only_what_is_missing(tmp_path: Path) -> None:
    (item,) = plan.items(["text"], [64], [1], seed=0)
    choices = choices_for(item, ["snapkv", "adakv"], [0.5], [plan.WINDOW, plan.AFTER])
    assert {c.protocol for c in choices} == {plan.WINDOW}, "nothing is asked of running text"
    records = Records(tmp_path)
    records.add([row(item, choices[0], kl=0.1)])
    again = Records(tmp_path)
    assert again.missing(item, choices) == choices[1:]
    again.add([row(item, choices[0], kl=9.0), row(item, choices[1], kl=0.2)])
    assert [r["kl"] for r in Records(tmp_path).rows] == [0.1, 0.2]


def test_samples_come_round_by_round() -> None:
    found = list(plan.items(["forced"], [64, 128], [2, 1], seed=5, tasks=[plan.YARDSTICK]))
    assert [(i.context, i.seed) for i in found] == [(64, 5), (128, 5), (64, 6)]


def test_the_report_names_every_policy(tmp_path: Path) -> None:
    (item,) = plan.items(["forced"], [64], [1], seed=0, tasks=[plan.YARDSTICK])
    full, ours = Choice("none", 1.0, plan.WINDOW), Choice("snapkv", 0.2, plan.WINDOW)
    rows = [row(item, full, kl=0.0, nll=0.3, exact=1.0), row(item, ours, kl=0.5, nll=0.9, exact=0.0)]
    free = plan.Item("ruler", "vt", 64, 0)
    rows += [row(free, full, score=1.0), row(free, ours, score=0.5)]
    report.write(rows, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| snapkv | 0.50 [0.50, 0.50] | 0.50 | 0.00 |" in text
    assert "| full cache | 1 |  | 1.00 |" in text
    cells = json.loads((tmp_path / "results.json").read_text())["cells"]
    assert {c["policy"] for c in cells} == {"none", "snapkv"}


def test_the_old_count_is_marked_and_the_new_one_stands_beside_it(tmp_path: Path) -> None:
    items = list(plan.items(["forced"], [64], [2], seed=0, tasks=[plan.YARDSTICK]))
    full, later = Choice("none", 1.0, plan.WINDOW), Choice("snapkv", 0.2, plan.AFTER)
    old = [row(items[0], full, kl=0.0, nll=0.3, exact=1.0), row(items[0], later, kl=0.5, nll=0.9, exact=0.0)]
    report.write(old, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert report.OLD_COUNT in text and "with first, 0.2" not in text
    assert "| snapkv | 0.50 [0.50, 0.50] | 0.50 | 0.00 |" in text
    both = [*old, row(items[1], full, kl=0.0, nll=0.3, exact=1.0)]
    both += [row(items[1], later, kl=0.5, kl_with_first=0.75, nll=0.9, exact=0.0)]
    report.write(both, tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert report.OLD_COUNT not in text and "| KL, keep 0.2 (kept 0.250) | with first, 0.2 | worst" in text
    assert "| snapkv | 0.50 [0.50, 0.50] | 0.75 [0.75, 0.75] (1 answers) | 0.50 | 0.00 |" in text


def test_committed_records_are_read_as_the_old_count() -> None:
    from benchmarks.quality.__main__ import RESULTS

    cells = json.loads((RESULTS / "results.json").read_text())["cells"]
    assert cells and not any("kl_with_first" in cell for cell in cells)
    assert report.markdown(cells).count(report.OLD_COUNT) > 5


def test_one_number_of_samples_holds_for_all_contexts(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--contexts", "64,128", "--samples", "3"]).samples == [3, 3]
    with pytest.raises(SystemExit):
        parse(["--contexts", "64,128", "--samples", "3,2,1"])
    assert "--samples" in capsys.readouterr().err


def test_pairs_are_compared_on_the_same_answers_only() -> None:
    items = list(plan.items(["text"], [64], [3], seed=0))
    first, second = (Choice(name, 0.2, plan.WINDOW) for name in ("halokv", "layer-defensivekv"))
    rows = [row(items[i], first, kl=0.1) for i in range(3)] + [row(items[i], second, kl=0.3 + i) for i in range(2)]
    (cell,) = paired.compare(rows, "halokv", "layer-defensivekv")
    assert cell["answers"] == 2
    assert cell["difference"] == pytest.approx(((0.1 - 0.3) + (0.1 - 1.3)) / 2)
    assert "### halokv against layer-defensivekv" in paired.markdown(rows)
