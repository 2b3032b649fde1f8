"""The RULER benchmark without a model, a network or NVIDIA's package: cutting, asking, resuming, summing up."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks import wheels
from benchmarks.quality import metrics
from benchmarks.quality.engine import Setting
from benchmarks.ruler import answers, package, samples, summary
from benchmarks.ruler.__main__ import parse
from benchmarks.ruler.answers import EXCLUDED, FULL, INCLUDED, Answers, Choice
from benchmarks.ruler.package import Task

# Made-up tasks of the package's shapes: one whose wording depends on the number of values, one with an example.
NEEDLES = Task(
    "find", "needles", {}, 9, "Hidden are {kind}.\n{context}\nWhat are all the {kind} of {query}?", " They are"
)
CHAINS = Task(
    "trace", "chains", {}, 5, "Trace.\n\n{context}\nQuestion: Who has {query}?", " Answer: {n} have {query}: "
)


def row_of(text: str, *outputs: str) -> dict[str, Any]:
    return {"index": 4, "input": text, "outputs": list(outputs)}


@pytest.mark.parametrize("asked", ["What are all the codes of Ann and Bo?", "What is the code of Ann?"])
def test_a_prompt_is_cut_before_its_question_and_its_answer(asked: str) -> None:
    context, prefix = "Hidden are codes.\nWhat are all these? Ann has 7.\n", " They are"
    sample = samples.split(NEEDLES, 64, row_of(context + asked + prefix, "7"))
    assert (sample.context, sample.question, sample.answer_prefix) == (context, asked, prefix)
    assert (sample.task, sample.length, sample.index, sample.references, sample.most) == ("find", 64, 4, ("7",), 9)


def test_a_worked_example_belongs_to_the_context() -> None:
    example = "Trace.\n\nX = 3\nQuestion: Who has 3? Answer: 1 have 3: X\n\n"
    context, question, prefix = "Trace.\n\nY = 5 Z = Y\n", "Question: Who has 5?", " Answer: 2 have 5: "
    sample = samples.split(CHAINS, 64, row_of(example + context + question + prefix, "Y", "Z"))
    assert (sample.context, sample.question, sample.answer_prefix) == (example + context, question, prefix)


@pytest.mark.parametrize("text", ["no question in here Answer: ", "Question: Who has 5? and no beginning"])
def test_a_prompt_of_another_template_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="trace, sample 4: no question"):
        samples.split(CHAINS, 64, row_of(text, "Y"))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A package of the same layout with one task, whose generator writes what it was asked for."""
    code = tmp_path / "root" / "package" / "long_context_eval"
    for part in ("data", "eval"):
        (code / part / "synthetic").mkdir(parents=True)
    (code / "synthetic.yaml").write_text("easy:\n  task: kind\n  args:\n    hops: 3\n")
    table = {"tokens_to_generate": 5, "template": CHAINS.template, "answer_prefix": CHAINS.answer_prefix}
    (code / "data" / "synthetic" / "constants.py").write_text(f"TASKS = {{'kind': {table!r}}}")
    (code / "eval" / "synthetic" / "constants.py").write_text(
        "def match(preds, refs):\n    return [100.0 * (p == r[0]) for p, r in zip(preds, refs)]\n"
        "TASKS = {'kind': {'metric_fn_per_sample': match}}"
    )
    (code / "data" / "synthetic" / "kind.py").write_text(
        "import json, pathlib, sys, time\n"
        "o = dict(zip(sys.argv[1::2], sys.argv[2::2]))\n"
        "if o['--max_seq_length'] == '13': sys.exit('too short')\n"
        "if o['--max_seq_length'] == '14' and o['--num_samples'] != '2':\n"
        "    print('100%|#| 1/1 [00:00] 50%|#  | 1/4 [00:00]\\r 60%|## | 2/4 [00:00]', file=sys.stderr, flush=True)\n"
        "    time.sleep(60)\n"
        "text = o['--template'].format(context='Y = 5', query='5', n=o['--hops'])\n"
        "folder = pathlib.Path(o['--save_dir']) / o['--save_name']\n"
        "folder.mkdir(parents=True)\n"
        "rows = [{'index': i, 'input': text, 'outputs': ['Y']} for i in range(int(o['--num_samples']))]\n"
        "(folder / 'validation.jsonl').write_text(''.join(json.dumps(row) + '\\n' for row in rows))\n"
    )
    return tmp_path / "root"


@pytest.fixture
def tokenizer(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "tokenizer.json").write_text("{}")
    return tmp_path / "model"


