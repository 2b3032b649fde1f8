"""Layers may scale their logits each in its own way; the scores of a layer go by its own scale."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.e2e.engines import audit_of, engine, generate, random_prompts, worker_of
from vllm_defensive.worker.softmax import Softmax

pytestmark = [pytest.mark.slow, pytest.mark.e2e]


@pytest.mark.parametrize("policy", ["halokv", "h2o"])
def test_a_layers_own_scale_decides_what_it_keeps(tiny_model: Path, policy: str, tmp_path: Path) -> None:
    """Only the layer whose scale changes keeps other tokens, where layers do not compete; halokv's do."""
    prompts = random_prompts([500], seed=5)
    kept = []
    with engine(tiny_model, policy, dtype="float32", keep=0.2, audit=str(tmp_path), enable_prefix_caching=False) as llm:
        evictor = worker_of(llm)._evictor
        own = list(evictor._softmax_A)
        for changed in (own, [own[0], Softmax(40 * own[1].scale), own[2]]):
            evictor._softmax_A = evictor._runtime.accumulations._softmax_A = changed
            (answer,) = generate(llm, prompts, 2)
            kept.append(audit_of(tmp_path, answer.request_id).mask())
    differs = [not torch.equal(a, b) for a, b in zip(*kept, strict=True)]
    assert differs[1] and (policy == "halokv" or differs == [False, True, False])
