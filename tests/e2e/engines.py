"""Engines in this process, and the ways in which the tests look into them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import vllm_defensive
from vllm_defensive import audit
from vllm_defensive.audit import Audit

# The lengths of a mixed batch: long and short, whole blocks and not, below the window, over several chunks of 512.
MIXED = (700, 40, 1333, 17, 3000, 96, 640, 5)
# Logits of the tiny model lie within +-16; there the gap between two bf16 numbers is 2^-4.
BF16_STEP = 2**-4


@dataclass
class Answer:
    """tokens: what was generated. logprobs: of those tokens, float64. request_id: names its audit file."""

    tokens: list[int]
    logprobs: Tensor
    request_id: str
    cached_tokens: int


def make_llm(model: Path, policy: str | None = None, *, asynchronous: bool = False, **arguments: Any) -> Any:
    """An `LLM` with 512-token chunks; settings of eviction among the arguments are sorted out."""
    from vllm import LLM
    from vllm.engine.arg_utils import EngineArgs

    from vllm_defensive.settings.engine import FLAGS

    names = (*FLAGS, "auto_widths", "classes")
    settings = {name: arguments.pop(name) for name in names if name in arguments}
    extra = {} if policy is None else vllm_defensive.engine_kwargs(policy, **{"min_tokens": 33, **settings})
    arguments = {
        "block_size": 32,
        "dtype": "bfloat16",
        "enforce_eager": True,
        "max_num_batched_tokens": 512,
        "disable_log_stats": False,
        **extra,
        **arguments,
    }
    with _asynchronous(EngineArgs) if asynchronous else nullcontext():
        return LLM(str(model), **arguments)


@contextmanager
def engine(model: Path, policy: str | None = None, *, may_decline: bool = False, **arguments: Any) -> Iterator[Any]:
    """`make_llm`'s engine, which is gone at the end.

    vLLM keeps its process groups in globals: an engine that is collected later would take those of the next one.
    may_decline: a worker may decline evictions; a test that does not expect it would take a fault for a long answer.
    """
    with quick_start():
        llm = make_llm(model, policy, **arguments)
        in_process = hasattr(llm.llm_engine.engine_core, "engine_core")
        if in_process:
            _cores.add(core_of(llm))
        try:
            yield llm
            if policy is not None and not may_decline and in_process:
                assert scheduler_of(llm).eviction_manager.lifecycle.totals.cancelled == 0, "see the engine's warnings"
        finally:
            llm.llm_engine.engine_core.shutdown()
            del llm
            gc.collect()


_cores = weakref.WeakSet[Any]()


@contextmanager
def quick_start() -> Iterator[None]:
    """An engine that is not its process's first starts in a fifth of the time.

    vLLM collects garbage five times an engine, each time among all that was ever imported. That is frozen here, as long
    as no engine is there, which would stay for good; and what vLLM would freeze and thaw meanwhile is left alone. On
    CPUs it also searches all modules for kernels to replace, which an earlier engine has done.
    """
    from vllm.triton_utils import dispatcher

    gc.collect()
    if not _cores:
        gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "freeze", lambda: None)
        patch.setattr(gc, "unfreeze", lambda: None)
        if dispatcher._registry:
            patch.setattr(dispatcher, "_rebind_kernels", lambda overrides: None)
        yield


@contextmanager
def _asynchronous(engine_args: type) -> Iterator[None]:
    """The CPU platform turns asynchronous scheduling off; turn it on again once the config is made."""
    original = engine_args.create_engine_config

    def create_engine_config(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        config.scheduler_config.async_scheduling = True
        return config

    engine_args.create_engine_config = create_engine_config
    try:
        yield
    finally:
        engine_args.create_engine_config = original


def random_prompts(lengths: Iterable[int], seed: int = 1) -> list[list[int]]:
    """Prompts of the tiny model's ordinary tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, 512, (n,), generator=generator).tolist() for n in lengths]


def generate(
    llm: Any,
    prompts: Sequence[list[int]],
    num_tokens: int = 64,
    extra_args: Sequence[dict[str, Any]] | None = None,
    adapter: Any = None,
    **sampling: Any,
) -> list[Answer]:
    """Greedy answers of exactly `num_tokens` tokens. extra_args: of each request. adapter: a `LoRARequest` for all.
    sampling: more parameters of all."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, logprobs=1, extra_args=extra, **sampling)
        for extra in extra_args or [None] * len(prompts)
    ]
    tokens = [{"prompt_token_ids": p} for p in prompts]
    outputs = llm.generate(tokens, params, use_tqdm=False, lora_request=adapter)
    return [answer_of(output) for output in outputs]


def answer_of(output: Any) -> Answer:
    tokens = list(output.outputs[0].token_ids)
    logprobs = [d[t].logprob for d, t in zip(output.outputs[0].logprobs, tokens, strict=True)]
    return Answer(tokens, torch.tensor(logprobs, dtype=torch.float64), output.request_id, output.num_cached_tokens)


def largest_difference(ours: Sequence[Answer], theirs: Sequence[Answer]) -> float:
    """Of log-probabilities, over all answers, whose tokens must be the same."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.tokens == b.tokens
    return max(float((a.logprobs - b.logprobs).abs().max()) for a, b in zip(ours, theirs, strict=True))


def core_of(llm: Any) -> Any:
    return llm.llm_engine.engine_core.engine_core


def scheduler_of(llm: Any) -> Any:
    return core_of(llm).scheduler


def pool_of(llm: Any) -> Any:
    return scheduler_of(llm).kv_cache_manager.block_pool


def caches_of(llm: Any) -> list[Tensor]:
    """Per layer `[blocks, ...]`."""
    return list(core_of(llm).model_executor.driver_worker.worker.model_runner.kv_caches)


def worker_of(llm: Any) -> Any:
    return core_of(llm).model_executor.driver_worker.worker


def assert_all_returned(llm: Any) -> None:
    pool = pool_of(llm)
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1  # one is vLLM's null block
    assert llm.reset_prefix_cache()


def metrics_of(llm: Any) -> dict[str, float]:
    """Values of counters and gauges, sums of histograms, over their labels."""
    values: dict[str, float] = {}
    for metric in llm.get_metrics():
        value = getattr(metric, "value", getattr(metric, "sum", None))
        if value is not None:
            values[metric.name] = values.get(metric.name, 0) + value
    return values


def audits_of(folder: Path, request_id: str) -> list[Audit]:
    """The audits of all evictions of a request, in their order."""
    names = {p.name.split(".")[0] for p in folder.glob(f"{request_id}-*.safetensors")} or {request_id}
    assert len(names) == 1, f"{request_id}: {[p.name for p in folder.iterdir()]}"
    return audit.events(folder, names.pop())


def audit_of(folder: Path, request_id: str) -> Audit:
    """The audit of a request; the engine appends a suffix to the ids that `LLM` gives out."""
    found = sorted(folder.glob(f"{request_id}-*.safetensors")) or sorted(folder.glob(f"{request_id}.safetensors"))
    assert len(found) == 1, f"{request_id}: {[p.name for p in folder.iterdir()]}"
    return audit.load(found[0])
