"""What the kernels share: when they run, how a token's page is found, and the product of two tiles."""

from __future__ import annotations

import os

import triton
import triton.language as tl
from torch import Tensor

# Triton reads this when a kernel is decorated, so it holds for the life of the process.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"

# The interpreter multiplies the bit patterns of bf16 numbers; there, tiles are widened first.
_WIDEN = tl.constexpr(INTERPRETED)


def runs_triton(tensor: Tensor) -> bool:
    """True where the Triton kernel is to run: on CUDA, and on the CPU in Triton's interpreter."""
    return tensor.is_cuda or INTERPRETED


def power_of_two(value: int, least: int = 1) -> int:
    """The smallest power of two that is at least `value` and `least`."""
    return max(least, 1 << max(value - 1, 0).bit_length())


def width(head_size: int) -> int:
    """How often 128 numbers fit the padded head: 1, 2 or 4. Tiles were measured on an H200 with heads of 64 to 128
    numbers; of wider heads they take so many times fewer tokens, so that shared memory and registers hold them."""
    return max(1, power_of_two(head_size) // 128)


@triton.jit
def positional_page(token, valid, table_ptr, first_page, block_pages, N: tl.constexpr):
    """int64 page of each prompt token, whose block is listed at table_ptr; first_page is that of block 0."""
    block = tl.load(table_ptr + token // N, mask=valid, other=0)
    return first_page + block.to(tl.int64) * block_pages


@triton.jit
def in_page(place, row_stride, ROW: tl.constexpr):
    """How far a number (a byte, an fp16 number) is from the first one of its page. ROW: numbers of a row; 0 where the
    rows of a page follow one another, and nothing has to be divided."""
    if ROW == 0:
        return place
    return place // ROW * row_stride + place % ROW


@triton.jit
def product(a, b):
    """a @ b in fp32 without TF32: scores are compared with one another, and TF32 would make many of them equal."""
    if _WIDEN:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return tl.dot(a, b, input_precision="ieee")
