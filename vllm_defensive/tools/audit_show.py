"""`python -m vllm_defensive.audit show FILE`: facts of an eviction, and a picture of it."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from safetensors import SafetensorError

from vllm_defensive.audit import load
from vllm_defensive.tools.audit_html import render


def main(arguments: list[str] | None = None) -> int:
    """`python -m vllm_defensive.audit show FILE`: facts of an eviction, and with `--html OUT` a picture of it."""
    parser = argparse.ArgumentParser(prog="python -m vllm_defensive.audit", description=main.__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    show = commands.add_parser("show", help="print what was kept, and draw it over the text")
    show.add_argument("file", help="an audit file")
    show.add_argument("--html", metavar="OUT", help="write the picture to this file")
    show.add_argument("--tokenizer", metavar="DIR", help="the model; without it tokens are shown as ids")
    given = parser.parse_args(arguments)
    try:
        audit = load(given.file)
    except (OSError, ValueError, SafetensorError) as error:
        parser.exit(2, f"{parser.prog}: error: {_reason(given.file, error)}\n")
    counts = audit.kept_counts.float()
    print(
        f"{audit.policy}, keep {audit.keep_ratio:g}: {audit.stop} tokens, mean kept {counts.mean():.0f} "
        f"({100 * counts.mean() / audit.stop:.1f} %), per head {int(counts.min())} to {int(counts.max())}"
    )
    if audit.kept_classes is not None:
        counted = torch.bincount(audit.kept_classes.long(), minlength=len(audit.page_classes)).tolist()
        shares = zip(audit.page_classes, counted, strict=True)
        told = ", ".join(f"{100 * n / sum(counted):.0f} % in {name}" for name, n in shares if n)
        share = 100 * audit.held_tokens / audit.stop
        print(
            f"widths {audit.widths}: held in the memory of {audit.held_tokens} tokens ({share:.1f} %), "
            f"of what was kept {told}"
        )
    if given.html:
        try:
            texts = _texts(audit.token_ids.tolist(), given.tokenizer)
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: error: --tokenizer {_reason(given.tokenizer, error)}\n")
        try:
            Path(given.html).write_text(render(audit, texts), encoding="utf-8")
        except OSError as error:
            parser.exit(2, f"{parser.prog}: error: --html {_reason(given.html, error)}\n")
        print(f"picture: {given.html}")
    return 0


def _reason(path: str, error: Exception) -> str:
    """One line that names the path."""
    line = getattr(error, "strerror", None) or (str(error).splitlines() or [type(error).__name__])[0]
    return line if line.startswith(path) or line.endswith(path) else f"{path}: {line}"


def _texts(token_ids: list[int], tokenizer: str | None) -> list[str]:
    """Raises OSError or ValueError if there is no such tokenizer."""
    if tokenizer is None:
        return [f"{token} " for token in token_ids]
    from transformers import AutoTokenizer

    from vllm_defensive.tools.audit_text import token_texts

    loaded = AutoTokenizer.from_pretrained(tokenizer)
    return token_texts(token_ids, lambda ids: loaded.decode(ids, clean_up_tokenization_spaces=False))
