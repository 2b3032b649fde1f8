"""Documents of others: what is asked of them, which fit, and what is said where a file is missing."""

from __future__ import annotations

import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks.quality import files, plan
from benchmarks.quality.__main__ import parse
from benchmarks.quality.files import KV_RETRIEVAL, LONGBENCH, Files
from benchmarks.quality.prompts import Prompts


class Words:
    """A tokenizer that knows words only, and a template of two words."""

    def apply_chat_template(self, messages: list[dict], **_: object) -> str:
        return f"<user> {messages[0]['content']} <answer> "

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [hash(word) for word in text.split()]


PROMPTS = Prompts(Words())


def sample(dataset: str, words: int, **other: object) -> dict:
    question = {"input": "Who came?", "answers": ["Ada Lovelace", "Ada"], "length": words}
    return {"dataset": dataset, "context": " ".join(f"w{i}" for i in range(words)), **question, **other}


def an_object(pairs: int, asked: int) -> dict:
    records = [[f"key-{i}", f"first {i} last"] for i in range(pairs)]
    return {"ordered_kv_records": records, "key": f"key-{asked}", "value": f"first {asked} last"}


OPEN: dict[str, Callable] = {"": open, ".gz": gzip.open, ".xz": lzma.open}


def put(folder: Path, suite: str, samples: list[dict], ending: str = "") -> None:
    with OPEN[ending](folder / f"{files.FILES[suite]}{ending}", "wt", encoding="utf-8") as file:
        file.write("".join(json.dumps(each) + "\n" for each in samples))


@pytest.mark.parametrize("ending", OPEN)
def test_a_file_may_be_packed(tmp_path: Path, ending: str) -> None:
    samples = [sample("qasper_e", 5), sample("lcc_e", 7)]
    put(tmp_path, LONGBENCH, samples, ending)
    assert list(files.read(tmp_path, LONGBENCH)) == samples


def test_a_missing_file_is_named_and_the_other_suite_is_there(tmp_path: Path) -> None:
    put(tmp_path, KV_RETRIEVAL, [an_object(5, 2)])
    found = Files(tmp_path, PROMPTS)
    assert found.tasks(LONGBENCH) == () and found.tasks(KV_RETRIEVAL) == (KV_RETRIEVAL,)
    assert found.missing == [f"longbench: {tmp_path}/longbench-e.jsonl, or the same with .gz or .xz, is not there"]
    assert {i.suite for i in plan.items(plan.FILE_SUITES, [500], [2], 0, files=found)} == {KV_RETRIEVAL}


def test_several_keys_of_one_object_are_asked_for() -> None:
    document = files.kv_retrieval(an_object(9, 4), 0)
    assert json.loads(document.text.partition("\n\n")[2]) == dict(an_object(9, 4)["ordered_kv_records"])
    assert len({q.text for q in document.questions}) == files.KV_QUESTIONS
    assert '"key-4"' in document.questions[0].text, "the file's own question comes first"
    for question in document.questions:
        key = question.text.split('"')[1]
        assert f'"{key}": "{question.gold}"' in document.text and question.prefix == f'The key "{key}" has the value "'
        assert question.answers == (question.gold,)
    assert document == files.kv_retrieval(an_object(9, 4), 0) != files.kv_retrieval(an_object(9, 4), 1)
    assert len(files.kv_retrieval(an_object(2, 1), 0).questions) == 2, "no more than there are"


@pytest.mark.parametrize("task", files._ASKED)
def test_each_task_asks_in_its_own_words(task: str) -> None:
    (question,) = files.longbench(sample(task, 9), 3).questions
    assert ("Who came?" in question.text) == ("{input}" in files._ASKED[task][0])
    assert (question.prefix + question.gold).endswith((": Ada Lovelace", ":\nAda Lovelace"))
    assert question.match == "any" and question.answers == ("Ada Lovelace", "Ada")


def test_code_keeps_its_indentation() -> None:
    (question,) = files.longbench(sample("lcc_e", 9, answers=["\t\treturn 7\r\n"]), 0).questions
    assert question.prefix + question.gold == "Next line:\n\t\treturn 7"


@pytest.mark.parametrize("task", files._EXAMPLES)
def test_after_examples_the_last_line_begins_the_answer(task: str) -> None:
    document = files.longbench(sample(task, 9, input="Dialogue: A: Hi\r\nB: Ho\nSummary: "), 0)
    (question,) = document.questions
    assert (question.text, question.prefix, question.gold) == ("Dialogue: A: Hi\r\nB: Ho", "Summary:", " Ada Lovelace")


def test_a_task_that_is_not_longbenchs_names_those_that_are() -> None:
    with pytest.raises(ValueError, match=r"'crosswords'.*qasper_e.*samsum_e"):
        files.longbench(sample("crosswords", 9), 0)


def test_documents_are_counted_among_those_that_fit(tmp_path: Path) -> None:
    """Nothing is cut: with question, template and answer, 30 words do not fit into 40."""
    sizes = [30, 10, 200, 12]
    one_word = sample("qasper_e", 4, answers=["Ada"])
    put(tmp_path, LONGBENCH, [one_word] + [sample("qasper_e", n) for n in sizes] + [sample("trec_e", 8, input="a\nb:")])
    found = Files(tmp_path, PROMPTS)

    def numbers(context: int) -> list[int]:
        documents = (found.document(LONGBENCH, "qasper_e", context, n) for n in range(9))
        return [document.seed for document in documents if document]

    assert numbers(40) == [2, 4], "an answer of one token has nothing after its first"
    assert numbers(100) == [1, 2, 4] and numbers(300) == [1, 2, 3, 4] and numbers(10) == []
    prompt = PROMPTS.ask(
        found.document(LONGBENCH, "qasper_e", 40, 0), files.longbench(sample("qasper_e", 10), 2).questions[0]
    )
    size = len(prompt.tokens) + len(prompt.gold)
    assert found.document(LONGBENCH, "qasper_e", size, 0) and not found.document(LONGBENCH, "qasper_e", size - 1, 0)


def test_a_run_ends_where_the_files_do(tmp_path: Path) -> None:
    put(tmp_path, LONGBENCH, [sample("qasper_e", n) for n in (10, 12, 90)] + [sample("lcc_e", 10)])
    put(tmp_path, KV_RETRIEVAL, [an_object(3, 0)])
    found = Files(tmp_path, PROMPTS)
    items = list(plan.items(plan.FILE_SUITES, [60], [5], 1, files=found))
    assert [(i.task, i.seed) for i in items] == [("qasper_e", 1)], "from the second on there is one"
    assert len(list(plan.items(plan.FILE_SUITES, [60], [5], 0, files=found))) == 4
    assert [i.task for i in plan.items([LONGBENCH], [60], [1], 0, ["lcc_e"], found)] == ["lcc_e"]


def test_suites_of_files_need_a_folder(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--data", "there"]).suites == list(plan.FILE_SUITES)
    assert parse(["--data", "there", "--suites", "text,longbench"]).suites == ["text", "longbench"]
    with pytest.raises(SystemExit):
        parse(["--suites", "longbench"])
    assert "give --data" in capsys.readouterr().err
