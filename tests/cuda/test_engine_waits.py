"""Nothing of ours waits for the device: not a step, not an eviction.

On a GPU torch itself says so. Elsewhere every call that would have to read a value back is refused while our code runs:
that finds the calls, not what torch does inside of others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.overrides import TorchFunctionMode

from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.cuda.test_engine_policies import IN_TORCH
from tests.e2e.engines import generate, random_prompts

pytestmark = pytest.mark.e2e

READS = {
    "__bool__", "__complex__", "__contains__", "__float__", "__index__", "__int__", "allclose", "argwhere", "bincount",
    "cpu", "equal", "is_nonzero", "item", "masked_select", "nonzero", "tolist", "unique", "unique_consecutive",
}  # fmt: skip


class _Refuse(TorchFunctionMode):
    """Raises at calls whose result, or the shape of it, is a value of a tensor."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _reads(getattr(func, "__name__", ""), args, kwargs) and not _interpreting():
            raise AssertionError(f"{func.__name__} waits for the device")
        return func(*args, **kwargs)


def _reads(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if name in ("__getitem__", "__setitem__"):
        index = args[1] if isinstance(args[1], tuple) else (args[1],)
        return any(isinstance(x, torch.Tensor) and x.dtype == torch.bool for x in index)
    if name == "repeat_interleave":
        repeats = next((x for x in (*args[1:], *kwargs.values()) if isinstance(x, torch.Tensor)), None)
        return repeats is not None and kwargs.get("output_size") is None
    if name == "where":
        return len(args) == 1
    return name in READS


def _interpreting() -> bool:
    """Whether Triton's interpreter is at work: it reads everything."""
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.endswith("interpreter.py"):
            return True
    return False


@contextmanager
def no_waiting() -> Iterator[None]:
    if MODE == "gpu":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        with _Refuse():
            yield


def guarded(function: Callable[..., Any], guard: Callable[[], AbstractContextManager[None]]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        with guard():
            return function(*args, **kwargs)

    return call


@pytest.mark.skipif(MODE != "pretend", reason="on a GPU torch says it")
def test_the_guard_sees_what_reads() -> None:
    values = torch.arange(3)
    for reads in (
        values.sum().item,
        values.tolist,
        values.nonzero,
        lambda: values[values > 1],
        lambda: bool(values[0]),
    ):
        with pytest.raises(AssertionError, match="waits for the device"), no_waiting():
            reads()
    with no_waiting():
        values.repeat_interleave(2)
        values[torch.tensor([0, 2])].sum()


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_steps_and_evictions_never_wait(model: Path, kernels: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm_defensive.worker.cuda import backend as cuda_backend
    from vllm_defensive.worker.cuda import launches
    from vllm_defensive.worker.cuda.evictor import CUDAEvictor
    from vllm_defensive.worker.cuda.runtime import CUDARuntime
    from vllm_defensive.worker.window import Capture
    from vllm_defensive_kernels import formulas

    if MODE == "pretend":  # and takes the way of a device, too
        monkeypatch.setattr(formulas, "on_host", lambda tensor: False)
    policies = ("layer-defensivekv", "criticalkv", "pyramidkv", "cake", "lava", "headkv", *IN_TORCH, "kvzip", "echokv")
    extra = [{"kv_eviction": policy, "kv_eviction_boundary": 70} for policy in policies]
    with engine(model, "snapkv", dtype="float32") as llm:
        if MODE == "gpu":  # the first call compiles
            generate(llm, random_prompts([75] * len(policies), seed=1), 3, extra_args=extra)
        for owner, name in (
            (CUDARuntime, "begin"),
            (CUDARuntime, "step"),
            (CUDARuntime, "install"),
            (CUDAEvictor, "run"),
            (CUDAEvictor, "take_report"),
            (Capture, "take"),
            (cuda_backend, "_packed_rows"),
            (cuda_backend, "_rest"),
            (launches, "ragged_paged_decode"),
            (launches, "reconstruct"),
        ):
            monkeypatch.setattr(owner, name, guarded(getattr(owner, name), no_waiting))
        answers = generate(llm, random_prompts([75] * len(policies), seed=2), 3, extra_args=extra)
    assert all(len(answer.tokens) == 3 for answer in answers)
