"""A policy that fails on one prompt costs that request the saving, and its tenants nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from tests.e2e.engines import assert_all_returned, engine, generate, largest_difference, random_prompts, scheduler_of
from vllm_defensive.policy import Policy, presets

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

SHORT, LONG = 200, 300


def last_ones(*, query_WQD: Tensor, key_HSD: Tensor, **_: Any) -> Tensor:
    """The latest tokens; of a long prompt it makes a mistake."""
    if key_HSD.shape[1] == LONG:
        raise ZeroDivisionError("a mistake of another package")
    scored = key_HSD.shape[1] - query_WQD.shape[0]
    return key_HSD.new_ones(key_HSD.shape[0], scored).float().cumsum(dim=1)


@pytest.mark.parametrize("scope", ["layer", "model"])
def test_the_others_are_evicted_and_it_answers_as_without_eviction(
    tiny_model: Path, scope: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its layers are scored as they are packed, or all before."""
    name = f"mistaken-{scope}"
    policy = Policy(name=name, summary="", source="", aggregate="custom", scope=scope, score=last_ones)  # type: ignore[arg-type]
    monkeypatch.setitem(presets._TABLE, name, policy)
    prompts = random_prompts([SHORT, LONG, SHORT], seed=3)
    with engine(tiny_model, dtype="float32") as llm:
        (whole,) = generate(llm, [prompts[1]])
    with engine(tiny_model, name, dtype="float32", keep=0.2, may_decline=True) as llm:
        answers = generate(llm, prompts)
        totals = scheduler_of(llm).eviction_manager.lifecycle.totals
        assert (totals.requests, totals.cancelled) == (2, 1)
        assert_all_returned(llm)
        told = {metric.name: metric.value for metric in llm.get_metrics() if metric.name.endswith("cancelled")}
        assert told == {"vllm:kv_eviction_cancelled": 1}
    assert largest_difference([answers[1]], [whole]) < 1e-5  # two batches of float32 products
