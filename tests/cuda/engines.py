"""What engines on the CUDA platform need beside what `tests/e2e/engines.py` gives them."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from tests.cuda.conftest import MODE
from tests.e2e import engines
from vllm_defensive.platforms import only_on_cpus
from vllm_defensive.policy import PRESETS, Policy

_MODES: dict[str, dict[str, Any]] = {
    # Operations that are compiled only have a torch twin inside vLLM; warm-ups would take the interpreter minutes.
    "pretend": {
        "compilation_config": {"custom_ops": ["none"]},
        "kernel_config": {
            "ir_op_priority": {"rms_norm": ["native"], "fused_add_rms_norm": ["native"]},
            "enable_jit_warmup": False,
        },
    },
    # One engine after the other in one process, and several processes at a time: none may take all of the memory, nor
    # measure how much the others leave.
    "gpu": {"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 28},
}


def _on_gpus(policy: Policy) -> bool:
    """Without a learned score."""
    return not (only_on_cpus(policy.name) or policy.learned)


def engine(model: Path, policy: str | None = None, **arguments: Any) -> AbstractContextManager[Any]:
    """An `LLM` with small chunks and a small pool, whose requests may choose any policy that a GPU has."""
    sizes = {
        "enforce_eager": True,
        "block_size": 16,
        "max_model_len": 1024,
        "max_num_batched_tokens": 128,
        "max_num_seqs": 8,
        "num_gpu_blocks_override": 400,
        **({} if policy is None else {"policies": [name for name, p in PRESETS.items() if _on_gpus(p)]}),
    }
    return engines.engine(model, policy, **{**_MODES[MODE], **sizes, **arguments})
