"""What the kernels share that make attention of products: logits in base 2, and what an online softmax starts with.

Most models have neither of two things, and their kernels no trace of them: a *cap*, by which logits are bent to
cap * tanh(logit / cap) (Gemma 2), and the *void*, a logit of each query head for nothing, which takes its share of
attention and gives no value (the attention sinks of gpt-oss).
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from vllm_defensive_kernels.checks import refuse, require_device, require_dtype, require_shape

LOG2E = math.log2(math.e)
_LOG2E = tl.constexpr(LOG2E)


def factors(scale: float, cap: float) -> tuple[float, float]:
    """(what a kernel multiplies products with, its constant CAP): of what it makes `bent`."""
    return (2 * scale * LOG2E / cap, cap * LOG2E) if cap else (scale * LOG2E, 0.0)


def check_void(name: str, void: Tensor | None, shape: tuple[int, ...], device: torch.device) -> None:
    """Raise ValueError for logits of nothing that a kernel does not take."""
    if void is not None:
        require_shape(name, void, shape)
        require_dtype(name, void, (torch.float32, torch.float16, torch.bfloat16))
        require_device(name, void, device)
        if not void.is_contiguous():
            refuse(f"{name}.stride()", void.stride(), "a contiguous tensor")


@triton.jit
def bent(scaled, CAP: tl.constexpr):
    """Logits in base 2, of products that were multiplied by the first of `factors`."""
    if CAP == 0.0:
        return scaled
    return CAP - 2.0 * CAP / (tl.exp2(scaled) + 1.0)  # tanh(y) = 1 - 2 / (exp(2y) + 1), at both ends too


@triton.jit
def before_any_key(void_ptr, head, live, part, BLOCK_M: tl.constexpr):
    """Highest logit and sum that an online softmax of BLOCK_M rows starts with. head: query head of each row. live:
    which rows there are. part: of those that are merged later, the first has the void, if there is one."""
    best = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    if void_ptr is not None:
        void = tl.load(void_ptr + head, mask=live, other=float("-inf")).to(tl.float32) * _LOG2E
        best = tl.where(part == 0, void, best)
        total = tl.where(best == float("-inf"), 0.0, 1.0)
    return best, total
