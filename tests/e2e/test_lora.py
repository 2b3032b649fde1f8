"""Adapters (LoRA): a request with one keeps what the merged model keeps, and answers as that would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, random_prompts, worker_of
from tests.reference_model import ReferenceLlama, decode_logprobs
from vllm_defensive.worker.projections import Projections

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

PROMPTS = random_prompts((700, 601, 400), seed=7)
# The output projection has no adapter here: values are weighed by the base layer's, so that what is kept is the same.
TARGETS = ("q_proj", "k_proj", "v_proj")
RANK, ALPHA = 4, 8
FLOAT_NOISE = 5e-4  # float32 roundings of logits up to 16, of adapted and of merged weights


def write_adapter(model: Path, adapter: Path, merged: Path) -> None:
    """Write a random adapter in PEFT's format to `adapter`, and to `merged` the model whose weights it has changed."""
    shutil.copytree(model, merged)
    weights: dict[str, Tensor] = load_file(model / "model.safetensors")
    generator = torch.Generator().manual_seed(0)
    parts: dict[str, Tensor] = {}
    for name, weight in weights.items():
        if not any(f".{target}." in name for target in TARGETS):
            continue
        wide, narrow = weight.shape
        down = torch.randn(RANK, narrow, generator=generator) / narrow**0.5
        up = torch.randn(wide, RANK, generator=generator) / RANK**0.5
        stem = f"base_model.model.{name.removesuffix('.weight')}"
        parts |= {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up}
        weights[name] = weight.float() + ALPHA / RANK * up @ down
    save_file({name: weight.float() for name, weight in weights.items()}, merged / "model.safetensors")
    adapter.mkdir()
    save_file(parts, adapter / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": list(TARGETS), "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def test_a_request_with_an_adapter_keeps_and_answers_as_the_merged_model(tiny_model: Path, tmp_path: Path) -> None:
    from vllm.lora.request import LoRARequest

    write_adapter(tiny_model, tmp_path / "adapter", tmp_path / "merged")
    settings = {"keep": 0.3, "dtype": "float32"}
    here, there = tmp_path / "here", tmp_path / "there"
    with engine(tmp_path / "merged", "layer-defensivekv", audit=str(there), **settings) as llm:
        merged = generate(llm, PROMPTS, 24)
    lora = {"enable_lora": True, "max_lora_rank": 8}
    with engine(tiny_model, "layer-defensivekv", audit=str(here), **lora, **settings) as llm:
        plain = generate(llm, PROMPTS, 24)
        adapted = generate(llm, PROMPTS, 24, adapter=LoRARequest("adapter", 1, str(tmp_path / "adapter")))
        assert all(answer.cached_tokens == 0 for answer in adapted), "another adapter's cache is not this one's"
        assert_all_returned(llm)
        model, base = worker_of(llm).model_runner.model, ReferenceLlama(tiny_model)
        for layer in range(base.layers):
            name = f"model.layers.{layer}.self_attn.attn"
            found = Projections(model, [name], base.query_heads, base.head_size).slices(0)
            torch.testing.assert_close(found, base.output_projection(layer))
    reference, differs = ReferenceLlama(tmp_path / "merged"), 0.0
    for prompt, ours, theirs, unchanged in zip(PROMPTS, adapted, merged, plain, strict=True):
        mask = audit_of(here, ours.request_id).mask()
        # Scores differ by float noise only, which can swap tokens (and so pages) at the border.
        assert float((mask != audit_of(there, theirs.request_id).mask()).float().mean()) <= 0.01
        expected = decode_logprobs(reference, prompt, ours.tokens, mask)
        assert float((ours.logprobs - expected).abs().max()) <= FLOAT_NOISE
        differs = max(differs, float((mask != audit_of(here, unchanged.request_id).mask()).float().mean()))
    assert differs > 0.05  # else the adapter changes nothing that could be compared
