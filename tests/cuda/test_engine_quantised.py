"""Weights that are no matrices: their output projections are made one at a time, and all that eviction allocates, while
it weighs a prompt and after, is set aside."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.cuda.conftest import MODE
from tests.cuda.engines import engine
from tests.e2e.engines import audit_of, generate, random_prompts, worker_of
from vllm_defensive.policy import PRESETS
from vllm_defensive.worker.cuda.evictor import CUDAEvictor
from vllm_defensive.worker.projections import Projections

pytestmark = pytest.mark.e2e
POLICIES = ("criticalkv", "layer-defensivekv", "halokv", "snapkv")


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors that were made while it is on: `now` of those still there, and the `peak` of that."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self._note(args, 0)
        made = func(*args, **(kwargs or {}))
        self._note(made, 1)
        return made

    def _note(self, values: Any, counts: int) -> None:
        for tensor in tree_leaves(values):
            if not isinstance(tensor, Tensor) or (key := (storage := tensor.untyped_storage())._cdata) in self._known:
                continue
            self._known.add(key)
            self._add(counts * storage.nbytes())
            weakref.finalize(storage, self._gone, key, counts * storage.nbytes())

    def _add(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def test_live_bytes_are_those_of_tensors() -> None:
    there = torch.zeros(1000)
    with LiveBytes() as live:
        kept = there[:10] + 1
        big = torch.zeros(500, dtype=torch.float64)
        view = big.view(5, 100)
        del big
        assert live.now == 40 + 4000
        del view
        assert (live.now, live.peak) == (40, 4040)
        del kept
    assert live.now == 0


@contextmanager
def measured(monkeypatch: pytest.MonkeyPatch) -> Iterator[LiveBytes]:
    """Evictions while it is open are measured."""
    live, run = LiveBytes(), CUDAEvictor.run

    def measured_run(self: Any, *args: Any) -> None:
        with live:
            run(self, *args)

    with monkeypatch.context() as patches:
        patches.setattr(CUDAEvictor, "run", measured_run)
        yield live


@pytest.fixture(scope="module")
def int8() -> str:
    """The name of a quantisation, by vLLM's own register, that keeps linear layers' weights as int8 only."""
    from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

    class Int8Method(UnquantizedLinearMethod):
        def process_weights_after_loading(self, layer: Any) -> None:
            weight_MX = layer.weight.detach().float()
            layer.scale_M1 = weight_MX.abs().amax(dim=1, keepdim=True) / 127
            layer.int8_MX = (weight_MX / layer.scale_M1).round().to(torch.int8)
            del layer.weight

        def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
            weight_MX = (layer.int8_MX.float() * layer.scale_M1).to(x.dtype)
            return torch.nn.functional.linear(x, weight_MX, bias)

    @register_quantization_config("tiny-int8")
    class Int8Config(QuantizationConfig):
        get_name = classmethod(lambda cls: "tiny-int8")
        get_supported_act_dtypes = classmethod(lambda cls: [torch.float32, torch.bfloat16])
        get_min_capability = classmethod(lambda cls: 80)
        get_config_filenames = staticmethod(lambda: [])
        from_config = classmethod(lambda cls, config: cls())

        def get_quant_method(self, layer: Any, prefix: str) -> Any:
            return Int8Method() if isinstance(layer, LinearBase) else None

    return "tiny-int8"


@pytest.mark.nightly
@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_one_projection_at_a_time_and_all_memory_set_aside(
    model: Path, int8: str, tmp_path: Path, kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is what it would be with every layer's projection at hand."""
    arguments = {"dtype": "float32", "max_model_len": 256, "enable_prefix_caching": False, "audit": str(tmp_path)}
    prompt = random_prompts((250,), seed=5)[0]
    with engine(model, "snapkv", quantization=int8, **arguments) as llm:
        worker = worker_of(llm)
        evictor, names = worker._evictor, worker._evictor._projections._names
        reserved, kept, lasting = worker._beside_cache(names), [], 0
        passing = evictor._projections.bytes_at_most()[1]  # beside the scores, while projections are made
        for at_hand in (False, True):
            if at_hand:
                shape = evictor._projections._shape
                evictor._projections = Projections(worker.model_runner.get_model(), names, *shape, keep=True)
            for policy in POLICIES:
                with measured(monkeypatch) as live:
                    (answer,) = generate(llm, [prompt], 2, extra_args=[{"kv_eviction": policy}])
                kept.append(audit_of(tmp_path, answer.request_id).mask())
                if not at_hand and MODE == "pretend":
                    makes = PRESETS[policy].needs_values
                    assert live.peak - live.now <= reserved.scores - (0 if makes else passing), policy
                    lasting += live.now
        assert MODE != "pretend" or lasting == reserved.projections > 0
    for policy, ours, expected in zip(POLICIES, kept, kept[len(POLICIES) :], strict=False):
        assert torch.equal(ours, expected), policy
    assert not torch.equal(kept[0], kept[3])  # values weigh, so the test can fail
