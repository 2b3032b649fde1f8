"""Each token's text is its part of the prompt's text, also where a token by itself is no text."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers

from tests.tiny_model import tiny_tokenizer
from vllm_defensive.tools.audit_text import token_texts

TEXT = "Rain fell. 港口下雨了，整天。👩🏽‍🚀 naïve <|end|> İ  two  spaces\n" * 3


def sentencepiece() -> Tokenizer:
    """Like Llama 2's: "▁" for a space, which is stripped at the beginning, and bytes of what has no token."""
    pieces = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁RainfeldtwospcI.,<|>", "▁R", "▁Ra", "▁f"]
    merges = [("▁", "R"), ("▁R", "a"), ("▁", "f")]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


TOKENIZERS: dict[str, Any] = {"bytes": tiny_tokenizer(512).backend_tokenizer, "sentencepiece": sentencepiece()}


def pieces_of(kind: str, text: str) -> list[str]:
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text).ids
    return token_texts(ids, lambda some: tokenizer.decode(some, skip_special_tokens=False))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_pieces_are_the_text_where_tokens_alone_are_not(kind: str) -> None:
    tokenizer = TOKENIZERS[kind]
    alone = [tokenizer.decode([token], skip_special_tokens=False) for token in tokenizer.encode(TEXT).ids]
    assert "".join(alone) != TEXT, "else the test could not fail"
    assert "".join(pieces_of(kind, TEXT)) == TEXT


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text_is_put_together_again(kind: str, text: str) -> None:
    assert "".join(pieces_of(kind, text)) == text


def test_a_character_goes_to_the_token_that_completes_it() -> None:
    assert pieces_of("bytes", "a港b") == ["a", "", "", "港", "b"]
    assert pieces_of("sentencepiece", "R港R") == ["R", "", "", "港", "R"]


def test_bytes_that_are_no_character_are_shown_as_such() -> None:
    tokenizer = TOKENIZERS["bytes"]
    half = tokenizer.encode("港").ids[:2]
    ids = half * 20 + tokenizer.encode("ab c").ids
    texts = token_texts(ids, lambda some: tokenizer.decode(some, skip_special_tokens=False))
    assert "".join(texts) == tokenizer.decode(ids)
    assert "".join(texts[-3:]) == "ab c"


def test_the_cost_does_not_grow_with_the_prompt() -> None:
    """Also where every token ends within a character, so that the text is never whole between two of them."""
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return b"".join(b"\xb8\xad\xe4" for _ in ids).decode(errors="replace")

    texts = token_texts(range(1000), decode)
    assert "".join(texts) == "\ufffd\ufffd" + "中" * 999 + "\ufffd"
    assert max(decoded) <= 64
