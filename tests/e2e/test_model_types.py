"""Models that differ from Llama inside attention: biases (Qwen2), norms of queries and keys (Qwen3)."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, random_prompts
from tests.reference_model import ReferenceLlama, decode_logprobs
from tests.tiny_model import random_weights, tiny_tokenizer
from vllm_defensive.worker import projections

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

FLOAT_NOISE = 3e-4  # a few hundred float32 roundings of logits up to 16


def write_tiny_qwen(folder: Path, kind: str) -> Path:
    from transformers import GenerationConfig, Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

    tokenizer = tiny_tokenizer(512)
    special_ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config_cls, model_cls, own = {
        "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
        "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 32}),
    }[kind]
    config: Any = config_cls(
        num_hidden_layers=2,
        hidden_size=128,
        intermediate_size=256,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=512,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        **own,
        **special_ids,
    )
    model: Any = model_cls(config)
    random_weights(model, 0)
    with torch.no_grad():  # a bias of zeros, or a norm that scales by one, could be left out unseen
        generator = torch.Generator().manual_seed(1)
        for name, weight in model.named_parameters():
            if name.endswith("bias") or "_norm.weight" in name:
                weight += 0.3 * torch.randn(weight.shape, generator=generator)
    model.generation_config = GenerationConfig(do_sample=False, **special_ids)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_answers_equal_the_masked_reference(tmp_path: Path, kind: str) -> None:
    model = write_tiny_qwen(tmp_path / kind, kind)
    reference = ReferenceLlama(model)
    inside = {"qwen2": "q_proj.bias", "qwen3": "q_norm.weight"}[kind]
    assert any(name.endswith(inside) for name in reference._weights)
    prompts = random_prompts((300, 601), seed=6)
    audits = tmp_path / "audits"
    with engine(model, "layer-defensivekv", keep=0.3, dtype="float32", audit=str(audits)) as llm:
        answers = generate(llm, prompts, 12)
        assert_all_returned(llm)
    for prompt, answer in zip(prompts, answers, strict=True):
        kept = audit_of(audits, answer.request_id).mask()
        expected = decode_logprobs(reference, prompt, answer.tokens, kept)
        assert float((answer.logprobs - expected).abs().max()) <= FLOAT_NOISE
        full = decode_logprobs(reference, prompt, answer.tokens, None)
        assert float((expected - full).abs().max()) > 0.05, "else the comparison could not fail"


def test_an_unknown_output_projection_costs_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    warnings: list[str] = []
    said: set[str] = set()

    def warning_once(text: str) -> None:
        if text not in said:
            said.add(text)
            warnings.append(text)

    monkeypatch.setattr(projections, "logger", SimpleNamespace(warning_once=warning_once))
    model = torch.nn.ModuleDict({str(i): torch.nn.ModuleDict({"unusual": torch.nn.Linear(8, 8)}) for i in range(3)})
    found = projections.Projections(model, [f"{i}.attn" for i in range(3)], 2, 4)
    assert [found.slices(i) for i in range(3)] == [None] * 3
    assert [found.factor(i) for i in range(3)] == [None] * 3
    assert len(warnings) == 1 and "go without value norms" in warnings[0]
