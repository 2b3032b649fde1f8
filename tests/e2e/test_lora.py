"""Adapters (LoRA): a request with one keeps what the merged model keeps, and answers as that would."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.e2e.engines import assert_all_returned, audit_of, engine, generate, make_params, random_prompts
from tests.reference_model import ReferenceLlama, decode_logprobs

pytestmark = pytest.mark.e2e

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
