"""The text of each token of a prompt, cut so that the pieces together are the prompt's text."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_CONTEXT = 8  # tokens that are decoded anew with each one, more only where a character is cut
_MOST_CONTEXT = 64
_UNFINISHED = "\ufffd"  # what decoders write for bytes that are no character, or not yet
_MOST_PIECES = 4  # tokens that one character may be spread over: UTF-8 has at most four bytes


def token_texts(token_ids: Sequence[int], decode: Callable[[list[int]], str]) -> list[str]:
    """What each token adds to the text of those before it.

    A token by itself may be part of a character (CJK, emoji), or lose a space that SentencePiece only writes between
    tokens. So each is decoded with a few before it, and a character that is spread over tokens goes to the one that
    completes it; the others add "". Costs a decoding of about `_CONTEXT` tokens for each.
    """
    ids = list(token_ids)
    texts: list[str] = []
    start = border = 0  # `ids[start:]` are decoded; the text was whole after `ids[:border]`
    said = ""  # of `ids[start:]`, what earlier tokens have added
    silent = 0  # tokens in a row that only went on with an unfinished character
    for end in range(1, len(ids) + 1):
        text = decode(ids[start:end])
        hopeless = silent == _MOST_PIECES - 1 or end == len(ids)
        whole = text if hopeless else text.rstrip(_UNFINISHED)
        added = whole[_common(said, whole) :]
        texts.append(added)
        silent = 0 if added or whole == text else silent + 1
        said = said if said.startswith(whole) else whole
        if end - start >= (_CONTEXT if whole == text else _MOST_CONTEXT):
            start = border if border > start else end - 1
            said = decode(ids[start:end])
        if whole == text:
            border = end
    return texts


def _common(one: str, other: str) -> int:
    """Characters at the beginning of both."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))
