"""The picture of an eviction holds what the audit says, and nothing that a prompt could smuggle in."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vllm_defensive.audit import Audit
from vllm_defensive.tools.audit_html import render


def make_audit(heads: int, stop: int = 6) -> Audit:
    """One layer; head h keeps the tokens whose position is at least h."""
    kept = [list(range(min(h, stop - 1), stop)) for h in range(heads)]
    return Audit(
        kept_counts=torch.tensor([[len(k) for k in kept]], dtype=torch.int32),
        kept_indices=torch.tensor([t for k in kept for t in k], dtype=torch.int32),
        token_ids=torch.arange(stop, dtype=torch.int32),
        policy="adakv",
        keep_ratio=0.5,
        stop=stop,
        block_size=2,
        packed_blocks=2,
        shared_blocks=0,
        window=2,
    )


def data_of(page: str) -> dict:
    found = re.search(r"^const data = (.*);$", page, flags=re.MULTILINE)
    assert found
    return json.loads(found[1])


def test_page_holds_tokens_counts_and_shares() -> None:
    data = data_of(render(make_audit(3), list("abcdef")))
    assert data["tokens"] == list("abcdef")
    assert data["counts"] == [[6, 5, 4]]
    assert (data["kept"], data["levels"], data["window"]) == (["123333"], 3, 2)


def test_more_heads_than_digits_are_rounded_to_shares() -> None:
    data = data_of(render(make_audit(70), list("abcdef")))
    assert data["levels"] == 35
    # Token t is kept by heads 0 ... t, and the last token by all.
    assert data["kept"] == ["".join("0123456789"[(t + 1) * 35 // 70] for t in range(5)) + "z"]


def test_page_holds_the_budget_of_each_layer() -> None:
    page = render(make_audit(3), list("abcdef"))
    data = data_of(page)
    assert (data["layers"], data["mean"], data["most"]) == ([5.0], 5.0, 6)
    assert "kept 5 each on average, 83.3 % (asked for: 50 %), at least 4 and at most 6" in page


@pytest.mark.parametrize("evil", ["</script><script>alert(1)</script>", "<!--<script>", "<!-- <SCRIPT >x"])
def test_a_prompt_cannot_end_the_script_nor_hide_its_end(evil: str) -> None:
    page = render(make_audit(1, 2), [evil, "x"])
    assert data_of(page)["tokens"][0] == evil
    script = page.partition("<script>")[2]
    assert script.count("<script") == 0 and script.count("</script>") == 1 and "<!--" not in script


def test_token_texts_must_match_the_prompt() -> None:
    with pytest.raises(ValueError, match="3 token texts for an audit of 6 tokens"):
        render(make_audit(1), ["a", "b", "c"])


@pytest.mark.slow
def test_command_prints_draws_and_refuses_in_one_line(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "vllm_defensive.audit", "show", *arguments]
        return subprocess.run(command, capture_output=True, text=True)

    audit = make_audit(2)
    names = ("policy", "keep_ratio", "stop", "block_size", "packed_blocks", "shared_blocks", "window")
    tensors = {name: getattr(audit, name) for name in ("kept_counts", "kept_indices", "token_ids")}
    metadata = {"format_version": "2", **{name: str(getattr(audit, name)) for name in names}}
    save_file(tensors, tmp_path / "a.safetensors", metadata=metadata)
    done = run(str(tmp_path / "a.safetensors"), "--html", str(tmp_path / "a.html"))
    assert done.returncode == 0 and "6 tokens, mean kept 6 (91.7 %), per head 5 to 6" in done.stdout
    assert data_of((tmp_path / "a.html").read_text())["tokens"][1] == "1 "

    (tmp_path / "bad.safetensors").write_bytes(b"nonsense")
    for name in ("missing.safetensors", "bad.safetensors"):
        done = run(str(tmp_path / name))
        assert done.returncode == 2 and len(done.stderr.splitlines()) == 1

    done = run(str(tmp_path / "a.safetensors"), "--html", str(tmp_path / "b.html"), "--tokenizer", str(tmp_path / "no"))
    assert done.returncode == 2 and f"error: --tokenizer {tmp_path / 'no'}: " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and not (tmp_path / "b.html").exists()
