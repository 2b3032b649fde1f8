"""The masked transformer is transformers' model with transformers' own attention, and its mask means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests import tiny_model
from tests.masked_transformer import MaskedTransformer

TOKENS = torch.randint(2, 512, (300,), generator=torch.Generator().manual_seed(0)).tolist()
GLOBAL_LAYERS, HEADS, KEPT = 2, 2, 200


@pytest.fixture(scope="module")
def reference(tiny_gemma3: Path) -> MaskedTransformer:
    return MaskedTransformer(tiny_gemma3)


@pytest.fixture(params=["gemma3", "gemma2", "gpt_oss", "granite_swa", "gemma4_e"])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    return getattr(tiny_model, f"write_tiny_{request.param}")(tmp_path / request.param)


def test_it_computes_what_transformers_computes(folder: Path) -> None:
    """Longer than the sliding window, so that a window off by one token would be seen."""
    from transformers import AutoModelForCausalLM

    model, reference = (
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager"),
        MaskedTransformer(folder),
    )
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(dim=-1)
    # twice what was seen: float32 roundings (6e-8) of logits up to 16, through seven layers
    torch.testing.assert_close(reference.logprobs(TOKENS), expected, rtol=0, atol=7e-4)
    torch.testing.assert_close(reference.logprobs(TOKENS, last=7), expected[-7:], rtol=0, atol=7e-4)


def test_keeping_all_is_full_attention(reference: MaskedTransformer) -> None:
    kept = torch.ones(GLOBAL_LAYERS, HEADS, KEPT, dtype=torch.bool)
    assert torch.equal(reference.logprobs(TOKENS, kept), reference.logprobs(TOKENS))


@pytest.mark.parametrize("layer, head, position", [(0, 0, 0), (0, 1, 70), (1, 1, 199)])
def test_one_evicted_entry_changes_later_tokens_only(
    reference: MaskedTransformer, layer: int, head: int, position: int
) -> None:
    kept = torch.ones(GLOBAL_LAYERS, HEADS, KEPT, dtype=torch.bool)
    kept[layer, head, position] = False
    changed = (reference.logprobs(TOKENS, kept) - reference.logprobs(TOKENS)).abs().amax(dim=1)
    assert (changed[:KEPT] == 0).all() and (changed[KEPT:] > 0).all()
