"""The page in a browser: its script runs, whatever the prompt, and shows each token and each layer's budget."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from benchmarks.picture import browser, chromium
from vllm_defensive.audit import Audit
from vllm_defensive.tools.audit_html import render

pytestmark = pytest.mark.skipif(browser() is None, reason="no Chromium in PATH")

# What a prompt may hold: markup that would end or hide the script, a cut character, lines, quotes, another script.
TOKENS = [
    "</script><script>alert(1)</script>",
    "<!--",
    "<script>",
    "",
    "港",
    "\n",
    " \"quoted\" & 'so'",
    "\u2028",
    "end",
]


class Page(HTMLParser):
    """The token spans and their texts, and the texts of the layers' budgets."""

    def __init__(self, dom: str) -> None:
        super().__init__()
        self.tokens: list[str] = []
        self.shades: list[float] = []
        self.windows: list[bool] = []
        self.budgets: list[str] = []
        self.cells = 0
        self._inside: list[str] = []
        self._into: list[str] | None = None
        self.feed(dom)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if tag == "div":
            self._inside.append(given.get("id", ""))
        if tag == "span" and self._inside == ["", "text"][-len(self._inside) :]:
            shade = re.search(r"rgba\(var\(--heat\), ([\d.]+)\)", given["style"])
            assert shade
            self.shades.append(float(shade[1]))
            self.windows.append(given["class"] == "window")
            self.tokens.append("")
            self._into = self.tokens
        elif tag == "span" and given.get("class") == "budget":
            self.budgets.append("")
            self._into = self.budgets
        self.cells += tag == "i" and "rgba" in given.get("style", "")

    def handle_endtag(self, tag: str) -> None:
        if tag == "div":
            self._inside.pop()
        if tag == "span":
            self._into = None

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data


def test_every_token_and_budget_is_shown(tmp_path: Path) -> None:
    """Two layers of two heads; the first layer's keep all of nine tokens, the second's the last three and the first."""
    kept = [list(range(9)), list(range(9)), [6, 7, 8], [0, 6, 7, 8]]
    audit = Audit(
        kept_counts=torch.tensor([len(k) for k in kept], dtype=torch.int32).view(2, 2),
        kept_indices=torch.tensor([t for k in kept for t in k], dtype=torch.int32),
        token_ids=torch.arange(9, dtype=torch.int32),
        policy="adakv",
        keep_ratio=0.5,
        stop=9,
        block_size=2,
        packed_blocks=2,
        shared_blocks=0,
        window=3,
    )
    file = tmp_path / "page.html"
    file.write_text(render(audit, TOKENS), encoding="utf-8")
    page = Page(chromium(file, "--dump-dom"))
    assert page.tokens == TOKENS
    assert page.shades == [0.75] + [0.5] * 5 + [1] * 3
    assert page.windows == [False] * 6 + [True] * 3
    assert page.budgets == ["9, 100 %", "4, 39 %"] and page.cells == 4