def test_samples_are_made_by_the_packages_generator_and_kept(root: Path, tokenizer: Path, tmp_path: Path) -> None:
    task = package.tasks(root)["easy"]
    made = samples.load(root, task, tokenizer, 64, 2, tmp_path)
    assert [sample.index for sample in made] == [0, 1]
    assert made[0].question == "Question: Who has 5?" and made[0].answer_prefix == " Answer: 3 have 5: "
    (root / "package" / "long_context_eval" / "data" / "synthetic" / "kind.py").unlink()
    assert samples.load(root, task, tokenizer, 64, 1, tmp_path) == made[:1], "those that are there are enough"
    with pytest.raises(RuntimeError, match="easy: the generator failed"):
        samples.load(root, task, tokenizer, 64, 3, tmp_path)


def test_a_task_that_cannot_be_made_says_why(root: Path, tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="too short"):
        samples.load(root, package.tasks(root)["easy"], tokenizer, 13, 1, tmp_path)


def test_samples_after_one_that_does_not_fit_are_not_tried_again(
    root: Path, tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(package, "patience", lambda samples: 5 if samples == 4 else 60)
    task = package.tasks(root)["easy"]
    assert [sample.index for sample in samples.load(root, task, tokenizer, 14, 4, tmp_path)] == [0, 1]
    monkeypatch.setattr(package, "generate", lambda *_: pytest.fail("tried again"))
    assert len(samples.load(root, task, tokenizer, 14, 4, tmp_path)) == 2


def test_scores_are_the_packages_own_on_printable_text(root: Path) -> None:
    score = package.scorer(root, package.tasks(root)["easy"])
    assert score(" Y \x00", ["Y"]) == 100.0
    assert score("a\x01b", ["a\nb"]) == 100.0
    assert score("Z", ["Y"]) == 0.0


def test_another_wheel_than_the_pinned_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pip(command: list[str], check: bool) -> None:
        with zipfile.ZipFile(Path(command[command.index("--dest") + 1]) / "a_b-1.0-py3-none-any.whl", "w") as archive:
            archive.writestr("a/keep/x", "1")
            archive.writestr("a/drop/x", "2")

    monkeypatch.setattr(wheels.subprocess, "run", pip)
    with pytest.raises(ValueError, match=r"a-b==1\.0: the wheel has sha256"):
        wheels.download_pinned(wheels.Pinned("a-b==1.0", "0" * 64), tmp_path)
    (wheel,) = tmp_path.glob("*.whl")
    pinned = wheels.Pinned("a-b==1.0", wheels.sha256(wheel))
    monkeypatch.setattr(wheels.subprocess, "run", lambda *_, **__: None)
    wheels.unpack(wheels.download_pinned(pinned, tmp_path), tmp_path / "out", "a/keep/")
    assert [path.name for path in (tmp_path / "out" / "a").iterdir()] == ["keep"]


class RecordingEngine:
    """Takes note of what it is asked; a token is a character."""

    def __init__(self) -> None:
        self.tokenizer = self
        self.batches: list[list[tuple[list[int], int, Setting]]] = []

    def apply_chat_template(self, messages: list[dict[str, str]], **_: object) -> str:
        return f"<user>{messages[0]['content']}<answer>"

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        return [ord(character) for character in text]

    def free(self, jobs: list[tuple[list[int], int, Setting]]) -> list[Any]:
        self.batches.append(jobs)
        return [SimpleNamespace(outputs=[SimpleNamespace(text="it is Y", token_ids=[1, 2])]) for _ in jobs]

    def retention(self, setting: Setting, prompt_tokens: int) -> float:
        return setting.keep


def test_all_choices_are_asked_over_one_prefill_and_evicted_where_they_should() -> None:
    engine = RecordingEngine()
    sample = samples.Sample("trace", 64, 4, "Y = 5\n", "Who?", " It is", ("Y",), 5)
    wanted = answers.choices([FULL, "snapkv"], [0.5], [EXCLUDED, INCLUDED])
    rows = answers.ask(engine, sample, wanted, lambda answer, references: 25.0)
    (fill,), batch = engine.batches
    text = "".join(map(chr, fill[0]))
    assert text == "<user>Y = 5\nWho?<answer> It is" and fill[1:] == (1, Setting())
    assert all(tokens == fill[0] and most == 5 for tokens, most, _ in batch)
    boundary = text.index("Who?")
    assert [s for *_, s in batch] == [Setting(), Setting("snapkv", 0.5, boundary), Setting("snapkv", 0.5)]
    assert [(r["policy"], r["keep"], r["protocol"]) for r in rows] == wanted
    assert {r["score"] for r in rows} == {25.0} and rows[0]["context_tokens"] == boundary


def test_the_full_cache_is_asked_once_whatever_the_ratios() -> None:
    chosen = answers.choices(["a", FULL, "b"], [0.5, 0.2], [EXCLUDED, INCLUDED])
    assert chosen.count(Choice(FULL)) == 1 and len(chosen) == 9
    assert answers.choices(["a"], [0.5], [INCLUDED]) == [Choice("a", 0.5, INCLUDED)]


def answer(policy: str, task: str, index: int, score: float, **other: Any) -> dict[str, Any]:
    full = policy == FULL
    place = {"model": "m", "length": 64, "keep": 1.0 if full else 0.2, "protocol": None if full else EXCLUDED}
    times = {"prefill_seconds": 4.0, "seconds": 1.0}
    return {"policy": policy, "task": task, "index": index, "score": score, **place, **times, **other}


def test_a_run_goes_on_with_what_has_no_answer(tmp_path: Path) -> None:
    path = tmp_path / "new" / "answers.jsonl"
    sample = samples.Sample("trace", 64, 4, "", "", "", (), 5)
    wanted = [Choice(FULL), Choice("a", 0.2, EXCLUDED), Choice("a", 0.2, INCLUDED)]
    Answers(path).add([answer(FULL, "trace", 4, 100.0), answer("a", "trace", 4, 50.0, answer="line\u2028line")])
    path.write_text(path.read_text() + '{"model": "m", "ta')  # a run that was ended while it wrote
    again = Answers(path)
    assert again.missing("m", sample, wanted) == wanted[2:]
    assert again.missing("other", sample, wanted) == wanted
    again.add([answer("a", "trace", 4, 0.0), answer("a", "trace", 4, 25.0, protocol=INCLUDED)])
    assert [row["score"] for row in Answers(path).rows] == [100.0, 50.0, 25.0], "an answer is never changed"
    assert [json.loads(line)["score"] for line in path.read_text().splitlines()] == [100.0, 50.0, 25.0]


ROWS = [
    *(answer(FULL, "easy", i, s) for i, s in enumerate([100, 100, 50])),
    *(answer("a", "easy", i, s) for i, s in enumerate([100, 50, 0])),
    *(answer("b", "easy", i, s) for i, s in enumerate([0, 50])),
    *(answer(FULL, "hard", i, s) for i, s in enumerate([0, 50])),
    *(answer("a", "hard", i, s) for i, s in enumerate([100, 100])),
    *(answer("b", "hard", i, s) for i, s in enumerate([0, 100])),
]


def test_a_table_holds_the_samples_that_all_its_policies_answered() -> None:
    (both,) = summary.collect(ROWS)
    assert list(both.scores) == [FULL, "a", "b"]
    assert [both.of(name, "easy") for name in both.scores] == [[100, 100], [100, 50], [0, 50]]
    (alone,) = summary.collect(ROWS, ["a"])
    assert alone.of("a", "easy") == [100, 50, 0]


def test_tasks_count_the_same_and_shares_are_of_what_the_full_cache_does() -> None:
    (alone,) = summary.collect(ROWS, ["a"])
    assert alone.mean("a", alone.tasks) == (50 + 100) / 2
    assert alone.able() == ["easy"]
    text = summary.tables(ROWS, ["a"])
    assert "m, 64 tokens, question excluded, keep 0.2" in text
    assert "| easy | 3 | 83.3 | 50.0 |" in text
    assert "| mean | 5 | 54.2 | 75.0 |" in text
    assert "| full at 50 or more | 3 | 83.3 | 50.0 |" in text
    assert "| the same, share of full |  | 1.000 | 0.600 |" in text
    assert "m, 64 tokens: 4.0 s a prompt, 1.0 s an answer (14 answers)" in text


def test_two_policies_differ_by_the_mean_of_their_differences() -> None:
    (table,) = summary.collect(ROWS)
    mean, (low, high) = table.difference("a", "b", ["easy", "hard"])
    assert mean == ((100 + 0) / 2 + (100 + 0) / 2) / 2
    assert (low, high) == (0, 100)
    assert "| a - b |" in summary.tables(ROWS, compare=["a", "b"])
    assert "+50.0 [+0.0, +100.0]" in summary.tables(ROWS, compare=["a", "b"])


def test_the_interval_draws_within_each_task() -> None:
    """Two tasks that differ much, each with equal samples: nothing is left to chance."""
    assert metrics.stratified_interval([[0.0] * 4, [10.0] * 2]) == (5.0, 5.0)
    low, high = metrics.stratified_interval([[0.0, 2.0] * 8, [10.0] * 2])
    assert 5.0 < low < 5.5 < high < 6.0


def test_ratios_and_protocols_have_tables_of_their_own() -> None:
    rows = [
        *ROWS,
        *(answer("a", "easy", i, 0, keep=0.5) for i in range(3)),
        answer("a", "easy", 0, 0, protocol=INCLUDED),
    ]
    assert [(t.protocol, t.keep) for t in summary.collect(rows)] == [(EXCLUDED, 0.5), (EXCLUDED, 0.2), (INCLUDED, 0.2)]


def test_wrong_options_name_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(["--length", "2048,4096", "--keep", "0.5"]).length == [2048, 4096]
    for wrong, message in ((["--protocol", "after"], "excluded, included"), (["--compare", "a"], "two policies")):
        with pytest.raises(SystemExit):
            parse(wrong)
        assert message in capsys.readouterr().err
