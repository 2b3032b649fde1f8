"""Learned scores on the CUDA platform: what is kept is what plain formulas choose from a plain model's keys and values.

`tests/e2e/test_learned.py` has the formulas.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from tests.cuda.engines import engine
from tests.e2e import test_echo
from tests.e2e import test_learned as formulas
from tests.e2e.engines import assert_all_returned, generate, random_prompts, worker_of
from tests.e2e.test_kept_sets import KEEP
from tests.learned_scores import score_of
from tests.reference_model import ReferenceLlama
from vllm_defensive_kernels.learned import Rotation, unrotate

pytestmark = pytest.mark.e2e
PROMPTS = [prompt[:n] for prompt, n in zip(formulas.PROMPTS, (141, 257), strict=False)]


def settings(folder: Path, score: Path) -> dict[str, Any]:
    """With pages of 32 tokens, as the formulas are written for."""
    policies = [*formulas.POLICIES, "echokv", "snapkv"]
    shape = {"dtype": "float32", "block_size": 32, "shared": "evict", "reuse": "off", "policies": policies}
    return {**shape, "audit": str(folder), "learned": str(score)}


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_kept_sets_are_those_of_the_formulas(model: Path, tmp_path: Path, kernels: str) -> None:
    """Of prompts that end there or go on behind a boundary; a second time the prefix cache has them."""
    reference, path = ReferenceLlama(model), tmp_path / "score.safetensors"
    score_of(reference, model, path)
    rest = random_prompts((40,), seed=9)[0]
    rows = [(policy, i, own) for policy in formulas.POLICIES for i in range(len(PROMPTS)) for own in (0, 40)]
    fields = [
        {"kv_eviction": policy, "kv_eviction_keep": KEEP, **({"kv_eviction_boundary": len(PROMPTS[i])} if own else {})}
        for policy, i, own in rows
    ]
    prompts = [PROMPTS[i] + rest[:own] for _, i, own in rows]
    with engine(model, "snapkv", max_num_batched_tokens=64, max_num_seqs=16, **settings(tmp_path, path)) as llm:
        turns = [generate(llm, prompts, 2, extra_args=fields) for _ in range(2)]
        assert_all_returned(llm)
        assert not worker_of(llm)._runtime.windows._buffers
    for turn in turns:
        answers = [(policy, PROMPTS[i], answer) for (policy, i, _), answer in zip(rows, turn, strict=True)]
        formulas.assert_kept(tmp_path, reference, path, answers)
    for (policy, i, _), answer in zip(rows, turns[1], strict=True):
        assert answer.cached_tokens == formulas.most_cached(policy, len(PROMPTS[i]))


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_the_kernels_keep_the_same(model: Path, tmp_path: Path, kernels: str, kernel_calls: dict[str, int]) -> None:
    reference, path = ReferenceLlama(model), tmp_path / "score.safetensors"
    score_of(reference, model, path)
    fields = [{"kv_eviction": policy, "kv_eviction_keep": KEEP} for policy in formulas.POLICIES]
    with engine(model, "snapkv", **settings(tmp_path, path)) as llm:
        kernel_calls.clear()
        answers = generate(llm, PROMPTS[:1] * len(fields), 2, extra_args=fields)
    assert kernel_calls["learned_scores"] == 2 * 2 and kernel_calls["window_scores"] == 1
    each = zip(formulas.POLICIES, PROMPTS[:1] * len(fields), answers, strict=True)
    formulas.assert_kept(tmp_path, reference, path, list(each))


@pytest.mark.parametrize("kernels", ["reference"], indirect=True)
def test_a_second_look_teaches_what_the_cache_holds(model: Path, tmp_path: Path, kernels: str) -> None:
    """The sums are those of a plain model's keys before RoPE, of its values, and of the peaks of its repetition."""
    reference, path = ReferenceLlama(model), tmp_path / "score.safetensors"
    score_of(reference, model, path)
    fields = [{"kv_eviction": "echokv", "kv_eviction_keep": KEEP}]
    with engine(model, "snapkv", **settings(tmp_path, path)) as llm:
        assert llm.collective_rpc("watch_rotation") == [None]
        generate(llm, [PROMPTS[1][:40]], 1)
        assert llm.collective_rpc("start_learning") == [[True, True]]
        generate(llm, PROMPTS[:1], 2, extra_args=fields)
        (found,) = llm.collective_rpc("learned_so_far")
        lessons = worker_of(llm)._evictor.lessons
    assert lessons.tokens == len(PROMPTS[0]) - 4
    assert load(found)["weight_LHX"].shape == (2, 2, 65)
    layers: list[Any] = []
    reference.forward(PROMPTS[0], attention=layers)
    instruction = test_echo.instruction_of(model)
    ((part, text),) = test_echo.repeat(PROMPTS[0], instruction, len(PROMPTS[0]))
    repeated: list[Any] = []
    reference.forward(text, attention=repeated)
    position_T = torch.arange(len(PROMPTS[0]))
    angle = position_T[:, None] / reference._theta ** (torch.arange(0, reference.head_size, 2) / reference.head_size)
    rotation = Rotation(torch.cat([angle.cos(), angle.sin()], dim=1))
    for layer, (plain, again) in enumerate(zip(layers, repeated, strict=True)):
        peak_HT = torch.from_numpy(test_echo.peaks(again, len(PROMPTS[0]), part, chunk=False))
        key_HTD = unrotate(plain.key_HTD, position_T, rotation)
        one_HT1 = torch.ones_like(key_HTD[..., :1])
        target_HT1 = peak_HT.clamp_min(1e-6).log()[..., None]
        row_HTY = torch.cat([key_HTD, plain.value_HTD, one_HT1, target_HT1], dim=-1)[:, 4:].double()
        torch.testing.assert_close(lessons.gram_LHYY[layer], row_HTY.mT @ row_HTY, rtol=1e-4, atol=1e-2)
