"""Keys in an engine's cache, un-rotated, are those that its model's projections gave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.e2e.engines import engine, random_prompts, scheduler_of, worker_of
from tests.tiny_model import write_tiny_cohere2, write_tiny_gemma3
from vllm_defensive.limits import evictable_group
from vllm_defensive.worker.rotation import RotaryWatch, Rotations
from vllm_defensive_kernels.learned import unrotate

pytestmark = [pytest.mark.slow, pytest.mark.e2e]

T = 300


def remember_keys(attention: Any, keys: dict[Any, Tensor]) -> None:
    """Have `keys[attention]` be what was last known of its keys before RoPE, `[T, H, D]`."""
    shape = (-1, attention.num_kv_heads, attention.head_dim)

    def projected(_: Any, given: Any, output: Any) -> None:
        sizes = [attention.q_size, attention.kv_size, attention.kv_size]
        keys[attention] = output[0].split(sizes, dim=-1)[1].clone().view(shape)

    def normed(_: Any, given: Any, output: Any) -> None:
        keys[attention] = output.clone().view(shape)

    attention.qkv_proj.register_forward_hook(projected)
    if hasattr(attention, "k_norm"):
        attention.k_norm.register_forward_hook(normed)


@pytest.mark.parametrize(
    "write, turned",
    [(write_tiny_gemma3, [True, True]), (write_tiny_cohere2, [False, False])],
    ids=["gemma3", "cohere2"],
)
def test_keys_of_the_cache_are_those_before_rope(
    write: Callable[[Path], Path], turned: list[bool], tmp_path: Path
) -> None:
    """The global layers of Cohere 2 have the rotary module that those with a sliding window use, and do not use it."""
    from vllm import SamplingParams

    with engine(write(tmp_path / "model"), "keep-all", min_tokens=1000) as llm:
        scheduler, worker = scheduler_of(llm), worker_of(llm)
        groups = scheduler.kv_cache_config.kv_cache_groups
        group = evictable_group(groups)
        names, size = groups[group].layer_names, groups[group].kv_cache_spec.head_size
        model = worker.model_runner.get_model()
        attentions = [model.get_submodule(name.rpartition(".")[0]) for name in names]
        expected: dict[Any, Tensor] = {}
        for attention in attentions:
            remember_keys(attention, expected)
        with RotaryWatch(model, names) as watch:
            prompt = {"prompt_token_ids": random_prompts([T])[0]}
            llm.llm_engine.add_request("one", prompt, SamplingParams(max_tokens=2, ignore_eos=True))
            llm.llm_engine.step()
        assert watch.turned() == turned
        rotations = Rotations(model, names, size, watch.turned())

        (request,) = scheduler.running
        blocks = torch.tensor(scheduler.kv_cache_manager.get_block_ids(request.request_id)[group])
        evictor, position_T = worker._evictor, torch.arange(T)
        for layer, pages_HB in enumerate(evictor._view.of_blocks(blocks)):
            key_XND = evictor._codec.read_keys(evictor._view.data, pages_HB.flatten())
            key_HTD = key_XND.view(len(pages_HB), -1, size)[:, :T]
            before_HTD = expected[attentions[layer]].transpose(0, 1).float()
            if not turned[layer]:
                assert rotations.of(layer) is None
                assert torch.equal(key_HTD.float(), before_HTD)
                continue
            assert (key_HTD.float() - before_HTD).abs().max() > 1
            back_HTD = unrotate(key_HTD, position_T, rotations.of(layer))
            assert (back_HTD - before_HTD).abs().max() < 4 * torch.finfo(torch.bfloat16).eps * before_HTD.abs().max()
