"""The reference model is transformers' model, and its mask means what it says."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference_model import ReferenceLlama

TOKENS = torch.randint(2, 512, (77,), generator=torch.Generator().manual_seed(0)).tolist()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> ReferenceLlama:
    return ReferenceLlama(tiny_model)


def test_it_computes_what_transformers_computes(tiny_model: Path, reference: ReferenceLlama) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    with torch.inference_mode():
        expected = model(torch.tensor([TOKENS])).logits[0].log_softmax(dim=-1)
    # float32 roundings (6e-8) of logits up to 16, through three layers
    torch.testing.assert_close(reference.forward(TOKENS), expected, rtol=0, atol=1e-4)


def test_keeping_all_is_full_attention(reference: ReferenceLlama) -> None:
    kept = torch.ones(reference.layers, reference.heads, 50, dtype=torch.bool)
    assert torch.equal(reference.forward(TOKENS, kept), reference.forward(TOKENS))


@pytest.mark.parametrize("layer, head, position", [(0, 0, 0), (1, 1, 20), (2, 0, 49)])
def test_one_evicted_entry_changes_later_tokens_only(
    reference: ReferenceLlama, layer: int, head: int, position: int
) -> None:
    kept = torch.ones(reference.layers, reference.heads, 50, dtype=torch.bool)
    kept[layer, head, position] = False
    changed = (reference.forward(TOKENS, kept) - reference.forward(TOKENS)).abs().amax(dim=1)
    assert (changed[:50] == 0).all() and (changed[50:] > 0).all()


def test_without_its_keys_a_token_is_as_good_as_absent(reference: ReferenceLlama) -> None:
    """Evicting all entries of a prompt leaves later tokens nothing of it but their positions."""
    kept = torch.zeros(reference.layers, reference.heads, 50, dtype=torch.bool)
    other = [7] * 50 + TOKENS[50:]
    torch.testing.assert_close(reference.forward(TOKENS, kept)[50:], reference.forward(other, kept)[50:])
