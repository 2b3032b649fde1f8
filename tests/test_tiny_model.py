"""The random model does what other tests rely on."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.tiny_model import tiny_tokenizer, write_tiny_llama


def test_equal_arguments_give_equal_weights(tiny_model: Path, tmp_path: Path) -> None:
    reference = load_file(tiny_model / "model.safetensors")
    again = load_file(write_tiny_llama(tmp_path / "again") / "model.safetensors")
    other = load_file(write_tiny_llama(tmp_path / "other", seed=1) / "model.safetensors")
    assert all(torch.equal(again[name], weight) for name, weight in reference.items())
    assert not torch.equal(other["lm_head.weight"], reference["lm_head.weight"])


def test_every_token_and_any_text_survive_the_tokenizer(tiny_model: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert len(tokenizer) == 512
    assert len(set(tokenizer.convert_ids_to_tokens(list(range(512))))) == 512
    text = "the  QUICK brown\nfox, 12 naïve 東京 🦙"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) < len(text.encode()), "letter pairs are not merged"


def test_attention_is_peaked_and_the_greedy_choice_is_clear(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    prompt = torch.randint(512, (1, 300), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(prompt, output_attentions=True)
    last_LHT = torch.stack(output.attentions)[:, 0, :, -1]
    assert last_LHT.amax(dim=-1).mean() > 10 / prompt.shape[1], "attention is close to uniform"
    best, second = output.logits[0].topk(2).values.unbind(-1)
    assert (best - second).mean() > 0.5  # eight bf16 steps of a logit in [8, 16)


@pytest.mark.parametrize("vocab_size", [257, 935])
def test_vocabulary_that_the_tokenizer_cannot_fill_is_refused(vocab_size: int) -> None:
    with pytest.raises(ValueError, match=f"vocab_size={vocab_size}: choose a value in"):
        tiny_tokenizer(vocab_size)


@pytest.mark.parametrize("vocab_size", [258, 934])
def test_tokenizer_has_exactly_the_tokens_asked_for(vocab_size: int) -> None:
    assert len(tiny_tokenizer(vocab_size)) == vocab_size
