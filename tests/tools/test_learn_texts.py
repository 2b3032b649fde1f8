"""Texts that a score is learned from: files of every kind, default texts, and what wrong files are answered with."""

from __future__ import annotations

import gzip
import json
import lzma
import random
from pathlib import Path
from typing import Any

import pytest

from vllm_defensive.tools import learn_texts
from vllm_defensive.tools.learn_texts import Encoder


class Letters:
    """A tokenizer of letters that puts a 1 before every text."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [1] * add_special_tokens + [ord(letter) for letter in text]

    def apply_chat_template(self, messages: Any, **how: Any) -> str:
        return f"<{messages[0]['content']}>"


class Silent(Letters):
    def apply_chat_template(self, messages: Any, **how: Any) -> str:
        raise ValueError("no template")


ENCODER = Encoder(Letters())


def test_what_a_prompt_begins_with_and_a_users_turn() -> None:
    assert ENCODER.start == [1] and ENCODER.encode("a") == [97]
    assert ENCODER.turn("a") == ([60, 97], [62])
    assert Encoder(Silent()).turn("a") is None
    assert learn_texts.beginning("chat", 0, ENCODER)[0] == ord("<")
    assert learn_texts.beginning("chat", 0, Encoder(Silent())) == learn_texts.beginning("written", 0, ENCODER)


def test_files_are_read_packed_or_not(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    # A line separator of Unicode may stand in a line of JSON as it is.
    two = "tw\u2028o"
    rows = f"{json.dumps({'text': 'one', 'id': 3})}\n\n{json.dumps({'context': two}, ensure_ascii=False)}\n"
    (tmp_path / "a.jsonl").write_text(rows)
    with lzma.open(tmp_path / "a.jsonl.xz", "wt") as file:
        file.write(rows)
    with gzip.open(tmp_path / "a.gz", "wt") as file:
        file.write("three")
    found = [learn_texts.read(str(tmp_path / name)) for name in ("a.txt", "a.jsonl", "a.jsonl.xz", "a.gz")]
    assert found == [["one\ntwo\n"], ["one", two], ["one", two], ["three"]]


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("none.txt", None, "No such file or directory"),
        ("bytes.txt", b"\xff\xfe\xfa", "'utf-8' codec can't decode"),
        ("plain.gz", b"plain", "Not a gzipped file"),
        ("short.xz", lzma.compress(b"a" * 999)[:-20], "Compressed file ended"),
        ("wrong.jsonl", b'{"text": "a"}\n{', "line 2 is not JSON"),
        ("other.jsonl", b'{"body": "a"}', "line 1 has none of the fields text, context"),
        ("list.jsonl", b"[1]", "line 1 has none of the fields text, context"),
    ],
)
def test_files_that_cannot_be_read_are_named_in_one_line(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        learn_texts.read(str(path))
    assert str(error.value).startswith(f"--texts {path}: {message}") and "\n" not in str(error.value)


def test_texts_are_cut_of_all_documents_in_turn_and_nothing_is_learned_twice() -> None:
    documents = ["".join(chr(1000 * d + i) for i in range(500)) for d in (1, 2)] + ["short"]
    texts = list(learn_texts.cut(documents, ENCODER, 11, random.Random(0)))
    assert all(len(text) == 11 and text[0] == 1 for text in texts)
    seen = [token for text in texts for token in text[1:]]
    assert len(seen) == len(set(seen)) and len(seen) > 0.8 * 1000
    assert [text[1] // 1000 for text in texts[:4]] in ([1, 2, 1, 2], [2, 1, 2, 1])
    assert texts == list(learn_texts.cut(documents, ENCODER, 11, random.Random(0)))


def test_too_little_text_is_refused_in_one_line() -> None:
    assert len(learn_texts.given(["a"], ["abcd" * 9], ENCODER, 11, 2, 0)) == 2
    with pytest.raises(ValueError, match=r"^--texts a b: no two texts of 64 tokens in it; give longer ones, or a smal"):
        learn_texts.given(["a", "b"], ["abcd" * 20, "abc"], ENCODER, 64, 9, 0)


def test_default_texts_are_half_pythons_and_half_the_models_own_and_the_same_again() -> None:
    asked: list[list[int]] = []

    def write(beginnings: list[list[int]]) -> list[list[int]]:
        asked.extend(beginnings)
        return [[*beginning, *[0] * 100][:100] for beginning in beginnings]

    texts = learn_texts.defaults(ENCODER, 100, 40, 0, write)
    assert len(texts) == 40 and all(len(text) == 100 for text in texts)
    assert len(asked) == 20 == sum(text[-1] == 0 for text in texts)
    assert texts == learn_texts.defaults(ENCODER, 100, 40, 0, write)
    assert texts != learn_texts.defaults(ENCODER, 100, 40, 1, write)


def test_what_is_held_back_is_of_every_kind() -> None:
    assert {learn_texts.kind_of(i) for i in range(9, 49, 10)} == set(learn_texts.KINDS)
