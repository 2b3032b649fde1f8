"""A real hybrid: Gemma 3 270M, evicted in its three global layers, against transformers' model that masks the same.

Not in CI, which would have to download and convert the model. `GEMMA3_RESULT=FILE` runs it, and writes what it saw:

    GEMMA3_RESULT=benchmarks/results/gemma3.json python -m pytest tests/e2e/test_gemma3.py
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.engines import Answer, assert_all_returned, audit_of, engine, generate
from tests.masked_transformer import MaskedTransformer

RESULT = os.environ.get("GEMMA3_RESULT")
MODEL, KEEP, ANSWER_TOKENS = "gemma-3-270m", 0.2, 32
POLICIES = ("none", "snapkv", "layer-defensivekv")
FACT = "Marta keeps the keys of the harbour office in the blue tin under the stairs."

pytestmark = [
    pytest.mark.slow,
    pytest.mark.e2e,
    pytest.mark.skipif(RESULT is None, reason="GEMMA3_RESULT=FILE runs it: the model is a download of 238 MB"),
    pytest.mark.timeout(1800),
]


def ask(folder: Path) -> list[int]:
    """A prompt of about 1,000 tokens, twice the sliding window, that asks for what stands in its first third."""
    from transformers import AutoTokenizer

    filler = [f"On page {i} the clerk wrote that the {i % 7}th crate of oranges was counted twice." for i in range(48)]
    text = " ".join([*filler[:15], FACT, *filler[15:], "Question: who keeps the keys, and where? Answer:"])
    return AutoTokenizer.from_pretrained(folder)(text).input_ids


def test_answers_equal_the_masked_transformers_model(tmp_path: Path) -> None:
    from benchmarks.models import ensure_model

    folder = ensure_model(MODEL)
    prompt = ask(folder)
    assert 900 < len(prompt) < 1200
    settings = {"keep": KEEP, "per_request": True, "audit": str(tmp_path)}
    with engine(folder, "none", dtype="float32", max_model_len=2048, **settings) as llm:
        # One after the other: beside a request that keeps the text whole, the others would leave it in place.
        answers = {policy: generate(llm, [prompt], ANSWER_TOKENS, [{"kv_eviction": policy}])[0] for policy in POLICIES}
        assert_all_returned(llm)
    reference = MaskedTransformer(folder)
    rows = [row_of(reference, tmp_path, prompt, policy, answer) for policy, answer in answers.items()]
    settings = {"model": MODEL, "dtype": "float32", "prompt_tokens": len(prompt), "answer_tokens": ANSWER_TOKENS}
    assert RESULT is not None
    Path(RESULT).write_text(json.dumps({"settings": {**settings, "keep": KEEP}, "rows": rows}, indent=1) + "\n")
    noise = rows[0]["error_against_masked"]
    for row in rows[1:]:
        print(row)
        assert row["kept_share_of_global_layers"] < KEEP + 0.05
        assert row["error_against_masked"] <= 4 * noise  # both are noise of float32; maxima of few samples vary
        assert row["difference_from_full"] > 100 * row["error_against_masked"], "else the comparison could not fail"


def row_of(
    reference: MaskedTransformer, folder: Path, prompt: list[int], policy: str, answer: Answer
) -> dict[str, Any]:
    """Largest differences of the answer's log-probabilities from the model that masks what was evicted, and from one
    that masks nothing."""
    kept = None if policy == "none" else audit_of(folder, answer.request_id).mask()
    masked, full = (reference.answer_logprobs(prompt, answer.tokens, mask) for mask in (kept, None))
    return {
        "policy": policy,
        "kept_share_of_global_layers": 1.0 if kept is None else float(f"{kept.float().mean():.3f}"),
        "error_against_masked": float(f"{(answer.logprobs - masked).abs().max():.1e}"),
        "difference_from_full": float(f"{(answer.logprobs - full).abs().max():.1e}"),
    }
