"""Engine tests on vLLM's CUDA platform: with a GPU, or in a process that believes it has one (`pretend.py`).

CUDA_TESTS=gpu       this process uses the GPU: the same tests, compiled, and those that only a GPU can show
CUDA_TESTS=pretend   this process pretends; what `test_own_process.py` starts
unset                neither: what needs no platform, and `test_own_process.py`
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

MODE = os.environ.get("CUDA_TESTS", "")
assert MODE in ("", "gpu", "pretend"), f"CUDA_TESTS={MODE}: choose gpu or pretend, or leave it unset"
# What needs no platform is not run once more by the process that pretends; vLLM's modules on a GPU's platform want
# tensors on the GPU, which tests of modules do not give them.
PLAIN = ("again", "blocks", "memory", "metadata", "own_process", "runtime", "wheels")
collect_ignore_glob = {
    "": ["test_engine_*.py"],
    "gpu": ["test_own_process.py", "test_engine_rotation.py"],
    "pretend": [f"test_{name}.py" for name in PLAIN],
}[MODE]
if MODE == "gpu":
    os.environ.setdefault(
        "TRITON_F32_DEFAULT", "ieee"
    )  # vLLM's float32 attention is compared to 1e-4; TF32 is not that
if MODE == "pretend":
    from tests.cuda import pretend

    pretend.finish()


WITH_KERNELS = (
    "compaction", "decode", "foretold", "norms", "quantised_compaction", "reconstruction", "selection", "window",
)  # fmt: skip


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a random Llama of two layers, 4 query and 2 KV heads of size 32."""
    from tests.tiny_model import write_tiny_llama

    return write_tiny_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama", num_layers=2)


@pytest.fixture
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where `request.param` is "reference", the kernels' references run instead of them, unless there is a GPU: what
    takes these a millisecond takes the interpreter a second. `tests/kernels` holds the two to each other."""
    if MODE == "pretend" and request.param == "reference":
        for name in WITH_KERNELS:
            monkeypatch.setattr(f"vllm_defensive_kernels.{name}.runs_triton", lambda tensor: False)
    return str(request.param)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How often each of our kernels was asked for, by name: proof that no other path gave the right answer."""
    from vllm_defensive.worker.cuda import launches

    calls: dict[str, int] = {}

    def counted(name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            calls[name] = calls.get(name, 0) + 1
            return function(*args, **kwargs)

        return call

    scores = "window_scores", "value_norm", "reconstruction_scores", "learned_scores", "learned_page_scores"
    for name in (*scores, "ragged_paged_decode", "list_kept", "compact", "compact_quantised"):
        monkeypatch.setattr(launches, name, counted(name, getattr(launches, name)))
    yield calls
